"""NetKet's wave functions, fitted to the amplitudes of a random state.

Variational energies weight the same derivatives by local energies, which are data; here the weights
come from a loss with a minimum, so that thirty steps can be seen to lower it.
"""

import jax
import jax.numpy as jnp
import netket as nk
import numpy as np

from tests.outside.registry import Problem, floats, model, normal

SITES, BATCH = 6, 8


def spins() -> jax.Array:
    draw = np.random.default_rng(0).integers(0, 2, (BATCH, SITES))
    return jnp.asarray(2 * draw - 1, jnp.result_type(float))


def problem(module, target=None, x=None) -> Problem:
    """|log psi - target|^2; state (the cache of autoregressive networks) stays as it is."""
    x = spins() if x is None else x
    variables = module.init(jax.random.key(0), x)
    state = {name: values for name, values in variables.items() if name != "params"}

    def loss_fn(params, x, y):
        return jnp.mean(jnp.abs(module.apply({"params": params, **state}, x) - y) ** 2)

    target = normal(BATCH, seed=1) if target is None else target
    return Problem(loss_fn, floats(variables["params"]), (x, target))


def dtype():
    return jnp.result_type(float)


@model("netket: RBM")
def rbm():
    return problem(nk.models.RBM(alpha=2, param_dtype=dtype()))


@model("netket: RBM, modulus and phase")
def rbm_modulus_phase():
    phase = 1j * normal(BATCH, seed=2)
    return problem(nk.models.RBMModPhase(param_dtype=dtype()), normal(BATCH, seed=1) + phase)


@model("netket: RBM, complex parameters")
def rbm_complex():
    phase = 1j * normal(BATCH, seed=2)
    module = nk.models.RBM(param_dtype=jnp.result_type(complex))
    return problem(module, normal(BATCH, seed=1) + phase)


@model("netket: symmetric RBM")
def rbm_symmetric():
    group = nk.graph.Chain(SITES).translation_group()
    return problem(nk.models.RBMSymm(symmetries=group, alpha=2, param_dtype=dtype()))


@model("netket: Jastrow")
def jastrow():
    return problem(nk.models.Jastrow(param_dtype=dtype()))


@model("netket: ARNN, dense")
def arnn_dense():
    hilbert = nk.hilbert.Spin(0.5, SITES)
    return problem(nk.models.ARNNDense(hilbert, layers=2, features=4, param_dtype=dtype()))


@model("netket: ARNN, convolutions")
def arnn_convolutions():
    hilbert = nk.hilbert.Spin(0.5, SITES)
    sizes = {"layers": 2, "features": 4, "kernel_size": 3}
    return problem(nk.models.ARNNConv1D(hilbert, **sizes, param_dtype=dtype()))


def gcnn(mode: str) -> Problem:
    return problem(
        nk.models.GCNN(
            symmetries=nk.graph.Chain(SITES),
            mode=mode,
            layers=2,
            features=3,
            param_dtype=dtype(),
            complex_output=False,
        )
    )


@model("netket: GCNN, irreducible representations")
def gcnn_irreps():
    return gcnn("irreps")


@model("netket: GCNN, Fourier transforms")
def gcnn_fft():
    return gcnn("fft")


@model("netket: deep set")
def deep_set():
    sizes = {"features_phi": (5,), "features_rho": (5,)}
    module = nk.models.DeepSetMLP(**sizes, param_dtype=dtype())
    return problem(module, x=normal(BATCH, SITES, 2))  # particles in two dimensions


@model("netket: MLP")
def mlp():
    return problem(nk.models.MLP(hidden_dims=(8, 6), param_dtype=dtype()))


@model("netket: Gaussian")
def gaussian():
    return problem(nk.models.Gaussian(param_dtype=dtype()))
