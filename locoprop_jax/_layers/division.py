"""The work of many equal layers, divided among the devices that their arrays lie on.

XLA divides a matrix product as its operands are laid out. A factorisation it does not divide: each
device does all of it, but for the matrices of a stack that lies along devices. So equal layers are
stacked here, and the stack is laid out along all devices.
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
    them, say which devices there are. Of n equal layers, or n in a stack, each device works on
    ceil(n / devices). Elsewhere this is `map_layers`.

    Args:
      layers: from `find_layers`.
      each: as for `map_layers`; layers with arrays of equal shapes must only differ in these.
      data: as for `map_layers`.
    """
    mesh = _mesh(data)
    if mesh is None:
        return map_layers(layers, each, data)
    results: dict[str, Any] = {}
    for names in group_alike(data, lambda name: name if layers[name].stack else None):
        one = functools.partial(each, names[0])
        if layers[names[0]].stack is not None:
            results[names[0]] = _divided(mesh, one, data[names[0]])
        elif len(names) == 1:  # what each device has, it need not be sent
            results[names[0]] = one(data[names[0]])
        else:
            stacked = jax.tree.map(lambda *own: jnp.stack(own), *(data[name] for name in names))
            # All at once to where they are wanted: cut apart first, each would be sent by itself.
            done = _lay(mesh, None, _divided(mesh, one, stacked, is_joined=True))
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


def _divided(
    mesh: AbstractMesh, one: Callable[[Any], Any], stacked: Any, is_joined: bool = False
) -> Any:
    """`one` of each in a stack, of which every device has as many.

    A stack that was joined here lies whole on each device, which picks its share. Another one may
    lie along them already.
    """
    count, along = len(jax.tree.leaves(stacked)[0]), mesh.axis_names
    # Devices that have no share do again what another one does: with the last, all are equal.
    slots = -(-count // mesh.size) * mesh.size
    if is_joined or slots > count:
        own = _lay(mesh, along, jnp.minimum(jnp.arange(slots), count - 1))
        stacked = jax.tree.map(lambda leaf: leaf[own], stacked)
    done = _lay(mesh, along, jax.vmap(one)(_lay(mesh, along, stacked)))
    return jax.tree.map(lambda leaf: leaf[:count], done)


def _lay(mesh: AbstractMesh, along: Any, tree: Any) -> Any:
    """The first axes over these axes of the mesh; the others as XLA likes."""

    def lay(leaf: jax.Array) -> jax.Array:
        spec = PartitionSpec(along, *(PartitionSpec.UNCONSTRAINED,) * (leaf.ndim - 1))
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(lay, tree)
