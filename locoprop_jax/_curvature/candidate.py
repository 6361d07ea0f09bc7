"""A step that may be taken along some directions, and what becomes of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from locoprop_jax import _linalg
from locoprop_jax._curvature.quadratic import (
    Carried,
    Scalar,
    Tree,
    ValueFn,
    share_without_rise,
)


class Candidate(NamedTuple):
    """A step that may be taken.

    Attributes:
      directions: what it is made of.
      inner: the state of the first direction.
      damping: tau.
      steps: how much of each direction is in it.
      change: of the model by the step; not positive.
      fall: the part of it that is linear in the step, with its sign turned.
      length: of the step in the metric of the outputs.
      carried: what its model says of the next steps'.
    """

    directions: list[Tree]
    inner: Any
    damping: Scalar
    steps: Float[Array, " k"]
    change: Scalar
    fall: Scalar
    length: Scalar
    carried: Carried


def combined(directions: list[Tree], steps: Float[Array, " k"]) -> Tree:
    scaled = [_linalg.scale(d, step) for d, step in zip(directions, steps, strict=True)]
    total = scaled[0]
    for other in scaled[1:]:
        total = _linalg.add(total, other)
    return total


def halved(
    best: Candidate, value_fn: ValueFn, value: Any, params: Tree, l2: Any, halvings: int
) -> Candidate:
    """With the share of its step with which the loss of its own batch does not rise."""
    dtype = best.change.dtype
    whole = _linalg.wide(combined(best.directions, best.steps))
    share = share_without_rise(value_fn, value, params, whole, l2, halvings, dtype)
    return best._replace(
        steps=best.steps * share.astype(best.steps.dtype),
        change=jnp.square(share) * (best.change + best.fall) - share * best.fall,
        carried=best.carried._replace(square=jnp.square(share) * best.carried.square),
    )


def judged_damping(gamma: Scalar, most: Any, ratio: Scalar, before: Scalar) -> Scalar:
    """A tenth after two promises kept, a hundred times as much after one that was not.

    Of a small batch one may be kept by chance.
    """
    least = float(jnp.finfo(gamma.dtype).eps) ** 0.5  # less is lost in rounding
    less = jnp.maximum(gamma / 10, jnp.minimum(least, gamma))
    more = jnp.minimum(100 * gamma, jnp.asarray(most, gamma.dtype))
    return jnp.where(jnp.minimum(ratio, before) > 0.75, less, jnp.where(ratio < 0.25, more, gamma))
