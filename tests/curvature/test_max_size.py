"""Factors larger than a limit are their diagonals: in the step, in the state, with and without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import locoprop_jax as lp
from tests.curvature.test_kfac import divided
from tests.helpers import normal

WIDE, NARROW = 7, 3
PARAMS = {
    "first": {"kernel": normal(0, WIDE, NARROW), "bias": normal(1, NARROW)},
    "last": {"kernel": normal(2, NARROW, WIDE), "bias": normal(3, WIDE)},
}
X, Y = normal(4, 10, WIDE) + 0.5, normal(5, 10, WIDE)


def loss_fn(p, x, y):
    h = jnp.tanh(x @ p["first"]["kernel"] + p["first"]["bias"][None])
    z = h @ p["last"]["kernel"] + p["last"]["bias"][None]
    return lp.losses.squared_error(z, y).sum(-1).mean()


@pytest.fixture(scope="module")
def batch():
    """The layers, the gradients as blocks, what was captured, and each layer's dense factors."""
    layers = lp.find_layers(loss_fn, PARAMS, X, Y)
    capture = lp.value_grad_and_capture(loss_fn, curvature="ggn_exact")
    _, grads, captured = jax.jit(capture)(PARAMS, X, Y)
    factors = {}
    for name, own in captured.items():
        x = np.asarray(own.inputs).reshape(-1, own.inputs.shape[-1])
        c = np.asarray(own.curvature).reshape(-1, own.curvature.shape[-1])
        x = np.concatenate([x, np.ones((len(x), 1))], 1)
        factors[name] = x.T @ x / len(x), c.T @ c, np.asarray(layers.block(grads, name))
    return layers, grads, captured, factors


def limited(matrix, size):
    return matrix if len(matrix) <= size else np.diag(np.diag(matrix))


@pytest.mark.parametrize("size", [NARROW + 1, WIDE])
@pytest.mark.parametrize("exact", [False, True])
def test_kfac_divides_by_the_diagonals_of_large_factors(batch, exact, size):
    layers, grads, captured, factors = batch
    tx = lp.scale_by_kfac(layers, damping=0.3, exact_damping=exact, max_size=size)
    updates, state = jax.jit(lambda g, s, c: tx.update(g, s, captured=c))(
        grads, tx.init(PARAMS), captured
    )
    for name, (s, gamma, g) in factors.items():
        kept = limited(s, size), limited(gamma, size), g
        np.testing.assert_allclose(
            layers.block(updates, name), divided(kept, 0.3, exact_damping=exact), rtol=1e-8
        )
        for factor, own in zip(kept, state.statistics[name], strict=False):
            assert own.size == (len(factor) if len(factor) > size else factor.size)


@pytest.mark.parametrize("options", [{"inverse_period": 20}, {"decay": 0.95}])
def test_foof_divides_by_the_variances_of_many_inputs(batch, options):
    layers, grads, captured, factors = batch
    tx = lp.scale_by_foof(layers, damping=0.5, relative=False, max_size=NARROW, **options)
    updates, state = jax.jit(lambda g, s, c: tx.update(g, s, captured=c))(
        grads, tx.init(PARAMS), captured
    )
    s, _, g = factors["first"]
    mean, variances = s[-1, :-1], np.diag(s)[:-1] - s[-1, :-1] ** 2
    kernel = (g[:-1] - mean[:, None] * g[-1]) / (variances + 0.5)[:, None]
    expected = np.concatenate([kernel, (g[-1] - mean @ kernel)[None]])
    np.testing.assert_allclose(layers.block(updates, "first"), expected, rtol=1e-8)
    assert state.statistics["first"].second.shape == (WIDE,)
    assert state.statistics["last"].second.shape == (NARROW, NARROW)


def test_the_state_of_a_language_model_has_no_matrix_of_its_vocabulary():
    """Only shapes are looked at: the matrix would take 10 GB."""
    vocabulary, width = 50_257, 16
    params = {"table": (vocabulary, width), "head": (width, vocabulary)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in params.items()}
    tokens = jax.ShapeDtypeStruct((2, 4), jnp.int32)

    def of_tokens(p, x):
        logits = p["table"][x] @ p["head"]
        return lp.losses.softmax_cross_entropy_with_integer_labels(logits, x).mean()

    layers = lp.find_layers(of_tokens, params, tokens)
    for make in (lp.kfac, lp.foof):
        state = jax.eval_shape(make(layers).init, params)
        size = sum(leaf.size for leaf in jax.tree.leaves(state))
        assert size < 4 * sum(leaf.size for leaf in params.values())


@pytest.mark.parametrize("size", [0, -1, 2.5, True])
def test_a_limit_is_a_positive_whole_number(batch, size):
    for make in (lp.scale_by_foof, lp.scale_by_kfac, lp.foof, lp.kfac):
        with pytest.raises(ValueError, match="`max_size` must be a positive whole number"):
            make(batch[0], max_size=size)
