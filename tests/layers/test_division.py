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
# Three alike, one like no other, and stacks.
STACKS = {"a": None, "b": None, "c": None, "alone": None, "stack": 8, "other": 8}
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
    """The shapes that layouts are asked for, each with the axes along the first of it."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), of)
    jaxpr = jax.jit(lambda data: divide_layers(LAYERS, invert, data)).trace(shapes).jaxpr
    return [
        (eqn.invars[0].aval.shape, eqn.params["sharding"].spec[0])
        for eqn in jaxpr.eqns
        if eqn.primitive.name == "sharding_constraint"
    ]


def test_what_is_divided_is_what_all_layers_give(monkeypatch):
    """With devices that are none: the stacks are made and cut all the same."""
    monkeypatch.setattr(division, "_mesh", lambda data: mesh())
    monkeypatch.setattr(division, "_lay", lambda mesh, along, tree: tree)
    found = jax.jit(lambda data: divide_layers(LAYERS, invert, data))(matrices())
    chex.assert_trees_all_close(found, map_layers(LAYERS, invert, matrices()), rtol=1e-12)


def test_every_device_has_as_many_of_each_kind():
    specs = traced(matrices(), NamedSharding(mesh(), P()))
    # Three in four slots: what is inverted, its result, and the slots' numbers.
    assert {shape for shape, axes in specs if axes == "data"} == {(4, 2, 2), (4,)}
    # Then whole on all devices again. The one like no other, and stacks, are left where they are.
    assert {shape for shape, axes in specs if axes is None} == {(3, 2, 2), (3,)}


def test_all_axes_of_a_mesh_divide():
    specs = traced(matrices(), NamedSharding(mesh(sizes=(2, 2), names=("x", "y")), P()))
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
    assert traced(matrices(), sharding) == []
