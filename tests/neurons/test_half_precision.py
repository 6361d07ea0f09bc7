"""What is kept of a model in bfloat16 is summed and inverted in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import locoprop_jax as lp

ROWS, WIDTH = 4096, 3
METHODS = {
    "foof": lambda layers: lp.scale_by_foof(layers, inverse_period=2),
    "kfac": lambda layers: lp.scale_by_kfac(layers, curvature="empirical"),
}


def loss_fn(params, batch):
    x, labels = batch
    hidden = jnp.tanh(x @ params["in"])
    losses = lp.losses.softmax_cross_entropy_with_integer_labels(hidden @ params["out"], labels)
    return losses.mean()


@pytest.mark.parametrize("method", METHODS)
def test_second_moments_and_inverses_have_the_precision_of_float32(method):
    """In bfloat16 a sum of so many squares would stop to grow."""
    rng = np.random.default_rng(0)
    half = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)  # noqa: E731
    params = {"in": half(WIDTH, WIDTH), "out": half(WIDTH, 2)}
    batch = (half(ROWS, WIDTH) + jnp.bfloat16(1), jnp.asarray(rng.integers(0, 2, ROWS)))
    tx = METHODS[method](lp.find_layers(loss_fn, params, batch))

    @jax.jit
    def step(params, batch):
        _, grads, captured = lp.value_grad_and_capture(loss_fn)(params, batch)
        return tx.update(grads, tx.init(params), params, captured=captured)[1]

    state = step(params, batch)
    x = np.asarray(batch[0], np.float64)
    expected = x.T @ x / ROWS
    inverse = state.inverse["in"][0]
    assert inverse.dtype == jnp.float32
    # S + a multiple of the identity, which is the damping.
    damped = np.linalg.inv(np.asarray(inverse, np.float64))
    amount = damped[0, 0] - expected[0, 0]
    np.testing.assert_allclose(damped, expected + amount * np.eye(WIDTH), rtol=1e-5)
    own = state.statistics["in"][0]
    assert own.dtype == jnp.float32
    np.testing.assert_allclose(own / own[0, 0], expected / expected[0, 0], rtol=1e-5)
