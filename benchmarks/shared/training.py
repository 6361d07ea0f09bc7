"""The runner all experiments share: one problem, one method, one training run.

Nothing here knows an experiment or a method. Every method starts from the same parameters and sees
the same batches, and the seconds reported are those of its steps alone: compilation and evaluation
are timed apart or not at all.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Array, Int

import locoprop_jax as lp
from benchmarks.shared.methods import Hyperparameters, Method
from benchmarks.shared.steps import (
    Batch,
    LossFn,
    Params,
    State,
    Step,
    compile_step,
    count_examples,
    interrupt_deferred,
    slice_examples,
    split_learning_rate,
    warmup_linear_decay,
)

EVALUATION_EXAMPLES = 10_000  # at most, of the training and of the test set: the first ones
EVALUATION_BATCH = 1000
INTERRUPTED = "interrupted"
LOSS_LAG = 2  # steps; enough to keep the device busy, little enough to stop soon at a NaN


class Problem(NamedTuple):
    """What an experiment asks of every method.

    Attributes:
      name: the experiment's key in tuned.json.
      init: parameters from a random key.
      loss_fn: the mean loss of a batch.
      train, test: all examples, as a batch is (a pytree of NumPy arrays). Without test examples
        (None), there is no test loss.
    """

    name: str
    init: Callable[[Array], Params]
    loss_fn: LossFn
    train: Batch
    test: Batch | None


class Settings(NamedTuple):
    """What all methods of a comparison share."""

    epochs: int
    batch_size: int
    seed: int


class EpochRecord(NamedTuple):
    """Where a run stood at the end of an epoch (0: before the first step)."""

    epoch: int
    step: int
    seconds: float  # of the steps so far
    train_loss: float
    test_loss: float | None = None


class Run(NamedTuple):
    """What came of one method's training.

    Attributes:
      curve: a record for each epoch that was finished.
      step_losses: the batch's loss before each step.
      compile_seconds: finding the layers, tracing and compiling the step.
      params: at the last record of the curve (NumPy).
      stopped: why the run ended early; None for a complete one.
      diagnostics: of the optimizer's state at the last record; none of other libraries' states.
    """

    method: str
    label: str
    hyperparameters: Hyperparameters
    curve: list[EpochRecord]
    step_losses: list[float]
    compile_seconds: float
    params: Params
    stopped: str | None = None
    diagnostics: Mapping[str, float] = MappingProxyType({})


class NonFiniteLoss(ArithmeticError):
    """Training diverged."""


def epoch_batches(
    examples: int, batch_size: int, epoch: int, seed: int
) -> Iterator[Int[np.ndarray, " batch"]]:
    """The indices of an epoch's batches: shuffled anew, the incomplete last batch left out."""
    order = np.random.default_rng([seed, epoch]).permutation(examples).astype(np.int32)
    for start in range(0, examples - batch_size + 1, batch_size):
        yield order[start : start + batch_size]


def make_evaluation(loss_fn: LossFn) -> Callable[[Params, Batch], float]:
    """The mean loss over many examples, a piece at a time."""
    jitted = jax.jit(loss_fn)

    def evaluate(params: Params, examples: Batch) -> float:
        count = count_examples(examples)
        starts = range(0, count, EVALUATION_BATCH)
        sizes = [min(EVALUATION_BATCH, count - start) for start in starts]
        losses = [
            jitted(params, slice_examples(examples, start, EVALUATION_BATCH)) for start in starts
        ]
        return sum(float(loss) * size for loss, size in zip(losses, sizes, strict=True)) / count

    return evaluate


def run_epoch(
    step: Step,
    state: State,
    examples: Batch,
    batches: Iterable[Int[np.ndarray, " batch"]],
    on_loss: Callable[[float], None],
) -> State:
    """Take a step per batch. Losses are read a few steps late, so that the device never waits.

    Raises:
      NonFiniteLoss: a batch's loss was not finite.
    """
    pending: deque[Array] = deque()

    def read_oldest() -> None:
        loss = float(pending.popleft())
        if not math.isfinite(loss):
            raise NonFiniteLoss("the loss is not finite")
        on_loss(loss)

    for indices in batches:
        state, loss = step(state, examples, indices)
        pending.append(loss)
        if len(pending) > LOSS_LAG:
            read_oldest()
    while pending:
        read_oldest()
    return jax.block_until_ready(state)


def train(
    problem: Problem,
    name: str,
    method: Method,
    hyperparameters: Hyperparameters,
    settings: Settings,
    on_loss: Callable[[float], None] = lambda loss: None,
    on_epoch: Callable[[EpochRecord], None] = lambda record: None,
) -> Run:
    """Train with one method. A diverging or interrupted run keeps the epochs that it finished.

    Args:
      problem: the network, its loss and its data.
      name: the method's key, for the record.
      method: how to build the optimizer.
      hyperparameters: `method.build`'s keywords, and "learning_rate", the schedule's peak.
      settings: what all methods share.
      on_loss: called with each step's loss, a few steps late.
      on_epoch: called at the end of each epoch; what it raises ends the training.

    Raises:
      NonFiniteLoss, KeyboardInterrupt: before the first step; later they end the run early.
    """
    size = count_examples(problem.train)
    steps_per_epoch = size // settings.batch_size
    splits = [problem.train] if problem.test is None else [problem.train, problem.test]
    evaluate = make_evaluation(problem.loss_fn)
    step_losses: list[float] = []
    stopped = None

    def record(epoch: int, seconds: float, params: Params) -> EpochRecord:
        losses = [evaluate(params, split) for split in evaluated]
        if not all(map(math.isfinite, losses)):
            raise NonFiniteLoss("the loss is not finite")
        return EpochRecord(epoch, epoch * steps_per_epoch, seconds, *losses)

    def keep_loss(loss: float) -> None:
        step_losses.append(loss)
        on_loss(loss)

    with interrupt_deferred():
        examples = jax.device_put(problem.train)
        evaluated = [
            jax.device_put(slice_examples(split, 0, EVALUATION_EXAMPLES)) for split in splits
        ]
        params = jax.jit(problem.init)(jax.random.key(settings.seed))
        started = time.perf_counter()
        peak, rest = split_learning_rate(hyperparameters)
        make_schedule = method.schedule or warmup_linear_decay
        state, step = compile_step(
            problem.loss_fn,
            method,
            make_schedule(peak, steps_per_epoch * settings.epochs),
            rest,
            params,
            examples,
            settings.batch_size,
            settings.seed,
        )
        compile_seconds = time.perf_counter() - started
        curve, kept = [record(0, 0.0, state.params)], _copy_to_host(state.params)
        said: dict[str, float] = {}
    try:
        for epoch in range(1, settings.epochs + 1):
            batches = epoch_batches(size, settings.batch_size, epoch, settings.seed)
            started = time.perf_counter()
            state = run_epoch(step, state, examples, batches, keep_loss)
            seconds = curve[-1].seconds + time.perf_counter() - started
            curve.append(record(epoch, seconds, state.params))
            kept, said = _copy_to_host(state.params), _diagnostics(state.opt_state)
            on_epoch(curve[-1])
    except NonFiniteLoss:
        stopped = f"non-finite loss after step {len(step_losses)}"
    except KeyboardInterrupt:
        stopped = INTERRUPTED
    return Run(
        name,
        method.label,
        hyperparameters,
        curve,
        step_losses,
        compile_seconds,
        kept,
        stopped,
        said,
    )


def _diagnostics(opt_state: optax.OptState) -> dict[str, float]:
    try:
        return {name: float(number) for name, number in lp.diagnostics(opt_state).items()}
    except ValueError:  # a baseline
        return {}


def _copy_to_host(params: Params) -> Params:
    # A copy, because a view of a CPU buffer would be donated away by the next step.
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), params)
