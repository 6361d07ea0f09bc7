"""The local problem by iterations of an Optax optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from locoprop_jax import _linalg
from locoprop_jax._layers.rows import Block
from locoprop_jax._local_losses import coordinates
from locoprop_jax._local_losses.coordinates import Coordinates
from locoprop_jax._local_losses.divergences import Divergence
from locoprop_jax._local_losses.local_problem import LocalProblem
from locoprop_jax._local_losses.regularizers import Regularizer
from locoprop_jax._local_losses.solver import Solver, acts_as_number, rounds, static_count


def inner(
    optimizer: Callable[[Any], optax.GradientTransformation],
    iterations: int = 10,
    *,
    path: str = "auto",
) -> Solver:
    """Minimise each local loss by a few steps of an Optax optimizer (LocoProp, Algorithms 1, 2).

    Iteration k of T has learning rate eta max(1 - k/T, 1/4), the reference's schedule. The
    optimizer's state persists across batches. `inner(optax.sgd, T)` is plain gradient descent,
    which can run in the space of the batch's rows: much cheaper for batches smaller than a layer.

    Args:
      optimizer: the optimizer's constructor, called with the learning rate:
        `functools.partial(optax.rmsprop, momentum=0.9)`.
      iterations: T, at least 1.
      path: "auto" takes the cheapest way to the same iterates; "direct", "gram" and "dual" name
        one, for tests and benchmarks.

    Raises:
      TypeError: `optimizer` is an optimizer instead of its constructor, or `iterations` is no int.
      ValueError: `iterations` is below 1.
    """
    if isinstance(optimizer, optax.GradientTransformation) or not callable(optimizer):
        raise TypeError(
            "`inner` takes the constructor of an optimizer, which it calls with the learning rate "
            "of each iteration, such as `functools.partial(optax.rmsprop, momentum=0.9)`; got "
            f"{optimizer!r}."
        )
    iterations = static_count(
        "iterations",
        iterations,
        ' With `optax.inject_hyperparams`, name it in `static_args=("iterations", "optimizer")`.',
    )
    is_plain = optimizer is optax.sgd

    def rate(problem: LocalProblem, k: Array) -> Array:
        eta = problem.learning_rate
        return eta * jnp.maximum(1 - k.astype(eta.dtype) / iterations, 0.25)

    def plain(problem: LocalProblem, state: Any) -> tuple[Block, Any]:
        shrink = problem.penalty.shrink
        allowed = ["direct", "gram", *(["dual"] if acts_as_number(problem) else [])]
        at = coordinates.coordinates(problem, iterations, path, allowed)

        def step(k: Array, delta: Any) -> Any:
            eta = rate(problem, k)
            delta = _linalg.add(delta, _linalg.scale(_slope(problem, at, k, delta), -eta))
            return delta if shrink is None else shrink(delta, eta)

        count = rounds(problem, iterations)
        delta = jax.lax.fori_loop(0, count, step, _linalg.zeros_like(at.slope))
        return at.block(delta), state

    def adaptive(problem: LocalProblem, state: Any) -> tuple[Block, Any]:
        at = coordinates.coordinates(problem, iterations, path, ["direct", "gram"])

        def step(k: Array, carry: tuple[Block, Any]) -> tuple[Block, Any]:
            delta, state = carry
            slope = _slope(problem, at, k, delta)
            weights = _linalg.add(problem.weights, delta)
            updates, state = optimizer(rate(problem, k)).update(slope, state, weights)
            return jax.tree.map(lambda d, u: d + u.astype(d.dtype), delta, updates), state

        count = rounds(problem, iterations)
        return jax.lax.fori_loop(0, count, step, (_linalg.zeros_like(problem.slope), state))

    def _slope(problem: LocalProblem, at: Coordinates, k: Array, delta: Any) -> Any:
        """The local gradient; at W it is known."""
        if iterations == 1:
            return at.slope
        return jax.lax.cond(
            k > 0,
            lambda d: coordinates.gradient(at, problem.penalty, d),
            lambda d: at.slope,
            delta,
        )

    def refuse(divergence: Divergence, regularizer: Regularizer | None) -> str:
        if regularizer is None or regularizer.name != "l1" or is_plain:
            return ""
        return (
            "`l1` is a proximal step, which is known for plain gradient steps only: use "
            "`inner(optax.sgd, iterations)`"
        )

    def init(block: Block) -> Any:
        return optimizer(0.0).init(block)

    return Solver("inner", init, plain if is_plain else adaptive, refuse)
