"""The exact Fisher or Gauss-Newton matrix F = G G' of a batch, never formed, and its inverse.

A column of G is the gradient of one example for one sample: at each layer a sum over positions of
outer(x, c), which is not formed either (Benzing, appendix I). So a product with F costs about one
backward pass, and by Woodbury's identity a system has one equation per column.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Float

from locoprop_jax import _linalg
from locoprop_jax._checks import warn_of_cost, warn_of_matrix
from locoprop_jax._layers.blocks import curvature_of, dtype_of, matrix, unmatrix
from locoprop_jax._layers.captured import Captured
from locoprop_jax._layers.rows import Block, as_rows, extend

# Inputs written out of which the captured arrays are so many times smaller are told of, if they are
# of some size.
MOST_TIMES, LARGE = 10, 2**20

Weights = Float[Array, "samples batch"]  # a number for each column of G


class Columns(NamedTuple):
    """What one layer adds to G: in column (s, n) the sum over p of outer(x_np, c_snp).

    Attributes:
      inputs: X, with its ones for a bias.
      cotangents: C.
    """

    inputs: Float[Array, "*stack batch shared d"]
    cotangents: Float[Array, "*stack samples batch shared d_out"]

    @property
    def count(self) -> tuple[int, int]:
        """Samples and examples."""
        samples, batch = self.cotangents.shape[-4:-2]
        return samples, batch

    def over_stack(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function of one layer for all layers of a stack, along the first axis."""
        return function if self.inputs.ndim == 3 else jax.vmap(function)


class System(NamedTuple):
    """(lambda I + F), ready to divide by.

    Attributes:
      columns: G, by layer.
      cholesky: the lower factor of lambda I + G'G.
      damping: lambda; zero where there is nothing to divide by.
    """

    columns: dict[str, Columns]
    cholesky: Float[Array, "columns columns"]
    damping: Float[Array, ""]


# --- G -------------------------------------------------------------------------------------------


def columns_of(captured: Captured, own: Mapping[str, Block], curvature: str) -> dict[str, Columns]:
    """Each layer's part of G, for the parts of the layer that its block has.

    Batches of different sizes (points inside and at the boundary) have columns one after the
    other, if the network is known to keep examples apart.

    Raises:
      ValueError: the curvature was not captured, or not by columns of one loss term each.
    """
    if curvature == "captured" and captured.has_joint_columns:
        raise ValueError(
            'The columns of `curvature="ggn_exact"` stand for several positions of an example at '
            "once, which do not meet in this network: good for a layer's factors, but their sum is "
            'no gradient of the exact Fisher. Capture "ggn_mc" or "fisher_mc" instead, or let the '
            "loss function join the positions with the batch before its first layer."
        )
    columns = {n: _columns(captured, n, like, curvature) for n, like in own.items()}
    if curvature != "captured" or not captured.are_apart:
        return columns
    batches = {n: captured[n].by_batch() for n in own}
    sizes = sorted({size for each in batches.values() for size in each})
    if len(sizes) < 2:
        return columns
    return {n: _side_by_side(batches[n], sizes, like) for n, like in own.items()}


def _columns(captured: Captured, name: str, like: Block, curvature: str) -> Columns:
    dtype, arrays = dtype_of(like), captured[name]
    kept = sum(x.size for x in jax.tree.leaves(arrays.uses))
    if arrays.inputs.size > max(MOST_TIMES * kept, LARGE):
        warn_of_cost(
            f"The exact Fisher writes out the inputs of the layer {name}: {arrays.inputs.size} "
            f"numbers where all that was captured of it are {kept}: the windows of a convolution "
            f"or the rows of a table that is looked up. Use `foof`, `lnb` or `kfac`, which leave "
            f"them as they are, or smaller batches."
        )
    extended = extend(arrays.inputs.astype(dtype), like)
    return Columns(extended, curvature_of(captured, name, curvature, dtype))


def _side_by_side(
    batches: Mapping[int, tuple[Array, Array]], sizes: Sequence[int], like: Block
) -> Columns:
    """The columns of batches of these sizes; zero where a layer has no row of one."""
    dtype = dtype_of(like)
    starts = {size: sum(sizes[:i]) for i, size in enumerate(sizes)}
    extended = {size: extend(x.astype(dtype), like) for size, (x, _) in batches.items()}
    cotangents = {size: c.astype(dtype) for size, (_, c) in batches.items()}
    shared = max(x.shape[-2] for x in extended.values())

    def placed(by_size: Mapping[int, Array]) -> Array:
        parts = []
        for size, x in by_size.items():
            after = sum(sizes) - starts[size] - size
            ends = [(starts[size], after), (0, shared - x.shape[-2]), (0, 0)]
            parts.append(jnp.pad(x, [(0, 0)] * (x.ndim - 3) + ends))
        return functools.reduce(jnp.add, parts)

    return Columns(placed(extended), placed(cotangents))


def transposed_times(columns: Mapping[str, Columns], own: Mapping[str, Block]) -> Weights:
    """G'u (eq. 21), for blocks u."""

    def of_layer(x: Array, c: Array, u: Block) -> Array:
        return _einsum("npo,snpo->sn", _einsum("npd,do->npo", x, matrix(u)), c)

    terms = [
        own_columns.over_stack(of_layer)(*own_columns, own[name]).reshape(-1, *own_columns.count)
        for name, own_columns in columns.items()
    ]
    return functools.reduce(jnp.add, [term.sum(0) for term in terms])


def times(
    columns: Mapping[str, Columns], weights: Weights, like: Mapping[str, Block]
) -> dict[str, Block]:
    """G w (eq. 23), as blocks."""

    def of_layer(x: Array, c: Array, like: Block) -> Block:
        product = _einsum("npd,npo->do", x, _einsum("sn,snpo->npo", weights, c))
        return unmatrix(product, like)

    return {name: own.over_stack(of_layer)(*own, like[name]) for name, own in columns.items()}


def gram(columns: Columns) -> Float[Array, "columns columns"]:
    """A layer's part of G'G (eq. 22, and for several positions its sum over pairs of them).

    Of a stack one layer after the other, because each makes a matrix as large as their sum.
    """
    if columns.inputs.ndim == 3:
        return _gram(columns)
    count = math.prod(columns.count)
    start = jnp.zeros((count, count), columns.inputs.dtype)
    return jax.lax.scan(lambda total, own: (total + _gram(own), None), start, columns)[0]


def _gram(columns: Columns) -> Float[Array, "columns columns"]:
    """Of one layer."""
    x, c = columns
    samples, batch, shared, d_out = c.shape
    count = samples * batch
    flops = gram_flops(samples, batch, shared, x.shape[2], d_out)
    if shared > 1 and flops["gradients"] < flops["positions"]:
        gradients = _einsum("npd,snpo->sndo", x, c).reshape(count, -1)
        return _linalg.second_moment(gradients.T)
    all_x, all_c = as_rows(x, x.dtype).T, as_rows(c, c.dtype).T

    def with_all(x: Float[Array, "batch d"], c: Float[Array, "samples batch d_out"]) -> Array:
        """The products of one position with all."""
        of_x = _linalg.second_moment(x.T, all_x).reshape(1, batch, 1, batch, shared)
        of_c = _linalg.second_moment(c.reshape(count, d_out).T, all_c)
        of_c = of_c.reshape(samples, batch, samples, batch, shared)
        return (of_x * of_c).sum(-1).reshape(count, count)

    if shared == 1:
        return with_all(x[:, 0], c[:, :, 0])
    # In a loop, because the products of all positions at once are `shared` times as large.
    return jax.lax.fori_loop(
        0,
        shared,
        lambda p, so_far: so_far + with_all(x[:, p], c[:, :, p]),
        jnp.zeros((count, count), x.dtype),
    )


def gram_flops(samples: int, batch: int, shared: int, d: int, d_out: int) -> dict[str, int]:
    """The flops of a layer's part of G'G, by each way to form it."""
    columns = samples * batch
    return {
        "positions": 2 * shared**2 * (batch**2 * d + columns**2 * (d_out + 1)),
        "gradients": 2 * columns * (shared + columns) * d * d_out,
    }


# --- lambda I + F --------------------------------------------------------------------------------


def factorise(columns: Mapping[str, Columns], damping: Any, *, relative: bool = False) -> System:
    """Factorise lambda I + G'G.

    Relative damping is in units of the mean of the eigenvalues that F can have with so many
    columns; of a zero F, in units of one.
    """
    grams = [gram(own) for own in columns.values()]
    total = sum(grams[1:], start=grams[0])
    warn_of_matrix(
        "The system of the exact Fisher, with an equation for each example and sample,",
        len(total),
        "Take a smaller batch, or fewer samples; exact columns count as samples",
    )
    amount = jnp.asarray(damping, total.dtype)
    tiny = jnp.finfo(total.dtype).tiny
    if relative:
        unit = jnp.diagonal(total).mean()
        amount = amount * jnp.where(unit > tiny, unit, 1)
    amount = jnp.maximum(amount, tiny)
    return System(dict(columns), _linalg.cholesky(_linalg.damped(total, amount)), amount)


def divide(system: System, own: Mapping[str, Block]) -> dict[str, Block]:
    """(lambda I + F)^-1 u = (u - G (lambda I + G'G)^-1 G'u) / lambda (eq. 20); zero without one."""
    correction = times(system.columns, solve(system, transposed_times(system.columns, own)), own)
    exists = system.damping > 0
    factor = 1 / jnp.where(exists, system.damping, 1)

    def quotient(u: Array, pulled: Array) -> Array:
        return jnp.where(exists, factor * (u - pulled), 0)

    return {name: jax.tree.map(quotient, own[name], pulled) for name, pulled in correction.items()}


def solve(system: System, right: Weights) -> Weights:
    return _linalg.cholesky_solve(system.cholesky, right.reshape(-1)).reshape(right.shape)


def _einsum(subscripts: str, *operands: Array) -> Array:
    # What is left of u - G w after it cancels is divided by lambda.
    return jnp.einsum(subscripts, *operands, precision=Precision.HIGHEST)


# --- systems -------------------------------------------------------------------------------------


def groups(names: Iterable[str], block_diagonal: bool) -> dict[str, tuple[str, ...]]:
    """The layers of each system by a name for it: one for all of them, or one each."""
    names = tuple(names)
    if block_diagonal:
        return {name: (name,) for name in names}
    return {"all": names} if names else {}


def same_dtype(own: Mapping[str, Block]) -> dict[str, Block]:
    """The blocks in the widest of their dtypes, because a column of G goes through all layers."""
    is_wide = any(dtype_of(block) == jnp.float64 for block in own.values())
    dtype = jnp.float64 if is_wide else jnp.float32
    return {name: {p: x.astype(dtype) for p, x in block.items()} for name, block in own.items()}


def check_examples(method: str, columns: Mapping[str, Columns]) -> None:
    """Refuse layers of one system that do not have the same examples.

    Raises:
      ValueError: they do not.
    """
    first = next(iter(columns))
    for name, own in columns.items():
        if own.count != columns[first].count:
            raise ValueError(
                f"`{method}` adds up the gradient of an example over all layers, but there are "
                f"{columns[first].count[1]} examples at {first} and {own.count[1]} at "
                f"{name}: the model joins the batch with another axis in between, or rows are the "
                f"same for all examples (a constant tangent). Keep the batch an axis of its own "
                f"throughout (a tangent as large as the inputs: differentiate outside of "
                f"`jax.vmap`, with `jnp.broadcast_to(v, x.shape)`), or say `block_diagonal=True`."
            )
