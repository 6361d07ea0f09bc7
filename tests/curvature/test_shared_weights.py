"""The trace of a shared layer's curvature, against sums over examples and positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import locoprop_jax as lp
from locoprop_jax._curvature.shared_weights import trace_ratio
from tests.helpers import normal


def exact_trace(inputs, cotangents):
    """By one matrix for each example and sample; an input of ones is the bias's."""
    a = np.concatenate([inputs, np.ones((*inputs.shape[:-1], 1))], -1)
    return sum(
        np.sum(sum(np.outer(x, c) for x, c in zip(a[example], sample, strict=True)) ** 2)
        for example in range(len(a))
        for sample in cotangents[:, example]
    )


@pytest.mark.parametrize("positions", [1, 3, 40])  # both ways to form the sum
def test_the_product_of_the_factors_gets_the_trace_of_the_sums_over_positions(positions):
    with jax.enable_x64(True):
        inputs = normal(0, 4, positions, 5).astype(jnp.float64)
        cotangents = normal(1, 2, 4, positions, 3).astype(jnp.float64)
        like = {"kernel": jnp.zeros((5, 3)), "bias": jnp.zeros(3)}
        ratio = trace_ratio(inputs, cotangents, like, count=4 * positions)
        of_inputs = (np.square(inputs).sum() + 4 * positions) / (4 * positions)
        of_outputs = np.square(cotangents).sum()
        expected = exact_trace(np.asarray(inputs), np.asarray(cotangents))
        np.testing.assert_allclose(ratio * of_inputs * of_outputs, expected, rtol=1e-10)


@pytest.mark.parametrize("value", [0.0, jnp.inf])
def test_cotangents_that_say_nothing_change_nothing(value):
    like = {"kernel": jnp.zeros((5, 3))}
    ratio = trace_ratio(jnp.ones((4, 2, 5)), jnp.full((1, 4, 2, 3), value), like, count=8)
    assert ratio == 1


def kfac_factors(loss_fn, params, *args):
    """Without and with the exact trace, by the loss's own cotangents."""
    layers = lp.find_layers(loss_fn, params, *args)
    run = lp.value_grad_and_capture(loss_fn, curvature="fisher_empirical")
    _, grads, captured = run(params, *args)
    factors = []
    for match_trace in (False, True):
        tx = lp.scale_by_kfac(layers, curvature="empirical", match_trace=match_trace)
        _, state = tx.update(grads, tx.init(params), params, captured=captured)
        factors.append(state.statistics)
    return factors


def test_positions_that_pull_together_have_as_much_more_curvature():
    """One input at all positions: the sum of 6 equal terms has 6 times their trace."""

    def loss_fn(params, x):
        return jnp.mean(jnp.square(jnp.repeat(x[:, None], 6, 1) @ params["w"]).sum(-1))

    x = normal(3, 8, 4)
    x = x / jnp.linalg.norm(x, axis=1, keepdims=True)  # or large inputs with large cotangents count
    apart, exact = kfac_factors(loss_fn, {"w": normal(2, 4, 3)}, x)
    np.testing.assert_allclose(exact["w"].outputs, 6 * apart["w"].outputs, rtol=1e-4)


def test_a_tied_table_has_the_curvature_of_its_own_uses():
    """Its rows as a table and as an output layer have sizes of their own, which a product mixes."""

    def loss_fn(params, words):
        found = params["table"][words] * 0.01  # the cotangents of the lookup are small
        logits = jnp.tanh(found @ params["w"]) @ params["table"].T
        return lp.losses.softmax_cross_entropy_with_integer_labels(logits, words).mean()

    params = {"table": normal(4, 9, 5), "w": normal(5, 5, 5)}
    words = jnp.arange(12).reshape(4, 3) % 9
    apart, exact = kfac_factors(loss_fn, params, words)
    layers = lp.find_layers(loss_fn, params, words)
    name = next(layer.name for layer in layers.values() if layer.kind == "tied")
    _, _, captured = lp.value_grad_and_capture(loss_fn)(params, words)
    inputs, cotangents = captured[name].inputs, captured[name].cotangents
    sums = jnp.einsum("bsi,bso->bio", inputs, cotangents)
    expected = jnp.square(sums).sum() * captured.terms
    factors = jax.tree.map(lambda x: x / (1 - 0.95), exact[name])  # of sums that decay
    np.testing.assert_allclose(
        jnp.trace(factors.inputs) * jnp.trace(factors.outputs), expected, rtol=1e-4
    )
    assert not np.allclose(factors.outputs, apart[name].outputs, rtol=0.1)


def test_entries_of_a_scale_are_damped_in_units_of_their_mean():
    """One that a batch says next to nothing of is not thrown far."""

    def loss_fn(params, x):
        return jnp.mean(jnp.square(x * params["scale"][None]).sum(-1))

    params, x = {"scale": jnp.ones(3)}, normal(6, 8, 3) * jnp.asarray([[1.0, 1.0, 1e-4]])
    layers = lp.find_layers(loss_fn, params, x)
    capture = lp.value_grad_and_capture(loss_fn, curvature="fisher_empirical")
    _, grads, captured = capture(params, x)
    tx = lp.scale_by_kfac(layers, curvature="empirical", damping=0.1)
    updates, _ = tx.update(grads, tx.init(params), params, captured=captured)
    assert abs(updates["scale"][2]) < 1e-3 * abs(updates["scale"][0])
