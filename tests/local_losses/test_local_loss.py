"""Local losses, against LocoProp's Algorithms 1 and 2 written out layer by layer in NumPy."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import locoprop_jax as lp
from tests.dense_nets import (
    DEEP,
    Net,
    assert_blocks,
    assert_equal_to_rounding,
    nets,
    sigmoid,
    softmax,
    take_step,
    update_function,
)


class SGD:
    """w <- w - eta g"""

    def step(self, gradient, eta):
        return -eta * gradient


class RMSProp:
    """TensorFlow's RMSProp with heavy-ball momentum."""

    decay, momentum, eps = 0.9, 0.9, 1e-6

    def __init__(self):
        self.mean_square, self.velocity = 1.0, 0.0

    def step(self, gradient, eta):
        self.mean_square = self.decay * self.mean_square + (1 - self.decay) * gradient**2
        scaled = eta * gradient / np.sqrt(self.mean_square + self.eps)
        self.velocity = self.momentum * self.velocity + scaled
        return -self.velocity


def algorithm(net, params, batch, *, matching, eta, gamma, iterations, l2=None, optimizers=None):
    """Algorithm 1 (squared) or 2 (matching) for one batch: the new block of each layer.

    The weight decay in the loss enters the local objectives as gamma <Rg, W~>.
    """
    new = {}
    for name, (x, a, e, f) in zip(net.names, net.backprop(params, *batch), strict=True):
        f = f if matching else lambda a: a
        target = f(a) - gamma * e
        start = w = net.block(params, name)
        optimizer = SGD() if optimizers is None else optimizers[name]
        for k in range(iterations):
            gradient = x.T @ (f(x @ w) - target) + gamma * net.decay * start
            if l2 is not None:
                gradient += l2 * (w - start)
            w = w + optimizer.step(gradient, eta * max(1 - k / iterations, 1 / 4))
        new[name] = w
    return new


# The paper's own parameters, which are absolute.
locoprop_s = functools.partial(lp.locoprop_s, relative=False)
locoprop_m = functools.partial(lp.locoprop_m, relative=False)
METHODS = {"locoprop_s": locoprop_s, "locoprop_m": locoprop_m}
each_method = pytest.mark.parametrize("name", METHODS)

# --- algorithms ----------------------------------------------------------------------------------


@settings(max_examples=6)
@given(
    net=nets(),
    name=st.sampled_from(list(METHODS)),
    l2=st.sampled_from([None, 3.0]),
    gamma=st.floats(0, 10),
    eta=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_one_iteration_of_gradient_descent_is_backprop(net, name, l2, gamma, eta, seed):
    options = {
        "gamma": gamma,
        "iterations": 1,
        "optimizer": optax.sgd,
        "regularizer": None if l2 is None else lp.l2(l2),
    }
    tx = METHODS[name](net.layers(), eta, **options)
    params, _ = take_step(net, tx, net.params(seed), net.data(seed))
    backprop = {}
    for layer, (x, _, e, _) in zip(
        net.names, net.backprop(net.params(seed), *net.data(seed)), strict=True
    ):
        w = net.block(net.params(seed), layer)
        backprop[layer] = w - eta * gamma * (x.T @ e + net.decay * w)
    assert_blocks(net, params, backprop)


@settings(max_examples=10)
@given(
    net=nets(),
    matching=st.booleans(),
    iterations=st.integers(2, 8),
    rmsprop=st.booleans(),
    l2=st.sampled_from([None, 2.0]),
    gamma=st.floats(0.1, 3.0),
    eta=st.floats(1e-3, 3e-2),
    seed=st.integers(0, 99),
)
def test_the_iterates_are_those_of_algorithms_1_and_2_over_two_batches(
    net, matching, iterations, rmsprop, l2, gamma, eta, seed
):
    gamma *= net.terms
    options = {
        "gamma": gamma,
        "iterations": iterations,
        "regularizer": None if l2 is None else lp.l2(l2),
    }
    if not rmsprop:
        options["optimizer"] = optax.sgd
    tx = (locoprop_m if matching else locoprop_s)(net.layers(), eta, **options)
    update = update_function(net, tx)
    params = net.params(seed)
    state = tx.init(params)
    optimizers = {name: RMSProp() if rmsprop else SGD() for name in net.names}
    for batch in (net.data(seed), net.data(seed + 1)):  # the optimizer's state goes on
        expected = algorithm(
            net,
            params,
            batch,
            matching=matching,
            eta=eta,
            gamma=gamma,
            iterations=iterations,
            l2=l2,
            optimizers=optimizers,
        )
        updates, state = update(params, state, *batch)
        params = optax.apply_updates(params, updates)
        assert_blocks(net, params, expected, error=1e-9)


def test_the_solver_that_the_aliases_take_by_default_is_rmsprop_with_momentum_for_ten_steps():
    net = Net()
    params, _ = take_step(net, locoprop_m(net.layers(), 1e-2, gamma=7.0))
    optimizers = {name: RMSProp() for name in net.names}
    expected = algorithm(
        net,
        net.params(),
        net.data(),
        matching=True,
        eta=1e-2,
        gamma=7.0,
        iterations=10,
        optimizers=optimizers,
    )
    assert_blocks(net, params, expected)


@pytest.mark.parametrize(
    "divergence, alias", [("squared", "locoprop_s"), ("matching", "locoprop_m")]
)
def test_scale_by_local_loss_returns_the_displacement_that_its_alias_adds(divergence, alias):
    net = Net()
    params, batch, layers = net.params(), net.data(), net.layers()
    displacement = lp.scale_by_local_loss(
        layers,
        0.02,
        gamma=3.0,
        divergence=divergence,
        regularizer=lp.l2(0.5),
        solver=lp.inner(optax.sgd, 4),
    )
    complete = METHODS[alias](
        layers, 0.02, gamma=3.0, iterations=4, optimizer=optax.sgd, regularizer=lp.l2(0.5)
    )

    @jax.jit
    def both(params, *batch):
        _, grads, captured = lp.value_grad_and_capture(net.loss)(params, *batch)
        return [
            tx.update(grads, tx.init(params), params, captured=captured)[0]
            for tx in (displacement, complete)
        ]

    scaled, updates = both(params, *batch)
    assert_equal_to_rounding(jax.tree.map(jnp.negative, scaled), updates)


# --- the squared loss ----------------------------------------------------------------------------


def numbers_in_loops(jaxpr, inside=False):
    """The sizes of all axes of all arrays that are computed inside the loops of a jaxpr."""
    sizes = set()
    for eqn in jaxpr.eqns:
        loop = inside or eqn.primitive.name in ("while", "scan")
        if loop:
            sizes.update(size for v in eqn.outvars for size in v.aval.shape)
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(inner):
                sizes |= numbers_in_loops(getattr(inner, "jaxpr", inner), loop)
    return sizes


def is_jaxpr(x):
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


@pytest.mark.parametrize(
    "rows, d_in, bias, sees_rows",
    [(23, 3, True, False), (23, 3, False, False), (4, 11, True, True)],
)
def test_iterations_on_the_gram_matrix_are_those_on_the_rows(rows, d_in, bias, sees_rows):
    net = Net(widths=(d_in, 2), biases=(bias,), batch=rows, decay=0.1)
    options = {
        "gamma": 2.0 * rows,
        "iterations": 6,
        "regularizer": lp.l2(1.0),
        "optimizer": optax.sgd,
    }
    tx = locoprop_s(net.layers(), 0.01, **options)
    params, _ = take_step(net, tx)
    expected = algorithm(
        net,
        net.params(),
        net.data(),
        matching=False,
        eta=0.01,
        gamma=2.0 * rows,
        iterations=6,
        l2=1.0,
    )
    assert_blocks(net, params, expected)
    jaxpr = jax.make_jaxpr(update_function(net, tx))(
        net.params(), tx.init(net.params()), *net.data()
    )
    assert (rows in numbers_in_loops(jaxpr.jaxpr)) is sees_rows


@pytest.mark.parametrize("batch", [2, 30])
def test_locoprop_s_with_l2_converges_to_the_exact_solution(batch):
    """W - eta' gamma (I + eta' X'X)^-1 G, where the regularizer has weight 1/eta'."""
    net = Net(batch=batch)
    gamma, eta_of_regularizer = 3.0, 0.2
    largest = max(np.linalg.norm(x, 2) ** 2 for x, *_ in net.backprop(net.params(), *net.data()))
    eta = 1 / (largest + 1 / eta_of_regularizer)  # inside the convergence radius
    tx = locoprop_s(
        net.layers(),
        eta,
        gamma=gamma,
        iterations=1500,
        optimizer=optax.sgd,
        regularizer=lp.l2(1 / eta_of_regularizer),
    )
    params, _ = take_step(net, tx)
    exact = {}
    for name, (x, _, e, _) in zip(net.names, net.backprop(net.params(), *net.data()), strict=True):
        system = np.eye(x.shape[1]) + eta_of_regularizer * x.T @ x
        step = eta_of_regularizer * gamma * np.linalg.solve(system, x.T @ e)
        exact[name] = net.block(net.params(), name) - step
    assert_blocks(net, params, exact)


# --- the last layer ------------------------------------------------------------------------------

# name -> the loss as a function of the outputs of the last layer, and how many terms it averages
ANY_HEAD = {
    "huber": (lambda a, y: optax.huber_loss(a, y).sum(-1).mean(), 5),
    "half a mean": (lambda a, y: 0.5 * jnp.sum((a - y) ** 2, -1).mean(), 5),
    "mean of halved sums": (lambda a, y: jnp.mean(0.5 * jnp.sum((a - y) ** 2, -1)), 5),
    "mean over everything": (lambda a, y: jnp.mean(jnp.log(jnp.cosh(a - y))), 10),
    "sum": (lambda a, y: optax.sigmoid_binary_cross_entropy(a, y).sum(), 1),
    "sum over a count": (lambda a, y: jnp.sum(jnp.abs(a - y) ** 3) / len(a), 5),
    "coupled outputs": (lambda a, y: optax.cosine_distance(a, y).mean(), 5),
    "mean over a mask": (  # the divisor is not known when tracing: c is the number of rows
        lambda a, y: optax.l2_loss(a, y).sum(-1).mean(where=y[:, 0] > 0.3),
        5,
    ),
    "labels": (
        lambda a, y: optax.softmax_cross_entropy_with_integer_labels(a, y.argmax(-1)).mean(),
        5,
    ),
}


@pytest.mark.parametrize("head", ANY_HEAD)
def test_at_the_last_layer_of_m_the_loss_itself_is_the_matching_loss(head):
    """The residual is c (grad L(A~) - grad L(A)) + gamma E, with c the number of terms."""
    loss_of_outputs, c = ANY_HEAD[head]
    gamma, eta, iterations = 2.0, 0.05, 5
    net = Net()
    params, (x, y) = net.params(), net.data()

    def loss(params, x, y):
        return loss_of_outputs(net.outputs(params, x), y)

    layers = lp.find_layers(loss, params, x, y)
    tx = locoprop_m(layers, eta, gamma=gamma, iterations=iterations, optimizer=optax.sgd)

    @jax.jit
    def step(params, x, y):
        _, grads, captured = lp.value_grad_and_capture(loss)(params, x, y)
        updates, _ = tx.update(grads, tx.init(params), params, captured=captured)
        return optax.apply_updates(params, updates)

    gradient = jax.jit(jax.grad(loss_of_outputs))
    extended = np.concatenate([x, np.ones((len(x), 1))], 1)
    w = net.block(params, "layer0")
    e = gradient(extended @ w, y)
    for k in range(iterations):
        residual = c * (gradient(extended @ w, y) - e) + gamma * e
        w = w - eta * max(1 - k / iterations, 1 / 4) * extended.T @ residual
    assert_blocks(net, step(params, x, y), {"layer0": w})


@pytest.mark.parametrize(
    "head, tokens, mean_over_tokens",
    [
        ("softmax", None, True),
        ("sigmoid", None, True),
        ("softmax", 3, True),
        ("sigmoid", 3, False),
    ],
)
def test_proposition_4_at_gamma_equal_to_the_number_of_terms_the_last_local_loss_is_the_loss(
    head, tokens, mean_over_tokens
):
    net = Net(head=head, tokens=tokens, mean_over_tokens=mean_over_tokens)
    eta, iterations = 0.02, 5
    tx = locoprop_m(net.layers(), eta, gamma=net.terms, iterations=iterations, optimizer=optax.sgd)
    params, _ = take_step(net, tx)
    x, y = net.data()
    ((x, _, _, f),) = net.backprop(net.params(), x, y)
    y = np.asarray(y).reshape(-1, 2)
    w = net.block(net.params(), "layer0")
    for k in range(iterations):  # gradient descent on c L over the last layer's weights
        w = w - eta * max(1 - k / iterations, 1 / 4) * x.T @ (f(x @ w) - y)
    assert_blocks(net, params, {"layer0": w})


def test_two_output_layers_each_take_the_loss_as_a_function_of_their_own_outputs():
    eta, gamma, iterations = 0.05, 2.0, 3
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=(3, 2))) for name in ("classes", "values")}
    x, y = Net(head="softmax").data()

    def loss(params, x, y):
        classes, values = x @ params["classes"], x @ params["values"]
        return (
            optax.softmax_cross_entropy(classes, y).mean() + optax.l2_loss(values, y).sum(-1).mean()
        )

    layers = lp.find_layers(loss, params, x, y)
    tx = locoprop_m(layers, eta, gamma=gamma, iterations=iterations, optimizer=optax.sgd)

    @jax.jit
    def updates_of(params, x, y):
        _, grads, captured = lp.value_grad_and_capture(loss)(params, x, y)
        return tx.update(grads, tx.init(params), params, captured=captured)[0]

    updates = updates_of(params, x, y)
    x, y = np.asarray(x), np.asarray(y)
    for name, f in (("classes", softmax), ("values", lambda a: a)):
        start = w = np.asarray(params[name])
        target = f(x @ w) - gamma * (f(x @ w) - y) / len(x)
        for k in range(iterations):
            w = w - eta * max(1 - k / iterations, 1 / 4) * x.T @ (f(x @ w) - target)
        assert_equal_to_rounding(updates[name], w - start)


def test_a_transfer_function_that_is_given_replaces_the_loss_at_the_last_layer():
    net = Net(head="squared")
    layers = net.layers(transfer={"layer0": jax.nn.sigmoid})
    tx = locoprop_m(layers, 0.05, gamma=2.0, iterations=5, optimizer=optax.sgd)
    params, _ = take_step(net, tx)
    ((x, a, e, _),) = net.backprop(net.params(), *net.data())
    w = net.block(net.params(), "layer0")
    for k in range(5):
        residual = sigmoid(x @ w) - sigmoid(a) + 2.0 * e
        w = w - 0.05 * max(1 - k / 5, 1 / 4) * x.T @ residual
    assert_blocks(net, params, {"layer0": w})


# --- gradients and schedules ---------------------------------------------------------------------


@each_method
def test_what_happened_to_the_gradient_before_is_kept_in_the_local_objective(name):
    """The objective gains gamma <Rg, W~>, Rg = updates - X'E: here, of a clipped gradient."""
    net = Net()
    gamma, eta, iterations, largest = 2.0, 0.05, 4, 1e-2
    tx = optax.chain(
        optax.clip(largest),
        METHODS[name](net.layers(), eta, gamma=gamma, iterations=iterations, optimizer=optax.sgd),
    )
    params, _ = take_step(net, tx)
    ((x, a, e, f),) = net.backprop(net.params(), *net.data())
    f = f if name == "locoprop_m" else lambda a: a
    start = w = net.block(net.params(), "layer0")
    rg = np.clip(x.T @ e, -largest, largest) - x.T @ e
    assert np.abs(rg).max() > 1e-3
    for k in range(iterations):
        gradient = x.T @ (f(x @ w) - f(a) + gamma * e) + gamma * rg
        w = w - eta * max(1 - k / iterations, 1 / 4) * gradient
    assert np.abs(w - start).max() > 0
    assert_blocks(net, params, {"layer0": w})


def test_a_schedule_is_of_eta_and_counts_batches():
    net = Net()

    def schedule(count):
        return 0.1 / (1.0 + count.astype(float))

    options = {"gamma": 2.0, "iterations": 3, "optimizer": optax.sgd}
    tx = locoprop_m(net.layers(), schedule, **options)
    update = update_function(net, tx)
    params = net.params()
    state = tx.init(params)
    for eta in (0.1, 0.05, 0.1 / 3):
        expected = algorithm(
            net, params, net.data(), matching=True, eta=eta, gamma=2.0, iterations=3
        )
        updates, state = update(params, state, *net.data())
        params = optax.apply_updates(params, updates)
        assert_blocks(net, params, expected)


# --- numerics ------------------------------------------------------------------------------------


@functools.cache
def deep_step():
    tx = locoprop_m(DEEP.layers(), 1e-2, gamma=5.0, iterations=3)
    return tx, update_function(DEEP, tx)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_batch_that_is_not_finite_changes_nothing_but_the_count(value):
    tx, update = deep_step()
    params, (x, y) = DEEP.params(), DEEP.data()
    _, state = update(params, tx.init(params), x, y)
    updates, after = update(params, state, x.at[0, 0].set(value), y)
    chex.assert_trees_all_equal(updates, optax.tree.zeros_like(updates))
    assert int(optax.tree.get(after, "count")) == 2
    before, now = (optax.tree.get(s, "inner") for s in (state, after))
    chex.assert_trees_all_equal(now, before)


@functools.cache
def step_with_a_parameter_in_no_layer():
    net = Net()

    def loss(params, x, y):
        return net.loss(params["net"], jnp.maximum(x, params["scale"]), y)

    params = {"net": net.params(), "scale": jnp.zeros((net.batch, 3))}
    layers = lp.find_layers(loss, params, *net.data(), on_uncaptured="pass")
    tx = locoprop_s(layers, 0.1, gamma=3.0, iterations=2, optimizer=optax.sgd)

    @jax.jit
    def step(x, y):
        _, grads, captured = lp.value_grad_and_capture(loss)(params, x, y)
        return tx.update(grads, tx.init(params), params, captured=captured)[0], grads

    return step, net.data()


def test_parameters_in_no_layer_take_the_step_that_backprop_takes():
    step, (x, y) = step_with_a_parameter_in_no_layer()
    updates, grads = step(x, y)
    assert_equal_to_rounding(updates["scale"], -0.1 * 3.0 * grads["scale"])


def test_a_batch_that_is_not_finite_does_not_move_parameters_in_no_layer():
    step, (x, y) = step_with_a_parameter_in_no_layer()
    updates, _ = step(x.at[0, 0].set(np.nan), y)
    chex.assert_trees_all_equal(updates, optax.tree.zeros_like(updates))


@pytest.mark.parametrize("name, batch", [("locoprop_s", 1), ("locoprop_m", 1), ("locoprop_m", 4)])
def test_zero_inputs_constant_rows_and_single_rows_give_a_finite_update(name, batch):
    net = Net(batch=batch)
    tx = METHODS[name](net.layers(), 1e-2, gamma=5.0 * batch, iterations=3, regularizer=lp.l2(0.1))
    update = update_function(net, tx)
    params, (x, y) = net.params(), net.data()
    for inputs in (jnp.zeros_like(x), jnp.ones_like(x), 1e6 * x):
        updates, state = update(params, tx.init(params), inputs, y)
        chex.assert_tree_all_finite((updates, state))
        assert any(np.any(u != 0) for u in jax.tree.leaves(updates))


def test_updates_of_half_precision_parameters_keep_their_dtype_and_the_state_is_single():
    net = dataclasses.replace(DEEP, transfers=("home-made",), head="softmax")
    params, batch = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (net.params(), net.data()))
    layers = lp.find_layers(net.loss, params, *batch)
    tx = locoprop_m(layers, 1e-2, gamma=5.0, iterations=3)
    state = tx.init(params)
    updates, after = update_function(net, tx)(params, state, *batch)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert all(u.dtype == jnp.bfloat16 for u in jax.tree.leaves(updates))
    for s in (state, after):
        assert {x.dtype for x in jax.tree.leaves(s)} == {np.dtype("float32"), np.dtype("int32")}
    exact = algorithm(
        net,
        jax.tree.map(lambda x: x.astype(float), params),
        jax.tree.map(lambda x: x.astype(float), batch),
        matching=True,
        eta=1e-2,
        gamma=5.0,
        iterations=3,
        optimizers={layer: RMSProp() for layer in net.names},
    )
    for layer in net.names:
        moved = net.block(jax.tree.map(lambda x: x.astype(float), updates), layer)
        wanted = exact[layer] - net.block(jax.tree.map(lambda x: x.astype(float), params), layer)
        np.testing.assert_allclose(moved, wanted, rtol=0.1, atol=0.05 * np.abs(wanted).max())


# --- masks ---------------------------------------------------------------------------------------


@each_method
@pytest.mark.parametrize("moving, rows", [("kernel", slice(0, 3)), ("bias", slice(3, 4))])
def test_the_masked_part_of_a_layer_is_held_fixed(name, moving, rows):
    net = Net()
    gamma, eta, iterations = 2.0, 0.05, 4
    method = METHODS[name](
        net.layers(), eta, gamma=gamma, iterations=iterations, optimizer=optax.sgd
    )
    mask = {"layer0": {"kernel": moving == "kernel", "bias": moving == "bias"}}
    tx = optax.partition({True: method, False: optax.set_to_zero()}, mask)
    params, _ = take_step(net, tx)
    ((x, a, e, f),) = net.backprop(net.params(), *net.data())
    f = f if name == "locoprop_m" else lambda a: a
    w = net.block(net.params(), "layer0").copy()
    for k in range(iterations):
        gradient = x.T @ (f(x @ w) - f(a) + gamma * e)
        w[rows] -= eta * max(1 - k / iterations, 1 / 4) * gradient[rows]
    assert_blocks(net, params, {"layer0": w})


# --- errors --------------------------------------------------------------------------------------


def capture(net, params=None):
    params = net.params() if params is None else params
    return lp.value_grad_and_capture(net.loss)(params, *net.data())


@each_method
def test_captured_arrays_that_are_missing_are_asked_for(name):
    net = Net()
    params = net.params()
    tx = METHODS[name](net.layers(), 1e-2)
    with pytest.raises(TypeError, match=r"needs .* `captured`, got\s+nothing.*captured=captured"):
        tx.update(params, tx.init(params), params)
    with pytest.raises(TypeError, match="got a dict"):
        tx.update(params, tx.init(params), params, captured={})


def test_captured_arrays_of_another_model_are_refused_by_the_layers_that_differ():
    net, other = DEEP, dataclasses.replace(DEEP, widths=(3, 4, 5))
    params = net.params()
    tx = locoprop_s(net.layers(), 1e-2)

    def update(params):
        _, _, captured = capture(other)
        return tx.update(params, tx.init(params), params, captured=captured)

    with pytest.raises(ValueError, match=r"does not belong to.*: layer1 differs"):
        jax.eval_shape(update, params)


def test_captured_arrays_that_lack_a_layer_are_refused_by_its_name():
    net, other = DEEP, Net(widths=(3, 4))
    params = net.params()
    tx = locoprop_s(net.layers(), 1e-2)

    def update(params):
        _, _, captured = capture(other)
        return tx.update(params, tx.init(params), params, captured=captured)

    with pytest.raises(ValueError, match=r"layer1 differs \(`captured` holds layer0\)"):
        jax.eval_shape(update, params)


@each_method
def test_parameters_that_are_missing_are_asked_for(name):
    net = Net()
    tx = METHODS[name](net.layers(), 1e-2)

    def update(params):
        _, grads, captured = capture(net, params)
        return tx.update(grads, tx.init(params), captured=captured)

    with pytest.raises(ValueError, match="needs the parameters"):
        jax.eval_shape(update, net.params())


@pytest.mark.parametrize("f", [jax.nn.gelu, jax.nn.silu, jnp.sin], ids=["gelu", "silu", "sin"])
def test_locoprop_m_refuses_transfer_functions_that_decrease_and_says_where_and_what_to_do(f):
    def loss(params, x):
        hidden = f(jnp.tanh(x @ params["first"]) @ params["second"])
        return jnp.mean(f(hidden @ params["third"]) ** 2)

    params = {name: jnp.ones((2, 2)) for name in ("first", "second", "third")}
    x = jnp.ones((3, 2))
    layers = lp.find_layers(loss, params, x)
    name = layers["second"].transfer.name
    assert name.startswith(f.__name__)
    with pytest.raises(ValueError, match=rf"non-decreasing.*: second \({name}.*Use LocoProp-S"):
        locoprop_m(layers, 1e-2)
    locoprop_s(layers, 1e-2)
    locoprop_m(lp.find_layers(loss, params, x, transfer={"second": jax.nn.relu}), 1e-2)
    with pytest.raises(ValueError, match="third"):
        locoprop_m(lp.find_layers(loss, params, x, transfer={"third": f}), 1e-2)


def test_divergences_and_targets_are_checked():
    layers = Net().layers()
    build = functools.partial(
        lp.scale_by_local_loss, layers, 1e-2, gamma=1.0, solver=lp.inner(optax.sgd)
    )
    build(divergence="squared", target="gd")
    build(divergence="matching", target="md")
    with pytest.raises(ValueError, match=r"'squared', 'matching'.*got 'cubed'"):
        build(divergence="cubed")
    for divergence, target in (("squared", "md"), ("matching", "gd"), ("squared", "sgd")):
        with pytest.raises(ValueError, match=f"{divergence} divergence.*got '{target}'"):
            build(divergence=divergence, target=target)


@each_method
def test_negative_step_sizes_and_weights_are_refused(name):
    layers, method = Net().layers(), METHODS[name]
    with pytest.raises(ValueError, match="`gamma` must not be negative, got -1"):
        method(layers, 1e-2, gamma=-1)
    with pytest.raises(ValueError, match=r"`learning_rate` must not be negative, got -0\.1"):
        method(layers, -0.1)
    with pytest.raises(ValueError, match="`l2` takes a weight that is not negative, got -2"):
        method(layers, 1e-2, regularizer=lp.l2(-2))


@each_method
def test_iterations_are_a_static_int_of_at_least_one(name):
    layers, method = Net().layers(), METHODS[name]
    with pytest.raises(ValueError, match="`iterations` has to be at least 1, got 0"):
        method(layers, 1e-2, iterations=0)
    with pytest.raises(TypeError, match=r"`iterations` has to be a static int, got 2\.5"):
        method(layers, 1e-2, iterations=2.5)


@each_method
def test_iterations_that_inject_hyperparams_traces_are_refused_with_the_remedy(name):
    net = Net()
    tx = optax.inject_hyperparams(METHODS[name], static_args="optimizer")(net.layers(), 1e-2)
    with pytest.raises(TypeError, match=r"`iterations` has to be a static int.*static_args"):
        jax.eval_shape(tx.init, net.params())


@each_method
def test_an_optimizer_in_place_of_its_constructor_is_refused(name):
    with pytest.raises(TypeError, match="takes the constructor of an optimizer"):
        METHODS[name](Net().layers(), 1e-2, optimizer=optax.sgd(0.1))


@each_method
@pytest.mark.parametrize("layers", [None, {}, "layer0"])
def test_layers_are_asked_for(name, layers):
    with pytest.raises(ValueError, match=r"needs the layers of the model.*find_layers"):
        METHODS[name](layers, 1e-2)


def test_regularizers_and_solvers_of_other_types_are_refused():
    layers = Net().layers()
    with pytest.raises(TypeError, match=r"`regularizer` is None or like `l2\(weight\)`, got 0\.1"):
        lp.scale_by_local_loss(layers, 1e-2, gamma=1.0, regularizer=0.1, solver=lp.inner(optax.sgd))
    with pytest.raises(TypeError, match="`solver` is like `inner"):
        lp.scale_by_local_loss(layers, 1e-2, gamma=1.0, solver=optax.sgd)
