"""Train one problem with several methods, and keep what was finished whatever happens."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from benchmarks.shared.methods import METHODS, Hyperparameters, Method
from benchmarks.shared.report import progress
from benchmarks.shared.steps import count_examples
from benchmarks.shared.training import INTERRUPTED, Problem, Run, Settings, train


class Job(NamedTuple):
    """A training run to be done; `name` is its key in the results."""

    name: str
    method: Method
    hyperparameters: Hyperparameters
    problem: Problem
    settings: Settings


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
    jobs = [
        Job(name, METHODS[name], values, problem, settings)
        for name, values in hyperparameters.items()
    ]
    return train_all(jobs, on_run)


def train_all(
    jobs: Iterable[Job], on_run: Callable[[Sequence[Run]], None] = lambda runs: None
) -> tuple[list[Run], bool]:
    """Do the jobs one after the other; arguments and result as for `compare`."""
    runs: list[Run] = []
    try:
        for job in jobs:
            run = train_with_progress(job)
            runs.append(run)
            on_run(runs)
            if run.stopped == INTERRUPTED:
                return runs, True
            if run.stopped:
                print(f"{job.method.label} stopped: {run.stopped}.", file=sys.stderr)
    except KeyboardInterrupt:  # before the first step: that method has nothing to show yet
        return runs, True
    return runs, False


def train_with_progress(job: Job, label: str | None = None) -> Run:
    """Train under a progress bar with the method's name, or this label."""
    settings = job.settings
    steps = settings.epochs * (count_examples(job.problem.train) // settings.batch_size)
    with progress(label or job.method.label, steps) as on_loss:
        return train(job.problem, job.name, job.method, job.hyperparameters, settings, on_loss)
