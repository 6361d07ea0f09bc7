"""What a method should do at its defaults, problem by problem, and where it does not."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from benchmarks.defaults.choice import adam_in_time, mean_loss, of_method
from benchmarks.defaults.contestants import ADAM, ADAMW, CONTESTANTS, OURS, Contestant, describe
from benchmarks.defaults.runs import Row

NEAR = 0.05  # how near a method's default should be to its own best

Rows = Mapping[str, Sequence[Row]]  # the runs of each problem


def factor(loss: float, best: float) -> float:
    """How many times the best loss a loss is; it makes sense for losses below zero too."""
    if not math.isfinite(loss):
        return math.inf
    if loss == best:
        return 1.0
    return 1 + (loss - best) / abs(best) if best else math.copysign(math.inf, loss)


class Comparison(NamedTuple):
    """A method's loss, another one, and the share of that by which it may be above."""

    loss: float
    other: float
    slack: float = 0.0

    @property
    def met(self) -> bool:
        return math.isfinite(self.loss) and factor(self.loss, self.other) <= 1 + self.slack


class Goal(NamedTuple):
    """What a method should do on a problem; its comparison is None where there are no runs."""

    what: str
    compare: Callable[[Sequence[Row], Contestant], Comparison | None]


def _against(rival: str, loss: str) -> Callable[[Sequence[Row], Contestant], Comparison | None]:
    def compare(rows: Sequence[Row], contestant: Contestant) -> Comparison | None:
        return comparison_of(
            mean_loss(rows, contestant, loss), mean_loss(rows, CONTESTANTS[rival], loss)
        )

    return compare


def _in_time(loss: str) -> Callable[[Sequence[Row], Contestant], Comparison | None]:
    def compare(rows: Sequence[Row], contestant: Contestant) -> Comparison | None:
        adam = adam_in_time(rows, contestant.name)
        other = adam and getattr(adam, loss)
        return comparison_of(mean_loss(rows, contestant, loss), other)

    return compare


def _near_own_best(rows: Sequence[Row], contestant: Contestant) -> Comparison | None:
    """By the first seed, the only one that all settings of ours are run with."""
    losses = {
        row.setting: row.train_loss for row in of_method(rows, contestant.name) if row.seed == 0
    }
    if set(losses) != set(map(describe, contestant.grid)):
        return None
    return Comparison(losses[describe(contestant.grid[0])], min(losses.values()), NEAR)


def comparison_of(loss: float | None, other: float | None) -> Comparison | None:
    return None if loss is None or other is None else Comparison(loss, other)


GOALS = {
    "train_loss": Goal("training loss at most tuned Adam's", _against(ADAM, "train_loss")),
    "test_loss": Goal("test loss at most tuned AdamW's", _against(ADAMW, "test_loss")),
    "near_own_best": Goal(f"training loss within {NEAR:.0%} of its own best", _near_own_best),
    "train_loss_in_time": Goal("training loss at equal seconds", _in_time("train_loss")),
    "test_loss_in_time": Goal("test loss at equal seconds", _in_time("test_loss")),
}


def compare_all(rows: Rows) -> dict[str, dict[str, dict[str, Comparison]]]:
    """Method -> goal -> problem -> what there is to compare."""
    return {
        contestant.name: {
            key: {
                problem: comparison
                for problem, of_problem in rows.items()
                if (comparison := goal.compare(of_problem, contestant)) is not None
            }
            for key, goal in GOALS.items()
        }
        for contestant in OURS
    }
