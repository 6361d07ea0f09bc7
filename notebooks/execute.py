"""Execute the notebooks in place, so that what they show is of this version.

    python notebooks/execute.py [NAME.ipynb ...]

All of them, or those named. `LOCOPROP_QUICK=1` makes short runs; the tests use `execute` for that
and store nothing. Needs the extra `notebooks` of the package, and the package importable.
"""

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(path: Path) -> NotebookNode:
    """What the notebook is after a run of all cells; an error in a cell is raised."""
    notebook = nbformat.read(path, as_version=4)
    os.environ.pop("MPLBACKEND", None)  # figures go into the notebook
    NotebookClient(
        notebook,
        timeout=900,
        kernel_name="python3",
        coalesce_streams=True,
        record_timing=False,
        resources={"metadata": {"path": str(FOLDER)}},
    ).execute()
    return without_noise(notebook)


def without_noise(notebook: NotebookNode) -> NotebookNode:
    """Without what differs from machine to machine, so that a diff shows what changed."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = nbformat.from_dict({})
    return notebook


def main(names: list[str]) -> None:
    paths = [FOLDER / Path(name).name for name in names] or sorted(FOLDER.glob("*.ipynb"))
    for path in paths:
        start = time.perf_counter()
        nbformat.write(execute(path), path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
