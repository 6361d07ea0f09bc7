"""Layers in the branches of `cond` and `switch`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import locoprop_jax as lp
from tests.helpers import assert_captured, normal

X, Y = normal(0, 6, 4), normal(1, 6, 2)
PARAMS = {
    "one": {"kernel": normal(2, 4, 4), "bias": normal(3, 4)},
    "other": {"kernel": normal(4, 4, 4), "bias": normal(5, 4)},
    "out": normal(6, 4, 2),
}


def dense(p, x):
    return jnp.tanh(x @ p["kernel"] + p["bias"][None])


def after(p, h, y):
    return jnp.mean((h @ p["out"] - y) ** 2)


@pytest.mark.parametrize("which", [0, 1])
def test_the_branch_that_ran_has_rows_and_the_other_zeros(which):
    def loss_fn(p, x, y, which):
        branches = [lambda x: dense(p["one"], x), lambda x: dense(p["other"], dense(p["other"], x))]
        return after(p, jax.lax.switch(which, branches, x), y)

    layers, captured = assert_captured(loss_fn, PARAMS, X, Y, jnp.int32(which))
    assert {name: layer.uses for name, layer in layers.items()} == {"one": 1, "other": 2, "out": 1}
    ran, idle = ("one", "other") if which == 0 else ("other", "one")
    assert np.any(captured[ran].inputs)
    assert not np.any(captured[idle].inputs)
    assert not np.any(captured[idle].cotangents)


def test_a_condition_on_the_data():
    def loss_fn(p, x, y):
        h = jax.lax.cond(x.sum() > 0, lambda: dense(p["one"], x), lambda: dense(p["other"], x))
        return after(p, h, y)

    assert_captured(loss_fn, PARAMS, X, Y)
    assert_captured(loss_fn, PARAMS, -X, Y)


def test_branches_that_share_their_layer():
    def loss_fn(p, x, y):
        h = jax.lax.cond(
            x.sum() > 0, lambda x: dense(p["one"], x), lambda x: dense(p["one"], -x), x
        )
        return after(p, dense(p["other"], h), y)

    layers, _ = assert_captured(loss_fn, PARAMS, X, Y)
    assert layers["one"].uses == 2


def test_branches_that_pass_parameters_on():
    """As libraries write that some parameters are trained and others not."""

    def loss_fn(p, x, y, train):
        p = jax.lax.cond(train, lambda p: p, jax.lax.stop_gradient, p)
        return after(p, dense(p["one"], dense(p["other"], x)), y)

    layers, _ = assert_captured(loss_fn, PARAMS, X, Y, jnp.bool_(True))
    assert set(layers) == {"one", "other", "out"}


def test_a_branch_in_a_loop_and_a_loop_in_a_branch():
    def loss_fn(p, x, y):
        def step(h, i):
            return jax.lax.cond(i % 2 == 0, lambda h: dense(p["one"], h), lambda h: h + 1, h), None

        def more(x):
            return jax.lax.scan(step, x, jnp.arange(3))[0]

        return after(p, jax.lax.cond(x.sum() > 0, more, lambda x: dense(p["other"], x), x), y)

    assert_captured(loss_fn, PARAMS, X, Y)
    assert_captured(loss_fn, PARAMS, -X, Y)


@pytest.mark.parametrize("method", ["foof", "lnb", "kfac"])
def test_methods_take_both_branches(method):
    def loss_fn(p, x, y):
        h = jax.lax.cond(
            x.sum() > 0, lambda x: dense(p["one"], x), lambda x: dense(p["other"], x), x
        )
        return lp.losses.squared_error(h @ p["out"], y).mean()

    layers = lp.find_layers(loss_fn, PARAMS, X, Y)
    tx = {"foof": lp.foof, "lnb": lp.lnb, "kfac": lp.scale_by_kfac}[method](layers)
    curvature = "ggn_mc" if method == "kfac" else None
    capture = lp.value_grad_and_capture(loss_fn, curvature=curvature)
    key = {"rng": jax.random.key(0)} if method == "kfac" else {}
    _, grads, captured = capture(PARAMS, X, Y, **key)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS, captured=captured)
    for leaf in jax.tree.leaves(updates):
        assert np.all(np.isfinite(leaf))
