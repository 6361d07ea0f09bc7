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


def two_layers(first, second, x, rows=7, d_in=3):
    @as_written
    def loss(params, x):
        hidden = bent(x @ params["first"]["kernel"] + params["first"]["bias"])
        return squared_distance(hidden @ params["second"]["kernel"])

    first, second = {"kernel": first(d_in, 4), "bias": first(4)}, {"kernel": second(4, 2)}
    return Net({"first": first, "second": second}, x(rows, d_in), loss)


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
    "few rows": functools.partial(two_layers, complex_, complex_, complex_, rows=2, d_in=9),
    "convolution": functools.partial(convolution, complex_, complex_),
    "real convolution": functools.partial(convolution, real, complex_),
    "scale": functools.partial(elementwise, complex_, complex_),
    "real scale": functools.partial(elementwise, real, complex_),
    "table": functools.partial(table, complex_),
    "tied": functools.partial(tied, complex_),
}
each_net = pytest.mark.parametrize("name", NETS)
# One of each way in which a real and a complex side meet, and of each kind of rows.
QUICK = {"complex", "real on complex data", "few rows", "real convolution", "real scale", "table"}
some_nets = pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NETS]
)


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
    """By layer: its block, the gradient by it, its rows with ones for a bias, N, and itself.

    The layers of a stack are apart, as layers of their own.
    """
    found = {}
    for name, layer in case.layers.items():
        inputs = np.asarray(case.captured[name].inputs)
        block, gradient = (np.asarray(layer.block(t)) for t in (case.net.params, case.grads))
        if layer.stack is None:
            inputs, block, gradient = inputs[None], block[None], gradient[None]
        for i in range(len(block)):
            x = inputs[i].reshape(-1, inputs.shape[-1])
            n = len(x)
            if layer.kind == "tied":  # mathematics, "Weights used transposed"; Z are one-hot rows
                x, n = inputs[i, :, 0], 2 * len(case.net.x)
                x = np.concatenate([x, (len(x) / block.shape[2]) ** 0.5 * np.eye(x.shape[1])])
            if layer.bias is not None:
                x = np.concatenate([x, np.ones((len(x), 1))], 1)
            found[name, i] = block[i], gradient[i], x, n, layer
    return found


def metric(block, x, n, amount, layer, damps_bias=False):
    """J'J / N with damping, of the kernel alone or of the bias too."""
    jacobian = real_rows(x, block)
    rows, columns = block.shape
    damped = np.ones((rows, columns))
    if layer.bias is not None and not damps_bias:
        damped[-1] = 0
    parts = 2 if np.iscomplexobj(block) else 1
    return jacobian.T @ jacobian / n + amount * np.diag(np.tile(damped.ravel(), parts))


def expected_directions(case, amount, **options):
    found = {}
    for key, (block, gradient, x, n, layer) in blocks_of(case).items():
        matrix = metric(block, x, n, amount, layer, **options)
        found[key] = from_vector(np.linalg.solve(matrix, gradient_vector(gradient)), block)
    return found


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


@some_nets
def test_foof_is_that_of_real_and_imaginary_parts(name):
    own = case(name)
    updates = update(own, lp.scale_by_foof(own.layers, damping=0.3, relative=False, decay=0.0))
    assert_close(directions(own, updates), expected_directions(own, 0.3))


@pytest.mark.parametrize("name", ["complex", "real on complex data", "few rows", "table"])
@pytest.mark.parametrize("options", [{}, {"inverse_period": 2}], ids=["averaged", "amortised"])
def test_averaged_and_amortised_it_is_the_same_for_the_first_batch(name, options):
    own = case(name)
    updates = update(own, lp.scale_by_foof(own.layers, damping=0.3, relative=False, **options))
    assert_close(directions(own, updates), expected_directions(own, 0.3))


@pytest.mark.parametrize("name", ["complex", "real on complex data", "few rows"])
def test_a_damped_bias_is_damped_like_a_kernel(name):
    own = case(name)
    tx = lp.scale_by_foof(own.layers, damping=0.3, relative=False, decay=0.0, damp_bias=True)
    expected = expected_directions(own, 0.3, damps_bias=True)
    assert_close(directions(own, update(own, tx)), expected)


def test_relative_damping_is_in_units_of_the_mean_variance():
    own = case("complex")
    inputs = {name: np.asarray(own.captured[name].inputs)[:, 0] for name in own.layers}
    units = {  # without a bias that of the mean square
        "first": inputs["first"].var(0).mean(),
        "second": np.square(np.abs(inputs["second"])).mean(),
    }
    updates = update(own, lp.scale_by_foof(own.layers, damping=0.3, decay=0.0))
    for name, unit in units.items():
        expected = expected_directions(own, 0.3 * unit)[name, 0]
        np.testing.assert_allclose(own.layers.block(updates, name), expected, rtol=1e-9)


def test_on_accelerators_the_windows_of_a_convolution_have_the_same_products(monkeypatch):
    (arrays,) = case("convolution").captured.values()
    rows, e = arrays.rows(complex), arrays.cotangent_rows(complex)
    x = np.asarray(rows.write_out())
    expected = x.conj().T @ np.asarray(e)
    for backend in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        np.testing.assert_allclose(rows.pull(e), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(rows.between_rows(), x @ x.conj().T, rtol=1e-9, atol=1e-12)


# --- LNB -----------------------------------------------------------------------------------------


@some_nets
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


def conjugate_gradient(matrix, preconditioner, right, iterations):
    x, residual = np.zeros_like(right), right
    direction = preconditioner @ residual
    for _ in range(iterations):
        size = residual @ preconditioner @ residual
        step = size / (direction @ matrix @ direction)
        x, residual = x + step * direction, residual - step * matrix @ direction
        kept = residual @ preconditioner @ residual / size
        direction = preconditioner @ residual + kept * direction
    return x, residual


def as_real(matrix):
    """What a complex matrix does to real and imaginary parts."""
    return np.block([[matrix.real, -matrix.imag], [matrix.imag, matrix.real]])


def test_truncated_boosting_is_that_of_real_and_imaginary_parts():
    """Two iterations for each output, preconditioned, and z by the residual."""
    own, ridge = case("complex"), 0.3
    tx = lp.scale_by_lnb(own.layers, ridge=ridge, relative=False, iterations=2, unit="neuron")
    block, gradient, x, n, layer = blocks_of(own)["first", 0]
    mean = x.mean(0, keepdims=True)
    rough = mean.conj().T @ mean + np.diag(np.square(np.abs(x - mean)).mean(0))
    rough[:-1, :-1] += ridge * np.eye(len(rough) - 1)
    found = np.asarray(own.layers.block(update(own, tx), "first"))
    for j in range(block.shape[1]):
        one, g = block[:, j : j + 1], gradient_vector(gradient[:, j : j + 1])
        matrix = metric(one, x, n, ridge, layer)
        theta, residual = conjugate_gradient(matrix, np.linalg.inv(as_real(rough)), g, 2)
        assert np.linalg.norm(residual) > 1e-3 * np.linalg.norm(g)  # truncated indeed
        expected = from_vector(theta / np.sqrt(theta @ (g - residual)), one)
        np.testing.assert_allclose(found[:, j : j + 1], expected, rtol=1e-9)


# --- the length of a step ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, method", [("complex", lp.foof), ("complex", lp.lnb), ("real on complex data", lp.foof)]
)
def test_undamped_each_neuron_moves_by_the_learning_rate(name, method):
    own = case(name)
    if method is lp.foof:
        options = {"damping": 0.0, "decay": 0.0, "inverse_period": 1}
    else:
        options = {"ridge": 0.0, "iterations": 40}
    updates = update(own, method(own.layers, 0.1, momentum=0.0, **options))
    steps = directions(own, updates)
    for key, (_, _, x, _, _) in blocks_of(own).items():
        moved = np.sqrt(np.square(np.abs(x @ steps[key])).mean(0))
        np.testing.assert_allclose(moved, 0.1, rtol=1e-6)


# --- training ------------------------------------------------------------------------------------


def train(net, tx, steps=40):
    params, state = net.params, tx.init(net.params)

    @jax.jit
    def step(params, state):
        loss, grads, captured = lp.value_grad_and_capture(net.loss)(params, net.x)
        updates, state = tx.update(grads, state, params, captured=captured)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for _ in range(steps):
        params, state, loss = step(params, state)
        losses.append(loss)
    return losses


@pytest.mark.parametrize(
    "name, method",
    [("complex", lp.lnb), ("complex, then real", lp.foof), ("convolution", lp.foof)],
)
def test_the_loop_of_real_networks_lowers_the_loss_of_complex_ones(name, method):
    """Whatever the imaginary parts: gradients as JAX has them, and updates that are added."""
    own = case(name)
    losses = train(own.net, method(own.layers, 0.05))
    assert losses[-1] < 0.6 * losses[0]


def test_a_chain_with_momentum_and_weight_decay_after_a_direction_lowers_it_too():
    own = case("complex")
    tx = optax.chain(
        lp.scale_by_foof(own.layers),
        optax.trace(decay=0.9),
        optax.add_decayed_weights(1e-4),
        optax.scale_by_learning_rate(0.1),
        lp.average_iterates(),
    )
    losses = train(own.net, tx)
    assert losses[-1] < 0.6 * losses[0]


def of_two_parameters():
    """A complex kernel of which two parts overlap, which is no layer, before one that is."""

    @as_written
    def loss(params, x):
        hidden = bent(x @ params["v"][:3]) + bent(x @ params["v"][1:])
        return squared_distance(hidden @ params["out"])

    params = {"v": complex_(4, 4), "out": complex_(4, 2)}
    return Net(params, complex_(7, 3), loss)


def test_parameters_in_no_layer_follow_their_gradient_downwards():
    net = of_two_parameters()
    layers = lp.find_layers(net.loss, net.params, net.x, on_uncaptured="pass")
    assert list(layers) == ["out"]
    methods = [lp.scale_by_foof(layers), lp.scale_by_lnb(layers, unit="joint")]

    @jax.jit
    def updates_of_all(params, x):
        _, grads, captured = lp.value_grad_and_capture(net.loss)(params, x)
        states = [tx.init(params) for tx in methods]
        return grads, [
            tx.update(grads, state, params, captured=captured)[0]
            for tx, state in zip(methods, states, strict=True)
        ]

    grads, found = updates_of_all(net.params, net.x)
    for updates in found:
        ratio = np.asarray(updates["v"]) / np.conj(grads["v"])
        assert np.all(ratio.real > 0)
        np.testing.assert_allclose(ratio, ratio[0, 0].real, rtol=1e-9)


def test_a_fallback_of_optax_descends():
    net = of_two_parameters()
    layers = lp.find_layers(net.loss, net.params, net.x, on_uncaptured="pass")
    only_others = lp.with_fallback(optax.set_to_zero(), layers, optax.sgd(0.05))
    losses = train(net, only_others, 20)
    assert np.all(np.diff(losses) < 0)


def test_micro_batches_are_the_whole_batch():
    own = case("complex on real data")
    net = own.net
    x = jnp.asarray(real(6, 3))
    capture, tx = lp.value_grad_and_capture(net.loss), lp.scale_by_foof(own.layers)

    @jax.jit
    def both(params, x):
        found = capture(params, x), lp.accumulate(capture)(params, x.reshape(3, 2, 3))
        state = tx.init(params)
        return [tx.update(grads, state, params, captured=own)[0] for _, grads, own in found]

    whole, joined = both(net.params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), joined, whole)


@pytest.mark.parametrize("tx", [lp.foof, lp.lnb], ids=["foof", "lnb"])
def test_the_types_of_states_and_parameters_are_stable_in_single_precision(tx):
    net = case("complex").net
    single = jax.tree.map(lambda p: jnp.asarray(p, jnp.complex64), net.params)
    x = jnp.asarray(net.x, jnp.complex64)
    tx = tx(lp.find_layers(net.loss, single, x))

    def step(params, state, x):
        _, grads, captured = lp.value_grad_and_capture(net.loss)(params, x)
        updates, state = tx.update(grads, state, params, captured=captured)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, single)
    found = jax.eval_shape(step, single, state, x)
    assert found == jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), (single, state))


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("is_complex", ["kernel", "bias"])
def test_a_layer_that_is_half_complex_is_refused(is_complex):
    net = two_layers(real, real, complex_)
    net.params["first"][is_complex] = 1j * net.params["first"][is_complex]
    layers = lp.find_layers(net.loss, net.params, net.x)
    with pytest.raises(ValueError, match=r"'first' has one real parameter.*Store both as complex"):
        lp.foof(layers).init(net.params)
