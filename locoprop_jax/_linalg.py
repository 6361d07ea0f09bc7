"""Damped symmetric systems and iterations for them, on arrays and on trees of arrays.

Nothing here knows of layers. A tree is a pytree of arrays with a common last axis; an inner
product of two trees is a scalar, or one number for each entry of that axis, which then solves as
many systems at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.linalg
from jax.lax import Precision
from jaxtyping import Array, Float

Tree = Any
Dot = Callable[[Tree, Tree], Array]

# --- trees ---------------------------------------------------------------------------------------


def add(a: Tree, b: Tree) -> Tree:
    return jax.tree.map(jnp.add, a, b)


def scale(tree: Tree, by: Array) -> Tree:
    """Times a number, or a number for each entry of the last axis."""

    def product(x: Array) -> Array:
        factor = jnp.asarray(by, x.dtype)
        return x * factor.reshape((1,) * (x.ndim - factor.ndim) + factor.shape)

    return jax.tree.map(product, tree)


def zeros_like(tree: Tree) -> Tree:
    return jax.tree.map(jnp.zeros_like, tree)


def dot(a: Tree, b: Tree) -> Float[Array, ""]:
    """The inner product of two trees."""
    return functools.reduce(jnp.add, jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)))


def dot_by_column(a: Tree, b: Tree) -> Float[Array, " d"]:
    """The inner product of two trees for each entry of the last axis."""

    def columns(x: Array, y: Array) -> Array:
        return (x * y).sum(tuple(range(x.ndim - 1)))

    return functools.reduce(jnp.add, jax.tree.leaves(jax.tree.map(columns, a, b)))


# --- direct --------------------------------------------------------------------------------------


def second_moment(
    left: Float[Array, "rows m"], right: Float[Array, "rows n"] | None = None
) -> Float[Array, "m n"]:
    """Left' right (left' left if there is no right), precise enough to be factorised."""
    right = left if right is None else right
    return jnp.matmul(left.T, right, precision=Precision.HIGHEST)


def damped(
    matrix: Float[Array, "n n"] | Float[Array, " n"],
    damping: float | Array,
    *,
    relative: bool = False,
) -> Float[Array, "n n"] | Float[Array, " n"]:
    """Add damping to a positive semi-definite matrix, or to one given by its diagonal.

    Relative damping is in units of the mean eigenvalue. A zero matrix gets a tiny multiple of the
    identity rather than stay singular.
    """
    eigenvalues = matrix if matrix.ndim == 1 else jnp.diagonal(matrix)
    amount = jnp.asarray(damping, matrix.dtype)
    if relative:
        amount = amount * eigenvalues.mean()
    amount = jnp.maximum(amount, jnp.finfo(matrix.dtype).tiny)
    if matrix.ndim == 1:
        return matrix + amount
    return matrix + amount * jnp.eye(len(matrix), dtype=matrix.dtype)


def solve(
    matrix: Float[Array, "n n"] | Float[Array, " n"], right: Float[Array, "n m"]
) -> Float[Array, "n m"]:
    """Solve a positive definite system by Cholesky; of a diagonal one, given as a vector."""
    if matrix.ndim == 1:
        return right / matrix[:, None]
    factor = jax.scipy.linalg.cho_factor((matrix + matrix.T) / 2, lower=True)
    return jax.scipy.linalg.cho_solve(factor, right)


# --- iterative -----------------------------------------------------------------------------------


def _ratio(numerator: Array, denominator: Array) -> Array:
    """The quotient; zero where the denominator is not positive: a direction of no curvature."""
    positive = denominator > 0
    return jnp.where(positive, numerator / jnp.where(positive, denominator, 1), 0)


def conjugate_gradient(
    apply: Callable[[Tree], Tree], right: Tree, dot: Dot, iterations: int | Array
) -> tuple[Tree, Tree]:
    """Iterations of conjugate gradient from zero on `apply(x) = right`.

    Args:
      apply: a positive semi-definite linear map.
      right: the right-hand side.
      dot: an inner product; `dot_by_column` solves each column as a system of its own, for maps
        that do not mix columns.
      iterations: how many, static or not.

    Returns:
      The solution and its residual, right - apply(x).
    """
    start = dot(right, right)
    # Of a singular system rounding errors would be all that is left, and grow.
    solved = (10 * jnp.finfo(start.dtype).eps) ** 2 * start

    def body(_: Array, carry: tuple) -> tuple:
        x, residual, direction, squared = carry
        image = apply(direction)
        step = _ratio(jnp.where(squared > solved, squared, 0), dot(direction, image))
        x = add(x, scale(direction, step))
        residual = add(residual, scale(image, -step))
        new = dot(residual, residual)
        return x, residual, add(residual, scale(direction, _ratio(new, squared))), new

    carry = (zeros_like(right), right, right, start)
    x, residual, _, _ = jax.lax.fori_loop(0, iterations, body, carry)
    return x, residual


def anderson(
    step: Callable[[Tree], Tree], start: Tree, iterations: int | Array, memory: int
) -> Tree:
    """Anderson acceleration of the fixed-point iteration x <- step(x).

    Each iterate mixes the last `memory` steps and the new one so that the mixed residual is
    smallest (Anderson, 1965). On a linear map that is GMRES: with enough memory exact after as
    many iterations as the map has distinct eigenvalues, and one more.
    """
    eps = jnp.finfo(jax.tree.leaves(start)[0].dtype).eps

    def body(k: Array, carry: tuple) -> tuple:
        x, steps, residuals = carry
        new = step(x)
        residual = jax.tree.map(jnp.subtract, new, x)
        is_filled = jnp.arange(memory) < k

        def differences(old: Array, now: Array) -> Array:
            return jnp.where(is_filled.reshape(-1, *(1,) * now.ndim), old - now[None], 0)

        changes = jax.tree.map(differences, residuals, residual)
        against = jax.vmap(dot, (0, None))
        gram = jax.vmap(against, (None, 0))(changes, changes)
        norms = jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 0))
        inverse = _ratio(jnp.ones_like(norms), norms)
        normal = gram * inverse[:, None] * inverse[None] + 10 * eps * jnp.eye(
            memory, dtype=gram.dtype
        )
        mix = -inverse * solve(normal, (inverse * against(changes, residual))[:, None])[:, 0]
        moves = jax.tree.map(differences, steps, new)
        x = jax.tree.map(lambda g, d: g + jnp.tensordot(mix, d, 1), new, moves)

        def store(old: Array, now: Array) -> Array:
            return jax.lax.dynamic_update_index_in_dim(old, now, k % memory, 0)

        return x, jax.tree.map(store, steps, new), jax.tree.map(store, residuals, residual)

    empty = jax.tree.map(lambda x: jnp.zeros((memory, *x.shape), x.dtype), start)
    return jax.lax.fori_loop(0, iterations, body, (start, empty, empty))[0]
