"""What every method has to do as an Optax transformation. A new method is one row of `METHODS`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import locoprop_jax as lp
from locoprop_jax._neurons.metric import descend
from tests.neurons.diagonal_foof import diagonal_foof

# --- the table -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Method:
    """A method with hyperparameters that suit the problem below.

    Attributes:
      build: makes the complete optimizer from the layers, a learning rate and the options.
      learning_rate: a constant.
      options: further keyword arguments.
      static: those that `optax.inject_hyperparams` must not make arrays of.
      is_joint: whether one length of step is chosen for all layers together.
      is_whole: whether it needs all parameters, so that it cannot be masked.
      statistics: names in the state that are shaped like a bias without being like one.
    """

    build: Callable[..., optax.GradientTransformationExtraArgs]
    learning_rate: float
    options: dict[str, Any]
    static: tuple[str, ...] = ()
    is_joint: bool = False
    is_whole: bool = False
    statistics: tuple[str, ...] = ()


def chained_local_loss(layers, learning_rate, gamma, weight):
    local_loss = lp.scale_by_local_loss(
        layers,
        learning_rate,
        gamma=gamma,
        divergence="matching",
        regularizer=lp.l2(weight),
        solver=lp.inner(optax.sgd, 2),
    )
    return optax.chain(local_loss, optax.scale(-1.0))


def kfac_with_metric_steps(layers, learning_rate, damping, decay):
    kfac = lp.scale_by_kfac(
        layers, damping=damping, decay=decay, curvature="empirical", inverse_period=3
    )
    return optax.chain(lp.scale_by_metric_norm(kfac), descend(learning_rate, 0.0))


def natural_gradient(layers, learning_rate, damping, step_damping):
    return lp.natural_gradient(
        layers,
        learning_rate,
        6,
        curvature="empirical",
        damping=damping,
        step_damping=step_damping,
    )


def natural_gradient_of_each_layer(layers, learning_rate, damping):
    direction = lp.scale_by_natural_gradient(
        layers, 6, block_diagonal=True, curvature="empirical", damping=damping
    )
    return optax.chain(lp.scale_by_metric_norm(direction), descend(learning_rate, 0.0))


def empirical_kfac(layers, learning_rate, damping, step_damping):
    return lp.kfac(
        layers,
        learning_rate,
        curvature="empirical",
        damping=damping,
        step_damping=step_damping,
        inverse_period=2,
    )


def hessian_free(layers, learning_rate, damping):
    del layers
    return lp.hessian_free(learning_rate, damping=damping, iterations=4)


METHODS = {
    "foof": Method(
        lp.foof,
        0.1,
        {"damping": 0.5, "inverse_period": 3, "statistics_steps": 2, "momentum": 0.5},
        static=("relative", "damp_bias", "inverse_period", "statistics_steps"),
        statistics=("statistics", "inverse"),
    ),
    "diagonal foof": Method(
        diagonal_foof,
        1.0,
        {"damping": 0.5, "inverse_period": 3, "momentum": 0.5},
        static=("inverse_period",),
        is_joint=True,
        statistics=("statistics", "inverse"),
    ),
    "lnb": Method(
        lp.lnb,
        0.1,
        {"ridge": 0.1, "moment_decay": 0.9, "momentum": 0.5},
        static=("relative", "iterations", "online", "fraction"),
        statistics=("moments",),
    ),
    "lnb of joint length": Method(
        lp.lnb,
        1.0,
        {"ridge": 0.1, "moment_decay": 0.9, "momentum": 0.5, "unit": "joint"},
        static=("relative", "iterations", "online", "fraction"),
        is_joint=True,
        statistics=("moments",),
    ),
    "kfac": Method(
        kfac_with_metric_steps,
        0.3**0.5,
        {"damping": 0.1, "decay": 0.9},
        is_joint=True,
        statistics=("statistics", "inverse"),
    ),
    "kfac with gauss-newton steps": Method(
        empirical_kfac,
        0.5,
        {"damping": 0.1, "step_damping": 0.1},
        is_joint=True,
        is_whole=True,
        statistics=("statistics", "inverse"),
    ),
    "natural_gradient": Method(
        natural_gradient,
        0.5,
        {"damping": 1.0, "step_damping": 0.1},
        is_joint=True,
        is_whole=True,
        statistics=("systems",),
    ),
    "natural_gradient of each layer": Method(
        natural_gradient_of_each_layer,
        0.1**0.5,
        {"damping": 10.0},
        is_joint=True,
        statistics=("systems",),
    ),
    "hessian_free": Method(hessian_free, 0.5, {"damping": 0.1}, is_joint=True, is_whole=True),
    "locoprop_s": Method(  # with the paper's own parameters
        lp.locoprop_s,
        1e-2,
        {
            "gamma": 6.0,
            "relative": False,
            "iterations": 3,
            "optimizer": functools.partial(optax.sgd, momentum=0.9),
            "regularizer": lp.l2(0.1),
        },
        static=("iterations", "optimizer"),
    ),
    "locoprop_m": Method(
        lp.locoprop_m,
        0.3,
        {"gamma": 0.3, "iterations": 4},
        static=("iterations", "optimizer"),
    ),
    "proxprop": Method(lp.proxprop, 1e-2, {"gamma": 0.1}),
    "locoprop_kfac": Method(
        lp.locoprop_kfac, 1e-2, {"gamma": 1.0, "target": lp.natural(decay=0.9)}
    ),
    "scale_by_local_loss": Method(chained_local_loss, 2e-2, {"gamma": 6.0, "weight": 0.1}),
}
CAPTURE = functools.partial(lp.value_grad_and_capture, transferred=True)
# Methods of which another row differs in an option alone.
TWINS = {
    "lnb of joint length",
    "natural_gradient of each layer",
    "locoprop_s",
    "proxprop",
    "locoprop_kfac",
}


def rows(names):
    return [pytest.param(n, marks=pytest.mark.slow) if n in TWINS else n for n in names]


each_method = pytest.mark.parametrize("name", rows(METHODS))
each_maskable = pytest.mark.parametrize("name", rows(n for n in METHODS if not METHODS[n].is_whole))

# --- the problem: an autoencoder with one hidden layer -------------------------------------------


def loss_fn(params, x):
    code = jnp.tanh(x @ params["encoder"]["kernel"] + params["encoder"]["bias"][None])
    return optax.l2_loss(code @ params["decoder"]["kernel"], x).sum(-1).mean()


def init_params(seed=0, dtype=float):
    rng = np.random.default_rng(seed)
    return {
        "encoder": {
            "kernel": jnp.asarray(rng.normal(size=(3, 2)), dtype),
            "bias": jnp.zeros(2, dtype),
        },
        "decoder": {"kernel": jnp.asarray(rng.normal(size=(2, 3)), dtype)},
    }


def batch(seed=0, dtype=float):
    return jnp.asarray(np.random.default_rng(100 + seed).normal(size=(6, 3)), dtype)


@functools.cache
def layers():
    return lp.find_layers(loss_fn, init_params(), batch())


@functools.cache
def gradients(seed=0):
    """Gradients and captured arrays at the initial parameters."""
    with jax.ensure_compile_time_eval():  # the first to ask may be in the middle of a trace
        return jax.jit(CAPTURE(loss_fn))(init_params(), batch(seed))[1:]


def line(value=None, grads=None, x=None):
    """What line searches take: at the initial parameters, or the loss, its gradient and batch."""
    x = batch() if x is None else x
    value = loss_fn(init_params(), x) if value is None else value
    grads = gradients()[0] if grads is None else grads
    return {"value": value, "grad": grads, "value_fn": lambda params: loss_fn(params, x)}


def constructed(name, learning_rate=None):
    method = METHODS[name]
    learning_rate = method.learning_rate if learning_rate is None else learning_rate
    return method.build(layers(), learning_rate, **method.options)


@functools.cache
def transformation(name):
    return constructed(name)


@functools.cache
def plain_update(name):
    """(gradients, state, params, captured) -> (updates, state) without any wrapper, compiled."""
    tx = transformation(name)
    return jax.jit(lambda g, s, p, captured: tx.update(g, s, p, captured=captured, **line()))


def update_of(tx, state=None, grads=None, captured=None, jit=jax.jit):
    """The updates and the new state of a transformation at the initial parameters."""
    params = init_params()
    grads = gradients()[0] if grads is None else grads
    captured = gradients()[1] if captured is None else captured
    state = tx.init(params) if state is None else state
    update = jit(lambda g, s, p, captured: tx.update(g, s, p, captured=captured, **line()))
    return update(grads, state, params, captured)


def plain_update_of(name, grads=None, captured=None):
    params = init_params()
    grads = gradients()[0] if grads is None else grads
    captured = gradients()[1] if captured is None else captured
    return plain_update(name)(grads, transformation(name).init(params), params, captured)


def step(tx, params, state, x):
    loss, grads, captured = CAPTURE(loss_fn)(params, x)
    extra = line(loss, grads, x)
    updates, state = tx.update(grads, state, params, captured=captured, **extra)
    return optax.apply_updates(params, updates), state, loss


TRACES = {name: 0 for name in METHODS}


@functools.cache
def compiled_step(name):
    """A training step that donates parameters and state, and counts how often it is traced."""

    def counted(params, state, x):
        TRACES[name] += 1
        return step(transformation(name), params, state, x)

    return jax.jit(counted, donate_argnums=(0, 1))


def train(name, params, state, seeds):
    params, state = jax.tree.map(jnp.copy, (params, state))  # they are donated
    losses = []
    for seed in seeds:
        params, state, loss = compiled_step(name)(params, state, batch(seed))
        losses.append(loss)
    return params, state, losses


def assert_close(actual, desired, error=1e-12):
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=error, atol=error), actual, desired
    )


def assert_identical(actual, desired):
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    jax.tree.map(np.testing.assert_array_equal, actual, desired)


def assert_same_step(name, actual, desired):
    """Equal, or of another length where the method chooses one for all layers together."""
    if METHODS[name].is_joint:
        (a, b) = (jax.flatten_util.ravel_pytree(tree)[0] for tree in (actual, desired))
        actual, desired = a / jnp.linalg.norm(a), b / jnp.linalg.norm(b)
    assert_close(actual, desired)


def shapes(tree):
    """Shape, dtype and weak type of each leaf: what loops and conditionals compare."""
    return jax.eval_shape(lambda: tree) if not callable(tree) else jax.eval_shape(tree)


# --- training ------------------------------------------------------------------------------------


@each_method
def test_thirty_donating_steps_are_compiled_once_and_lower_the_loss(name):
    params = init_params()
    _, _, losses = train(name, params, transformation(name).init(params), [0] * 30)
    assert losses[-1] < 0.7 * losses[0]
    assert TRACES[name] == 1


# --- types and shapes ----------------------------------------------------------------------------


@each_method
def test_unknown_extra_arguments_are_ignored(name):
    tx, params = transformation(name), init_params()
    grads, captured = gradients()
    expected = shapes(
        lambda: tx.update(grads, tx.init(params), params, captured=captured, **line())
    )
    result = shapes(
        lambda: tx.update(
            grads,
            tx.init(params),
            params,
            captured=captured,
            **line(),
            of_another_method="text",
        )
    )
    assert result == expected


@pytest.mark.parametrize("name", [n for n in METHODS if n != "hessian_free"])
def test_captured_arrays_are_asked_for(name):
    tx, params, (grads, _) = transformation(name), init_params(), gradients()
    with pytest.raises(TypeError, match=r"`captured`.*value_grad_and_capture"):
        tx.update(grads, tx.init(params), params, **line())


@each_method
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_the_dtypes_of_parameters_and_the_types_of_the_state_are_stable(name, dtype):
    params, x = init_params(dtype=dtype), batch(dtype=dtype)
    tx = METHODS[name].build(
        lp.find_layers(loss_fn, params, x), METHODS[name].learning_rate, **METHODS[name].options
    )
    state = jax.eval_shape(tx.init, params)
    new_params, new_state, _ = jax.eval_shape(functools.partial(step, tx), params, state, x)
    assert new_params == shapes(params)
    assert new_state == state
    wide = "float64" if dtype == "float64" else "float32"
    floats = [s.dtype for s in jax.tree.leaves(state) if jnp.issubdtype(s.dtype, jnp.inexact)]
    assert all(d == wide for d in floats)


@each_method
def test_a_schedule_of_another_precision_keeps_the_types_stable(name):
    params, x = init_params(dtype="float32"), batch(dtype="float32")
    rate = METHODS[name].learning_rate
    tx = METHODS[name].build(
        lp.find_layers(loss_fn, params, x),
        lambda count: jnp.asarray(rate, "float64") / (1.0 + count.astype("float64")),
        **METHODS[name].options,
    )
    state = jax.eval_shape(tx.init, params)
    new_params, new_state, _ = jax.eval_shape(functools.partial(step, tx), params, state, x)
    assert (new_params, new_state) == (shapes(params), state)


@each_method
def test_the_state_is_initialised_from_shapes_alone(name):
    params = init_params()
    tx = transformation(name)
    assert jax.eval_shape(tx.init, params) == shapes(tx.init(params))


@each_method
def test_no_two_parts_of_the_state_share_a_buffer_which_could_not_be_donated(name):
    leaves = jax.tree.leaves(transformation(name).init(init_params()))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


@each_method
def test_the_state_passes_through_a_conditional(name):
    tx, params = transformation(name), init_params()
    grads, captured = gradients()

    def sometimes(flag, state):
        return jax.lax.cond(
            flag,
            lambda: tx.update(grads, state, params, captured=captured, **line()),
            lambda: (jax.tree.map(jnp.zeros_like, params), state),
        )

    state = jax.eval_shape(tx.init, params)
    assert jax.eval_shape(sometimes, True, state) == (shapes(params), state)


@each_method
def test_the_parameter_like_parts_of_the_state_can_be_mapped_over(name):
    tx, params = transformation(name), init_params()
    state = tx.init(params)
    mapped = optax.tree.map_params(
        tx, lambda leaf: "like a parameter", state, transform_non_params=lambda leaf: "other"
    )
    kinds = jax.tree.leaves(mapped)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    shapes = {leaf.shape for leaf in jax.tree.leaves(params)}
    statistics = {f".{field}" for field in METHODS[name].statistics}
    for kind, (path, leaf) in zip(kinds, leaves, strict=True):
        is_like_one = leaf.shape in shapes and statistics.isdisjoint(map(str, path))
        assert (kind == "like a parameter") is is_like_one


# --- Optax's wrappers ----------------------------------------------------------------------------


@each_method
def test_compiled_or_not_the_update_is_the_same(name):
    eager = update_of(transformation(name), jit=lambda f: f)
    assert_close(eager, plain_update_of(name))


@each_method
def test_chain_clips_before_and_decays_weights_after(name):
    grads, params = gradients()[0], init_params()
    tx = optax.chain(optax.clip(1e-2), transformation(name), optax.add_decayed_weights(-1e-3))
    updates, _ = update_of(tx)
    clipped, _ = plain_update_of(name, jax.tree.map(lambda g: jnp.clip(g, -1e-2, 1e-2), grads))
    assert_close(updates, jax.tree.map(lambda u, p: u - 1e-3 * p, clipped, params))


@each_maskable
def test_partition_gives_each_layer_its_own_optimizer(name):
    assert optax.multi_transform is optax.partition  # its old name
    grads, _ = gradients()
    tx = optax.partition(
        {"local": transformation(name), "sgd": optax.sgd(0.5)},
        {"encoder": "local", "decoder": "sgd"},
    )
    updates, _ = update_of(tx)
    assert_same_step(name, updates["encoder"], plain_update_of(name)[0]["encoder"])
    assert_close(updates["decoder"], jax.tree.map(lambda g: -0.5 * g, grads["decoder"]))


@each_maskable
def test_masked_layers_keep_their_gradient(name):
    grads, _ = gradients()
    updates, _ = update_of(optax.masked(transformation(name), {"encoder": False, "decoder": True}))
    assert_same_step(name, updates["decoder"], plain_update_of(name)[0]["decoder"])
    assert_identical(updates["encoder"], grads["encoder"])


@pytest.mark.parametrize("name", [n for n in METHODS if METHODS[n].is_whole])
def test_methods_that_need_all_parameters_say_so_when_masked(name):
    with pytest.raises(ValueError, match=r"all parameters.*outside of `optax.masked`"):
        update_of(optax.masked(transformation(name), {"encoder": False, "decoder": True}))


@each_method
def test_inject_hyperparams_with_a_schedule_equals_the_schedule(name):
    method = METHODS[name]
    schedule = optax.exponential_decay(method.learning_rate, transition_steps=1, decay_rate=0.5)
    injected = optax.inject_hyperparams(method.build, static_args=method.static)(
        layers(), learning_rate=schedule, **method.options
    )
    params, (grads, captured) = init_params(), gradients()
    updates = []
    for tx in (constructed(name, schedule), injected):
        update = jax.jit(lambda s, tx=tx: tx.update(grads, s, params, captured=captured, **line()))
        first, state = update(tx.init(params))
        second, state = update(state)
        updates.append((first, second))
    assert_close(updates[0], updates[1])
    assert_close(updates[0][0], plain_update_of(name)[0], error=1e-6)  # Optax's rate is float32
    np.testing.assert_allclose(state.hyperparams["learning_rate"], method.learning_rate / 2)


@each_method
def test_multi_steps_averages_gradients_but_only_the_last_micro_batch_is_captured(name):
    """Accumulated gradients meet the captured arrays of the last micro-batch alone.

    The difference between the averaged gradient and the last batch's X'E then counts as gradient
    that never touched data. For local losses of the whole batch, capture the whole batch.
    """
    (first, captured_first), (second, captured_second) = gradients(0), gradients(1)
    multi = optax.MultiSteps(transformation(name), every_k_schedule=2)
    params = init_params()
    update = jax.jit(lambda g, s, p, captured: multi.update(g, s, p, captured=captured, **line()))
    with jax.numpy_dtype_promotion("standard"):  # it divides gradients by an integer count
        nothing, state = update(first, multi.init(params), params, captured_first)
        updates, state = update(second, state, params, captured_second)
    assert all(np.all(u == 0) for u in jax.tree.leaves(nothing))
    average = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
    expected = plain_update_of(name, average, captured_second)
    assert_close((updates, state.inner_opt_state), expected, error=1e-6)  # it sums in float32


@each_method
def test_apply_if_finite_passes_finite_updates_and_drops_others(name):
    grads, _ = gradients()
    tx: Any = optax.apply_if_finite(transformation(name), max_consecutive_errors=3)
    params = init_params()
    update = jax.jit(lambda g, s, p, captured: tx.update(g, s, p, captured=captured, **line()))
    updates, state = update(grads, tx.init(params), params, gradients()[1])
    assert_close((updates, state.inner_state), plain_update_of(name))
    broken = jax.tree.map(lambda g: g.at[0].set(np.nan), grads)
    updates, after = update(broken, state, params, gradients()[1])
    assert all(np.all(u == 0) for u in jax.tree.leaves(updates))
    assert_identical(after.inner_state, state.inner_state)
    assert not after.last_finite


# --- JAX's transformations and checkpoints -------------------------------------------------------


@each_method
def test_a_scan_over_steps_equals_the_loop(name):
    tx, params = transformation(name), init_params()

    def body(carry, x):
        params, state = carry
        params, state, loss = step(tx, params, state, x)
        return (params, state), loss

    batches = jnp.stack([batch(seed) for seed in range(3)])
    carry, losses = jax.jit(lambda carry: jax.lax.scan(body, carry, batches))(
        (params, tx.init(params))
    )
    params, state, expected = train(name, params, tx.init(params), range(3))
    assert_close((carry, losses), ((params, state), jnp.stack(expected)))


@each_method
def test_vmap_over_seeds_equals_the_loop(name):
    tx = transformation(name)
    params = [init_params(seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    states = jax.vmap(tx.init)(stacked)
    together = jax.jit(jax.vmap(functools.partial(step, tx), in_axes=(0, 0, None)))(
        stacked, states, batch()
    )
    for seed in range(2):
        alone = train(name, params[seed], tx.init(params[seed]), [0])
        assert_close(jax.tree.map(lambda x, i=seed: x[i], together), (*alone[:2], alone[2][0]))


@each_method
def test_training_goes_on_bit_for_bit_from_an_orbax_checkpoint(name, tmp_path):
    tx, params = transformation(name), init_params()
    params, state, _ = train(name, params, tx.init(params), range(2))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", (params, state))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "checkpoint", shapes((params, state)))
    assert_identical(restored, (params, state))
    restored_params, restored_state = restored
    assert_identical(
        train(name, restored_params, restored_state, range(2, 4)),
        train(name, params, state, range(2, 4)),
    )
