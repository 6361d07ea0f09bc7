"""Look around along one method's training run."""

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np

from benchmarks.shared.comparison import Job
from benchmarks.shared.report import progress
from benchmarks.shared.steps import (
    Batch,
    State,
    compile_step,
    count_examples,
    interrupt_deferred,
    split_learning_rate,
    warmup_linear_decay,
)
from benchmarks.shared.training import epoch_batches

Measured = TypeVar("Measured")


def follow(
    job: Job, every: int, measure: Callable[[State, Batch], Measured], label: str
) -> tuple[dict[int, Measured], bool]:
    """Train, and measure every so many updates: what a measurement gave by the updates before it.

    Args:
      job: the run.
      every: the updates from one measurement to the next. The first is after one update, when a
        method has adapted its numbers.
      measure: of the state and the batch of the update to come. It keeps nothing of the state.
      label: of the progress bar.

    Returns:
      The measurements, and whether Ctrl-C cut them short.
    """
    problem, settings = job.problem, job.settings
    size = count_examples(problem.train)
    steps = settings.epochs * (size // settings.batch_size)
    peak, rest = split_learning_rate(job.hyperparameters)
    found: dict[int, Measured] = {}
    try:
        with interrupt_deferred():
            examples = jax.device_put(problem.train)
            state, step = compile_step(
                problem.loss_fn,
                job.method,
                (job.method.schedule or warmup_linear_decay)(peak, steps),
                rest,
                jax.jit(problem.init)(jax.random.key(settings.seed)),
                examples,
                settings.batch_size,
                settings.seed,
            )
        taken = 0
        with progress(label, steps) as on_loss:
            for epoch in range(1, settings.epochs + 1):
                for indices in epoch_batches(size, settings.batch_size, epoch, settings.seed):
                    if taken and (taken - 1) % every == 0:
                        batch = jax.tree.map(lambda leaf, at=indices: leaf[at], examples)
                        found[taken] = jax.tree.map(np.asarray, measure(state, batch))
                    state, loss = step(state, examples, indices)
                    taken += 1
                    on_loss(float(loss))
    except KeyboardInterrupt:
        return found, True
    return found, False
