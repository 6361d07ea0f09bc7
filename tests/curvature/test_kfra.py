"""KFRA against the recursion in NumPy and the exact Gauss-Newton matrix (oracle 8)."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import locoprop_jax as lp
from locoprop_jax._curvature.kfra import scale_by_kfra
from tests.curvature.test_kfac import divided, mean
from tests.dense_nets import (
    DEEP,
    HEADS,
    TRANSFERS,
    Net,
    assert_blocks,
    averaged_factors,
    nets,
    one_more_refused,
    softmax,
)

CURVATURE = "ggn_output"


def head_hessians(net, outputs):
    """Of each row's loss by its outputs; that of a distribution as labels does not see them."""
    if net.head == "squared":
        return np.stack([np.eye(outputs.shape[1])] * len(outputs))
    if net.head == "sigmoid":
        slope = HEADS["sigmoid"][1]
        return np.stack([np.diag(slope(a) * slope(-a)) for a in outputs])
    p = softmax(outputs)
    return np.stack([np.diag(row) - np.outer(row, row) for row in p])


def recursion(net, params, batch):
    """S, Gamma and the gradient of each layer, by equation 26."""
    layers = net.backprop(params, *batch)
    slopes = net.gradients(params, *batch)
    gamma = head_hessians(net, layers[-1][1]).sum(0) / net.terms
    result = {}
    for m in reversed(range(len(net.names))):
        x, a, *_ = layers[m]
        if m < len(net.names) - 1:
            kernel = net.block(params, net.names[m + 1])[: net.widths[m + 1]]
            f = TRANSFERS[net.transfers[m]][2](a)
            gamma = (kernel @ gamma @ kernel.T) * (f.T @ f) / len(f)
        result[net.names[m]] = x.T @ x / len(x), gamma, slopes[net.names[m]]
    return {name: result[name] for name in net.names}


def update_function(net, tx):
    @jax.jit
    def update(params, state, *batch):
        capture = lp.value_grad_and_capture(net.loss, curvature=CURVATURE)
        _, grads, captured = capture(params, *batch)
        return tx.update(grads, state, params, captured=captured)

    return update


def step(net, tx, params, state, batch):
    return update_function(net, tx)(params, state, *batch)


def kflr(net, params, batch):
    """S, Gamma and the gradient of each layer, Gamma of all columns pulled back."""
    capture = jax.jit(lp.value_grad_and_capture(net.loss, curvature="ggn_exact"))
    captured = capture(params, *batch)[2]
    slopes, result = net.gradients(params, *batch), {}
    for name, (x, *_) in zip(net.names, net.backprop(params, *batch), strict=True):
        c = np.asarray(captured[name].uses[0].curvature).reshape(-1, slopes[name].shape[1])
        result[name] = x.T @ x / len(x), c.T @ c, slopes[name]
    return result


def one_row(net):
    return Net(**{**vars(net), "batch": 1, "tokens": None, "decay": 0.0})


@settings(max_examples=4)
@given(
    net=nets(),
    damping=st.floats(0.05, 2),
    relative=st.booleans(),
    exact_damping=st.booleans(),
    decay=st.sampled_from([0.0, 0.95]),
    seed=st.integers(0, 99),
)
def test_a_step_divides_by_the_factors_of_the_recursion(
    net, damping, relative, exact_damping, decay, seed
):
    params, batch = net.params(seed), net.data(seed)
    tx = scale_by_kfra(
        net.layers(), damping=damping, relative=relative, exact_damping=exact_damping, decay=decay
    )
    updates, state = step(net, tx, params, tx.init(params), batch)
    expected = {
        name: divided(parts, damping, relative, exact_damping)
        for name, parts in recursion(net, params, batch).items()
    }
    assert_blocks(net, updates, expected, 1e-7)
    assert (state.count, state.failures) == (1, 0)


@settings(max_examples=3)
@given(net=nets(), seed=st.integers(0, 99))
def test_for_one_row_the_factors_are_the_exact_gauss_newton_matrices(net, seed):
    """And so those of KFLR, which pulls all columns back."""
    net = one_row(net)
    params, batch = net.params(seed), net.data(seed)
    tx = scale_by_kfra(net.layers())
    _, state = step(net, tx, params, tx.init(params), batch)
    for name, (s, gamma, _) in kflr(net, params, batch).items():
        unbiased = jax.tree.map(lambda f: f / (1 - 0.95), state.statistics[name])
        np.testing.assert_allclose(unbiased.inputs, s, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(unbiased.outputs, gamma, rtol=1e-8, atol=1e-10)


def test_factors_are_averaged_and_inverted_when_they_are_due():
    net, decay, damping = DEEP, 0.8, 0.1
    tx = scale_by_kfra(
        net.layers(), damping=damping, decay=decay, inverse_period=4, statistics_steps=2
    )
    update, params, state = update_function(net, tx), net.params(), tx.init(net.params())
    batches = [net.data(count) for count in range(6)]
    found = [recursion(net, params, batch) for batch in batches]
    due = (0, 1, 2, 4)
    averages = averaged_factors(found, decay, {*due, 3}, due)
    for batch, now, inverse in zip(batches, found, averages, strict=True):
        updates, state = update(params, state, *batch)
        expected = {n: divided((*inverse[n], now[n][2]), damping) for n in net.names}
        assert_blocks(net, updates, expected, 1e-8)
    assert (state.count, state.gathered) == (6, 5)


def test_an_elementwise_head_of_many_outputs_makes_no_matrix_per_example():
    net = Net(widths=(3, 4, 11), transfers=("tanh",), biases=(True, True), batch=7)
    capture = lp.value_grad_and_capture(net.loss, curvature=CURVATURE)
    captured = jax.eval_shape(capture, net.params(), *net.data())[2]
    assert captured["layer0"].output_hessian is None
    assert captured["layer1"].output_hessian.shape == (11,)


# --- without the output factor (Benzing, D.8) ----------------------------------------------------


@pytest.mark.parametrize("method", ["kfac", "kfra"])
@pytest.mark.parametrize("output_factor", ["constant", "norm"])
@settings(max_examples=1)
@given(net=nets(), damping=st.floats(0.05, 2), seed=st.integers(0, 99))
def test_without_the_output_factor_the_input_factor_keeps_its_damping(
    method, output_factor, net, damping, seed
):
    params, batch = net.params(seed), net.data(seed)
    curvature = "ggn_exact" if method == "kfac" else CURVATURE
    build = lp.scale_by_kfac if method == "kfac" else scale_by_kfra
    tx = build(net.layers(), damping=damping, output_factor=output_factor)
    capture = jax.jit(lp.value_grad_and_capture(net.loss, curvature=curvature))
    _, grads, captured = capture(params, *batch)
    state = tx.init(params)
    updates, after = tx.update(grads, state, params, captured=captured)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    found = (kflr if method == "kfac" else recursion)(net, params, batch)
    expected = {}
    for name, parts in found.items():
        s, gamma, g = parts
        k = damping * mean(s) * mean(gamma)
        pi = np.sqrt(mean(s) / mean(gamma))
        alone = np.linalg.solve(s + np.sqrt(k) * pi * np.eye(len(s)), g)
        if output_factor == "constant":
            expected[name] = alone / (np.sqrt(k) / pi)
        else:
            length = np.linalg.norm(alone)
            model = np.linalg.norm(divided(parts, damping))
            expected[name] = alone * (model / length if length > 0 else 0.0)
    assert_blocks(net, updates, expected, 1e-7)


# --- batches and trees ---------------------------------------------------------------------------


def test_a_batch_that_is_not_finite_leaves_everything_as_it_was():
    net = DEEP
    params, (x, y) = net.params(), net.data()
    tx = scale_by_kfra(net.layers())
    _, before = step(net, tx, params, tx.init(params), (x, y))
    updates, after = step(net, tx, params, before, (x.at[0, 0].set(np.nan), y))
    chex.assert_trees_all_equal(updates, optax.tree.zeros_like(updates))
    chex.assert_trees_all_equal(after, one_more_refused(before))


def test_dead_layers_have_finite_updates():
    net = Net(widths=(3, 4, 2), transfers=("relu",), biases=(False, False), decay=0.1)
    params, (_, y) = net.params(), net.data()
    params["layer0"]["kernel"] = jnp.abs(params["layer0"]["kernel"])
    for x in (-jnp.ones((5, 3)), jnp.zeros((5, 3))):
        tx = scale_by_kfra(net.layers())
        updates, state = step(net, tx, params, tx.init(params), (x, y))
        chex.assert_tree_all_finite((updates, state))
        assert max(np.abs(u).max() for u in jax.tree.leaves(updates)) < 10


THREE = Net(widths=(3, 4, 4, 2), transfers=("tanh", "sigmoid"), biases=(True,) * 3)


@pytest.mark.parametrize(
    "masked", [[("layer0", "kernel"), ("layer0", "bias")], [("layer2", "bias")]]
)
def test_masked_parameters_that_the_recursion_does_not_need(masked):
    net = THREE
    params, batch = net.params(), net.data()
    kept = {n: {part: (n, part) not in masked for part in params[n]} for n in net.names}
    tx = optax.masked(scale_by_kfra(net.layers(), damping=0.1), kept)
    updates, _ = step(net, tx, params, tx.init(params), batch)
    expected = {}
    for name, (s, gamma, g) in recursion(net, params, batch).items():
        expected[name] = g.copy()
        if kept[name]["kernel"]:
            inside = slice(0, len(g) if kept[name]["bias"] else len(g) - 1)
            expected[name][inside] = divided((s[inside, inside], gamma, g[inside]), 0.1)
    assert_blocks(net, updates, expected, 1e-8)


def test_a_masked_kernel_in_the_way_is_an_error_that_names_it():
    net = THREE
    params = net.params()
    kept = {name: name != "layer1" for name in net.names}
    tx = optax.masked(scale_by_kfra(net.layers()), kept)
    with pytest.raises(ValueError, match="kernels of all layers above, but that of layer1 is mask"):
        step(net, tx, params, tx.init(params), net.data())


def test_parameters_keep_their_dtype():
    net = DEEP
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), net.params())
    batch = jax.tree.map(lambda a: a.astype(jnp.bfloat16), net.data())
    tx = scale_by_kfra(net.layers(), output_factor="norm")
    updates, state = step(net, tx, params, tx.init(params), batch)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    assert {s.dtype for s in jax.tree.leaves(state.statistics)} == {jnp.dtype(jnp.float32)}
    chex.assert_tree_all_finite(updates)


# --- errors --------------------------------------------------------------------------------------

X = jnp.ones((4, 3))
KERNELS = {n: jnp.ones((3, 3)) for n in ("a", "b", "c")}


def loss_of(network):
    def loss(params, x):
        return optax.l2_loss(network(x, *params.values())).sum(-1).mean()

    return loss


@pytest.mark.parametrize(
    "network, message",
    [
        (lambda x, a, b, c: jnp.tanh(x @ a) @ b + x @ c, "feeds the loss and not"),
        (lambda x, a, b, c: (jnp.tanh(x @ a) + x) @ b @ c, "feeds b is not the outputs of a"),
        (lambda x, a, b, c: jax.nn.softmax(x @ a @ b) @ c, "feeds c is not the outputs of b"),
        (lambda x, a, b, c: (h := jnp.tanh(x @ a)) @ b @ c + h, "of a also reach the loss past"),
        (lambda x, a, b, c: (h := jnp.tanh(x @ a @ b)) @ c + h, "of b also reach the loss past"),
    ],
)
def test_networks_that_are_no_chain_are_refused_where_they_break(network, message):
    layers = lp.find_layers(loss_of(network), KERNELS, X)
    with pytest.raises(ValueError, match=rf"`scale_by_kfra` needs .*({message}).*scale_by_kfac"):
        scale_by_kfra(layers)


def test_two_layers_on_the_same_inputs_are_no_chain():
    def network(x, a, b, c):
        h = jnp.tanh(x @ a)
        return (h @ b) * (h @ c)

    layers = lp.find_layers(loss_of(network), KERNELS, X)
    with pytest.raises(ValueError, match="b feeds the loss and not c"):
        scale_by_kfra(layers)


def test_a_transfer_function_of_rows_is_an_error_that_names_its_layer():
    layers = DEEP.layers(transfer={"layer0": jax.nn.softmax})
    with pytest.raises(ValueError, match=r"by entries, but that of layer0 is softmax.*scale_by_kf"):
        scale_by_kfra(layers)


def test_what_is_missing_at_update_is_an_error_with_the_remedy():
    net = DEEP
    params = net.params()
    tx = scale_by_kfra(net.layers())
    for curvature, values, error, message in (
        (None, params, ValueError, 'not captured.*curvature="ggn_output"'),
        (CURVATURE, None, TypeError, "`scale_by_kfra` needs the parameters"),
    ):
        capture = lp.value_grad_and_capture(net.loss, curvature=curvature)
        _, grads, captured = capture(params, *net.data())
        with pytest.raises(error, match=message):
            tx.update(grads, tx.init(params), values, captured=captured)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"damping": -1.0}, "`damping` must not be negative"),
        ({"decay": 1.0}, "`decay`"),
        ({"inverse_period": 0}, "`inverse_period`.*whole"),
        ({"output_factor": "drop"}, "`output_factor` is 'keep', 'constant' or 'norm', got 'drop'"),
        ({"output_factor": "norm", "exact_damping": True}, "'norm'.*`exact_damping=False`"),
    ],
)
def test_arguments_are_checked_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        scale_by_kfra(DEEP.layers(), **options)
