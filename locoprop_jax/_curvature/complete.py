"""Complete optimizers of a direction and Gauss-Newton steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from locoprop_jax._curvature.gauss_newton import scale_by_gauss_newton_step
from locoprop_jax._curvature.quadratic import Tree


class Steps(NamedTuple):
    """How a complete optimizer goes along its directions.

    Attributes:
      damping: the first tau.
      adapt_damping: whether the direction's own damping gamma is adapted.
      momentum: whether the last update is a direction as well.
      l2: eta, of what is added to the loss.
      model_period: the steps from one measurement of the model's curvature to the next.
      halvings: of a step that makes the loss of its own batch rise, at most.
      is_judged: whether gamma is adapted as the next batch judges, and not by the model.
    """

    damping: float
    adapt_damping: bool
    momentum: bool
    l2: float
    model_period: int = 1
    halvings: int = 0
    is_judged: bool = False


def complete(
    direction: Callable[[Any], optax.GradientTransformation],
    damping: float,
    learning_rate: optax.ScalarOrSchedule,
    steps: Steps,
) -> optax.GradientTransformationExtraArgs:
    """Directions of a damping gamma with Gauss-Newton steps: a complete optimizer (Algorithm 1).

    Args:
      direction: of gamma, which may be traced.
      damping: the first gamma.
      learning_rate: multiplies the step of the model.
      steps: the rest.
    """
    step = scale_by_gauss_newton_step(
        direction if steps.adapt_damping else direction(damping),
        damping=steps.damping,
        inner_damping=damping,
        l2=steps.l2,
        momentum=steps.momentum,
        model_period=steps.model_period,
        halvings=steps.halvings,
        inner_damping_by="next" if steps.is_judged else "model",
        learning_rate=learning_rate,
    )
    return optax.chain(step, optax.scale(-1))


def descend(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Minus the updates times the learning rate, which may be of another dtype."""
    if callable(learning_rate):
        return optax.scale_by_learning_rate(learning_rate)

    def scale(updates: Tree, params: Tree = None) -> Tree:
        del params
        return jax.tree.map(lambda u: -jnp.asarray(learning_rate, u.dtype) * u, updates)

    return optax.stateless(scale)
