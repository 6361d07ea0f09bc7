"""The runner all experiments share: one problem, one method, one training run.

Nothing here knows an experiment or a method. Every method starts from the same parameters and sees
the same batches, and the seconds reported are those of its steps alone: compilation and evaluation
are timed apart or not at all.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

import locoprop_jax as lp
from benchmarks.methods import Hyperparameters, Method

Params = Any
Batch = Any  # a pytree of arrays whose first axis is the example
LossFn = Callable[[Params, Batch], Float[Array, ""]]

WARMUP = 0.05  # of all steps, as the paper's 5 of 100 epochs
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
    """

    method: str
    label: str
    hyperparameters: Hyperparameters
    curve: list[EpochRecord]
    step_losses: list[float]
    compile_seconds: float
    params: Params
    stopped: str | None = None


class NonFiniteLoss(ArithmeticError):
    """Training diverged."""


class State(NamedTuple):
    params: Params
    opt_state: optax.OptState


Step = Callable[[State, Batch, Int[Any, " batch"]], tuple[State, Float[Array, ""]]]


def warmup_linear_decay(peak: float, steps: int) -> optax.Schedule:
    """Linear warm-up over the first 5% of the steps, then linear decay that ends at zero.

    No step is wasted on a rate of zero: the first has a share of the peak, the last a share too.
    """
    warmup = max(1, round(WARMUP * steps))

    def schedule(count: ArrayLike) -> Float[Array, ""]:
        taken = jnp.asarray(count, jnp.float32)
        rising = (taken + 1) / warmup
        falling = (steps - taken) / max(1, steps - warmup + 1)
        return peak * jnp.clip(jnp.minimum(rising, falling), 0, 1)

    return schedule


def epoch_batches(
    examples: int, batch_size: int, epoch: int, seed: int
) -> Iterator[Int[np.ndarray, " batch"]]:
    """The indices of an epoch's batches: shuffled anew, the incomplete last batch left out."""
    order = np.random.default_rng([seed, epoch]).permutation(examples).astype(np.int32)
    for start in range(0, examples - batch_size + 1, batch_size):
        yield order[start : start + batch_size]


def count_examples(batch: Batch) -> int:
    return len(jax.tree.leaves(batch)[0])


def make_step(loss_fn: LossFn, tx: optax.GradientTransformationExtraArgs, capture: bool) -> Step:
    """One training step, to be jitted: the whole training set and a batch's indices go in.

    The set lives on the device, so that a step moves a few kilobytes of indices and no images.
    """

    def step(
        state: State, examples: Batch, indices: Int[Any, " batch"]
    ) -> tuple[State, Float[Array, ""]]:
        batch = jax.tree.map(lambda leaf: leaf[indices], examples)
        if capture:
            loss, grads, captured = lp.value_grad_and_capture(loss_fn)(state.params, batch)
            extra = {"captured": captured}
        else:
            loss, grads = jax.value_and_grad(loss_fn)(state.params, batch)
            extra = {}
        updates, opt_state = tx.update(grads, state.opt_state, state.params, **extra)
        return State(optax.apply_updates(state.params, updates), opt_state), loss

    return step


def make_evaluation(loss_fn: LossFn) -> Callable[[Params, Batch], float]:
    """The mean loss over many examples, a piece at a time."""
    jitted = jax.jit(loss_fn)

    def evaluate(params: Params, examples: Batch) -> float:
        count = count_examples(examples)
        starts = range(0, count, EVALUATION_BATCH)
        sizes = [min(EVALUATION_BATCH, count - start) for start in starts]
        losses = [jitted(params, _slice(examples, start, EVALUATION_BATCH)) for start in starts]
        return sum(float(loss) * size for loss, size in zip(losses, sizes, strict=True)) / count

    return evaluate


def _slice(examples: Batch, start: int, size: int) -> Batch:
    return jax.tree.map(lambda leaf: leaf[start : start + size], examples)


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
            raise NonFiniteLoss
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
    curve: list[EpochRecord] = []
    step_losses: list[float] = []
    kept, compile_seconds, stopped = None, 0.0, None

    def record(epoch: int, seconds: float, params: Params) -> EpochRecord:
        losses = [evaluate(params, split) for split in evaluated]
        if not all(map(math.isfinite, losses)):
            raise NonFiniteLoss
        return EpochRecord(epoch, epoch * steps_per_epoch, seconds, *losses)

    def keep_loss(loss: float) -> None:
        step_losses.append(loss)
        on_loss(loss)

    try:
        examples = jax.device_put(problem.train)
        evaluated = [jax.device_put(_slice(split, 0, EVALUATION_EXAMPLES)) for split in splits]
        params = jax.jit(problem.init)(jax.random.key(settings.seed))
        started = time.perf_counter()
        peak, rest = split_learning_rate(hyperparameters)
        schedule = warmup_linear_decay(peak, steps_per_epoch * settings.epochs)
        state, step = compile_step(
            problem.loss_fn, method, schedule, rest, params, examples, settings.batch_size
        )
        compile_seconds = time.perf_counter() - started
        kept = _copy_to_host(state.params)
        curve.append(record(0, 0.0, state.params))
        for epoch in range(1, settings.epochs + 1):
            batches = epoch_batches(size, settings.batch_size, epoch, settings.seed)
            started = time.perf_counter()
            state = run_epoch(step, state, examples, batches, keep_loss)
            seconds = curve[-1].seconds + time.perf_counter() - started
            curve.append(record(epoch, seconds, state.params))
            kept = _copy_to_host(state.params)
            on_epoch(curve[-1])
    except (NonFiniteLoss, KeyboardInterrupt) as error:
        _wait_for_device()
        if not curve:  # nothing to show yet
            raise
        diverged = f"non-finite loss after step {len(step_losses)}"
        stopped = diverged if isinstance(error, NonFiniteLoss) else INTERRUPTED
    return Run(
        name, method.label, hyperparameters, curve, step_losses, compile_seconds, kept, stopped
    )


def split_learning_rate(hyperparameters: Hyperparameters) -> tuple[float, Hyperparameters]:
    """The schedule's peak, and what remains for `Method.build`."""
    rest = dict(hyperparameters)
    return rest.pop("learning_rate"), rest


def compile_step(
    loss_fn: LossFn,
    method: Method,
    schedule: optax.Schedule,
    hyperparameters: Hyperparameters,
    params: Params,
    examples: Batch,
    batch_size: int,
) -> tuple[State, Step]:
    """Build the optimizer and compile its step. `params` are donated with the state."""
    layers = None
    if method.needs_capture:
        layers = lp.find_layers(loss_fn, params, _slice(examples, 0, batch_size))
    tx = method.build(layers, schedule, **hyperparameters)
    # Under jit the state's arrays are fresh buffers of settled types: safe to donate, no retrace.
    state = jax.jit(lambda params: State(params, tx.init(params)))(params)
    step = jax.jit(make_step(loss_fn, tx, method.needs_capture), donate_argnums=0)
    indices = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    return state, step.lower(state, examples, indices).compile()


def _copy_to_host(params: Params) -> Params:
    # A copy, because a view of a CPU buffer would be donated away by the next step.
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), params)


def _wait_for_device() -> None:
    # Python crashes when it exits while JAX still computes on the CPU. The arrays of an interrupted
    # function are alive as long as its exception is being handled.
    jax.block_until_ready([array for array in jax.live_arrays() if not array.is_deleted()])
