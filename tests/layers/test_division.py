"""Equal layers divided among devices: what each gets, without any devices.

What XLA makes of it is looked at in tests/training/test_sharding.py and test_distributed.py.
"""

from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from locoprop_jax._layers import division
from locoprop_jax._layers.division import divide_layers
from locoprop_jax._layers.stacking import map_layers

DEVICES = 4
# Three alike, one like no other, a stack that the devices divide and one that they do not.
STACKS = {"a": None, "b": None, "c": None, "alone": None, "even": 8, "uneven": 3}
LAYERS = {name: SimpleNamespace(stack=stack) for name, stack in STACKS.items()}


def matrices():
    rng = np.random.default_rng(0)

    def positive(name):
        size = 3 if name == "alone" else 2
        root = rng.normal(size=(STACKS[name] or 1, size, size))
        whole = root @ root.swapaxes(1, 2) + np.eye(size)
        return jnp.asarray(whole if STACKS[name] else whole[0])

    def vector(name):
        return jnp.ones(()) if STACKS[name] is None else 1 + jnp.arange(STACKS[name], dtype=float)

    return {name: {"matrix": positive(name), "vector": vector(name)} for name in LAYERS}


def invert(name, own):
    return {"inverse": jnp.linalg.inv(own["matrix"]) * own["vector"], "twice": 2 * own["vector"]}


def mesh(kind=AxisType.Auto, sizes=(DEVICES,), names=("data",)):
    return AbstractMesh(sizes, names, axis_types=(kind,) * len(sizes))


def traced(of, sharding):
    """The shapes that are inverted, and the layouts that are asked for."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), of)
    sizes, specs = [], []

    def look(_, own):
        sizes.append(own["matrix"].shape)
        return own

    jaxpr = jax.jit(lambda data: divide_layers(LAYERS, look, data)).trace(shapes).jaxpr
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "sharding_constraint":
            specs.append((eqn.invars[0].aval.shape, eqn.params["sharding"].spec[0]))
    return sizes, specs


def test_what_is_divided_is_what_all_layers_give(monkeypatch):
    """With devices that are none: the stacks are made and cut all the same."""
    monkeypatch.setattr(division, "_mesh", lambda data: mesh())
    monkeypatch.setattr(division, "_lay", lambda mesh, along, tree: tree)
    found = jax.jit(lambda data: divide_layers(LAYERS, invert, data))(matrices())
    chex.assert_trees_all_close(found, map_layers(LAYERS, invert, matrices()), rtol=1e-12)


def test_every_device_has_as_many_of_each_kind():
    own = {name: matrices()[name] for name in LAYERS}
    sizes, specs = traced(own, NamedSharding(mesh(), P()))
    assert len(sizes) == 4  # one trace for each kind
    along = {shape[0] for shape, axes in specs if axes == "data"}
    # Three in four slots, eight in eight, three in four.
    assert along == {4, 8}
    # The one like no other is left where it is; the three are whole on all devices again.
    assert not any(shape[1:] == (3, 3) for shape, _ in specs)
    assert {shape for shape, axes in specs if axes is None} == {(3, 2, 2), (3,)}


def test_all_axes_of_a_mesh_divide():
    _, specs = traced(matrices(), NamedSharding(mesh(sizes=(2, 2), names=("x", "y")), P()))
    assert {axes for _, axes in specs} == {("x", "y"), None}


@pytest.mark.parametrize(
    "sharding",
    [
        None,
        NamedSharding(mesh(sizes=(1,)), P()),
        NamedSharding(mesh(AxisType.Explicit), P()),
    ],
    ids=["none", "one device", "explicit"],
)
def test_one_device_is_left_alone_and_so_are_axes_of_the_users_own(sharding):
    assert traced(matrices(), sharding)[1] == []
