"""The damped second moment of a layer's inputs, and gradients divided by it."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from locoprop_jax import _linalg
from locoprop_jax._layers import rows as _rows
from locoprop_jax._layers.arrays import LayerArrays
from locoprop_jax._layers.blocks import divide, dtype_of
from locoprop_jax._layers.rows import Block, Inputs
from locoprop_jax._layers.structured import OneHot, Structured, Windows
from locoprop_jax._neurons.amortised import is_too_large
from locoprop_jax._trees import real_dtype


class Damping(NamedTuple):
    """What is added to M's diagonal: for the kernel, and for the bias where it is damped.

    Attributes:
      amount: in units of the mean variance of the inputs, or absolute.
      relative: which of the two.
      bias: whether the bias is damped like the kernel.
      least: what the unit is at least.
    """

    amount: Any
    relative: bool
    bias: bool
    least: float = 0.0

    def of_rows(self, inputs: Inputs) -> Damping:
        """For the statistics of such rows."""
        return self._replace(least=least_unit(inputs))

    def of(
        self, variances: Float[Array, " d_in"], squares: Float[Array, " d_in"]
    ) -> Float[Array, ""]:
        """The number to add, for inputs of these variances and mean squares.

        Inputs of which none varies beyond rounding errors are damped by the amount itself:
        gradients that never met data, of weight decay for example, are theirs all the same.
        """
        amount, eps = jnp.asarray(self.amount, variances.dtype), jnp.finfo(variances.dtype).eps
        if self.relative and variances.size:
            unit = jnp.where(variances > 10 * eps * squares, variances, 0).mean()
            unit = jnp.maximum(unit, self.least)
            amount = amount * jnp.where(unit > eps**2, unit, 1)
        return amount


def least_unit(inputs: Inputs) -> float:
    """What the unit of damping is at least: for what is looked up, one row of the batch.

    The variance of a word is how often it is looked up, in a large table far less than once in a
    batch: in that unit a word that the statistics have not met would be thrown as much farther than
    the others. The inputs of a stack may have its axis in front.
    """
    return 1 / inputs.ids.shape[-1] if isinstance(inputs, OneHot) else 0.0


class Statistics(NamedTuple):
    """Of a layer's inputs over N rows: X'X / N (an embedding's by its diagonal) and their mean.

    Complex where the kernel and its inputs are, but for what is looked up.
    """

    second: Float[Array, "d_in d_in"] | Float[Array, " d_in"]
    mean: Float[Array, " d_in"]


class Metric(NamedTuple):
    """The damped second moment M of (x, 1), or of x, with the bias eliminated.

    Attributes:
      kernel: what then remains for the kernel, or its inverse: with a free bias the damped
        covariance of the inputs.
      mean: of the inputs.
      bias: the inverse of the bias's own entry, zero without a bias.
    """

    kernel: Float[Array, "d_in d_in"] | Float[Array, " d_in"]
    mean: Float[Array, " d_in"]
    bias: Float[Array, ""]


class LayerRows(NamedTuple):
    """One layer.

    Attributes:
      inputs: the rows of the statistics.
      cotangents: those that the inputs meet in the updates; zeros if there are none.
      slope: the incoming block.
    """

    inputs: Inputs
    cotangents: Float[Array, "rows d_out"]
    slope: Block


def layer_rows(arrays: LayerArrays, slope: Block, shared: str) -> LayerRows:
    """Of one layer or of a stack."""
    dtype = dtype_of(slope)
    x, e = arrays.rows(dtype), arrays.cotangent_rows(dtype)
    if shared == "reduce" and not isinstance(x, OneHot):
        x = arrays.mean_rows(dtype)
        return LayerRows(x, jnp.zeros((*arrays.inputs.shape[:-2], e.shape[-1]), e.dtype), slope)
    return LayerRows(x, e, slope)


def zero_metric(kernel: jax.ShapeDtypeStruct, *, is_diagonal: bool) -> Metric:
    """Before the first batch, for a kernel (*stack, d_in, d_out)."""
    *stack, d, _ = kernel.shape
    square = (d,) if is_diagonal else (d, d)
    real = real_dtype(kernel.dtype)
    dtype = real if is_diagonal else kernel.dtype
    return Metric(
        jnp.zeros((*stack, *square), dtype),
        jnp.zeros((*stack, d), dtype),
        jnp.zeros(tuple(stack), real),
    )


def statistics_of(inputs: Inputs, limit: int | None = None) -> Statistics:
    """With the mean squares alone of more inputs than a limit."""
    if is_too_large(inputs.shape[-1], limit):
        return Statistics(_rows.mean_square(inputs), _rows.mean(inputs))
    return Statistics(_rows.second_moment(inputs) / _rows.count(inputs), _rows.mean(inputs))


# --- solving -------------------------------------------------------------------------------------


def inverse(average: Statistics, slope: Block, damping: Damping) -> Metric:
    """Of the damped second moment, for the parts that a block has."""
    metric = _metric(average, slope, damping)
    return metric._replace(kernel=_linalg.inverse(metric.kernel))


def apply(slope: Block, by: Metric) -> Block:
    """The block by the second moment whose `inverse` this is."""
    return divide(slope, by.mean, by.bias, functools.partial(_linalg.multiply, by.kernel))


def solve(own: LayerRows, average: Statistics | None, damping: Damping) -> Block:
    """The block by the damped average; without one, by the second moment of its own rows."""
    damping = damping.of_rows(own.inputs)
    if average is None:
        return _solve_batch(own, damping)
    return _solve_average(average, own.slope, damping)


def divide_bias(own: LayerRows, damping: Damping) -> Block:
    """M^-1 slope of a bias whose kernel is masked."""
    squares = _rows.mean_square(own.inputs)
    amount = damping.of(squares - _linalg.squares(_rows.mean(own.inputs)), squares)
    return _linalg.scale(own.slope, _inverse_of_bias(own.slope, amount, damping))


def _metric(now: Statistics, slope: Block, damping: Damping) -> Metric:
    second, mean = now
    squares = _linalg.diagonal(second)
    variances = squares - _linalg.squares(mean) if "bias" in slope else squares
    amount = damping.of(variances, squares)
    bias = _inverse_of_bias(slope, amount, damping)
    if "bias" in slope:
        if second.ndim == 1:  # of a matrix too large to be kept: the variances stand for it
            second = second - bias.astype(second.dtype) * _linalg.squares(mean)
        else:
            second = second - bias.astype(mean.dtype) * jnp.conj(mean)[:, None] * mean[None]
    return Metric(_linalg.damped(second, amount), mean, bias)


def _inverse_of_bias(slope: Block, amount: Float[Array, ""], damping: Damping) -> Float[Array, ""]:
    """M's entry for the bias is one, and its damping."""
    if "bias" not in slope:
        return jnp.zeros_like(amount)
    return 1 / (1 + amount) if damping.bias else jnp.ones_like(amount)


def _solve_average(average: Statistics, slope: Block, damping: Damping) -> Block:
    metric = _metric(average, slope, damping)
    solve = functools.partial(_linalg.solve, metric.kernel)
    return divide(slope, metric.mean, metric.bias, solve)


def _solve_batch(own: LayerRows, damping: Damping) -> Block:
    """With the current batch's statistics alone, by the smaller of two systems.

    What remains for the kernel is the second moment of the centred rows, and of a row more for what
    a damped bias leaves of the mean.
    """
    rows, d_in = own.inputs.shape
    by_rows = _linalg.solves_by_rows(rows, d_in, own.slope["kernel"].shape[1])
    if isinstance(own.inputs, Structured) and not (isinstance(own.inputs, Windows) and by_rows):
        return _solve_average(statistics_of(own.inputs), own.slope, damping)
    x, e = _rows.write_out(own.inputs), own.cotangents
    mean = x.mean(0)
    if "bias" in own.slope:
        x = x - mean[None]
    amount = damping.of(_linalg.squares(x).mean(0), _rows.mean_square(own.inputs))
    bias = _inverse_of_bias(own.slope, amount, damping)
    if "bias" in own.slope and damping.bias:
        rest = jnp.sqrt(1 - bias).astype(mean.dtype)
        x = jnp.concatenate([x, rows**0.5 * rest * mean[None]])
        e = jnp.concatenate([e, rest / rows**0.5 * e.sum(0, keepdims=True)])
    weight = jnp.maximum(rows * amount, jnp.finfo(amount.dtype).tiny)
    return divide(own.slope, mean, bias, lambda right: rows * _linalg.ridge(x, right, e, weight))
