"""Train one problem with several methods, and keep what was finished whatever happens."""

import sys
from collections.abc import Callable, Mapping, Sequence

from benchmarks.methods import METHODS, Hyperparameters
from benchmarks.report import progress
from benchmarks.steps import count_examples
from benchmarks.training import INTERRUPTED, Problem, Run, Settings, train


def compare(
    problem: Problem,
    hyperparameters: Mapping[str, Hyperparameters],
    settings: Settings,
    on_run: Callable[[Sequence[Run]], None] = lambda runs: None,
) -> tuple[list[Run], bool]:
    """Train with each method in turn.

    Args:
      problem: the network, its loss and its data.
      hyperparameters: method -> the keywords of its `build`, in the order to train.
      settings: what all methods share.
      on_run: called with the runs so far after each of them.

    Returns:
      The runs, and whether Ctrl-C cut them short. A run that diverges does not stop the others.
    """
    steps = settings.epochs * (count_examples(problem.train) // settings.batch_size)
    runs: list[Run] = []
    try:
        for name, values in hyperparameters.items():
            method = METHODS[name]
            with progress(method.label, steps) as on_loss:
                run = train(problem, name, method, values, settings, on_loss)
            runs.append(run)
            on_run(runs)
            if run.stopped == INTERRUPTED:
                return runs, True
            if run.stopped:
                print(f"{method.label} stopped: {run.stopped}.", file=sys.stderr)
    except KeyboardInterrupt:  # before the first step: that method has nothing to show yet
        return runs, True
    return runs, False
