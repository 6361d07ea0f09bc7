"""Complex layers, tested against the same layers written with real and imaginary parts.

The oracle knows nothing of complex algebra: a complex block is the real vector of its real and
imaginary parts, its outputs are real rows twice as long, and the metric is J'J / N for the Jacobian
J of these outputs by that vector.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import locoprop_jax as lp

RNG = np.random.default_rng(0)


def real(*shape):
    return RNG.normal(size=shape)


def complex_(*shape):
    return RNG.normal(size=shape) + 1j * RNG.normal(size=shape)


def as_written(loss):
    """The loss with NumPy's promotion of real to complex numbers, and of shapes."""

    @functools.wraps(loss)
    def promoting(*args):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return loss(*args)

    return promoting


def bent(z):
    """Neither linear nor holomorphic."""
    return z / (1 + jnp.abs(z) ** 2)


def squared_distance(z):
    return jnp.mean(jnp.abs(z - 1 - 0.5j) ** 2)


# --- networks ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Net:
    params: dict[str, Any]
    x: Any
    loss: Callable[[Any, Any], Any]


def two_layers(first, second, x):
    @as_written
    def loss(params, x):
        hidden = bent(x @ params["first"]["kernel"] + params["first"]["bias"])
        return squared_distance(hidden @ params["second"]["kernel"])

    first, second = {"kernel": first(3, 4), "bias": first(4)}, {"kernel": second(4, 2)}
    return Net({"first": first, "second": second}, x(7, 3), loss)


def convolution(kind, data):
    @as_written
    def loss(params, x):
        kernel = params["kernel"].astype(complex)
        axes = ("NHWC", "HWIO", "NHWC")
        out = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=axes)
        return squared_distance(out + params["bias"])

    return Net({"kernel": kind(2, 2, 2, 3), "bias": kind(3)}, data(3, 3, 3, 2), loss)


def elementwise(kind, data):
    @as_written
    def loss(params, x):
        return squared_distance(bent(x * params["scale"] + params["shift"]))

    return Net({"scale": kind(3), "shift": kind(3)}, data(5, 3), loss)


def table(kind):
    @as_written
    def loss(params, ids):
        return squared_distance(bent(params["table"][ids]))

    return Net({"table": kind(5, 3)}, jnp.asarray([0, 3, 3, 1]), loss)


def tied(kind):
    """A table that is, transposed, the kernel of the output layer."""

    @as_written
    def loss(params, ids):
        return squared_distance(bent(params["table"][ids]) @ params["table"].T)

    return Net({"table": kind(5, 3)}, jnp.asarray([0, 3, 3, 1]), loss)


NETS = {
    "complex": functools.partial(two_layers, complex_, complex_, complex_),
    "complex on real data": functools.partial(two_layers, complex_, complex_, real),
    "real on complex data": functools.partial(two_layers, real, real, complex_),
    "real, then complex": functools.partial(two_layers, real, complex_, real),
    "complex, then real": functools.partial(two_layers, complex_, real, real),
    "convolution": functools.partial(convolution, complex_, complex_),
    "real convolution": functools.partial(convolution, real, complex_),
    "scale": functools.partial(elementwise, complex_, complex_),
    "real scale": functools.partial(elementwise, real, complex_),
    "table": functools.partial(table, complex_),
    "tied": functools.partial(tied, complex_),
}
each_net = pytest.mark.parametrize("name", NETS)


@dataclasses.dataclass(frozen=True)
class Case:
    net: Net
    layers: Any
    loss: Any
    grads: Any
    captured: Any


@functools.cache
def case(name):
    with jax.numpy_dtype_promotion("strict"):
        net = NETS[name]()
        layers = lp.find_layers(net.loss, net.params, net.x)
        capture = jax.jit(lp.value_grad_and_capture(net.loss))
        return Case(net, layers, *capture(net.params, net.x))


# --- the oracle ----------------------------------------------------------------------------------


def to_vector(block):
    """Real and imaginary parts, one after the other; a real block as it is."""
    flat = np.asarray(block).ravel()
    return np.concatenate([flat.real, flat.imag]) if np.iscomplexobj(flat) else flat


def from_vector(vector, like):
    like = np.asarray(like)
    if np.iscomplexobj(like):
        re, im = vector.reshape(2, *like.shape)
        return re + 1j * im
    return vector.reshape(like.shape)


def gradient_vector(gradient):
    """The derivatives by real and imaginary parts, of JAX's gradient dL/du - i dL/dv."""
    return to_vector(np.conj(gradient))


def real_rows(x, block):
    """J: real and imaginary parts of the outputs of rows (x, 1) by the block's real vector."""
    columns = []
    for unit in np.eye(to_vector(block).size):
        out = x @ from_vector(unit, block)
        columns.append(np.concatenate([out.real.ravel(), np.imag(out).ravel()]))
    return np.stack(columns, 1)


def blocks_of(case):
    """By layer: its block, the gradient by it, its rows with ones for a bias, and N.

    The layers of a stack are apart, as layers of their own.
    """
    found = {}
    for name, layer in case.layers.items():
        arrays = case.captured[name]
        inputs = np.asarray(arrays.inputs)
        block = np.asarray(layer.block(case.net.params))
        gradient = np.asarray(layer.block(case.grads))
        if layer.stack is None:
            inputs, block, gradient = inputs[None], block[None], gradient[None]
        for i in range(len(block)):
            x = inputs[i].reshape(-1, inputs.shape[-1])
            n = len(x)
            if layer.kind == "tied":  # rows that stand for the lookup, which are counted otherwise
                n = 2 * len(case.net.x)
                x = np.asarray(arrays.rows(block.dtype).write_out())
            if layer.bias is not None:
                x = np.concatenate([x, np.ones((len(x), 1))], 1)
            found[name, i] = block[i], gradient[i], x, n, layer
    return found


def metric(block, x, n, amount, layer):
    """J'J / N with damping of the kernel alone."""
    jacobian = real_rows(x, block)
    rows, columns = block.shape
    damped = np.ones((rows, columns))
    if layer.bias is not None:
        damped[-1] = 0
    parts = 2 if np.iscomplexobj(block) else 1
    return jacobian.T @ jacobian / n + amount * np.diag(np.tile(damped.ravel(), parts))


def expected_directions(case, amount):
    return {
        key: from_vector(
            np.linalg.solve(metric(block, x, n, amount, layer), gradient_vector(gradient)), block
        )
        for key, (block, gradient, x, n, layer) in blocks_of(case).items()
    }


def directions(case, updates):
    found = {}
    for name, layer in case.layers.items():
        block = np.asarray(layer.block(updates))
        for i, own in enumerate(block if layer.stack is not None else block[None]):
            found[name, i] = own
    return found


def update(case, tx, grads=None):
    state = tx.init(case.net.params)
    grads = case.grads if grads is None else grads

    @jax.jit
    def run(grads, captured, params):
        return tx.update(grads, state, params, captured=captured)[0]

    updates = run(grads, case.captured, case.net.params)
    assert jax.tree.map(lambda u, p: u.dtype == p.dtype, updates, case.net.params)
    return updates


def assert_close(found, expected, error=1e-9):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=error, atol=error, err_msg=str(key))


# --- capture -------------------------------------------------------------------------------------


@each_net
def test_gradients_are_those_of_jax_and_the_product_of_inputs_and_cotangents(name):
    own = case(name)
    loss, grads = jax.jit(jax.value_and_grad(own.net.loss))(own.net.params, own.net.x)
    np.testing.assert_allclose(own.loss, loss, rtol=1e-14)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), own.grads, grads)
    for key, layer in own.layers.items():
        arrays = own.captured[key]
        x, e = np.asarray(arrays.inputs), np.asarray(arrays.cotangents)
        if layer.bias is not None:
            x = np.concatenate([x, np.ones((*x.shape[:-1], 1))], -1)
        whole = np.einsum("...bsi,...bso->...io", x, e)
        gradient = np.asarray(layer.block(own.grads))
        whole = whole if np.iscomplexobj(gradient) else whole.real  # a real kernel has real ones
        np.testing.assert_allclose(whole, gradient, rtol=1e-9, atol=1e-12)


# --- FOOF ----------------------------------------------------------------------------------------


@each_net
@pytest.mark.parametrize("options", [{"decay": 0.0}, {}, {"inverse_period": 2}], ids=str)
def test_foof_is_that_of_real_and_imaginary_parts(name, options):
    own = case(name)
    updates = update(own, lp.scale_by_foof(own.layers, damping=0.3, relative=False, **options))
    assert_close(directions(own, updates), expected_directions(own, 0.3))


# --- LNB -----------------------------------------------------------------------------------------


@each_net
def test_boosting_solved_to_the_end_is_that_of_real_and_imaginary_parts(name):
    own = case(name)
    tx = lp.scale_by_lnb(
        own.layers, ridge=0.3, relative=False, iterations=40, unit="joint", floor=1e-30
    )
    exact = expected_directions(own, 0.3)
    z = sum(
        to_vector(exact[key]) @ gradient_vector(gradient)
        for key, (_, gradient, *_) in blocks_of(own).items()
    )
    expected = {key: value / z**0.5 for key, value in exact.items()}
    assert_close(directions(own, update(own, tx)), expected, 1e-7)
