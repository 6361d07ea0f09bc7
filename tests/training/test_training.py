"""Training with each front end, and the few lines that this takes."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import chex
import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import locoprop_jax as lp

STEPS = 8


def data():
    return jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)))


def reconstruction_loss(output, x):
    return optax.l2_loss(output, x).sum(-1).mean()


def optimizer(layers):
    """Plain gradient steps with the paper's own, absolute parameters."""
    options = {"gamma": 6.0, "relative": False, "iterations": 2, "optimizer": optax.sgd}
    return lp.locoprop_m(layers, 0.02, **options)


def assert_falling(losses):
    assert losses[-1] < 0.8 * losses[0]


def assert_close(actual, desired):
    chex.assert_trees_all_close(actual, desired, rtol=1e-10)


class Autoencoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        code = nn.tanh(nn.Dense(2, name="encoder", param_dtype=x.dtype)(x))
        return nn.Dense(3, name="decoder", param_dtype=x.dtype)(code)


def linen_loss(params, x):
    return reconstruction_loss(Autoencoder().apply(params, x), x)


def linen_params():
    return Autoencoder().init(jax.random.key(0), data())


# --- Flax linen ----------------------------------------------------------------------------------


class StateWithStatistics(lp.TrainState):
    batch_stats: Any


def test_a_flax_train_state_trains_with_captured_arrays_and_replaces_its_other_fields():
    params, x = linen_params(), data()
    layers = lp.find_layers(linen_loss, params, x)
    assert set(layers) == {"params/encoder", "params/decoder"}
    tx = optimizer(layers)
    state = StateWithStatistics.create(
        apply_fn=Autoencoder().apply, params=params, tx=tx, batch_stats={"mean": jnp.zeros(3)}
    )

    @jax.jit
    def step(state, x):
        loss, grads, captured = lp.value_grad_and_capture(linen_loss)(state.params, x)
        updates, _ = tx.update(grads, state.opt_state, state.params, captured=captured)
        expected = optax.apply_updates(state.params, updates)
        state = state.apply_gradients(
            grads=grads, captured=captured, batch_stats={"mean": x.mean(0)}
        )
        return state, expected, loss

    losses = []
    for _ in range(STEPS):
        state, expected, loss = step(state, x)
        assert_close(state.params, expected)
        losses.append(loss)
    assert_falling(losses)
    assert isinstance(state, StateWithStatistics)
    assert state.step == STEPS
    np.testing.assert_allclose(state.batch_stats["mean"], x.mean(0))


def test_a_train_state_hands_all_that_is_no_field_to_the_optimizer():
    seen = {}

    def update(updates, state, params=None, **extra_args):
        seen.update(extra_args)
        return updates, state

    tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    state = StateWithStatistics.create(
        apply_fn=None, params=jnp.ones(2), tx=tx, batch_stats=jnp.zeros(2)
    )
    after = state.apply_gradients(
        grads=jnp.ones(2), captured="captured", value=3.0, batch_stats=jnp.ones(2)
    )
    assert seen == {"captured": "captured", "value": 3.0}
    np.testing.assert_array_equal(after.params, 2 * jnp.ones(2))
    np.testing.assert_array_equal(after.batch_stats, jnp.ones(2))
    np.testing.assert_array_equal(state.params, jnp.ones(2))


def test_a_train_state_takes_optimizers_without_extra_arguments_too():
    state = lp.TrainState.create(apply_fn=None, params=jnp.ones(2), tx=optax.sgd(0.5))
    after = state.apply_gradients(grads=jnp.ones(2), captured="ignored")
    np.testing.assert_array_equal(after.params, 0.5 * jnp.ones(2))


def test_a_name_that_the_package_lacks_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'TrainingState'"):
        _ = lp.TrainingState


# --- parameters in no layer ----------------------------------------------------------------------


@pytest.mark.standard_promotion
def test_with_fallback_trains_layers_by_locoprop_and_all_other_parameters_by_adam():
    params, x = {"net": linen_params(), "least": jnp.zeros(3)}, data()

    def loss_fn(params, x):
        cut = jnp.maximum(x, params["least"][None])
        return reconstruction_loss(Autoencoder().apply(params["net"], cut), x)

    layers = lp.find_layers(loss_fn, params, x, on_uncaptured="pass")
    assert [other.path for other in layers.uncaptured] == ["least"]
    tx = lp.with_fallback(optimizer(layers), layers, optax.adam(1e-2))
    layered, adam = optimizer(layers), optax.adam(1e-2)

    @jax.jit
    def step(params, state, layered_state, adam_state, x):
        loss, grads, captured = lp.value_grad_and_capture(loss_fn)(params, x)
        updates, state = tx.update(grads, state, params, captured=captured)
        result: Any = layered.update(grads, layered_state, params, captured=captured)
        of_layers, layered_state = result
        of_adam, adam_state = adam.update(grads["least"], adam_state)
        expected = {"net": of_layers["net"], "least": of_adam}
        params = optax.apply_updates(params, updates)
        return (params, state, layered_state, adam_state), updates, expected, loss

    carry = params, tx.init(params), layered.init(params), adam.init(params["least"])
    losses = []
    for _ in range(STEPS):
        carry, updates, expected, loss = step(*carry, x)
        assert_close(updates, expected)
        losses.append(loss)
    assert_falling(losses)


def test_with_fallback_has_nothing_to_do_where_every_parameter_is_in_a_layer():
    params = linen_params()
    layers = lp.find_layers(linen_loss, params, data())
    tx = lp.with_fallback(optimizer(layers), layers, optax.sgd(1e-2))

    def updates(params, x):
        _, grads, captured = lp.value_grad_and_capture(linen_loss)(params, x)
        return tx.update(grads, tx.init(params), params, captured=captured)[0]

    assert jax.eval_shape(updates, params, data()) == jax.eval_shape(lambda: params)


@pytest.mark.standard_promotion
def test_a_batch_that_is_not_finite_leaves_the_fallback_as_it_was():
    params, x = {"net": linen_params(), "least": jnp.full(3, -1.0)}, data()

    def loss_fn(params, x):
        cut = jnp.maximum(x, params["least"][None])
        return reconstruction_loss(Autoencoder().apply(params["net"], cut), x)

    layers = lp.find_layers(loss_fn, params, x, on_uncaptured="pass")
    tx = lp.with_fallback(optimizer(layers), layers, optax.adam(1e-2))

    @jax.jit
    def step(state, x):
        _, grads, captured = lp.value_grad_and_capture(loss_fn)(params, x)
        return tx.update(grads, state, params, captured=captured)

    updates, before = step(tx.init(params), x)
    assert np.any(updates["least"])
    updates, after = step(before, x.at[0, 0].set(jnp.nan))
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    chex.assert_trees_all_equal(after.inner_states["fallback"], before.inner_states["fallback"])
    assert lp.diagnostics(after)["local_loss/refused"] == 1


# --- Flax NNX ------------------------------------------------------------------------------------


class NNXAutoencoder(nnx.Module):
    def __init__(self, rngs):
        self.encoder = nnx.Linear(3, 2, rngs=rngs, param_dtype=float)
        self.decoder = nnx.Linear(2, 3, rngs=rngs, param_dtype=float)
        self.calls = nnx.Variable(jnp.array(0))

    def __call__(self, x):
        return self.decoder(jnp.tanh(self.encoder(x)))


def test_an_nnx_optimizer_takes_captured_arrays():
    model, x = NNXAutoencoder(nnx.Rngs(0)), data()
    graph, params, others = nnx.split(model, nnx.Param, ...)

    def loss_fn(params, others, x):
        return reconstruction_loss(nnx.merge(graph, params, others)(x), x)

    layers = lp.find_layers(loss_fn, params, others, x)
    assert list(layers) == ["encoder", "decoder"]  # without NNX's trailing "value"
    assert layers["encoder"].transfer.name == "tanh"
    tx = optimizer(layers)
    trainer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, trainer, x):
        _, params, others = nnx.split(model, nnx.Param, ...)
        loss, grads, captured = lp.value_grad_and_capture(loss_fn)(params, others, x)
        trainer.update(model, grads, captured=captured)
        return loss

    @jax.jit
    def functional_step(params, state, x):
        _, grads, captured = lp.value_grad_and_capture(loss_fn)(params, others, x)
        updates, state = tx.update(grads, state, params, captured=captured)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(STEPS):
        params, state = functional_step(params, state, x)
    losses = [step(model, trainer, x) for _ in range(STEPS)]
    assert_falling(losses)
    assert_close(jax.tree.leaves(nnx.state(model, nnx.Param)), jax.tree.leaves(params))


# --- Equinox -------------------------------------------------------------------------------------


def test_an_equinox_model_trains_with_partition_and_combine():
    model = eqx.nn.MLP(3, 3, 2, depth=1, activation=jnp.tanh, key=jax.random.key(0), dtype=float)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    x = data()

    def loss_fn(params, x):
        return reconstruction_loss(jax.vmap(eqx.combine(params, static))(x), x)

    layers = lp.find_layers(loss_fn, params, x)
    assert list(layers) == ["layers/0", "layers/1"]
    assert layers["layers/0"].transfer.name == "tanh"
    assert (layers["layers/0"].d_in, layers["layers/0"].d_out) == (3, 2)
    tx = optimizer(layers)

    @eqx.filter_jit
    def step(model, state, x):
        params, _ = eqx.partition(model, eqx.is_inexact_array)
        loss, grads, captured = lp.value_grad_and_capture(loss_fn)(params, x)
        updates, state = tx.update(grads, state, params, captured=captured)
        return eqx.apply_updates(model, updates), state, loss

    state = tx.init(params)
    losses = []
    for _ in range(STEPS):
        model, state, loss = step(model, state, x)
        losses.append(loss)
    assert_falling(losses)


# --- Haiku ---------------------------------------------------------------------------------------


def test_a_haiku_model_trains():
    def forward(x):
        return hk.nets.MLP([2, 3], activation=jnp.tanh, name="autoencoder")(x)

    model, x = hk.without_apply_rng(hk.transform(forward)), data()
    params = model.init(jax.random.key(0), x)

    def loss_fn(params, x):
        return reconstruction_loss(model.apply(params, x), x)

    layers = lp.find_layers(loss_fn, params, x)
    assert list(layers) == ["autoencoder/~/linear_0", "autoencoder/~/linear_1"]
    tx = optimizer(layers)

    @jax.jit
    def step(params, state, x):
        loss, grads, captured = lp.value_grad_and_capture(loss_fn)(params, x)
        updates, state = tx.update(grads, state, params, captured=captured)
        return optax.apply_updates(params, updates), state, loss

    state = tx.init(params)
    losses = []
    for _ in range(STEPS):
        params, state, loss = step(params, state, x)
        losses.append(loss)
    assert_falling(losses)


# --- losses that close over their batch ----------------------------------------------------------


def closing_over(x, y):
    """A loss of the parameters alone."""

    def loss_fn(params, x):
        output = jnp.tanh(x @ params["kernel"])
        return optax.l2_loss(output @ params["out"], y).sum(-1).mean()

    return loss_fn


@pytest.fixture
def closure_problem():
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(3, 2))), "out": jnp.ones((2, 30))}
    labels = [jnp.asarray(rng.normal(size=(6, 30))) for _ in range(2)]
    layers = lp.find_layers(closing_over(data(), labels[0]), params, data())
    return params, labels, optimizer(layers)


def test_captured_arrays_of_a_loss_that_closes_over_traced_labels_leave_jit(closure_problem):
    params, (labels, _), tx = closure_problem

    @jax.jit
    def capture(params, x, y):
        return lp.value_grad_and_capture(closing_over(x, y))(params, x)

    @jax.jit
    def together(params, x, y):
        _, grads, captured = lp.value_grad_and_capture(closing_over(x, y))(params, x)
        return tx.update(grads, tx.init(params), params, captured=captured)[0]

    _, grads, captured = capture(params, data(), labels)
    updates, _ = tx.update(grads, tx.init(params), params, captured=captured)
    assert_close(updates, together(params, data(), labels))


def test_a_compiled_update_sees_the_labels_that_each_loss_closes_over(closure_problem):
    params, labels, tx = closure_problem
    update = jax.jit(lambda g, s, p, captured: tx.update(g, s, p, captured=captured))
    for y in labels:
        _, grads, captured = lp.value_grad_and_capture(closing_over(data(), y))(params, data())
        updates, _ = update(grads, tx.init(params), params, captured)
        expected, _ = tx.update(grads, tx.init(params), params, captured=captured)
        assert_close(updates, expected)


# --- saved and restored --------------------------------------------------------------------------


def test_training_goes_on_bit_for_bit_in_another_process(tmp_path):
    def run(part):
        command = [sys.executable, "-m", "tests.training_in_parts", str(tmp_path), part]
        root = Path(__file__).parents[2]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.split()[-1]

    run("first")
    assert run("second") == run("both")
