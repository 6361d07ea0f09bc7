"""What is read off the runs of one problem: the setting that counts, means, how long steps take."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.defaults.contestants import ADAM, Contestant, describe
from benchmarks.defaults.runs import Row

QUARTER = 0.25  # what ratios of seconds are rounded up to


def of_method(rows: Sequence[Row], method: str, ratio: float = 1.0) -> list[Row]:
    """A method's runs that were not refused."""
    return [row for row in rows if row.method == method and row.ratio == ratio and not row.refused]


def ranked(rows: Sequence[Row], method: str, loss: str, ratio: float = 1.0) -> list[str]:
    """The settings of a method from the best to the worst, by its loss with the first seed."""
    first = [row for row in of_method(rows, method, ratio) if row.seed == 0]
    return [row.setting for row in sorted(first, key=lambda row: getattr(row, loss))]


def chosen(rows: Sequence[Row], contestant: Contestant, loss: str) -> str | None:
    """The setting whose loss counts; None before there are runs.

    The best of the grid, by training loss where a method is not tuned by this one; for a method
    that is not tuned, its default.
    """
    if not contestant.tuned_by:
        return describe(contestant.grid[0])
    by = loss if loss in contestant.tuned_by else "train_loss"
    return next(iter(ranked(rows, contestant.name, by)), None)


def mean_loss(rows: Sequence[Row], contestant: Contestant, loss: str) -> float | None:
    """The mean over seeds at the setting that counts; None where there are no runs."""
    return mean_at(rows, contestant.name, chosen(rows, contestant, loss), loss)


def mean_at(
    rows: Sequence[Row], method: str, setting: str | None, loss: str, ratio: float = 1.0
) -> float | None:
    """The mean over seeds at a setting; None where there are no runs, or no such losses."""
    found = [getattr(row, loss) for row in of_method(rows, method, ratio) if row.setting == setting]
    return None if not found or any(map(math.isnan, found)) else statistics.fmean(found)


def seconds_per_step(rows: Sequence[Row], method: str) -> float | None:
    """The median over a method's runs of the problem's own length."""
    found = [row.seconds_per_step for row in of_method(rows, method)]
    return statistics.median(found) if found else None


def seconds_ratio(rows: Sequence[Row], method: str) -> float | None:
    """How many steps Adam takes in the time of one of a method's, rounded up to a quarter.

    At least one, so that noise in the timing never takes steps from Adam.
    """
    own, adam = seconds_per_step(rows, method), seconds_per_step(rows, ADAM)
    if own is None or adam is None:
        return None
    return max(1.0, math.ceil(own / adam / QUARTER) * QUARTER)


class Longer(NamedTuple):
    """Adam with as many seconds as another method: how many times the steps, its mean losses."""

    ratio: float
    train_loss: float | None
    test_loss: float | None


def adam_in_time(rows: Sequence[Row], method: str) -> Longer | None:
    """Adam in a method's seconds; the next longer runs stand in for those of the exact ratio.

    None where there are no such runs.
    """
    wanted = seconds_ratio(rows, method)
    if wanted is None:
        return None
    ratios = sorted({row.ratio for row in rows if row.method == ADAM and row.ratio >= wanted})
    if not ratios:
        return None
    setting = ranked(rows, ADAM, "train_loss", ratios[0])[0]
    train_loss, test_loss = (
        mean_at(rows, ADAM, setting, loss, ratios[0]) for loss in ("train_loss", "test_loss")
    )
    return Longer(ratios[0], train_loss, test_loss)
