"""How far a step moves the outputs of neurons: on random networks, for all kinds of layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import locoprop_jax as lp
from locoprop_jax._neurons.length import DAMPING
from tests.dense_nets import DEEP, Net, assert_equal_to_rounding, nets, update_function
from tests.helpers import normal, quick_jit

ETA = 0.03
# Systems solved to the end, with the rows of the batch alone.
EXACT = {"momentum": 0.0, "relative": False}
FOOF = functools.partial(lp.foof, decay=0.0, inverse_period=1, floor=0.0, **EXACT)
LNB = functools.partial(lp.lnb, iterations=40, online=False, floor=1e-12, **EXACT)


def exact(layers, damping, unit):
    return {
        "foof": FOOF(layers, ETA, damping=damping, unit=unit),
        "lnb": LNB(layers, ETA, ridge=damping, unit=unit),
    }


def updates_of(loss, params, batch, methods, **options):
    """By name the updates of the first step, and the gradients."""

    @quick_jit
    def step(params, batch):
        _, grads, captured = lp.value_grad_and_capture(loss, **options)(params, *batch)
        found = {
            name: tx.update(grads, tx.init(params), params, captured=captured)[0]
            for name, tx in methods.items()
        }
        return found, grads

    return step(params, batch)


# --- dense networks ------------------------------------------------------------------------------


@settings(max_examples=2)
@given(
    net=nets(),
    damping=st.floats(0.05, 2),
    unit=st.sampled_from(["neuron", "layer"]),
    seed=st.integers(0, 99),
)
def test_a_step_has_the_length_of_the_learning_rate_in_the_metric(net, damping, unit, seed):
    """With the damping in the metric, of each neuron or on average over those of a layer."""
    params, batch = net.params(seed), net.data(seed)
    found, _ = updates_of(net.loss, params, batch, exact(net.layers(), damping, unit))
    slopes = net.gradients(params, *batch)
    for updates in found.values():
        for name, bias, (x, *_) in zip(
            net.names, net.biases, net.backprop(params, *batch), strict=True
        ):
            u, g = net.block(updates, name), slopes[name]
            kernel = u[:-1] if bias else u
            squared = np.square(x @ u).mean(0) + damping * np.square(kernel).sum(0)
            moves = np.any(g, axis=0).astype(float)
            if unit == "layer":
                squared, moves = squared.mean(), moves.max()
            np.testing.assert_allclose(np.sqrt(squared), ETA * moves, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("unit", ["neuron", "layer"])
def test_undamped_each_neuron_moves_by_the_learning_rate(unit):
    """However few the iterations of LNB, because the length is measured on what they found."""
    net = Net(
        widths=(3, 4, 3, 2), transfers=("tanh", "softplus"), biases=(True, False, True), batch=9
    )
    params, batch = net.params(), net.data()
    methods = exact(net.layers(), 0.0, unit)
    methods["truncated"] = LNB(net.layers(), ETA, ridge=0.0, unit=unit, iterations=1)
    found, _ = updates_of(net.loss, params, batch, methods)
    for updates in found.values():
        for name, (x, *_) in zip(net.names, net.backprop(params, *batch), strict=True):
            moved = np.sqrt(np.square(x @ net.block(updates, name)).mean(0))
            if unit == "layer":
                assert moved.max() > 1.01 * moved.min()
                moved = np.sqrt(np.square(moved).mean())
            np.testing.assert_allclose(moved, ETA, rtol=1e-7)


def trajectory(net, methods, factor, repeats, size, steps=3):
    """The updates of some steps, of the loss times a factor, of batches repeated and inputs scaled.

    The first kernel makes up for the scale of the inputs, and its updates are returned in units of
    theirs.
    """

    def rescaled(tree, by):
        kernel = tree["layer0"]["kernel"]
        return tree | {"layer0": tree["layer0"] | {"kernel": by * kernel}}

    @jax.jit
    def step(params, states, factor, batch):
        loss = lambda p, *batch: factor * net.loss(p, *batch)  # noqa: E731
        _, grads, captured = lp.value_grad_and_capture(loss)(params, *batch)
        return {
            name: tx.update(grads, states[name], params, captured=captured)
            for name, tx in methods.items()
        }

    params = rescaled(net.params(), 1 / size)
    states, found = {name: tx.init(params) for name, tx in methods.items()}, []
    for seed in range(steps):
        x, y = (jnp.concatenate([part] * repeats) for part in net.data(seed))
        results = step(params, states, jnp.asarray(factor), (size * x, y))
        found.append({name: rescaled(updates, size) for name, (updates, _) in results.items()})
        states = {name: state for name, (_, state) in results.items()}
    return found


@settings(max_examples=1)
@given(net=nets().filter(lambda net: not net.decay))
def test_a_step_does_not_depend_on_scales_or_on_the_size_of_the_batch(net):
    """At the defaults: neither on the loss's, nor on the inputs', nor on how often rows come."""
    methods = {"foof": lp.foof(net.layers()), "lnb": lp.lnb(net.layers())}
    expected = trajectory(net, methods, 1.0, 1, 1.0)
    others = [(1e-12, 1, 1.0), (1e12, 1, 1.0), (1.0, 1, 30.0)]
    if net.tokens is None or net.mean_over_tokens:
        others.append((1.0, 3, 1.0))
    for other in others:
        found = trajectory(net, methods, *other)
        assert_equal_to_rounding(jax.tree.leaves(found), jax.tree.leaves(expected), 1e-6)


def test_nor_on_the_scale_of_the_loss_in_float32():
    params, batch = jax.tree.map(lambda x: x.astype(jnp.float32), (DEEP.params(), DEEP.data()))
    layers = lp.find_layers(DEEP.loss, params, *batch)
    methods = {"foof": lp.foof(layers), "lnb": lp.lnb(layers)}

    @quick_jit
    def updates(factor):
        loss = lambda *args: factor * DEEP.loss(*args)  # noqa: E731
        _, grads, captured = lp.value_grad_and_capture(loss)(params, *batch)
        return {
            name: tx.update(grads, tx.init(params), params, captured=captured)[0]
            for name, tx in methods.items()
        }

    for factor in (1e-15, 1e15):
        found, expected = (updates(jnp.float32(value)) for value in (factor, 1.0))
        assert_equal_to_rounding(found, expected, 1e-4)


def test_neurons_without_a_gradient_stand_still():
    net = Net(widths=(3, 4, 2), transfers=("tanh",), biases=(True, True), batch=6)
    params = net.params()
    # Nothing reads the second of the hidden neurons.
    unread = params["layer1"]["kernel"].at[1].set(0.0)
    params = params | {"layer1": params["layer1"] | {"kernel": unread}}
    methods = {
        "foof": lp.foof(net.layers()),
        "foof by layer": lp.foof(net.layers(), unit="layer"),
        "lnb": lp.lnb(net.layers()),
        "undamped": FOOF(net.layers(), damping=0.0),
    }
    found, _ = updates_of(net.loss, params, net.data(), methods)
    for updates in found.values():
        block = net.block(updates, "layer0")
        assert not block[:, 1].any() and np.isfinite(block).all()
        assert np.abs(np.delete(block, 1, 1)).max(0).min() > 0


def test_below_the_floor_a_neuron_moves_less_in_proportion_to_its_gradient():
    """A share of the layer's mean: here of neurons whose z are 4, 1 and 0.01."""
    params = {"kernel": jnp.zeros((3, 3))}
    layers = lp.find_layers(lambda p, x: jnp.sum(x @ p["kernel"]), params, jnp.eye(3))
    grads = {"kernel": jnp.diag(jnp.asarray([2.0, 1.0, 0.1]))}
    for floor, expected in ((1e-4, [1, 1, 1]), (0.03, [1, 1, 0.1 / np.sqrt(0.03 * 5.01 / 3)])):
        tx = lp.scale_by_output_rms(layers, optax.identity(), floor=floor)
        updates = tx.update(grads, tx.init(params))[0]
        np.testing.assert_allclose(updates["kernel"], np.diag(expected), rtol=1e-12)


def test_what_does_not_descend_is_not_followed():
    """Neither a neuron's direction nor a layer's."""
    params = {"kernel": jnp.zeros((2, 2))}
    layers = lp.find_layers(lambda p, x: jnp.sum(x @ p["kernel"]), params, jnp.eye(2))
    grads = {"kernel": jnp.asarray([[3.0, 1.0], [4.0, 0.0]])}
    signs = {"kernel": jnp.asarray([[1.0, -1.0], [1.0, -1.0]])}
    turned = optax.stateless(lambda updates, params: jax.tree.map(jnp.multiply, updates, signs))
    for unit, inner, expected in (
        ("neuron", turned, [[0.6, 0.0], [0.8, 0.0]]),
        ("neuron", optax.scale(-1.0), np.zeros((2, 2))),
        ("layer", optax.scale(-1.0), np.zeros((2, 2))),
        ("layer", optax.set_to_zero(), np.zeros((2, 2))),
    ):
        tx = lp.scale_by_output_rms(layers, inner, unit=unit)
        updates = tx.update(grads, tx.init(params))[0]
        np.testing.assert_allclose(updates["kernel"], expected, atol=1e-15)


# --- every kind of layer -------------------------------------------------------------------------


def convolve(x, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (2, 1), "SAME", dimension_numbers=numbers)


def norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True))


def stack(params, x):
    """Three layers in a loop: the outputs, and what each of them is given."""

    def layer(x, own):
        return jnp.tanh(x @ own["w"] + own["b"][None]), x

    return jax.lax.scan(layer, x, params)


# name -> parameters, data, the outputs of the model, and how far an update moves each neuron
KINDS = {
    "convolution": (
        {"w": normal(0, 3, 2, 2, 4), "b": normal(1, 4)},
        normal(2, 6, 5, 4, 2),
        lambda p, x: convolve(x, p["w"]) + p["b"][None, None, None],
        lambda p, x, u: convolve(x, u["w"]) + u["b"][None, None, None],
    ),
    "scanned stack": (
        {"w": normal(0, 3, 4, 4), "b": normal(1, 3, 4)},
        normal(2, 9, 4),
        lambda p, x: stack(p, x)[0],
        lambda p, x, u: jnp.concatenate(
            [h @ w + b[None] for h, w, b in zip(stack(p, x)[1], u["w"], u["b"], strict=True)], 1
        ),
    ),
    "experts": (
        {"w": normal(0, 3, 4, 2)},
        normal(2, 9, 3, 4),
        lambda p, x: jnp.einsum("bed,edk->bek", x, p["w"]),
        lambda p, x, u: jnp.einsum("bed,edk->bek", x, u["w"]).reshape(len(x), -1),
    ),
    "used twice": (
        {"w": normal(0, 4, 4)},
        normal(2, 9, 4),
        lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"],
        lambda p, x, u: jnp.concatenate([x, jnp.tanh(x @ p["w"])]) @ u["w"],
    ),
    "table used transposed": (
        {"table": normal(0, 6, 4)},
        jnp.arange(12).reshape(4, 3) % 5,
        lambda p, x: jnp.tanh(p["table"][x]) @ p["table"].T,
        # Its neurons are words: logits, and rows as if all were looked up equally often.
        lambda p, x, u: jnp.concatenate(
            [
                jnp.tanh(p["table"][x].reshape(-1, 4)) @ u["table"].T,
                jnp.concatenate([(x.size / 6) ** 0.5 * u["table"].T, jnp.zeros((x.size - 4, 6))]),
            ]
        ),
    ),
    "scale and bias": (
        {"scale": normal(0, 4), "bias": normal(1, 4)},
        normal(2, 9, 4),
        lambda p, x: norm(x) * p["scale"][None] + p["bias"][None],
        lambda p, x, u: norm(x) * u["scale"][None] + u["bias"][None],
    ),
    "scale": (
        {"scale": normal(0, 4)},
        normal(2, 9, 4),
        lambda p, x: norm(x) * p["scale"][None],
        lambda p, x, u: norm(x) * u["scale"][None],
    ),
    "bias": (
        {"bias": normal(0, 4)},
        normal(2, 9, 4),
        lambda p, x: x + p["bias"][None],
        lambda p, x, u: u["bias"][None],
    ),
    "positions": (
        {"positions": normal(0, 5, 4)},
        normal(2, 9, 5, 4),
        lambda p, x: x + p["positions"][None],
        lambda p, x, u: u["positions"].reshape(1, -1),
    ),
    "embedding": (
        {"table": normal(0, 6, 4)},
        jnp.arange(12).reshape(4, 3) % 6,
        lambda p, x: p["table"][x],
        lambda p, x, u: u["table"][x],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_neurons_of_every_kind_move_by_the_learning_rate(kind):
    params, x, outputs, move = KINDS[kind]
    y = normal(7, *jax.eval_shape(outputs, params, x).shape)

    def loss(params, x, y):
        return jnp.mean(jnp.square(jnp.tanh(outputs(params, x)) - y))

    layers = lp.find_layers(loss, params, x, y)
    found, grads = updates_of(loss, params, (x, y), exact(layers, 0.0, "neuron"))
    for updates in found.values():
        moved = move(params, x, updates)
        size = np.sqrt(np.square(moved.reshape(-1, moved.shape[-1])).mean(0))
        np.testing.assert_allclose(size, ETA, rtol=1e-6)
        assert float(jnp.asarray(optax.tree.vdot(grads, updates))) < 0
        if kind in ("scale", "bias", "positions"):  # a neuron of one weight
            (u,), (g,) = jax.tree.leaves(updates), jax.tree.leaves(grads)
            np.testing.assert_array_equal(np.sign(u), -np.sign(g))


def lengths_of_rows(method):
    """After each step, the longest row of words in the batch and of all others.

    A large table whose words are met once, and all ask for the same.
    """
    words, width, batch = 3000, 4, 16
    params = {"table": normal(0, words, width)}

    def loss(params, ids):
        return jnp.mean(params["table"][ids] @ jnp.arange(1.0, 1 + width))

    layers = lp.find_layers(loss, params, jnp.zeros(batch, int))
    assert layers["table"].is_lookup
    tx = method(layers)

    @quick_jit
    def step(state, ids):
        _, grads, captured = lp.value_grad_and_capture(loss)(params, ids)
        updates, state = tx.update(grads, state, params, captured=captured)
        return jnp.linalg.norm(updates["table"], axis=1), state

    order, state = np.random.default_rng(2).permutation(words), tx.init(params)
    for i in range(24):
        ids = order[batch * i : batch * (i + 1)]
        length, state = step(state, jnp.asarray(ids))
        inside = np.isin(np.arange(words), ids)
        yield np.asarray(length)[inside].max(), np.asarray(length)[~inside].max()


@pytest.mark.parametrize("method", [lp.foof, lp.lnb])
def test_a_word_that_was_not_in_the_batch_is_thrown_no_farther_than_damping_allows(method):
    """M of a word is at most (one row + damping), and at least damping: both in units of a row."""
    for inside, outside in lengths_of_rows(method):
        assert outside <= (1 + 1 / DAMPING) * inside


# --- parts of a model ----------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["neuron", "layer"])
def test_a_parameter_in_no_layer_moves_by_the_learning_rate_as_a_whole(unit):
    net = Net()
    params = {"net": net.params(), "gain": jnp.zeros((net.batch, 3)), "unused": jnp.ones(())}

    def loss(params, x, y):
        return net.loss(params["net"], jnp.maximum(x, params["gain"]), y) + 0.0 * params["unused"]

    layers = lp.find_layers(loss, params, *net.data(), on_uncaptured="pass")
    methods = {"foof": lp.foof(layers, ETA, unit=unit), "lnb": lp.lnb(layers, ETA, unit=unit)}
    found, grads = updates_of(loss, params, net.data(), methods)
    direction = -ETA * grads["gain"] / np.linalg.norm(grads["gain"])
    for updates in found.values():
        np.testing.assert_allclose(updates["gain"], direction, rtol=1e-9)
        assert not updates["unused"].any()


@pytest.mark.parametrize("moving", ["kernel", "bias"])
def test_the_part_of_a_layer_that_moves_has_the_length_alone(moving):
    net = Net(widths=(3, 2), biases=(True,), batch=7)
    mask = {"layer0": {part: part == moving for part in ("kernel", "bias")}}
    still = jax.tree.map(lambda moves: not moves, mask)
    methods = {
        name: optax.chain(optax.masked(tx, mask), optax.masked(optax.set_to_zero(), still))
        for name, tx in exact(net.layers(), 0.0, "neuron").items()
    }
    x, _ = net.data()
    for updates in updates_of(net.loss, net.params(), net.data(), methods)[0].values():
        moved = x @ updates["layer0"]["kernel"] + updates["layer0"]["bias"][None]
        np.testing.assert_allclose(np.sqrt(np.square(moved).mean(0)), ETA, rtol=1e-7)
        assert not updates["layer0"]["bias" if moving == "kernel" else "kernel"].any()


def test_layers_apart_move_as_they_do_together():
    net, labels = DEEP, {"layer0": "one", "layer1": "other"}
    whole = {"foof": lp.foof(net.layers(), unit="layer"), "lnb": lp.lnb(net.layers())}
    parts = {n: optax.partition({"one": tx, "other": tx}, labels) for n, tx in whole.items()}
    found = [updates_of(net.loss, net.params(), net.data(), tx)[0] for tx in (whole, parts)]
    assert_equal_to_rounding(*found, 1e-12)


@pytest.mark.parametrize("method", [lp.foof, lp.lnb])
def test_weights_shrink_even_where_a_batch_is_not_finite(method):
    net, rho = DEEP, 0.1
    tx = method(net.layers(), ETA, weight_decay=rho)
    params, (x, y) = net.params(), net.data()
    updates, _ = update_function(net, tx)(params, tx.init(params), x.at[0, 0].set(jnp.nan), y)
    assert_equal_to_rounding(updates, jax.tree.map(lambda p: -ETA * rho * p, params))
