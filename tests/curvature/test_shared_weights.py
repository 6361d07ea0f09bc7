"""The trace of a shared layer's curvature, against sums over examples and positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import locoprop_jax as lp
from locoprop_jax._curvature.shared_weights import trace_ratio
from tests.helpers import normal


def exact_ratio(inputs, cotangents):
    """By one matrix for each example and sample; an input of ones is the bias's."""
    a = np.concatenate([inputs, np.ones((*inputs.shape[:-1], 1))], -1)
    both = apart = 0.0
    for example in range(len(a)):
        for sample in cotangents[:, example]:
            terms = [np.outer(x, c) for x, c in zip(a[example], sample, strict=True)]
            both += np.sum(sum(terms) ** 2)
            apart += sum(np.sum(term**2) for term in terms)
    return both / apart


@pytest.mark.parametrize("positions", [1, 3, 40])  # both ways to form the sum
def test_the_ratio_is_that_of_sums_over_positions_and_of_positions_apart(positions):
    with jax.enable_x64(True):
        inputs = normal(0, 4, positions, 5).astype(jnp.float64)
        cotangents = normal(1, 2, 4, positions, 3).astype(jnp.float64)
        like = {"kernel": jnp.zeros((5, 3)), "bias": jnp.zeros(3)}
        ratio = trace_ratio(inputs, cotangents, like)
        expected = exact_ratio(np.asarray(inputs), np.asarray(cotangents))
        np.testing.assert_allclose(ratio, expected, rtol=1e-10)
        if positions == 1:
            np.testing.assert_allclose(ratio, 1, rtol=1e-12)


@pytest.mark.parametrize("value", [0.0, jnp.inf])
def test_cotangents_that_say_nothing_change_nothing(value):
    like = {"kernel": jnp.zeros((5, 3))}
    assert trace_ratio(jnp.ones((4, 2, 5)), jnp.full((1, 4, 2, 3), value), like) == 1


def test_positions_that_pull_together_have_as_much_more_curvature():
    """One input at all positions: the sum of 6 equal terms has 6 times their trace."""

    def loss_fn(params, x):
        return jnp.mean(jnp.square(jnp.repeat(x[:, None], 6, 1) @ params["w"]).sum(-1))

    params, x = {"w": normal(2, 4, 3)}, normal(3, 8, 4)
    layers = lp.find_layers(loss_fn, params, x)
    run = lp.value_grad_and_capture(loss_fn, curvature="fisher_empirical")
    _, grads, captured = run(params, x)
    factors = []
    for match_trace in (False, True):
        tx = lp.scale_by_kfac(layers, curvature="empirical", match_trace=match_trace)
        _, state = tx.update(grads, tx.init(params), params, captured=captured)
        factors.append(state.statistics["w"].outputs)
    np.testing.assert_allclose(factors[1], 6 * factors[0], rtol=1e-4)
