"""The natural gradient, and products with the Fisher, against dense matrices (oracle 9)."""

import functools
import math

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
from locoprop_jax._curvature import woodbury
from locoprop_jax._curvature.fisher import (
    _open,
    fisher_norm,
    fisher_product,
    inverse_fisher_product,
    laplace_offset,
    sample_laplace,
)
from locoprop_jax._curvature.natural import natural_gradient, scale_by_natural_gradient
from tests.dense_nets import (
    DEEP,
    HEADS,
    Net,
    assert_equal_to_rounding,
    nets,
    one_more_refused,
)

TOKENS = Net(widths=(3, 2), biases=(True,), tokens=3)
KINDS = st.sampled_from(["ggn_exact", "ggn_mc", "fisher_empirical"])


def ravel(tree):
    return np.asarray(jax.flatten_util.ravel_pytree(tree)[0])


def separate(net, kind):
    """Without positions that exact columns would join."""
    return Net(**{**vars(net), "tokens": None}) if kind == "ggn_exact" else net


def capture(net, params, batch, kind="fisher_empirical", samples=1, seed=0):
    """The gradients, and what was captured."""
    options = {"rng": jax.random.key(seed)} if kind == "ggn_mc" else {}
    run = lp.value_grad_and_capture(net.loss, curvature=kind, samples=samples)
    return jax.jit(functools.partial(run, **options))(params, *batch)[1:]


def dense_columns(net, params, captured):
    """G by its definition: for each sample and example a tree like the parameters, flat."""
    samples, batch = captured[net.names[0]].curvature.shape[:2]
    columns = []
    for s in range(samples):
        for n in range(batch):
            tree = {}
            for name in net.names:
                x, c = captured[name].inputs[n], captured[name].curvature[s, n]
                kernel = sum(np.outer(x_p, c_p) for x_p, c_p in zip(x, c, strict=True))
                tree[name] = {"kernel": kernel.T if net.out_in else kernel}
                if "bias" in params[name]:
                    tree[name]["bias"] = np.asarray(c).sum(0)
            columns.append(ravel(tree))
    return np.stack(columns, 1)


def systems_of(net, params, block_diagonal):
    """For each system the places of its parameters in a flat tree."""
    places = []
    for name in net.names:
        marks = jax.tree.map(jnp.zeros_like, params)
        marks[name] = jax.tree.map(jnp.ones_like, params[name])
        places.append(np.flatnonzero(ravel(marks)))
    return places if block_diagonal else [np.concatenate(places)]


def divided(g, u, damping, relative=False, systems=None):
    """(lambda I + G G')^-1 u by dense matrices, system by system."""
    result = np.zeros_like(u)
    for places in [np.arange(len(u))] if systems is None else systems:
        part = g[places]
        unit = np.square(part).sum() / part.shape[1] if relative else 1.0
        amount = damping * (unit if unit > 0 else 1.0)
        system = part @ part.T + amount * np.eye(len(part))
        result[places] = np.linalg.solve(system, u[places])
    return result


# --- F -------------------------------------------------------------------------------------------


@settings(max_examples=4)
@given(
    net=nets(),
    kind=KINDS,
    block_diagonal=st.booleans(),
    damping=st.floats(0.01, 2),
    seed=st.integers(0, 99),
)
def test_products_with_the_fisher_and_its_inverse_are_those_of_dense_matrices(
    net, kind, block_diagonal, damping, seed
):
    net = separate(net, kind)
    params, vector = net.params(seed), net.params(seed + 1)
    samples = 2 if kind == "ggn_mc" else 1
    _, captured = capture(net, params, net.data(seed), kind, samples, seed)
    g, v, layers = dense_columns(net, params, captured), ravel(vector), net.layers()
    systems = systems_of(net, params, block_diagonal)
    products = np.zeros_like(v)
    for places in systems:
        products[places] = g[places] @ (g[places].T @ v[places])
    options = {"block_diagonal": block_diagonal}

    @jax.jit
    def all_three(captured, vector):
        product = fisher_product(layers, captured, vector, **options)
        norm = fisher_norm(layers, captured, vector, **options)
        inverse = inverse_fisher_product(layers, captured, vector, damping, **options)
        return product, norm, inverse

    product, norm, inverse = all_three(captured, vector)
    assert_equal_to_rounding(ravel(product), products)
    np.testing.assert_allclose(norm, v @ products, rtol=1e-10, atol=1e-12)
    expected = divided(g, v, damping, systems=systems)
    assert_equal_to_rounding(ravel(inverse), expected, 1e-8)


@settings(max_examples=3)
@given(net=nets(), seed=st.integers(0, 99))
def test_with_all_columns_it_is_the_gauss_newton_matrix(net, seed):
    net = separate(net, "ggn_exact")
    params, (x, y) = net.params(seed), net.data(seed)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    head = HEADS[net.head][0]
    outputs = net.outputs(params, x)
    loss = lambda a: head(a.reshape(outputs.shape), y).sum() / net.terms  # noqa: E731
    hessian = jax.jit(jax.hessian(loss))(outputs.ravel())
    jacobian = jax.jit(jax.jacobian(lambda v: net.outputs(unravel(v), x).ravel()))(flat)
    expected = jacobian.T @ hessian @ jacobian
    _, captured = capture(net, params, (x, y), "ggn_exact")
    product = functools.partial(fisher_product, net.layers(), captured)
    matrix = jax.jit(jax.vmap(lambda v: ravel_traced(product(unravel(v)))))
    actual = matrix(jnp.eye(len(flat)))
    assert_equal_to_rounding(actual, np.asarray(expected), 1e-9)


@pytest.mark.parametrize("is_joined", [False, True])
@pytest.mark.parametrize("is_mixed", [False, True])
def test_with_positions_it_is_the_gauss_newton_matrix_or_an_error(is_mixed, is_joined):
    """Exact columns hold one position each where these meet; else several, which must not add."""

    def outputs(params, x):
        hidden = jnp.tanh(x @ params["a"]["kernel"])
        hidden = hidden - hidden.mean(1, keepdims=True) if is_mixed else hidden
        return hidden @ params["b"]["kernel"]

    def loss_fn(params, x):
        a = outputs(params, x)
        return optax.l2_loss(a.reshape(-1, 2) if is_joined else a).sum(-1).mean()

    rng = np.random.default_rng(0)
    params = {"a": {"kernel": rng.normal(size=(2, 3))}, "b": {"kernel": rng.normal(size=(3, 2))}}
    params, x = jax.tree.map(jnp.asarray, params), jnp.asarray(rng.normal(size=(4, 3, 2)))
    layers = lp.find_layers(loss_fn, params, x)
    run = jax.jit(lp.value_grad_and_capture(loss_fn, curvature="ggn_exact"))
    *_, captured = run(params, x)
    product = jax.jit(functools.partial(fisher_product, layers))
    if not is_mixed:
        with pytest.raises(ValueError, match=r'do not meet in this network.*Capture "ggn_mc"'):
            product(captured, params)
        return
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    jacobian = jax.jit(jax.jacobian(lambda v: outputs(unravel(v), x).ravel()))(flat)
    expected = jacobian.T @ (jacobian @ flat) / 12
    assert_equal_to_rounding(ravel(product(captured, params)), np.asarray(expected))


def ravel_traced(tree):
    return jax.flatten_util.ravel_pytree(tree)[0]


def test_empirical_cotangents_are_those_captured_as_empirical_curvature():
    params = TOKENS.params()
    _, captured = capture(TOKENS, params, TOKENS.data())
    expected = fisher_product(TOKENS.layers(), captured, params)
    _, _, plain = lp.value_grad_and_capture(TOKENS.loss)(params, *TOKENS.data())
    actual = fisher_product(TOKENS.layers(), plain, params, curvature="empirical")
    assert_equal_to_rounding(actual, expected)


@pytest.mark.parametrize("sizes", [(2, 3, 4, 2, 30), (2, 3, 4, 20, 30)])
def test_both_ways_to_add_up_pairs_of_positions_agree(sizes, monkeypatch):
    samples, batch, shared, d, d_out = sizes
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, shared, d))
    c = rng.normal(size=(samples, batch, shared, d_out))
    gradients = np.einsum("npd,snpo->sndo", x, c).reshape(samples * batch, -1)
    columns = woodbury.Columns(jnp.asarray(x), jnp.asarray(c))
    for way in ("positions", "gradients"):
        flops = dict.fromkeys(("positions", "gradients"), 2) | {way: 1}
        monkeypatch.setattr(woodbury, "gram_flops", lambda *_, flops=flops: flops)
        np.testing.assert_allclose(woodbury.gram(columns), gradients @ gradients.T, rtol=1e-10)


def test_the_cheaper_way_to_add_up_pairs_of_positions_is_that_of_fewer_flops():
    few = woodbury.gram_flops(1, 10, 2, 100, 100)
    assert few["positions"] < few["gradients"]
    many = woodbury.gram_flops(1, 10, 100, 9, 4)
    assert many["gradients"] < many["positions"]


def sizes_in(jaxpr):
    """How many numbers each value in a jaxpr holds, those in inner ones included."""
    for equation in jaxpr.eqns:
        yield from (math.prod(v.aval.shape) for v in equation.outvars)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from sizes_in(inner)


@pytest.mark.parametrize("batch_size", [None, 8])
def test_gradients_of_single_examples_are_not_formed(batch_size):
    """Appendix I: memory as of a backward pass, and the gram's."""
    net = Net(widths=(30, 40), biases=(True,), batch=8)
    params, batch = net.params(), net.data()
    tx = scale_by_natural_gradient(net.layers(), batch_size, samples=2 if batch_size else 1)
    grads, captured = capture(net, params, batch, "ggn_mc", samples=2)
    update = lambda grads, state, captured: tx.update(grads, state, captured=captured)  # noqa: E731
    closed = jax.make_jaxpr(update)(grads, tx.init(params), captured)
    sizes = list(sizes_in(closed.jaxpr))
    assert max(sizes) >= (30 + 1) * 40  # the block itself: the walk has seen the solve
    assert 16 * 16 in sizes
    assert max(sizes) < 2 * 30 * 40


# --- steps ---------------------------------------------------------------------------------------


@settings(max_examples=4)
@given(
    net=nets(),
    kind=KINDS,
    relative=st.booleans(),
    block_diagonal=st.booleans(),
    damping=st.floats(0.05, 2),
    seed=st.integers(0, 99),
)
def test_a_step_divides_by_the_damped_fisher_of_its_own_batch(
    net, kind, relative, block_diagonal, damping, seed
):
    net = separate(net, kind)
    params = net.params(seed)
    grads, captured = capture(net, params, net.data(seed), kind, seed=seed)
    tx = scale_by_natural_gradient(
        net.layers(), damping=damping, relative=relative, block_diagonal=block_diagonal
    )
    updates, state = jax.jit(tx.update)(grads, tx.init(params), captured=captured)
    g = dense_columns(net, params, captured)
    systems = systems_of(net, params, block_diagonal)
    assert_equal_to_rounding(
        ravel(updates), divided(g, ravel(grads), damping, relative, systems), 1e-7
    )
    assert (state.count, state.failures, state.systems) == (1, 0, {})


def test_compiled_or_not_a_step_is_the_same():
    net, params = TOKENS, TOKENS.params()
    grads, captured = capture(net, params, net.data())
    tx = scale_by_natural_gradient(net.layers(), net.batch)
    eager = tx.update(grads, tx.init(params), captured=captured)
    compiled = jax.jit(tx.update)(grads, tx.init(params), captured=captured)
    assert_equal_to_rounding(eager, compiled)


@pytest.mark.parametrize("block_diagonal", [False, True])
@pytest.mark.parametrize("period", [1, 2])
def test_with_a_batch_size_a_step_divides_by_the_fisher_of_a_batch_before(period, block_diagonal):
    net = Net(**{**vars(DEEP), "tokens": 2})
    params, damping = net.params(), 0.3
    tx = scale_by_natural_gradient(
        net.layers(),
        net.batch,
        samples=2,
        damping=damping,
        period=period,
        block_diagonal=block_diagonal,
    )
    state, update = tx.init(params), jax.jit(tx.update)
    structure = jax.tree.structure(state)
    systems = systems_of(net, params, block_diagonal)
    columns = []
    for step in range(4):
        grads, captured = capture(net, params, net.data(step), "ggn_mc", 2, step)
        columns.append(dense_columns(net, params, captured))
        before = {1: (0, 0, 1, 2), 2: (0, 0, 0, 2)}[period][step]
        updates, state = update(grads, state, captured=captured)
        expected = divided(columns[before], ravel(grads), damping, True, systems)
        assert_equal_to_rounding(ravel(updates), expected, 1e-9)
        assert jax.tree.structure(state) == structure
    assert (state.count, state.failures) == (4, 0)


def test_without_one_the_fisher_of_another_batch_can_be_given():
    net, params, damping = DEEP, DEEP.params(), 0.3
    grads, captured = capture(net, params, net.data(1))
    other = net.data(2)[0][:3], net.data(2)[1][:3]
    _, fisher = capture(net, params, other)
    tx = scale_by_natural_gradient(net.layers(), damping=damping)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), captured=captured, fisher=fisher)
    expected = divided(dense_columns(net, params, fisher), ravel(grads), damping, True)
    assert_equal_to_rounding(ravel(updates), expected)


@settings(max_examples=2)
@given(net=nets(), factor=st.floats(0.01, 100), block_diagonal=st.booleans())
def test_with_relative_damping_a_multiple_of_the_loss_has_the_same_direction(
    net, factor, block_diagonal
):
    net = separate(net, "ggn_exact")
    params, batch = net.params(), net.data()
    tx = scale_by_natural_gradient(net.layers(), damping=0.2, block_diagonal=block_diagonal)

    @jax.jit
    def direction(factor):
        scaled = lambda *args: factor * net.loss(*args)  # noqa: E731
        run = lp.value_grad_and_capture(scaled, curvature="ggn_exact")
        _, grads, captured = run(params, *batch)
        return tx.update(grads, tx.init(params), captured=captured)[0]

    assert_equal_to_rounding(direction(factor), direction(1.0), 1e-8)


def test_a_metric_step_has_length_one_in_its_metric():
    net, params, damping = DEEP, DEEP.params(), 0.2
    grads, captured = capture(net, params, net.data())
    tx = lp.scale_by_metric_norm(
        scale_by_natural_gradient(net.layers(), damping=damping, relative=False), floor=1e-12
    )
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), captured=captured)
    g, d = dense_columns(net, params, captured), ravel(updates)
    metric = g @ g.T + damping * np.eye(len(d))
    np.testing.assert_allclose(d @ metric @ d, 1, rtol=1e-8)


def test_the_optimizer_is_its_parts():
    net, params, batch = DEEP, DEEP.params(), DEEP.data()
    tx = natural_gradient(net.layers(), 0.5, net.batch, damping=0.3, momentum=False, l2=0.1)
    direction = scale_by_natural_gradient(net.layers(), damping=0.3)
    grads, captured = capture(net, params, batch)
    decayed = jax.tree.map(lambda g, p: g + 0.1 * p, grads, params)
    d, _ = jax.jit(direction.update)(decayed, direction.init(params), captured=captured)
    step = lp.scale_by_gauss_newton_step(l2=0.1)

    def update(tx, updates):
        return tx.update(
            updates,
            tx.init(params),
            params,
            captured=captured,
            value=net.loss(params, *batch),
            grad=grads,
            value_fn=lambda p: net.loss(p, *batch),
        )[0]

    expected = jax.tree.map(lambda u: -0.5 * u, jax.jit(lambda d: update(step, d))(d))
    assert_equal_to_rounding(jax.jit(lambda g: update(tx, g))(grads), expected)


@pytest.mark.parametrize("masked", ["kernel", "bias"])
@pytest.mark.parametrize("batch_size", [None, 5])
def test_a_part_of_a_layer_is_divided_by_its_part_of_the_fisher(masked, batch_size):
    net, params = TOKENS, TOKENS.params()
    kept = {"layer0": {part: part != masked for part in ("kernel", "bias")}}
    inner = scale_by_natural_gradient(net.layers(), batch_size, damping=0.1, relative=False)
    tx = optax.masked(inner, kept)
    grads, captured = capture(net, params, net.data())
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), captured=captured)
    marks = {
        "layer0": {p: jnp.full_like(x, kept["layer0"][p]) for p, x in params["layer0"].items()}
    }
    inside = np.flatnonzero(ravel(marks))
    expected = ravel(grads).copy()  # optax.masked passes the rest on
    g = dense_columns(net, params, captured)
    expected[inside] = divided(g[inside], expected[inside], 0.1)
    assert_equal_to_rounding(ravel(updates), expected)


def test_parameters_in_no_layer_keep_their_gradient_and_have_no_fisher():
    net = DEEP
    loss = lambda params, *batch: net.loss(params["net"], *batch) + jnp.sum(params["free"] ** 2)  # noqa: E731
    params = {"net": net.params(), "free": jnp.arange(1.0, 3.0)}
    layers = lp.find_layers(loss, params, *net.data(), on_uncaptured="pass")
    run = lp.value_grad_and_capture(loss, curvature="ggn_exact")
    _, grads, captured = jax.jit(run)(params, *net.data())
    tx = scale_by_natural_gradient(layers)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), captured=captured)
    np.testing.assert_array_equal(updates["free"], grads["free"])
    np.testing.assert_array_equal(fisher_product(layers, captured, params)["free"], 0)
    inverse = inverse_fisher_product(layers, captured, params, 0.5)
    np.testing.assert_allclose(inverse["free"], params["free"] / 0.5)


# --- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 4])
@pytest.mark.parametrize("block_diagonal", [False, True])
def test_dead_layers_have_finite_updates(batch_size, block_diagonal):
    params = {"a": {"kernel": jnp.ones((3, 2))}, "b": {"kernel": jnp.ones((2, 2))}}
    params = jax.tree.map(lambda p: p.astype(jnp.float32), params)

    def loss_fn(params, x):
        hidden = jax.nn.relu(x @ params["a"]["kernel"])
        decay = sum(jnp.sum(p**2) for p in jax.tree.leaves(params))
        return optax.l2_loss(hidden @ params["b"]["kernel"]).sum(-1).mean() + decay

    for value in (-1.0, 0.0, 1.0):  # dead, zero, and of rank one
        x = jnp.full((4, 3), value, jnp.float32)
        layers = lp.find_layers(loss_fn, params, x)
        tx = scale_by_natural_gradient(
            layers,
            batch_size,
            block_diagonal=block_diagonal,
            samples=2 if batch_size else 1,
            damping=0.1,
        )
        run = jax.jit(lp.value_grad_and_capture(loss_fn, curvature="ggn_exact"))
        _, grads, captured = run(params, x)
        updates, state = jax.jit(tx.update)(grads, tx.init(params), captured=captured)
        chex.assert_tree_all_finite((updates, state))
        assert state.failures == 0
        assert all(u.dtype == jnp.float32 for u in jax.tree.leaves(updates))
        if value <= 0:  # a Fisher of zeros counts as one
            assert_equal_to_rounding(updates, jax.tree.map(lambda g: g / 0.1, grads), 1e-5)


@pytest.mark.parametrize("batch_size", [None, 5])
def test_a_batch_that_is_not_finite_leaves_everything_as_it_was(batch_size):
    net, params = DEEP, DEEP.params()
    tx = scale_by_natural_gradient(net.layers(), batch_size)
    update = jax.jit(tx.update)
    grads, captured = capture(net, params, net.data())
    _, before = update(grads, tx.init(params), captured=captured)
    x, y = net.data(7)
    grads, captured = capture(net, params, (x.at[0, 0].set(np.nan), y))
    updates, after = update(grads, before, captured=captured)
    chex.assert_trees_all_equal(updates, optax.tree.zeros_like(updates))
    chex.assert_trees_all_equal(after, one_more_refused(before))


def failing(cholesky, matrix):
    return cholesky(matrix) * jnp.nan


def compiled(tx):
    """Compiled anew, with what is patched now."""
    return jax.jit(lambda *args, **extra: tx.update(*args, **extra))


def test_a_failed_factorisation_is_counted_and_keeps_the_last_one(monkeypatch):
    net, params = DEEP, DEEP.params()
    tx = scale_by_natural_gradient(net.layers(), net.batch, period=3)
    (grads, captured), (others, later) = (capture(net, params, net.data(s)) for s in (1, 2))
    broken = functools.partial(failing, _linalg.cholesky)
    with monkeypatch.context() as patch:
        patch.setattr(_linalg, "cholesky", broken)
        updates, nothing = compiled(tx)(grads, tx.init(params), captured=captured)
    assert nothing.failures == 1
    chex.assert_trees_all_equal(updates, optax.tree.zeros_like(updates))
    # Tried again at once, because there is none to go on with.
    update = compiled(tx)
    updates, before = update(grads, nothing, captured=captured)
    assert before.failures == 1
    own = scale_by_natural_gradient(net.layers())
    expected, _ = compiled(own)(grads, own.init(params), captured=captured)
    assert_equal_to_rounding(updates, expected)
    _, before = update(grads, before, captured=captured)  # the next is due
    with monkeypatch.context() as patch:
        patch.setattr(_linalg, "cholesky", broken)
        updates, after = compiled(tx)(others, before, captured=later)
    assert after.failures == 2
    chex.assert_trees_all_equal(after.systems, before.systems)
    expected, _ = compiled(own)(others, own.init(params), captured=later, fisher=captured)
    assert_equal_to_rounding(updates, expected)


def test_a_failure_with_nothing_kept_updates_nothing(monkeypatch):
    net, params = DEEP, DEEP.params()
    monkeypatch.setattr(_linalg, "cholesky", functools.partial(failing, _linalg.cholesky))
    grads, captured = capture(net, params, net.data())
    tx = scale_by_natural_gradient(net.layers())
    updates, state = jax.jit(tx.update)(grads, tx.init(params), captured=captured)
    assert state.failures == 1
    chex.assert_trees_all_equal(updates, optax.tree.zeros_like(updates))


def test_seeds_can_be_mapped_over():
    net = DEEP
    tx = natural_gradient(net.layers(), 0.1, net.batch, period=2)

    def train(params, x, y):
        def step(carry, _):
            params, state = carry
            run = lp.value_grad_and_capture(net.loss, curvature="fisher_empirical")
            loss, grads, captured = run(params, x, y)
            updates, state = tx.update(
                grads,
                state,
                params,
                captured=captured,
                value=loss,
                grad=grads,
                value_fn=lambda p: net.loss(p, x, y),
            )
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=3)[0][0]

    params = [net.params(seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    together = jax.jit(jax.vmap(train, (0, None, None)))(stacked, *net.data())
    for i, own in enumerate(params):
        alone = jax.jit(train)(own, *net.data())
        assert_equal_to_rounding(jax.tree.map(lambda leaf, i=i: leaf[i], together), alone, 1e-9)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"damping": 0.0}, "`damping` must be positive"),
        ({"curvature": "ggn_mc"}, "`curvature` is 'empirical' or 'captured'"),
        ({"batch_size": 0}, "`batch_size`.*whole"),
        ({"batch_size": 5, "samples": 0}, "`samples`.*whole"),
        ({"batch_size": 5, "period": 0}, "`period`.*whole"),
        ({"period": 2}, "`period=2`.*say .* `batch_size`"),
    ],
)
def test_arguments_are_checked_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        scale_by_natural_gradient(DEEP.layers(), **options)


def test_layers_without_a_batch_axis_cannot_keep_a_batch():
    params = {"kernel": jnp.ones((3, 2))}

    def loss(p, x):  # whose rows no data have
        return jnp.mean((jnp.broadcast_to(x[None], (4, 3)) @ p["kernel"]) ** 2)

    layers = lp.find_layers(loss, params, jnp.ones(3))
    with pytest.raises(ValueError, match=r"batch at kernel.*Leave `batch_size` out.*`tx.update"):
        scale_by_natural_gradient(layers, 4)


@pytest.mark.parametrize(
    "batch_size, samples, message",
    [
        (4, 1, "`batch_size=4`.*3 rows per example at layer0.*1 samples of 5 examples"),
        (5, 2, "`samples=2`.*1 samples of 5 examples"),
    ],
)
def test_batches_of_another_size_than_said_are_an_error(batch_size, samples, message):
    params = TOKENS.params()
    tx = scale_by_natural_gradient(TOKENS.layers(), batch_size, samples=samples)
    grads, captured = capture(TOKENS, params, TOKENS.data())
    with pytest.raises(ValueError, match=message):
        tx.update(grads, tx.init(params), captured=captured)


def test_layers_that_differ_in_their_examples_have_no_common_fisher():
    def loss_fn(params, x):
        hidden = jnp.tanh(x @ params["a"]["kernel"]).reshape(-1, 2)
        return jnp.mean((hidden @ params["b"]["kernel"]) ** 2)

    params = {"a": {"kernel": jnp.ones((3, 2))}, "b": {"kernel": jnp.ones((2, 2))}}
    x = jnp.ones((4, 5, 3))
    layers = lp.find_layers(loss_fn, params, x)
    run = lp.value_grad_and_capture(loss_fn, curvature="fisher_empirical")
    _, grads, captured = run(params, x)
    tx = scale_by_natural_gradient(layers)
    with pytest.raises(ValueError, match=r"4 examples at a and 20 at b.*`block_diagonal=True`"):
        tx.update(grads, tx.init(params), captured=captured)
    apart = scale_by_natural_gradient(layers, block_diagonal=True)
    updates, _ = apart.update(grads, apart.init(params), captured=captured)
    chex.assert_tree_all_finite(updates)


def test_a_fisher_beside_the_one_kept_is_an_error():
    net, params = DEEP, DEEP.params()
    tx = scale_by_natural_gradient(net.layers(), net.batch)
    grads, captured = capture(net, params, net.data())
    with pytest.raises(ValueError, match="either leave that out or `fisher`"):
        tx.update(grads, tx.init(params), captured=captured, fisher=captured)


def test_missing_arrays_are_an_error_with_the_remedy():
    net, params = DEEP, DEEP.params()
    tx = scale_by_natural_gradient(net.layers())
    with pytest.raises(TypeError, match="`scale_by_natural_gradient` needs the activations"):
        tx.update(params, tx.init(params))
    _, grads, captured = lp.value_grad_and_capture(net.loss)(params, *net.data())
    with pytest.raises(ValueError, match=r"were not captured.*`value_grad_and_capture"):
        tx.update(grads, tx.init(params), captured=captured)
    with pytest.raises(ValueError, match="were not captured"):
        fisher_norm(net.layers(), captured, params)
    with pytest.raises(TypeError, match="`fisher_product` needs"):
        fisher_product(net.layers(), None, params)
    with pytest.raises(ValueError, match="`damping` must be positive"):
        inverse_fisher_product(net.layers(), captured, params, 0.0)
    with pytest.raises(ValueError, match="`examples` must be positive"):
        sample_laplace(jax.random.key(0), net.layers(), captured, params, 1.0, 0)


# --- the Laplace posterior -----------------------------------------------------------------------


@settings(max_examples=2)
@given(
    net=nets(),
    block_diagonal=st.booleans(),
    prior=st.floats(0.1, 3),
    examples=st.integers(1, 1000),
)
def test_laplace_samples_have_exactly_the_posterior_covariance(
    net, block_diagonal, prior, examples
):
    params, layers = net.params(), net.layers()
    _, captured = capture(net, params, net.data())
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    _, systems = _open("test", layers, captured, params, "values", block_diagonal, "captured")
    empty = [jnp.zeros((1, net.batch)) for _ in systems]
    noises, unravel_noise = jax.flatten_util.ravel_pytree(empty)

    def offset(normal):
        own, noise = unravel(normal[: len(flat)]), unravel_noise(normal[len(flat) :])
        return ravel_traced(laplace_offset(layers, systems, own, noise, prior, examples))

    size = len(flat) + len(noises)
    map_of_noise = np.asarray(jax.jit(jax.vmap(offset))(jnp.eye(size))).T
    some = np.linspace(-1, 1, size)  # it is linear: its columns say it all
    assert_equal_to_rounding(jax.jit(offset)(jnp.asarray(some)), map_of_noise @ some)
    g = dense_columns(net, params, captured)
    precision = prior * np.eye(len(flat))
    for places in systems_of(net, params, block_diagonal):
        precision[np.ix_(places, places)] += examples * g[places] @ g[places].T
    covariance = np.linalg.inv(precision)
    assert_equal_to_rounding(map_of_noise @ map_of_noise.T, covariance, 1e-8)


def test_a_laplace_sample_is_that_map_of_drawn_noise(monkeypatch):
    net, params, layers = DEEP, DEEP.params(), DEEP.layers()
    _, captured = capture(net, params, net.data())
    drawn, real = [], laplace_offset

    def spy(layers, systems, normal, noise, *rest):
        drawn.append(np.concatenate([ravel(normal), ravel(noise)]))
        return real(layers, systems, normal, noise, *rest)

    monkeypatch.setattr("locoprop_jax._curvature.fisher.laplace_offset", spy)
    draw = lambda seed: sample_laplace(  # noqa: E731
        jax.random.key(seed), layers, captured, params, 2.0, 50
    )
    samples = [draw(seed) for seed in range(2)]
    monkeypatch.undo()
    _, systems = _open("test", layers, captured, params, "values", False, "captured")
    size = len(ravel(params))
    _, unravel = jax.flatten_util.ravel_pytree(params)
    for normal, sample in zip(drawn, samples, strict=True):
        assert len(normal) == size + net.batch
        noise = [jnp.asarray(normal[size:]).reshape(1, -1)]
        offset = real(layers, systems, unravel(jnp.asarray(normal[:size])), noise, 2.0, 50)
        assert_equal_to_rounding(sample, jax.tree.map(jnp.add, params, offset))
        assert len(np.unique(normal)) == len(normal)  # no key is used twice
    assert not np.intersect1d(*drawn).size


def test_laplace_samples_spread_as_the_posterior_says():
    net, params, layers = DEEP, DEEP.params(), DEEP.layers()
    _, captured = capture(net, params, net.data())
    draw = lambda key: ravel_traced(  # noqa: E731
        sample_laplace(key, layers, captured, params, 2.0, 50)
    )
    count = 4000
    samples = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), count)))
    g = dense_columns(net, params, captured)
    precision = 2 * np.eye(len(g)) + 50 * g @ g.T
    centred = samples - ravel(params)
    # chi-square with as many degrees of freedom as numbers: within five standard deviations
    distances = np.einsum("si,ij,sj->", centred, precision, centred)
    freedom = count * len(g)
    assert abs(distances - freedom) < 5 * math.sqrt(2 * freedom)
