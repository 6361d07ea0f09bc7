"""Several micro-batches are captured as the batch that they make."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import locoprop_jax as lp
from tests.helpers import normal, quick_jit

PARTS, EXAMPLES = 3, 2


PARAMS = {
    "table": normal(0, 7, 2),
    "conv": {"kernel": normal(1, 3, 2, 3), "bias": normal(2, 3)},
    "shared": {"kernel": normal(3, 3, 3)},
    "out": {"kernel": normal(4, 3, 2), "bias": normal(5, 2)},
}


def outputs(params, ids):
    h = params["table"][ids]
    h = jax.lax.conv_general_dilated(
        h, params["conv"]["kernel"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
    )
    h = jnp.tanh(h + params["conv"]["bias"][None, None])
    for _ in range(2):
        h = jnp.tanh(h @ params["shared"]["kernel"])
    return h.mean(1) @ params["out"]["kernel"] + params["out"]["bias"][None]


def loss_fn(params, ids, labels):
    a = outputs(params, ids)
    return lp.losses.softmax_cross_entropy_with_integer_labels(a, labels).mean(), a


def batch():
    rng = np.random.default_rng(8)
    ids = rng.integers(0, 7, (PARTS * EXAMPLES, 4))
    return jnp.asarray(ids), jnp.asarray(rng.integers(0, 2, PARTS * EXAMPLES))


def in_parts(tree):
    return jax.tree.map(lambda x: x.reshape(PARTS, -1, *x.shape[1:]), tree)


@functools.partial(quick_jit, static_argnums=(0, 1))
def both(options, read):
    """What is read of the captured arrays of the batch as a whole and in parts."""
    capture = lp.value_grad_and_capture(loss_fn, has_aux=True, **dict(options))
    whole = capture(PARAMS, *batch())
    parts = lp.accumulate(capture)(PARAMS, *in_parts(batch()))
    return read(*whole), read(*parts)


def assert_close(pair):
    chex.assert_trees_all_close(*pair, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("curvature", [None, "fisher_empirical", "ggn_exact", "ggn_output"])
def test_all_arrays_are_those_of_the_whole_batch(curvature):
    def read(value, grads, captured):
        (loss, logits), arrays = value, {}
        for name, own in captured.items():
            arrays[name] = [own.inputs, own.outputs, own.cotangents, own.transferred_cotangents]
            if own.head is not None:
                arrays[name] += [own.head.loss(own.outputs), own.head.gradient(own.outputs)]
            if curvature not in (None, "ggn_output"):
                arrays[name] += [own.curvature, own.transferred_curvature]
        hessian = captured["out"].output_hessian
        return loss, logits.reshape(PARTS * EXAMPLES, -1), grads, arrays, hessian, captured.terms

    options = {"curvature": curvature, "transferred": True}
    assert_close(both(tuple(options.items()), read))


METHODS = {
    "foof": lambda layers: lp.foof(layers, 1e-2),
    "lnb": lambda layers: lp.lnb(layers, 1e-2),
    "kfac": lambda layers: lp.scale_by_kfac(layers),
    "natural gradient": lambda layers: lp.scale_by_natural_gradient(layers, damping=1.0),
    "locoprop_m": lambda layers: lp.locoprop_m(layers),
    "pocoprop_s": lambda layers: lp.pocoprop_s(layers),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_that_of_the_whole_batch(name):
    layers = lp.find_layers(loss_fn, PARAMS, *batch(), has_aux=True)
    tx = METHODS[name](layers)

    def read(value, grads, captured):
        del value
        return tx.update(grads, tx.init(PARAMS), PARAMS, captured=captured)[0]

    assert_close(both((("curvature", "ggn_exact"), ("transferred", True)), read))


def test_arguments_without_a_common_first_axis_are_refused():
    capture = lp.accumulate(lp.value_grad_and_capture(loss_fn, has_aux=True))
    ids, labels = batch()
    with pytest.raises(ValueError, match=r"first axis, got the first axes \[\(3,\), \(6,\)\]"):
        capture(PARAMS, in_parts(ids), labels)
