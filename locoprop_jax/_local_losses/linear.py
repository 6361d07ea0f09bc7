"""The local problem of a squared loss, whose optimum solves a linear system."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from locoprop_jax import _iterative, _linalg
from locoprop_jax._layers.blocks import matrix, unmatrix
from locoprop_jax._layers.rows import Block, extend, extended_moment
from locoprop_jax._local_losses import coordinates
from locoprop_jax._local_losses.divergences import Divergence
from locoprop_jax._local_losses.local_problem import LocalProblem
from locoprop_jax._local_losses.regularizers import Regularizer
from locoprop_jax._local_losses.solver import (
    Solver,
    acts_as_number,
    is_quadratic,
    rounds,
    stateless,
    static_count,
)


def conjugate_gradient(iterations: int = 10) -> Solver:
    """Conjugate gradient on the local optimum of a squared loss, matrix-free.

    Each output is a system of its own. Without a regularizer the iterations go towards the least
    squares solution that is nearest to W.

    Raises:
      TypeError, ValueError: wrong iterations.
    """
    iterations = static_count("iterations", iterations)

    def solve(problem: LocalProblem, state: Any) -> tuple[Block, Any]:
        at = coordinates.coordinates(problem, iterations + 1, "auto", ["direct", "gram"])
        penalty = problem.penalty

        def apply(delta: Block) -> Block:
            image = at.gain(delta)
            return (
                image if penalty.gradient is None else _linalg.add(image, penalty.gradient(delta))
            )

        right = jax.tree.map(jnp.negative, at.slope)
        inner_product = _linalg.dot_by_column if acts_as_number(problem) else _linalg.dot
        count = rounds(problem, iterations)
        return _iterative.conjugate_gradient(apply, right, inner_product, count)[0], state

    def refuse(divergence: Divergence, regularizer: Regularizer | None) -> str:
        if divergence.name != "squared":
            return "its equations are not linear: use `newton()`, `anderson()` or `inner(...)`"
        if regularizer is not None and not regularizer.is_quadratic:
            return f"`{regularizer.name}` is not quadratic: use `inner(optax.sgd, iterations)`"
        return ""

    return Solver("conjugate_gradient", stateless, solve, refuse)


def exact() -> Solver:
    """The local optimum of a squared loss in closed form (LocoProp, eqs. 5 and 15).

    With `l2` W - gamma (lambda_r I + X'X)^-1 G, by Cholesky of the smaller of X'X and XX'; with
    `mahalanobis` in the eigenbases of its two factors.
    """

    def solve(problem: LocalProblem, state: Any) -> tuple[Block, Any]:
        if problem.penalty.weight is not None:
            solution = _exact_l2
        elif problem.penalty.factors is not None:
            solution = _exact_kronecker
        else:
            raise ValueError("`exact` knows the regularizers `l2` and `mahalanobis` only.")
        zeros = _linalg.zeros_like(problem.slope)
        return jax.lax.cond(problem.ok, lambda: solution(problem), lambda: zeros), state

    def refuse(divergence: Divergence, regularizer: Regularizer | None) -> str:
        if divergence.name != "squared":
            return "there is no closed form: use `newton()`, `anderson()` or `inner(...)`"
        if not is_quadratic(regularizer):
            return "the closed form needs `l2()` or `mahalanobis()`, without which it is singular"
        return ""

    return Solver("exact", stateless, solve, refuse)


def _exact_l2(problem: LocalProblem) -> Block:
    slope, weight = problem.slope, problem.penalty.weight
    assert weight is not None
    x = extend(problem.inputs, slope)
    return unmatrix(-_linalg.ridge(x, matrix(slope), problem.cotangents, weight), slope)


def _exact_kronecker(problem: LocalProblem) -> Block:
    """X'X delta + weight A delta B = -slope, with A of the eigenvectors of X'X."""
    slope, factors = problem.slope, problem.penalty.factors
    assert factors is not None
    weight, left, right = factors
    values, q = jnp.linalg.eigh(extended_moment(problem.inputs, slope))
    left_values = jnp.einsum("ji,jk,ki->i", q, left, q)
    right_values, p = jnp.linalg.eigh(right)
    metric = weight * left_values[:, None] * right_values[None]
    denominator = jnp.maximum(values, 0)[:, None] + metric
    return unmatrix(-q @ (q.T @ matrix(slope) @ p / denominator) @ p.T, slope)
