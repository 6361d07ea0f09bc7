"""Which axes count examples, told from one trace of the loss as it is called."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import locoprop_jax as lp
from locoprop_jax._tracing.trace import trace
from tests.helpers import assert_captured, normal

X, Y = normal(0, 6, 4), normal(1, 6, 2)
PARAMS = {
    "scale": normal(2, 4),
    "first": {"kernel": normal(3, 4, 5), "bias": normal(4, 5)},
    "norm": {"scale": normal(5, 5), "bias": normal(6, 5)},
    "last": {"kernel": normal(7, 5, 2), "bias": normal(8, 2)},
}


def network(p, x):
    """Dense layers, a scale of data and a normalisation: what needs rows most."""
    h = jnp.tanh((x * p["scale"][None]) @ p["first"]["kernel"] + p["first"]["bias"][None])
    h = (h - h.mean(1, keepdims=True)) / jnp.sqrt(h.var(1, keepdims=True) + 1e-3)
    h = h * p["norm"]["scale"][None] + p["norm"]["bias"][None]
    return h @ p["last"]["kernel"] + p["last"]["bias"][None]


def squared(p, x, y):
    return jnp.mean((network(p, x) - y) ** 2)


def written_sizes(p, x, y):
    """Shapes of the batch as numbers."""
    ones = jnp.ones((6, 1))
    h = (network(p, x.reshape(6, 2, 2).reshape(6, 4)) + ones).reshape(12)
    return jnp.sum((h.reshape(6, 2) - y) ** 2) / 12


MASK = jnp.array([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
LOSSES = {
    "arguments": (squared, (X, Y)),
    "closed over": (lambda p: squared(p, X, Y), ()),
    "partial": (jax.tree_util.Partial(squared, x=X, y=Y), ()),
    "functools.partial": (functools.partial(squared, y=Y, x=X), ()),
    "labels closed over": (lambda p, x: squared(p, x, Y), (X,)),
    "sizes written as numbers": (written_sizes, (X, Y)),
    "mask closed over": (
        lambda p, x, y: jnp.sum(MASK * ((network(p, x) - y) ** 2).sum(1)) / MASK.sum(),
        (X, Y),
    ),
    "noise closed over": (lambda p, x, y: squared(p, x + 0.1 * X[::-1], y), (X, Y)),
    "picked by places": (
        lambda p, x, y: -jax.nn.log_softmax(network(p, x))[jnp.arange(6), y].mean(),
        (X, jnp.array([0, 1, 1, 0, 1, 0])),
    ),
    "integer labels": (
        lambda p, x, y: optax.softmax_cross_entropy_with_integer_labels(network(p, x), y).mean(),
        (X, jnp.array([0, 1, 1, 0, 1, 0])),
    ),
    "examples under vmap": (
        lambda p, x, y: jax.vmap(lambda x, y: squared(p, x[None], y[None]))(x, y).mean(),
        (X, Y),
    ),
    "a batch of one": (squared, (X[:1], Y[:1])),
    "a batch of one, closed over": (lambda p: squared(p, X[:1], Y[:1]), ()),
    "a key beside": (
        lambda p, x, y, key: squared(p, x + jax.random.normal(key, x.shape), y),
        (X, Y, jax.random.key(0)),
    ),
    "examples last": (
        lambda p, x, y: jnp.mean((network(p, x.T).T - y) ** 2),
        (X.T, Y.T),
    ),
    "two views of each": (
        lambda p, x, y: jnp.mean(
            (network(p, jnp.concatenate([x, -x])).reshape(2, 6, 2).mean(0) - y) ** 2
        ),
        (X, Y),
    ),
}


@pytest.mark.parametrize("case", LOSSES)
def test_the_same_network_is_the_same_layers_however_its_batch_comes(case):
    loss_fn, args = LOSSES[case]
    layers, _ = assert_captured(loss_fn, PARAMS, *args)
    assert not layers.uncaptured
    assert {name: layer.rows for name, layer in layers.items()} == dict.fromkeys(layers, 1)
    assert set(layers) == {"scale", "first", "norm", "last"}


def test_running_statistics_are_no_batch():
    """As many features as examples, and the loss returns new statistics."""

    def loss_fn(p, x, y, mean):
        new = 0.9 * mean + 0.1 * x.mean(0)
        return squared(p, x - jax.lax.stop_gradient(new)[None], y), new

    x, y = normal(0, 4, 4), normal(1, 4, 2)
    layers = lp.find_layers(loss_fn, PARAMS, x, y, jnp.zeros(4), has_aux=True)
    assert {layer.rows for layer in layers.values()} == {1}


def test_batch_normalisation_in_training_mode_leaves_the_first_axis_of_the_arguments():
    def loss_fn(p, x, y):
        x = (x - x.mean(0)[None]) / jnp.sqrt(x.var(0) + 1e-3)[None]
        h = jnp.tanh(x @ p["first"]["kernel"] + p["first"]["bias"][None])
        h = (h - h.mean(0)[None]) * (jax.lax.rsqrt(h.var(0) + 1e-3) * p["norm"]["scale"])[None]
        h = h + p["norm"]["bias"][None]
        return jnp.mean((h @ p["last"]["kernel"] + p["last"]["bias"][None] - y) ** 2)

    params = {name: PARAMS[name] for name in ("first", "norm", "last")}
    layers, _ = assert_captured(loss_fn, params, X, Y)
    assert {layer.rows for layer in layers.values()} == {1}


ONE_LABEL = jnp.array([1])
ONE_LAYER = {
    "optax": lambda z, y: optax.softmax_cross_entropy_with_integer_labels(z, y).mean(),
    "marked": lambda z, y: lp.losses.softmax_cross_entropy_with_integer_labels(z, y).mean(),
    "picked": lambda z, y: -jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], 1).mean(),
    "without a batch": lambda z, y: -jax.nn.log_softmax(z[0])[y[0]],
    "regression": lambda z, y: jnp.mean((z - y.astype(z.dtype)[:, None]) ** 2),
}


@pytest.mark.parametrize("case", ONE_LAYER)
@pytest.mark.parametrize("with_bias", [False, True])
def test_one_layer_and_one_example_are_a_layer(case, with_bias):
    """Labels pick entries of its outputs, which are no rows of a table."""

    def loss_fn(p, x, y):
        z = x @ p["kernel"]
        return ONE_LAYER[case](z + p["bias"][None] if with_bias else z, y)

    params = PARAMS["last"] if with_bias else {"kernel": PARAMS["last"]["kernel"]}
    layers, _ = assert_captured(loss_fn, params, normal(0, 1, 5), ONE_LABEL)
    (layer,) = layers.values()
    assert layer.kind == "dense" and not layers.uncaptured


# --- sequences -----------------------------------------------------------------------------------

CELL = {
    "in": normal(2, 4, 5),
    "state": normal(3, 5, 5),
    "bias": normal(4, 5),
    "out": normal(5, 5, 2),
}


def recurrent(p, x, y):
    """Time first: `x` is (time, batch, features), as many steps as examples or not."""

    def step(h, x):
        h = jnp.tanh(x @ p["in"] + h @ p["state"] + p["bias"][None])
        return h, h @ p["out"]

    _, outputs = jax.lax.scan(step, jnp.zeros((x.shape[1], 5)), x)
    return jnp.mean((outputs - y) ** 2)


@pytest.mark.parametrize("times", [3, 6])
def test_time_major_sequences_have_their_examples_second(times):
    x, y = normal(0, times, 6, 4), normal(1, times, 6, 2)
    layers, _ = assert_captured(recurrent, CELL, x, y)
    assert {layer.rows for layer in layers.values()} == {times}


@pytest.mark.parametrize("tokens", [3, 6])
def test_positions_of_a_sequence_that_see_one_another_are_no_examples(tokens):
    params = {"in": normal(2, 4, 5), "position": normal(3, tokens, 5), "out": normal(4, 5, 2)}

    def loss_fn(p, x, y):
        h = x @ p["in"] + p["position"][None]
        h = h + jax.nn.softmax(h @ h.swapaxes(1, 2), -1) @ h
        return jnp.mean(((h @ p["out"]).reshape(-1, 2) - y.reshape(-1, 2)) ** 2)

    x, y = normal(0, 6, tokens, 4), normal(1, 6, tokens, 2)
    layers, _ = assert_captured(loss_fn, params, x, y)
    assert (layers["in"].rows, layers["out"].rows, layers["position"].rows) == (tokens, tokens, 1)


# --- graphs batched by concatenation -------------------------------------------------------------

SENDERS = jnp.array([0, 1, 2, 2, 4, 5, 6, 7, 8, 3])
RECEIVERS = jnp.array([1, 0, 3, 0, 5, 6, 4, 8, 7, 2])
GRAPH_OF_NODE = jnp.array([0, 0, 0, 0, 1, 1, 1, 2, 2])
GRAPH_OF_EDGE = GRAPH_OF_NODE[RECEIVERS]


def graph_network(p, nodes, edges, glob, y):
    """A block that updates edges, nodes and graphs, each by a layer with scale and bias."""

    def layer(name, h):
        return jnp.tanh(h @ p[name]["kernel"] + p[name]["bias"][None]) * p[name]["scale"][None]

    edges = layer(
        "edge",
        jnp.concatenate([edges, nodes[SENDERS], nodes[RECEIVERS], glob[GRAPH_OF_EDGE]], 1),
    )
    inbox = jax.ops.segment_sum(edges, RECEIVERS, 9)
    nodes = layer("node", jnp.concatenate([nodes, inbox, glob[GRAPH_OF_NODE]], 1))
    of_nodes = jax.ops.segment_sum(nodes, GRAPH_OF_NODE, 3)
    of_edges = jax.ops.segment_sum(edges, GRAPH_OF_EDGE, 3)
    glob = layer("graph", jnp.concatenate([glob, of_nodes, of_edges], 1))
    return jnp.mean((glob @ p["out"] - y) ** 2)


def test_nodes_edges_and_graphs_have_rows_of_their_own():
    sizes = {"edge": 11, "node": 9, "graph": 12}
    params = {
        name: {"kernel": normal(i, d, 5), "bias": normal(9 + i, 5), "scale": normal(19 + i, 5)}
        for i, (name, d) in enumerate(sizes.items())
    } | {"out": normal(7, 5, 2)}
    batch = (normal(0, 9, 2), normal(1, 10, 5), normal(2, 3, 2), normal(3, 3, 2))
    layers, captured = assert_captured(graph_network, params, *batch)
    assert not layers.uncaptured
    rows = {n: captured[f"{n}/kernel"].inputs.size // d for n, d in sizes.items()}
    assert rows == {"edge": 10, "node": 9, "graph": 3}


# --- nothing is kept between calls ---------------------------------------------------------------


def test_a_loss_is_traced_once():
    calls = []

    def loss_fn(p, x, y):
        calls.append(None)
        return squared(p, x, y)

    trace(loss_fn, PARAMS, (X, Y), {}, False)
    assert len(calls) == 1
