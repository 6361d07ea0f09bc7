"""Models that nobody here wrote: each parameter is in a layer, or known by name with the reason.

    python3 make.py test --outside

`known.py` lists what capture refuses. Each entry is a strict xfail, so that a cure shows up: delete
the entry then.
"""

import functools
import re
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import locoprop_jax as lp
from tests.helpers import brought_back, quick_jit
from tests.outside.known import KNOWN, NO_LAYER
from tests.outside.models import load, not_installed
from tests.outside.registry import Problem

if missing := not_installed():
    pytest.skip(
        f"needs {', '.join(missing)}: python3 make.py test --outside", allow_module_level=True
    )

MODELS = load()
IN_LAYERS = [name for name in MODELS if NO_LAYER not in KNOWN.get(name, {})]
STEPS = 3

pytestmark = [
    pytest.mark.slow,
    pytest.mark.standard_promotion,
    pytest.mark.filterwarnings("ignore"),  # what packages say of each other is theirs to mend
]


class Found(NamedTuple):
    """A model with its layers."""

    problem: Problem
    layers: lp.Layers

    @property
    def refused(self) -> dict[str, str]:
        """Reasons by the paths of those parameters with a gradient that are in no layer."""
        return {other.path: other.reason for other in self.layers.uncaptured if other.has_gradient}


@functools.cache
def found(name: str) -> Found:
    problem = MODELS[name]()
    layers = lp.find_layers(problem.loss_fn, problem.params, *problem.batch, on_uncaptured="pass")
    return Found(problem, layers)


def test_what_is_known_is_known_of_models_that_there_are():
    assert set(KNOWN) <= set(MODELS)


@pytest.mark.parametrize("name", IN_LAYERS)
def test_every_parameter_is_in_a_layer_but_those_known(name):
    refused = found(name).refused
    known = {path for path in refused for part in KNOWN.get(name, {}) if re.search(part, path)}
    assert {path: reason for path, reason in refused.items() if path not in known} == {}


class Refused(Exception):
    """What is known to be refused still is."""


@pytest.mark.xfail(raises=Refused, strict=True)
@pytest.mark.parametrize(
    ("name", "part"), [(name, part) for name, parts in KNOWN.items() for part in parts]
)
def test_known_to_be_refused(name, part):
    """Fails if the reason is another than the one that `known.py` gives."""
    try:
        reasons = [reason for path, reason in found(name).refused.items() if re.search(part, path)]
    except ValueError as error:
        assert part == NO_LAYER
        reasons = [str(error)]
    assert all(re.search(KNOWN[name][part], reason) for reason in reasons), reasons
    if reasons:
        raise Refused(reasons[0])


@pytest.mark.parametrize("name", IN_LAYERS)
def test_gradients_are_those_of_jax_and_of_the_captured_arrays(name):
    """At three points, each a step of FOOF after the one before."""
    (loss_fn, params, batch), layers = found(name)
    tx = lp.with_fallback(lp.foof(layers), layers, optax.adam(1e-3))

    @quick_jit
    def step(params, state, batch):
        value, grads, captured = lp.value_grad_and_capture(loss_fn)(params, *batch)
        expected = jax.value_and_grad(loss_fn)(params, *batch)
        of_arrays = brought_back(layers, captured, grads)
        updates, state = tx.update(grads, state, params, captured=captured)
        params = optax.apply_updates(params, updates)
        return params, state, ((value, grads), expected), (of_arrays, grads)

    state = tx.init(params)
    for _ in range(STEPS):
        params, state, gradients, of_arrays = step(params, state, batch)
        close(*gradients)
        close(*of_arrays)


def close(actual, desired):
    """Finite, and equal up to rounding of the largest number there is, in float64."""
    chex.assert_tree_all_finite(desired)
    largest = max(float(jnp.abs(leaf).max(initial=0)) for leaf in jax.tree.leaves(desired))
    chex.assert_trees_all_close(actual, desired, rtol=1e-8, atol=1e-8 * largest)
