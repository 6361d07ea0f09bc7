"""Numbers that are no problem to solve: what every method makes of them at its defaults.

Updates, parameters and states stay finite, and of the same structure and dtypes; a batch that is
not finite moves nothing but its counters; and the batch after it is taken as if nothing had been.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import locoprop_jax as lp
from tests.neurons.diagonal_foof import diagonal_foof
from tests.test_contract import METHODS, rows

# --- the methods at their defaults ---------------------------------------------------------------


class Defaults(NamedTuple):
    """How a method is built with nothing but what it has to be told.

    Attributes:
      build: from the layers to the optimizer.
      curvature: what it needs captured beside the loss's own arrays.
      row: the row of the contract's table that has the method.
      size: of the batches that it takes; None for any.
    """

    build: Callable[[lp.Layers], optax.GradientTransformation]
    row: str
    curvature: str | None = None
    size: int | None = None


def metric_steps(direction):
    return optax.chain(lp.scale_by_metric_norm(direction), optax.scale_by_learning_rate(0.1))


def local_steps(layers):
    local = lp.scale_by_local_loss(layers, 0.1, gamma=1.0, solver=lp.conjugate_gradient(3))
    return optax.chain(local, optax.scale(-1.0))


DEFAULTS = {
    "foof": Defaults(lp.foof, "foof"),
    "foof of each batch": Defaults(
        lambda layers: lp.foof(layers, decay=0.0, inverse_period=1), "foof"
    ),
    "diagonal foof": Defaults(diagonal_foof, "diagonal foof"),
    "lnb": Defaults(lp.lnb, "lnb"),
    "lnb of joint length": Defaults(
        lambda layers: lp.lnb(layers, unit="joint"), "lnb of joint length"
    ),
    "kfac": Defaults(lp.kfac, "kfac with gauss-newton steps", "ggn_mc"),
    "kfac of exact damping": Defaults(
        lambda layers: lp.kfac(layers, exact_damping=True),
        "kfac with gauss-newton steps",
        "ggn_mc",
    ),
    "kflr": Defaults(lp.kflr, "kfac with gauss-newton steps", "ggn_exact"),
    "kfra": Defaults(lp.kfra, "kfac with gauss-newton steps", "ggn_output"),
    "scale_by_kfac": Defaults(
        lambda layers: metric_steps(lp.scale_by_kfac(layers)), "kfac", "ggn_mc"
    ),
    "natural_gradient": Defaults(lp.natural_gradient, "natural_gradient", "ggn_mc"),
    "natural_gradient of the last batch": Defaults(
        lambda layers: lp.natural_gradient(layers, batch_size=6), "natural_gradient", "ggn_mc", 6
    ),
    "natural_gradient of each layer": Defaults(
        lambda layers: metric_steps(lp.scale_by_natural_gradient(layers, block_diagonal=True)),
        "natural_gradient of each layer",
        "ggn_mc",
    ),
    "hessian_free": Defaults(lambda layers: lp.hessian_free(), "hessian_free"),
    "locoprop_s": Defaults(lp.locoprop_s, "locoprop_s"),
    "locoprop_m": Defaults(lp.locoprop_m, "locoprop_m"),
    "pocoprop_s": Defaults(lp.pocoprop_s, "locoprop_s"),
    "pocoprop_m": Defaults(lp.pocoprop_m, "locoprop_m"),
    "proxprop": Defaults(lambda layers: lp.proxprop(layers, 0.1), "proxprop"),
    "locoprop_kfac": Defaults(lambda layers: lp.locoprop_kfac(layers, 0.1), "locoprop_kfac"),
    "scale_by_local_loss": Defaults(local_steps, "scale_by_local_loss"),
}
# Those of which another one stands for the same code.
SLOW = {
    "diagonal foof",
    "natural_gradient",
    "foof of each batch",
    "lnb of joint length",
    "kfac of exact damping",
    "kflr",
    "kfra",
    "scale_by_kfac",
    "natural_gradient of the last batch",
    "natural_gradient of each layer",
    "locoprop_s",
    "pocoprop_s",
    "pocoprop_m",
    "proxprop",
    "locoprop_kfac",
    "scale_by_local_loss",
}
each_default = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in DEFAULTS]
)


def test_every_method_of_the_contract_is_here():
    assert {own.row for own in DEFAULTS.values()} == set(METHODS)
    assert rows(SLOW) and set(DEFAULTS) > SLOW


# --- the problem: one hidden layer of ReLUs, examples with weights --------------------------------

WIDTHS, EXAMPLES = (4, 3, 2), 6


class Batch(NamedTuple):
    """Inputs, targets, the weight of each example, and what the sum is divided by."""

    x: Any
    y: Any
    weights: Any
    total: Any


def loss_fn(params, batch):
    hidden = jax.nn.relu(batch.x @ params["in"]["kernel"] + params["in"]["bias"][None])
    outputs = hidden @ params["out"]["kernel"] + params["out"]["bias"][None]
    losses = lp.losses.squared_error(outputs, batch.y).sum(-1)
    return jnp.sum(batch.weights * losses) / batch.total


def init_params(dtype="float32", out_dtype=None):
    rng = np.random.default_rng(0)

    def layer(d, d_out, dtype):
        kernel = rng.normal(size=(d, d_out)) / d**0.5
        return {"kernel": jnp.asarray(kernel, dtype), "bias": jnp.full(d_out, 0.1, dtype)}

    return {
        "in": layer(*WIDTHS[:2], dtype),
        "out": layer(*WIDTHS[1:], dtype if out_dtype is None else out_dtype),
    }


def good_batch(seed=0, dtype="float32", examples=EXAMPLES):
    rng = np.random.default_rng(seed)
    x, y = (jnp.asarray(rng.normal(size=(examples, d)), dtype) for d in (WIDTHS[0], WIDTHS[-1]))
    return Batch(x, y, jnp.ones(examples, dtype), jnp.asarray(examples, dtype))


# --- what goes wrong ------------------------------------------------------------------------------


def with_inputs(change):
    return lambda params, batch: (params, batch._replace(x=change(batch.x)))


def zero_gradients(params, batch):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return zeros, batch._replace(y=jnp.zeros_like(batch.y))


def dead_units(params, batch):
    return {**params, "in": {**params["in"], "bias": params["in"]["bias"] - 100}}, batch


def one_example(params, batch):
    return params, batch._replace(weights=batch.weights.at[1:].set(0), total=0 * batch.total + 1)


def padding_only(params, batch):
    return params, batch._replace(weights=0 * batch.weights, total=0 * batch.total + 1)


def mean_of_nothing(params, batch):
    return params, batch._replace(weights=0 * batch.weights, total=0 * batch.total)


def infinite_target(params, batch):
    return params, batch._replace(y=batch.y.at[0].set(jnp.inf))


def targets_of(size):
    return lambda params, batch: (params, batch._replace(y=size * batch.y))


ILL = 10.0 ** -np.linspace(0, 6, WIDTHS[0])  # X'X has the squares: a condition number of 1e12
TAKEN = {
    "as it is": lambda params, batch: (params, batch),
    "zero gradients": zero_gradients,
    "constant columns": with_inputs(lambda x: x.at[:, 1:].set(3.0)),
    "duplicate columns": with_inputs(lambda x: x.at[:, 1:].set(x[:, :1])),
    "duplicate rows": with_inputs(lambda x: jnp.broadcast_to(x[:1], x.shape)),
    "zero inputs": with_inputs(jnp.zeros_like),
    "one example": one_example,
    "padding only": padding_only,
    "dead units": dead_units,
    "inputs of 1e-20": with_inputs(lambda x: 1e-20 * x),
    "inputs of 1e20": with_inputs(lambda x: 1e20 * x),
    "inputs of 1e10": with_inputs(lambda x: 1e10 * x),
    "targets of 1e-20": targets_of(1e-20),
    "targets of 1e15": targets_of(1e15),
    "an ill-conditioned second moment": with_inputs(lambda x: x * jnp.asarray(ILL, x.dtype)[None]),
    "a huge mean": with_inputs(lambda x: x + 1e6),
    "integers": with_inputs(lambda x: jnp.round(3 * x)),
    "large integers": with_inputs(lambda x: jnp.round(255 * jnp.abs(x))),
}
REFUSED = {
    "an infinity in one row": with_inputs(lambda x: x.at[-1, 1].set(jnp.inf)),
    "minus infinity in one row": with_inputs(lambda x: x.at[-1, 1].set(-jnp.inf)),
    "no number in one row": with_inputs(lambda x: x.at[-1, 1].set(jnp.nan)),
    "an infinite target": infinite_target,
    "a mean over nothing": mean_of_nothing,
}
# Here the length of the step overflows, for as long as the average of gradients remembers it.
STILL = {("diagonal foof", "inputs of 1e10")}


class Steps(NamedTuple):
    """One jitted program for all batches of a shape."""

    init: Callable[[Any], Any]
    step: Callable[..., Any]


@functools.cache
def steps(name, dtype="float32", out_dtype=None, examples=EXAMPLES):
    method = DEFAULTS[name]
    params, batch = init_params(dtype, out_dtype), good_batch(0, dtype, examples)
    tx: Any = method.build(lp.find_layers(loss_fn, params, batch))
    capture = lp.value_grad_and_capture(loss_fn, curvature=method.curvature, transferred=True)
    options = {"rng": jax.random.key(0)} if method.curvature == "ggn_mc" else {}

    @jax.jit
    def step(params, state, batch):
        value, grads, captured = capture(params, batch, **options)
        line = {"value": value, "grad": grads, "value_fn": lambda p: loss_fn(p, batch)}
        updates, state = tx.update(grads, state, params, captured=captured, **line)
        return optax.apply_updates(params, updates), state, updates

    return Steps(tx.init, step)


# What a huge batch says of the step before it: it is told and not used.
MEASURED = jax.tree_util.GetAttrKey("reduction_ratio")


def assert_sound(before, after):
    """Finite, and of the structure, the shapes and the dtypes that there were."""
    chex.assert_trees_all_equal_shapes_and_dtypes(after, before)
    wrong = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(after)
        if path[-1] != MEASURED and not np.isfinite(np.asarray(leaf, float)).all()
    }
    assert not wrong


def assert_refused(before, after):
    """As it was, but for the counters of refused batches and of updates."""
    for (path, new), old in zip(
        jax.tree_util.tree_leaves_with_path(after), jax.tree.leaves(before), strict=True
    ):
        name = jax.tree_util.keystr(path[-1:])
        if name == ".refused":
            assert new == old + 1
        elif name == ".count":  # of updates, for a schedule
            assert old <= new <= old + 1
        else:
            np.testing.assert_array_equal(new, old, err_msg=jax.tree_util.keystr(path))


def check(name, **problem):
    """Every batch, before the first step and after a few; and a good batch after each."""
    own = steps(name, **problem)
    dtype = problem.get("dtype", "float32")
    params = init_params(dtype, problem.get("out_dtype"))
    good = functools.partial(good_batch, dtype=dtype, examples=problem.get("examples", EXAMPLES))
    state = own.init(params)
    for start in range(2):
        untroubled = own.step(params, state, good(8))[2]
        for case, change in {**TAKEN, **REFUSED}.items():
            where = f"{name}, {'later' if start else 'at first'}: {case}"
            at, batch = change(params, good(7))
            new, after, updates = own.step(at, state, batch)
            with saying(where):
                assert_sound((params, state, params), (new, after, updates))
                _, last, following = own.step(params, after, good(8))
                assert_sound((state, params), (last, following))
                moves = any(np.any(u) for u in jax.tree.leaves(following))
                assert moves or (name, case) in STILL
                if case in REFUSED:
                    assert not any(np.any(u) for u in jax.tree.leaves(updates))
                    assert_refused(state, after)
                    chex.assert_trees_all_equal(following, untroubled)
        for seed in range(3):
            params, state, _ = own.step(params, state, good(seed))


@contextlib.contextmanager
def saying(where):
    """What fails says which batch it was."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{where}: {error}") from error


@each_default
def test_degenerate_batches_are_taken_or_refused(name):
    check(name)


# --- other dtypes and shapes ---------------------------------------------------------------------

PROBLEMS = {
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    "float64": {"dtype": "float64"},
    "float32 below float64": {"dtype": "float32", "out_dtype": "float64"},
    "batches of one example": {"examples": 1},
}


@pytest.mark.slow
@pytest.mark.standard_promotion
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", DEFAULTS)
def test_degenerate_batches_of_other_dtypes_and_shapes(name, problem):
    if DEFAULTS[name].size not in (None, PROBLEMS[problem].get("examples", EXAMPLES)):
        pytest.skip("it was built for batches of another size")
    check(name, **PROBLEMS[problem])


# --- complex parameters --------------------------------------------------------------------------


def complex_loss_fn(params, x):
    outputs = jnp.tanh(x @ params["in"]) @ params["out"]
    return jnp.mean(outputs.real**2 + outputs.imag**2)


@each_default
def test_complex_parameters_are_taken_or_refused_by_name(name):
    params = {"in": jnp.ones((3, 2), "complex64"), "out": jnp.ones((2, 3), "complex64")}
    x = jnp.ones((5, 3), "complex64")
    layers = lp.find_layers(complex_loss_fn, params, x)
    if name.startswith(("foof", "lnb")):  # tests/neurons/test_complex.py has their steps
        assert jax.tree.leaves(DEFAULTS[name].build(layers).init(params))
        return
    with pytest.raises(ValueError, match=r"takes real|complex|LocoProp-M|PocoProp-M"):
        DEFAULTS[name].build(layers).init(params)


# --- what was mended -----------------------------------------------------------------------------


def test_a_layer_whose_solution_overflows_stands_still_and_is_counted():
    """Its state is the one it had: a running sum of squares that overflowed would never fall."""
    params, batch = init_params(), good_batch()
    tx = lp.locoprop_s(lp.find_layers(loss_fn, params, batch))

    @jax.jit
    def step(state, batch):
        _, grads, captured = lp.value_grad_and_capture(loss_fn)(params, batch)
        return tx.update(grads, state, params, captured=captured)

    _, before = step(tx.init(params), batch)
    updates, after = step(before, batch._replace(x=1e12 * batch.x))
    found = lp.diagnostics(after)
    assert (found["local_loss/count"], found["local_loss/refused"]) == (2, 0)
    assert found["local_loss/failures"] == 2
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    chex.assert_trees_all_equal(after[0].inner, before[0].inner)
    assert all(np.any(u) for u in jax.tree.leaves(step(after, batch)[0]))
