"""Losses that differentiate the network: operators, energies and forces, penalties, scores."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import jet

from tests.helpers import assert_captured, normal

X, BOUNDARY = normal(0, 6, 2), normal(1, 5, 2)
PARAMS = {
    "first": {"kernel": normal(2, 2, 4), "bias": normal(3, 4)},
    "middle": {"kernel": normal(4, 4, 4), "bias": normal(5, 4)},
    "last": {"kernel": normal(6, 4, 1), "bias": normal(7, 1)},
}


def u(p, x):
    """The network at one point: a number."""
    h = jnp.tanh(x @ p["first"]["kernel"] + p["first"]["bias"])
    h = jnp.tanh(h @ p["middle"]["kernel"] + p["middle"]["bias"])
    return (h @ p["last"]["kernel"] + p["last"]["bias"])[0]


def by_hessian(f, x):
    return jnp.trace(jax.hessian(f)(x))


def forward_over_forward(f, x):
    def second(v):
        return jax.jvp(lambda x: jax.jvp(f, (x,), (v,))[1], (x,), (v,))[1]

    return sum(second(v) for v in jnp.eye(2))


def reverse_over_reverse(f, x):
    def second(i):
        return jax.grad(lambda x: jax.grad(f)(x)[i])(x)[i]

    return second(0) + second(1)


def jacobians(outer, inner):
    return lambda f, x: jnp.trace(outer(inner(f))(x))


def taylor(f, x):
    def second(v):
        _, (_, term) = jet.jet(f, (x,), ((v, jnp.zeros_like(x)),))
        return term

    return sum(second(v) for v in jnp.eye(2))


LAPLACIANS = {
    "hessian": by_hessian,
    "jvp of jvp": forward_over_forward,
    "grad of grad": reverse_over_reverse,
    "jacfwd of jacrev": jacobians(jax.jacfwd, jax.jacrev),
    "jacrev of jacfwd": jacobians(jax.jacrev, jax.jacfwd),
    "jacfwd of jacfwd": jacobians(jax.jacfwd, jax.jacfwd),
    "jet": taylor,
}


@pytest.mark.parametrize("operator", LAPLACIANS)
def test_poisson(operator):
    laplacian = LAPLACIANS[operator]

    def loss_fn(p, x, boundary):
        inside = jax.vmap(lambda x: laplacian(lambda x: u(p, x), x) + jnp.sin(x).sum())(x)
        at_boundary = jax.vmap(lambda x: u(p, x))(boundary)
        return jnp.mean(inside**2) + jnp.mean(at_boundary**2)

    layers, _ = assert_captured(loss_fn, PARAMS, X, BOUNDARY)
    assert not any(other.has_gradient for other in layers.uncaptured)


def test_points_that_are_closed_over_or_one():
    def loss_fn(p):
        inside = jax.vmap(lambda x: by_hessian(lambda x: u(p, x), x))(X)
        return jnp.mean(inside**2) + u(p, BOUNDARY[0]) ** 2

    layers, _ = assert_captured(loss_fn, PARAMS)
    assert not any(other.has_gradient for other in layers.uncaptured)


def test_energies_and_forces():
    def loss_fn(p, x, energy, forces):
        e, f = jax.vmap(jax.value_and_grad(lambda x: u(p, x)))(x)
        return jnp.mean((e - energy) ** 2) + jnp.mean((f + forces) ** 2)

    assert_captured(loss_fn, PARAMS, X, normal(8, 6), normal(9, 6, 2))


def test_sobolev_training_of_a_convolution():
    params = {"kernel": normal(2, 3, 1, 4), "bias": normal(3, 4), "out": normal(4, 4, 1)}

    def f(p, x):
        h = jax.lax.conv_general_dilated(
            x[None, :, None], p["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
        return (jnp.tanh(h + p["bias"][None, None]).mean((0, 1)) @ p["out"])[0]

    def loss_fn(p, x, y, dy):
        v, dv = jax.vmap(lambda x: jax.jvp(lambda x: f(p, x), (x,), (jnp.ones(5),)))(x)
        return jnp.mean((v - y) ** 2) + jnp.mean((dv - dy) ** 2)

    assert_captured(loss_fn, params, normal(0, 6, 5), normal(5, 6), normal(6, 6))


def test_sliced_score_matching():
    params = {"first": PARAMS["first"], "last": {"kernel": normal(6, 4, 2), "bias": normal(7, 2)}}

    def score(p, x):
        h = jnp.tanh(x @ p["first"]["kernel"] + p["first"]["bias"][None])
        return h @ p["last"]["kernel"] + p["last"]["bias"][None]

    def loss_fn(p, x, v):
        s, dv = jax.jvp(lambda x: score(p, x), (x,), (v,))
        return jnp.mean((v * dv).sum(1) + 0.5 * (s**2).sum(1))

    layers, _ = assert_captured(loss_fn, params, X, normal(9, 6, 2))
    assert layers["first"].rows == 2


def test_gradient_penalty():
    def loss_fn(p, real, fake):
        critic = jax.vmap(lambda x: u(p, x))
        slope = jax.vmap(jax.grad(lambda x: u(p, x)))(0.5 * (real + fake))
        norm = jnp.sqrt((slope**2).sum(1) + 1e-6)
        return critic(fake).mean() - critic(real).mean() + 10 * jnp.mean((norm - 1) ** 2)

    assert_captured(loss_fn, PARAMS, X, normal(9, 6, 2))
