"""Where results are kept, and how they are written."""

import json
import os
from pathlib import Path
from typing import Any

HOME = Path(__file__).parents[1]
RESULTS = HOME / "results"


def shown(path: Path) -> Path:
    """A committed file or folder as somebody at the root of the repository names it."""
    return path.relative_to(HOME.parent)


def write_json(path: Path, content: Any) -> None:
    """Write in one go, so that an interrupted run never leaves half a file."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    os.replace(temporary, path)


def write_measurement(path: Path, content: Any) -> None:
    """Write what was measured, and say where it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
    print(f"\nWritten to {path}")
