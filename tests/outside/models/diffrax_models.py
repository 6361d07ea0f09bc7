"""Diffrax: neural differential equations of Equinox's networks."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp

from tests.outside.registry import Problem, model, normal, squared_error

BATCH, SIZE, LENGTH = 5, 2, 6
TIMES = tuple(i / 5 for i in range(LENGTH))


class Field(eqx.Module):
    mlp: eqx.nn.MLP

    def __call__(self, t, y, args):
        return self.mlp(y)


def partition(network):
    return eqx.partition(network, eqx.is_inexact_array)


def neural_ode(adjoint, controller=None, solver=None) -> Problem:
    """The package's example: a trajectory from its start."""
    network = Field(eqx.nn.MLP(SIZE, SIZE, 8, 2, jax.nn.softplus, key=jax.random.key(0)))
    params, static = partition(network)

    def solve(network, start):
        times = jnp.asarray(TIMES, start.dtype)
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(network),
            solver or diffrax.Tsit5(),
            t0=times[0],
            t1=times[-1],
            dt0=0.1,
            y0=start,
            saveat=diffrax.SaveAt(ts=times),
            stepsize_controller=controller or diffrax.ConstantStepSize(),
            adjoint=adjoint,
            max_steps=16,
        )
        return solution.ys

    def loss_fn(params, start, path):
        network = eqx.combine(params, static)
        return squared_error(jax.vmap(solve, (None, 0))(network, start), path)

    start, path = normal(BATCH, SIZE), normal(BATCH, LENGTH, SIZE, seed=1)
    return Problem(loss_fn, params, (start, path))


@model("diffrax: neural ODE, RecursiveCheckpointAdjoint")
def recursive_checkpoint():
    return neural_ode(diffrax.RecursiveCheckpointAdjoint())


@model("diffrax: neural ODE, DirectAdjoint")
def direct():
    return neural_ode(diffrax.DirectAdjoint())


@model("diffrax: neural ODE, DirectAdjoint, adaptive steps")
def direct_adaptive():
    return neural_ode(diffrax.DirectAdjoint(), diffrax.PIDController(rtol=1e-2, atol=1e-3))


@model("diffrax: neural ODE, BacksolveAdjoint")
def backsolve():
    return neural_ode(diffrax.BacksolveAdjoint())


class ControlledField(eqx.Module):
    mlp: eqx.nn.MLP

    def __call__(self, t, y, args):
        return self.mlp(y).reshape(4, 3)


class Controlled(eqx.Module):
    start: eqx.nn.MLP
    field: ControlledField
    last: eqx.nn.Linear

    def __call__(self, times, coefficients):
        control = diffrax.CubicInterpolation(times, coefficients)
        solution = diffrax.diffeqsolve(
            diffrax.ControlTerm(self.field, control).to_ode(),
            diffrax.Heun(),
            t0=times[0],
            t1=times[-1],
            dt0=0.2,
            y0=self.start(control.evaluate(times[0])),
            adjoint=diffrax.DirectAdjoint(),
            max_steps=8,
        )
        return self.last(solution.ys[-1])[0]


@model("diffrax: neural controlled differential equation, DirectAdjoint")
def controlled():
    """The package's example: spirals told apart by their paths."""
    k = jax.random.split(jax.random.key(0), 3)
    network = Controlled(
        eqx.nn.MLP(3, 4, 8, 1, key=k[0]),
        ControlledField(eqx.nn.MLP(4, 12, 8, 1, final_activation=jnp.tanh, key=k[1])),
        eqx.nn.Linear(4, 1, key=k[2]),
    )
    params, static = partition(network)
    times = jnp.broadcast_to(jnp.asarray(TIMES, jnp.result_type(float)), (BATCH, LENGTH))
    path = jnp.concatenate([times[..., None], normal(BATCH, LENGTH, 2)], -1)

    def loss_fn(params, times, path, labels):
        network = eqx.combine(params, static)
        coefficients = jax.vmap(diffrax.backward_hermite_coefficients)(times, path)
        logits = jax.vmap(network)(times, coefficients)
        return jnp.mean(jax.nn.softplus(logits) - labels * logits)

    labels = (normal(BATCH, seed=2) > 0).astype(times.dtype)
    return Problem(loss_fn, params, (times, path, labels))


@model("diffrax: neural SDE, DirectAdjoint")
def stochastic():
    """A drift and a diffusion; one path of noise for each example."""
    k = jax.random.split(jax.random.key(0), 2)
    drift = eqx.nn.MLP(SIZE, SIZE, 8, 1, key=k[0])
    diffusion = eqx.nn.MLP(SIZE, SIZE, 8, 1, final_activation=jax.nn.softplus, key=k[1])
    params, static = partition((drift, diffusion))

    def solve(networks, start, key):
        drift, diffusion = networks
        noise = diffrax.VirtualBrownianTree(0.0, 1.0, tol=0.1, shape=(SIZE,), key=key)
        noise_term = diffrax.ControlTerm(lambda t, y, args: jnp.diag(diffusion(y)), noise)
        solution = diffrax.diffeqsolve(
            diffrax.MultiTerm(diffrax.ODETerm(lambda t, y, args: drift(y)), noise_term),
            diffrax.Euler(),
            t0=0.0,
            t1=1.0,
            dt0=0.25,
            y0=start,
            adjoint=diffrax.DirectAdjoint(),
            max_steps=6,
        )
        return solution.ys[-1]

    def loss_fn(params, start, end):
        keys = jax.random.split(jax.random.key(1), len(start))
        networks = eqx.combine(params, static)
        return squared_error(jax.vmap(solve, (None, 0, 0))(networks, start, keys), end)

    return Problem(loss_fn, params, (normal(BATCH, SIZE), normal(BATCH, SIZE, seed=1)))
