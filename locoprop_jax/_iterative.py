"""Iterations for damped Hermitian systems and for fixed points, on trees of arrays."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from locoprop_jax._linalg import Dot, Tree, add, dot, scale, solve, zeros_like


def _ratio(numerator: Array, denominator: Array) -> Array:
    """The quotient; zero where the denominator is not positive: a direction of no curvature."""
    positive = denominator > 0
    return jnp.where(positive, numerator / jnp.where(positive, denominator, 1), 0)


def conjugate_gradient(
    apply: Callable[[Tree], Tree],
    right: Tree,
    dot: Dot,
    iterations: int | Array,
    *,
    start: Tree | None = None,
    precondition: Callable[[Tree], Tree] = lambda residual: residual,
) -> tuple[Tree, Tree]:
    """Iterations of conjugate gradient on `apply(x) = right`.

    Args:
      apply: a positive semi-definite linear map.
      right: the right-hand side.
      dot: an inner product; `dot_by_column` solves each column as a system of its own, for maps
        that do not mix columns.
      iterations: how many, static or not.
      start: a guess. Its best multiple is where the iterations start, zero if they would have to
        turn back: so the quadratic that they lower is never above its value at zero, and the
        solution a direction of descent. It costs one more `apply`. None for zero.
      precondition: a positive semi-definite linear map like the inverse of `apply`.

    Returns:
      The solution and its residual, right - apply(x).
    """
    body, carry = _conjugate(apply, right, dot, start, precondition)
    iterations += int(start is not None)  # the first is along the start
    x, residual, *_ = jax.lax.fori_loop(0, iterations, lambda _, carry: body(carry), carry)
    return x, residual


def truncated_conjugate_gradient(
    apply: Callable[[Tree], Tree],
    right: Tree,
    iterations: int,
    tolerance: float | Array,
    *,
    start: Tree,
) -> tuple[Tree, Tree, Int[Array, ""]]:
    """The same until progress is small relative to what was made (Martens, 2010, section 4.4).

    With the quadratic phi(x) = x'Ax / 2 - b'x, iteration i is the last if phi_i is negative and
    phi_i - phi_(i-k) is above k times the tolerance times phi_i, for k = max(10, i / 10).

    Args:
      apply: a positive semi-definite linear map.
      right: the right-hand side.
      iterations: at most so many.
      tolerance: of progress per iteration.
      start: a guess, as for `conjugate_gradient`.

    Returns:
      The solution, its residual, and how many iterations were made.
    """
    body, carry = _conjugate(apply, right, dot, start, lambda residual: residual)
    dtype = carry[3].dtype

    def advance(loop: tuple) -> tuple:
        i, carry, history, _ = loop
        carry = body(carry)
        x, residual, *_ = carry
        value = -(dot(x, residual) + dot(x, right)) / 2
        i = i + 1
        history = history.at[i].set(value)
        k = jnp.maximum(10, i // 10)
        progress = value - history[jnp.maximum(i - k, 0)]
        least = k.astype(dtype) * jnp.asarray(tolerance, dtype) * value
        return i, carry, history, (i > k) & (value < 0) & (progress > least)

    def is_going(loop: tuple) -> Array:
        i, _, _, is_done = loop
        return (i < iterations + 1) & ~is_done

    first = (jnp.zeros([], jnp.int32), carry, jnp.zeros(iterations + 2, dtype), jnp.asarray(False))
    i, (x, residual, *_), _, _ = jax.lax.while_loop(is_going, advance, first)
    return x, residual, i - 1


def _conjugate(
    apply: Callable[[Tree], Tree],
    right: Tree,
    dot: Dot,
    start: Tree | None,
    precondition: Callable[[Tree], Tree],
) -> tuple[Callable[[tuple], tuple], tuple]:
    """One iteration of conjugate gradient, and what the first starts from."""
    preconditioned = precondition(right)
    size = dot(right, preconditioned)
    # Of a singular system rounding errors would be all that is left, and grow: neither is a
    # residual solved for that is nothing but these, nor a direction taken that has no curvature.
    rounding = 10 * jnp.finfo(size.dtype).eps
    solved = rounding**2 * size

    def body(carry: tuple) -> tuple:
        x, residual, direction, size, length = carry
        image = apply(direction)
        curvature = dot(direction, image)
        is_going = (size > solved) & (curvature >= rounding * length)
        along = jnp.where(is_going, jnp.maximum(dot(direction, residual), 0), 0)
        step = _ratio(along, curvature)
        x = add(x, scale(direction, step))
        residual = add(residual, scale(image, -step))
        preconditioned = precondition(residual)
        new = jnp.where(is_going, dot(residual, preconditioned), 0)
        kept = _ratio(new, size)
        direction = add(preconditioned, scale(direction, kept))
        return x, residual, direction, new, new + kept**2 * length

    # The last number is the squared length of the direction in the preconditioner's metric.
    carry = (zeros_like(right), right, preconditioned, size, size)
    if start is not None:  # the first direction, and none to be conjugate to
        carry = (*carry[:2], start, jnp.full_like(size, jnp.inf), jnp.zeros_like(size))
    return body, carry


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
