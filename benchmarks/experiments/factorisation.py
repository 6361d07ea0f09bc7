"""A matrix factorisation as badly conditioned as one likes, and its Gauss-Newton direction."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.sparse.linalg import cg
from jaxtyping import Array, Float

from benchmarks.shared.autoencoder import narrower
from benchmarks.shared.data import Dataset
from benchmarks.shared.steps import Params
from benchmarks.shared.training import Problem


def factorisation(
    dataset: Dataset, shrink: int, *, condition: float = 1e5, samples: int = 1000
) -> Problem:
    """Fit y = A x with two linear layers (Recht, 2017; LNB, section 5.1); the images play no part.

    The rows of A grow from 1 to its condition number. The loss is in units of the mean squared
    length of y.
    """
    del dataset
    width, outputs = narrower((60, 100), shrink)
    rng = np.random.default_rng(0)
    a = np.linspace(1, condition, outputs)[:, None] * rng.normal(size=(outputs, width)) / condition
    x = rng.normal(size=(samples, width)).astype(np.float32)
    y = (x @ a.T).astype(np.float32)
    unit = float(np.mean(np.sum(y**2, 1)))

    def init(key: Array) -> Params:
        first, second = jax.random.split(key)
        scale = width**-0.5
        return {
            "first": {"kernel": scale * jax.random.normal(first, (width, width))},
            "second": {"kernel": scale * jax.random.normal(second, (width, outputs))},
        }

    def loss_fn(params: Params, batch: Mapping[str, Array]) -> Float[Array, ""]:
        return squared_error(factors(params, batch["x"]), batch["y"]) / unit

    return Problem("factorisation", init, loss_fn, {"x": x, "y": y}, None)


def factors(params: Params, x: Float[Array, "rows d_in"]) -> Float[Array, "rows d_out"]:
    return x @ params["first"]["kernel"] @ params["second"]["kernel"]


def squared_error(
    outputs: Float[Array, "rows d_out"], y: Float[Array, "rows d_out"]
) -> Float[Array, ""]:
    return jnp.square(outputs - y).sum(-1).mean()


def gauss_newton(
    learning_rate: optax.ScalarOrSchedule, *, problem: Problem, iterations: int = 100
) -> optax.GradientTransformation:
    """The Gauss-Newton direction of the factorisation, by conjugate gradient on all its data."""
    x, y = (jnp.asarray(problem.train[name]) for name in "xy")
    unit = squared_error(jnp.zeros_like(y), y)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        outputs, forward = jax.linearize(lambda p: factors(p, x), params)
        backward = jax.linear_transpose(forward, params)
        curvature = jax.grad(lambda outputs: squared_error(outputs, y) / unit)

        def product(v: Any) -> Any:
            image = jax.jvp(curvature, (outputs,), (forward(v),))[1]
            return jax.tree.map(lambda a, b: a + 1e-8 * b, backward(image)[0], v)

        return cg(product, updates, maxiter=iterations)[0], state

    direction = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    return optax.chain(direction, optax.scale_by_learning_rate(learning_rate))
