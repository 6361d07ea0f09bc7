"""Blocks of the Hessian by recursion against `jax.hessian` (oracle 8)."""

import dataclasses
import functools

import chex
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import locoprop_jax as lp
from locoprop_jax._curvature.hessian import hessian_blocks
from tests.dense_nets import DEEP, HEADS, Net

SMOOTH = ("identity", "sigmoid", "softplus", "tanh", "home-made")
PIECEWISE_LINEAR = ("identity", "relu", "leaky_relu")


@st.composite
def small_nets(draw, transfers):
    depth = draw(st.integers(1, 3))
    return Net(
        widths=tuple(draw(st.lists(st.integers(1, 4), min_size=depth + 1, max_size=depth + 1))),
        transfers=tuple(draw(st.sampled_from(transfers)) for _ in range(depth - 1)),
        biases=tuple(draw(st.booleans()) for _ in range(depth)),
        head=draw(st.sampled_from(sorted(HEADS))),
        batch=draw(st.integers(1, 4)),
        tokens=draw(st.none() | st.integers(1, 2)),
        mean_over_tokens=draw(st.booleans()),
        out_in=draw(st.booleans()),
    )


def found_blocks(loss, layers, params, batch, **options):
    def blocks(params, *batch):
        captured = lp.value_grad_and_capture(loss)(params, *batch)[2]
        return hessian_blocks(layers, params, captured, **options)

    return jax.jit(blocks)(params, *batch)


def whole_hessian(net, params, batch):
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    return jax.jit(jax.hessian(lambda v: net.loss(unravel(v), *batch)))(flat)


def as_blocks(net, params, matrix):
    """The diagonal blocks of a matrix over all parameters, by W's entries, the bias last."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    places = unravel(jnp.arange(flat.size).astype(flat.dtype))
    result = {}
    for name in net.names:
        at = net.block(places, name).astype(int)
        result[name] = np.asarray(matrix)[np.ix_(at.ravel(), at.ravel())].reshape(at.shape * 2)
    return result


def assert_close(actual, desired, error=1e-8):
    chex.assert_trees_all_close(dict(actual), dict(desired), rtol=error, atol=error)


@settings(max_examples=6)
@given(net=small_nets(SMOOTH), seed=st.integers(0, 99))
def test_the_blocks_are_those_of_the_hessian(net, seed):
    params, batch = net.params(seed), net.data(seed)
    found = found_blocks(net.loss, net.layers(), params, batch)
    assert_close(found, as_blocks(net, params, whole_hessian(net, params, batch)))


@settings(max_examples=4)
@given(net=small_nets(SMOOTH), seed=st.integers(0, 99))
def test_without_second_derivatives_the_blocks_are_those_of_the_gauss_newton_matrix(net, seed):
    params, batch = net.params(seed), net.data(seed)
    flat, unravel = jax.flatten_util.ravel_pytree(params)

    @jax.jit
    def gauss_newton(flat):
        outputs = net.outputs(params, batch[0])
        jacobian = jax.jacobian(lambda v: net.outputs(unravel(v), batch[0]).ravel())(flat)

        def loss(a):
            losses = HEADS[net.head][0](a.reshape(outputs.shape), batch[1])
            if net.tokens is not None and not net.mean_over_tokens:
                losses = losses.sum(-1)
            return losses.mean()

        return jacobian.T @ jax.hessian(loss)(outputs.ravel()) @ jacobian

    found = found_blocks(net.loss, net.layers(), params, batch, gauss_newton=True)
    assert_close(found, as_blocks(net, params, gauss_newton(flat)))


@settings(max_examples=4)
@given(net=small_nets(PIECEWISE_LINEAR), seed=st.integers(0, 99))
def test_piecewise_linear_networks_have_no_maxima(net, seed):
    """Practical GN, appendix E: each block is positive semi-definite, so the trace is too."""
    params, batch = net.params(seed), net.data(seed)
    found = found_blocks(net.loss, net.layers(), params, batch)
    assert_close(found, found_blocks(net.loss, net.layers(), params, batch, gauss_newton=True))
    for block in found.values():
        size = block.shape[0] * block.shape[1]
        assert np.linalg.eigvalsh(block.reshape(size, size)).min() > -1e-8
    whole = whole_hessian(net, params, batch)
    assert_close(found, as_blocks(net, params, whole))
    assert np.trace(whole) >= -1e-8


def test_a_loss_that_is_not_convex_is_taken_as_it_is():
    """No positive part, and an indefinite Hessian at the output layer."""
    net = DEEP
    params, (x, _) = net.params(), net.data()

    def loss(params, x):
        return jnp.sum(jnp.cos(net.outputs(params, x)).prod(-1) * jnp.arange(1.0, 6.0))

    layers = lp.find_layers(loss, params, x)
    found = found_blocks(loss, layers, params, (x,))
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    whole = jax.jit(jax.hessian(lambda v: loss(unravel(v), x)))(flat)
    assert_close(found, as_blocks(net, params, whole))
    values = np.linalg.eigvalsh(np.asarray(found["layer1"]).reshape(10, 10))
    assert values[0] < -1e-3 < 1e-3 < values[-1]


def test_positions_may_be_joined_with_the_examples_before_the_loss():
    net = dataclasses.replace(DEEP, tokens=3)
    params, batch = net.params(), net.data()

    def loss(params, x, y, *, is_joined):
        a, y = net.outputs(params, x), jax.nn.softmax(y)
        join = (lambda z: z.reshape(-1, z.shape[-1])) if is_joined else lambda z: z
        return optax.softmax_cross_entropy(join(a), join(y)).mean()

    apart, joined = (functools.partial(loss, is_joined=is_joined) for is_joined in (False, True))
    layers = lp.find_layers(joined, params, *batch)
    found = found_blocks(joined, layers, params, batch)
    assert_close(found, found_blocks(apart, layers, params, batch))


def test_weight_decay_is_not_in_the_blocks():
    net = dataclasses.replace(DEEP, decay=0.3)
    params, batch = net.params(), net.data()
    found = found_blocks(net.loss, net.layers(), params, batch)
    assert_close(found, found_blocks(DEEP.loss, DEEP.layers(), params, batch))


# --- errors --------------------------------------------------------------------------------------


def pooled(net):
    def loss(params, x, y):
        outputs = net.outputs(params, x).mean(1)
        return optax.softmax_cross_entropy(outputs, jax.nn.softmax(y[:, 0])).mean()

    return loss


def contrastive(net):
    def loss(params, x, y):
        z = net.outputs(params, x)
        return optax.softmax_cross_entropy(z @ z.T, jnp.eye(len(z))).sum()

    return loss


def normalised(net):
    def loss(params, x, y):
        z = net.outputs(params, x)
        return optax.l2_loss(z - z.mean(0, keepdims=True), y).sum()

    return loss


@pytest.mark.parametrize("build, tokens", [(pooled, 3), (contrastive, None), (normalised, None)])
def test_rows_that_meet_in_the_loss_are_an_error(build, tokens):
    net = dataclasses.replace(DEEP, tokens=tokens)
    params, batch, loss = net.params(), net.data(), build(net)
    layers = lp.find_layers(loss, params, *batch)
    with pytest.raises(ValueError, match=r"rows of layer1, .* do not meet .*`jax.hessian`"):
        found_blocks(loss, layers, params, batch)


def test_what_is_no_chain_or_not_captured_is_an_error():
    net = DEEP
    params, batch = net.params(), net.data()

    def loss(params, x, y):
        h = jnp.tanh(x @ params["layer0"]["kernel"]) + 1 / (1 + x[:, :1] ** 2)
        return optax.l2_loss(h @ params["layer1"]["kernel"], y).mean()

    kernels = {name: {"kernel": params[name]["kernel"]} for name in net.names}
    layers = lp.find_layers(loss, kernels, *batch)
    captured = lp.value_grad_and_capture(loss)(kernels, *batch)[2]
    with pytest.raises(ValueError, match="what feeds layer1 is not the outputs of layer0 alone"):
        hessian_blocks(layers, kernels, captured)
    with pytest.raises(TypeError, match="`hessian_blocks` needs the activations"):
        hessian_blocks(net.layers(), params, None)
    with pytest.raises(ValueError, match="does not belong to the layers that `hessian_blocks`"):
        hessian_blocks(net.layers(), params, captured)
    captured = lp.value_grad_and_capture(net.loss)(params, *batch)[2]
    masked = params | {"layer1": {"kernel": optax.MaskedNode()}}
    with pytest.raises(ValueError, match="that of layer1 is masked"):
        hessian_blocks(net.layers(), masked, captured)
