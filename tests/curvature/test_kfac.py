"""K-FAC against dense Kronecker products, and its equality with LocoProp (oracle 4)."""

import dataclasses

import chex
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import locoprop_jax as lp
from locoprop_jax import _linalg
from tests.dense_nets import (
    DEEP,
    HEADS,
    Net,
    assert_blocks,
    assert_equal_to_rounding,
    averaged_factors,
    nets,
    one_more_refused,
)

EMPIRICAL = {"curvature": "empirical"}


def factors(net, params, batch, curvature, rng=None):
    """S, Gamma and the gradient of each layer, dense; Gamma of what capture hands out."""
    capture = lp.value_grad_and_capture(net.loss, curvature=curvature)
    captured = capture(params, *batch, **({} if rng is None else {"rng": rng}))[2]
    slopes = net.gradients(params, *batch)
    result = {}
    for name, (x, *_) in zip(net.names, net.backprop(params, *batch), strict=True):
        c = np.asarray(captured[name].curvature)
        c = c.reshape(-1, c.shape[-1])
        result[name] = x.T @ x / len(x), c.T @ c, slopes[name]
    return result


def mean(matrix):
    value = np.diag(matrix).mean()
    return value if value > 0 else 1.0


def divided(parts, damping, relative=True, exact_damping=False):
    """(S (x) Gamma + k)^-1 G by dense matrices."""
    s, gamma, g = parts
    k = damping * (mean(s) * mean(gamma) if relative else 1.0)
    if exact_damping:
        system = np.kron(s, gamma) + k * np.eye(g.size)
        return np.linalg.solve(system, g.ravel()).reshape(g.shape)
    pi = np.sqrt(mean(s) / mean(gamma))
    left = s + np.sqrt(k) * pi * np.eye(len(s))
    right = gamma + np.sqrt(k) / pi * np.eye(len(gamma))
    return np.linalg.solve(left, g) @ np.linalg.inv(right)


def step(net, tx, params, state, batch, curvature=None, rng=None):
    options = {} if rng is None else {"rng": rng}

    @jax.jit
    def update(params, state, *batch):
        capture = lp.value_grad_and_capture(net.loss, curvature=curvature)
        _, grads, captured = capture(params, *batch, **options)
        return tx.update(grads, state, params, captured=captured)

    return update(params, state, *batch)


@settings(max_examples=6)
@given(
    net=nets(),
    damping=st.floats(0.05, 2),
    relative=st.booleans(),
    exact_damping=st.booleans(),
    decay=st.sampled_from([0.0, 0.95]),
    curvature=st.sampled_from(["ggn_exact", "ggn_mc", "fisher_empirical"]),
    seed=st.integers(0, 99),
)
def test_a_step_divides_by_the_damped_kronecker_product(
    net, damping, relative, exact_damping, decay, curvature, seed
):
    params, batch = net.params(seed), net.data(seed)
    rng = jax.random.key(seed) if curvature == "ggn_mc" else None
    tx = lp.scale_by_kfac(
        net.layers(), damping=damping, relative=relative, exact_damping=exact_damping, decay=decay
    )
    updates, state = step(net, tx, params, tx.init(params), batch, curvature, rng)
    expected = {
        name: divided(parts, damping, relative, exact_damping)
        for name, parts in factors(net, params, batch, curvature, rng).items()
    }
    assert_blocks(net, updates, expected, 1e-7)
    assert (state.count, state.failures) == (1, 0)


@settings(max_examples=3)
@given(net=nets(), seed=st.integers(0, 99))
def test_with_one_example_and_all_columns_the_product_is_the_gauss_newton_block(net, seed):
    """KFLR (practical GN, section 3.4): E[a a'] (x) E[G] loses nothing when there is one term."""
    one = Net(**{**vars(net), "batch": 1, "tokens": None, "decay": 0.0})
    params, (x, y) = one.params(seed), one.data(seed)
    head = HEADS[one.head][0]
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    outputs = one.outputs(params, x)
    jacobian = jax.jacobian(lambda v: one.outputs(unravel(v), x)[0])(flat)
    hessian = jax.hessian(lambda a: head(a, y).sum())(outputs)[0, :, 0]
    block = jacobian.T @ hessian @ jacobian
    slope = jax.flatten_util.ravel_pytree(jax.grad(one.loss)(params, x, y))[0]
    tx = lp.scale_by_kfac(one.layers(), damping=0.3, relative=False, exact_damping=True, decay=0.0)
    updates, _ = step(one, tx, params, tx.init(params), (x, y), "ggn_exact")
    for name in one.names:
        marks = jax.tree.map(jnp.zeros_like, params)
        marks[name] = jax.tree.map(jnp.ones_like, params[name])
        inside = np.flatnonzero(jax.flatten_util.ravel_pytree(marks)[0])
        system = block[np.ix_(inside, inside)] + 0.3 * np.eye(len(inside))
        expected = np.linalg.solve(system, slope[inside])
        actual = jax.flatten_util.ravel_pytree(updates[name])[0]
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-8)


@settings(max_examples=2)
@given(net=nets(), damping=st.floats(0.05, 1), gamma=st.floats(0.1, 2), seed=st.integers(0, 99))
def test_locoprop_with_natural_targets_is_kfac_with_factored_damping(net, damping, gamma, seed):
    """LocoProp, Proposition 1: lambda_A = 1 / (eta N), learning rate gamma / N, layer by layer."""
    params, batch = net.params(seed), net.data(seed)
    rows = net.batch * (net.tokens or 1)
    kfac = lp.scale_by_kfac(net.layers(), damping=damping, relative=False, decay=0.0, **EMPIRICAL)
    updates, _ = step(net, kfac, params, kfac.init(params), batch)
    for name, (s, fisher, _) in factors(net, params, batch, "fisher_empirical").items():
        pi = np.sqrt(mean(s) / mean(fisher))
        lambda_a, lambda_e = np.sqrt(damping) * pi, np.sqrt(damping) / pi
        local = lp.locoprop_kfac(
            net.layers(),
            1 / (lambda_a * rows),
            gamma=gamma,
            target=lp.natural(lambda_e, relative=False),
        )
        expected, _ = step(net, local, params, local.init(params), batch)
        scaled = jax.tree.map(lambda u: -gamma / rows * u, updates[name])
        assert_equal_to_rounding(scaled, expected[name], 1e-7)


def test_factors_are_averaged_and_inverted_when_they_are_due():
    net, decay, damping = DEEP, 0.8, 0.1
    tx = lp.scale_by_kfac(
        net.layers(),
        damping=damping,
        decay=decay,
        inverse_period=4,
        statistics_steps=2,
        **EMPIRICAL,
    )
    params, state = net.params(), tx.init(net.params())
    batches = [net.data(count) for count in range(9)]
    found = [factors(net, params, batch, "fisher_empirical") for batch in batches]
    due = (0, 1, 2, 4, 8)
    averages = averaged_factors(found, decay, {*due, 3, 7}, due)
    for batch, now, inverse in zip(batches, found, averages, strict=True):
        updates, state = step(net, tx, params, state, batch)
        expected = {n: divided((*inverse[n], now[n][2]), damping) for n in net.names}
        assert_blocks(net, updates, expected, 1e-8)
    assert (state.count, state.gathered, state.failures) == (9, 9, 0)


@pytest.mark.parametrize("exact_damping", [False, True])
def test_a_metric_step_has_length_one_in_its_metric(exact_damping):
    net, damping = DEEP, 0.2
    params, batch = net.params(), net.data()
    kfac = lp.scale_by_kfac(net.layers(), damping=damping, exact_damping=exact_damping, **EMPIRICAL)
    tx = lp.scale_by_metric_norm(kfac, floor=1e-12)
    updates, _ = step(net, tx, params, tx.init(params), batch)
    parts = factors(net, params, batch, "fisher_empirical")
    directions = {n: divided(parts[n], damping, True, exact_damping) for n in net.names}
    z = sum(np.sum(directions[n] * parts[n][2]) for n in net.names)
    assert_blocks(net, updates, {n: d / np.sqrt(z) for n, d in directions.items()}, 1e-8)


@pytest.mark.parametrize("masked", ["kernel", "bias"])
def test_a_part_of_a_layer_is_divided_by_its_part_of_the_factors(masked):
    net = Net(widths=(3, 2), biases=(True,))
    params, batch = net.params(), net.data()
    kept = {"layer0": {part: part != masked for part in ("kernel", "bias")}}
    tx = optax.masked(lp.scale_by_kfac(net.layers(), damping=0.1, **EMPIRICAL), kept)
    updates, _ = step(net, tx, params, tx.init(params), batch)
    s, fisher, g = factors(net, params, batch, "fisher_empirical")["layer0"]
    inside = slice(3, 4) if masked == "kernel" else slice(0, 3)
    expected = g.copy()  # optax.masked passes the rest on
    expected[inside] = divided((s[inside, inside], fisher, g[inside]), 0.1)
    assert_blocks(net, updates, {"layer0": expected})


@pytest.mark.parametrize("exact_damping", [False, True])
def test_dead_layers_have_finite_updates_and_weight_decay_of_its_own_size(exact_damping):
    params = {"a": {"kernel": jnp.ones((3, 2), jnp.float32)}, "b": {"kernel": jnp.ones((2, 2))}}
    params = jax.tree.map(lambda p: p.astype(jnp.float32), params)

    def loss_fn(params, x):
        hidden = jax.nn.relu(x @ params["a"]["kernel"])
        decay = sum(jnp.sum(p**2) for p in jax.tree.leaves(params))
        return optax.l2_loss(hidden @ params["b"]["kernel"]).sum(-1).mean() + decay

    for x in (-jnp.ones((4, 3), jnp.float32), jnp.zeros((4, 3), jnp.float32)):
        layers = lp.find_layers(loss_fn, params, x)
        tx = lp.scale_by_metric_norm(
            lp.scale_by_kfac(layers, exact_damping=exact_damping, **EMPIRICAL)
        )
        _, grads, captured = lp.value_grad_and_capture(loss_fn)(params, x)
        updates, state = tx.update(grads, tx.init(params), params, captured=captured)
        chex.assert_tree_all_finite((updates, state))
        assert max(np.abs(u).max() for u in jax.tree.leaves(updates)) < 10


def test_a_failed_inversion_is_counted_and_keeps_the_last_inverse(monkeypatch):
    net = DEEP
    params = net.params()
    tx = lp.scale_by_kfac(net.layers(), **EMPIRICAL)
    _, before = step(net, tx, params, tx.init(params), net.data())
    inverse = _linalg.inverse
    monkeypatch.setattr(_linalg, "inverse", lambda m: inverse(m) * (np.nan if len(m) == 5 else 1))
    updates, after = step(net, tx, params, before, net.data(7))
    assert after.failures == 1
    same = [
        np.array_equal(after.inverse[name].inputs, before.inverse[name].inputs)
        for name in net.names
    ]
    assert same == [False, True]
    chex.assert_tree_all_finite(updates)


def test_a_batch_that_is_not_finite_leaves_everything_as_it_was():
    net = DEEP
    params, (x, y) = net.params(), net.data()
    tx = lp.scale_by_kfac(net.layers(), **EMPIRICAL)
    _, before = step(net, tx, params, tx.init(params), (x, y))
    updates, after = step(net, tx, params, before, (x.at[0, 0].set(np.nan), y))
    chex.assert_trees_all_equal(updates, optax.tree.zeros_like(updates))
    chex.assert_trees_all_equal(after, one_more_refused(before))


def test_statistics_that_overflow_are_not_gathered():
    net = DEEP
    params, (x, y) = net.params(), net.data()
    tx = lp.scale_by_kfac(net.layers(), **EMPIRICAL)
    _, before = step(net, tx, params, tx.init(params), (x, y))
    first, *_ = net.names
    _, grads, captured = lp.value_grad_and_capture(net.loss)(params, x, y)
    (use,) = captured[first].uses
    operands = tuple(1e200 * x for x in use.operands)
    huge = dataclasses.replace(captured[first], uses=(dataclasses.replace(use, operands=operands),))
    arrays = tuple(huge if name == first else captured[name] for name in captured)
    captured = dataclasses.replace(captured, _arrays=arrays)
    updates, after = tx.update(grads, before, params, captured=captured)
    chex.assert_trees_all_equal(after.statistics, before.statistics)
    assert (after.count, after.gathered, after.failures) == (2, 1, 0)
    chex.assert_tree_all_finite(updates)


def products_outside_conditionals(jaxpr):
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name != "cond":
            inner = [getattr(value, "jaxpr", value) for value in equation.params.values()]
            total += sum(products_outside_conditionals(j) for j in inner if hasattr(j, "eqns"))
            total += equation.primitive.name == "dot_general"
    return total


def test_deferred_curvature_is_pulled_only_where_statistics_are_gathered():
    """The steps in between make the products of the gradient and of the inverses, and no others."""
    net = DEEP
    params, (x, y) = net.params(), net.data()
    tx = lp.scale_by_kfac(net.layers(), inverse_period=4)

    def products(defer_curvature):
        capture = lp.value_grad_and_capture(
            net.loss, curvature="ggn_mc", defer_curvature=defer_curvature
        )

        def update(params, state, rng):
            _, grads, captured = capture(params, x, y, rng=rng)
            return tx.update(grads, state, params, captured=captured)

        traced = jax.make_jaxpr(update)(params, tx.init(params), jax.random.key(0))
        return products_outside_conditionals(traced.jaxpr)

    gradient = products_outside_conditionals(jax.make_jaxpr(jax.grad(net.loss))(params, x, y).jaxpr)
    assert products(True) == gradient + 2 * len(net.names) < products(False)


def test_curvature_that_was_not_captured_is_an_error_with_the_remedy():
    net = DEEP
    params = net.params()
    tx = lp.scale_by_kfac(net.layers())
    with pytest.raises(ValueError, match=r"were not captured.*`value_grad_and_capture"):
        step(net, tx, params, tx.init(params), net.data())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"damping": -1.0}, "`scale_by_kfac` takes a damping that is not negative"),
        ({"curvature": "fisher_mc"}, "`curvature` is 'empirical' or 'captured'"),
        ({"decay": 1.0}, "`decay`"),
        ({"inverse_period": 0}, "`inverse_period`.*whole"),
        ({"statistics_steps": 2}, r"`statistics_steps`.*the 1 "),
    ],
)
def test_arguments_are_checked_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        lp.scale_by_kfac(DEEP.layers(), **options)
