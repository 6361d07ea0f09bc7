"""Folx: Laplacians of networks, forward, as physicists of many bodies and of fields use them."""

import equinox as eqx
import folx
import jax
import jax.numpy as jnp

from tests.outside.registry import Problem, model, normal

BATCH, SIZE = 8, 2


def problem(operator) -> Problem:
    """Poisson's equation with a known solution, and its values at the border."""
    network = eqx.nn.MLP(SIZE, "scalar", 8, 2, jnp.tanh, key=jax.random.key(0))
    params, static = eqx.partition(network, eqx.is_inexact_array)

    def loss_fn(params, inside, source, border, values):
        network = eqx.combine(params, static)
        laplacians = jax.vmap(lambda x: operator(network)(x))(inside)
        residuals = laplacians + source
        return jnp.mean(residuals**2) + jnp.mean((jax.vmap(network)(border) - values) ** 2)

    def solution(x):
        return jnp.prod(jnp.sin(x), -1)

    inside, border = normal(BATCH, SIZE), normal(BATCH, SIZE, seed=1)
    batch = inside, SIZE * solution(inside), border, solution(border)
    return Problem(loss_fn, params, batch)


def laplacian(operator):
    """The Laplacian alone of folx's pairs (its terms, gradient)."""
    return lambda network: lambda x: jnp.sum(operator(network)(x)[0])


@model("folx: Poisson, forward Laplacian")
def forward():
    def operator(network):
        return lambda x: folx.forward_laplacian(network)(x).laplacian

    return problem(operator)


@model("folx: Poisson, loop over directions")
def loop():
    return problem(laplacian(folx.LoopLaplacianOperator()))


@model("folx: Poisson, all directions at once")
def parallel():
    return problem(laplacian(folx.ParallelLaplacianOperator()))


@model("folx: local energies of an oscillator")
def local_energy():
    """The variance of a harmonic oscillator's local energy, which is 0 at an eigenstate."""
    network = eqx.nn.MLP(SIZE, "scalar", 8, 1, jnp.tanh, key=jax.random.key(0))
    params, static = eqx.partition(network, eqx.is_inexact_array)

    def loss_fn(params, x):
        network = eqx.combine(params, static)

        def energy(x):
            kinetic, gradient = folx.ForwardLaplacianOperator(0)(network)(x)
            return -(jnp.sum(kinetic) + gradient @ gradient) / 2 + x @ x / 2

        energies = jax.vmap(energy)(x)
        return jnp.var(energies)

    return Problem(loss_fn, params, (normal(BATCH, SIZE),))
