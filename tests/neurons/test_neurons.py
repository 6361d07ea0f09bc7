"""Gradient descent on neurons and Linear Neuron Boosting, against dense mathematics."""

import functools
from typing import Any

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
from locoprop_jax._neurons.layer_system import layer_metric, metric_flops
from tests.dense_nets import (
    DEEP,
    Net,
    assert_blocks,
    assert_equal_to_rounding,
    nets,
    one_more_refused,
    update_function,
)

FEW_ROWS = Net(widths=(9, 6, 2), transfers=("tanh",), biases=(True, False), batch=3)


def gradients(net, params, batch):
    """The rows with their one, and the gradient of the loss, by layer."""
    inputs = [x for x, *_ in net.backprop(params, *batch)]
    slopes = net.gradients(params, *batch)
    return {name: (x, slopes[name]) for name, x in zip(net.names, inputs, strict=True)}


def damped(second, damping, relative=False, free_bias=False, bias=False):
    """Damping in units of the mean variance of the inputs, mean square without a bias."""
    size = len(second) - bias
    squares = np.diag(second)[:size]
    variances = squares - (second[-1, :size] ** 2 if bias else 0)
    unit = np.where(variances > 1e-14 * squares, variances, 0).mean()
    diagonal = np.full(len(second), damping * (unit if relative and unit > 0 else 1.0))
    if free_bias:
        diagonal[-1] = 0
    return second + np.diag(diagonal)


def foof_blocks(net, params, batch, damping, relative=False, damp_bias=True):
    result = {}
    for (name, (x, g)), bias in zip(gradients(net, params, batch).items(), net.biases, strict=True):
        system = damped(x.T @ x / len(x), damping, relative, bias and not damp_bias, bias)
        result[name] = np.linalg.solve(system, g)
    return result


def direction(net, tx, params=None, batch=None, state=None):
    params = net.params() if params is None else params
    batch = net.data() if batch is None else batch
    state = tx.init(params) if state is None else state
    return update_function(net, tx)(params, state, *batch)


# --- FOOF ----------------------------------------------------------------------------------------


@settings(max_examples=6)
@given(
    net=nets(),
    damping=st.floats(0.01, 2),
    relative=st.booleans(),
    damp_bias=st.booleans(),
    decay=st.sampled_from([0.0, 0.95]),
    period=st.sampled_from([1, 3]),
    seed=st.integers(0, 99),
)
def test_a_foof_step_solves_with_the_inputs_second_moment(
    net, damping, relative, damp_bias, decay, period, seed
):
    tx = lp.scale_by_foof(
        net.layers(),
        damping=damping,
        relative=relative,
        damp_bias=damp_bias,
        decay=decay,
        inverse_period=period,
    )
    params, batch = net.params(seed), net.data(seed)
    expected = foof_blocks(net, params, batch, damping, relative, damp_bias)
    assert_blocks(net, direction(net, tx, params, batch)[0], expected, 1e-8)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("damp_bias", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_batch_of_few_rows_is_solved_by_its_rows(relative, damp_bias, decay, monkeypatch):
    net = Net(**{**vars(FEW_ROWS), "decay": decay})
    sizes = []
    solve = _linalg.solve

    def recorded(matrix, right):
        sizes.append(len(matrix))
        return solve(matrix, right)

    monkeypatch.setattr(_linalg, "solve", recorded)
    options = {"damping": 0.3, "relative": relative, "damp_bias": damp_bias}
    tx = lp.scale_by_foof(net.layers(), decay=0.0, **options)
    updates, _ = direction(net, tx)
    expected = foof_blocks(net, net.params(), net.data(), **options)
    assert_blocks(net, updates, expected)
    assert sizes == [4 if damp_bias else 3, 3]


def test_statistics_are_averaged_and_inverted_when_they_are_due():
    """Algorithm 1 in NumPy: forgetting counted in steps, more inversions among the first T."""
    net, period, gathering, decay, damping = DEEP, 6, 2, 0.8, 0.1
    tx = lp.scale_by_foof(
        net.layers(),
        damping=damping,
        relative=False,
        damp_bias=True,
        decay=decay,
        inverse_period=period,
        statistics_steps=gathering,
    )
    update = update_function(net, tx)
    params, state = net.params(), tx.init(net.params())
    total = dict.fromkeys(net.names, 0.0)
    inverse, last = {}, 0
    for step in range(15):
        batch = net.data(step)
        due = step in (0, 1, 2, 4, 6, 12)
        if due or step in (5, 11):
            kept, last = decay ** (step + 1 - last), step + 1
            for name, (x, _) in gradients(net, params, batch).items():
                total[name] = kept * total[name] + (1 - kept) * x.T @ x / len(x)
        if due:
            for name in net.names:
                mean = total[name] / (1 - decay**last)
                inverse[name] = np.linalg.inv(mean + damping * np.eye(len(mean)))
        updates, state = update(params, state, *batch)
        slopes = gradients(net, params, batch)
        assert_blocks(net, updates, {n: inverse[n] @ slopes[n][1] for n in net.names})
    assert (state.count, state.gathered, state.failures) == (15, 13, 0)


def test_one_step_periods_average_as_amortised_ones_that_gather_always():
    net = DEEP
    every = lp.scale_by_foof(net.layers(), decay=0.9)
    amortised = lp.scale_by_foof(net.layers(), decay=0.9, inverse_period=4, statistics_steps=4)
    steps = [update_function(net, tx) for tx in (every, amortised)]
    states: list = [tx.init(net.params()) for tx in (every, amortised)]
    for step in range(5):
        results = [
            update(net.params(), state, *net.data(step))
            for update, state in zip(steps, states, strict=True)
        ]
        states = [state for _, state in results]
        if step in (0, 1, 2, 4):  # where both invert
            assert_equal_to_rounding(results[0][0], results[1][0])
    assert_equal_to_rounding(states[0].statistics, states[1].statistics)


def test_weights_shared_over_positions_may_be_reduced():
    net = Net(widths=(3, 2), biases=(True,), batch=5, tokens=4)
    tx = lp.scale_by_foof(
        net.layers(), damping=0.2, relative=False, damp_bias=True, decay=0.0, shared="reduce"
    )
    x = np.asarray(net.data()[0]).mean(1)
    x = np.concatenate([x, np.ones((5, 1))], 1)
    (_, g) = gradients(net, net.params(), net.data())["layer0"]
    expected = np.linalg.solve(x.T @ x / 5 + 0.2 * np.eye(4), g)
    assert_blocks(net, direction(net, tx)[0], {"layer0": expected})


def test_benzings_toy_reaches_the_optimum_of_both_points_in_one_step():
    """Appendix F: no bias, no damping, learning rate one."""
    x, y = jnp.asarray([[3.0, 1.0], [1.0, 0.0]]), jnp.asarray([[1.0], [-1.0]])
    params = {"w": jnp.zeros((2, 1))}

    def loss_fn(params, x):
        return optax.l2_loss(x @ params["w"], y).mean()

    layers = lp.find_layers(loss_fn, params, x)
    _, grads, captured = lp.value_grad_and_capture(loss_fn)(params, x)
    for tx in (
        lp.scale_by_foof(layers, damping=0.0, decay=0.0),
        lp.scale_by_foof(layers, damping=0.0, relative=False, inverse_period=5),
    ):
        updates: Any = tx.update(grads, tx.init(params), params, captured=captured)[0]
        np.testing.assert_allclose(-updates["w"][:, 0], [-1, 4], rtol=1e-9)
        assert loss_fn({"w": -updates["w"]}, x) < 1e-18
    np.testing.assert_allclose(grads["w"][:, 0], [-1, -0.5])  # gradient descent harms the second


def test_a_failed_factorisation_is_counted_and_keeps_the_last_inverse(monkeypatch):
    net = DEEP
    tx = lp.scale_by_foof(net.layers(), inverse_period=2)
    updates, state = direction(net, tx)
    inverse = _linalg.inverse
    broken = {len(state.statistics["layer0"].mean)}
    monkeypatch.setattr(
        _linalg, "inverse", lambda m: inverse(m) * (np.nan if len(m) in broken else 1)
    )
    updates, after = direction(net, tx, batch=net.data(7), state=state)
    assert after.failures == 1
    same = [
        np.array_equal(after.inverse[name].kernel, state.inverse[name].kernel) for name in net.names
    ]
    assert same == [True, False]
    chex.assert_tree_all_finite(updates)

    solve = _linalg.solve
    monkeypatch.setattr(_linalg, "solve", lambda m, r: solve(m, r) * np.nan)
    updates, state = direction(net, lp.scale_by_foof(net.layers()))
    assert state.failures == 2
    chex.assert_trees_all_equal(updates, optax.tree.zeros_like(updates))


# --- oracle 6: equivalences ----------------------------------------------------------------------


@settings(max_examples=4)
@given(net=nets(), damping=st.floats(0.05, 2), alpha=st.floats(0.01, 1), seed=st.integers(0, 99))
def test_foof_is_locoprop_s_solved_exactly(net, damping, alpha, seed):
    rows = net.batch * (net.tokens or 1)
    local = lp.scale_by_local_loss(
        net.layers(),
        1 / (damping * rows),
        gamma=alpha * rows,
        regularizer=lp.l2(),
        solver=lp.exact(),
    )
    foof = lp.scale_by_foof(
        net.layers(), damping=damping, relative=False, damp_bias=True, decay=0.0
    )
    params, batch = net.params(seed), net.data(seed)
    expected, _ = direction(net, local, params, batch)
    updates, _ = direction(net, foof, params, batch)
    assert_equal_to_rounding(jax.tree.map(lambda u: alpha * u, updates), expected, 1e-8)


@settings(max_examples=4)
@given(net=nets(), ridge=st.floats(0.05, 2), online=st.booleans(), seed=st.integers(0, 99))
def test_boosting_solved_to_the_end_is_foof_with_a_metric_step(net, ridge, online, seed):
    foof = lp.scale_by_metric_norm(
        lp.scale_by_foof(net.layers(), damping=ridge, relative=False, damp_bias=False, decay=0.0),
        floor=1e-12,
    )
    boosting = lp.scale_by_lnb(
        net.layers(), ridge=ridge, relative=False, iterations=60, online=online, floor=1e-12
    )
    params, batch = net.params(seed), net.data(seed)
    expected, _ = direction(net, foof, params, batch)
    updates, _ = direction(net, boosting, params, batch)
    assert_equal_to_rounding(updates, expected, 1e-6)


# --- the metric step -----------------------------------------------------------------------------


@settings(max_examples=4)
@given(net=nets(), scale=st.floats(0.1, 10), seed=st.integers(0, 99))
def test_a_metric_step_has_length_one_in_its_metric(net, scale, seed):
    params, batch = net.params(seed), net.data(seed)
    foof = lp.scale_by_foof(net.layers(), damping=0.1, relative=False, damp_bias=True, decay=0.0)
    updates, _ = direction(net, lp.scale_by_metric_norm(foof, floor=1e-12), params, batch)
    squared = 0.0
    for name, (x, g) in gradients(net, params, batch).items():
        u = net.block(updates, name)
        assert np.sum(u * g) >= -1e-12
        squared += np.sum((x @ u) ** 2) / len(x) + 0.1 * np.sum(u**2)
    is_flat = not any(np.any(g) for _, g in gradients(net, params, batch).values())
    np.testing.assert_allclose(squared, 0 if is_flat else 1, rtol=1e-6)  # a softmax of one output

    scaled = optax.chain(optax.scale(scale), lp.scale_by_metric_norm(foof, floor=1e-12))
    assert_equal_to_rounding(direction(net, scaled, params, batch)[0], updates, 1e-6)


def test_below_the_floor_steps_shrink_with_the_gradient():
    g = {"w": jnp.asarray([3.0, 4.0])}
    for floor, expected in ((1e-4, [0.6, 0.8]), (2500.0, [0.06, 0.08])):
        tx = lp.scale_by_metric_norm(optax.identity(), floor=floor)
        updates: Any = tx.update(g, tx.init(g))[0]
        np.testing.assert_allclose(updates["w"], expected)


def test_what_does_not_descend_is_not_followed():
    g = {"w": jnp.asarray([3.0, 4.0])}
    for inner in (optax.scale(-1.0), optax.set_to_zero()):
        tx = lp.scale_by_metric_norm(inner)
        np.testing.assert_array_equal(tx.update(g, tx.init(g))[0]["w"], [0, 0])


# --- boosting: conjugate gradient and its preconditioner -----------------------------------------


def reference_metric(x, ridge, bias):
    return damped(x.T @ x / len(x), ridge, free_bias=bias)


def reference_preconditioner(mean, second, ridge, bias, shrinkage=0.0):
    """W W' of section 3.3, with the covariance's diagonal."""
    variance = second - mean**2
    variance = (1 - shrinkage) * variance + shrinkage * variance.mean()
    if not bias:
        return np.diag(1 / (variance + mean**2 + ridge))
    root = np.diag((variance + ridge) ** -0.5)
    w = np.block([[root, np.zeros((len(mean), 1))], [-mean[None] @ root, np.ones((1, 1))]])
    return w @ w.T


def reference_cg(system, preconditioner, g, start, iterations):
    """Preconditioned conjugate gradient for each column, from the best multiple of the start."""
    columns = []
    for j in range(g.shape[1]):
        right, x0 = g[:, j], start[:, j]
        curvature = x0 @ system @ x0
        x = x0 * max(0.0, x0 @ right) / curvature if curvature > 0 else 0 * x0
        r = right - system @ x
        p = z = preconditioner @ r
        for _ in range(iterations):
            size = r @ z
            if size < 1e-28:
                break
            step = size / (p @ system @ p)
            x, r = x + step * p, r - step * (system @ p)
            z = preconditioner @ r
            p = z + (r @ z) / size * p
        columns.append(x)
    return np.stack(columns, 1)


@pytest.mark.parametrize("batch", [3, 40])  # by products with the inputs, and with their gram
@pytest.mark.parametrize("shrinkage", [0.0, 0.3])
def test_boosting_is_algorithm_2_with_steps_of_its_own_for_each_output(batch, shrinkage):
    ridge, decay, floor = 0.2, 0.7, 1e-3
    net = Net(widths=(4, 5, 3), transfers=("tanh",), biases=(True, False), batch=batch)
    tx = lp.scale_by_lnb(
        net.layers(),
        ridge=ridge,
        relative=False,
        moment_decay=decay,
        shrinkage=shrinkage,
        floor=floor,
    )
    update = update_function(net, tx)
    params, state = net.params(), tx.init(net.params())
    thetas = {name: np.zeros_like(net.block(params, name)) for name in net.names}
    means, seconds = dict.fromkeys(net.names, 0.0), dict.fromkeys(net.names, 0.0)
    for step in range(4):
        batch_of_step = net.data(step)
        z = 0.0
        for (name, (x, g)), bias in zip(
            gradients(net, params, batch_of_step).items(), net.biases, strict=True
        ):
            inputs = x[:, : net.widths[net.names.index(name)]]
            means[name] = decay * means[name] + (1 - decay) * inputs.mean(0)
            seconds[name] = decay * seconds[name] + (1 - decay) * (inputs**2).mean(0)
            weight = 1 - decay ** (step + 1)
            preconditioner = reference_preconditioner(
                means[name] / weight, seconds[name] / weight, ridge, bias, shrinkage
            )
            system = reference_metric(x, ridge, bias)
            thetas[name] = reference_cg(system, preconditioner, g, thetas[name], 2)
            z += np.sum(thetas[name] * (system @ thetas[name]))
            assert np.sum(thetas[name] * g) >= 0
        updates, state = update(params, state, *batch_of_step)
        expected = {name: theta / np.sqrt(max(z, floor)) for name, theta in thetas.items()}
        assert_blocks(net, updates, expected, 1e-8)


def test_the_metric_is_applied_in_the_way_of_fewest_flops():
    assert metric_flops(10, 20, 30, 3) == {
        "direct": 3 * 2 * (2 * 10 * 20 * 30),
        "gram": 2 * 10 * 20**2 + 3 * 2 * 20**2 * 30,
    }


@pytest.mark.parametrize("rows, d_in, has_gram", [(200, 5, True), (3, 50, False)])
def test_the_gram_is_formed_where_that_is_cheaper(rows, d_in, has_gram):
    x, like = jnp.ones((rows, d_in)), {"kernel": jnp.ones((d_in, 4))}
    metric = jax.make_jaxpr(lambda v: layer_metric(x, v, jnp.asarray(0.0), 3)(v))(like)
    shapes = {v.aval.shape for equation in metric.eqns for v in equation.outvars}
    assert ((d_in, d_in) in shapes) == has_gram


def test_a_fraction_of_the_rows_makes_the_metric():
    net = Net(widths=(3, 2), biases=(True,), batch=10)
    options = {"ridge": 0.3, "relative": False, "iterations": 20, "online": False, "floor": 1e-12}
    tx = lp.scale_by_lnb(net.layers(), fraction=0.5, **options)
    (x, g) = gradients(net, net.params(), net.data())["layer0"]
    theta = np.linalg.solve(reference_metric(x[:5], 0.3, True), g)
    expected = theta / np.sqrt(np.sum(theta * g))
    assert_blocks(net, direction(net, tx)[0], {"layer0": expected}, 1e-8)


def test_parameters_in_no_layer_have_the_identity_for_a_metric():
    params = {"w": jnp.asarray([[1.0, 2.0], [0.5, -1.0]]), "scale": jnp.asarray([2.0, 3.0])}
    x = jnp.asarray([[1.0, 2.0], [0.0, -1.0], [2.0, 0.5]])

    def loss_fn(params, x):
        return jnp.sum((jnp.tanh(x @ params["w"]) - params["scale"][None]) ** 2)

    layers = lp.find_layers(loss_fn, params, x, on_uncaptured="pass")
    _, grads, captured = lp.value_grad_and_capture(loss_fn)(params, x)
    tx = lp.scale_by_lnb(layers, ridge=0.1, relative=False, iterations=20, online=False)
    updates, _ = tx.update(grads, tx.init(params), params, captured=captured)
    x = np.asarray(x)
    theta = np.linalg.solve(x.T @ x / 3 + 0.1 * np.eye(2), grads["w"])
    z = np.sum(theta * np.asarray(grads["w"])) + np.sum(np.asarray(grads["scale"]) ** 2)
    assert_equal_to_rounding(
        updates, {"w": theta / np.sqrt(z), "scale": grads["scale"] / np.sqrt(z)}, 1e-8
    )


# --- oracle 7: invariances -----------------------------------------------------------------------


def trajectory(tx_of, transform, kernel_of, steps=5, bias=True):
    """The outputs of a layer and a second one while they train on transformed inputs.

    `transform` maps inputs; `kernel_of` maps the first block so that the outputs start equal.
    """
    rng = np.random.default_rng(3)
    x = rng.uniform(size=(12, 4)) * np.asarray([1.0, 0.1, 3.0, 1.0]) + 0.3
    first, second = rng.normal(size=(5, 6)), rng.normal(size=(7, 2))
    y = jnp.asarray(rng.normal(size=(12, 2)))
    first = kernel_of(first)
    params = {
        "a": {"kernel": jnp.asarray(first[:-1]), "bias": jnp.asarray(first[-1])},
        "b": {"kernel": jnp.asarray(second[:-1]), "bias": jnp.asarray(second[-1])},
    }

    def outputs(params, x):
        hidden = jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"][None])
        return hidden @ params["b"]["kernel"] + params["b"]["bias"][None]

    def loss_fn(params, x):
        return optax.l2_loss(outputs(params, x), y).sum(-1).mean()

    x = jnp.asarray(transform(x))
    tx = tx_of(lp.find_layers(loss_fn, params, x))
    state, result = tx.init(params), []

    @jax.jit
    def step(params, state):
        _, grads, captured = lp.value_grad_and_capture(loss_fn)(params, x)
        updates, state = tx.update(grads, state, params, captured=captured)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
        result.append(np.asarray(outputs(params, x)))
    return np.stack(result)


def affine(a, shift):
    """x -> x a + shift, and the block that undoes it."""

    def kernel_of(block):
        kernel = np.linalg.solve(a, block[:-1])
        return np.concatenate([kernel, (block[-1] - shift @ kernel)[None]])

    return (lambda x: x @ a + shift), kernel_of


ROTATION = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))[0]
SIGNED_PERMUTATION = np.eye(4)[[2, 0, 3, 1]] * np.asarray([1.0, -1.0, -1.0, 1.0])
ANY_MAP = np.random.default_rng(2).normal(size=(4, 4)) + 2 * np.eye(4)
SHIFT = np.asarray([0.5, -1.0, 2.0, 0.1])
TRUNCATED = functools.partial(
    lp.lnb, learning_rate=0.05**0.5, unit="joint", momentum=0.5, ridge=1.0
)
CONVERGED = functools.partial(TRUNCATED, iterations=40)
BY_NEURON = {"learning_rate": 0.1, "unit": "neuron"}


@pytest.mark.parametrize(
    "tx_of, transform",
    [
        (TRUNCATED, affine(-np.eye(4), np.ones(4))),
        (functools.partial(TRUNCATED, relative=False), affine(-np.eye(4), np.ones(4))),
        (TRUNCATED, affine(3 * SIGNED_PERMUTATION, SHIFT)),  # a relative ridge scales along
        (CONVERGED, affine(ROTATION, SHIFT)),
        (functools.partial(CONVERGED, ridge=0.0), affine(ANY_MAP, SHIFT)),
        (functools.partial(TRUNCATED, **BY_NEURON), affine(3 * SIGNED_PERMUTATION, SHIFT)),
        (functools.partial(CONVERGED, ridge=0.0, **BY_NEURON), affine(ANY_MAP, SHIFT)),
    ],
    ids=[
        "inverted",
        "inverted, absolute",
        "scaled",
        "rotated",
        "affine",
        "scaled, by neuron",
        "affine, by neuron",
    ],
)
def test_boosting_does_not_depend_on_how_inputs_are_written(tx_of, transform):
    plain = trajectory(tx_of, *affine(np.eye(4), np.zeros(4)))
    np.testing.assert_allclose(trajectory(tx_of, *transform), plain, rtol=1e-6, atol=1e-7)
    assert np.abs(plain[-1] - plain[0]).max() > 0.05  # it did move


@pytest.mark.parametrize(
    "tx_of, transform",
    [
        (TRUNCATED, affine(ROTATION, SHIFT)),
        (CONVERGED, affine(ANY_MAP, SHIFT)),
        (functools.partial(TRUNCATED, relative=False), affine(3 * np.eye(4), SHIFT)),
    ],
    ids=["rotated, truncated", "affine, with a ridge", "scaled, absolute ridge"],
)
def test_invariances_that_boosting_does_not_have(tx_of, transform):
    plain = trajectory(tx_of, *affine(np.eye(4), np.zeros(4)))
    assert np.abs(trajectory(tx_of, *transform) - plain).max() > 1e-4


def test_one_boosting_step_is_a_gradient_step_with_whitened_inputs():
    """Section 3.3: f(x; W theta) = theta' (Sigma^-1/2 (x - mu), 1)."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 4)) @ ANY_MAP + SHIFT, rng.normal(size=(30, 2))
    mean = x.mean(0)
    values, vectors = np.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    whitened = np.concatenate([(x - mean) @ root, np.ones((30, 1))], 1)
    block = rng.normal(size=(5, 2))
    residual = np.concatenate([x, np.ones((30, 1))], 1) @ block - y
    g = whitened.T @ residual / 30  # the gradient of the reparameterised model
    moved = whitened @ g / np.sqrt(np.sum(g**2))

    params = {"kernel": jnp.asarray(block[:-1]), "bias": jnp.asarray(block[-1])}

    def loss_fn(params, x):
        outputs = x @ params["kernel"] + params["bias"][None]
        return optax.l2_loss(outputs, jnp.asarray(y)).sum(-1).mean()

    layers = lp.find_layers(loss_fn, params, jnp.asarray(x))
    _, grads, captured = lp.value_grad_and_capture(loss_fn)(params, jnp.asarray(x))
    tx = lp.scale_by_lnb(layers, ridge=0.0, iterations=30, online=False)
    updates, _ = tx.update(grads, tx.init(params), params, captured=captured)
    change = x @ np.asarray(updates["kernel"]) + np.asarray(updates["bias"])
    np.testing.assert_allclose(change, moved, rtol=1e-8, atol=1e-10)


# --- the aliases ---------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["neuron", "joint"])
@pytest.mark.parametrize("alias", [lp.foof, lp.lnb])
def test_the_learning_rate_and_its_schedule_are_the_length(alias, unit):
    net = Net(widths=(3, 2), biases=(True,))

    def updates(rate):
        return direction(net, alias(net.layers(), rate, unit=unit))[0]

    scheduled = updates(lambda count: 3.0 - count.astype(float))
    assert_equal_to_rounding(scheduled, jax.tree.map(lambda u: 3 * u, updates(1.0)), 1e-6)


@pytest.mark.parametrize("alias", [lp.foof, lp.lnb])
def test_weights_decay_by_the_learning_rate(alias):
    net = Net(widths=(3, 2), biases=(True,))
    plain, _ = direction(net, alias(net.layers(), 0.25))
    decayed, _ = direction(net, alias(net.layers(), 0.25, weight_decay=0.1))
    expected = jax.tree.map(lambda u, p: u - 0.25 * 0.1 * p, plain, net.params())
    assert_equal_to_rounding(decayed, expected)


def test_of_joint_length_both_take_the_papers_step():
    """For a step of size eps: the root of eps, along d / sqrt(z) with z of all layers together."""
    net, eps, damping = DEEP, 0.3, 0.2
    options = {"unit": "joint", "relative": False, "momentum": 0.0, "floor": 1e-12}
    foof = lp.foof(net.layers(), eps**0.5, damping=damping, decay=0.0, **options)
    lnb = lp.lnb(net.layers(), eps**0.5, ridge=damping, iterations=30, online=False, **options)
    d = foof_blocks(net, net.params(), net.data(), damping, damp_bias=False)
    g = gradients(net, net.params(), net.data())
    z = sum(np.sum(d[name] * g[name][1]) for name in d)
    expected = {name: -((eps / z) ** 0.5) * d[name] for name in d}
    for tx in (foof, lnb):
        assert_blocks(net, direction(net, tx)[0], expected, 1e-8)


@pytest.mark.parametrize(
    "make",
    [
        lambda layers: lp.foof(layers, inverse_period=2),
        lambda layers: lp.scale_by_foof(layers, decay=0.0),
        lp.lnb,
    ],
    ids=["foof", "foof of the batch", "lnb"],
)
def test_layers_solved_at_once_end_where_those_solved_apart_do(make, monkeypatch):
    net = Net(widths=(3, 4, 4, 4, 2), transfers=("tanh",) * 3, biases=(True, True, True, False))
    apart = direction(net, make(net.layers()))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    mapped, vmap = [], jax.vmap
    monkeypatch.setattr(jax, "vmap", lambda *a, **k: mapped.append(a) or vmap(*a, **k))
    assert_equal_to_rounding(direction(net, make(net.layers())), apart)
    assert mapped


# --- robustness ----------------------------------------------------------------------------------

METHODS = {
    "foof": lambda layers: lp.foof(layers, inverse_period=2),
    "foof, every step": lambda layers: lp.foof(layers, inverse_period=1),
    "foof, undamped": lambda layers: lp.foof(layers, damping=0.0, inverse_period=2),
    "foof, batch": lambda layers: lp.scale_by_foof(layers, decay=0.0),
    "foof, by layer": lambda layers: lp.foof(layers, unit="layer"),
    "foof, joint": lambda layers: lp.foof(layers, unit="joint"),
    "lnb": lp.lnb,
    "lnb, joint": lambda layers: lp.lnb(layers, unit="joint"),
    "lnb, no ridge": lambda layers: lp.lnb(layers, ridge=0.0, iterations=8),
    "lnb, batch": lambda layers: lp.lnb(layers, online=False, iterations=8),
}
RNG = np.random.default_rng(5)
INPUTS = {
    "constant columns": np.concatenate([RNG.normal(size=(8, 2)), np.ones((8, 3))], 1),
    "zeros": np.zeros((8, 5)),
    "the same row": np.broadcast_to(RNG.normal(size=(1, 5)), (8, 5)),
    "condition 1e10": RNG.normal(size=(8, 5)) * np.logspace(0, -10, 5),
    "dead units": RNG.normal(size=(8, 5)) - 100,  # every relu is off
    "large": 1e6 * RNG.normal(size=(8, 5)),
}


def relu_net(dtype):
    params = {
        "a": {"kernel": jnp.ones((5, 4), dtype) / 2, "bias": jnp.zeros(4, dtype)},
        "b": {"kernel": jnp.ones((4, 2), dtype), "bias": jnp.zeros(2, dtype)},
    }

    def loss_fn(params, x):
        hidden = jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"][None])
        outputs = hidden @ params["b"]["kernel"] + params["b"]["bias"][None]
        return optax.l2_loss(outputs, jnp.ones_like(outputs)).sum(-1).mean()

    return params, loss_fn


def relu_step(method, rows):
    params, loss_fn = relu_net(jnp.float32)
    tx = METHODS[method](lp.find_layers(loss_fn, params, jnp.ones((rows, 5), jnp.float32)))

    @jax.jit
    def step(params, state, x):
        _, grads, captured = lp.value_grad_and_capture(loss_fn)(params, x)
        updates, state = tx.update(grads, state, params, captured=captured)
        return optax.apply_updates(params, updates), state, updates

    return tx, step


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("method", METHODS)
def test_degenerate_inputs_give_finite_updates_in_float32(method, rows):
    tx, step = relu_step(method, rows)  # compiled once for all of them
    for name, inputs in INPUTS.items():
        x = jnp.asarray(inputs[:rows], jnp.float32)
        params, _ = relu_net(jnp.float32)
        state = tx.init(params)
        for _ in range(4):
            params, state, updates = step(params, state, x)
            chex.assert_tree_all_finite({name: (updates, state)})


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_that_is_not_finite_leaves_everything_as_it_was(method):
    x = jnp.asarray(INPUTS["constant columns"], jnp.float32)
    tx, step = relu_step(method, len(x))
    params, _ = relu_net(jnp.float32)
    params, before, _ = step(params, tx.init(params), x)
    for value in (np.nan, np.inf):
        _, after, updates = step(params, before, x.at[0, 0].set(value))
        chex.assert_trees_all_equal(updates, optax.tree.zeros_like(updates))
        kept = before
        if not isinstance(after, lp.FoofState):  # a chain: its last part counts for a schedule
            after, kept = after[:-1], before[:-1]
        chex.assert_trees_all_equal(after, one_more_refused(kept))


@pytest.mark.parametrize("method", METHODS)
def test_dead_layers_do_not_turn_weight_decay_in_the_loss_into_large_steps(method):
    params, loss_fn = relu_net(jnp.float32)

    def decayed(params, x):
        return loss_fn(params, x) + sum(jnp.sum(p**2) for p in jax.tree.leaves(params))

    x = jnp.zeros((8, 5), jnp.float32)
    tx = METHODS[method](lp.find_layers(decayed, params, x))
    _, grads, captured = lp.value_grad_and_capture(decayed)(params, x)
    updates, state = tx.update(grads, tx.init(params), params, captured=captured)
    chex.assert_tree_all_finite((updates, state))
    if "undamped" not in method:
        assert max(np.abs(u).max() for u in jax.tree.leaves(updates)) < 10


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda layers: lp.scale_by_foof({}), "`scale_by_foof` needs the layers"),
        (lambda layers: lp.scale_by_foof(layers, damping=-1.0), "`damping`.*negative"),
        (lambda layers: lp.scale_by_foof(layers, decay=1.0), "`decay`.*below 1"),
        (lambda layers: lp.scale_by_foof(layers, inverse_period=0), "`inverse_period`.*whole"),
        (lambda layers: lp.foof(layers, statistics_steps=21), "`statistics_steps`.*the 20"),
        (lambda layers: lp.scale_by_foof(layers, shared="sum"), '"expand" or "reduce"'),
        (lambda layers: lp.foof(layers, momentum=1.0), "`momentum`"),
        (lambda layers: lp.foof(layers, -1.0), "`learning_rate`.*negative"),
        (lambda layers: lp.foof(layers, floor=-1.0), "`floor`.*negative"),
        (lambda layers: lp.foof(layers, unit="joint", floor=0.0), "`floor`.*positive"),
        (lambda layers: lp.foof(layers, unit="row"), "`unit`.*'neuron', 'layer', 'joint'.*'row'"),
        (lambda layers: lp.lnb(layers, unit="row"), "`unit`.*'neuron', 'layer', 'joint'.*'row'"),
        (
            lambda layers: lp.scale_by_output_rms(layers, optax.identity(), unit="joint"),
            "`unit` is one of 'neuron', 'layer', got 'joint'",
        ),
        (
            lambda layers: lp.scale_by_output_rms({}, optax.identity()),
            "`scale_by_output_rms` needs the layers",
        ),
        (lambda layers: lp.scale_by_lnb({}), "`scale_by_lnb` needs the layers"),
        (lambda layers: lp.lnb(layers, ridge=-0.1), "`ridge`.*negative"),
        (lambda layers: lp.lnb(layers, iterations=0), "`iterations`.*whole"),
        (lambda layers: lp.lnb(layers, moment_decay=-0.1), "`moment_decay`"),
        (lambda layers: lp.lnb(layers, shrinkage=1.1), "`shrinkage` must be from 0 to 1"),
        (lambda layers: lp.lnb(layers, fraction=0.0), "`fraction`"),
        (lambda layers: lp.lnb(layers, floor=-1.0), "`floor`"),
    ],
)
def test_arguments_are_checked_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make(DEEP.layers())
