"""Local losses in units of the layer: targets at a distance, rates that no scale changes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import locoprop_jax as lp
from locoprop_jax._local_losses.rmsprop import scale_free_rmsprop
from tests.dense_nets import (
    DEEP,
    Net,
    assert_blocks,
    assert_equal_to_rounding,
    nets,
    take_step,
    update_function,
)
from tests.helpers import quick_jit

METHODS = {
    "locoprop_s": lp.locoprop_s,
    "locoprop_m": lp.locoprop_m,
    "pocoprop_s": lp.pocoprop_s,
    "pocoprop_m": lp.pocoprop_m,
}
each_method = pytest.mark.parametrize("name", METHODS)
GAMMA = 0.2


def rms(x):
    return np.sqrt(np.square(x).mean())


# --- the target ----------------------------------------------------------------------------------


def local_problems(net, params, batch, divergence):
    """By layer what X' makes the slope of, and eta: told by a solver that goes nowhere."""

    def tell(problem, state):
        del state
        still = jax.tree.map(jnp.zeros_like, problem.slope)
        return still, (problem.cotangents, problem.learning_rate)

    def nothing_told(block):
        rows = int(np.prod(np.shape(batch[0])[:-1]))
        return jnp.zeros((rows, block["kernel"].shape[-1])), jnp.zeros(())

    tx = lp.scale_by_local_loss(
        net.layers(),
        1.0,
        gamma=GAMMA,
        relative=True,
        divergence=divergence,
        solver=lp.Solver("tell", nothing_told, tell),
    )
    return update_function(net, tx)(params, tx.init(params), *batch)[1].inner


@settings(max_examples=3)
@given(net=nets(), seed=st.integers(0, 99))
def test_the_target_of_each_layer_is_at_the_distance_gamma(net, seed):
    """Along the cotangents, as a root mean square over rows and outputs."""
    params, batch = net.params(seed), net.data(seed)
    found = local_problems(net, params, batch, "squared")
    for name, (x, _, e, _) in zip(net.names, net.backprop(params, *batch), strict=True):
        step, eta = found[name]
        most = net.terms if name == net.names[-1] else np.inf
        gamma = min(GAMMA / rms(e), most) if e.any() else 0.0
        np.testing.assert_allclose(step, gamma * e, rtol=1e-9, atol=1e-15)
        if x.any():  # a layer may be dead
            np.testing.assert_allclose(eta, 1 / np.square(x).sum(), rtol=1e-9)


@pytest.mark.parametrize("divergence", ["post_squared", "dual_matching"])
def test_after_the_transfer_function_too(divergence):
    net = Net(widths=(3, 5, 2), transfers=("softplus",), biases=(True, True), batch=7)
    params, batch = net.params(), net.data()
    a, (h, slope) = net.backprop(params, *batch)[0][1], net.after(params, *batch)[0]
    step, _ = local_problems(net, params, batch, divergence)["layer0"]
    np.testing.assert_allclose(step, slope(a) * GAMMA / rms(h) * h, rtol=1e-9)


def test_at_an_output_layer_the_target_is_never_beyond_the_minimum():
    """Of a squared error the target is the label itself, however far gamma is."""
    net = Net(widths=(3, 2), biases=(True,), head="squared", batch=40)
    x, y = net.data()
    extended = np.concatenate([x, np.ones((len(x), 1))], 1)
    fitted = np.linalg.lstsq(extended, np.asarray(y), rcond=None)[0]
    tx = lp.scale_by_local_loss(
        net.layers(),
        1e9,  # the weight of the regularizer is its inverse
        gamma=1e6,
        relative=True,
        regularizer=lp.l2(),
        solver=lp.exact(),
    )
    new, _ = take_step(net, optax.chain(tx, optax.scale(-1.0)))
    assert_blocks(net, new, {"layer0": fitted}, 1e-6)


# --- the rate ------------------------------------------------------------------------------------


def test_plain_gradient_steps_have_the_rate_that_inputs_allow():
    """One over the sum of squared inputs, the one of the bias included: below 2 / the largest."""
    net, eta, iterations = DEEP, 0.7, 5
    options = {"iterations": iterations, "optimizer": optax.sgd}
    new, _ = take_step(net, lp.locoprop_s(net.layers(), eta, gamma=GAMMA, **options))
    expected = {}
    layers = zip(net.names, net.backprop(net.params(), *net.data()), strict=True)
    for name, (x, a, e, _) in layers:
        w, target = net.block(net.params(), name), a - GAMMA / rms(e) * e
        for k in range(iterations):
            rate = eta / np.square(x).sum() * max(1 - k / iterations, 1 / 4)
            w = w - rate * x.T @ (x @ w - target)
        expected[name] = w
    assert_blocks(net, new, expected)


def test_by_default_rmsprop_moves_each_weight_by_a_share_of_the_distance_over_the_norm_of_inputs():
    """The paper's, with debiased averages: over two batches, because its state goes on."""
    net, eta = DEEP, 0.3
    tx = lp.locoprop_s(net.layers(), eta, gamma=GAMMA)
    update, params = update_function(net, tx), net.params()
    state = tx.init(params)
    squares, velocity = dict.fromkeys(net.names, 0.0), dict.fromkeys(net.names, 0.0)
    count = 0
    for seed in range(2):
        batch, expected = net.data(seed), {}
        layers = zip(net.names, net.backprop(params, *batch), strict=True)
        for name, (x, a, e, _) in layers:
            w, target = net.block(params, name), a - GAMMA / rms(e) * e
            size = np.sqrt(np.square(x).sum(1).mean())
            for k in range(10):
                gradient = x.T @ (x @ w - target)
                squares[name] = 0.9 * squares[name] + 0.1 * gradient**2
                mean = squares[name] / (1 - 0.9 ** (count + k + 1))
                rate = eta * GAMMA / size * max(1 - k / 10, 1 / 4)
                step = rate * gradient / np.sqrt(mean + 1e-12)
                velocity[name] = 0.9 * velocity[name] + step
                w = w - velocity[name]
            expected[name] = w
        updates, state = update(params, state, *batch)
        params = optax.apply_updates(params, updates)
        count += 10
        assert_blocks(net, params, expected, 1e-8)


@pytest.mark.standard_promotion  # Optax's bias correction cannot do without
def test_the_scale_free_rmsprop_is_that_of_optax():
    own, theirs = (
        optax.with_extra_args_support(tx)
        for tx in (
            scale_free_rmsprop(0.1),
            optax.rmsprop(
                0.1, decay=0.9, eps=1e-12, initial_scale=0.0, bias_correction=True, momentum=0.9
            ),
        )
    )
    states, params = [tx.init(jnp.zeros(3)) for tx in (own, theirs)], jnp.zeros(3)
    for seed in range(4):
        g = jnp.asarray(np.random.default_rng(seed).normal(size=3))
        results = [tx.update(g, s, params) for tx, s in zip((own, theirs), states, strict=True)]
        states = [state for _, state in results]
        np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-6)


# --- what does not matter ------------------------------------------------------------------------


def trajectory(net, names, factor, repeats, steps=2):
    """The updates of some steps, of the loss times a factor and of batches repeated."""
    methods = {name: METHODS[name](net.layers()) for name in names}

    @quick_jit
    def step(params, states, factor, batch):
        loss = lambda p, *batch: factor * net.loss(p, *batch)  # noqa: E731
        _, grads, captured = lp.value_grad_and_capture(loss, transferred=True)(params, *batch)
        return {
            name: tx.update(grads, states[name], params, captured=captured)
            for name, tx in methods.items()
        }

    params, found = net.params(), []
    states = {name: tx.init(params) for name, tx in methods.items()}
    for seed in range(steps):
        batch = tuple(jnp.concatenate([part] * repeats) for part in net.data(seed))
        results = step(params, states, jnp.asarray(factor), batch)
        found.append({name: updates for name, (updates, _) in results.items()})
        states = {name: state for name, (_, state) in results.items()}
    return found


def hidden(net, found):
    """Without the output layer."""
    return [
        {name: [updates[layer] for layer in net.names[:-1]] for name, updates in of_step.items()}
        for of_step in found
    ]


@settings(max_examples=1)
@given(net=nets().filter(lambda net: net.transfers and net.mean_over_tokens))
def test_an_update_does_not_depend_on_the_size_of_the_batch_nor_of_hidden_layers_on_the_loss(net):
    names = ["locoprop_s", "pocoprop_m"]
    expected = trajectory(net, names, 1.0, 1)
    assert_equal_to_rounding(trajectory(net, names, 1.0, 3), expected, 1e-5)
    for factor in (1e-12, 1e12):
        found = trajectory(net, names, factor, 1)
        assert_equal_to_rounding(hidden(net, found), hidden(net, expected), 1e-6)


@pytest.mark.slow
@each_method
@pytest.mark.parametrize("factor", [1e-12, 1e-3, 1e3, 1e12])
def test_no_update_depends_on_the_scale_of_the_loss(name, factor):
    """But for output layers: their targets end at the minimum, which the loss as written tells."""
    found, expected = (trajectory(DEEP, [name], value, 1) for value in (factor, 1.0))
    assert_equal_to_rounding(hidden(DEEP, found), hidden(DEEP, expected), 1e-6)


# --- training ------------------------------------------------------------------------------------

SMALL = {
    "classifier": Net(
        widths=(4, 8, 8, 3),
        transfers=("relu", "tanh"),
        biases=(True,) * 3,
        head="softmax",
        batch=20,
    ),
    "regression": Net(widths=(4, 6, 2), transfers=("tanh",), biases=(True,) * 2, head="squared"),
}


@pytest.mark.parametrize("problem", SMALL)
def test_at_the_defaults_the_loss_falls(problem):
    net = SMALL[problem]
    methods = {name: method(net.layers()) for name, method in METHODS.items()}
    capture = lp.value_grad_and_capture(net.loss, transferred=True)

    @quick_jit
    def train(params, batch):
        def step(carry, _):
            loss, new = {}, {}
            for name, (params, state) in carry.items():
                loss[name], grads, captured = capture(params, *batch)
                updates, state = methods[name].update(grads, state, params, captured=captured)
                new[name] = optax.apply_updates(params, updates), state
            return new, loss

        carry = {name: (params, tx.init(params)) for name, tx in methods.items()}
        return jax.lax.scan(step, carry, length=30)[1]

    for name, losses in train(net.params(), net.data()).items():
        assert losses[-1] < 0.7 * losses[0], (name, losses)


def test_degenerate_inputs_give_finite_updates_and_bad_batches_none_in_float32():
    params, (x, y) = jax.tree.map(lambda x: x.astype(jnp.float32), (DEEP.params(), DEEP.data()))
    layers = lp.find_layers(DEEP.loss, params, x, y)
    methods = {name: method(layers) for name, method in METHODS.items()}

    @quick_jit
    def step(x):
        loss, states = DEEP.loss, {name: tx.init(params) for name, tx in methods.items()}
        _, grads, captured = lp.value_grad_and_capture(loss, transferred=True)(params, x, y)
        return {
            name: tx.update(grads, states[name], params, captured=captured)
            for name, tx in methods.items()
        }

    for inputs in (0 * x, jnp.ones_like(x), 1e6 * x, 1e-6 * x):
        results = step(inputs)
        chex.assert_tree_all_finite(results)
        for updates, _ in results.values():
            assert all(np.any(u) for u in jax.tree.leaves(updates["layer1"]))
    for value in (np.nan, np.inf):
        for updates, _ in step(x.at[0, 0].set(value)).values():
            chex.assert_trees_all_equal(updates, optax.tree.zeros_like(updates))


def test_parameters_in_no_layer_move_by_the_rate_times_the_distance():
    net = Net()
    params = {"net": net.params(), "gain": jnp.zeros((net.batch, 3))}

    def loss(params, x, y):
        return net.loss(params["net"], jnp.maximum(x, params["gain"]), y)

    layers = lp.find_layers(loss, params, *net.data(), on_uncaptured="pass")
    tx = lp.locoprop_s(layers, 0.3, gamma=GAMMA, iterations=1)
    _, grads, captured = lp.value_grad_and_capture(loss)(params, *net.data())
    updates, _ = tx.update(grads, tx.init(params), params, captured=captured)
    g = np.asarray(grads["gain"])
    np.testing.assert_allclose(updates["gain"], -0.3 * GAMMA * g / np.linalg.norm(g), rtol=1e-9)
