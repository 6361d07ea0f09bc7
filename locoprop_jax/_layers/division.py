"""The work of many equal layers, divided among the devices that their arrays lie on.

XLA divides a matrix product as its operands are laid out. A factorisation it does not divide: each
device does all of it, but for the matrices of a stack that lies along devices. So equal layers are
stacked here, and the stack is laid out along all devices. Layers that are a stack already are
divided if their state lies along it, which is up to the user: laid out otherwise here, they would
be sent back in every step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from locoprop_jax._layers.layers import Layers
from locoprop_jax._layers.stacking import group_alike, map_layers
from locoprop_jax._tracing.chunks import is_traced

Data = TypeVar("Data")


def divide_layers(
    layers: Layers, each: Callable[[str, Data], Any], data: Mapping[str, Data]
) -> dict[str, Any]:
    """`map_layers`, for work that takes long beside moving its arrays: inversions.

    Arrays that lie on a mesh of several devices, as `jax.device_put` and a `NamedSharding` lay
    them, say which devices there are. Of n equal layers each device works on ceil(n / devices), of
    a stack on those that lie there. Elsewhere this is `map_layers`.

    Args:
      layers: from `find_layers`.
      each: as for `map_layers`; layers with arrays of equal shapes must only differ in these.
      data: as for `map_layers`.
    """
    mesh = _mesh(data)
    if mesh is None:
        return map_layers(layers, each, data)
    results: dict[str, Any] = {}
    for names in group_alike(data, lambda name: layers[name].stack):
        if len(names) == 1 or layers[names[0]].stack is not None:  # need not be sent
            results |= map_layers(layers, each, {name: data[name] for name in names}, stack=False)
            continue
        stacked = jax.tree.map(lambda *own: jnp.stack(own), *(data[name] for name in names))
        done = _divided(mesh, functools.partial(each, names[0]), stacked)
        for i, name in enumerate(names):
            results[name] = jax.tree.map(lambda leaf, i=i: leaf[i], done)
    return {name: results[name] for name in data}


def _mesh(data: Any) -> AbstractMesh | None:
    """The devices that traced arrays lie on; None for one alone, or where a user's code divides."""
    if not is_traced(data):
        return None
    for leaf in jax.tree.leaves(data):
        mesh = jax.typeof(leaf).sharding.mesh
        if mesh.size > 1:
            return mesh if all(kind == AxisType.Auto for kind in mesh.axis_types) else None
    return None


def _divided(mesh: AbstractMesh, one: Callable[[Any], Any], stacked: Any) -> Any:
    """`one` of each in a stack, of which every device picks its share, and all get all again."""
    count, along = len(jax.tree.leaves(stacked)[0]), mesh.axis_names
    # Devices that have no share do again what another one does: with the last, all are equal.
    slots = -(-count // mesh.size) * mesh.size
    own = _lay(mesh, along, jnp.minimum(jnp.arange(slots), count - 1))
    shares = _lay(mesh, along, jax.tree.map(lambda leaf: leaf[own], stacked))
    done = _lay(mesh, along, jax.vmap(one)(shares))
    # All at once to where they are wanted: cut apart first, each would be sent by itself.
    return _lay(mesh, None, jax.tree.map(lambda leaf: leaf[:count], done))


def _lay(mesh: AbstractMesh, along: Any, tree: Any) -> Any:
    """The first axes over these axes of the mesh; the others as XLA likes."""

    def lay(leaf: jax.Array) -> jax.Array:
        spec = PartitionSpec(along, *(PartitionSpec.UNCONSTRAINED,) * (leaf.ndim - 1))
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(lay, tree)
