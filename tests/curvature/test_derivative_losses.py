"""Losses made of the network's derivatives, marked: residuals inside and at the boundary."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import locoprop_jax as lp
from tests.helpers import block_gradient, normal, quick_jit

INSIDE, EDGE = normal(0, 6, 2), normal(1, 4, 2)
PARAMS = {
    "first": {"kernel": normal(2, 2, 3), "bias": normal(3, 3)},
    "middle": {"kernel": normal(4, 3, 3), "bias": normal(5, 3)},
    "last": {"kernel": normal(6, 3, 1), "bias": normal(7, 1)},
}
FLAT, UNRAVEL = ravel_pytree(PARAMS)


def net(p, x):
    """One number for each point: (points, d) -> (points,)."""
    for name in ("first", "middle"):
        x = jnp.tanh(x @ p[name]["kernel"] + p[name]["bias"][None])
    return (x @ p["last"]["kernel"] + p["last"]["bias"][None])[:, 0]


def laplacian(f, x):
    """Forward over forward, along tangents as large as the points."""

    def second(i):
        v = jnp.zeros_like(x).at[:, i].set(1.0)
        return jax.jvp(lambda x: jax.jvp(f, (x,), (v,))[1], (x,), (v,))[1]

    return sum(second(i) for i in range(x.shape[1]))


def slopes(p, x):
    return jax.grad(lambda x: net(p, x).sum())(x)


class Part(NamedTuple):
    """Residuals, what they should be, and what their mean square counts."""

    residuals: Callable
    targets: Any
    weight: float


POISSON = (
    Part(lambda p: laplacian(lambda x: net(p, x), INSIDE), -jnp.sin(INSIDE).sum(1), 1.0),
    Part(lambda p: net(p, EDGE), jnp.zeros(len(EDGE)), 10.0),
)
FORCES = (
    Part(lambda p: net(p, INSIDE), normal(8, 6), 0.5),
    Part(lambda p: -slopes(p, INSIDE), normal(9, 6, 2), 3.0),
)
LOSSES = {"poisson": POISSON, "energies and forces": FORCES}


def loss_of(parts):
    def loss_fn(p):
        terms = (
            part.weight * lp.losses.squared_error(part.residuals(p), part.targets).mean()
            for part in parts
        )
        return sum(terms)

    return loss_fn


def dense_gauss_newton(parts):
    """The sum of 2 w J'J / N over the parts."""
    total = 0.0
    for part in parts:
        jacobian = jax.jacobian(lambda flat, part=part: part.residuals(UNRAVEL(flat)).ravel())(FLAT)
        total += 2 * part.weight * jacobian.T @ jacobian / len(jacobian)
    return total


def capture(loss_fn, curvature, params=PARAMS, **options):
    get = lp.value_grad_and_capture(loss_fn, curvature=curvature)
    return jax.jit(lambda params, options: get(params, **options))(params, options)


@pytest.fixture(scope="module", params=LOSSES)
def problem(request):
    parts = LOSSES[request.param]
    return parts, loss_of(parts), dense_gauss_newton(parts)


def test_the_fisher_of_exact_columns_is_the_gauss_newton_matrix(problem):
    _, loss_fn, dense = problem
    layers = lp.find_layers(loss_fn, PARAMS)
    _, _, captured = capture(loss_fn, "ggn_exact")
    v = normal(10, len(FLAT))
    for product in (
        lp.fisher_product(layers, captured, UNRAVEL(v)),
        lp.gauss_newton_vector_product(loss_fn, PARAMS)(UNRAVEL(v)),
    ):
        np.testing.assert_allclose(ravel_pytree(product)[0], dense @ v, rtol=1e-9)
    divided = lp.inverse_fisher_product(layers, captured, UNRAVEL(v), 0.1)
    expected = np.linalg.solve(dense + 0.1 * np.eye(len(v)), v)
    np.testing.assert_allclose(ravel_pytree(divided)[0], expected, rtol=1e-8)
