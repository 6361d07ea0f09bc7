"""What must not happen in a long run: tracing anew, growing, keeping what the user let go of."""

import functools
import gc
import weakref

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import locoprop_jax as lp
from tests.test_contract import METHODS
from tests.test_degenerate import DEFAULTS, good_batch, init_params
from tests.test_degenerate import loss_fn as weighted_loss_fn

EPOCH, PARTIAL = 5, 3  # steps, and the examples of the last one


class Run:
    """A run whose step takes a key and a learning rate as arguments, and whose epochs end early."""

    def __init__(self, name):
        self.method = DEFAULTS[name]
        self.params, batch = init_params(), good_batch()
        self.tx = self.method.build(lp.find_layers(weighted_loss_fn, self.params, batch))
        self.state = self.tx.init(self.params)
        self.capture = lp.value_grad_and_capture(
            weighted_loss_fn, curvature=self.method.curvature, transferred=True
        )
        traced = chex.assert_max_traces(self.trace, n=2)  # whole batches and the last one
        self.step = jax.jit(traced, donate_argnums=(0, 1))

    def trace(self, params, state, batch, rate, key):
        options = {"rng": key} if self.method.curvature == "ggn_mc" else {}
        value, grads, captured = self.capture(params, batch, **options)
        line = {"value": value, "grad": grads, "value_fn": lambda p: weighted_loss_fn(p, batch)}
        updates, state = self.tx.update(grads, state, params, captured=captured, **line)
        updates = jax.tree.map(lambda u: rate * u, updates)
        return optax.apply_updates(params, updates), state

    def go(self, steps):
        batches = {n: good_batch(n, examples=n) for n in (6, PARTIAL)}
        for i in range(steps):
            rate = np.float32(1 / (1 + i))
            examples = PARTIAL if i % EPOCH == EPOCH - 1 else 6
            key = jax.random.key(i)
            self.params, self.state = self.step(
                self.params, self.state, batches[examples], rate, key
            )


def assert_long(name, steps):
    chex.clear_trace_counter()
    run = Run(name)
    run.go(2 * EPOCH)
    gc.collect()
    alive = len(jax.live_arrays())
    run.go(steps)
    gc.collect()
    assert len(jax.live_arrays()) == alive
    chex.assert_tree_all_finite(run.params)


@pytest.mark.parametrize("name", ["lnb", pytest.param("kfac", marks=pytest.mark.slow)])
def test_fifty_steps_are_traced_once_for_each_shape_and_leave_no_arrays_behind(name):
    assert_long(name, 50)


WITH_ANY_BATCH = [name for name, own in DEFAULTS.items() if own.size is None]


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_ANY_BATCH)
def test_a_thousand_steps_are_traced_once_for_each_shape_and_leave_no_arrays_behind(name):
    assert_long(name, 1000)


def test_a_learning_rate_that_is_injected_anew_is_not_traced_anew():
    chex.clear_trace_counter()
    params, batch = init_params(), good_batch()
    tx = optax.inject_hyperparams(lp.lnb, static_args=METHODS["lnb"].static)(
        lp.find_layers(weighted_loss_fn, params, batch), learning_rate=0.1
    )
    capture = lp.value_grad_and_capture(weighted_loss_fn)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state):
        _, grads, captured = capture(params, batch)
        updates, state = tx.update(grads, state, params, captured=captured)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for i in range(5):
        rate = state.hyperparams["learning_rate"]
        state.hyperparams["learning_rate"] = jnp.asarray(0.1 / (1 + i), rate.dtype)
        params, state = step(params, state)
    np.testing.assert_allclose(state.hyperparams["learning_rate"], 0.02, rtol=1e-6)


# --- what is kept alive ---------------------------------------------------------------------------


class Model:
    """Something of the user's that a loss closes over."""

    def __init__(self):
        self.offset = jnp.full(3, 0.5)

    def loss_fn(self, params, x):
        hidden = jnp.tanh(x @ params["in"] + self.offset[None])
        return jnp.mean((hidden @ params["out"]) ** 2)


@functools.lru_cache
def plain(seed):
    return np.random.default_rng(seed).normal(size=(4, 3))


@pytest.mark.parametrize("compiled", [False, True])
def test_nothing_of_the_users_is_kept_after_it_was_deleted(compiled):
    model = Model()
    params = {"in": jnp.asarray(plain(0)), "out": jnp.asarray(plain(1)[:3])}
    x = jnp.asarray(plain(2).T @ plain(3) @ plain(4).T)
    loss_fn = model.loss_fn
    layers = lp.find_layers(loss_fn, params, x)
    tx = lp.lnb(layers)
    state = tx.init(params)

    def step(params, state, x):
        _, grads, captured = lp.value_grad_and_capture(loss_fn)(params, x)
        return tx.update(grads, state, params, captured=captured)

    run = jax.jit(step) if compiled else step
    updates, state = run(params, state, x)
    refs = [weakref.ref(leaf) for leaf in jax.tree.leaves((params, state, updates, x))]
    refs += [weakref.ref(model), weakref.ref(model.offset), weakref.ref(layers), weakref.ref(run)]
    del model, params, x, loss_fn, layers, tx, state, step, run, updates
    gc.collect()
    assert [ref() for ref in refs if ref() is not None] == []


def test_layers_and_a_transformation_keep_no_parameters_and_no_batch():
    model = Model()
    params = {"in": jnp.asarray(plain(0)), "out": jnp.asarray(plain(1)[:3])}
    x = jnp.asarray(plain(2).T @ plain(3) @ plain(4).T)
    layers = lp.find_layers(model.loss_fn, params, x)
    tx = lp.foof(layers)
    refs = [weakref.ref(leaf) for leaf in jax.tree.leaves((params, x))]
    del params, x
    gc.collect()
    assert [ref() for ref in refs if ref() is not None] == []
    assert tx and layers
