"""Damped Hermitian systems and iterations for them, on arrays and on trees of arrays.

Nothing here knows of layers. A tree is a pytree of arrays with a common last axis; an inner
product of two trees is a scalar, or one number for each entry of that axis, which then solves as
many systems at once. Arrays may be complex: X' is then the conjugate transpose, and an inner
product its real part, that of the real and imaginary parts as numbers of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jax.lax.linalg import triangular_solve
from jaxtyping import Array, Bool, Float, Int

from locoprop_jax._trees import real_dtype, wide_dtype

Tree = Any
Dot = Callable[[Tree, Tree], Array]

# --- trees ---------------------------------------------------------------------------------------


def add(a: Tree, b: Tree) -> Tree:
    return jax.tree.map(jnp.add, a, b)


def scale(tree: Tree, by: float | Array) -> Tree:
    """Times a number, or a number for each entry of the last axis."""

    def product(x: Array) -> Array:
        factor = jnp.asarray(by, x.dtype)
        return x * factor.reshape((1,) * (x.ndim - factor.ndim) + factor.shape)

    return jax.tree.map(product, tree)


def zeros_like(tree: Tree) -> Tree:
    return jax.tree.map(jnp.zeros_like, tree)


def wide(tree: Tree) -> Tree:
    """In float32 at least, where products of half-precision entries do not overflow."""
    return jax.tree.map(lambda x: x.astype(wide_dtype([x])), tree)


def dot(a: Tree, b: Tree) -> Float[Array, ""]:
    """The inner product of two trees."""
    return functools.reduce(jnp.add, jax.tree.leaves(jax.tree.map(_inner, a, b)))


def _inner(a: Array, b: Array) -> Float[Array, ""]:
    return jnp.real(jnp.vdot(a, b))


def dot_for_many(a: Tree, b: Tree) -> Float[Array, ""]:
    """The same for trees of many leaves, or of none, where many kernels ask for it."""
    return total(jax.tree.leaves(jax.tree.map(_inner, a, b)))


def dot_by_column(a: Tree, b: Tree) -> Float[Array, " d"]:
    """The inner product of two trees for each entry of the last axis."""

    def columns(x: Array, y: Array) -> Array:
        return jnp.real(jnp.conj(x) * y).sum(tuple(range(x.ndim - 1)))

    return functools.reduce(jnp.add, jax.tree.leaves(jax.tree.map(columns, a, b)))


def where(condition: Bool[Array, ""], true: Tree, false: Tree) -> Tree:
    """One of two trees as a whole."""
    return jax.tree.map(lambda t, f: jnp.where(condition, t, f), true, false)


def total(terms: Sequence[Float[Array, ""]], dtype: Any = None) -> Float[Array, ""]:
    """The sum of scalars that many kernels will ask for."""
    if not terms:  # all may be masked
        return jnp.zeros((), dtype)
    if len(terms) <= 4:
        return functools.reduce(jnp.add, terms)
    scalars = jnp.stack(terms)
    # In a loop, because XLA would add them anew in each of those kernels.
    add_one = lambda i, so_far: so_far + scalars[i]  # noqa: E731
    return jax.lax.fori_loop(0, len(terms), add_one, jnp.zeros((), scalars.dtype))


def all_finite(tree: Tree) -> Bool[Array, ""]:
    """Whether all entries are finite, by their sums: far quicker to compile than `isfinite`."""
    leaves = jax.tree.leaves(tree)
    dtype = wide_dtype(leaves)
    return jnp.isfinite(total([jnp.sum(x, dtype=dtype) for x in leaves], dtype))


# --- moving averages -----------------------------------------------------------------------------


def power(decay: float | Array, steps: Int[Array, ""], dtype: Any) -> Float[Array, ""]:
    """What is left of a moving average after some steps."""
    return jnp.asarray(decay, dtype) ** steps.astype(dtype)


def average(total: Tree, new: Tree, kept: float | Array) -> Tree:
    """The running sum of a moving average, with one more term."""

    def add_to(old: Array, term: Array) -> Array:
        share = jnp.asarray(kept, old.dtype)
        return share * old + (1 - share) * term

    return jax.tree.map(add_to, total, new)


def debiased(total: Tree, decay: float | Array, steps: Int[Array, ""]) -> Tree:
    """The moving average itself, by the sum of its weights after these steps."""

    def of_leaf(x: Array) -> Array:
        weights = 1 - power(decay, steps, real_dtype(x.dtype))
        return x / weights.astype(x.dtype)

    return jax.tree.map(of_leaf, total)


# --- direct --------------------------------------------------------------------------------------


def adjoint(matrix: Float[Array, "m n"]) -> Float[Array, "n m"]:
    """Transposed, and conjugated if it is complex."""
    return jnp.conj(matrix).T


def squares(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """|x|^2 by entries: real."""
    return jnp.square(x.real) + jnp.square(x.imag) if jnp.iscomplexobj(x) else jnp.square(x)


def second_moment(
    left: Float[Array, "rows m"], right: Float[Array, "rows n"] | None = None
) -> Float[Array, "m n"]:
    """Left' right (left' left if there is no right), precise enough to be factorised."""
    right = left if right is None else right
    return jnp.matmul(adjoint(left), right, precision=Precision.HIGHEST)


def damped(
    matrix: Float[Array, "n n"] | Float[Array, " n"],
    damping: float | Float[Array, ""] | Float[Array, " n"],
    *,
    relative: bool = False,
) -> Float[Array, "n n"] | Float[Array, " n"]:
    """Add damping to a positive semi-definite matrix, or to one given by its diagonal.

    It is one number, or one for each coordinate. Relative damping is in units of the mean
    eigenvalue. A zero matrix gets a tiny multiple of the identity rather than stay singular.
    """
    amount = jnp.asarray(damping, real_dtype(matrix.dtype))
    if relative:
        amount = amount * mean_eigenvalue(matrix)
    amount = jnp.maximum(amount, jnp.finfo(matrix.dtype).tiny)
    if matrix.ndim == 1:
        return matrix + amount
    return matrix + jnp.diag(jnp.broadcast_to(amount, len(matrix))).astype(matrix.dtype)


def diagonal(
    matrix: Float[Array, "n n"] | Float[Array, " n"],
) -> Float[Array, " n"]:
    """Of a Hermitian matrix, or of one given by it: real."""
    return matrix if matrix.ndim == 1 else jnp.real(jnp.diagonal(matrix))


def mean_eigenvalue(matrix: Float[Array, "n n"] | Float[Array, " n"]) -> Float[Array, ""]:
    """Of a symmetric matrix, or of one given by its diagonal."""
    return matrix.mean() if matrix.ndim == 1 else jnp.real(jnp.trace(matrix)) / len(matrix)


def multiply(
    matrix: Float[Array, "n n"] | Float[Array, " n"], right: Float[Array, "n m"]
) -> Float[Array, "n m"]:
    """The product with a matrix, or with one given by its diagonal."""
    return matrix[:, None].astype(right.dtype) * right if matrix.ndim == 1 else matrix @ right


def solve(
    matrix: Float[Array, "n n"] | Float[Array, " n"], right: Float[Array, "n m"]
) -> Float[Array, "n m"]:
    """Solve a positive definite system by Cholesky; of a diagonal one, given as a vector."""
    if matrix.ndim == 1:
        return right / matrix[:, None].astype(right.dtype)
    return cholesky_solve(cholesky(matrix), right)


def cholesky(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """The lower Cholesky factor of a positive definite matrix; not finite where there is none.

    Only the lower triangle is read, so rounding errors need not be symmetric.
    """
    return jax.lax.linalg.cholesky(matrix, symmetrize_input=False)


def cholesky_solve(
    factor: Float[Array, "n n"], right: Float[Array, "n m"] | Float[Array, " n"]
) -> Float[Array, "n m"] | Float[Array, " n"]:
    """Solve the system of a Cholesky factor."""
    columns = right.reshape(len(factor), -1)
    half = triangular_solve(factor, columns, left_side=True, lower=True)
    whole = triangular_solve(
        factor, half, left_side=True, lower=True, transpose_a=True, conjugate_a=True
    )
    return whole.reshape(right.shape)


def inverse(
    matrix: Float[Array, "n n"] | Float[Array, " n"],
) -> Float[Array, "n n"] | Float[Array, " n"]:
    """The inverse of a positive definite matrix, by Cholesky; of a diagonal one by entries."""
    if matrix.ndim == 1:
        return 1 / matrix
    return solve(matrix, jnp.eye(len(matrix), dtype=matrix.dtype))


def ridge(
    inputs: Float[Array, "rows d"],
    right: Float[Array, "d m"],
    cotangents: Float[Array, "rows m"],
    weight: float | Float[Array, ""],
) -> Float[Array, "d m"]:
    """(X'X + weight I)^-1 right, by the smaller of the systems of X'X and XX'.

    With one equation per row it is X'(XX' + weight I)^-1 C for the part X'C of the right-hand side
    that the rows make, and what is left of the rest.
    """
    rows, d_in = inputs.shape
    if not solves_by_rows(rows, d_in, right.shape[1]):
        return solve(damped(second_moment(inputs), weight), right)
    turned = adjoint(inputs)
    rest = right - turned @ cotangents
    system = damped(second_moment(turned), weight)
    weight = jnp.asarray(weight, rest.dtype)
    solution = solve(system, cotangents - inputs @ rest / weight)
    return turned @ solution + rest / weight


def solves_by_rows(rows: int, d_in: int, d_out: int) -> bool:
    """Whether the system with one equation per row is the cheaper one."""
    by_rows = 2 * rows**2 * (d_in + d_out) + rows**3 / 3 + 6 * rows * d_in * d_out
    return by_rows < 2 * d_in**2 * (rows + d_out) + d_in**3 / 3


# --- iterative -----------------------------------------------------------------------------------


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
