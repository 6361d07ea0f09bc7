"""Capture against `jax.value_and_grad` and against the same network written out by hand."""

import gc
import weakref
from typing import Any

import chex
import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from jax.ad_checkpoint import checkpoint_name

import locoprop_jax as lp
from tests.helpers import (
    FRONT_ENDS,
    WRAPPERS,
    Network,
    block_gradient,
    normal,
    problems,
    quick_jit,
    reference,
    spread,
)

each_front_end = pytest.mark.parametrize("front_end", FRONT_ENDS)


def assert_close(tree, expected, tolerance=1e-10):
    chex.assert_trees_all_close(tree, expected, rtol=tolerance, atol=tolerance)


def value_and_grad(loss_fn, *args, **kwargs):
    """`jax.value_and_grad` under jit."""
    return jax.jit(jax.value_and_grad(loss_fn))(*args, **kwargs)


def dense(params, x):
    x = x @ params["kernel"]
    return x + spread(params["bias"], x) if "bias" in params else x


def mlp(params, x, f=jnp.tanh):
    return dense(params["second"], f(dense(params["first"], x)))


def squared(outputs, y):
    return optax.l2_loss(outputs, y).sum(-1).mean()


def mlp_loss(params, x, y):
    return squared(mlp(params, x), y)


def mlp_params(dtype=float):
    return {
        "first": {"kernel": normal(0, 3, 4, dtype=dtype), "bias": normal(1, 4, dtype=dtype)},
        "second": {"kernel": normal(2, 4, 2, dtype=dtype), "bias": normal(3, 2, dtype=dtype)},
    }


X, Y = normal(4, 5, 3), normal(5, 5, 2)


def assert_understood(loss_fn, params, *args, transfer="tanh", tolerance=1e-10, **kwargs):
    """Both layers of the network above are found, with its gradients and X'E equal to them."""
    layers = lp.find_layers(loss_fn, params, *args, **kwargs)
    assert [(n, v.d_in, v.d_out) for n, v in layers.items()] == [("first", 3, 4), ("second", 4, 2)]
    assert layers["first"].transfer.name == transfer

    def everything(params, args):
        value, grads, captured = lp.value_grad_and_capture(loss_fn)(params, *args, **kwargs)
        blocks = [block_gradient(captured[n], layers[n].bias is not None) for n in layers]
        expected = jax.value_and_grad(loss_fn)(params, *args, **kwargs)
        return (
            captured,
            (value, grads, blocks),
            (
                *expected,
                [layers.block(grads, n) for n in layers],
            ),
        )

    captured, found, expected = quick_jit(everything)(params, args)
    assert_close(found, expected, tolerance)
    return layers, captured


def rows(x):
    return x.reshape(-1, x.shape[-1])


# --- the oracle ----------------------------------------------------------------------------------


@settings(max_examples=12)
@given(problems())
def test_capture_finds_the_inputs_outputs_and_cotangents_of_every_layer(problem):
    network, loss_fn = problem.network, problem.loss_fn
    layers = lp.find_layers(loss_fn, problem.params, *problem.batch)
    assert [(v.d_in, v.d_out, v.bias is not None) for v in layers.values()] == [
        (d_in, d_out, network.bias) for d_in, d_out in network.sizes
    ]
    assert [v.transfer.name for v in layers.values()][:-1] == network.transfers[:-1]
    assert [v.rows for v in layers.values()] == [network.tokens or 1] * len(layers)
    assert [v.is_output for v in layers.values()] == [False] * (len(layers) - 1) + [True]
    assert not layers.uncaptured

    @quick_jit
    def capture(params, x, y):
        loss, grads, captured = lp.value_grad_and_capture(loss_fn)(params, x, y)
        arrays = [captured[name] for name in layers]
        views = [(rows(a.inputs), rows(a.outputs), rows(a.cotangents)) for a in arrays]
        head, outputs = arrays[-1].head, arrays[-1].outputs
        of_head = head.loss(outputs), rows(head.gradient(outputs)), head.terms
        in_blocks = [[layers.block(tree, name) for name in layers] for tree in (params, grads)]
        return loss, *in_blocks, views, of_head

    params, (x, y) = problem.params, problem.batch
    loss, blocks, gradients, views, of_head = capture(params, x, y)
    data_loss, expected = reference(network, blocks, x, y)
    without_ones = [
        (a.inputs[:, :d], a.outputs, a.cotangents)
        for a, (d, _) in zip(expected, network.sizes, strict=True)
    ]
    assert_close(views, without_ones)
    assert_close(
        gradients,
        [
            a.inputs.T @ a.cotangents + network.decay * w
            for a, w in zip(expected, blocks, strict=True)
        ],
    )
    decay = sum(network.decay / 2 * jnp.sum(w**2) for w in blocks)
    assert_close(loss, data_loss + decay)
    assert_close(of_head, (loss, expected[-1].cotangents, network.terms))


@each_front_end
def test_gradients_are_bit_for_bit_those_of_value_and_grad_under_jit(front_end):
    network = Network(front_end=front_end, tokens=3, decay=0.1, transfer="relu")
    params, batch = network.params(), network.data()
    capture = lp.value_grad_and_capture(network.loss)
    # Arrays that leave the compiled function change what XLA fuses, whoever computes them.
    found = jax.jit(lambda *args: capture(*args)[:2])(params, *batch)
    chex.assert_trees_all_equal(found, value_and_grad(network.loss, params, *batch))


@pytest.mark.parametrize("wrapper", sorted(WRAPPERS.keys() - {"nothing"}))
def test_gradients_are_bit_for_bit_those_of_value_and_grad_through_wrappers(wrapper):
    network = Network(wrapper=wrapper, head="softmax")
    params, batch = network.params(), network.data()
    capture = lp.value_grad_and_capture(network.loss)
    found = jax.jit(lambda *args: capture(*args)[:2])(params, *batch)
    chex.assert_trees_all_equal(found, value_and_grad(network.loss, params, *batch))


def test_without_jit_gradients_are_those_of_value_and_grad_to_rounding():
    loss, grads, captured = lp.value_grad_and_capture(mlp_loss)(mlp_params(), X, Y)
    assert_close((loss, grads), jax.value_and_grad(mlp_loss)(mlp_params(), X, Y))
    jitted = jax.jit(lp.value_grad_and_capture(mlp_loss))(mlp_params(), X, Y)[2]
    assert_close(captured, jitted)


def test_rematerialisation_stays_in_the_backward_pass():
    network = Network(wrapper="checkpoint", transfer="sigmoid")
    args = (network.params(), *network.data())

    def logistics(f):
        return str(jax.make_jaxpr(f)(*args)).count("logistic")

    captured = logistics(lp.value_grad_and_capture(network.loss))
    assert captured == logistics(jax.value_and_grad(network.loss)) > 1


# --- ways to write a layer -----------------------------------------------------------------------


@each_front_end
def test_layers_are_named_by_the_parent_of_their_kernel(front_end):
    names = {
        "equinox": ["layers/0", "layers/1"],
        "nnx": ["layers/0", "layers/1"],
        "linen": ["params/Dense_0", "params/Dense_1"],
        "haiku": ["linear", "linear_1"],
    }
    network = Network(front_end=front_end)
    layers = lp.find_layers(network.loss, network.params(), *network.data())
    assert list(layers) == names.get(front_end, ["layer0", "layer1"])


def test_layers_whose_kernels_share_a_parent_are_named_by_their_kernels():
    params = {"w1": normal(0, 3, 4), "b1": normal(1, 4), "w2": normal(2, 4, 2)}

    def loss(p, x, y):
        return squared(jnp.tanh(x @ p["w1"] + p["b1"][None]) @ p["w2"], y)

    layers = lp.find_layers(loss, params, X, Y)
    assert list(layers) == ["w1", "w2"]
    assert [parameter.path for parameter in layers["w1"].parameters] == ["w1", "b1"]


def test_captured_lists_its_layers_in_the_order_of_the_data_also_out_of_jit():
    def loss(p, x, y):
        return squared(jnp.tanh(x @ p["b"]["w"]) @ p["a"]["w"], y)

    params = {"b": {"w": normal(0, 3, 4)}, "a": {"w": normal(2, 4, 2)}}
    assert list(lp.find_layers(loss, params, X, Y)) == ["b", "a"]
    assert list(jax.jit(lp.value_grad_and_capture(loss))(params, X, Y)[2]) == ["b", "a"]


def inside_jit(params, x, y):
    first = jax.jit(lambda p, x: jnp.tanh(jax.jit(dense)(p, x)))
    return squared(jax.jit(dense)(params["second"], first(params["first"], x)), y)


def inside_checkpoint(params, x, y):
    first = jax.checkpoint(lambda p, x: jnp.tanh(jax.jit(jax.checkpoint(jax.jit(dense)))(p, x)))
    return squared(dense(params["second"], first(params["first"], x)), y)


def only_the_bias_inside_jit(params, x, y):
    a = jax.jit(lambda b, a: a + b[None])(params["first"]["bias"], x @ params["first"]["kernel"])
    return squared(dense(params["second"], jnp.tanh(a)), y)


def vmapped_over_examples(params, x, y):
    def of_example(x, y):
        h = jnp.tanh(params["first"]["kernel"].T @ x + params["first"]["bias"])
        return optax.l2_loss(h @ params["second"]["kernel"] + params["second"]["bias"], y).sum()

    return jax.vmap(of_example)(x, y).mean()


def columns_are_examples(params, x, y):
    h = jnp.tanh(params["first"]["kernel"].T @ x.T + params["first"]["bias"][:, None])
    return squared((params["second"]["kernel"].T @ h + params["second"]["bias"][:, None]).T, y)


def policy_saves_a_name(params, x, y):
    def network(params, x):
        h = jnp.tanh(checkpoint_name(dense(params["first"], x), "pre-activation"))
        return dense(params["second"], h)

    policy = jax.checkpoint_policies.save_only_these_names("pre-activation")
    return squared(jax.checkpoint(network, policy=policy)(params, x), y)


def named(params, x, y):
    with jax.named_scope("network"):
        return squared(jax.named_call(mlp, name="mlp")(params, x), y)


def weight_decay(params, x, y):
    return mlp_loss(params, x, y) + 0.0 * optax.tree.norm(params, squared=True)


def bias_first(params, x, y):
    first = params["first"]
    return squared(dense(params["second"], jnp.tanh(first["bias"][None] + x @ first["kernel"])), y)


def also_behind_stop_gradient(params, x, y):
    frozen = jax.lax.stop_gradient(x @ params["first"]["kernel"])
    return squared(dense(params["second"], jnp.tanh(dense(params["first"], x))), y + frozen[:, :2])


def prints_on_the_way(params, x, y):
    jax.debug.callback(lambda a: None, dense(params["first"], x))
    return mlp_loss(params, x, y)


@pytest.mark.parametrize(
    "loss_fn",
    [
        inside_jit,
        inside_checkpoint,
        only_the_bias_inside_jit,
        vmapped_over_examples,
        columns_are_examples,
        policy_saves_a_name,
        named,
        weight_decay,
        bias_first,
        also_behind_stop_gradient,
        prints_on_the_way,
        jax.jit(mlp_loss),
        jax.checkpoint(mlp_loss),
    ],
    ids=lambda f: getattr(f, "__name__", "") + type(f).__name__.replace("function", ""),
)
def test_a_layer_is_found_however_it_is_written(loss_fn):
    assert_understood(loss_fn, mlp_params(), X, Y)


def test_a_kernel_of_many_axes_becomes_a_matrix():
    params = {"query": normal(0, 3, 2, 2), "bias": normal(1, 2, 2), "out": normal(2, 2, 2, 3)}

    def loss(p, x):
        heads = jnp.einsum("btd,dhk->bthk", x, p["query"]) + p["bias"][None, None]
        return squared(jnp.einsum("bthk,hkm->btm", jnp.tanh(heads), p["out"]), x)

    x = normal(3, 5, 4, 3)
    layers = lp.find_layers(loss, params, x)
    assert [(v.d_in, v.d_out, v.rows) for v in layers.values()] == [(3, 4, 4), (4, 3, 4)]
    _, grads, captured = jax.jit(lp.value_grad_and_capture(loss))(params, x)
    assert_close(
        [block_gradient(captured["query"], True), block_gradient(captured["out"], False)],
        [layers.block(grads, "query"), layers.block(grads, "out")],
    )


def test_mixed_precision_computes_in_bfloat16_on_float32_parameters():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jnp.tanh(nn.Dense(4, dtype=jnp.bfloat16)(x))
            return nn.Dense(2, dtype=jnp.bfloat16)(x)

    model, x, y = Model(), X.astype(jnp.float32), Y.astype(jnp.float32)
    params = mlp_params(jnp.float32)

    def loss(params, x, y):
        variables = {"params": {"Dense_0": params["first"], "Dense_1": params["second"]}}
        outputs: Any = model.apply(variables, x)
        return squared(outputs.astype(jnp.float32), y)

    layers = lp.find_layers(loss, params, x, y)
    assert [v.transfer.name for v in layers.values()] == ["tanh", "identity"]
    capture = lp.value_grad_and_capture(loss)
    chex.assert_trees_all_equal(
        jax.jit(lambda *args: capture(*args)[:2])(params, x, y), value_and_grad(loss, params, x, y)
    )
    _, grads, captured = quick_jit(capture)(params, x, y)
    for name in layers:
        assert captured[name].outputs.dtype == jnp.bfloat16
        assert layers.block(grads, name).dtype == jnp.float32
        found = block_gradient(captured[name], True).astype(jnp.float32)
        assert_close(found, layers.block(grads, name), 5e-2)


# --- examples and positions ----------------------------------------------------------------------


def test_time_major_activations_come_out_by_example():
    def loss(params, x, y):
        outputs = mlp(params, jnp.swapaxes(x, 0, 1))  # (time, batch, features)
        return squared(jnp.swapaxes(outputs, 0, 1), y)

    x, y = normal(0, 5, 4, 3), normal(1, 5, 4, 2)
    layers, captured = assert_understood(loss, mlp_params(), x, y)
    assert layers["first"].rows == 4
    assert_close(captured["first"].inputs, x)


def test_rows_count_the_positions_of_an_example_not_the_examples():
    assert lp.find_layers(mlp_loss, mlp_params(), X, Y)["first"].rows == 1
    x, y = normal(0, 5, 4, 6, 3), normal(1, 5, 4, 6, 2)
    layers, captured = assert_understood(mlp_loss, mlp_params(), x, y)
    assert layers["first"].rows == 24
    assert_close(captured["first"].inputs, x.reshape(5, 24, 3))


def test_a_batch_of_one():
    layers, captured = assert_understood(mlp_loss, mlp_params(), X[:1], Y[:1])
    assert layers == lp.find_layers(mlp_loss, mlp_params(), X, Y)
    assert captured["first"].inputs.shape == (1, 1, 3)
    assert captured["second"].head.terms == 1


def test_a_single_example_without_a_batch_axis():
    def loss(params, x, y):
        return squared(mlp(params, x), y)

    layers, _ = assert_understood(loss, mlp_params(), X[0], Y[0])
    assert layers["first"].rows is None


def test_an_argument_longer_than_the_batch_is_not_taken_for_it():
    def loss(params, x, y, prototypes):
        return squared(mlp(params, x), y) + 0 * prototypes.sum()

    layers, _ = assert_understood(loss, mlp_params(), X, Y, normal(6, 50, 3))
    assert layers["first"].rows == 1


# --- arguments and results -----------------------------------------------------------------------


def test_auxiliary_results_come_back_beside_the_loss():
    def loss(params, x, y):
        outputs = mlp(params, x)
        return squared(outputs, y), {"outputs": outputs, "name": "mlp", "first": params["first"]}

    params = mlp_params()
    layers = lp.find_layers(loss, params, X, Y, has_aux=True)
    assert layers == lp.find_layers(mlp_loss, params, X, Y)
    capture = lp.value_grad_and_capture(loss, has_aux=True)

    @quick_jit
    def without_name(params, x, y):
        (value, aux), *rest = capture(params, x, y)
        assert aux.pop("name") == "mlp"
        return (value, aux), *rest

    (value, aux), grads, captured = without_name(params, X, Y)
    assert_close((value, grads), value_and_grad(mlp_loss, params, X, Y))
    assert_close(aux["outputs"], captured["second"].outputs[:, 0])
    chex.assert_trees_all_equal(aux["first"], params["first"])


def test_what_only_auxiliary_results_use_has_no_gradient():
    def loss(params, x, y):
        return mlp_loss(params, x, y), x @ params["probe"]

    params = mlp_params() | {"probe": normal(6, 3, 3)}
    layers = lp.find_layers(loss, params, X, Y, has_aux=True)
    assert [(u.path, u.has_gradient) for u in layers.uncaptured] == [("probe", False)]


def test_arguments_that_are_no_arrays_stay_what_they_are():
    def loss(params, batch, activation, train, *, scale=1.0, reduction):
        assert train is True and reduction == "mean" and batch["name"] == "toy"
        return scale * squared(mlp(params, batch["x"], activation), batch["y"])

    batch = {"x": X, "y": Y, "name": "toy"}
    capture = lp.value_grad_and_capture(loss)
    layers = lp.find_layers(loss, mlp_params(), batch, jnp.tanh, True, reduction="mean", scale=2.0)
    assert layers["first"].transfer.name == "tanh"

    @quick_jit
    def call(params):
        found = capture(params, batch, jnp.tanh, True, reduction="mean", scale=2.0)[:2]
        return found, jax.value_and_grad(lambda p: 2.0 * mlp_loss(p, X, Y))(params)

    assert_close(*call(mlp_params()))


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
@pytest.mark.parametrize("batch", [5, 2])
def test_random_keys_are_arguments_like_others(make_key, batch):
    def loss(params, x, y, key):
        h = jnp.tanh(dense(params["first"], x))
        kept = jax.random.bernoulli(key, 0.5, h.shape)
        return squared(dense(params["second"], jnp.where(kept, h, 0)), y)

    _, captured = assert_understood(loss, mlp_params(), X[:batch], Y[:batch], make_key(0))
    assert np.any(captured["second"].inputs == 0)


def test_flax_dropout():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dropout(0.5, deterministic=False)(nn.relu(nn.Dense(4, param_dtype=float)(x)))
            return nn.Dense(2, param_dtype=float)(x)

    model = Model()

    def loss(params, x, y, key):
        variables = {"params": {"Dense_0": params["first"], "Dense_1": params["second"]}}
        return squared(model.apply(variables, x, rngs={"dropout": key}), y)

    # Dropout divides by the probability of keeping before it drops: f is 2 relu.
    assert_understood(loss, mlp_params(), X, Y, jax.random.key(0), transfer="custom")


def test_closed_over_data_is_data():
    layers, captured = assert_understood(lambda params: mlp_loss(params, X, Y), mlp_params())
    assert layers["first"].rows == 1
    assert_close(captured["first"].inputs[:, 0], X)


def test_closed_over_labels_do_not_hide_the_layers():
    assert_understood(lambda params, x: mlp_loss(params, x, Y), mlp_params(), X)


def test_arrays_of_numpy_and_shapes_without_arrays_are_enough():
    expected = lp.find_layers(mlp_loss, mlp_params(), X, Y)
    numpy = jax.tree.map(np.asarray, (mlp_params(), X, Y))
    abstract = jax.eval_shape(lambda: (mlp_params(), X, Y))
    assert lp.find_layers(mlp_loss, *numpy) == lp.find_layers(mlp_loss, *abstract) == expected


def test_nnx_modules_are_parameters_themselves():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(3, 4, rngs=rngs, param_dtype=float)
            self.second = nnx.Linear(4, 2, rngs=rngs, param_dtype=float)

    model = Model(nnx.Rngs(0))

    def loss(model, x, y):
        return squared(model.second(jnp.tanh(model.first(x))), y)

    value, grads, captured = jax.jit(lp.value_grad_and_capture(loss))(model, X, Y)
    assert_close((value, grads), value_and_grad(loss, model, X, Y))
    assert_close(block_gradient(captured["first"], True)[:3], grads.first.kernel[...])


def test_haiku_with_random_numbers():
    def model(x):
        x = jnp.tanh(hk.Linear(4, name="first")(x))
        x = x + jax.random.normal(hk.next_rng_key(), x.shape)
        return hk.Linear(2, name="second")(x)

    apply = hk.transform(model).apply

    def loss(params, key, x, y):
        renamed = {n: {"w": p["kernel"], "b": p["bias"]} for n, p in params.items()}
        return squared(apply(renamed, key, x), y)

    assert_understood(loss, mlp_params(), jax.random.key(0), X, Y)


# --- the head ------------------------------------------------------------------------------------

TOKENS = (normal(6, 5, 4, 3), normal(7, 5, 4, 2))


def row_losses(outputs, y):
    return jnp.sum((outputs - y) ** 2, -1)


@pytest.mark.parametrize(
    "loss_of_outputs",
    [
        lambda a, y: 0.5 * row_losses(a, y).mean(),
        lambda a, y: optax.softmax_cross_entropy_with_integer_labels(a, y.argmax(-1)).mean(),
        lambda a, y: optax.l2_loss(jax.nn.sigmoid(a), y).sum(),
    ],
    ids=["squared", "softmax", "sigmoid and squared"],
)
def test_the_head_is_the_loss_as_a_function_of_the_last_outputs(loss_of_outputs):
    def loss(params, x, y):
        return loss_of_outputs(mlp(params, x), y)

    @quick_jit
    def everything(params, x, y):
        value, _, captured = lp.value_grad_and_capture(loss)(params, x, y)
        assert captured["first"].head is None
        last = captured["second"]
        moved = last.outputs + 0.1
        found = last.head.loss(last.outputs), last.head.gradient(last.outputs)
        elsewhere = last.head.loss(moved), loss_of_outputs(moved.reshape(y.shape), y)
        return (*found, elsewhere[0]), (value, last.cotangents, elsewhere[1])

    assert_close(*everything(mlp_params(), *TOKENS))


@pytest.mark.parametrize(
    "data, terms, loss_of_outputs",
    [
        ((X, Y), 5, lambda a, y: row_losses(a, y).mean()),
        ((X, Y), 5, lambda a, y: optax.l2_loss(a, y).sum(-1).mean()),
        ((X, Y), 10, lambda a, y: optax.l2_loss(a, y).mean()),
        ((X, Y), 1, lambda a, y: optax.l2_loss(a, y).sum()),
        ((X, Y), 1, lambda a, y: 0.5 * row_losses(a, y).sum()),
        ((X, Y), 5, lambda a, y: row_losses(a, y).sum() / len(y)),
        ((X, Y), 5, lambda a, y: (0.5 * row_losses(a, y)).mean()),
        ((X, Y), 5, lambda a, y: jax.vmap(lambda a, y: jnp.sum((a - y) ** 2))(a, y).mean()),
        ((X, Y), 5, lambda a, y: optax.softmax_cross_entropy(a, y).mean()),
        (
            (X, Y),
            5,
            lambda a, y: optax.softmax_cross_entropy_with_integer_labels(a, y.argmax(-1)).mean(),
        ),
        ((X, Y), 5, lambda a, y: optax.sigmoid_binary_cross_entropy(a, y).sum(-1).mean()),
        ((X, Y), 5, lambda a, y: row_losses(jax.nn.sigmoid(a), y).mean()),
        (TOKENS, 20, lambda a, y: row_losses(a, y).mean()),
        (TOKENS, 5, lambda a, y: row_losses(a, y).sum(-1).mean()),
        (TOKENS, 20, lambda a, y: row_losses(a, y).mean(-1).mean()),
        ((X, Y), 5, lambda a, y: 0.5 * row_losses(a, y).mean()),
        ((X, Y), 5, lambda a, y: row_losses(a, y).mean() / 2),
        ((X, Y), 5, lambda a, y: row_losses(a, y).sum() / (2 * len(y))),
        (
            (X, Y),
            5,
            lambda a, y: 0.3 * row_losses(a, y).mean() + 0.7 * jnp.abs(a - y).sum(-1).mean(),
        ),
        ((X[:2], Y[:2]), 1, lambda a, y: 0.5 * row_losses(a, y).sum()),
        (
            (X, Y),
            5,  # what divides the sum is not known: all rows
            lambda a, y: jnp.average(row_losses(a, y), weights=(y[:, 0] > 0).astype(float)),
        ),
    ],
)
def test_the_head_counts_the_terms_that_the_loss_averages(data, terms, loss_of_outputs):
    def loss(params, x, y):
        return loss_of_outputs(mlp(params, x), y)

    captured = jax.eval_shape(lp.value_grad_and_capture(loss), mlp_params(), *data)[2]
    assert captured["second"].head.terms == terms


def test_a_regularizer_is_part_of_the_heads_value_but_not_of_its_gradient():
    network = Network(decay=0.1)
    params, (x, y) = network.params(), network.data()
    value, _, captured = quick_jit(lp.value_grad_and_capture(network.loss))(params, x, y)
    last = captured["layer1"]
    assert_close(last.head.loss(last.outputs), value)
    assert_close(last.head.gradient(last.outputs), last.cotangents)
    assert last.head.terms == 5


def test_each_of_two_heads_is_a_head():
    params = {
        "trunk": {"kernel": normal(0, 3, 4)},
        "policy": {"kernel": normal(1, 4, 2)},
        "value": {"kernel": normal(2, 4, 1)},
    }

    def loss(p, x, y):
        h = jnp.tanh(dense(p["trunk"], x))
        cross_entropy = optax.softmax_cross_entropy(dense(p["policy"], h), jax.nn.softmax(y))
        return cross_entropy.mean() + optax.l2_loss(dense(p["value"], h)[:, 0]).mean()

    layers = lp.find_layers(loss, params, X, Y)
    assert [v.is_output for v in layers.values()] == [False, True, True]
    value, _, captured = jax.jit(lp.value_grad_and_capture(loss))(params, X, Y)
    for name in ("policy", "value"):
        arrays = captured[name]
        assert_close(arrays.head.loss(arrays.outputs), value)
        assert_close(arrays.head.gradient(arrays.outputs), arrays.cotangents)
        assert arrays.head.terms == 5


# --- compositions --------------------------------------------------------------------------------


def sgd_step(params, x, y):
    """A step that uses what was captured: the gradient is X'E."""
    loss, _, captured = lp.value_grad_and_capture(mlp_loss)(params, x, y)
    layers = lp.find_layers(mlp_loss, params, x, y)
    new = dict(params)
    for name, layer in layers.items():
        step = layer.unblock(0.1 * block_gradient(captured[name], True))
        new[name] = {
            part: params[name][part] - step[f"{name}/{part}"] for part in ("kernel", "bias")
        }
    return new, loss


def test_steps_in_a_scan_equal_steps_in_a_loop():
    step = jax.jit(sgd_step)
    params, losses = mlp_params(), []
    for _ in range(3):
        params, loss = step(params, X, Y)
        losses.append(loss)

    def body(params, _):
        return sgd_step(params, X, Y)

    scanned = jax.jit(lambda p: jax.lax.scan(body, p, length=3))(mlp_params())
    assert_close(scanned, (params, jnp.stack(losses)))


def test_seeds_under_vmap_equal_seeds_in_a_loop():
    seeds = [jax.tree.map(lambda p, s=s: s * p, mlp_params()) for s in (1.0, 0.5)]
    step = jax.jit(sgd_step)
    looped = [step(params, X, Y) for params in seeds]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds)
    vmapped = jax.jit(jax.vmap(sgd_step, (0, None, None)))(stacked, X, Y)
    assert_close(vmapped, jax.tree.map(lambda *leaves: jnp.stack(leaves), *looped))


def test_per_example_gradients_under_vmap():
    def of_example(x, y):
        return lp.value_grad_and_capture(lambda p: squared(mlp(p, x[None]), y[None]))(mlp_params())

    found = jax.jit(jax.vmap(lambda x, y: of_example(x, y)[:2]))(X, Y)
    per_example = jax.vmap(jax.value_and_grad(mlp_loss), (None, 0, 0))
    assert_close(found, jax.jit(per_example)(mlp_params(), X[:, None], Y[:, None]))


def test_closed_over_tracers_are_data():
    @jax.jit
    def capture(x, y, scale):
        return lp.value_grad_and_capture(lambda p: scale * mlp_loss(p, x, y))(mlp_params())

    value, grads, captured = capture(X, Y, 2.0)
    expected = value_and_grad(lambda p: 2 * mlp_loss(p, X, Y), mlp_params())
    assert_close((value, grads), expected)
    assert_close(captured["first"].inputs[:, 0], X)
    last = captured["second"]  # outside of the trace that the loss closed over
    assert_close(last.head.gradient(last.outputs), last.cotangents)


def test_parameters_can_be_donated():
    step = jax.jit(sgd_step, donate_argnums=0)
    assert_close(step(mlp_params(), X, Y), jax.jit(sgd_step)(mlp_params(), X, Y))


def test_the_loss_stays_differentiable_in_its_other_arguments():
    found = jax.jit(jax.grad(lambda x: lp.value_grad_and_capture(mlp_loss)(mlp_params(), x, Y)[0]))
    assert_close(found(X), jax.jit(jax.grad(mlp_loss, argnums=1))(mlp_params(), X, Y))


def test_capture_runs_in_jaxs_debugging_modes():
    args = (mlp_params(), X[:1], Y[:1])
    capture = lp.value_grad_and_capture(mlp_loss)
    with jax.enable_checks(True), jax.checking_leaks():
        expected = jax.jit(capture)(*args)
    with jax.debug_nans(True), jax.disable_jit():
        assert_close(capture(*args), expected)


# --- compiling once ------------------------------------------------------------------------------


def test_a_second_call_traces_nothing():
    step = jax.jit(chex.assert_max_traces(lp.value_grad_and_capture(mlp_loss), n=1))
    step(mlp_params(), X, Y)
    step(mlp_params(), X + 1, Y)


def test_captured_arrays_of_the_next_batch_do_not_retrace_an_update():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def update(captured):
        last = captured["second"]
        return last.head.gradient(last.outputs)

    capture = lp.value_grad_and_capture(mlp_loss)
    for x in (X, X + 1):
        captured = capture(mlp_params(), x, Y)[2]
        assert_close(update(captured), captured["second"].cotangents)
    captured = jax.jit(capture)(mlp_params(), X, Y)[2]
    assert_close(update(captured), captured["second"].cotangents)


@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray, lambda y: y[0, 0]])
def test_an_update_sees_the_labels_that_the_loss_closed_over(as_array):
    @jax.jit
    def update(captured):
        last = captured["second"]
        return last.head.gradient(last.outputs)

    for y in (Y, 2 * Y):
        closed_over = as_array(y)

        def loss(params, x, labels=closed_over):
            return jnp.mean((mlp(params, x) - labels) ** 2)

        captured = lp.value_grad_and_capture(loss)(mlp_params(), X)[2]
        assert_close(update(captured), captured["second"].cotangents)


def test_captured_crosses_jit_as_a_pytree():
    captured = lp.value_grad_and_capture(mlp_loss)(mlp_params(), X, Y)[2]
    leaves, tree = jax.tree.flatten(captured)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    again = jax.tree.unflatten(tree, leaves)
    assert dict(again).keys() == dict(captured).keys()
    chex.assert_trees_all_equal(again["first"].inputs, captured["first"].inputs)


def test_find_layers_keeps_no_array_alive():
    x = normal(8, 5, 3)
    params = mlp_params()
    alive = [weakref.ref(leaf) for leaf in (x, *jax.tree.leaves(params))]
    layers = lp.find_layers(mlp_loss, params, x, Y)
    del x, params
    gc.collect()
    assert layers and [ref() for ref in alive] == [None] * len(alive)


# --- errors --------------------------------------------------------------------------------------


def test_no_layers_is_an_error_that_lists_the_parameters():
    with pytest.raises(ValueError, match=r"found no layer in this loss(.|\n)*power \[\]: .*`pow`"):
        lp.find_layers(lambda p, x: jnp.sum(x ** p["power"]), {"power": jnp.asarray(1.0)}, X**2)


def test_an_unknown_on_uncaptured_is_an_error():
    with pytest.raises(ValueError, match="'error' or 'pass', got 'ignore'"):
        lp.find_layers(mlp_loss, mlp_params(), X, Y, on_uncaptured="ignore")


@pytest.mark.parametrize(
    "loss_fn, has_aux, message",
    [
        (mlp, False, r"array of shape \(5, 2\).*scalar"),
        (lambda p, x: (mlp(p, x).sum(), 0), False, "a tuple where a scalar.*say `has_aux=True`"),
        (lambda p, x: mlp(p, x).sum(), True, r"pair \(loss, aux\), got"),
        (lambda p, x: (mlp(p, x), 0), True, r"array of shape \(5, 2\).*scalar"),
    ],
    ids=["no scalar", "pair without has_aux", "has_aux without pair", "no scalar with has_aux"],
)
def test_a_loss_that_is_no_scalar_is_an_error(loss_fn, has_aux, message):
    with pytest.raises(TypeError, match=message):
        lp.find_layers(loss_fn, mlp_params(), X, has_aux=has_aux)
    with pytest.raises(TypeError, match=message):
        lp.value_grad_and_capture(loss_fn, has_aux=has_aux)(mlp_params(), X)


def test_an_equinox_model_that_is_not_partitioned_is_an_error_with_the_remedy():
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    with pytest.raises(TypeError, match=r"'activation' is a .*, not an array.*eqx\.partition"):
        lp.find_layers(lambda m, x: jax.vmap(m)(x).sum(), model, X.astype(jnp.float32))


def test_a_parameter_without_derivatives_is_an_error():
    params = mlp_params() | {"step": jnp.asarray(0)}
    with pytest.raises(TypeError, match="'step' has dtype int"):
        lp.find_layers(mlp_loss, params, X, Y)


def test_a_transfer_function_for_an_unknown_layer_is_an_error():
    with pytest.raises(ValueError, match=r"`transfer` names third, .* found are first, second"):
        lp.find_layers(mlp_loss, mlp_params(), X, Y, transfer={"third": jnp.tanh})


def test_what_is_asked_for_in_vain_is_named():
    w, x = {"kernel": jnp.ones((3, 2))}, jnp.ones((4, 3))

    def loss_fn(w, x):
        return jnp.mean((x @ w["kernel"]) ** 2)

    captured = lp.value_grad_and_capture(loss_fn)(w, x)[2]
    with pytest.raises(KeyError, match="No layer 'dense' was captured; there are kernel"):
        captured["dense"]
    with pytest.raises(TypeError, match=r"draws no random numbers.*leave it out"):
        lp.value_grad_and_capture(loss_fn, curvature="ggn_exact")(w, x, rng=jax.random.key(0))
    for method in (lp.foof, lp.lnb, lp.kfac):
        with pytest.raises(ValueError, match=r"needs the layers of the model.*got a dict"):
            method(w)
