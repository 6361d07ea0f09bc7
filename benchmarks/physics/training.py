"""One run: steps until the seconds are over, and the error at times that get further apart."""

import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.physics.methods import Method, make_step, schedule
from benchmarks.physics.problems import Problem, init

APART = 1.12  # between two looks at the error, in seconds and in steps


class Curve(NamedTuple):
    """Of a run: at some steps the seconds so far, the loss and the error; compiling not counted."""

    steps: list[int]
    seconds: list[float]
    losses: list[float]
    errors: list[float]

    @property
    def final(self) -> float:
        return self.errors[-1] if math.isfinite(self.errors[-1]) else math.inf

    def seconds_to(self, error: float) -> float | None:
        """When the error was as small for the first time; None if it never was."""
        at = (s for s, e in zip(self.seconds, self.errors, strict=True) if e <= error)
        return next(at, None)

    def error_at(self, seconds: float) -> float:
        """The last error that was seen by then."""
        pairs = zip(self.seconds, self.errors, strict=True)
        return [error for second, error in pairs if second <= seconds][-1]


def train(problem: Problem, method: Method, factor: float, seconds: float, seed: int = 0) -> Curve:
    """Train for so many seconds, of which looks at the error and compiling are no part."""
    params = init(jax.random.key(seed), problem.inputs)
    state, step = make_step(method, problem.loss, params)
    zero = jnp.asarray(0.0)
    look = jax.jit(lambda params: (problem.loss(params), problem.error(params)))
    # Compiled, twice where the types of a state change with the first step.
    jax.block_until_ready((step(*step(params, state, zero), zero), look(params)))
    curve = Curve([], [], [], [])
    taken, spent, next_look = 0, 0.0, 0.0

    def note(params: Any) -> None:
        loss, error = look(params)
        curve.steps.append(taken)
        for values, value in zip(curve[1:], (spent, float(loss), float(error)), strict=True):
            values.append(value)

    note(params)
    while spent < seconds and math.isfinite(curve.losses[-1]):
        size = jnp.asarray(factor * schedule(spent / seconds))
        start = time.perf_counter()
        params, state = jax.block_until_ready(step(params, state, size))
        spent += time.perf_counter() - start
        taken += 1
        if spent >= next_look:
            note(params)
            next_look = max(spent * APART, spent + seconds / 1000)
    note(params)
    return curve
