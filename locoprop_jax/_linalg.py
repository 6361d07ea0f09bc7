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
    kinds = {real_dtype(x.dtype) for x in jax.tree.leaves(total)}
    weights = {kind: 1 - power(decay, steps, kind) for kind in kinds}
    return jax.tree.map(lambda x: x / weights[real_dtype(x.dtype)].astype(x.dtype), total)


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


def diagonals(tree: Tree) -> Tree:
    """Of all square matrices in a tree, which may be stacked; other leaves as they are.

    A positive semidefinite matrix is finite if its diagonal is, which is far less to look at.
    """

    def of_leaf(x: Array) -> Array:
        if x.ndim < 2 or x.shape[-1] != x.shape[-2]:
            return x
        # A sum, because `jnp.diagonal` gathers, which takes longer to compile.
        return jnp.where(jnp.eye(x.shape[-1], dtype=bool), x, jnp.zeros_like(x)).sum(-1)

    return jax.tree.map(of_leaf, tree)


def mean_eigenvalue(matrix: Float[Array, "n n"] | Float[Array, " n"]) -> Float[Array, ""]:
    """Of a symmetric matrix, or of one given by its diagonal."""
    return matrix.mean() if matrix.ndim == 1 else jnp.real(jnp.trace(matrix)) / len(matrix)


def eigenvalues(
    matrix: Float[Array, "*stack n n"] | Float[Array, "*stack n"], *, is_diagonal: bool
) -> Float[Array, "*stack n"]:
    """Of Hermitian matrices, or of some that are given by their diagonals."""
    return matrix if is_diagonal else jnp.linalg.eigvalsh(matrix)


def multiply(
    matrix: Float[Array, "n n"] | Float[Array, " n"], right: Float[Array, "n m"]
) -> Float[Array, "n m"]:
    """The product with a matrix, or with one given by its diagonal."""
    return matrix[:, None].astype(right.dtype) * right if matrix.ndim == 1 else matrix @ right


def multiply_right(
    left: Float[Array, "m n"], matrix: Float[Array, "n n"] | Float[Array, " n"]
) -> Float[Array, "m n"]:
    """The product with a matrix behind, or with one given by its diagonal."""
    return left * matrix[None].astype(left.dtype) if matrix.ndim == 1 else left @ matrix


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
