"""Models as people write them: each parameter is in a layer, or listed with the reason."""

import functools
import re

import chex
import jax
import numpy as np
import optax
import pytest

import locoprop_jax as lp
from tests.helpers import block_gradient, quick_jit
from tests.zoo import ZOO

pytestmark = pytest.mark.standard_promotion

METHODS = {
    "foof": lambda layers: lp.foof(layers, 1e-3),
    "lnb": lambda layers: lp.lnb(layers, 1e-3, iterations=2),
}
# Their steps alone are compiled in every run of the tests: one model for each kind of layer.
QUICK = {
    "mlp",
    "lenet",
    "lstm",
    "equinox, attention",
    "nnx, convolutions",
    "mixture of experts",
    "scanned transformer",
}
# Their gradients too.
DEEPER = {
    "vit",
    "unet",
    "convnext",
    "resnet, running averages",
    "gpt, tied embedding",
    "gru",
    "siren",
    "graph network",
    "equinox, convolutions",
    "haiku, attention",
    "long convolution",
}


def some(chosen):
    """The zoo, of which the models that were not chosen are slow."""
    assert chosen <= set(ZOO)
    return [n if n in chosen else pytest.param(n, marks=pytest.mark.slow) for n in ZOO]


@functools.cache
def built(name):
    loss, params, batch = ZOO[name].build()
    return loss, params, batch, lp.find_layers(loss, params, batch, on_uncaptured="pass")


@pytest.mark.parametrize("name", ZOO)
def test_every_parameter_is_in_a_layer_or_listed(name):
    *_, layers = built(name)
    missing = ZOO[name].missing
    reasons = {other.path: other.reason for other in layers.uncaptured if other.has_gradient}
    listed = {path for part in missing for path in reasons if path.startswith(part)}
    assert set(reasons) == listed, str(layers)
    for part, why in missing.items():
        found = [reason for path, reason in reasons.items() if path.startswith(part)]
        assert found and all(re.search(why, reason) for reason in found)
    paths = {parameter.path for layer in layers.values() for parameter in layer.parameters}
    assert paths.isdisjoint(reasons) and layers


@functools.cache
def captured_in(name):
    """Value, gradients and arrays of a model, in one program with what they should be."""
    loss, params, batch, layers = built(name)

    @quick_jit
    def everything(params, batch):
        value, grads, captured = lp.value_grad_and_capture(loss)(params, batch)
        products = {}
        for layer_name, layer in layers.items():
            product = block_gradient(captured[layer_name], layer.bias is not None)
            products[layer_name] = product, layers.block(grads, layer_name)
        return captured, (value, grads), jax.value_and_grad(loss)(params, batch), products

    return everything(params, batch)


@pytest.mark.parametrize("name", some(QUICK | DEEPER))
def test_gradients_are_those_of_jax_and_of_the_captured_arrays(name):
    _, found, expected, products = captured_in(name)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
    for product, block in products.values():
        np.testing.assert_allclose(product, block, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", some(QUICK))
def test_a_step_lowers_the_loss(method, name):
    loss, params, batch, layers = built(name)
    captured, (value, grads), *_ = captured_in(name)
    tx = lp.with_fallback(METHODS[method](layers), layers, optax.sgd(1e-4))

    @quick_jit
    def after(params, grads, captured, batch):
        updates, _ = tx.update(grads, tx.init(params), params, captured=captured)
        return loss(optax.apply_updates(params, updates), batch)

    assert after(params, grads, captured, batch) < value
