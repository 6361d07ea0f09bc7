"""Activation step sizes and local learning rates in units of what a layer's arrays allow."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from locoprop_jax._layers import rows
from locoprop_jax._layers.rows import Block, Inputs, Rows


def activation_step(distance: Any, cotangents: Rows, most: Any = jnp.inf) -> Float[Array, ""]:
    """The gamma whose step along the cotangents moves an output by `distance` (root mean square).

    Args:
      distance: in units of the outputs.
      cotangents: E, or what takes its place after the transfer function.
      most: what gamma is at most: at an output layer, where the loss is at its minimum.
    """
    largest = jnp.max(jnp.abs(cotangents), initial=0)
    usable = jnp.isfinite(largest) & (largest > 0)
    largest = jnp.where(usable, largest, 1)  # squares neither overflow nor vanish
    size = largest * jnp.sqrt(jnp.square(cotangents / largest).mean())
    gamma = jnp.asarray(distance, cotangents.dtype) / jnp.where(usable, size, 1)
    return jnp.where(usable, jnp.minimum(gamma, jnp.asarray(most, gamma.dtype)), 0)


def local_rate(
    rate: Any, distance: Any, inputs: Inputs, like: Block, *, is_per_weight: bool
) -> Float[Array, ""]:
    """The eta of local iterations that `rate` stands for.

    An optimizer that moves every weight by about eta, such as RMSProp, moves an output by about
    eta |x|: in units of the distance that is left to go, over the norm of an average input. A plain
    gradient step converges below eta = 2 / the largest eigenvalue of X'X, which is at most the sum
    of all squared inputs.

    Args:
      rate: the learning rate, without a unit.
      distance: that outputs are to move.
      inputs: X.
      like: the parts of the layer that are trained; a bias has the input one.
      is_per_weight: whether the optimizer moves every weight by about eta.
    """
    square = jnp.zeros(())
    if "kernel" in like:
        square = rows.mean_square(inputs).sum()
    if "bias" in like:
        square = square + 1
    eps = jnp.finfo(square.dtype).tiny
    unit = (
        distance / jnp.sqrt(square + eps)
        if is_per_weight
        else 1 / (square * rows.count(inputs) + eps)
    )
    return jnp.asarray(rate, square.dtype) * unit
