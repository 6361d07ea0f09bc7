"""Every kind of layer: its arrays are those of the model, and every method takes it."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import locoprop_jax as lp
from locoprop_jax import _linalg
from locoprop_jax._layers import rows as _rows
from tests.helpers import assert_captured, block_gradient, normal, quick_jit


def spread(v, x):
    return v.reshape((1,) * (x.ndim - v.ndim) + v.shape)


def close(a, b, tolerance=1e-9):
    chex.assert_trees_all_close(a, b, rtol=tolerance, atol=tolerance)


def head(h, y):
    """A loss of all outputs, of an input that no layer after it changes."""
    return 0.5 * jnp.sum((h.reshape(len(h), -1).sum(1) - y) ** 2) / len(h) + jnp.mean(jnp.sin(h))


def check_arrays(loss, params, batch):
    """Outputs are inputs times weights, gradients inputs' times cotangents, at each layer."""
    layers = lp.find_layers(loss, params, *batch)
    (value, grads, captured), expected = quick_jit(
        lambda p, b: (
            lp.value_grad_and_capture(loss)(p, *b),
            jax.value_and_grad(loss)(p, *b),
        )
    )(params, batch)
    close((value, grads), expected)
    for name, layer in layers.items():
        arrays, weights = captured[name], layers.block(params, name)
        x = arrays.inputs.astype(weights.dtype)
        if layer.bias is not None:
            x = jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1))], -1)
        assert x.shape[:-1] == arrays.outputs.shape[:-1] == arrays.cotangents.shape[:-1]
        assert layer.rows == x.shape[-2] and len(batch[0]) == x.shape[-3]
        if layer.kind != "bias":  # whose outputs hold the data it is added to
            close(jnp.einsum("...bsi,...io->...bso", x, weights), arrays.outputs)
        close(block_gradient(arrays, layer.bias is not None), layers.block(grads, name))
        (check_merged_rows if layer.kind == "tied" else check_rows)(arrays, weights)
    return layers


def check_merged_rows(arrays, weights):
    """Rows of the batch together, of the same products as those of its examples."""
    rows, a, e = (of(float) for of in (arrays.rows, arrays.output_rows, arrays.cotangent_rows))
    check_products(rows, _rows.write_out(rows))
    close(rows.second_moment(), jnp.einsum("bsi,bsj->ij", arrays.inputs, arrays.inputs))
    close(rows.pull(e), jnp.einsum("bsi,bso->io", arrays.inputs, arrays.cotangents))
    close(a, rows.push(weights))


def check_rows(arrays, weights):
    """Rows that are not written out have the products of those that are."""
    rows, inputs = arrays.rows(weights.dtype), arrays.inputs
    x = _rows.write_out(rows)
    assert x.shape == rows.shape
    close(x, inputs.reshape(x.shape))
    if not isinstance(rows, jax.Array) and rows.shape[0] == len(rows):  # no stack of them
        check_products(rows, x)


def check_products(rows, x):
    block = {"kernel": normal(0, x.shape[1], 3), "bias": normal(1, 3)}
    e = normal(2, len(x), 3)
    close(_rows.push(rows, block), _rows.push(x, block))
    close(_rows.pull(rows, e, block), _rows.pull(x, e, block))
    close(_rows.between_rows(rows), _rows.between_rows(x))
    for of in (_rows.mean, _rows.mean_square):
        close(rows.count * of(rows), len(x) * of(x))
    close(_linalg.multiply(_rows.second_moment(rows), block["kernel"]), x.T @ x @ block["kernel"])


# --- convolutions --------------------------------------------------------------------------------

LAYOUTS = {1: ("NHC", "HIO"), 2: ("NHWC", "HWIO"), 3: ("NDHWC", "DHWIO")}
CHANNELS_FIRST = {1: ("NCH", "OIH"), 2: ("NCHW", "OIHW"), 3: ("NCDHW", "OIDHW")}


@st.composite
def convolutions(draw):
    rank = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    each = functools.partial(st.lists, min_size=rank, max_size=rank)
    padding = [((1, 2),) * rank, ((0, 0),) * rank]
    data_dilation = tuple(draw(each(st.sampled_from([1, 1, 2]))))
    if max(data_dilation) == 1:  # or JAX wants the padding in numbers
        padding += ["SAME", "VALID"]
    layout = draw(st.sampled_from([LAYOUTS, CHANNELS_FIRST]))[rank]
    return {
        "layout": layout,
        "groups": groups,
        "channels": (groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))),
        "window": tuple(draw(each(st.integers(1, 3)))),
        "strides": tuple(draw(each(st.integers(1, 2)))),
        "padding": draw(st.sampled_from(padding)),
        "dilation": tuple(draw(each(st.integers(1, 2)))),
        "data_dilation": data_dilation,
        "bias": draw(st.booleans()),
    }


def shaped(spec, sizes):
    """An array's shape in a layout like "NHWC", from the sizes of its axes."""
    space = iter(sizes["space"])
    return tuple(sizes[c] if c in sizes else next(space) for c in spec)


@settings(max_examples=6)
@given(convolutions(), st.integers(0, 9))
def test_convolutions_of_any_rank_stride_padding_dilation_and_groups(case, seed):
    (data, kernel), (c_in, c_out) = case["layout"], case["channels"]
    space = (5,) * len(case["window"])
    x = normal(seed, *shaped(data, {"N": 2, "C": c_in, "space": space}))
    sizes = {"I": c_in // case["groups"], "O": c_out, "space": case["window"]}
    params = {"conv": {"kernel": normal(seed + 1, *shaped(kernel, sizes))}}
    if case["bias"]:
        params["conv"]["bias"] = normal(seed + 2, c_out)

    def loss(params, x, y):
        h = jax.lax.conv_general_dilated(
            x,
            params["conv"]["kernel"],
            case["strides"],
            case["padding"],
            case["data_dilation"],
            case["dilation"],
            (data, kernel, data),
            case["groups"],
        )
        if case["bias"]:
            ends = (1,) * (h.ndim - 1 - data.index("C"))
            h = h + spread(params["conv"]["bias"].reshape(-1, *ends), h)
        return head(jnp.tanh(h), y)

    layers = check_arrays(loss, params, (x, normal(seed + 3, 2)))
    layer = layers["conv"]
    assert layer.kind == "conv" and layer.transfer.name == "tanh"
    assert layer.stack == (case["groups"] if case["groups"] > 1 else None)
    assert (layer.bias is not None) == case["bias"]


# --- the other kinds, case by case ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with a layer of some kind in it.

    Attributes:
      model: (params, x) to outputs, examples first.
      shapes: of its parameters.
      x: of a batch of four examples.
      kinds: of the layers that should be found.
    """

    model: object
    shapes: dict
    x: object
    kinds: dict


X = normal(0, 4, 3)
TOKENS = normal(1, 4, 5, 3)
WORDS = jnp.asarray(np.random.default_rng(2).integers(0, 7, (4, 5)))
IMAGES = normal(3, 4, 6, 6, 2)


def standardised(x, axes=-1, statistics=None):
    mean, var = statistics or (x.mean(axes, keepdims=True), x.var(axes, keepdims=True))
    return x - mean, jax.lax.rsqrt(var + 1e-5)


def norm_scale_first(p, x, **options):
    """As Flax and Haiku write it: the parameter meets the deviation's inverse first."""
    centred, inverse = standardised(x, **options)
    return centred * (inverse * spread(p["scale"], x)) + spread(p["bias"], x)


def norm_scale_last(p, x):
    centred, inverse = standardised(x)
    return spread(p["scale"], x) * (centred * inverse) + spread(p["bias"], x)


def rms_norm(p, x):
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-5) * spread(p["scale"], x)


def group_norm(p, x):
    grouped = x.reshape(*x.shape[:-1], 2, -1)
    centred, inverse = standardised(grouped, axes=(1, 2, 4))
    scale = p["scale"].reshape(1, 1, 1, 2, -1)
    return (centred * (inverse * scale)).reshape(x.shape) + spread(p["bias"], x)


def with_class_token(p, x):
    token = jnp.broadcast_to(p["token"][None, None], (len(x), 1, x.shape[-1]))
    return jnp.concatenate([token, jnp.tanh(x)], axis=1)


def masked_token(p, x):
    token = jnp.broadcast_to(p["token"][None, None], x.shape)
    return jnp.where(x > 0, x, token)


def experts(p, x):
    return jnp.einsum("bd,edk->ebk", x, p["w"]).transpose(1, 0, 2)


def experts_apart(p, x):
    """Each expert sees rows of its own, as behind a router."""
    h = jnp.tanh(jnp.stack([x, -x, 2 * x], axis=1))
    return jnp.einsum("bed,edk->bek", h, p["w"]) + p["b"][None]


def kernel_on_the_left(p, x):
    h = jnp.stack([x, -x])
    return jax.vmap(lambda w, h: w @ h.T)(p["w"], h).transpose(2, 0, 1)


def heads(p, x):
    q = jnp.einsum("btd,dhk->bthk", x, p["q"]) + p["b"][None, None]
    return jnp.einsum("bthk,hkd->btd", jnp.tanh(q), p["o"])


def applied_twice(p, x):
    h = jnp.tanh(x @ p["w"] + p["b"][None])
    return jnp.tanh(h @ p["w"] + p["b"][None])


def siamese(p, x):
    """One use sees a token of each example, the other all of them."""
    return jnp.tanh(x @ p["w"]).sum(1) + x[:, 0] @ p["w"]


def positions_by_lookup(p, x):
    return jnp.tanh(x + p["table"][jnp.arange(5)][None])


def tied_embedding(p, words):
    out = jnp.tanh(p["table"][words] @ p["w"]) @ p["table"].T
    return out + spread(p["bias"], out) if "bias" in p else out


def tied_one_hot_embedding(p, words):
    return jnp.tanh(jax.nn.one_hot(words, 7, dtype=float) @ p["table"]) @ p["table"].T


def tied_autoencoder(p, x):
    return jnp.tanh(x @ p["w"] + spread(p["bias"], x)) @ p["w"].T


def queries_and_keys(p, x):
    """One array, split before it is used."""
    (q, k), (a, b) = jnp.split(p["w"], 2, axis=1), jnp.split(p["b"], 2)
    return jnp.tanh(x @ q + a[None, None]) * jnp.tanh(x @ k + b[None, None])


def scanned(p, x):
    """A stack of layers, one after the other."""

    def layer(h, own):
        w, b, scale = own
        return jnp.tanh((h @ w + b[None]) * scale[None]), None

    return jax.lax.scan(layer, x, (p["w"], p["b"], p["scale"]))[0]


def recurrent(p, x):
    def cell(h, x):
        h = jnp.tanh(x @ p["in"] + h @ p["rec"] + p["b"][None])
        return h, h @ p["out"]

    start = jnp.broadcast_to(p["start"][None], (len(x), 4))
    h, outputs = jax.lax.scan(cell, start, x.transpose(1, 0, 2))
    return outputs.transpose(1, 0, 2) + h.sum(1)[:, None, None]


def recurrent_layers(p, x):
    """A loop over positions in a loop over layers, rematerialised."""

    def layer(h, w):
        def cell(state, x):
            state = jnp.tanh(x + state @ w)
            return state, state

        return jax.lax.scan(cell, jnp.zeros_like(h[0]), h)[1], None

    h = jax.lax.scan(jax.checkpoint(layer), x.transpose(1, 0, 2), p["w"])[0]
    return h.transpose(1, 0, 2)


def scanned_convolutions(p, x):
    def layer(h, w):
        h = jax.lax.conv_general_dilated(
            h, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.tanh(h), None

    return jax.lax.scan(layer, x, p["w"])[0]


def scanned_experts(p, x):
    def layer(h, w):
        return jnp.tanh(jnp.einsum("bed,edk->bek", h, w)), None

    return jax.lax.scan(layer, jnp.stack([x, -x], axis=1), p["w"])[0]


def loop_over_a_constant_kernel(p, x):
    return jax.lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ p["w"]), x)


LINEAR = {"w": (3, 3)}
NORM = {"scale": (3,), "bias": (3,)}
CASES = {
    "layer norm, scale first": Case(norm_scale_first, NORM, TOKENS, {"scale": "scale"}),
    "layer norm, scale last": Case(norm_scale_last, NORM, TOKENS, {"scale": "scale"}),
    "rms norm": Case(rms_norm, {"scale": (3,)}, TOKENS, {"scale": "scale"}),
    "group norm": Case(group_norm, {"scale": (2,), "bias": (2,)}, IMAGES, {"scale": "scale"}),
    "batch norm, training": Case(
        functools.partial(norm_scale_first, axes=0), NORM, X, {"scale": "scale"}
    ),
    "batch norm, evaluation": Case(
        functools.partial(
            norm_scale_first, statistics=(normal(4, 1, 3), np.square(normal(5, 1, 3)))
        ),
        NORM,
        X,
        {"scale": "scale"},
    ),
    "temperature": Case(lambda p, x: jnp.tanh(x * p["t"]), {"t": ()}, X, {"t": "scale"}),
    "positions": Case(
        lambda p, x: jnp.tanh(x + p["pos"][None]), {"pos": (5, 3)}, TOKENS, {"pos": "bias"}
    ),
    "tied embedding": Case(
        tied_embedding, {"table": (7, 3), **LINEAR}, WORDS, {"w": "dense", "table": "tied"}
    ),
    "tied embedding, a bias of the outputs": Case(
        tied_embedding,
        {"table": (7, 3), **LINEAR, "bias": (7,)},
        WORDS,
        {"w": "dense", "table": "tied", "bias": "bias"},
    ),
    "tied embedding, one-hot": Case(
        tied_one_hot_embedding, {"table": (7, 3)}, WORDS, {"table": "tied"}
    ),
    "tied autoencoder": Case(
        tied_autoencoder, {"w": (3, 2), "bias": (2,)}, TOKENS, {"w": "tied", "bias": "bias"}
    ),
    "positions of a layer's outputs": Case(
        lambda p, x: jnp.tanh(x @ p["w"] + p["pos"][None]),
        LINEAR | {"pos": (5, 3)},
        TOKENS,
        {"w": "dense", "pos": "bias"},
    ),
    "second bias": Case(
        lambda p, x: jnp.tanh((x @ p["w"] + p["a"][None]) + p["b"][None]),
        LINEAR | {"a": (3,), "b": (3,)},
        X,
        {"w": "dense", "b": "bias"},
    ),
    "shared bias": Case(
        lambda p, x: jnp.tanh(x + p["b"][None]) + p["b"][None], {"b": (3,)}, X, {"b": "bias"}
    ),
    "class token": Case(with_class_token, {"token": (3,)}, TOKENS, {"token": "bias"}),
    "masked token": Case(masked_token, {"token": (3,)}, TOKENS, {"token": "bias"}),
    "embedding": Case(
        lambda p, x: jnp.tanh(p["table"][x]), {"table": (7, 3)}, WORDS, {"table": "embedding"}
    ),
    "embedding, transposed, with a bias": Case(
        lambda p, x: jnp.tanh(p["table"].T[x] + p["b"][None, None]),
        {"table": (3, 7), "b": (3,)},
        WORDS,
        {"table": "embedding", "b": "bias"},
    ),
    "embedding of one word": Case(
        lambda p, x: jax.vmap(lambda i: p["table"][i])(x[:, 0]),
        {"table": (7, 3)},
        WORDS,
        {"table": "embedding"},
    ),
    "one-hot times a table": Case(
        lambda p, x: jax.nn.one_hot(x, 7, dtype=float) @ p["table"],
        {"table": (7, 3)},
        WORDS,
        {"table": "dense"},
    ),
    "experts of the same rows": Case(experts, {"w": (4, 3, 2)}, X, {"w": "dense"}),
    "experts of their own rows": Case(
        experts_apart, {"w": (3, 3, 2), "b": (3, 2)}, X, {"w": "dense"}
    ),
    "experts, kernel on the left": Case(kernel_on_the_left, {"w": (2, 5, 3)}, X, {"w": "dense"}),
    "slices of a stack": Case(
        lambda p, x: jnp.tanh(jnp.tanh(x @ p["w"][0]) @ p["w"][1]),
        {"w": (2, 3, 3)},
        X,
        {"w[0]": "dense", "w[1]": "dense"},
    ),
    "queries and keys in one kernel": Case(
        queries_and_keys,
        {"w": (3, 8), "b": (8,)},
        TOKENS,
        {"w[:, 0:4]": "dense", "w[:, 4:8]": "dense"},
    ),
    "kernel times a number": Case(
        lambda p, x: jnp.tanh(x @ (0.3 * p["w"]).T), LINEAR, X, {"w": "dense"}
    ),
    "heads": Case(
        heads,
        {"q": (3, 2, 4), "b": (2, 4), "o": (2, 4, 3)},
        TOKENS,
        {"q": "dense", "o": "dense"},
    ),
    "applied twice": Case(applied_twice, LINEAR | {"b": (3,)}, X, {"w": "dense"}),
    "applied to different rows": Case(siamese, LINEAR, TOKENS, {"w": "dense"}),
    "scan over layers": Case(
        scanned, {"w": (2, 3, 3), "b": (2, 3), "scale": (2, 3)}, X, {"w": "dense", "scale": "scale"}
    ),
    "recurrence": Case(
        recurrent,
        {"in": (3, 4), "rec": (4, 4), "b": (4,), "start": (4,), "out": (4, 2)},
        TOKENS,
        {"start": "bias", "in": "dense", "rec": "dense", "b": "bias", "out": "dense"},
    ),
    "scan in a scan": Case(recurrent_layers, {"w": (2, 3, 3)}, TOKENS, {"w": "dense"}),
    "scan over convolutions": Case(
        scanned_convolutions, {"w": (2, 3, 3, 2, 2)}, IMAGES, {"w": "conv"}
    ),
    "scan over experts": Case(scanned_experts, {"w": (2, 2, 3, 3)}, X, {"w": "dense"}),
    "loop over a constant kernel": Case(loop_over_a_constant_kernel, LINEAR, X, {"w": "dense"}),
    "convolution with a bias": Case(
        lambda p, x: jnp.tanh(convolved(x, p["w"], (2, 1)) + p["b"][None, None, None]),
        {"w": (3, 2, 2, 3), "b": (3,)},
        IMAGES,
        {"w": "conv"},
    ),
    "depthwise convolution": Case(
        lambda p, x: jnp.tanh(
            jax.lax.conv_general_dilated(
                x,
                p["w"],
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=2,
            )
        ),
        {"w": (3, 3, 1, 4)},
        IMAGES,
        {"w": "conv"},
    ),
}


def build(case):
    rng = np.random.default_rng(7)
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in case.shapes.items()}

    def loss(params, x, y):
        return head(case.model(params, x), y)

    return loss, params, (case.x, normal(8, 4))


@pytest.mark.parametrize("name", CASES)
def test_arrays_of_every_kind(name):
    case = CASES[name]
    layers = check_arrays(*build(case))
    assert {layer: found.kind for layer, found in layers.items()} == case.kinds
    assert not layers.uncaptured


def test_rows_of_a_lookup_of_positions_are_the_positions():
    case = Case(positions_by_lookup, {"table": (6, 3)}, TOKENS, {})
    loss, params, batch = build(case)
    layers = lp.find_layers(loss, params, *batch)
    assert layers["table"].kind == "embedding"
    _, grads, captured = lp.value_grad_and_capture(loss)(params, *batch)
    x, e = captured["table"].inputs, captured["table"].cotangents
    close(jnp.einsum("bsi,bso->io", x.astype(float), e), grads["table"])


def convolved(x, kernel, strides):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, strides, "SAME", dimension_numbers=numbers)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_convolution_mapped_over_kernels_is_a_layer_of_all_of_them(axis):
    """Found by random programs: `vmap` reshapes such kernels in another order of axes."""

    def loss(p, x):
        def own(w, b):
            numbers = ("NHC", "HIO", "NHC")
            h = jax.lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=numbers)
            return jnp.tanh(h + b[None, None])

        return jnp.mean(jax.vmap(own, (axis, 0))(p["w"], p["b"]) ** 2)

    shape = [3, 2, 4]
    shape.insert(axis, 2)
    params = {"w": normal(0, *shape), "b": normal(1, 2, 4)}
    layers, _ = assert_captured(loss, params, normal(2, 3, 5, 2))
    assert not layers.uncaptured


METHODS = {
    "foof": lambda layers: lp.scale_by_foof(layers, inverse_period=2),
    "foof, current batch": lambda layers: lp.scale_by_foof(layers, decay=0.0),
    "lnb": lambda layers: lp.scale_by_lnb(layers),
    "kfac": lambda layers: lp.scale_by_kfac(layers, curvature="empirical"),
    "kfac, exact damping": lambda layers: lp.scale_by_kfac(
        layers, curvature="empirical", exact_damping=True
    ),
    "natural gradient": lambda layers: lp.scale_by_natural_gradient(
        layers, damping=1.0, curvature="empirical"
    ),
    "locoprop_s": lambda layers: optax.chain(lp.locoprop_s(layers, 0.01), optax.scale(-1.0)),
    "locoprop_m": lambda layers: optax.chain(lp.locoprop_m(layers, 0.01), optax.scale(-1.0)),
}


# To a method layers differ only in these forms.
FORMS = [
    "layer norm, scale last",  # a stack of one input each
    "positions",  # a stack without inputs
    "embedding",  # one-hot rows
    "experts of their own rows",  # a stack
    "slices of a stack",  # parts of a parameter
    "applied to different rows",  # rows of several uses
    "tied embedding, a bias of the outputs",  # rows that stand for those of a transposed use
    "recurrence",  # rows of a loop
    "convolution with a bias",  # windows
]


@pytest.mark.parametrize(
    "name",
    [name if name in FORMS else pytest.param(name, marks=pytest.mark.slow) for name in CASES],
)
def test_every_method_takes_every_kind(name):
    """A positive definite matrix times the gradient is a direction of ascent."""
    loss, params, batch = build(CASES[name])
    layers = lp.find_layers(loss, params, *batch)
    methods = {method: make(layers) for method, make in METHODS.items()}
    states = {method: tx.init(params) for method, tx in methods.items()}

    @quick_jit
    def step(params, states):
        _, grads, captured = lp.value_grad_and_capture(loss)(params, *batch)
        return grads, {
            method: tx.update(grads, states[method], params, captured=captured)
            for method, tx in methods.items()
        }

    grads, results = step(params, states)
    for method, (updates, state) in results.items():
        chex.assert_trees_all_equal_shapes_and_dtypes(state, states[method])
        assert jnp.real(optax.tree.vdot(grads, updates)) > 0, method
        chex.assert_trees_all_equal_shapes(updates, grads)
        chex.assert_tree_all_finite(updates)
        assert all(np.any(leaf) for leaf in jax.tree.leaves(updates))


def windows(x, window, strides):
    """What a convolution's kernel meets: (batch, *pixels, channels * window)."""
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated_patches(
        x, window, strides, "SAME", dimension_numbers=numbers
    )


@pytest.mark.parametrize("batch", [4, 24], ids=["by rows", "by columns"])
def test_a_convolution_is_a_dense_layer_of_its_windows(batch):
    """Every method treats both alike, though a convolution's windows are never written out."""
    window, strides = (3, 2), (2, 1)

    def convolution(params, x):
        return convolved(x, params["w"], strides) + params["b"][None, None, None]

    def dense(params, x):
        kernel = params["w"].transpose(2, 0, 1, 3).reshape(-1, params["w"].shape[-1])
        return windows(x, window, strides) @ kernel + params["b"][None, None, None]

    def loss(of, params, x, y):
        return head(jnp.tanh(of(params, x)), y)

    params = {"w": normal(0, *window, 2, 3), "b": normal(1, 3)}
    data = normal(2, batch, 4, 5, 2), normal(3, batch)

    @functools.partial(quick_jit, static_argnums=0)
    def updates(of):
        layers = lp.find_layers(functools.partial(loss, of), params, *data)
        capture = lp.value_grad_and_capture(functools.partial(loss, of))
        _, grads, captured = capture(params, *data)
        return {
            method: tx.update(grads, tx.init(params), params, captured=captured)[0]
            for method, tx in ((name, make(layers)) for name, make in METHODS.items())
        }

    close(updates(convolution), updates(dense), 1e-7)


@pytest.mark.parametrize("name", ["foof", "lnb", "kfac", "locoprop_s", "locoprop_m"])
def test_a_convolution_takes_no_more_memory_than_twice_its_activations(name):
    """Its windows have nine times the size of its inputs."""
    shapes = {"w": (3, 3, 16, 16), "b": (16,)}
    params = {n: jax.ShapeDtypeStruct(shape, jnp.float32) for n, shape in shapes.items()}
    x = jax.ShapeDtypeStruct((64, 32, 32, 16), jnp.float32)

    def loss(params, x):
        h = convolved(x, params["w"], (1, 1)) + params["b"][None, None, None]
        return jnp.mean(jnp.square(jnp.tanh(h)))

    tx = METHODS[name](lp.find_layers(loss, params, x))

    def update(grads, params, captured):
        return tx.update(grads, tx.init(params), params, captured=captured)[0]

    _, grads, captured = jax.eval_shape(lp.value_grad_and_capture(loss), params, x)
    memory = jax.jit(update).lower(grads, params, captured).compile().memory_analysis()
    activations = 3 * 4 * math.prod(x.shape)  # inputs, outputs and cotangents
    assert memory.temp_size_in_bytes < 2 * activations


def test_on_accelerators_products_with_windows_are_convolutions_both_ways(monkeypatch):
    def loss(params, x, y):
        return head(jnp.tanh(convolved(x, params["w"], (2, 1))), y)

    params, data = {"w": normal(0, 3, 2, 2, 3)}, (IMAGES, normal(1, 4))
    _, _, captured = lp.value_grad_and_capture(loss)(params, *data)
    arrays = captured["w"]
    rows, e = arrays.rows(float), arrays.cotangents.reshape(-1, 3)
    expected = rows.pull(e)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    close(rows.pull(e), expected)
    primitives = {eq.primitive.name for eq in jax.make_jaxpr(rows.pull)(e).eqns}
    assert "conv_general_dilated" in primitives and "dot_general" not in primitives
