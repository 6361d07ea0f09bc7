"""What makes a step or a state many times as costly as usual says so, with the number."""

import warnings

import jax
import jax.numpy as jnp
import optax
import pytest

import locoprop_jax as lp


def dense(d, d_out, loss):
    """A layer of so many inputs and outputs, its loss and a batch, as shapes alone."""
    params = {"kernel": jax.ShapeDtypeStruct((d, d_out), "float32")}
    x = jax.ShapeDtypeStruct((4, d), "float32")
    y = jax.ShapeDtypeStruct((4, d_out), "float32")
    return (lambda p, x, y: loss(x @ p["kernel"], y)), params, x, y


def squared(z, y):
    return lp.losses.squared_error(z, y).sum(-1).mean()


def unmarked(z, y):
    return jnp.mean(jax.nn.logsumexp(jnp.sin(z) * y, -1))


def captured(loss, size, curvature):
    """Trace a capture, twice."""
    loss_fn, *args = dense(3, size, loss)
    options = {"rng": jax.random.key(0)} if curvature == "ggn_mc" else {}
    capture = lp.value_grad_and_capture(loss_fn, curvature=curvature)
    for _ in range(2):
        jax.eval_shape(lambda *given: capture(*given, **options), *args)


@pytest.mark.parametrize(
    "loss, curvature, message",
    [
        (squared, "ggn_exact", r"takes 33 columns .*'ggn_mc'. takes one"),
        (unmarked, "ggn_mc", r"33 outputs of a row .*33 x 33 numbers.*losses"),
    ],
)
def test_columns_and_hessians_of_many_outputs_are_told_once(loss, curvature, message):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")  # as it is for a user: once for each text
        captured(loss, 33, curvature)
    own = [str(each.message) for each in told if each.category is lp.CostWarning]
    assert len(own) == 1
    with pytest.warns(lp.CostWarning, match=message):
        captured(loss, 33, curvature)
    captured(loss, 32, curvature)  # a warning would be an error here


@pytest.mark.parametrize("d, d_out", [(9000, 2), (2, 9000)])
def test_kfra_tells_of_the_factors_that_kfac_keeps_by_their_diagonals(d, d_out):
    loss_fn, *args = dense(d, d_out, squared)
    layers = lp.find_layers(loss_fn, *args)
    with pytest.warns(lp.CostWarning, match=r"layer kernel is a matrix of 900\d x 900\d .*kfac"):
        lp.scale_by_kfra(layers)
    lp.scale_by_kfac(layers)
    lp.foof(layers)


def test_natural_targets_tell_of_matrices_of_many_outputs():
    loss_fn, params, *batch = dense(2, 9000, squared)
    layers = lp.find_layers(loss_fn, params, *batch)
    full = lp.locoprop_kfac(layers, 0.1)
    with pytest.warns(lp.CostWarning, match=r"9000 x 9000 .*0\.3 GiB.*diagonal=True"):
        jax.eval_shape(full.init, params)
    diagonal = lp.locoprop_kfac(layers, 0.1, target=lp.natural(diagonal=True))
    assert jax.eval_shape(diagonal.init, params)


def test_hessian_blocks_tell_of_large_blocks():
    loss_fn, params, *batch = dense(100, 90, squared)
    layers = lp.find_layers(loss_fn, params, *batch)
    capture = lp.value_grad_and_capture(loss_fn)

    def blocks(params, *batch):
        return lp.hessian_blocks(layers, params, capture(params, *batch)[2])

    with pytest.warns(lp.CostWarning, match=r"layer kernel is a matrix of 9000 x 9000"):
        jax.eval_shape(blocks, params, *batch)


def exact_update(loss_fn, params, *batch):
    """Trace an update by the empirical Fisher."""
    layers = lp.find_layers(loss_fn, params, *batch)
    tx = lp.scale_by_natural_gradient(layers, curvature="empirical")

    def update(params, *batch):
        _, grads, captured = lp.value_grad_and_capture(loss_fn)(params, *batch)
        return tx.update(grads, tx.init(params), captured=captured)

    return jax.eval_shape(update, params, *batch)


def test_the_exact_fisher_tells_of_tables_that_it_writes_out():
    def loss_fn(params, ids):
        return jnp.mean(params["table"][ids] ** 2)

    params = {"table": jax.ShapeDtypeStruct((20_000, 2), "float32")}
    ids = jax.ShapeDtypeStruct((64,), "int32")
    with pytest.warns(lp.CostWarning, match=r"layer table: 1280000 numbers where .*`foof`"):
        exact_update(loss_fn, params, ids)
    short = {"table": jax.ShapeDtypeStruct((20, 2), "float32")}
    assert exact_update(loss_fn, short, ids)


def test_the_exact_fisher_tells_of_systems_of_many_equations():
    def loss_fn(params, x):
        return optax.l2_loss(x @ params["kernel"]).sum(-1).mean()

    params = {"kernel": jax.ShapeDtypeStruct((3, 2), "float32")}
    x = jax.ShapeDtypeStruct((9000, 3), "float32")
    with pytest.warns(lp.CostWarning, match=r"system of the exact Fisher.*9000 x 9000.*batch"):
        exact_update(loss_fn, params, x)
