"""How long a step is: how far it moves the outputs of each neuron."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from locoprop_jax._checks import check_layers, check_not_negative
from locoprop_jax._layers.blocks import blocks
from locoprop_jax._layers.layers import Layer, Layers, replace
from locoprop_jax._layers.rows import Block

UNITS = ("neuron", "layer")

# The defaults of `foof` and `lnb`, chosen on the problems of `python -m benchmarks defaults`.
LEARNING_RATE = 0.02  # root-mean-square change of a pre-activation per step
DAMPING = 3.0  # in units of the mean variance of a layer's inputs


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

    Entries of a scale or of a bias on its own are layers of one weight each, which would follow the
    sign of their gradient; they share one length, the mean over all of them. A parameter in no
    layer has M = I and a length of its own: its update has the Euclidean norm one.

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
    check_unit(unit)
    check_not_negative(floor=floor)
    with_extra_args = optax.with_extra_args_support(inner)

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, optax.OptState]:
        direction, state = with_extra_args.update(updates, state, params, **extra_args)
        own = blocks(layers, direction)
        return unit_steps(layers, direction, own, blocks(layers, updates), unit, floor), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def check_unit(unit: Any, *others: str) -> None:
    """Refuse a unit of length that there is not.

    Raises:
      ValueError: it is none of `UNITS` and the others.
    """
    known = (*UNITS, *others)
    if unit not in known:
        raise ValueError(f"`unit` is one of {', '.join(map(repr, known))}, got {unit!r}.")


def unit_steps(
    layers: Layers,
    updates: Any,
    directions: Mapping[str, Block],
    images: Mapping[str, Block],
    unit: str,
    floor: Any,
) -> Any:
    """The updates with directions of length one in the layers' blocks, and in all other leaves.

    Args:
      layers: from `find_layers`.
      updates: a tree like the parameters; its leaves in no layer are divided by their norm.
      directions: d of each layer.
      images: M d of each layer.
      unit: "neuron" or "layer".
      floor: as for `scale_by_output_rms`.
    """
    new = {n: _unit_step(layers[n], d, images[n], unit, floor) for n, d in directions.items()}

    def other(leaf: Array) -> Array:
        size = jnp.max(jnp.abs(leaf), initial=0).astype(jnp.float32)
        near = leaf / jnp.where(size > 0, size, 1).astype(leaf.dtype)
        norm = jnp.sqrt(jnp.sum(jnp.square(near.astype(jnp.float32))))
        return near / jnp.maximum(norm, 1).astype(leaf.dtype)

    return replace(layers, updates, new, other)


def _unit_step(layer: Layer, direction: Block, image: Block, unit: str, floor: Any) -> Block:
    """Of one layer or stack: each column of d by the root of z, its product with M d.

    Both are made of ordinary size first, so that a loss of any scale neither overflows nor vanishes
    in the products.
    """
    d, d_size = _near_one(layer, direction)
    g, g_size = _near_one(layer, image)
    z = sum(_columns(part, d[part] * g[part]) for part in d)
    mean = jnp.mean(jnp.maximum(z, 0), -1, keepdims=True)
    if is_entrywise(layer):
        mean = jnp.broadcast_to(jnp.mean(mean, 0, keepdims=True), mean.shape)
    shared = unit == "layer" or is_entrywise(layer)
    length = mean if shared else jnp.maximum(z, jnp.asarray(floor, z.dtype) * mean)
    descends = jnp.isfinite(length) & (length > 0) & (shared | (z > 0))
    root = jnp.where(descends, 1 / jnp.sqrt(jnp.where(descends, length, 1)), 0)
    factor = jnp.broadcast_to(root, z.shape)
    scale = jnp.sqrt(d_size / g_size)  # of d, over the root of the size of z
    return {
        part: jnp.where(_over(part, factor) > 0, d[part] * _over(part, factor * scale), 0)
        for part in d
    }


def is_entrywise(layer: Layer) -> bool:
    """Whether each entry of a parameter is a layer of one weight."""
    return layer.kind in ("scale", "bias")


def _near_one(layer: Layer, block: Block) -> tuple[Block, Float[Array, "*stack 1"]]:
    """The block divided by its largest entry, and that entry; one where all are zero."""
    axes = {part: _inner_axes(layer, value) for part, value in block.items()}
    largest = [jnp.max(jnp.abs(block[p]), axis=axes[p], initial=0) for p in block]
    size = jnp.stack(largest).max(0)
    if is_entrywise(layer):
        size = jnp.broadcast_to(size.max(), size.shape)
    usable = jnp.isfinite(size) & (size > 0)
    size = jnp.where(usable, size, 1)[..., None]
    return {part: value / _over(part, size) for part, value in block.items()}, size


def _inner_axes(layer: Layer, value: Array) -> tuple[int, ...]:
    return tuple(range(0 if layer.stack is None else 1, value.ndim))


def _columns(part: str, product: Array) -> Float[Array, "*stack d_out"]:
    return product.sum(-2) if part == "kernel" else product


def _over(part: str, columns: Float[Array, "*stack d_out"]) -> Array:
    """Laid out to multiply a part of a block."""
    return columns[..., None, :] if part == "kernel" else columns
