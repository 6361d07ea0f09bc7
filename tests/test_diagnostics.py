"""What `diagnostics` reads from a state: of every method, through every wrapper."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import locoprop_jax as lp
from tests.test_contract import (
    METHODS,
    each_method,
    init_params,
    layers,
    shapes,
    train,
    transformation,
)

STEPS = 3
OF_STEPS = {
    "damping",
    "inner_damping",
    "step_size",
    "model_change",
    "reduction_ratio",
    "radius",
    "curvature_ratio",
    "length",
}
# The names of the states of a method, and what each is asked for beside its counters.
AMORTISED = {"failures", "age"}
NAMES = {
    "foof": {"foof": AMORTISED},
    "diagonal foof": {"diagonal_foof": AMORTISED},
    "lnb": {"lnb": set()},
    "lnb of joint length": {"lnb": set()},
    "kfac": {"kfac": AMORTISED},
    "kfac with gauss-newton steps": {"gauss_newton_step": OF_STEPS, "kfac": AMORTISED},
    "natural_gradient": {
        "gauss_newton_step": OF_STEPS,
        "natural_gradient": {"failures", "damping/all"},
    },
    "natural_gradient of each layer": {
        "natural_gradient": {"failures", "damping/encoder", "damping/decoder"}
    },
    "hessian_free": {"hessian_free": {"damping", "model_change", "reduction_ratio", "iterations"}},
    "locoprop_s": {"local_loss": {"failures"}},
    "locoprop_m": {"local_loss": {"failures"}},
    "proxprop": {"local_loss": {"failures"}},
    "locoprop_kfac": {"local_loss": {"failures"}},
    "scale_by_local_loss": {"local_loss": {"failures"}},
}


@functools.cache
def trained(name):
    params = init_params()
    return train(name, params, transformation(name).init(params), range(STEPS))[1]


@each_method
def test_every_method_says_how_it_is(name):
    state = trained(name)
    found = lp.diagnostics(state)
    expected = {
        f"{own}/{what}" for own, more in NAMES[name].items() for what in {"count", "refused"} | more
    }
    assert set(found) == expected
    assert all(jnp.shape(number) == () for number in found.values())
    assert not any(np.isnan(float(number)) for number in found.values())
    for own in NAMES[name]:
        assert (found[f"{own}/count"], found[f"{own}/refused"]) == (STEPS, 0)
    chex.assert_trees_all_equal(jax.jit(lp.diagnostics)(state), found)
    more = jax.eval_shape(functools.partial(lp.diagnostics, condition_numbers=True), state)
    assert set(more) >= expected
    assert {number.shape for number in more.values()} == {()}


def test_each_method_of_the_contract_is_asked():
    assert set(NAMES) == set(METHODS)


def test_what_is_read_is_the_state():
    state = trained("kfac with gauss-newton steps")
    steps, kfac = state[0], state[0].inner
    found = lp.diagnostics(state)
    assert found["gauss_newton_step/damping"] == steps.damping > 0
    assert found["gauss_newton_step/length"] == steps.length > 0
    assert found["kfac/age"] == kfac.count - kfac.gathered == 0
    foof = trained("foof")[1]
    later = foof._replace(count=foof.count + 7, failures=foof.failures + 2)
    found = lp.diagnostics(later)
    assert (found["foof/age"] - lp.diagnostics(foof)["foof/age"], found["foof/failures"]) == (7, 2)
    assert "foof/age" not in lp.diagnostics(lp.foof(layers(), decay=0.0).init(init_params()))


# --- wrappers ------------------------------------------------------------------------------------

FOOF = {"foof/count", "foof/refused", "foof/failures", "foof/age"}
TWICE = FOOF | {name.replace("foof/", "foof_1/") for name in FOOF}
HALF = {"encoder": True, "decoder": False}
LABELS = {"encoder": "a", "decoder": "b"}


def injected():
    build = optax.inject_hyperparams(lp.foof, static_args=METHODS["foof"].static)
    return build(layers(), learning_rate=0.25)


def in_a_train_state(tx):
    return lp.TrainState.create(apply_fn=None, params=init_params(), tx=tx)


@pytest.mark.parametrize(
    "wrapped, more",
    [
        (lambda tx: optax.chain(optax.clip(1.0), tx, lp.average_iterates()).init, FOOF),
        (lambda tx: optax.masked(tx, HALF).init, FOOF),
        (lambda tx: optax.partition({"a": tx, "b": optax.sgd(0.1)}, LABELS).init, FOOF),
        (lambda tx: optax.partition({"a": tx, "b": tx}, LABELS).init, TWICE),
        (lambda tx: lp.with_fallback(tx, layers(), optax.adam(0.1)).init, FOOF),
        (lambda tx: optax.MultiSteps(tx, 2).init, FOOF),
        (lambda tx: optax.apply_if_finite(tx, 3).init, FOOF),
        (lambda tx: lambda params: in_a_train_state(tx), FOOF),
    ],
)
def test_the_states_are_found_in_every_wrapper(wrapped, more):
    state = wrapped(lp.foof(layers()))(init_params())
    found = set(lp.diagnostics(state))
    assert more <= found
    others = {name.partition("/")[0] for name in found - more}
    assert others <= {"iterate_average", "multi_steps", "apply_if_finite"}


def test_hyperparameters_that_were_injected_and_counters_of_wrappers_are_there():
    state = optax.apply_if_finite(injected(), 3).init(init_params())
    found = lp.diagnostics(state)
    assert found["hyperparams/learning_rate"] == 0.25
    assert found["hyperparams/damping"] == 1.0
    assert found["apply_if_finite/total_notfinite"] == 0
    multi = optax.MultiSteps(optax.chain(injected()), 2).init(init_params())
    assert {"multi_steps/mini_step", "hyperparams/momentum"} <= set(lp.diagnostics(multi))


@pytest.mark.parametrize("state", [(), optax.sgd(0.1).init({}), {"foof": jnp.zeros(2)}])
def test_a_tree_without_states_of_ours_is_refused(state):
    with pytest.raises(ValueError, match="`diagnostics` found no state"):
        lp.diagnostics(state)


def test_an_abstract_state_has_the_same_names():
    tx = lp.foof(layers())
    abstract = jax.eval_shape(lambda: lp.diagnostics(tx.init(init_params())))
    assert abstract == shapes(lp.diagnostics(tx.init(init_params())))


# --- condition numbers ---------------------------------------------------------------------------


def conditions(state):
    found = lp.diagnostics(state, condition_numbers=True)
    return {name: value for name, value in found.items() if "/condition/" in name}


@pytest.mark.parametrize(
    "name", ["foof", "kfac", pytest.param("natural_gradient", marks=pytest.mark.slow)]
)
def test_condition_numbers_are_those_of_what_is_kept(name):
    state = trained(name)
    found = conditions(state)
    if name == "natural_gradient":
        own = state[0].inner.systems["all"].cholesky
        kept = {"natural_gradient/condition/all/damped": own @ own.T}
    else:
        own = state[1] if name == "foof" else state[0]
        kept = {
            f"{name}/condition/{layer}/{prefix}{field}": getattr(factors, attribute)
            for prefix, by_layer in (("", own.statistics), ("damped_", own.inverse))
            for layer, factors in by_layer.items()
            for field, attribute in FIELDS[name, prefix].items()
        }
    assert set(found) == set(kept)
    for key, matrix in kept.items():
        singular = abs(np.linalg.eigvalsh(matrix)).min() < 1e-12 * abs(matrix).max()
        expected = np.inf if singular else np.linalg.cond(matrix)
        if singular:  # rounding errors are all there is of an eigenvalue that is zero
            assert found[key] > 1e12
        else:
            np.testing.assert_allclose(found[key], expected, rtol=1e-6)


FIELDS = {
    ("foof", ""): {"inputs": "second"},
    ("foof", "damped_"): {"inputs": "kernel"},
    ("kfac", ""): {"inputs": "inputs", "outputs": "outputs"},
    ("kfac", "damped_"): {"inputs": "inputs", "outputs": "outputs"},
}


def increasing(leaf):
    """Diagonal, from one to the length of the last axis; numbers as they are."""
    if not leaf.ndim:
        return leaf
    n = leaf.shape[-1]
    entries = jnp.arange(1, n + 1, dtype=leaf.dtype)
    return jnp.broadcast_to(jnp.diag(entries) if leaf.shape[-2:] == (n, n) else entries, leaf.shape)


@pytest.mark.parametrize("options", [{"max_size": 2}, {"max_size": 1}, {}])
def test_diagonals_and_matrices_are_told_apart(options):
    state = jax.tree.map(increasing, lp.scale_by_kfac(layers(), **options).init(init_params()))
    found = conditions(state)
    sizes = {"encoder": (4, 2), "decoder": (2, 3)}
    for layer, (d, d_out) in sizes.items():
        assert found[f"kfac/condition/{layer}/inputs"] == d
        assert found[f"kfac/condition/{layer}/damped_outputs"] == d_out


def test_the_eigenvalues_of_exact_damping_are_kept_as_they_are():
    state = lp.scale_by_kfac(layers(), exact_damping=True).init(init_params())
    assert conditions(state)["kfac/condition/encoder/damped"] == np.inf
    inverse = {name: own._replace(scale=own.scale + 1) for name, own in state.inverse.items()}
    inverse["encoder"] = inverse["encoder"]._replace(
        scale=inverse["encoder"].scale.at[0, 0].set(8.0)
    )
    assert conditions(state._replace(inverse=inverse))["kfac/condition/encoder/damped"] == 8


def test_of_stacked_layers_the_largest_is_taken():
    second = jnp.stack([jnp.diag(jnp.array([1.0, 2.0, 4.0])), jnp.diag(jnp.array([1.0, 9.0, 3.0]))])
    state = lp.foof(layers()).init(init_params())[1]
    own = state.statistics["encoder"]._replace(second=second, mean=jnp.zeros((2, 3)))
    state = state._replace(statistics={"encoder": own}, inverse={})
    assert conditions(state) == {"foof/condition/encoder/inputs": 9}
    own = own._replace(second=jnp.array([[1.0, 2.0, 4.0], [1.0, 9.0, 3.0], [1.0, 1.0, 1.0]]))
    own = own._replace(mean=jnp.zeros((3, 3)))
    state = state._replace(statistics={"encoder": own})
    assert conditions(state) == {"foof/condition/encoder/inputs": 9}
