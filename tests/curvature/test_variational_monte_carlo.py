"""Variational Monte Carlo: a loss whose gradient is that of an energy, of log psi in layers.

    mean of Re(conj(E_loc - E) log psi), weights and local energies held fixed

(NetKet, FermiNet). Here all states of a chain of three spins are summed, so energies are exact.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import locoprop_jax as lp
from tests.helpers import assert_captured, normal, quick_jit

STATES = jnp.asarray(np.array(np.meshgrid(*[[-1.0, 1.0]] * 3)).reshape(3, -1).T)
FLIPS = np.stack(
    [np.asarray(STATES) * (1 - 2 * np.eye(3)[i]) for i in range(3)]
)  # (site, state, spin)
PARAMS = {
    "hidden": {"kernel": 0.3 * normal(0, 3, 4), "bias": 0.1 * normal(1, 4)},
    "amplitude": {"kernel": 0.3 * normal(2, 4, 1)},
    "phase": {"kernel": 0.3 * normal(3, 4, 1)},
}


def hamiltonian():
    """The transverse Ising chain, a ring: -sum z_i z_(i+1) - sum x_i."""
    bonds = -(STATES * jnp.roll(STATES, 1, 1)).sum(1)
    matrix = np.diag(np.asarray(bonds))
    for flipped in FLIPS:
        for n, state in enumerate(flipped):
            matrix[n, int(np.argmax((np.asarray(STATES) == state).all(1)))] -= 1
    return matrix


def real_log_psi(p, x):
    h = jnp.tanh(x @ p["hidden"]["kernel"] + p["hidden"]["bias"][None])
    return (h @ p["amplitude"]["kernel"])[:, 0]


def complex_log_psi(p, x):
    h = jnp.tanh(x @ p["hidden"]["kernel"] + p["hidden"]["bias"][None])
    return jax.lax.complex((h @ p["amplitude"]["kernel"])[:, 0], (h @ p["phase"]["kernel"])[:, 0])


LOG_PSI = {"real": real_log_psi, "complex": complex_log_psi}


def surrogate(log_psi):
    """Its gradient is half of the energy's."""

    def loss_fn(p, x, flips):
        own = log_psi(p, x)
        weights = jax.lax.stop_gradient(jax.nn.softmax(2 * own.real))
        others = jnp.stack([log_psi(jax.lax.stop_gradient(p), flipped) for flipped in flips])
        diagonal = -(x * jnp.roll(x, 1, 1)).sum(1).astype(own.dtype)
        local = diagonal - jnp.exp(others - own[None]).sum(0)
        energy = (weights.astype(own.dtype) * local).sum()
        centred = jax.lax.stop_gradient(weights.astype(own.dtype) * (local - energy))
        return jnp.sum((jnp.conj(centred) * own).real), energy.real

    return loss_fn


def exact_energy(log_psi, p):
    psi = jnp.exp(log_psi(p, STATES))
    matrix = jnp.asarray(hamiltonian(), psi.dtype)
    return (jnp.conj(psi) @ matrix @ psi).real / jnp.sum(jnp.abs(psi) ** 2)


@pytest.mark.parametrize("kind", LOG_PSI)
def test_foof_lowers_the_energy_of_a_chain_of_spins(kind):
    log_psi, flips = LOG_PSI[kind], jnp.asarray(FLIPS)
    params = {k: v for k, v in PARAMS.items() if kind == "complex" or k != "phase"}
    loss_fn = surrogate(log_psi)
    layers, _ = assert_captured(lambda *args: loss_fn(*args)[0], params, STATES, flips)
    assert set(layers) == set(params)
    tx = lp.foof(layers)
    capture = lp.value_grad_and_capture(loss_fn, has_aux=True)

    @quick_jit
    def step(params, state):
        (_, energy), grads, captured = capture(params, STATES, flips)
        updates, state = tx.update(grads, state, params, captured=captured)
        return optax.apply_updates(params, updates), state, energy, grads

    _, _, energy, grads = step(params, tx.init(params))
    np.testing.assert_allclose(energy, exact_energy(log_psi, params), rtol=1e-10)
    expected = jax.grad(lambda p: exact_energy(log_psi, p) / 2)(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), grads, expected)

    state = tx.init(params)
    for _ in range(60):
        params, state, energy, _ = step(params, state)
    ground = np.linalg.eigvalsh(hamiltonian())[0]
    start = exact_energy(log_psi, {k: v for k, v in PARAMS.items() if k in params})
    assert ground - 1e-9 <= energy < ground + 0.3 * (start - ground)
