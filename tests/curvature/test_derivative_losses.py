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
from tests.helpers import normal, quick_jit

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


def test_factors_are_those_of_dangel_mueller_and_zeinhofer():
    """A of all rows of a forward-mode Laplacian, B of what arrives at their outputs.

    For each coordinate a layer has the rows (z, 1) of the values, (z., 0) of the tangents, the
    outer and the inner one, and (z.., 0) of the second derivatives. At the first layer the last are
    zero and no program has them; at the last layer only these reach the Laplacian.
    """
    loss_fn = loss_of(POISSON[:1])
    layers = lp.find_layers(loss_fn, PARAMS)
    _, grads, captured = capture(loss_fn, "ggn_exact")
    tx = lp.scale_by_kfac(layers, decay=0.5, match_trace=False)
    _, state = jax.jit(tx.update)(grads, tx.init(PARAMS), PARAMS, captured=captured)

    def forward(shifts):
        """The Laplacian by hand, with a shift of each output; and the inputs."""
        total, inputs = 0.0, {name: [] for name in PARAMS}
        for i in range(2):
            tangent = jnp.zeros_like(INSIDE).at[:, i].set(1.0)
            z = jnp.stack([INSIDE, tangent, tangent, jnp.zeros_like(INSIDE)])
            for name, p in PARAMS.items():
                ones = jnp.zeros((4, len(INSIDE), 1)).at[0].set(1.0)
                extended = jnp.concatenate([z, ones], -1)
                inputs[name].append(extended)
                a, outer, inner, second = (
                    extended @ jnp.concatenate([p["kernel"], p["bias"][None]]) + shifts[name][i]
                )
                h = jnp.tanh(a)
                slope = 1 - h**2
                bent = slope * second - 2 * h * slope * outer * inner
                z = jnp.stack([h, slope * outer, slope * inner, bent])
            total += second[:, 0]
        return total, inputs

    zeros = {n: jnp.zeros((2, 4, len(INSIDE), p["bias"].size)) for n, p in PARAMS.items()}
    laplacian, inputs = forward(zeros)
    np.testing.assert_allclose(laplacian, POISSON[0].residuals(PARAMS), rtol=1e-10)
    # A row reaches the residual of its own point alone: one pull has them all.
    cotangents = quick_jit(jax.grad(lambda shifts: forward(shifts)[0].sum()))(zeros)
    used = {"first": slice(0, 3), "middle": slice(0, 4), "last": slice(3, 4)}
    for name in layers:
        x = np.stack(inputs[name])[:, used[name]].reshape(-1, inputs[name][0].shape[-1])
        c = np.asarray(cotangents[name])[:, used[name]].reshape(-1, cotangents[name].shape[-1])
        if name == "last":  # whose bias has no gradient and is none of its inputs
            x = x[:, :-1]
        expected = x.T @ x / len(x), 2 / len(INSIDE) * c.T @ c  # 2 / N: the mean of squares'
        for found, factor in zip(state.statistics[name], expected, strict=True):
            np.testing.assert_allclose(found, factor / 2, rtol=1e-9, atol=1e-12)  # half a step old


METHODS = {
    "foof": lambda layers: lp.foof(layers),
    "lnb": lambda layers: lp.lnb(layers),
    "kfac": lambda layers: lp.kfac(layers),
    "natural_gradient": lambda layers: lp.natural_gradient(layers),
    "hessian_free": lambda layers: lp.hessian_free(),
}


CURVATURES = [
    *((name, None) for name in ("foof", "lnb", "hessian_free")),
    *((name, kind) for name in ("kfac", "natural_gradient") for kind in ("ggn_exact", "ggn_mc")),
]


@pytest.mark.parametrize(("name", "curvature"), CURVATURES)
def test_each_method_lowers_the_loss_of_an_equation(name, curvature):
    loss_fn = loss_of(POISSON)
    layers = lp.find_layers(loss_fn, PARAMS)
    tx = METHODS[name](layers)
    get = lp.value_grad_and_capture(loss_fn, curvature=curvature)
    start = {"rng": jax.random.key(0)} if curvature == "ggn_mc" else {}

    @quick_jit
    def step(params, state):
        value, grads, captured = get(params, **start)
        more = {"captured": captured, "value": value, "grad": grads, "value_fn": loss_fn}
        updates, state = optax.with_extra_args_support(tx).update(grads, state, params, **more)
        return optax.apply_updates(params, updates), state, value

    params, state, losses = PARAMS, tx.init(PARAMS), []
    for _ in range(15):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[-1] < 0.8 * losses[0]


def test_rows_that_are_the_same_for_all_points_are_refused_with_a_remedy():
    def loss_fn(p):
        def u(x):
            return net(p, x[None])[0]

        v = jnp.ones(2)
        slope = jax.vmap(lambda x: jax.jvp(u, (x,), (v,))[1])(INSIDE)
        return lp.losses.squared_error(slope, INSIDE[:, 0]).mean()

    layers = lp.find_layers(loss_fn, PARAMS)
    get = lp.value_grad_and_capture(loss_fn, curvature="ggn_exact")
    with pytest.raises(ValueError, match=r"first.* the same for all examples.*broadcast_to"):
        jax.eval_shape(get, PARAMS)
    get = lp.value_grad_and_capture(loss_fn, curvature="ggn_mc")

    def product(rng):
        return lp.fisher_product(layers, get(PARAMS, rng=rng)[2], PARAMS)

    with pytest.raises(ValueError, match=r"the same for all examples.*broadcast_to"):
        jax.eval_shape(product, jax.random.key(0))
