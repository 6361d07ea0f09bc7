"""The record of a search: one CSV file per method, a row per trial, appended safely."""

import csv
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from benchmarks.shared.methods import Hyperparameters

COMPLETE, PRUNED, DIVERGED = "complete", "pruned", "diverged"
STATES = (COMPLETE, PRUNED, DIVERGED)

SearchSettings = Mapping[str, str | int]  # what was trained, on what: trials compare within it


class Trial(NamedTuple):
    """One training run of a search.

    Attributes:
      hyperparameters: what was tried.
      losses: the training loss at the end of each epoch that was finished.
      state: "complete", "pruned" (stopped for being worse than the median) or "diverged".
      seconds: of the steps.
    """

    hyperparameters: Hyperparameters
    losses: Sequence[float]
    state: str
    seconds: float

    @property
    def loss(self) -> float:
        return self.losses[-1] if self.losses else math.nan


class TrialsError(ValueError):
    """The file does not hold this search's trials; the message says what to do."""


def append_trial(path: Path, trial: Trial, settings: SearchSettings) -> None:
    """Add a row at once and to the disk: a killed search loses the trial it was in, and no more."""
    row = {
        "state": trial.state,
        "loss": repr(trial.loss),
        **{name: repr(value) for name, value in trial.hyperparameters.items()},
        "seconds": f"{trial.seconds:.1f}",
        "losses": " ".join(map(repr, trial.losses)),
        **settings,
    }
    text = io.StringIO()
    writer = csv.DictWriter(text, _columns(trial.hyperparameters, settings), lineterminator="\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell() == 0:
            writer.writeheader()
        elif not _ends_with_newline(file):
            text.write("\n")  # after an interrupted write, whose torn row is passed over when read
        writer.writerow(row)
        file.write(text.getvalue().encode())
        file.flush()
        os.fsync(file.fileno())


def read_trials(path: Path, names: Iterable[str], settings: SearchSettings) -> list[Trial]:
    """The trials of hyperparameters `names` that ran with just these settings.

    Raises:
      TrialsError: the file is of another search.
    """
    if not path.exists():
        return []
    names = tuple(names)
    columns = _columns(names, settings)
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    if not rows or rows[0] != columns:
        raise TrialsError(
            f"{path} does not start with the columns {','.join(columns)}. It is of another search: "
            "move it away, or name another directory with --results-dir."
        )
    wanted = {(name, str(value)) for name, value in settings.items()}
    whole = (dict(zip(columns, row, strict=True)) for row in rows[1:] if len(row) == len(columns))
    trials = (_parse(row, names) for row in whole if wanted <= row.items())
    return [trial for trial in trials if trial is not None]


def _columns(names: Iterable[str], settings: SearchSettings) -> list[str]:
    return ["state", "loss", *names, "seconds", "losses", *settings]


def best_trial(trials: Iterable[Trial]) -> Trial | None:
    complete = (trial for trial in trials if trial.state == COMPLETE)
    return min(complete, key=lambda trial: trial.loss, default=None)


def _parse(row: Mapping[str, str], names: Sequence[str]) -> Trial | None:
    try:
        values = {name: float(row[name]) for name in names}
        losses = [float(loss) for loss in row["losses"].split()]
        state, seconds = row["state"], float(row["seconds"])
    except ValueError:  # torn by a kill
        return None
    return Trial(values, losses, state, seconds) if state in STATES else None


def _ends_with_newline(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read() == b"\n"
