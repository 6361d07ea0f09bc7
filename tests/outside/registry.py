"""The list of outside models, and what they are trained on.

Each module of `tests/outside/models` has the models of one package. A model is made of what its
package ships, at sizes that compile quickly, in JAX's default precision.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class Problem(NamedTuple):
    """A loss `loss_fn(params, *batch)` with its parameters and one batch."""

    loss_fn: Callable[..., jax.Array]
    params: Any
    batch: tuple


# "package: model" -> what makes its problem
MODELS: dict[str, Callable[[], Problem]] = {}


def model(name: str) -> Callable[[Callable[[], Problem]], Callable[[], Problem]]:
    """Add a model under "package: model"."""

    def add(build: Callable[[], Problem]) -> Callable[[], Problem]:
        if name in MODELS:
            raise ValueError(f"there are two models of the name {name!r}")
        MODELS[name] = build
        return build

    return add


def floats(tree: Any) -> Any:
    """A tree whose real and complex arrays are in JAX's default precision."""

    def cast(leaf: Any) -> Any:
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            return jnp.asarray(leaf, jnp.result_type(complex))
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(leaf, jnp.result_type(float))
        return leaf

    return jax.tree.map(cast, tree)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.result_type(float))


def integers(below: int, *shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, below, shape), jnp.int32)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.mean((outputs - targets) ** 2)
