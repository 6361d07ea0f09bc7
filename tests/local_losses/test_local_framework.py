"""Every divergence, target, regularizer and solver of local losses, against dense mathematics."""

import functools
import itertools

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
from locoprop_jax._local_losses import coordinates
from locoprop_jax._tracing.program import flatten
from tests.dense_nets import (
    DEEP,
    TRANSFERS,
    Net,
    assert_blocks,
    assert_equal_to_rounding,
    nets,
    one_more_refused,
    take_step,
    update_function,
)

DIVERGENCES = ("squared", "matching", "post_squared", "dual_matching")
DEEPER = Net(
    widths=(3, 5, 4, 2),
    transfers=("tanh", "softplus"),
    biases=(True, False, True),
    batch=7,
    decay=0.1,
)


def local_loss(net, eta, **options):
    local = lp.scale_by_local_loss(net.layers(), eta, **options)
    return optax.chain(local, optax.scale(-1.0))


def fisher(net, cotangents, damping):
    """The empirical second factor: cotangents carry 1/c of a mean over c terms, c c' carries c."""
    moment = net.terms * cotangents.T @ cotangents
    return moment + damping * np.eye(len(moment))


# --- oracle 2: one iteration is BackProp ---------------------------------------------------------


@settings(max_examples=4)
@given(
    net=nets(),
    divergence=st.sampled_from(DIVERGENCES),
    solver=st.sampled_from([lp.inner(optax.sgd, 1), lp.fixed_point(1), lp.anderson(1)]),
    gamma=st.floats(0, 10),
    eta=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_one_iteration_is_backprop(net, divergence, solver, gamma, eta, seed):
    options = {"gamma": gamma, "divergence": divergence, "regularizer": lp.l2(), "solver": solver}
    params, batch = net.params(seed), net.data(seed)
    new, _ = take_step(net, local_loss(net, eta, **options), params, batch)
    slopes = net.gradients(params, *batch)
    expected = {n: net.block(params, n) - eta * gamma * slopes[n] for n in net.names}
    assert_blocks(net, new, expected, 1e-9)


def test_a_learning_rate_of_zero_changes_nothing_whatever_the_solver():
    solvers = [lp.exact(), lp.conjugate_gradient(3), lp.fixed_point(3), lp.anderson(3)]
    for solver in solvers:
        tx = local_loss(DEEPER, 0.0, gamma=7.0, regularizer=lp.l2(), solver=solver)
        new, _ = take_step(DEEPER, tx)
        np.testing.assert_allclose(
            *(jax.flatten_util.ravel_pytree(p)[0] for p in (new, DEEPER.params())), atol=1e-9
        )


# --- divergences: the algorithms of the paper ----------------------------------------------------


def iterate(net, params, batch, divergence, eta, gamma, iterations, l2=0.0):
    """T plain iterations of Algorithms 1 to 4, with weight decay as gamma <Rg, W~>."""
    new = {}
    data = zip(net.names, net.backprop(params, *batch), net.after(params, *batch), strict=True)
    for i, (name, (x, a, e, f), (h, slope)) in enumerate(data):
        own = "squared" if i == len(net.names) - 1 and divergence != "matching" else divergence
        residual = {
            "squared": lambda at, a=a, e=e: at - a + gamma * e,
            "matching": lambda at, a=a, e=e, f=f: f(at) - f(a) + gamma * e,
            "post_squared": lambda at, a=a, h=h, f=f, s=slope: s(at) * (f(at) - f(a) + gamma * h),
            "dual_matching": lambda at, a=a, h=h, s=slope: s(at) * (at - a + gamma * h),
        }[own]
        start = w = net.block(params, name)
        for k in range(iterations):
            gradient = x.T @ residual(x @ w) + gamma * net.decay * start + l2 * (w - start)
            w = w - eta * max(1 - k / iterations, 1 / 4) * gradient
        new[name] = w
    return new


@settings(max_examples=6)
@given(
    net=nets(),
    divergence=st.sampled_from(DIVERGENCES),
    iterations=st.integers(2, 6),
    l2=st.sampled_from([0.0, 2.0]),
    gamma=st.floats(0.1, 3.0),
    seed=st.integers(0, 99),
)
def test_the_iterates_are_those_of_algorithms_1_to_4(net, divergence, iterations, l2, gamma, seed):
    eta, gamma = 1e-2, gamma * net.terms
    tx = local_loss(
        net,
        eta,
        gamma=gamma,
        divergence=divergence,
        regularizer=lp.l2(l2),
        solver=lp.inner(optax.sgd, iterations),
    )
    params, batch = net.params(seed), net.data(seed)
    new, _ = take_step(net, tx, params, batch)
    expected = iterate(net, params, batch, divergence, eta, gamma, iterations, l2)
    assert_blocks(net, new, expected, 1e-9)


@pytest.mark.parametrize(
    "alias, divergence", [(lp.pocoprop_s, "post_squared"), (lp.pocoprop_m, "dual_matching")]
)
def test_pocoprop_moves_units_whose_slope_is_zero(alias, divergence):
    """Dividing E by f' would be 0 / 0 where a ReLU is flat; H is captured instead."""
    net = Net(widths=(3, 6, 2), transfers=("relu",), biases=(True, True), batch=4)
    assert any(np.any(a < 0) for _, a, _, _ in net.backprop(net.params(), *net.data()))
    options = {"gamma": 9.0, "relative": False, "iterations": 5, "optimizer": optax.sgd}
    tx = alias(net.layers(), 0.05, **options)
    new, _ = take_step(net, tx)
    expected = iterate(net, net.params(), net.data(), divergence, 0.05, 9.0, 5)
    assert_blocks(net, new, expected)


def test_pocoprop_asks_for_the_cotangents_after_the_transfer_functions():
    tx = lp.pocoprop_s(DEEP.layers(), 1e-2)
    params = DEEP.params()
    _, grads, captured = lp.value_grad_and_capture(DEEP.loss)(params, *DEEP.data())
    with pytest.raises(ValueError, match=r"value_grad_and_capture\(loss_fn, transferred=True\)"):
        tx.update(grads, tx.init(params), params, captured=captured)


def test_post_activation_divergences_refuse_functions_that_the_model_does_not_apply():
    layers = DEEP.layers(transfer={"layer0": jax.nn.sigmoid})
    with pytest.raises(ValueError, match=r"own transfer functions return.* given for layer0"):
        lp.pocoprop_s(layers, 1e-2)


# --- the three paths -----------------------------------------------------------------------------


@settings(max_examples=6)
@given(
    net=nets(),
    divergence=st.sampled_from(DIVERGENCES),
    path=st.sampled_from(["direct", "dual"]),
    l2=st.sampled_from([None, 0.5]),
    iterations=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_the_dual_path_has_the_iterates_of_the_direct_one(
    net, divergence, path, l2, iterations, seed
):
    eta, gamma, weight = 1e-2, 2.0 * net.terms, 0.0 if l2 is None else l2
    tx = local_loss(
        net,
        eta,
        gamma=gamma,
        divergence=divergence,
        regularizer=None if l2 is None else lp.l2(l2),
        solver=lp.inner(optax.sgd, iterations, path=path),
    )
    params, batch = net.params(seed), net.data(seed)
    new, _ = take_step(net, tx, params, batch)
    expected = iterate(net, params, batch, divergence, eta, gamma, iterations, weight)
    assert_blocks(net, new, expected, 1e-9)


@pytest.mark.parametrize("solver", [lp.inner, lp.fixed_point])
@pytest.mark.parametrize("regularizer", [None, lp.l2(0.7)])
def test_all_three_paths_agree_on_squared_losses(solver, regularizer):
    if solver is lp.fixed_point and regularizer is None:
        pytest.skip("the fixed point needs a regularizer")
    results = []
    for path in coordinates.PATHS:
        made = (
            lp.inner(optax.sgd, 6, path=path)
            if solver is lp.inner
            else lp.fixed_point(6, relaxation=0.01, path=path)
        )
        tx = local_loss(DEEPER, 1e-2, gamma=7.0, regularizer=regularizer, solver=made)
        results.append(take_step(DEEPER, tx)[0])
    assert_equal_to_rounding(results[1], results[0])
    assert_equal_to_rounding(results[2], results[0])


@pytest.mark.parametrize("moving", ["kernel", "bias"])
@pytest.mark.parametrize("path", coordinates.PATHS)
def test_the_masked_part_of_a_layer_is_held_fixed_on_each_path(moving, path):
    net, results = Net(batch=4, decay=0.1), []
    for p in ("direct", path):
        tx = local_loss(net, 0.05, gamma=3.0, solver=lp.inner(optax.sgd, 4, path=p))
        mask = {"layer0": {"kernel": moving == "kernel", "bias": moving == "bias"}}
        frozen = jax.tree.map(lambda keep: not keep, mask)
        both = optax.chain(optax.masked(tx, mask), optax.masked(optax.set_to_zero(), frozen))
        results.append(take_step(net, both)[0])
    assert_equal_to_rounding(results[1], results[0])


def test_the_path_is_the_one_of_the_fewest_flops():
    def fewest(rows, d_in, d_out, linear=True):
        paths = coordinates.PATHS
        return coordinates.cheapest_path(rows, d_in, d_out, 10, paths, linear=linear)

    assert fewest(100, 1000, 500) == fewest(100, 1000, 500, linear=False) == "dual"
    assert fewest(8192, 64, 64) == "gram"
    assert fewest(8192, 64, 64, linear=False) == "direct"
    assert fewest(1000, 1000, 30) == "direct"


def test_a_path_that_cannot_be_taken_is_refused():
    for divergence, path in (("matching", "gram"), ("squared", "dual")):
        options = {"divergence": divergence, "regularizer": lp.mahalanobis()}
        tx = local_loss(DEEP, 0.1, gamma=1.0, solver=lp.inner(optax.sgd, 3, path=path), **options)
        with pytest.raises(ValueError, match=f"The {path} path cannot be taken here, only direct"):
            take_step(DEEP, tx)


# --- oracle 3: squared losses with L2 ------------------------------------------------------------


def closed_form(net, params, batch, eta, gamma):
    """W - eta gamma (I + eta X'X)^-1 G."""
    slopes = net.gradients(params, *batch)
    new = {}
    for name, (x, _, _, _) in zip(net.names, net.backprop(params, *batch), strict=True):
        system = np.eye(x.shape[1]) + eta * x.T @ x
        new[name] = net.block(params, name) - eta * gamma * np.linalg.solve(system, slopes[name])
    return new


@settings(max_examples=6)
@given(
    net=nets(),
    solver=st.sampled_from([lp.exact(), lp.conjugate_gradient(12), lp.anderson(16, memory=16)]),
    gamma=st.floats(0.1, 10),
    eta=st.floats(1e-2, 0.2),
    seed=st.integers(0, 99),
)
def test_exact_conjugate_gradient_and_anderson_reach_the_closed_form(net, solver, gamma, eta, seed):
    tx = local_loss(net, eta, gamma=gamma, regularizer=lp.l2(), solver=solver)
    params, batch = net.params(seed), net.data(seed)
    new, _ = take_step(net, tx, params, batch)
    assert_blocks(net, new, closed_form(net, params, batch, eta, gamma), 1e-6)


@pytest.mark.parametrize("rows, d_in, by_rows", [(2, 9, True), (12, 3, False)])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_both_systems_of_the_exact_solver_give_the_closed_form(rows, d_in, by_rows, decay):
    net = Net(widths=(d_in, 2), biases=(True,), batch=rows, decay=decay)
    assert _linalg.solves_by_rows(rows, d_in + 1, 2) == by_rows
    tx = local_loss(net, 0.3, gamma=2.0, regularizer=lp.l2(), solver=lp.exact())
    new, _ = take_step(net, tx)
    assert_blocks(net, new, closed_form(net, net.params(), net.data(), 0.3, 2.0))


def test_the_fixed_point_converges_inside_its_radius_and_diverges_outside_it():
    net = Net(widths=(3, 2), batch=6)
    ((x, *_),) = net.backprop(net.params(), *net.data())
    radius = 1 / np.linalg.eigvalsh(x.T @ x).max()

    def distance(eta, solver):
        new, _ = take_step(net, local_loss(net, eta, gamma=2.0, regularizer=lp.l2(), solver=solver))
        expected = closed_form(net, net.params(), net.data(), eta, 2.0)["layer0"]
        return np.abs(net.block(new, "layer0") - expected).max()

    assert distance(0.9 * radius, lp.fixed_point(300)) < 1e-10
    assert distance(1.1 * radius, lp.fixed_point(300)) > 1
    assert distance(1.1 * radius, lp.fixed_point(300, relaxation=0.5)) < 1e-10


def test_anderson_is_exact_after_as_many_iterations_as_eigenvalues_and_one():
    net = Net(widths=(4, 2), biases=(False,), batch=9)
    eta, gamma = 0.5, 2.0  # far outside the fixed point's radius
    expected = closed_form(net, net.params(), net.data(), eta, gamma)["layer0"]

    def distance(iterations, memory):
        solver = lp.anderson(iterations, memory=memory)
        tx = local_loss(net, eta, gamma=gamma, regularizer=lp.l2(), solver=solver)
        return np.abs(net.block(take_step(net, tx)[0], "layer0") - expected).max()

    assert distance(5, 4) < 1e-6
    assert distance(5, 1) > 1e-3
    assert distance(3, 4) > 1e-3


def test_conjugate_gradient_without_a_regularizer_finds_the_nearest_least_squares_solution():
    net = Net(widths=(6, 2), biases=(True,), batch=3)
    tx = local_loss(net, 1.0, gamma=2.0, solver=lp.conjugate_gradient(10))
    new, _ = take_step(net, tx)
    ((x, _, e, _),) = net.backprop(net.params(), *net.data())
    expected = net.block(net.params(), "layer0") - 2.0 * np.linalg.pinv(x) @ e
    assert_blocks(net, new, {"layer0": expected}, 1e-8)


# --- the review's variant ------------------------------------------------------------------------


def test_the_l2_term_is_what_the_reviews_fixed_algorithm_adds_to_algorithm_1_as_printed():
    """First iteration equal; then Algorithm 1 as printed forgets where it started (review)."""
    net, eta, gamma, iterations = Net(widths=(4, 3), batch=6), 0.02, 2.0, 8
    ((x, a, e, _),) = net.backprop(net.params(), *net.data())
    start = net.block(net.params(), "layer0")

    def review(is_fixed, iterations):
        w = start
        for k in range(iterations):
            slope = x.T @ (x @ w - (a - gamma * e))
            pull = (w - start) / eta if is_fixed else 0
            w = w - eta * max(1 - k / iterations, 1 / 4) * (slope + pull)
        return w

    for iterations in (1, 8):
        for regularizer, is_fixed in ((None, False), (lp.l2(), True)):
            solver = lp.inner(optax.sgd, iterations)
            tx = local_loss(net, eta, gamma=gamma, regularizer=regularizer, solver=solver)
            new, _ = take_step(net, tx)
            assert_blocks(net, new, {"layer0": review(is_fixed, iterations)})
    assert np.abs(review(True, 1) - review(False, 1)).max() == 0
    assert np.abs(review(True, 8) - review(False, 8)).max() > 1e-3


# --- targets -------------------------------------------------------------------------------------


@settings(max_examples=4)
@given(
    net=nets(),
    divergence=st.sampled_from(["squared", "matching"]),
    diagonal=st.booleans(),
    damping=st.floats(1e-2, 1.0),
    seed=st.integers(0, 99),
)
def test_one_iteration_to_a_natural_target_is_gradient_times_inverse_fisher(
    net, divergence, diagonal, damping, seed
):
    target = lp.natural(damping, relative=False, diagonal=diagonal)
    eta, gamma = 0.3, 2.0
    tx = local_loss(
        net,
        eta,
        gamma=gamma,
        divergence=divergence,
        target=target,
        solver=lp.inner(optax.sgd, 1),
    )
    params, batch = net.params(seed), net.data(seed)
    new, _ = take_step(net, tx, params, batch)
    expected = {}
    slopes = net.gradients(params, *batch)
    for name, (_, _, e, _) in zip(net.names, net.backprop(params, *batch), strict=True):
        d = fisher(net, e, damping)
        d = np.diag(np.diag(d)) if diagonal else d
        expected[name] = net.block(params, name) - eta * gamma * slopes[name] @ np.linalg.inv(d)
    assert_blocks(net, new, expected, 1e-8)


@pytest.mark.parametrize("divergence", ["post_squared", "dual_matching"])
def test_a_natural_target_after_the_transfer_function_has_the_fisher_of_what_it_returns(divergence):
    net, eta, gamma, damping = DEEPER, 0.3, 2.0, 0.1
    tx = local_loss(
        net,
        eta,
        gamma=gamma,
        divergence=divergence,
        target=lp.natural(damping, relative=False),
        solver=lp.inner(optax.sgd, 1),
    )
    params, batch = net.params(), net.data()
    new, _ = take_step(net, tx, params, batch)
    data = zip(net.names, net.backprop(params, *batch), net.after(params, *batch), strict=True)
    expected = {}
    for name, (x, a, _, _), (h, slope) in data:
        w, inverse = net.block(params, name), np.linalg.inv(fisher(net, h, damping))
        decay = net.decay * w if name != net.names[-1] else net.decay * w @ inverse
        step = x.T @ (slope(a) * (h @ inverse)) + decay
        expected[name] = w - eta * gamma * step
    assert_blocks(net, new, expected, 1e-9)


@pytest.mark.parametrize("curvature", ["ggn_exact", "ggn_mc", "fisher_empirical"])
@pytest.mark.parametrize("divergence", ["squared", "post_squared"])
def test_the_fisher_may_come_from_sampled_or_exact_curvature_cotangents(curvature, divergence):
    net, eta, gamma, damping = DEEPER, 0.3, 2.0, 0.1
    params, batch = net.params(), net.data()
    sampled = curvature == "ggn_mc"
    options = {"curvature": curvature, "samples": 2 if sampled else 1}
    capture = lp.value_grad_and_capture(net.loss, transferred=True, **options)
    rng = {"rng": jax.random.key(0)} if sampled else {}
    _, grads, captured = jax.jit(capture)(params, *batch, **rng)

    def step(target, regularizer, solver):
        options = {"target": target, "regularizer": regularizer, "solver": solver}
        tx = local_loss(net, eta, gamma=gamma, divergence=divergence, **options)
        updates, _ = tx.update(grads, tx.init(params), params, captured=captured)
        return optax.apply_updates(params, updates)

    target = lp.natural(damping, relative=False, curvature="captured")
    new = step(target, None, lp.inner(optax.sgd, 1))
    metric = lp.mahalanobis(damping=damping, relative=False, curvature="captured")
    natural = step(None, metric, lp.fixed_point(1))
    slopes, expected, expected_natural = net.gradients(params, *batch), {}, {}
    for name, (h, slope) in zip(net.names, net.after(params, *batch), strict=True):
        x, a, _, _ = net.backprop(params, *batch)[net.names.index(name)]
        is_after = divergence == "post_squared" and name != net.names[-1]
        arrays = captured[name]
        rows = arrays.transferred_curvature if is_after else arrays.curvature
        d = np.asarray(rows).reshape(-1, a.shape[1])
        inverse = np.linalg.inv(d.T @ d + damping * np.eye(a.shape[1]))
        w = net.block(params, name)
        change = slopes[name] @ inverse
        if is_after:
            change = x.T @ (slope(a) * (h @ inverse)) + net.decay * w
        expected[name] = w - eta * gamma * change
        c = np.asarray(arrays.curvature).reshape(-1, a.shape[1])
        right = np.linalg.inv(c.T @ c + damping * np.eye(a.shape[1]))
        left = np.linalg.inv(x.T @ x / len(x) + damping * np.eye(x.shape[1]))
        expected_natural[name] = w - eta * gamma * left @ slopes[name] @ right
    assert_blocks(net, new, expected, 1e-8)
    assert_blocks(net, natural, expected_natural, 1e-8)


def test_captured_curvature_is_asked_for():
    tx = local_loss(
        DEEP, 0.1, gamma=1.0, target=lp.natural(curvature="captured"), solver=lp.inner(optax.sgd)
    )
    with pytest.raises(ValueError, match="curvature="):
        take_step(DEEP, tx)


def test_relative_damping_is_in_units_of_the_mean_eigenvalue():
    net = Net(widths=(3, 4), batch=6)
    ((_, _, e, _),) = net.backprop(net.params(), *net.data())
    mean = np.trace(fisher(net, e, 0.0)) / 4
    results = []
    for target in (lp.natural(0.2), lp.natural(0.2 * mean, relative=False)):
        tx = local_loss(net, 0.1, gamma=1.0, target=target, solver=lp.inner(optax.sgd, 3))
        results.append(take_step(net, tx)[0])
    assert_equal_to_rounding(*results)


def test_the_fisher_of_a_natural_target_is_averaged_over_batches_without_bias():
    net, decay = Net(widths=(3, 2), batch=5), 0.8
    target = lp.natural(0.1, relative=False, decay=decay)
    tx = local_loss(net, 0.1, gamma=1.0, target=target, solver=lp.inner(optax.sgd, 1))
    update, params, total, weight = update_function(net, tx), net.params(), 0.0, 0.0
    state = tx.init(params)
    for seed in range(3):
        ((x, _, e, _),) = net.backprop(params, *net.data(seed))
        total, weight = decay * total + (1 - decay) * fisher(net, e, 0), decay * weight + 1 - decay
        d = total / weight + 0.1 * np.eye(2)
        expected = net.block(params, "layer0") - 0.1 * x.T @ e @ np.linalg.inv(d)
        updates, state = update(params, state, *net.data(seed))
        params = optax.apply_updates(params, updates)
        assert_blocks(net, params, {"layer0": expected})


@settings(max_examples=4)
@given(net=nets(), damping=st.floats(1e-2, 1.0), seed=st.integers(0, 99))
def test_proposition_1_natural_targets_solved_exactly_are_k_fac_with_factored_damping(
    net, damping, seed
):
    eta, gamma = 0.2, 3.0
    target = lp.natural(damping, relative=False)
    tx = lp.locoprop_kfac(net.layers(), eta, gamma=gamma, target=target)
    params, batch = net.params(seed), net.data(seed)
    new, _ = take_step(net, tx, params, batch)
    slopes, expected = net.gradients(params, *batch), {}
    for name, (x, _, e, _) in zip(net.names, net.backprop(params, *batch), strict=True):
        rows = len(x)
        left = x.T @ x / rows + np.eye(x.shape[1]) / (eta * rows)
        right = fisher(net, e, damping)
        kfac = np.linalg.solve(left, slopes[name]) @ np.linalg.inv(right)
        expected[name] = net.block(params, name) - gamma / rows * kfac
    assert_blocks(net, new, expected, 1e-8)


@pytest.mark.standard_promotion
def test_an_oracle_scales_features_as_optax_scales_their_size():
    net, b2, eps = Net(widths=(3, 4), batch=6), 0.9, 1e-8
    target = lp.oracle(optax.scale_by_adam(b1=0.0, b2=b2, eps=eps))
    tx = local_loss(net, 0.1, gamma=1.0, target=target, solver=lp.inner(optax.sgd, 1))
    update, params, square = update_function(net, tx), net.params(), 0.0
    state = tx.init(params)
    for k in range(3):
        ((x, _, e, _),) = net.backprop(params, *net.data(k))
        square = b2 * square + (1 - b2) * (e**2).mean(0)
        size = np.sqrt(square / (1 - b2 ** (k + 1))) + eps
        expected = net.block(params, "layer0") - 0.1 * x.T @ (e / size)
        updates, state = update(params, state, *net.data(k))
        params = optax.apply_updates(params, updates)
        assert_blocks(net, params, {"layer0": expected})


def test_the_oracle_of_a_plain_step_is_the_gradient_descent_target():
    results = []
    for target in (None, "md", lp.oracle(optax.identity())):
        options = {"divergence": "matching", "target": target}
        tx = local_loss(DEEPER, 0.05, gamma=7.0, solver=lp.inner(optax.sgd, 4), **options)
        results.append(take_step(DEEPER, tx)[0])
    assert_equal_to_rounding(results[1], results[0])
    assert_equal_to_rounding(results[2], results[0])


# --- regularizers --------------------------------------------------------------------------------


def test_l1_is_proximal_gradient_descent():
    net, eta, gamma, weight, iterations = DEEPER, 0.02, 7.0, 0.5, 5
    solver = lp.inner(optax.sgd, iterations)
    new, _ = take_step(
        net, local_loss(net, eta, gamma=gamma, regularizer=lp.l1(weight), solver=solver)
    )
    params, batch = net.params(), net.data()
    expected, zeros = {}, 0
    for name, (x, a, e, _) in zip(net.names, net.backprop(params, *batch), strict=True):
        start = w = net.block(params, name)
        for k in range(iterations):
            rate = eta * max(1 - k / iterations, 1 / 4)
            slope = x.T @ (x @ w - a + gamma * e) + gamma * net.decay * start
            moved = w - rate * slope - start
            w = start + np.sign(moved) * np.maximum(np.abs(moved) - rate * weight, 0)
        expected[name] = w
        zeros += np.sum(w == start)
    assert zeros > 0
    assert_blocks(net, new, expected)


@settings(max_examples=4)
@given(net=nets(), exactly=st.booleans(), damping=st.floats(1e-2, 1.0), seed=st.integers(0, 99))
def test_the_fisher_metric_gives_the_natural_gradient_and_the_kronecker_solution(
    net, exactly, damping, seed
):
    eta, gamma = 0.2, 3.0
    regularizer = lp.mahalanobis(damping=damping, relative=False)
    solver = lp.exact() if exactly else lp.fixed_point(1)
    tx = local_loss(net, eta, gamma=gamma, regularizer=regularizer, solver=solver)
    params, batch = net.params(seed), net.data(seed)
    new, _ = take_step(net, tx, params, batch)
    slopes, expected = net.gradients(params, *batch), {}
    for name, (x, _, e, _) in zip(net.names, net.backprop(params, *batch), strict=True):
        left = x.T @ x / len(x) + damping * np.eye(x.shape[1])
        right = fisher(net, e, damping)
        system = np.kron(left, right) / eta
        if exactly:
            system += np.kron(x.T @ x, np.eye(len(right)))
        delta = np.linalg.solve(system, -gamma * slopes[name].ravel())
        expected[name] = net.block(params, name) + delta.reshape(slopes[name].shape)
    assert_blocks(net, new, expected, 1e-7)


@pytest.mark.parametrize("solver", [lp.conjugate_gradient(40), lp.anderson(40, memory=40)])
def test_iterative_solvers_reach_the_exact_solution_in_the_fisher_metric(solver):
    results = []
    for each in (lp.exact(), solver):
        options = {"regularizer": lp.mahalanobis(damping=0.5), "solver": each}
        results.append(take_step(DEEPER, local_loss(DEEPER, 0.01, gamma=3.0, **options))[0])
    assert_equal_to_rounding(results[1], results[0], 1e-6)


# --- ProxProp ------------------------------------------------------------------------------------


def test_proxprop_is_locoprop_s_but_for_the_last_layer():
    eta, gamma = 0.2, 0.7
    new, _ = take_step(DEEPER, lp.proxprop(DEEPER.layers(), eta, gamma=gamma))
    params, batch = DEEPER.params(), DEEPER.data()
    expected = closed_form(DEEPER, params, batch, eta, gamma)
    last = DEEPER.names[-1]
    expected[last] = DEEPER.block(params, last) - gamma * DEEPER.gradients(params, *batch)[last]
    assert_blocks(DEEPER, new, expected)


def test_proxprop_of_output_layers_alone_is_refused():
    with pytest.raises(ValueError, match=r"`proxprop` needs a hidden layer.*layer0"):
        lp.proxprop(Net().layers(), 0.1)


# --- Newton --------------------------------------------------------------------------------------


@pytest.mark.parametrize("transfer", ["tanh", "sigmoid", "softplus", "home-made", "leaky_relu"])
def test_newtons_first_step_for_small_gamma_is_the_per_output_solution(transfer):
    """Oracle 5: -eta gamma (I + eta X' diag(f'(A_j)) X)^-1 G_j for output j."""
    net = Net(widths=(3, 4, 2), transfers=(transfer,), biases=(True, True), batch=6)
    eta, gamma = 0.5, 1e-6
    solver = lp.newton(1, cg_iterations=20)
    tx = local_loss(
        net, eta, gamma=gamma, divergence="matching", regularizer=lp.l2(), solver=solver
    )
    new, _ = take_step(net, tx)
    x, a, _, _ = net.backprop(net.params(), *net.data())[0]
    slopes = net.gradients(net.params(), *net.data())["layer0"]
    for j in range(4):
        curvature = x.T @ (TRANSFERS[transfer][2](a[:, j])[:, None] * x)
        expected = -eta * np.linalg.solve(np.eye(4) + eta * curvature, slopes[:, j])
        found = (net.block(new, "layer0") - net.block(net.params(), "layer0"))[:, j] / gamma
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-8)


@settings(max_examples=4)
@given(net=nets(), gamma=st.floats(0.1, 1.0), seed=st.integers(0, 99))
def test_newton_converges_to_where_the_local_gradient_vanishes(net, gamma, seed):
    eta = 0.3
    gamma *= net.terms
    options = {"gamma": gamma, "divergence": "matching", "regularizer": lp.l2()}
    tx = local_loss(net, eta, solver=lp.newton(30, cg_iterations=12), **options)
    params, batch = net.params(seed), net.data(seed)
    new, _ = take_step(net, tx, params, batch)
    for name, (x, a, e, f) in zip(net.names, net.backprop(params, *batch), strict=True):
        start, w = net.block(params, name), net.block(new, name)
        slope = x.T @ (f(x @ w) - f(a) + gamma * e) + gamma * net.decay * start
        size = 1 + np.abs(x).max() ** 2 + np.abs(a).max()
        np.testing.assert_allclose(slope + (w - start) / eta, 0, atol=1e-6 * size)


def test_newton_fixed_point_and_anderson_agree_on_matching_losses():
    results = []
    for solver in (lp.newton(20), lp.fixed_point(2000, relaxation=0.1), lp.anderson(60, memory=8)):
        options = {"divergence": "matching", "regularizer": lp.l2(), "solver": solver}
        results.append(take_step(DEEPER, local_loss(DEEPER, 0.1, gamma=3.0, **options))[0])
    assert_equal_to_rounding(results[1], results[0], 1e-7)
    assert_equal_to_rounding(results[2], results[0], 1e-7)


def test_newton_takes_the_jacobian_of_a_function_of_rows():
    net = Net(widths=(3, 4, 2), transfers=("tanh",), biases=(True, True), batch=6)
    layers = net.layers(transfer={"layer0": jax.nn.softmax})
    local = lp.scale_by_local_loss(
        layers,
        0.3,
        gamma=2.0,
        divergence="matching",
        regularizer=lp.l2(),
        solver=lp.newton(20, cg_iterations=30),
    )
    new, _ = take_step(net, optax.chain(local, optax.scale(-1.0)))
    x, a, e, _ = net.backprop(net.params(), *net.data())[0]
    start, w = net.block(net.params(), "layer0"), net.block(new, "layer0")
    residual = jax.nn.softmax(x @ w) - jax.nn.softmax(a) + 2.0 * e
    np.testing.assert_allclose(x.T @ residual + (w - start) / 0.3, 0, atol=1e-8)


# --- which combinations there are ----------------------------------------------------------------

SOLVERS = {
    "sgd": lp.inner(optax.sgd, 3),
    "adam": lp.inner(optax.adam, 3),
    "fixed_point": lp.fixed_point(3),
    "anderson": lp.anderson(3),
    "conjugate_gradient": lp.conjugate_gradient(3),
    "newton": lp.newton(2, cg_iterations=3),
    "exact": lp.exact(),
}
REGULARIZERS = {
    "none": None,
    "l2": lp.l2(0.5),
    "l1": lp.l1(0.1),
    "mahalanobis": lp.mahalanobis(0.5),
}
TARGETS = {
    "own": None,
    "natural": lp.natural(),
    "diagonal": lp.natural(diagonal=True, decay=0.9),
    "oracle": lp.oracle(optax.scale_by_adam()),
}


def makes_sense(divergence, regularizer, solver):
    quadratic = regularizer in ("l2", "mahalanobis")
    return {
        "sgd": True,
        "adam": regularizer != "l1",
        "fixed_point": quadratic,
        "anderson": quadratic,
        "conjugate_gradient": divergence == "squared" and regularizer != "l1",
        "newton": divergence == "matching" and quadratic,
        "exact": divergence == "squared" and quadratic,
    }[solver]


COMBINATIONS = list(itertools.product(DIVERGENCES, REGULARIZERS, SOLVERS))


@pytest.mark.parametrize(
    "divergence, regularizer, solver", [c for c in COMBINATIONS if not makes_sense(*c)]
)
def test_combinations_without_sense_are_refused_with_the_reason(divergence, regularizer, solver):
    options = {"regularizer": REGULARIZERS[regularizer], "solver": SOLVERS[solver]}
    with pytest.raises(ValueError, match=r"cannot solve the \w+ divergence with \w+ regul.*: .*`"):
        lp.scale_by_local_loss(DEEP.layers(), 0.1, gamma=1.0, divergence=divergence, **options)


@functools.cache
def captured_of_deep():
    capture = lp.value_grad_and_capture(DEEP.loss, transferred=True)
    return jax.jit(capture)(DEEP.params(), *DEEP.data())[1:]


@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    "divergence",
    [d if d == "matching" else pytest.param(d, marks=pytest.mark.slow) for d in DIVERGENCES],
)
def test_all_others_take_a_finite_step_and_leave_nothing_behind_after_a_bad_batch(divergence):
    params = DEEP.params()
    good_grads, good = captured_of_deep()
    wrong = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), (good_grads, good))
    transforms = [
        lp.scale_by_local_loss(
            DEEP.layers(),
            0.01,
            gamma=2.0,
            divergence=divergence,
            target=target,
            regularizer=REGULARIZERS[regularizer],
            solver=SOLVERS[solver],
        )
        for d, regularizer, solver in COMBINATIONS
        if d == divergence and makes_sense(d, regularizer, solver)
        for target in (TARGETS.values() if solver in ("sgd", "exact") else [None])
    ]

    @jax.jit
    def steps(grads, captured):
        return [
            (tx.init(params), *tx.update(grads, tx.init(params), params, captured=captured))
            for tx in transforms
        ]

    for _, updates, state in steps(good_grads, good):
        chex.assert_tree_all_finite((updates, state))
        assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(updates))
    for before, updates, state in steps(*wrong):
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
        assert_equal_to_rounding(state._replace(count=before.count), one_more_refused(before), 0)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: lp.l1(-1.0), "`l1` takes a weight"),
        (lambda: lp.mahalanobis(-1.0), "`mahalanobis` takes a weight"),
        (lambda: lp.mahalanobis(damping=-1.0), "`mahalanobis` takes a damping"),
        (lambda: lp.mahalanobis(curvature="exact"), "'empirical' or 'captured', got 'exact'"),
        (lambda: lp.natural(-1.0), "`natural` takes a damping"),
        (lambda: lp.natural(decay=1.0), "`natural` takes a decay"),
        (lambda: lp.natural(curvature="mc"), "'empirical' or 'captured', got 'mc'"),
        (lambda: lp.fixed_point(0), "`iterations` has to be at least 1"),
        (lambda: lp.fixed_point(relaxation=0.0), "`relaxation` has to be above 0"),
        (lambda: lp.anderson(memory=0), "`memory` has to be at least 1"),
        (lambda: lp.newton(cg_iterations=0), "`cg_iterations` has to be at least 1"),
        (lambda: lp.conjugate_gradient(0), "`iterations` has to be at least 1"),
    ],
)
def test_arguments_are_checked_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_target_of_another_divergence_is_refused():
    with pytest.raises(ValueError, match="starts at the gradient only with the target 'post_gd'"):
        local_loss(DEEP, 0.1, gamma=1.0, divergence="post_squared", target="gd", solver=lp.exact())


def test_the_dual_matching_divergence_needs_monotone_functions_too():
    net = Net(widths=(3, 4, 2), transfers=("tanh",), biases=(True, True))
    layers = net.layers()
    layers = lp.find_layers(
        lambda p, x: jnp.sum(jnp.sin(x @ p["a"]) @ p["b"]) / len(x),
        {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 1))},
        jnp.ones((5, 3)),
    )
    with pytest.raises(ValueError, match=r"PocoProp-M needs non-decreasing .* a \(sin\)"):
        lp.pocoprop_m(layers, 0.1)


# --- one layer after the other -------------------------------------------------------------------


def corrected(net, params, batch, matching, eta, gamma, iterations, correction):
    """Layer by layer, the next one's input moved towards what the new weights make of it."""
    new, layers = {}, net.backprop(params, *batch)
    inputs = [x[:, :d_in] for (x, *_), d_in in zip(layers, net.widths, strict=False)]
    for m, (name, (_, _, e, f)) in enumerate(zip(net.names, layers, strict=True)):
        x = np.concatenate([inputs[m], np.ones((len(e), int(net.biases[m])))], 1)
        start = w = net.block(params, name)
        slope = f if matching else lambda at: at
        for k in range(iterations):
            residual = slope(x @ w) - slope(x @ start) + gamma * e
            gradient = x.T @ residual + gamma * net.decay * start
            w = w - eta * max(1 - k / iterations, 1 / 4) * gradient
        new[name] = w
        if m + 1 < len(layers):
            change = TRANSFERS[net.transfers[m]][1](x @ w) - inputs[m + 1]
            norm = np.linalg.norm(change)
            most = correction * change.shape[1] ** 0.5
            inputs[m + 1] = inputs[m + 1] + change * min(norm, most) / norm if norm else change
    return new


@settings(max_examples=4)
@given(
    net=nets().filter(lambda net: net.transfers),
    matching=st.booleans(),
    iterations=st.integers(1, 4),
    correction=st.sampled_from([0.01, 0.1, 100.0]),
    seed=st.integers(0, 99),
)
def test_a_correction_moves_each_input_after_the_layer_that_feeds_it(
    net, matching, iterations, correction, seed
):
    eta, gamma = 1e-2, 2.0 * net.terms
    method = lp.locoprop_m if matching else lp.locoprop_s
    options = {"iterations": iterations, "optimizer": optax.sgd, "correction": correction}
    tx = method(net.layers(), eta, gamma=gamma, relative=False, **options)
    params, batch = net.params(seed), net.data(seed)
    new, _ = take_step(net, tx, params, batch)
    expected = corrected(net, params, batch, matching, eta, gamma, iterations, correction)
    assert_blocks(net, new, expected, 1e-8)


def test_a_correction_needs_a_layer_that_feeds_another():
    with pytest.raises(ValueError, match="no layer is fed by another's transfer function alone: l"):
        lp.locoprop_s(Net().layers(), 0.1, correction=0.1)
    with pytest.raises(ValueError, match="`correction` must not be negative"):
        lp.locoprop_s(DEEP.layers(), 0.1, correction=-0.1)


def test_the_layer_that_feeds_another_is_found_where_nothing_else_lies_between():
    rows = jnp.ones((5, 3))

    def sources(between):
        def loss(params, x):
            hidden = between(x @ params["a"], x)
            return optax.l2_loss(hidden @ params["b"]).sum() / len(x)

        d = jax.eval_shape(between, jnp.ones((5, 4)), rows).shape[-1]
        params = {"a": jnp.ones((3, 4)), "b": jnp.ones((d, 2))}
        return lp.find_layers(loss, params, rows)["b"].source

    assert sources(lambda a, x: jnp.tanh(a)) == "a"
    assert sources(lambda a, x: a) == "a"
    assert sources(lambda a, x: jnp.tanh(a)[:, ::-1]) is None
    assert sources(lambda a, x: jnp.tanh(a) + x.sum(1, keepdims=True)) is None
    assert sources(lambda a, x: jax.nn.softmax(a)) is None
    assert sources(lambda a, x: jnp.concatenate([a, x], 1)) is None


# --- stacking ------------------------------------------------------------------------------------

EQUAL = Net(
    widths=(4, 4, 4, 4, 4, 4),
    transfers=("tanh", "tanh", "relu", "tanh"),
    biases=(True, True, True, True, True),
    batch=6,
)


@pytest.mark.parametrize(
    "options",
    [
        {"solver": lp.inner(functools.partial(optax.rmsprop, momentum=0.9), 3)},
        {"solver": lp.exact(), "regularizer": lp.l2(), "target": lp.natural(decay=0.5)},
        {"solver": lp.inner(optax.sgd, 3), "divergence": "post_squared"},
    ],
    ids=["rmsprop", "exact", "post"],
)
def test_layers_solved_in_one_loop_end_where_those_solved_apart_do(options):
    results = []
    for stack in (True, False):
        tx = local_loss(EQUAL, 0.01, gamma=6.0, stack=stack, **options)
        update, params = update_function(EQUAL, tx), EQUAL.params()
        state = tx.init(params)
        for seed in range(2):
            updates, state = update(params, state, *EQUAL.data(seed))
            params = optax.apply_updates(params, updates)
        results.append((params, state))
    assert_equal_to_rounding(*results)
    assert jax.tree.structure(results[0]) == jax.tree.structure(results[1])


@pytest.mark.standard_promotion
def test_stacked_layers_of_equal_shapes_and_functions_share_one_loop():
    def loops(stack):
        tx = local_loss(EQUAL, 0.01, gamma=6.0, stack=stack, solver=lp.inner(optax.adam, 3))
        params = EQUAL.params()
        grads, captured = lp.value_grad_and_capture(EQUAL.loss)(params, *EQUAL.data())[1:]
        update = functools.partial(tx.update, params=params, captured=captured)
        # Layers apart share a function that is traced once, and run it once for each.
        program = flatten(jax.make_jaxpr(update)(grads, tx.init(params)))
        return sum(str(own.primitive) == "while" for own in program.all_equations())

    assert loops(stack=False) == 5
    assert loops(stack=True) == 3  # three tanh, the ReLU, the output layer


# --- one's own -----------------------------------------------------------------------------------


def test_a_divergence_target_regularizer_and_solver_of_ones_own():
    """The extension points: each is a few functions."""

    def huber(f, outputs, step):
        return lambda moved: jnp.clip(moved - outputs, -0.1, 0.1) + step

    def halved(cotangents, curvature, state):
        return (lambda x: x / 2), state + 1

    def towards_small(layer):
        del layer
        return lp.Penalty(gradient=lambda delta: jax.tree.map(lambda d: d**3, delta))

    def two_steps(problem, state):
        delta = jax.tree.map(jnp.zeros_like, problem.slope)
        for _ in range(2):
            slope = problem.gradient(delta)
            delta = jax.tree.map(lambda d, s: d - problem.learning_rate * s, delta, slope)
        return delta, state

    net = Net(widths=(3, 4, 2), transfers=("tanh",), biases=(True, True), batch=6)
    tx = local_loss(
        net,
        0.1,
        gamma=6.0,
        divergence=lp.Divergence("huber", "gd", huber),
        target=lp.Target("halved", lambda d_out, dtype: jnp.zeros((), dtype), halved),
        regularizer=lp.Regularizer("cubic", towards_small),
        solver=lp.Solver("two_steps", lambda block: (), two_steps),
    )
    new, state = take_step(net, tx)
    expected = {}
    for name, (x, _, e, _) in zip(net.names, net.backprop(net.params(), *net.data()), strict=True):
        first = -0.1 * 3.0 * x.T @ e
        clipped = np.clip(x @ first, -0.1, 0.1)
        second = 3.0 * x.T @ e + x.T @ clipped + first**3
        expected[name] = net.block(net.params(), name) + first - 0.1 * second
    assert_blocks(net, new, expected)
    assert state[0].target["layer0"] == 1
