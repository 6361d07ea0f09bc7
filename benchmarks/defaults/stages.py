"""The order of work on a problem: rivals, our methods, then Adam for as many seconds as each."""

from collections.abc import Callable, Collection, Mapping

from benchmarks.defaults.choice import chosen, ranked, seconds_ratio
from benchmarks.defaults.contestants import ADAM, CONTESTANTS, Contestant, describe
from benchmarks.defaults.runs import Runs

ADAM_RATES = 2  # of its best ones at equal steps, those that are tried for longer


def rivals(runs: Runs, methods: Collection[str], seeds: int) -> None:
    """The whole grid with one seed, the best settings with the others."""
    for contestant in _of(methods, tuned=True):
        runs.train_all(contestant, contestant.grid, [0])
        best = {chosen(runs.rows, contestant, loss) for loss in contestant.tuned_by}
        settings = [setting for setting in contestant.grid if describe(setting) in best]
        runs.train_all(contestant, settings, range(1, seeds))


def ours(runs: Runs, methods: Collection[str], seeds: int) -> None:
    """The default with all seeds, its multiples with one."""
    for contestant in _of(methods, tuned=False):
        default, *multiples = contestant.grid
        runs.train_all(contestant, [default], range(seeds))
        runs.train_all(contestant, multiples, [0])


def seconds(runs: Runs, methods: Collection[str], seeds: int) -> None:
    """Adam, for as long as each of our methods trained."""
    adam = CONTESTANTS[ADAM]
    by_name = {describe(setting): setting for setting in adam.grid}
    for contestant in _of(methods, tuned=False):
        ratio = seconds_ratio(runs.rows, contestant.name)
        if ratio is None:
            continue
        settings = [by_name[name] for name in ranked(runs.rows, ADAM, "train_loss")[:ADAM_RATES]]
        runs.train_all(adam, settings, [0], ratio)
        best = by_name[ranked(runs.rows, ADAM, "train_loss", ratio)[0]]
        runs.train_all(adam, [best], range(seeds), ratio)


STAGES: Mapping[str, Callable[[Runs, Collection[str], int], None]] = {
    "rivals": rivals,
    "ours": ours,
    "seconds": seconds,
}


def _of(methods: Collection[str], tuned: bool) -> list[Contestant]:
    return [
        contestant
        for name, contestant in CONTESTANTS.items()
        if name in methods and bool(contestant.tuned_by) == tuned
    ]
