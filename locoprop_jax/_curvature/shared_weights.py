"""How much larger the curvature of a shared weight is than what K-FAC makes of it."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from locoprop_jax._layers.arrays import LayerArrays
from locoprop_jax._layers.layers import Layer
from locoprop_jax._layers.rows import Block, extend
from locoprop_jax._layers.structured import Structured


def has_trace_ratio(layer: Layer, arrays: LayerArrays, like: Block) -> bool:
    """Whether an example uses the layer's weights at several positions whose inputs are an array.

    A tied table's are: its uses as a table and as an output layer have sizes of their own. Those of
    convolutions and lookups are not written out for this.
    """
    if "kernel" not in like or layer.kind not in ("dense", "tied"):
        return False
    is_array = not isinstance(arrays.rows(like["kernel"].dtype), Structured)
    return layer.kind == "tied" or (is_array and arrays.outputs.shape[-2] > 1)


def trace_ratio(
    inputs: Float[Array, "batch shared d_in"],
    cotangents: Float[Array, "samples batch shared d_out"],
    like: Block,
    count: int,
) -> Float[Array, ""]:
    """The trace of a layer's Fisher or Gauss-Newton block over that of K-FAC's product for it.

    With inputs a_t and curvature cotangents c_t at position t of an example, the exact trace is the
    sum over examples of |sum_t a_t c_t'|^2, and K-FAC's the mean of |a_t|^2 over the `count` rows
    times the sum of |c_t|^2: it takes positions, and inputs and cotangents, for independent
    (Martens and Grosse's setting has one position; Grosse and Martens assume as much for
    convolutions). In a recurrent network positions pull in the same direction, and the curvature of
    the recurrent weights is many times what K-FAC makes of it, while that of the output layer is
    not: directions are then far too long in some layers beside the others.
    """
    a, c = extend(inputs, like), cotangents
    positions, (d, d_out) = a.shape[-2], (a.shape[-1], c.shape[-1])
    if positions * (d + d_out) < 2 * d * d_out:  # inner products of positions, or the sum itself
        of_inputs = jnp.einsum("bsi,bti->bst", a, a)
        both = jnp.einsum("bst,kbso,kbto->", of_inputs, c, c)
    else:
        both = jnp.square(jnp.einsum("bsi,kbso->kbio", a, c)).sum()
    product = jnp.square(a).sum() / count * jnp.square(c).sum()
    usable = jnp.isfinite(both) & jnp.isfinite(product) & (both > 0) & (product > 0)
    return jnp.where(usable, both / jnp.where(usable, product, 1), 1)
