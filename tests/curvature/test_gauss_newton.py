"""Gauss-Newton and Fisher products, step sizes, Hessian-free: against dense matrices."""

import functools
import types

import chex
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import locoprop_jax as lp
from locoprop_jax._curvature.candidate import judged_damping
from locoprop_jax._curvature.quadratic import Verdict, adapted_radius, levenberg_marquardt
from tests.dense_nets import (
    Net,
    flat,
    nets,
    one_more_refused,
)

NET = Net(widths=(3, 4, 2), transfers=("tanh",), biases=(True, True), head="sigmoid", batch=6)


def dense(product_at, params):
    """The matrix of a product with vectors that is made at some parameters."""
    unravel = jax.flatten_util.ravel_pytree(params)[1]

    @jax.jit
    def columns(params, vectors):
        product = product_at(params)
        return jax.vmap(lambda v: jax.flatten_util.ravel_pytree(product(unravel(v)))[0])(vectors)

    return np.asarray(columns(params, np.eye(flat(params).size))).T


def dense_gauss_newton(loss_fn, params, *args, **options):
    return dense(lambda p: lp.gauss_newton_vector_product(loss_fn, p, *args, **options), params)


def diagonal_blocks(matrix, params):
    """All but the layers' diagonal blocks set to zero."""
    names = [
        jax.tree_util.keystr(path[:1]) for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    owner = np.repeat(names, sizes)
    return np.where(owner[:, None] == owner[None], matrix, 0)


# --- products ------------------------------------------------------------------------------------


@settings(max_examples=5)
@given(
    net=nets(),
    wrapper=st.sampled_from([lambda f: f, jax.jit, jax.checkpoint]),
    seed=st.integers(0, 99),
)
def test_the_product_is_that_of_the_dense_gauss_newton_matrix(net, wrapper, seed):
    params, batch = net.params(seed), net.data(seed)
    matrix = net.gauss_newton(params, *batch)
    found = dense_gauss_newton(wrapper(net.loss), params, *batch)
    np.testing.assert_allclose(found, matrix, atol=1e-12 * (1 + abs(matrix).max()))


def test_the_product_of_blocks_leaves_out_what_is_between_layers():
    params, batch = NET.params(), NET.data()
    found = dense_gauss_newton(NET.loss, params, *batch, layers=NET.layers())
    expected = diagonal_blocks(NET.gauss_newton(params, *batch), params)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_parameters_in_no_layer_are_a_block_of_their_own():
    def loss_fn(params, x, y):
        return optax.l2_loss((params["gain"] * x) @ params["kernel"], y).mean()

    params = {"gain": np.array(1.5), "kernel": np.ones((3, 2))}
    batch = NET.data()
    layers = lp.find_layers(loss_fn, params, *batch, on_uncaptured="pass")
    whole = dense_gauss_newton(loss_fn, params, *batch)
    blocks = dense_gauss_newton(loss_fn, params, *batch, layers=layers)
    np.testing.assert_allclose(blocks, diagonal_blocks(whole, params), atol=1e-12)
    assert abs(whole - blocks).max() > 0.01


def test_weight_decay_and_whatever_else_meets_no_data_does_not_enter():
    decayed = Net(**{**vars(NET), "decay": 3.0})
    params, batch = NET.params(), NET.data()
    found = dense_gauss_newton(decayed.loss, params, *batch)
    np.testing.assert_allclose(found, NET.gauss_newton(params, *batch), atol=1e-12)


def test_a_penalty_on_a_parameter_that_is_a_layer_at_its_own_value_does_not_enter():
    """Found by random programs: the square was taken for a loss of the parameter itself."""

    def loss(decay, p, x, y):
        h = x @ p["kernel"]
        h = jnp.tanh(h / p["scale"][None]) + jnp.tanh(h * p["scale"][None])
        return jnp.mean((h @ p["out"] - y) ** 2) + decay * jnp.sum(p["scale"] ** 2)

    rng = np.random.default_rng(0)
    shapes = {"kernel": (3, 2), "scale": (2,), "out": (2, 2)}
    params = {name: 1 + rng.random(shape) for name, shape in shapes.items()}
    batch = rng.normal(size=(4, 3)), rng.normal(size=(4, 2))
    penalised = functools.partial(loss, 3.0)
    assert lp.find_layers(penalised, params, *batch)["scale"].kind == "bias"
    expected = dense_gauss_newton(functools.partial(loss, 0.0), params, *batch)
    np.testing.assert_allclose(dense_gauss_newton(penalised, params, *batch), expected, atol=1e-12)


def test_examples_may_meet_in_the_head():
    """A contrastive loss: its Hessian is not one block per example, and needs not be."""

    def head(z):
        return -jnp.diagonal(jax.nn.log_softmax(z @ z.T / 2)).mean()

    def loss_fn(w, x):
        return head(x @ w)

    x, w = np.random.default_rng(0).normal(size=(4, 3)), np.eye(3)[:, :2]
    j = np.kron(x, np.eye(2))
    hessian = jax.jit(jax.hessian(lambda z: head(z.reshape(4, 2))))((x @ w).ravel())
    np.testing.assert_allclose(dense_gauss_newton(loss_fn, w, x), j.T @ hessian @ j, atol=1e-12)


def mixture(outputs, labels):
    """-log of practical GN, eq. 27: a mixture of two binary classifiers."""
    first, second, third = outputs[..., 0], outputs[..., 1], outputs[..., 2]
    sign = 2 * labels - 1
    one = jax.nn.log_sigmoid(first) + jax.nn.log_sigmoid(sign * second)
    other = jax.nn.log_sigmoid(-first) + jax.nn.log_sigmoid(sign * third)
    return -jnp.logaddexp(one, other)


def sample_mixture(rng, outputs):
    p = jnp.exp(-mixture(outputs, jnp.ones(outputs.shape[:-1])))
    return jax.random.bernoulli(rng, p).astype(outputs.dtype)


def dense_fisher(loss_fn, w):
    rng = jax.random.key(0)
    return dense(lambda w: lp.fisher_vector_product(loss_fn, w, rng=rng, samples=20_000), w)


marked_mixture = lp.losses.output_loss(sample=sample_mixture)(mixture)


def test_of_an_indefinite_hessian_the_positive_part_counts():
    rng = np.random.default_rng(0)
    w, x, y = rng.normal(size=(4, 3)), rng.normal(size=(5, 4)), np.array([0.0, 1, 0, 1, 1])
    hessians = jax.jit(jax.vmap(jax.hessian(mixture)))(x @ w, y)
    expected, lowest = 0, 0
    for row, hessian in zip(x, np.asarray(hessians) / 5, strict=True):
        values, bases = np.linalg.eigh(hessian)
        lowest = min(lowest, values[0])
        positive = (bases * np.maximum(values, 0)) @ bases.T
        j = np.kron(row[None], np.eye(3))
        expected += j.T @ positive @ j
    assert lowest < -1e-4
    found = dense_gauss_newton(lambda w: marked_mixture(x @ w, y).mean(), w)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_the_fisher_of_the_mixture_is_not_its_gauss_newton_matrix():
    """Its Fisher is that of eq. 49, of rank one per example."""
    rng = np.random.default_rng(0)
    w, x, y = rng.normal(size=(4, 3)), rng.normal(size=(2, 4)), np.array([0.0, 1])
    loss_fn = lambda w: marked_mixture(x @ w, y).mean()  # noqa: E731
    losses_and_slopes = jax.jit(jax.vmap(jax.value_and_grad(mixture), (0, None)))
    expected = 0
    for label in (0.0, 1.0):
        for row, loss, e in zip(x, *map(np.asarray, losses_and_slopes(x @ w, label)), strict=True):
            j = np.kron(row[None], np.eye(3))
            expected += np.exp(-loss) * j.T @ np.outer(e, e) @ j / 2
    fisher = dense_fisher(loss_fn, w)
    np.testing.assert_allclose(fisher, expected, atol=0.02 * abs(expected).max())
    matrix = dense_gauss_newton(loss_fn, w)
    assert abs(matrix - fisher).max() > 0.3 * abs(fisher).max()


@pytest.mark.parametrize(
    ("loss", "labels"),
    [
        (lp.losses.softmax_cross_entropy, np.array([[0.2, 0.5, 0.3], [1.0, 0, 0]])),
        (lp.losses.squared_error, np.array([[0.2, 0.5, 0.3], [1.0, 0, 0]])),
    ],
)
def test_of_an_exponential_family_fisher_and_gauss_newton_agree(loss, labels):
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(2, 3)), rng.normal(size=(2, 2))
    loss_fn = lambda w: loss(x @ w, labels).mean()  # noqa: E731
    matrix = dense_gauss_newton(loss_fn, w)
    np.testing.assert_allclose(dense_fisher(loss_fn, w), matrix, atol=0.03 * abs(matrix).max())


def test_the_rank_of_the_matrix_is_bounded_by_that_of_the_hessians():
    """Practical GN, appendix D: a softmax over K classes has rank K - 1 per example."""
    net = Net(**{**vars(NET), "head": "softmax", "widths": (3, 4, 3), "batch": 2})
    params, batch = net.params(), net.data()
    matrix = dense_gauss_newton(net.loss, params, *batch)
    assert np.linalg.matrix_rank(matrix) == 2 * 2


def test_a_transfer_function_with_a_backward_pass_of_its_own():
    @jax.custom_vjp
    def cube(a):
        return a**3

    cube.defvjp(lambda a: (a**3, a), lambda a, e: (3 * a**2 * e,))

    def loss(transfer, w, x):
        return optax.l2_loss(transfer(x @ w["in"]) @ w["out"], x).sum(-1).mean()

    w, x = {"in": np.ones((3, 2)) / 2, "out": np.ones((2, 3))}, NET.data()[0]
    matrices = [
        dense_gauss_newton(functools.partial(loss, transfer), w, x)
        for transfer in (cube, lambda a: a**3)
    ]
    np.testing.assert_allclose(matrices[0], matrices[1], atol=1e-12)
    assert abs(matrices[0]).max() > 0.1


def test_errors_of_products_say_what_to_do():
    params, batch = NET.params(), NET.data()
    with pytest.raises(TypeError, match="rng"):
        lp.fisher_vector_product(NET.loss, params, *batch)
    with pytest.raises(ValueError, match=r"fisher_mc.*locoprop_jax.losses"):
        huber = lambda p, x, y: optax.huber_loss(NET.outputs(p, x), y).mean()  # noqa: E731
        lp.fisher_vector_product(huber, params, *batch, rng=jax.random.key(0))
    with pytest.raises(ValueError, match="no layer"):
        lp.gauss_newton_vector_product(lambda w: jnp.sum(w**2), jnp.ones(3))

    def two_heads(w, x):
        return jnp.sum(jnp.tanh(x @ w["a"]) ** 2 * jnp.sin(x @ w["b"]))

    with pytest.raises(ValueError, match=r"gauss_newton_vector_product.*layers meet.*: a, b"):
        w = {"a": jnp.ones((3, 2)), "b": jnp.ones((3, 2))}
        lp.gauss_newton_vector_product(two_heads, w, batch[0])


# --- steps ---------------------------------------------------------------------------------------


def line(net, batch, **options):
    """An update function that passes what line searches take."""

    @functools.partial(jax.jit, static_argnums=0)
    def update(tx, params, state, batch):
        capture = lp.value_grad_and_capture(net.loss, **options)
        value, grads, captured = capture(params, *batch)
        return tx.update(
            grads,
            state,
            params,
            captured=captured,
            value=value,
            grad=grads,
            value_fn=lambda p: net.loss(p, *batch),
        )

    return lambda tx, params, state, batch=batch: update(tx, params, state, batch)


@settings(max_examples=4)
@given(net=nets(), damping=st.floats(0, 2), l2=st.sampled_from([0.0, 0.3]), seed=st.integers(0, 99))
def test_the_step_minimises_the_damped_model(net, damping, l2, seed):
    """alpha = d'g / d'Cd (practical GN, eq. 40), with tau in units of d'Gd / d'd."""
    params, batch = net.params(seed), net.data(seed)
    tx = lp.scale_by_gauss_newton_step(damping=damping, l2=l2, bounded=False)
    update, state = line(net, batch)(tx, params, tx.init(params))
    d, g = net.slope(params, *batch), net.gauss_newton(params, *batch)
    slope = d + l2 * flat(params)
    tau = damping * (d @ g @ d) / (d @ d) if d.any() else 0.0
    curvature = d @ g @ d + (tau + l2) * d @ d
    alpha = d @ slope / curvature if curvature > 0 else 0.0  # a network may be dead
    np.testing.assert_allclose(flat(update), alpha * d, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(state.step_size, alpha, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(state.damping, tau, rtol=1e-8, atol=1e-12)


def test_with_momentum_the_step_is_the_best_one_in_the_plane_of_both_directions():
    params, batch = NET.params(), NET.data()
    tx, step = lp.scale_by_gauss_newton_step(momentum=True, damping=0.3), line(NET, batch)
    first, state = step(tx, params, tx.init(params))
    moved = jax.tree.map(np.subtract, params, first)
    second, state = step(tx, moved, state)
    slope, matrix = NET.slope(moved, *batch), NET.gauss_newton(moved, *batch)
    basis = np.stack([slope, flat(first)], 1)
    damped = matrix + float(state.damping) * np.eye(len(slope))
    steps = np.linalg.solve(basis.T @ damped @ basis, basis.T @ slope)
    np.testing.assert_allclose(flat(second), basis @ steps, rtol=1e-6)
    assert abs(steps[1]) > 1e-3


@pytest.mark.parametrize("part", [1e-3, 1.0])
def test_no_more_than_the_last_update_itself_is_added(part):
    """A small part of it would be taken many times over; the rest of the step is the best one."""
    params, batch = NET.params(), NET.data()
    tx, step = lp.scale_by_gauss_newton_step(momentum=True, damping=0.3), line(NET, batch)
    first, state = step(tx, params, tx.init(params))
    moved = jax.tree.map(np.subtract, params, first)
    previous = jax.tree.map(lambda u: part * np.asarray(u), state.previous)
    second, state = step(tx, moved, state._replace(previous=previous))
    slope, matrix = NET.slope(moved, *batch), NET.gauss_newton(moved, *batch)
    damped, last = matrix + float(state.damping) * np.eye(len(slope)), flat(previous)
    basis = np.stack([slope, last], 1)
    free = np.linalg.solve(basis.T @ damped @ basis, basis.T @ slope)
    assert (abs(free[1]) > 1) == (part < 1)
    held = np.clip(free[1], -1, 1)
    alpha = slope @ (slope - held * damped @ last) / (slope @ damped @ slope)
    expected = alpha * slope + held * last
    np.testing.assert_allclose(flat(second), expected, rtol=1e-6, atol=1e-12)
    change = expected @ damped @ expected / 2 - expected @ slope
    np.testing.assert_allclose(state.model_change, change, rtol=1e-6)


def test_between_measurements_the_curvature_is_what_was_measured_last():
    """Of d = g its ratio to d'g, and with the last update s the angle, in the metric of GGN."""
    params, batch = NET.params(), NET.data()
    tx = lp.scale_by_gauss_newton_step(momentum=True, damping=0.3, model_period=5, bounded=False)
    step = line(NET, batch)
    first, state = step(tx, params, tx.init(params))
    assert state.reduction_ratio == 1  # nothing was judged yet: every step is measured
    moved = jax.tree.map(np.subtract, params, first)
    noisy = state._replace(reduction_ratio=np.asarray(0.1))
    carried, state = step(tx, moved, noisy)
    slope, last = NET.slope(moved, *batch), flat(first)
    own, square = noisy.carried.ratio * slope @ slope, noisy.carried.square
    both = noisy.carried.cosine * np.sqrt(own * square)
    basis = np.stack([slope, last], 1)
    matrix = np.asarray([[own, both], [both, square]]) + float(state.damping) * basis.T @ basis
    steps = np.linalg.solve(matrix, basis.T @ slope)
    np.testing.assert_allclose(flat(carried), basis @ steps, rtol=1e-6)
    old = NET.gauss_newton(params, *batch)
    np.testing.assert_allclose(square, last @ old @ last, rtol=1e-6)
    # The fifth is measured, because the sixth judges it.
    _, measured = step(tx, moved, noisy._replace(count=np.asarray(4, np.int32)))
    matrix = NET.gauss_newton(moved, *batch)
    ratio = slope @ matrix @ slope / (slope @ slope)
    np.testing.assert_allclose(measured.carried.ratio, ratio, rtol=1e-6)


def test_the_learning_rate_is_part_of_the_step():
    """Momentum and the judgment are of the step as it was taken."""
    params, batch = NET.params(), NET.data()
    step = line(NET, batch)
    whole = lp.scale_by_gauss_newton_step(bounded=False)
    scaled = lp.scale_by_gauss_newton_step(bounded=False, learning_rate=lambda count: 0.5)
    (full, _), (half, state) = (step(tx, params, tx.init(params)) for tx in (whole, scaled))
    chex.assert_trees_all_close(half, jax.tree.map(lambda u: 0.5 * u, full), rtol=1e-6)
    chex.assert_trees_all_close(state.previous, half)
    d, slope = flat(half), NET.slope(params, *batch)
    damped = NET.gauss_newton(params, *batch) + float(state.damping) * np.eye(len(d))
    np.testing.assert_allclose(state.model_change, d @ damped @ d / 2 - d @ slope, rtol=1e-6)


def gauss_newton_along_the_gradient(**options):
    return lp.scale_by_gauss_newton_step(bounded=False, **options)


@pytest.mark.parametrize(
    "ratio, before, expected",
    [
        (1.0, 0.8, 0.01),
        (1.0, 0.5, 0.1),  # once is chance
        (0.5, 1.0, 0.1),
        (0.2, 1.0, 2.0),  # to what it was at first
        (np.nan, 1.0, 0.1),
    ],
)
def test_gamma_shrinks_where_the_next_batches_find_the_model_right(ratio, before, expected):
    gamma = judged_damping(jnp.asarray(0.1), 2.0, jnp.asarray(ratio), jnp.asarray(before))
    np.testing.assert_allclose(gamma, expected, rtol=1e-6)


@pytest.mark.parametrize("make", [lp.scale_by_hessian_free, gauss_newton_along_the_gradient])
def test_a_step_is_halved_while_the_loss_of_its_batch_rises(make):
    """The model of tanh, from where it is nearly flat, goes far beyond its minimum."""

    def loss_fn(params, x):
        return lp.losses.squared_error(jnp.tanh(x @ params["w"]), jnp.zeros((4, 1))).mean()

    params, x = {"w": jnp.full((1, 1), 1.5)}, jnp.ones((4, 1))
    value, grads = jax.value_and_grad(loss_fn)(params, x)
    moves = {}
    for halvings in (0, 20):
        tx = make(damping=0.0, halvings=halvings)
        line_search = {"value": value, "value_fn": lambda p: loss_fn(p, x), "grad": grads}
        update, state = tx.update(grads, tx.init(params), params, **line_search)
        after = float(loss_fn(jax.tree.map(jnp.subtract, params, update), x))
        moves[halvings] = float(update["w"][0, 0]), after, float(state.model_change)
    (whole, rose, _), (part, fell, change) = moves[0], moves[20]
    assert rose > value >= fell
    share = part / whole
    assert share < 1
    np.testing.assert_allclose(np.log2(share), np.round(np.log2(share)), atol=1e-5)
    # The whole step d ends at the minimum of the model, which a share of it reaches in part.
    expected = -(share - share**2 / 2) * whole * float(grads["w"][0, 0])
    np.testing.assert_allclose(change, expected, rtol=1e-4)


@functools.cache
def bounded_and_free():
    """Two transformations, and a step of a loss in units that its batch says."""

    def loss_fn(params, x, y, scale):
        losses = lp.losses.sigmoid_binary_cross_entropy(NET.outputs(params, x), y)
        return scale * losses.sum(-1).mean()

    tx, free = (lp.scale_by_gauss_newton_step(bounded=bounded) for bounded in (True, False))
    return tx, free, line(types.SimpleNamespace(loss=loss_fn), None)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_outputs_move_no_further_than_a_share_of_the_first_loss(scale):
    """In any units of the loss the step is the same."""
    params, batch = NET.params(), NET.data()
    tx, free, step = bounded_and_free()
    step, state = functools.partial(step, batch=(*batch, np.asarray(scale))), tx.init(params)
    long, _ = step(free, params, free.init(params))
    matrix, loss = NET.gauss_newton(params, *batch), NET.value(params, *batch)

    def moved(update):
        return flat(update) @ matrix @ flat(update) / 2

    assert moved(long) > 0.01 * loss
    update, new = step(tx, params, state)
    np.testing.assert_allclose(moved(update), 0.01 * loss, rtol=1e-8)
    np.testing.assert_allclose(flat(update) / flat(update)[0], flat(long) / flat(long)[0])
    np.testing.assert_allclose((new.radius, new.length), 0.01 * scale * loss)
    update, _ = step(tx, params, state._replace(radius=np.asarray(2e-3 * scale * loss)))
    np.testing.assert_allclose(moved(update), 2e-3 * loss, rtol=1e-8)


@pytest.mark.parametrize(
    "fall, rest, length, expected",
    [
        (0.1, 0.1, 3.0, 12.0),  # held back, and good
        (-0.1, 0.1, 3.0, 3.0),  # the loss rose, but not at the end of the step
        (0.1, -0.1, 1.0, 3.0),  # not held back
        (-0.1, -0.1, 1.0, 1.5),  # too long
        (-0.1, -0.1, 3.0, 1.5),
        (np.nan, np.nan, 3.0, 1.5),
    ],
)
def test_the_radius_grows_where_steps_reach_it_and_shrinks_where_the_loss_rose(
    fall, rest, length, expected
):
    radius = jax.jit(adapted_radius)(3.0, length, Verdict(fall / 0.2, fall, rest), 0.5)
    assert radius == expected


@pytest.mark.parametrize("is_same", [True, False], ids=["one batch", "fresh batches"])
def test_tau_follows_levenberg_and_marquardt_as_the_next_batch_judges(is_same):
    batches = [NET.data(1 if is_same else 1 + i) for i in range(6)]
    tx, step = lp.scale_by_gauss_newton_step(damping_period=2, decay=0.9), line(NET, None)
    path, updates, states = [NET.params()], [], [tx.init(NET.params())]
    for batch in batches:
        update, state = step(tx, path[-1], states[-1], batch)
        states.append(state)
        updates.append(flat(update))
        path.append(jax.tree.map(np.subtract, path[-1], update))
    taus = [float(state.damping) for state in states[1:]]
    ratios = [float(state.reduction_ratio) for state in states[1:]]
    for i in (1, 3, 5):
        assert (taus[i], ratios[i]) == (taus[i - 1], ratios[i - 1])
    for i in (2, 4):  # by the batch of step i, what step i - 1 did
        before, after, d = path[i - 1], path[i], updates[i - 1]
        slope = NET.slope(before, *batches[i - 1])
        damped = NET.gauss_newton(before, *batches[i - 1]) + taus[i - 1] * np.eye(len(d))
        change = d @ damped @ d / 2 - d @ slope
        np.testing.assert_allclose(states[i].model_change, change, rtol=1e-6)
        fall = NET.value(after, *batches[i]) - NET.value(before, *batches[i])
        np.testing.assert_allclose(ratios[i], fall / change, rtol=1e-6)
        rest = NET.slope(after, *batches[i]) @ d
        slope_before = rest + 2 * (-fall - rest)  # of the parabola
        best = slope_before / (slope_before - rest) if slope_before > rest else np.inf
        is_short = rest > 0 and best > 2
        factor = 0.81 if ratios[i] > 0.75 or is_short else 1.0
        if ratios[i] < 0.25 and rest <= 0:
            factor = 0.81 ** -(1 if ratios[i] >= -2 else 4)
        np.testing.assert_allclose(taus[i], taus[i - 1] * factor, rtol=1e-12)


@jax.jit
def judged(verdict):
    """What it says, and the damping of 3 after it, in steps of one half."""
    damping = levenberg_marquardt(jnp.asarray(3.0), verdict, jnp.asarray(0.5))
    return verdict.is_too_long, verdict.is_too_short, damping


@pytest.mark.parametrize("curvature", [0.0, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("predicted", [0.1, 1.0, 10.0])
def test_damping_grows_after_a_step_too_long_and_shrinks_after_one_too_short(curvature, predicted):
    """On a parabola 1 - s + curvature s^2 / 2 along the step, whose end is s = 1."""
    fall, rest = 1 - curvature / 2, 1 - curvature
    ratio = fall / predicted
    is_too_long, is_too_short, damping = judged(Verdict(ratio, fall, rest))
    best = 1 / curvature if curvature else np.inf
    assert is_too_long == (best <= 1)
    assert is_too_short == (best > 2)
    factor = 0.5 if ratio > 0.75 or best > 2 else 1.0
    if ratio < 0.25 and best <= 1:
        factor = 2.0 if ratio >= -2 else 16.0
    assert damping == 3.0 * factor


@pytest.mark.parametrize("ratio", [np.nan, -np.inf])
def test_damping_grows_where_the_loss_is_not_finite(ratio):
    *_, damping = judged(Verdict(ratio, 1.0, 0.7))
    assert damping == 48.0


def test_gamma_is_the_best_of_three_by_the_model():
    params, batch = NET.params(), NET.data()
    layers = NET.layers()

    def kfac(gamma):
        return lp.scale_by_kfac(layers, damping=gamma, decay=0.0)

    options = {"inner_damping_period": 2, "decay": 0.5, "inner_damping": 0.7}
    tx, step = (
        lp.scale_by_gauss_newton_step(kfac, **options),
        line(NET, batch, curvature="ggn_exact"),
    )
    state = tx.init(params)
    for _ in range(2):
        update, state = step(tx, params, state)
        np.testing.assert_allclose(state.inner_damping, 0.7)
    update, new = step(tx, params, state)
    slope, matrix = NET.slope(params, *batch), NET.gauss_newton(params, *batch)
    damped = matrix + float(state.damping) * np.eye(len(slope))
    found = {}

    @jax.jit
    def direction(gamma, params, batch):
        capture = lp.value_grad_and_capture(NET.loss, curvature="ggn_exact")
        _, grads, captured = capture(params, *batch)
        single = kfac(gamma)
        return single.update(grads, single.init(params), params, captured=captured)[0]

    for gamma in (0.7 / 4, 0.7, 0.7 * 4):
        d = flat(direction(gamma, params, batch))
        found[gamma] = -((d @ slope) ** 2) / (d @ damped @ d) / 2
    np.testing.assert_allclose(new.inner_damping, min(found, key=lambda gamma: found[gamma]))
    model = flat(update) @ damped @ flat(update) / 2 - flat(update) @ slope
    np.testing.assert_allclose(model, min(found.values()), rtol=1e-6)


def test_along_the_gauss_newton_direction_the_step_is_one():
    """For a linear network with squared loss one step ends at the minimum."""
    net = Net(widths=(3, 2), transfers=(), biases=(True,), head="squared", batch=8)
    params, batch = net.params(), net.data()
    tx = lp.scale_by_gauss_newton_step(
        lp.scale_by_foof(net.layers(), damping=0.0, decay=0.0), damping=0.0
    )
    update, state = line(net, batch)(tx, params, tx.init(params))
    params = jax.tree.map(np.subtract, params, update)
    assert abs(net.slope(params, *batch)).max() < 1e-10
    assert state.step_size > 0


def test_a_direction_that_ascends_is_turned_around():
    params, batch = NET.params(), NET.data()
    step = line(NET, batch)
    down, up = (
        optax.chain(optax.scale(sign), lp.scale_by_gauss_newton_step()) for sign in (1.0, -1.0)
    )
    one, _ = step(down, params, down.init(params))
    other, _ = step(up, params, up.init(params))
    np.testing.assert_allclose(flat(one), flat(other), rtol=1e-12)


@pytest.mark.parametrize("momentum", [False, True])
def test_a_gradient_of_zero_and_a_batch_that_is_not_finite_move_nothing(momentum):
    layers = NET.layers()
    tx = lp.scale_by_gauss_newton_step(
        lambda gamma: lp.scale_by_kfac(layers, damping=gamma, curvature="empirical"),
        momentum=momentum,
    )
    params, (x, y), step = NET.params(), NET.data(), line(NET, None)
    zeros = jax.tree.map(np.zeros_like, params)
    update, state = step(tx, zeros, tx.init(zeros), (x, np.full((6, 2), 0.5)))
    assert not flat(update).any()
    bad = np.array(x)
    bad[0, 0] = np.nan
    update, new = step(tx, params, state, (bad, y))
    assert not flat(update).any()
    chex.assert_trees_all_equal(new, one_more_refused(state))


def test_errors_of_steps_say_what_is_missing():
    params = NET.params()
    tx = lp.scale_by_gauss_newton_step()
    with pytest.raises(TypeError, match="needs `value`, `grad`, `value_fn`: call"):
        tx.update(params, tx.init(params), params)
    with pytest.raises(TypeError, match="`scale_by_hessian_free` needs `params`"):
        tx = lp.scale_by_hessian_free()
        tx.update(params, tx.init(params), value=1.0, value_fn=lambda p: 1.0)
    with pytest.raises(ValueError, match="damping_period"):
        lp.scale_by_gauss_newton_step(damping_period=0)
    with pytest.raises(ValueError, match="iterations"):
        lp.scale_by_hessian_free(iterations=0)
    with pytest.raises(ValueError, match="l2"):
        lp.scale_by_hessian_free(l2=-1.0)


# --- Hessian-free --------------------------------------------------------------------------------


@settings(max_examples=4)
@given(net=nets(), l2=st.sampled_from([0.0, 0.2]), seed=st.integers(0, 99))
def test_with_enough_iterations_hessian_free_is_the_dense_solve(net, l2, seed):
    params, batch = net.params(seed), net.data(seed)
    options = {"iterations": 300, "tolerance": 0.0, "halvings": 0}
    tx = lp.scale_by_hessian_free(damping=0.5, l2=l2, **options)
    step = line(net, batch)
    update, state = step(tx, params, tx.init(params))
    slope = net.slope(params, *batch) + l2 * flat(params)
    matrix = net.gauss_newton(params, *batch)
    assume(slope @ matrix @ slope > 1e-9)  # a network may be dead
    amount = 0.5 * (slope @ matrix @ slope) / (slope @ slope)
    damped = matrix + (amount + l2) * np.eye(len(slope))
    solution = np.linalg.solve(damped, slope)
    np.testing.assert_allclose(flat(update), solution, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(state.damping, amount, rtol=1e-7)

    after, other = jax.tree.map(np.subtract, params, update), net.data(seed + 1)
    _, state = step(tx, after, state, other)  # another batch judges
    losses = [net.value(p, *other) + l2 / 2 * np.sum(flat(p) ** 2) for p in (params, after)]
    ratio = (losses[1] - losses[0]) / (solution @ damped @ solution / 2 - solution @ slope)
    np.testing.assert_allclose(state.reduction_ratio, ratio, rtol=1e-5, atol=1e-6)
    rest = (net.slope(after, *other) + l2 * flat(after)) @ flat(update)
    fall = losses[0] - losses[1]
    is_short = rest > 0 and rest > 2 * (fall - rest)  # the slope left, and the parabola's curvature
    factor = 2 / 3 if ratio > 0.75 or is_short else 1.0
    if ratio < 0.25 and rest <= 0:
        factor = 1.5 ** (1 if ratio >= -2 else 4)
    np.testing.assert_allclose(state.damping, amount * factor, rtol=1e-7)


def test_iterations_end_where_martens_ends_them_and_start_from_the_last_solution():
    params, batch = NET.params(), NET.data()
    tx, step = lp.scale_by_hessian_free(iterations=200, tolerance=5e-3), line(NET, batch)
    first, state = step(tx, params, tx.init(params))
    slope, matrix = NET.slope(params, *batch), NET.gauss_newton(params, *batch)
    amount = 0.1 * (slope @ matrix @ slope) / (slope @ slope)
    damped = matrix + amount * np.eye(len(slope))
    x, residual, direction = np.zeros_like(slope), slope.copy(), slope.copy()
    values = [0.0, 0.0]  # the empty guess takes an iteration
    for i in range(2, 200):
        image = damped @ direction
        alpha = residual @ residual / (direction @ image)
        x, new = x + alpha * direction, residual - alpha * image
        direction = new + (new @ new) / (residual @ residual) * direction
        residual = new
        values.append(x @ damped @ x / 2 - slope @ x)
        k = max(10, i // 10)
        if i > k and values[i] < 0 and values[i] - values[i - k] > k * 5e-3 * values[i]:
            break
    assert state.iterations == i - 1 < 40
    np.testing.assert_allclose(flat(first), x, rtol=1e-6)
    _, again = step(tx, params, state._replace(damping=np.asarray(amount)))
    assert again.iterations < state.iterations


def test_hessian_free_trains_a_network():
    params, batch = NET.params(), NET.data()
    tx, step = lp.hessian_free(), line(NET, batch)
    state, losses = tx.init(params), [NET.value(params, *batch)]
    for _ in range(10):
        update, state = step(tx, params, state)
        params = jax.tree.map(np.add, params, update)
        losses.append(NET.value(params, *batch))
    gradient = NET.slope(params, *batch)
    assert losses[-1] < 0.9 * losses[0]
    assert abs(gradient).max() < 0.05 * abs(NET.slope(NET.params(), *batch)).max()


@pytest.mark.parametrize("is_marked", [False, True])
def test_a_scale_after_the_last_layer_counts_also_where_the_batch_is_closed_over(
    is_marked,
):
    x = np.random.default_rng(0).normal(size=(8, 3))
    params = {"kernel": np.eye(3) / 2, "scale": np.ones(3)}
    error = lp.losses.squared_error if is_marked else optax.squared_error

    def loss_fn(params, x):
        outputs = jnp.tanh(x @ params["kernel"]) * params["scale"][None]
        return error(outputs, x).sum(-1).mean()

    def dense(v):
        def outputs(params):
            return jnp.tanh(x @ params["kernel"]) * params["scale"][None]

        pushed, pull = jax.jvp(outputs, (params,), (v,))[1], jax.vjp(outputs, params)[1]
        return pull(2 * pushed / len(x))[0]

    v = jax.tree.map(np.ones_like, params)
    expected = flat(jax.jit(dense)(v))
    product = lp.gauss_newton_vector_product(loss_fn, params, x)
    np.testing.assert_allclose(flat(product(v)), expected, rtol=1e-12)
    product = lp.gauss_newton_vector_product(lambda p: loss_fn(p, x), params)
    np.testing.assert_allclose(flat(product(v)), expected, rtol=1e-12)
