"""The same work for every layer: apart, or at once for those that are alike."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from locoprop_jax._layers.layers import Layer
from locoprop_jax._tracing.chunks import is_traced

Data = TypeVar("Data")


def over_stack(layer: Layer, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of one layer for all layers of a stack, along the first axis of all arrays."""
    return function if layer.stack is None else jax.vmap(function)


def map_layers(
    layers: Mapping[str, Layer],
    each: Callable[[str, Data], Any],
    data: Mapping[str, Data],
    *,
    kind: Callable[[str], Hashable] = lambda name: None,
    stack: bool | None = None,
) -> dict[str, Any]:
    """`each(name, data[name])` by name.

    Args:
      layers: from `find_layers`.
      each: traceable; its result a tree of arrays.
      data: each layer's tree of arrays; those of a stack have its axis in front.
      kind: of a layer; those of one kind must only differ in their arrays.
      stack: whether to `vmap` over the layers of one kind with arrays of equal shapes; None for
        what is fastest (`stacks_by_default`).
    """
    if stack is None:
        stack = stacks_by_default()
    results: dict[str, Any] = {}
    for names in group_alike(data, lambda name: (layers[name].stack, kind(name))):
        one = over_stack(layers[names[0]], functools.partial(each, names[0]))
        if len(names) == 1:
            results[names[0]] = one(data[names[0]])
        elif stack:
            trees = [data[name] for name in names]
            together = jax.vmap(one)(jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees))
            for i, name in enumerate(names):
                results[name] = jax.tree.map(lambda leaf, i=i: leaf[i], together)
        else:
            # Traced once. A compiler, too, compiles equal kernels once. What is not traced is not
            # compiled anew in every step.
            alike = jax.jit(one) if is_traced(data[names[0]]) else one
            results |= {name: alike(data[name]) for name in names}
    return {name: results[name] for name in data}


def stacks_by_default() -> bool:
    """Not on a CPU, where batched products are slow and copies cost more than they save."""
    return jax.default_backend() != "cpu"


def group_alike(data: Mapping[str, Any], kind: Callable[[str], Hashable]) -> list[list[str]]:
    """The names of the layers, those of one kind with arrays of equal shapes together."""
    groups: dict[Hashable, list[str]] = {}
    for name, arrays in data.items():
        leaves, structure = jax.tree.flatten(arrays)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        groups.setdefault((kind(name), structure, shapes), []).append(name)
    return list(groups.values())
