"""The committed hyperparameters: experiment -> method -> values and how they were found."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.shared.methods import METHODS, Choice, Hyperparameters
from benchmarks.shared.results import write_json

TUNED = Path(__file__).with_name("tuned.json")


class TunedError(ValueError):
    """The file of tuned values cannot be used; the message says why and what to do."""


def load_hyperparameters(experiment: str, method: str, path: Path = TUNED) -> Hyperparameters:
    """The tuned values of a method, checked against its search space.

    Raises:
      TunedError: the file is missing or malformed, or its values are not the method's.
    """
    entry = read_tuned(path).get(experiment, {}).get(method, {})
    if not isinstance(entry, dict) or not isinstance(entry.get("hyperparameters"), dict):
        raise TunedError(
            f"{path} has no hyperparameters for {method} on {experiment}. Tune it (python -m "
            f"benchmarks tune --methods {method}) or leave it out with --methods."
        )
    values = entry["hyperparameters"]
    space = METHODS[method].space
    if set(values) != set(space):
        raise TunedError(
            f"{path} gives {method} on {experiment} the hyperparameters {', '.join(values)}; "
            f"it takes {', '.join(space)}."
        )
    for name, value in values.items():
        if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise TunedError(
                f"{path} gives {method} on {experiment} {name} = {value!r}; "
                "it must be a positive number."
            )
    return values


def in_search_space(method: str, values: Hyperparameters) -> bool:
    """Whether a search over the method's space could have found these values."""
    return all(
        values[name] in allowed.values
        if isinstance(allowed, Choice)
        else allowed.low <= values[name] <= allowed.high
        for name, allowed in METHODS[method].space.items()
    )


def read_tuned(path: Path = TUNED) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise TunedError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise TunedError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict) or not all(isinstance(at, dict) for at in content.values()):
        raise TunedError(f"{path} is not a JSON object: experiment -> method -> hyperparameters.")
    return content


def save_tuned(experiment: str, method: str, entry: Mapping[str, Any], path: Path = TUNED) -> None:
    """Replace one method's entry, and leave all others as they are."""
    content = read_tuned(path) if path.exists() else {}
    content.setdefault(experiment, {})[method] = dict(entry)
    write_json(path, content)
