"""What `find_layers` says of a model: layers, and the parameters in none with the reason."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import locoprop_jax as lp
from locoprop_jax._tracing import reasons
from locoprop_jax._tracing.reasons import NO_GRADIENT, Reason
from tests.helpers import FRONT_ENDS, Network, block_gradient, networks, normal, quick_jit

# --- a network whose middle is replaced, case by case --------------------------------------------


X, Y = normal(0, 5, 3), normal(1, 5, 2)


def dense(params, x):
    bias = params["bias"].reshape((1,) * (x.ndim - 1) + (-1,))
    return x @ params["kernel"] + bias


def outer_layers():
    return {
        "first": {"kernel": normal(2, 3, 4), "bias": normal(3, 4)},
        "last": {"kernel": normal(4, 4, 2), "bias": normal(5, 2)},
    }


def with_middle(middle):
    """first -> tanh -> middle(params, h) -> tanh -> last; the middle's parameters are its own."""

    def loss(params, x, y):
        h = jnp.tanh(dense(params["first"], x))
        outputs = dense(params["last"], jnp.tanh(middle(params["middle"], h)))
        return optax.l2_loss(outputs, y).sum(-1).mean()

    return loss


@jax.custom_vjp
def with_own_derivative(w, h):
    return h @ w


with_own_derivative.defvjp(
    lambda w, h: (h @ w, (w, h)), lambda saved, g: (2 * saved[1].T @ g, g @ saved[0].T)
)


SQUARE = {"w": (4, 4)}


def started(p, h):
    """A loop from a state that all examples share, which is no layer's weights."""
    state, _ = jax.lax.scan(lambda s, x: (jnp.tanh(s + x.sum()), None), p["s"], h)
    return h + state[None]


def over(p, h):
    """The parameter is what a kernel of data moves over."""
    numbers = ("NCH", "OIH", "NCH")
    kernel = h.reshape(1, 1, -1)[:, :, :3]
    return h + jax.lax.conv_general_dilated(
        p["w"][None, None], kernel, (1,), "SAME", dimension_numbers=numbers
    ).reshape(1, 4)


def looked_up(table):
    return lambda p, h: h + table(p["w"], jnp.argmax(h, 1))


def in_groups(p, h):
    """A convolution whose batch is in groups: the transpose of one with features in groups."""
    kernel = p["w"][:, None, None, :]  # (features, 1, 1, pixels)
    h = jax.lax.conv_general_dilated(
        jnp.concatenate([h[:, None], h[:, None]]),
        jnp.broadcast_to(kernel[:, 0], (4, 1, 4)),
        (1,),
        "VALID",
        dimension_numbers=("NCH", "OIH", "NCH"),
        batch_group_count=2,
    )
    return h[:, :, 0]


# name: (the middle, its parameters' shapes, reasons by parameter, a word of the remedy)
NOT_UNDERSTOOD = {
    "slices that overlap": (
        lambda p, h: jnp.tanh(h @ p["w"][:4]) @ p["w"][1:],
        {"w": (5, 4)},
        {"w": r"it is used 2 times \(dense, dense\)"},
        "a parameter of its own at each",
    ),
    "custom_vjp": (
        lambda p, h: with_own_derivative(p["w"], h),
        SQUARE,
        {"w": r"function with its own derivative \(`custom_vjp_call`\)"},
        "outside of that function",
    ),
    "start of a loop": (
        started,
        {"s": (4,)},
        {"s": "a loop starts from it"},
        "Broadcast it over the examples",
    ),
    "moved over": (over, {"w": (4,)}, {"w": "moves a kernel of data over"}, "second operand"),
    "batch in groups": (
        in_groups,
        {"w": (4, 4)},
        {"w": "takes its batch in groups"},
        "feature_group_count",
    ),
    "several rows of a table": (
        looked_up(
            lambda w, ids: jax.vmap(lambda i: jax.lax.dynamic_slice(w, (i, 0), (2, 4)))(ids).sum(1)
        ),
        {"w": (6, 4)},
        {"w": "more or less than rows of a table"},
        "Take whole rows",
    ),
    "parts of rows": (
        looked_up(
            lambda w, ids: jax.vmap(lambda i: jax.lax.dynamic_slice(w, (i, 0), (1, 4)))(ids)[:, 0]
        ),
        {"w": (6, 8)},
        {"w": "parts of the rows of a table"},
        "then their parts",
    ),
}


@pytest.mark.parametrize("case", NOT_UNDERSTOOD)
def test_a_parameter_that_is_not_understood_is_named_and_passed_over_on_request(case):
    middle, shapes, reasons, remedy = NOT_UNDERSTOOD[case]
    loss = with_middle(middle)
    own = {name: normal(6 + i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    params = outer_layers() | {"middle": own}
    for name, reason in reasons.items():
        match = rf"middle/{name} \[.*\]: .*({reason}).*{remedy}"
        with pytest.raises(ValueError, match=match):
            lp.find_layers(loss, params, X, Y)

    layers = lp.find_layers(loss, params, X, Y, on_uncaptured="pass")
    assert list(layers) == ["first", "last"]
    assert {u.path for u in layers.uncaptured} == {f"middle/{name}" for name in reasons}
    assert all(u.has_gradient for u in layers.uncaptured)

    @quick_jit
    def everything(params):
        loss_and_grads = lp.value_grad_and_capture(loss)(params, X, Y)
        return loss_and_grads, jax.value_and_grad(loss)(params, X, Y)

    (value, grads, captured), expected = everything(params)
    chex.assert_trees_all_close((value, grads), expected, rtol=1e-12)
    for name in layers:
        found = block_gradient(captured[name], True)
        np.testing.assert_allclose(found, layers.block(grads, name), rtol=1e-10, atol=1e-12)


def test_every_reason_has_a_remedy():
    for reason in vars(reasons).values():
        if isinstance(reason, Reason) and reason is not NO_GRADIENT:
            assert reason.remedy.endswith(".") and not reason.endswith(".")


def test_learned_positions_are_a_layer_of_their_own():
    def loss(params, x, y):
        h = x @ params["first"]["kernel"] + params["positions"][None]
        return optax.l2_loss(dense(params["last"], jnp.tanh(h)), y).sum(-1).mean()

    params = outer_layers()
    del params["first"]["bias"]
    params |= {"positions": normal(6, 7, 4)}
    x, y = normal(7, 5, 7, 3), normal(8, 5, 7, 2)
    layers = lp.find_layers(loss, params, x, y)
    assert {name: (layer.kind, layer.bias is not None) for name, layer in layers.items()} == {
        "first": ("dense", False),
        "positions": ("bias", True),
        "last": ("dense", True),
    }


# --- parameters beside the layers ----------------------------------------------------------------


def identity_middle(_, h):
    return h


def l2_of_all(p):
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(p))


REGULARIZERS = {
    "squares": l2_of_all,
    "norm": optax.tree.norm,
    "absolute values": lambda p: sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(p)),
    "distance from the start": lambda p: l2_of_all(
        jax.tree.map(lambda a, b: a - b, p, outer_layers())
    ),
    "orthogonality": lambda p: jnp.sum(
        (p["first"]["kernel"].T @ p["first"]["kernel"] - jnp.eye(4)) ** 2
    ),
    "product of kernels": lambda p: jnp.sum((p["first"]["kernel"] @ p["last"]["kernel"]) ** 2),
}


@pytest.mark.parametrize("name", REGULARIZERS)
@pytest.mark.parametrize("first", [True, False])
def test_a_regularizer_is_no_use_of_a_layer(name, first):
    def loss(params, x, y):
        outputs = dense(params["last"], jnp.tanh(dense(params["first"], x)))
        data, penalty = optax.l2_loss(outputs, y).sum(-1).mean(), 0.1 * REGULARIZERS[name](params)
        return penalty + data if first else data + penalty

    layers = lp.find_layers(loss, outer_layers(), X, Y)
    assert list(layers) == ["first", "last"] and not layers.uncaptured


def test_gradients_less_what_never_touches_data_are_x_times_e():
    def loss(params, x, y):
        outputs = dense(params["last"], jnp.tanh(dense(params["first"], x)))
        return optax.l2_loss(outputs, y).sum(-1).mean() + 0.1 * REGULARIZERS["norm"](params)

    params = outer_layers()
    layers = lp.find_layers(loss, params, X, Y)
    _, grads, captured = quick_jit(lp.value_grad_and_capture(loss))(params, X, Y)
    never_touches_data = jax.grad(lambda p: 0.1 * REGULARIZERS["norm"](p))(params)
    for name in layers:
        expected = layers.block(grads, name) - layers.block(never_touches_data, name)
        np.testing.assert_allclose(block_gradient(captured[name], True), expected, rtol=1e-10)


@pytest.mark.parametrize(
    "use, reason, has_gradient",
    [
        (lambda w: 0.0, "the loss does not depend on it", False),
        (lambda w: jax.lax.stop_gradient(w).sum(), "the loss does not depend on it", False),
        (lambda w: (w > 0).astype(float).sum(), "the loss does not depend on it", False),
        (lambda w: jnp.sum(w**2), "it never meets the data: only a regularizer uses it", True),
    ],
    ids=["unused", "stop_gradient", "comparison", "regularizer"],
)
def test_a_parameter_that_never_meets_the_data_is_listed_with_the_reason(use, reason, has_gradient):
    def loss(params, x, y):
        return with_middle(identity_middle)(params, x, y) + use(params["middle"])

    params = outer_layers() | {"middle": normal(6, 4)}
    if has_gradient:
        with pytest.raises(ValueError, match=rf"middle \[4\]: {reason}"):
            lp.find_layers(loss, params, X, Y)
    layers = lp.find_layers(loss, params, X, Y, on_uncaptured="pass" if has_gradient else "error")
    assert list(layers) == ["first", "last"]
    (other,) = layers.uncaptured
    assert (other.path, other.shape, other.has_gradient) == ("middle", (4,), has_gradient)
    assert other.reason.startswith(reason)


# --- what Layers are -----------------------------------------------------------------------------


@settings(max_examples=5)
@given(networks(), st.integers(1, 6))
def test_layers_do_not_depend_on_the_batch_size(network, batch):
    other = dataclasses.replace(network, batch=batch)
    layers, others = (lp.find_layers(n.loss, n.params(), *n.data()) for n in (network, other))
    assert layers == others and hash(layers) == hash(others)


def test_layers_of_another_shape_transfer_or_bias_differ():
    layers = [
        lp.find_layers(n.loss, n.params(), *n.data())
        for n in (
            Network(),
            Network(widths=(3, 5, 2)),
            Network(transfer="relu"),
            Network(bias=False),
            Network(front_end="transposed"),
        )
    ]
    assert len(set(layers)) == len(layers)


def find_with(transfer):
    def loss(params, x, y):
        outputs = dense(params["last"], transfer(dense(params["first"], x)))
        return optax.l2_loss(outputs, y).sum(-1).mean()

    return lp.find_layers(loss, outer_layers(), X, Y)


def test_layers_differ_where_a_home_made_transfer_function_does():
    assert find_with(lambda a: jnp.where(a > 0, a, 0.2 * a)) != find_with(
        lambda a: jnp.where(a > 0, a, 0.5 * a)
    )


@pytest.mark.parametrize("as_array", [jnp.asarray, lambda s: np.full((1, 1), s)])
def test_layers_differ_where_a_constant_of_a_transfer_function_does(as_array):
    slopes = [as_array(0.2), as_array(0.5)]
    mild, steep = (find_with(lambda a, s=s: jnp.where(a > 0, a, s * a)) for s in slopes)
    assert mild != steep


def test_layers_are_static_arguments_of_jit():
    @chex.assert_max_traces(n=1)
    def norm(layers, params):
        return sum(jnp.sum(layers.block(params, name) ** 2) for name in layers)

    norm = jax.jit(norm, static_argnums=0)
    network = Network()
    for batch in (3, 4):
        layers = lp.find_layers(network.loss, network.params(), *network.data())
        norm(layers, network.params())
        network = dataclasses.replace(network, batch=batch)


def reachable(value):
    """Everything a static value is made of, functions aside."""
    yield value
    if dataclasses.is_dataclass(value):
        value = vars(value)
    elif hasattr(value, "__dict__") and not callable(value):
        value = vars(value)
    if isinstance(value, dict):
        value = list(value.items())
    if isinstance(value, tuple | list):
        for part in value:
            yield from reachable(part)


def test_layers_hold_no_arrays_and_no_equations():
    layers = lp.find_layers(Network().loss, Network().params(), *Network().data())
    kinds = {type(part).__name__ for part in reachable(layers)}
    assert {"Layers", "Layer", "Parameter", "Transfer", "str", "int"} <= kinds
    assert not [kind for kind in kinds if "Array" in kind or "Jaxpr" in kind or "ndarray" in kind]


def test_layers_and_captured_are_read_only_mappings():
    network = Network()
    params, batch = network.params(), network.data()
    layers = lp.find_layers(network.loss, params, *batch)
    captured = jax.eval_shape(lp.value_grad_and_capture(network.loss), params, *batch)[2]
    assert repr(layers) == "<Layers: layer0, layer1>"
    assert repr(captured) == "<Captured: layer0, layer1>"
    for mapping in (layers, captured):
        assert list(mapping) == ["layer0", "layer1"] and len(mapping) == 2
        assert "layer0" in mapping and "layer2" not in mapping
        with pytest.raises(TypeError):
            mapping["layer2"] = None  # pyright: ignore
    with pytest.raises(dataclasses.FrozenInstanceError):
        layers["layer0"].d_in = 1  # pyright: ignore


# --- the table -----------------------------------------------------------------------------------


def model_with_everything(params, x, y):
    h = jax.nn.relu(dense(params["encoder"]["in"], x))
    a = dense(params["encoder"]["gate"], h)
    h = (jax.nn.sigmoid(a) + a.mean(-1, keepdims=True)) @ params["decoder"]
    outputs = dense(params["out"], jnp.tanh(h) * params["scale"][None, None])
    outputs = outputs ** jnp.exp(params["power"])[None, None]
    return optax.sigmoid_binary_cross_entropy(outputs, y).sum(-1).mean()


TABLE = """\
layer         kind   shape     bias  rows  transfer                        parameters
-------------------------------------------------------------------------------------
encoder/in    dense  3 -> 40   yes      7  relu                                   160
encoder/gate  dense  40 -> 40  yes      7  identity: used by 2 operations       1,640
decoder       dense  40 -> 4   no       7  tanh                                   160
scale         scale  4         no       7  identity                                 4
out           dense  4 -> 2    yes      7  (loss)                                  10
5 layers, 1,974 parameters

Not in a layer (their gradient passes unchanged):
  power [2]: capture knows no layer that is a `pow` of data and a parameter

Without a gradient:
  unused [5, 5]: the loss does not depend on it (unused, or behind a stop_gradient)"""


def test_printed_layers_are_a_table_of_what_was_understood():
    params = {
        "encoder": {
            "in": {"kernel": normal(0, 3, 40), "bias": normal(0, 40)},
            "gate": {"kernel": normal(0, 40, 40), "bias": normal(0, 40)},
        },
        "decoder": normal(0, 40, 4),
        "scale": normal(0, 4),
        "power": normal(0, 2),
        "out": {"kernel": normal(0, 4, 2), "bias": normal(0, 2)},
        "unused": normal(0, 5, 5),
    }
    x, y = normal(1, 5, 7, 3), normal(2, 5, 7, 2)
    layers = lp.find_layers(model_with_everything, params, x, y, on_uncaptured="pass")
    assert str(layers) == TABLE


def test_a_layer_has_a_name_also_where_the_parameter_is_all_there_is():
    layers = lp.find_layers(lambda w, x, y: jnp.mean((x @ w - y) ** 2), normal(0, 3, 2), X, Y)
    (layer,) = layers.values()
    assert (layer.d_in, layer.d_out) == (3, 2)


# --- blocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_unblock_is_the_inverse_of_block(front_end):
    network = Network(front_end=front_end)
    params = network.params()
    layers = lp.find_layers(network.loss, params, *network.data())
    leaves = {}
    for name, (d_in, d_out) in zip(layers, network.sizes, strict=True):
        block = layers.block(params, name)
        assert block.shape == (d_in + 1, d_out)
        leaves |= layers.unblock(block, name)
    paths = [p.path for layer in layers.values() for p in layer.parameters]
    assert sorted(leaves) == sorted(paths)

    def by_shape(arrays):  # no two parameters have the same
        return {array.shape: np.asarray(array) for array in arrays}

    found, expected = by_shape(leaves.values()), by_shape(jax.tree.leaves(params))
    assert len(found) == 4
    chex.assert_trees_all_equal(found, expected)
    doubled = layers.replace(params, {name: 2 * layers.block(params, name) for name in layers})
    chex.assert_trees_all_equal(doubled, jax.tree.map(lambda p: 2 * p, params))


def test_a_block_is_the_kernel_as_inputs_by_outputs_with_the_bias_as_last_row():
    params = {"kernel": normal(0, 2, 2, 3), "bias": normal(1, 2, 2)}

    def loss(p, x):
        return jnp.sum(jnp.einsum("bi,hoi->bho", x, p["kernel"]) + p["bias"][None])

    layers = lp.find_layers(loss, params, X)
    (name,) = layers
    expected = np.vstack([params["kernel"].reshape(4, 3).T, params["bias"].reshape(1, 4)])
    np.testing.assert_array_equal(layers.block(params, name), expected)
    again = layers.unblock(layers.block(params, name), name)
    np.testing.assert_array_equal(again["kernel"], params["kernel"])
    np.testing.assert_array_equal(again["bias"], params["bias"])


def test_new_blocks_replace_parts_of_arrays_and_leave_what_is_masked_or_in_no_layer():
    params = {"both": normal(0, 2, 3, 3), "bias": normal(1, 3), "other": normal(2, 3)}

    def loss(p, x):
        hidden = jnp.tanh(x @ p["both"][0] + p["bias"][None])
        return jnp.sum(hidden @ p["both"][1] * jnp.exp(p["other"])[None])

    layers = lp.find_layers(loss, params, X, on_uncaptured="pass")
    half = {**jax.tree.map(lambda p: p.astype(jnp.float32), params), "bias": optax.MaskedNode()}
    new = layers.replace(half, {"both[0]": jnp.ones((4, 3))})
    assert new["bias"] == optax.MaskedNode() and new["both"].dtype == jnp.float32
    np.testing.assert_array_equal(new["both"][0], np.ones((3, 3)))
    np.testing.assert_array_equal(new["both"][1], half["both"][1])
    np.testing.assert_array_equal(new["other"], half["other"])


# --- captured arrays of the right model ----------------------------------------------------------


def update_with(network, captured):
    params = network.params()
    layers = lp.find_layers(network.loss, params, *network.data())
    tx = lp.locoprop_s(layers, 0.1)
    return tx.update(params, tx.init(params), params, captured=captured)


def test_missing_captured_is_an_error_with_the_remedy():
    with pytest.raises(TypeError, match=r"`captured`, got nothing(.|\n)*value_grad_and_capture"):
        update_with(Network(), None)
    with pytest.raises(TypeError, match="`captured`, got a dict"):
        update_with(Network(), {})


@pytest.mark.parametrize(
    "other, different",
    [
        (Network(widths=(3, 5, 2)), "layer0, layer1 differ"),
        (Network(widths=(3, 4, 1)), "layer1 differs"),
        (Network(front_end="transposed"), "layer0, layer1 differ"),
        (Network(bias=False), "layer0, layer1 differ"),
        (Network(front_end="linen"), r"differ \(`captured` holds params/Dense_0"),
    ],
    ids=lambda value: "" if isinstance(value, str) else value.front_end,
)
def test_captured_of_another_model_is_an_error_that_names_the_layers(other, different):
    captured = jax.eval_shape(lp.value_grad_and_capture(other.loss), other.params(), *other.data())[
        2
    ]
    with pytest.raises(ValueError, match=f"does not belong to the layers .*{different}"):
        update_with(Network(), captured)


@pytest.mark.parametrize(
    "make",
    [lp.foof, lp.lnb, lp.locoprop_s],
)
@pytest.mark.parametrize(
    "other, different",
    [
        (Network(widths=(3, 5, 2)), r"'layer0/[a-z]+' has the shape \(.*5.*\), in the layers"),
        (Network(front_end="linen"), "None of the parameters is in a layer: the layers have"),
    ],
    ids=["shape", "paths"],
)
def test_parameters_of_another_model_are_refused_at_the_start(make, other, different):
    network = Network()
    layers = lp.find_layers(network.loss, network.params(), *network.data())
    with pytest.raises(ValueError, match=different + "(.|\n)*Call `find_layers`"):
        make(layers).init(other.params())


def test_captured_of_another_batch_size_belongs_to_the_same_model():
    other = Network(batch=7)
    captured = jax.eval_shape(lp.value_grad_and_capture(other.loss), other.params(), *other.data())
    jax.eval_shape(lambda c: update_with(Network(), c), captured[2])
