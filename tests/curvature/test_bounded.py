"""Gauss-Newton steps stay bounded at their defaults: small batches, degenerate inputs."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import locoprop_jax as lp
from tests.helpers import quick_jit

EXAMPLES, INPUTS, HIDDEN, OUTPUTS = 64, 4, 6, 3

# name -> the optimizer, and what it wants to be captured
METHODS = {
    "kfac": (lp.kfac, "ggn_mc"),
    "kflr": (lp.kflr, "ggn_exact"),
    "kfra": (lp.kfra, "ggn_output"),
    "natural_gradient": (lp.natural_gradient, "ggn_exact"),
    "hessian_free": (lambda layers: lp.hessian_free(), None),
}


def data(inputs):
    """Inputs of a kind, and a smooth function of ordinary ones with a little noise."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(EXAMPLES, INPUTS))
    y = np.sin(x @ rng.normal(size=(INPUTS, OUTPUTS))) + 0.1 * rng.normal(size=(EXAMPLES, OUTPUTS))
    if inputs == "constant":
        x[:, 1:] = [3.0, 0.0, -1.0]
    if inputs == "duplicate":
        x[:, 2:] = x[:, :2]
        x[EXAMPLES // 2 :] = x[: EXAMPLES // 2]
    if inputs == "badly scaled":
        x *= np.logspace(-3, 2, INPUTS)
    return jnp.asarray(x), jnp.asarray(y)


def outputs(params, x):
    hidden = jnp.tanh(x @ params["in"]["kernel"] + params["in"]["bias"][None])
    return hidden @ params["out"]["kernel"] + params["out"]["bias"][None]


LOSSES = {
    "classifier": lambda params, x, y: lp.losses.softmax_cross_entropy_with_integer_labels(
        outputs(params, x), y.argmax(-1)
    ).mean(),
    "regression": lambda params, x, y: (
        lp.losses.squared_error(outputs(params, x), y).sum(-1).mean()
    ),
}


def init_params():
    rng = np.random.default_rng(1)

    def layer(d_in, d_out):
        kernel = jnp.asarray(rng.normal(size=(d_in, d_out)) / d_in**0.5)
        return {"kernel": kernel, "bias": jnp.zeros(d_out)}

    return {"in": layer(INPUTS, HIDDEN), "out": layer(HIDDEN, OUTPUTS)}


@functools.cache
def training(method, problem, batch, steps):
    """Data -> the loss on all of it before each step and after the last, compiled once.

    Averaged over eight orders of the batches: of a single one the last loss is a matter of luck.
    """
    loss_fn, (make, curvature) = LOSSES[problem], METHODS[method]
    tx = make(lp.find_layers(loss_fn, init_params(), *(part[:batch] for part in data("plain"))))
    capture = lp.value_grad_and_capture(loss_fn, curvature=curvature)

    def train(x, y, key):
        def step(carry, key):
            params, state = carry
            chosen = jax.random.permutation(key, EXAMPLES)[:batch]
            rows = x[chosen], y[chosen]
            rng = {"rng": key} if curvature == "ggn_mc" else {}
            loss, grads, captured = capture(params, *rows, **rng)
            line = {"value": loss, "grad": grads, "value_fn": lambda p: loss_fn(p, *rows)}
            updates, state = tx.update(grads, state, params, captured=captured, **line)
            return (optax.apply_updates(params, updates), state), loss_fn(params, x, y)

        carry = (init_params(), tx.init(init_params()))
        keys = jax.random.split(key, steps)
        (params, _), losses = jax.lax.scan(step, carry, keys)
        return jnp.append(losses, loss_fn(params, x, y))

    @quick_jit
    def trained(x, y):
        orders = jax.random.split(jax.random.key(0), 8)
        return jax.lax.map(lambda key: train(x, y, key), orders).mean(0)

    return trained


QUICK = {
    ("kfac", "classifier", 8, 60),
    ("kfra", "regression", 8, 60),
    ("natural_gradient", "regression", 8, 60),
    ("hessian_free", "regression", 8, 60),
}
CASES = [
    case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow)
    for case in itertools.product(METHODS, LOSSES, (1, 8, EXAMPLES), (60, 300))
]


@pytest.mark.parametrize("inputs", ["plain", "constant", "duplicate", "badly scaled"])
@pytest.mark.parametrize("method, problem, batch, steps", CASES)
def test_the_loss_does_not_end_above_its_first_value(method, problem, batch, steps, inputs):
    """With one example in a batch, or few with labels that are noise, it may end a little above.

    A step that fits one example is mostly noise, most of all where equal inputs have different
    labels ("duplicate"). Before steps were bounded these cases ended at up to a thousand times the
    first loss; the factor here is what is still missing.
    """
    losses = training(method, problem, batch, steps)(*data(inputs))
    assert jnp.isfinite(losses).all()
    few = 1.1 if inputs == "duplicate" and batch < EXAMPLES else 1
    missing = 2.1 if batch == 1 else few
    assert losses[-1] <= missing * losses[0]
