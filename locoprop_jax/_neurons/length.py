"""How long a step is: how far it moves the outputs of each neuron."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from locoprop_jax._checks import check_layers, check_not_negative
from locoprop_jax._layers.blocks import blocks, unit_norm
from locoprop_jax._layers.layers import Layers, Points, replace
from locoprop_jax._layers.rows import Block
from locoprop_jax._layers.stacking import map_layers
from locoprop_jax._trees import ascent

UNITS = ("neuron", "layer", "joint")

# The defaults of `foof` and `lnb`, chosen on the problems of `python -m benchmarks defaults`.
LEARNING_RATE = 0.02  # root-mean-square change of a pre-activation per step
DAMPING = 1.0  # in units of the mean variance of a layer's inputs


def scale_by_output_rms(
    layers: Layers,
    inner: optax.GradientTransformation,
    *,
    unit: str = "neuron",
    floor: float = 1e-4,
) -> optax.GradientTransformationExtraArgs:
    r"""Scale a direction d = M^-1 g so that it moves the outputs of each neuron by one.

    Neuron j of a layer has the weights w_j, one column of the layer's matrix, and the
    pre-activation x . w_j. With M the damped second moment of the rows x, a step d_j changes the
    pre-activation by sqrt(z_j), the root mean square over the rows, with z_j = d_j' M d_j, which is
    d_j . g_j. (The damping in M counts too, so that the real change is less.) The result is
    d_j / sqrt(z_j).

    A learning rate after it is the root-mean-square change of a pre-activation per step. It does
    not depend on the scale of the loss, because d_j and sqrt(z_j) both grow with it; nor on the
    width, the depth, the batch or the scale of the inputs, because what it bounds is a mean over
    rows of each single output.

    An entry of a scale, or of a bias on its own, is a neuron of one weight: it follows the sign of
    its gradient. A parameter in no layer has M = I and a length of its own: its update has the
    Euclidean norm one. Of complex numbers z_j is the real part of the product of g_j, as JAX has
    it, with d_j, and what is measured is the modulus of a change.

    Args:
      layers: from `find_layers`.
      inner: what makes d of g, solving its system exactly: `scale_by_foof(...)`. An average of
        gradients has to come before it, so that d is solved for the same g.
      unit: "neuron" for one length for each neuron; "layer" for one length for each layer, the mean
        of z_j over its neurons.
      floor: a neuron whose z_j is below this share of its layer's mean moves less than the others
        do, in proportion to its gradient.

    Returns:
      A transformation with the state and the extra arguments of `inner`. Where d does not descend
      (z <= 0) its update is zero.

    Raises:
      ValueError: no layers, an unknown unit or a negative floor.

    References:
      The length of a step in the metric is that of Linear Neuron Boosting (eq. 1, section 3.2),
      taken for each neuron instead of all of them together.
    """
    check_layers(layers, "scale_by_output_rms")
    check_unit(unit, UNITS[:2])
    check_not_negative(floor=floor)
    with_extra_args = optax.with_extra_args_support(inner)

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, optax.OptState]:
        direction, state = with_extra_args.update(updates, state, params, **extra_args)
        captured = extra_args.get("captured")
        points = None if captured is None else captured.points
        own = blocks(layers, direction, "changes", points)
        images = blocks(layers, ascent(updates), "gradients", points)
        return unit_steps(layers, direction, own, images, unit, floor, points), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def check_unit(unit: Any, known: Sequence[str] = UNITS) -> None:
    """Refuse a unit of length that there is not.

    Raises:
      ValueError: it is none of those known.
    """
    if unit not in known:
        raise ValueError(f"`unit` is one of {', '.join(map(repr, known))}, got {unit!r}.")


def unit_steps(
    layers: Layers,
    updates: Any,
    directions: Mapping[str, Block],
    images: Mapping[str, Block],
    unit: str,
    floor: Any,
    points: Points | None = None,
) -> Any:
    """The updates with directions of length one in the layers' blocks, and in all other leaves.

    Args:
      layers: from `find_layers`.
      updates: a tree like the parameters; its leaves in no layer are divided by their norm.
      directions: d of each layer.
      images: M d of each layer.
      unit: "neuron" or "layer".
      floor: as for `scale_by_output_rms`.
      points: where kernels that are made of parameters are linearised.
    """
    pairs = {name: (own, images[name]) for name, own in directions.items()}
    new = map_layers(layers, lambda _, pair: _unit_step(*pair, unit=unit, floor=floor), pairs)
    return replace(layers, updates, new, unit_norm, points=points)


def _unit_step(direction: Block, image: Block, unit: str, floor: Any) -> Block:
    """Of one layer: each column of d by the root of z, its product with M d.

    Both are made of ordinary size first, so that a loss of any scale neither overflows nor vanishes
    in the products.
    """
    d, d_size = _near_one(direction)
    g, g_size = _near_one(image)
    z = jnp.asarray(sum(_columns(part, jnp.real(jnp.conj(d[part]) * g[part])) for part in d))
    mean = jnp.mean(jnp.maximum(z, 0))
    length = jnp.where(z > 0, jnp.maximum(z, jnp.asarray(floor, z.dtype) * mean), 0)
    if unit == "layer":
        length = jnp.broadcast_to(mean, z.shape)
    good = jnp.isfinite(length) & (length > 0)
    factor = jnp.sqrt(d_size / g_size / jnp.where(good, length, 1))
    return {part: _times(part, value, jnp.where(good, factor, 0)) for part, value in d.items()}


def _near_one(block: Block) -> tuple[Block, Float[Array, ""]]:
    """The block divided by its largest entry, and that entry; by one where all are zero."""
    size = jnp.stack([jnp.max(jnp.abs(value), initial=0) for value in block.values()]).max()
    size = jnp.where(jnp.isfinite(size) & (size > 0), size, 1)
    return {part: value / size.astype(value.dtype) for part, value in block.items()}, size


def _times(part: str, value: Array, factor: Float[Array, " d_out"]) -> Array:
    """Each column by its factor; zeros for zero, whatever the column."""
    factor = factor[None] if part == "kernel" else factor
    return jnp.where(factor > 0, value * factor.astype(value.dtype), 0)


def _columns(part: str, product: Array) -> Float[Array, " d_out"]:
    return product.sum(0) if part == "kernel" else product
