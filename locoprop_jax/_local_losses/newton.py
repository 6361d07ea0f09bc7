"""The local problem of a matching loss by Newton's method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from locoprop_jax import _iterative, _linalg
from locoprop_jax._layers.rows import Block, pull, push
from locoprop_jax._local_losses.divergences import Divergence
from locoprop_jax._local_losses.local_problem import LocalProblem
from locoprop_jax._local_losses.regularizers import Regularizer
from locoprop_jax._local_losses.solver import Solver, is_quadratic, rounds, stateless, static_count


def newton(iterations: int = 3, *, cg_iterations: int = 10) -> Solver:
    """Newton's method on the matching loss, each system by conjugate gradient.

    The Hessian of the local loss for output j is X' diag(f'(A~_j)) X + lambda_r I, never formed.
    As gamma -> 0 one iteration, solved to convergence, is LocoProp-M's solution (Proposition 3 for
    one example). A step is halved until the local loss descends all along it.

    Args:
      iterations: Newton steps, at least 1.
      cg_iterations: for each of them, at least 1.

    Raises:
      TypeError, ValueError: wrong iterations.
    """
    iterations = static_count("iterations", iterations)
    cg_iterations = static_count("cg_iterations", cg_iterations)

    def solve(problem: LocalProblem, state: Any) -> tuple[Block, Any]:
        x, penalty, gain = problem.inputs, problem.penalty, problem.gain or (lambda change: change)
        assert penalty.gradient is not None
        penalty_gradient = penalty.gradient
        apart = problem.outputs_apart and penalty.weight is not None
        inner_product = _linalg.dot_by_column if apart else _linalg.dot

        def step(_: Array, carry: tuple[Block, Array]) -> tuple[Block, Array]:
            delta, change = carry
            rows, derivative = jax.linearize(gain, change)
            slope = _linalg.add(
                _linalg.add(problem.slope, pull(x, rows, delta)), penalty_gradient(delta)
            )

            def hessian(v: Block) -> Block:
                return _linalg.add(pull(x, derivative(push(x, v)), v), penalty_gradient(v))

            right = jax.tree.map(jnp.negative, slope)
            direction, _ = _iterative.conjugate_gradient(
                hessian, right, inner_product, cg_iterations
            )
            moved = push(x, direction)
            # The derivative of the local loss along the direction needs no more products with X.
            fixed = inner_product(_linalg.add(problem.slope, penalty_gradient(delta)), direction)
            growth = inner_product(penalty_gradient(direction), direction)

            def along(t: Array) -> Array:
                at_rows = gain(change + _linalg.scale(moved, t))
                return fixed + t * growth + inner_product(at_rows, moved)

            t = _halved(along, 1e-3 * jnp.abs(inner_product(slope, direction)))
            return (
                _linalg.add(delta, _linalg.scale(direction, t)),
                change + _linalg.scale(moved, t),
            )

        start = _linalg.zeros_like(problem.slope)
        count = rounds(problem, iterations)
        change = jnp.zeros_like(problem.cotangents)
        return jax.lax.fori_loop(0, count, step, (start, change))[0], state

    def refuse(divergence: Divergence, regularizer: Regularizer | None) -> str:
        if divergence.name == "squared":
            return "a squared loss takes one Newton step: use `exact()` or `conjugate_gradient()`"
        if not divergence.is_convex:
            return "its Hessian is indefinite: use `anderson()` or `inner(...)`"
        if not is_quadratic(regularizer):
            return "matching losses may be unbounded below: use `l2()` or `mahalanobis()`"
        return ""

    return Solver("newton", stateless, solve, refuse)


def _halved(along: Callable[[Array], Array], flat: Array) -> Array:
    """One, halved until the derivative there is no more than flat; at most ten times."""
    start = jnp.ones_like(flat)
    return jax.lax.fori_loop(0, 10, lambda _, t: jnp.where(along(t) <= flat, t, t / 2), start)
