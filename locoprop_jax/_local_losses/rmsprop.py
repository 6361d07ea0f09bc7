"""The paper's RMSProp with heavy-ball momentum, without a scale of its own."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from locoprop_jax import _linalg

DECAY, MOMENTUM, EPS = 0.9, 0.9, 1e-12


class MeanSquareState(NamedTuple):
    """State of the average.

    Attributes:
      count: gradients so far. shape=(), dtype=int32
      total: the running sum of their squares.
    """

    count: Int[Array, ""]
    total: Any


def scale_free_rmsprop(learning_rate: Any) -> optax.GradientTransformation:
    """RMSProp whose average starts at the first gradient's own size instead of at one.

    It is `optax.rmsprop` with `bias_correction`, but without promotion of dtypes, which a user may
    have forbidden.

    Args:
      learning_rate: of each step.
    """
    return optax.chain(
        _scale_by_debiased_rms(),
        optax.scale_by_learning_rate(learning_rate),
        optax.trace(MOMENTUM),
    )


def _scale_by_debiased_rms() -> optax.GradientTransformation:
    def init(params: Any) -> MeanSquareState:
        return MeanSquareState(jnp.zeros([], jnp.int32), _linalg.zeros_like(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, MeanSquareState]:
        del params
        count = jnp.asarray(optax.safe_increment(state.count))
        total = _linalg.average(state.total, jax.tree.map(jnp.square, updates), DECAY)
        mean_square = _linalg.debiased(total, DECAY, count)
        scaled = jax.tree.map(lambda g, n: g * jax.lax.rsqrt(n + EPS), updates, mean_square)
        return scaled, MeanSquareState(count, total)

    return optax.GradientTransformation(init, update)
