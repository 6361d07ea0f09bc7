"""The runs of a problem: a row of a CSV file each; what is in the file is not run again."""

import csv
import io
import math
import os
import typing
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from benchmarks.defaults.contestants import Contestant, Setting, describe
from benchmarks.defaults.problem import Problem
from benchmarks.defaults.training import Compiled, compile_step, train
from benchmarks.shared.training import make_evaluation


class Row(NamedTuple):
    """A training run.

    Attributes:
      problem, method: their names.
      setting: as `describe` has it.
      seed: of parameters and batches.
      steps: the problem's; `ratio` times as many were taken.
      first_loss, train_loss, test_loss, seconds_per_step: as in `Outcome`; infinite for a method
        that refused the network.
      compile_seconds: the same for all runs that share a compilation.
      refused: why the method did not run; empty where it did.
    """

    problem: str
    method: str
    setting: str
    seed: int
    steps: int
    ratio: float
    first_loss: float
    train_loss: float
    test_loss: float
    seconds_per_step: float
    compile_seconds: float
    refused: str = ""


Key = tuple[str, str, int, int, float]

_TYPES = typing.get_type_hints(Row)


def key_of(row: Row) -> Key:
    """What tells a run from others of its problem."""
    return row.method, row.setting, row.seed, row.steps, row.ratio


def read(path: Path) -> list[Row]:
    """The stored runs, the latest last, and only the later of two of the same run."""
    if not path.exists():
        return []
    rows: dict[Key, Row] = {}
    with path.open(newline="") as file:
        for row in filter(None, map(_parse, csv.reader(file))):
            rows.pop(key_of(row), None)
            rows[key_of(row)] = row
    return list(rows.values())


def append(path: Path, row: Row) -> None:
    """Add a row at once and to the disk: what is killed loses the run it was in, and no more."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    with path.open("a+b") as file:
        size = file.tell()
        if size == 0:
            writer.writerow(Row._fields)
        else:
            file.seek(size - 1)
            if file.read() != b"\n":  # after an interrupted write
                text.write("\n")
        writer.writerow(row)
        file.write(text.getvalue().encode())
        file.flush()
        os.fsync(file.fileno())


def _parse(cells: list[str]) -> Row | None:
    """None for the header, and for a line that a kill cut short."""
    if len(cells) != len(Row._fields):
        return None
    try:
        return Row(*(_TYPES[name](cell) for name, cell in zip(Row._fields, cells, strict=True)))
    except ValueError:
        return None


class Runs:
    """The runs of one problem, trained where they are not stored.

    Args:
      problem: what is trained.
      path: the CSV file.
      again: methods whose stored runs do not count, because their code has changed since.
    """

    def __init__(self, problem: Problem, path: Path, again: Collection[str] = ()):
        self.problem = problem
        self._path = path
        stored = read(path)
        self._rows = {key_of(row): row for row in stored if row.method not in again}
        self._compiled: dict[str, Compiled | str] = {}
        self._evaluate = make_evaluation(problem.loss_fn)

    @property
    def rows(self) -> list[Row]:
        """Those of the problem's present number of steps."""
        return [row for row in self._rows.values() if row.steps == self.problem.steps]

    def train_all(
        self,
        contestant: Contestant,
        settings: Iterable[Setting],
        seeds: Iterable[int],
        ratio: float = 1.0,
    ) -> list[Row]:
        """The rows of these settings and seeds."""
        seeds = list(seeds)
        return [
            self.train(contestant, setting, seed, ratio) for setting in settings for seed in seeds
        ]

    def train(self, contestant: Contestant, setting: Setting, seed: int, ratio: float = 1.0) -> Row:
        """A run's row, stored or new."""
        key = (contestant.name, describe(setting), seed, self.problem.steps, ratio)
        if key not in self._rows:
            self._rows[key] = self._train(contestant, setting, seed, ratio)
            append(self._path, self._rows[key])
            print(progress(self._rows[key]), flush=True)
        return self._rows[key]

    def _train(self, contestant: Contestant, setting: Setting, seed: int, ratio: float) -> Row:
        problem = self.problem
        names = (problem.name, contestant.name, describe(setting), seed, problem.steps, ratio)
        if contestant.name not in self._compiled:
            try:
                self._compiled[contestant.name] = compile_step(problem, contestant)
            except ValueError as error:
                self._compiled[contestant.name] = " ".join(str(error).split())
        compiled = self._compiled[contestant.name]
        if isinstance(compiled, str):
            return Row(*names, *[math.inf] * 5, refused=compiled)
        steps = round(ratio * problem.steps)
        outcome = train(problem, contestant, compiled, self._evaluate, setting, seed, steps)
        return Row(*names, *outcome, compiled.seconds)


def progress(row: Row) -> str:
    """A run in a line."""
    who = f"{row.problem:<16} {row.method:<14} {row.setting:<36} seed {row.seed}"
    if row.refused:
        return f"{who}  refused: {row.refused}"
    longer = f", {row.ratio:g} times the steps" if row.ratio != 1 else ""
    return (
        f"{who}  training loss {row.train_loss:<9.4g} test loss {row.test_loss:<9.4g} "
        f"{1000 * row.seconds_per_step:.3g} ms/step{longer}"
    )
