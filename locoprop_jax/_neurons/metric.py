"""The metric step: a direction made as long as its own metric says."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from locoprop_jax import _linalg
from locoprop_jax._checks import (
    check_decay,
    check_not_negative,
    check_positive,
    check_state,
    is_number,
)
from locoprop_jax._trees import ascent


def scale_by_metric_norm(
    inner: optax.GradientTransformation, *, floor: float = 1e-4
) -> optax.GradientTransformationExtraArgs:
    """Scale a direction d = M^-1 g to length one in its metric: d / sqrt(max(z, floor)), z = d'g.

    The length is that of all parameters together. Followed by a learning rate of sqrt(eps) it is
    the step of size eps that Linear Neuron Boosting takes (eq. 1, Algorithms 1 and 2), for any
    method here that solves its system exactly. However stale the statistics behind M, its damping
    bounds such a step. An average of gradients has to come before it, so that d is solved for the
    same g.

    Args:
      inner: what makes d of g: `scale_by_foof(...)`.
      floor: z below which the step shrinks with the gradient instead of keeping its length.

    Returns:
      A transformation with the state and the extra arguments of `inner`. Where d does not descend
      (z <= 0) its update is zero.

    Raises:
      ValueError: the floor is not positive.

    References:
      Linear Neuron Boosting, sections 2.2 and 3.2.
    """
    check_positive(floor=floor)
    with_extra_args = optax.with_extra_args_support(inner)

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, optax.OptState]:
        direction, state = with_extra_args.update(updates, state, params, **extra_args)
        z = _linalg.dot_for_many(_linalg.wide(direction), _linalg.wide(ascent(updates)))
        factor = metric_factor(z, floor)
        return jax.tree.map(lambda d: scaled(d, factor), direction), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def metric_factor(z: Float[Array, ""], floor: float | Array) -> Float[Array, ""]:
    """What makes a direction of squared length z as long as one, or shorter below the floor.

    Zero for a direction that does not descend, or is too long to be measured.
    """
    length = jnp.sqrt(jnp.maximum(z, jnp.asarray(floor, z.dtype)))
    return jnp.where(jnp.isfinite(z) & (z > 0), 1 / length, 0)


def scaled(direction: Array, factor: Float[Array, ""]) -> Array:
    """Times the factor; zeros for zero, whatever the direction."""
    product = direction * factor.astype(direction.dtype)
    return jnp.where(factor > 0, product, jnp.zeros_like(product))


def descend(
    learning_rate: optax.ScalarOrSchedule, weight_decay: float
) -> optax.GradientTransformation:
    """-eta (d + rho W) for directions d, with the learning rate or its schedule eta."""
    check_not_negative(weight_decay=weight_decay)
    if not callable(learning_rate):
        check_not_negative(learning_rate=learning_rate)

    def init(params: Any) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(jnp.zeros([], jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        eta = learning_rate(state.count) if callable(learning_rate) else learning_rate
        if not is_number(weight_decay) or weight_decay > 0:
            if params is None:
                raise ValueError(
                    "Weight decay needs the parameters: call "
                    "`tx.update(grads, opt_state, params, captured=captured)`."
                )
            updates = jax.tree.map(
                lambda u, p: u + jnp.asarray(weight_decay, u.dtype) * p, updates, params
            )
        steps = jax.tree.map(lambda u: -jnp.asarray(eta, u.dtype) * u, updates)
        return steps, optax.ScaleByScheduleState(jnp.asarray(optax.safe_increment(state.count)))

    return optax.GradientTransformation(init, update)


class AverageState(NamedTuple):
    """State of `average_gradients`.

    Attributes:
      count: gradients so far. shape=(), dtype=int32
      sum: the running sum, like the parameters, in float32 at least.
    """

    count: Int[Array, ""]
    sum: Any


def average_gradients(decay: float) -> optax.GradientTransformation:
    """The debiased moving average of gradients.

    One that is not finite passes as it is and is forgotten, so that what follows can refuse it.
    """
    check_decay(momentum=decay)

    def init(params: Any) -> AverageState:
        return AverageState(jnp.zeros([], jnp.int32), _linalg.zeros_like(_linalg.wide(params)))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, AverageState]:
        del params
        check_state("average_gradients", state, jax.eval_shape(init, updates))
        gradients = _linalg.wide(updates)
        finite = _linalg.all_finite(gradients)
        count = state.count + finite.astype(jnp.int32)
        new = _linalg.average(state.sum, gradients, decay)
        averages = _linalg.debiased(new, decay, count)
        passed = jax.tree.map(
            lambda u, g, x: jnp.where(finite, x, g).astype(u.dtype), updates, gradients, averages
        )
        return passed, AverageState(count, _linalg.where(finite, new, state.sum))

    return optax.GradientTransformation(init, update)
