"""e3nn-jax: networks that turn with their inputs, and forces as derivatives of energies."""

import e3nn_jax as e3nn
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tests.outside.registry import Problem, floats, model, normal, squared_error

BATCH, ATOMS = 4, 3
PAIRS = np.array([(i, j) for i in range(ATOMS) for j in range(ATOMS) if i != j]).T


class Potential(nn.Module):
    """Two rounds of messages between all atoms; an energy."""

    @nn.compact
    def __call__(self, positions):
        senders, receivers = PAIRS
        vectors = e3nn.IrrepsArray("1o", positions[receivers] - positions[senders])
        directions = e3nn.spherical_harmonics("0e + 1o", vectors, True)
        lengths = jnp.linalg.norm(vectors.array, axis=-1, keepdims=True)
        radial = e3nn.bessel(lengths[:, 0], 4, 5.0)
        atoms = e3nn.IrrepsArray("0e", jnp.ones((ATOMS, 1), positions.dtype))
        for _ in range(2):
            messages = e3nn.tensor_product(atoms[senders], directions, filter_ir_out=["0e", "1o"])
            mixed = e3nn.flax.MultiLayerPerceptron((8, messages.irreps.num_irreps), jax.nn.silu)
            messages = messages * mixed(radial)
            summed = e3nn.scatter_sum(messages, dst=receivers, output_size=ATOMS)
            atoms = e3nn.gate(e3nn.flax.Linear("4x0e + 2x0e + 2x1o")(summed))
        return jnp.sum(e3nn.flax.Linear("0e")(atoms).array)


def problem(loss) -> Problem:
    module = Potential()
    positions = normal(BATCH, ATOMS, 3)
    params = floats(module.init(jax.random.key(0), positions[0]))

    def loss_fn(params, *batch):
        return loss(lambda positions: module.apply(params, positions), *batch)

    batch = positions, normal(BATCH, seed=1), normal(BATCH, ATOMS, 3, seed=2)
    return Problem(loss_fn, params, batch)


@model("e3nn: energies")
def energies():
    return problem(lambda energy, x, energies, _: squared_error(jax.vmap(energy)(x), energies))


@model("e3nn: energies and forces")
def forces():
    def loss(energy, positions, energies, forces):
        found, slopes = jax.vmap(jax.value_and_grad(energy))(positions)
        return squared_error(found, energies) + squared_error(-slopes, forces)

    return problem(loss)
