"""One layer's system M theta = g of Linear Neuron Boosting, by conjugate gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from locoprop_jax import _iterative, _linalg
from locoprop_jax._layers import rows as _rows
from locoprop_jax._layers.blocks import divide
from locoprop_jax._layers.rows import Block, Inputs, gram, pull, push
from locoprop_jax._layers.structured import OneHot
from locoprop_jax._neurons.second_moment import least_unit


class Moments(NamedTuple):
    """Of a layer's inputs, by coordinate: running sums in the state, averages elsewhere.

    The mean of x, complex where the kernel and its inputs are, and that of |x|^2.
    """

    mean: Float[Array, " d_in"]
    second: Float[Array, " d_in"]


class LayerSystem(NamedTuple):
    """M theta = g of one layer.

    Attributes:
      inputs: the rows of the metric.
      slope: g.
      moments: what preconditions; None without a kernel.
      start: the last solution; None to start at zero.
    """

    inputs: Inputs
    slope: Block
    moments: Moments | None
    start: Block | None


def solve_layer(
    system: LayerSystem, *, ridge: Any, relative: bool, iterations: int, shrinkage: Any
) -> tuple[Block, Block]:
    """Theta after some iterations, and M theta."""
    slope, moments = system.slope, system.moments
    if moments is None:  # a bias alone: M is 1
        return slope, slope
    variance = jnp.maximum(moments.second - _linalg.squares(moments.mean), 0)
    amount = jnp.asarray(ridge, variance.dtype)
    if relative:
        unit = (variance if "bias" in slope else moments.second).mean()
        amount = amount * jnp.maximum(unit, least_unit(system.inputs))
    theta, residual = _iterative.conjugate_gradient(
        layer_metric(system.inputs, slope, amount, iterations + (system.start is not None)),
        slope,
        _linalg.dot_by_column,
        iterations,
        start=system.start,
        precondition=_preconditioner(moments, variance, amount, shrinkage),
    )
    return theta, jax.tree.map(jnp.subtract, slope, residual)


def metric_flops(rows: int, d_in: int, d_out: int, products: int) -> dict[str, int]:
    """The flops of so many products with the metric, by each way to form them."""
    return {
        "direct": products * 4 * rows * d_in * d_out,
        "gram": 2 * rows * d_in**2 + products * 2 * d_in**2 * d_out,
    }


def layer_metric(
    inputs: Inputs, like: Block, ridge: Float[Array, ""], products: int
) -> Callable[[Block], Block]:
    """The map v -> M v: a dense layer's linear function and its transpose (eq. 11), or X'X."""
    rows, d_in = inputs.shape
    flops = metric_flops(rows, d_in, like["kernel"].shape[1], products)
    if isinstance(inputs, OneHot) or flops["gram"] < flops["direct"]:
        moment = gram(inputs)
    else:
        moment = lambda v: pull(inputs, push(inputs, v), like)  # noqa: E731

    def apply(v: Block) -> Block:
        image = _linalg.scale(moment(v), 1 / _rows.count(inputs))
        damped = ridge.astype(v["kernel"].dtype) * v["kernel"]
        return {**image, "kernel": image["kernel"] + damped}

    return apply


def _preconditioner(
    moments: Moments,
    variance: Float[Array, " d_in"],
    ridge: Float[Array, ""],
    shrinkage: Any,
) -> Callable[[Block], Block]:
    """P = W W' of section 3.3, the covariance replaced by its diagonal (section 3.5).

    Without a bias P is the inverse diagonal of M. Inputs that never varied are left alone: rounding
    errors would be all there is to divide by.
    """
    shrunk = jnp.asarray(shrinkage, variance.dtype)
    variance = (1 - shrunk) * variance + shrunk * variance.mean()

    def inverse(diagonal: Float[Array, " d_in"]) -> Float[Array, "d_in 1"]:
        positive = diagonal > 10 * jnp.finfo(diagonal.dtype).eps * moments.second
        return jnp.where(positive, 1 / jnp.where(positive, diagonal, 1), 0)[:, None]

    def precondition(residual: Block) -> Block:
        mean = moments.mean
        rest = variance if "bias" in residual else variance + _linalg.squares(mean)

        def solve(kernel: Array) -> Array:
            return inverse(rest + ridge).astype(kernel.dtype) * kernel

        return divide(residual, mean, 1.0, solve)

    return precondition
