"""Runs that are killed at any step end as those that are not, and wrong states are refused."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import locoprop_jax as lp
from tests.restarts import EVERY, STEPS

ROOT = Path(__file__).parents[2]


def run(cache, *arguments):
    """A run in a process of its own; what is compiled is kept for the next one."""
    return subprocess.run(
        [sys.executable, "-m", "tests.restarts", *map(str, arguments)],
        cwd=ROOT,
        env={
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        },
        capture_output=True,
        text=True,
    )


def finished(cache, *arguments):
    """Where a run that nobody kills started, and what it ended with."""
    done = run(cache, *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    said, last = done.stdout.split("\n")[:2]
    return int(said.removeprefix("from ")), last


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache):
    return finished(cache, tmp_path_factory.mktemp("whole"), "pickle")[1]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("store", ["pickle", "orbax"])
def test_a_run_that_is_killed_twice_ends_bit_for_bit_as_one_that_is_not(
    store, seed, tmp_path, cache, uninterrupted
):
    rng = np.random.default_rng(seed)
    first = rng.integers(1, STEPS // 2)
    second = rng.integers(first + 1, STEPS)
    for step in (first, second):
        assert run(cache, tmp_path, store, step).returncode == -signal.SIGKILL
    start, last = finished(cache, tmp_path, store)
    # The last checkpoint may have been in the middle of being written.
    assert max(second // EVERY * EVERY - EVERY, 0) <= start <= second
    assert last == uninterrupted


# --- states of other models ----------------------------------------------------------------------


def network(widths):
    def loss_fn(params, x):
        for kernel in params.values():
            x = jnp.tanh(x @ kernel)
        return jnp.mean(x**2)

    names = [f"layer{i}" for i in range(len(widths) - 1)]
    sizes = zip(names, widths[:-1], widths[1:], strict=True)
    return loss_fn, {n: jnp.ones((d, d_out)) for n, d, d_out in sizes}, jnp.ones((6, widths[0]))


METHODS = {
    "scale_by_foof": lp.foof,
    "scale_by_lnb": lp.lnb,
    "scale_by_kfac": lambda layers: lp.scale_by_kfac(layers, curvature="empirical"),
    "scale_by_natural_gradient": lambda layers: lp.scale_by_natural_gradient(
        layers, 6, curvature="empirical"
    ),
    "scale_by_gauss_newton_step": lambda layers: lp.kfac(layers, curvature="empirical"),
    "scale_by_hessian_free": lambda layers: lp.hessian_free(),
    "scale_by_local_loss": lp.locoprop_s,
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("widths", [(3, 2, 4, 3), (3, 5, 3)])
def test_the_state_of_another_model_is_refused_by_name(name, widths):
    loss_fn, params, x = network((3, 2, 3))
    tx = METHODS[name](lp.find_layers(loss_fn, params, x))
    other_loss, other_params, other_x = network(widths)
    other = METHODS[name](lp.find_layers(other_loss, other_params, other_x)).init(other_params)
    own = tx.init(params)

    def update(state):
        value, grads, captured = lp.value_grad_and_capture(loss_fn)(params, x)
        line = {"value": value, "grad": grads, "value_fn": lambda p: loss_fn(p, x)}
        return tx.update(grads, state, params, captured=captured, **line)

    with pytest.raises(
        ValueError, match=rf"`({name}|average_gradients)` was given the state of another"
    ):
        jax.eval_shape(update, other)
    assert jax.eval_shape(update, own)
