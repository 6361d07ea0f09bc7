"""One training run of a contestant: its compiled step, its losses, the seconds of a step."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

import locoprop_jax as lp
from benchmarks.defaults.contestants import Contestant, Setting
from benchmarks.defaults.problem import Arrays, Problem
from benchmarks.shared.steps import LossFn, Params, State, interrupt_deferred

LEFT_OUT = 5  # first steps, which are not timed: allocations, caches

Numbers = Mapping[str, Any]  # a setting and "steps": the arguments of a compiled step
Evaluate = Callable[[Params, Arrays], float]

_CAPTURE: dict[str, dict[str, Any]] = {  # by kind of contestant
    "captured": {},
    "gauss_newton": {"curvature": "ggn_mc", "defer_curvature": True},
}


class Compiled(NamedTuple):
    """A contestant's step on a problem, the same for all settings, seeds and numbers of steps.

    Attributes:
      start: the state that parameters and a key begin with.
      step: a training step, which the state is donated to.
      seconds: that finding the layers, tracing and compiling took.
    """

    start: Callable[[Numbers, Params, Array], State]
    step: Callable[[Numbers, State, Arrays], State]
    seconds: float


class Outcome(NamedTuple):
    """What came of a run.

    Attributes:
      first_loss: on the training examples, before the first step.
      train_loss, test_loss: at the end; infinite for a run that diverged, and the test loss not a
        number where nothing is held out.
      seconds_per_step: the mean over all but the first few steps.
    """

    first_loss: float
    train_loss: float
    test_loss: float
    seconds_per_step: float


def compile_step(problem: Problem, contestant: Contestant) -> Compiled:
    """Compile a contestant's step.

    Raises:
      ValueError: the method refuses the network; the message says why.
    """
    with interrupt_deferred():
        started = time.perf_counter()
        key = jax.random.key(0)
        params = jax.eval_shape(problem.init, key)
        batch = next(problem.batches(0, 1))
        captures = contestant.kind != "plain"
        layers = lp.find_layers(problem.loss_fn, params, batch) if captures else None

        def build(numbers: Numbers) -> optax.GradientTransformationExtraArgs:
            setting = dict(numbers)
            schedule = contestant.shape(setting.pop("steps"))
            return optax.with_extra_args_support(contestant.make(layers, setting, schedule))

        def begin(numbers: Numbers, params: Params, rng: Array) -> State:
            # Copied, because an optimizer may keep the parameters that it started from, and one
            # buffer cannot be donated twice.
            return jax.tree.map(jnp.copy, State(params, build(numbers).init(params), rng))

        update = _update(problem.loss_fn, contestant)

        def step(numbers: Numbers, state: State, batch: Arrays) -> State:
            return update(build(numbers), state, batch)

        numbers = numbers_of(contestant.grid[0], problem.steps)
        start = jax.jit(begin)
        state = jax.eval_shape(start, numbers, params, key)
        compiled = jax.jit(step, donate_argnums=1).lower(numbers, state, batch).compile()
        return Compiled(start, compiled, time.perf_counter() - started)


def numbers_of(setting: Setting, steps: int) -> Numbers:
    return {name: np.float32(value) for name, value in (*setting.items(), ("steps", steps))}


def _update(
    loss_fn: LossFn, contestant: Contestant
) -> Callable[[optax.GradientTransformationExtraArgs, State, Arrays], State]:
    """A training step of an optimizer, by what its kind needs."""

    def plain(params: Params, batch: Arrays, rng: Array) -> tuple[Params, dict[str, Any], Array]:
        return jax.grad(loss_fn)(params, batch), {}, rng

    def captured(params: Params, batch: Arrays, rng: Array) -> tuple[Params, dict[str, Any], Array]:
        options = _CAPTURE[contestant.kind]
        sampled = {}
        if options:
            rng, sampled["rng"] = jax.random.split(rng)
        capture = lp.value_grad_and_capture(loss_fn, **options)
        loss, grads, arrays = capture(params, batch, **sampled)
        extra: dict[str, Any] = {"captured": arrays}
        if contestant.kind == "gauss_newton":
            extra |= {"value": loss, "grad": grads, "value_fn": lambda p: loss_fn(p, batch)}
        return grads, extra, rng

    gradient = plain if contestant.kind == "plain" else captured

    def update(tx: optax.GradientTransformationExtraArgs, state: State, batch: Arrays) -> State:
        grads, extra, rng = gradient(state.params, batch, state.rng)
        updates, opt_state = tx.update(grads, state.opt_state, state.params, **extra)
        return State(optax.apply_updates(state.params, updates), opt_state, rng)

    return update


def train(
    problem: Problem,
    contestant: Contestant,
    compiled: Compiled,
    evaluate: Evaluate,
    setting: Setting,
    seed: int,
    steps: int,
) -> Outcome:
    """Train from a seed's parameters on its batches, which are the same for all contestants."""
    numbers = numbers_of(setting, steps)
    init_key, rng = jax.random.split(jax.random.key(seed))
    params = problem.init(init_key)
    examples = problem.evaluation()
    first_loss = evaluate(params, examples["train"])
    state = compiled.start(numbers, params, rng)
    left_out = min(LEFT_OUT, steps - 1)
    started = 0.0
    for taken, batch in enumerate(problem.batches(seed, steps)):
        if taken == left_out:
            jax.block_until_ready(state)
            started = time.perf_counter()
        state = compiled.step(numbers, state, batch)
    jax.block_until_ready(state)
    seconds = (time.perf_counter() - started) / (steps - left_out)
    params = contestant.evaluated(state.opt_state, state.params)
    losses = {split: _or_infinite(evaluate(params, part)) for split, part in examples.items()}
    return Outcome(first_loss, losses["train"], losses.get("test", math.nan), seconds)


def _or_infinite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
