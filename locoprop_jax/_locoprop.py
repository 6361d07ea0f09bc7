"""LocoProp-S and LocoProp-M: named points of the local-loss framework."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import optax

from locoprop_jax._layers import Layers
from locoprop_jax._local_loss import inner, l2, scale_by_local_loss

# TensorFlow's RMSProp with heavy-ball momentum, the optimizer of the paper's experiments.
RMSPROP = functools.partial(
    optax.rmsprop,
    decay=0.9,
    eps=1e-6,
    initial_scale=1.0,
    eps_in_sqrt=True,
    momentum=0.9,
)


def locoprop_s(
    layers: Layers,
    learning_rate: optax.ScalarOrSchedule,
    *,
    gamma: float = 100.0,
    iterations: int = 10,
    optimizer: Callable[[Any], optax.GradientTransformation] = RMSPROP,
    l2_weight: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """LocoProp with local squared losses (LocoProp, eq. 3, Algorithm 1).

    Each layer moves its outputs towards a gradient step on them, A - gamma E, by `iterations`
    steps of `optimizer` on 1/2 |X W~ - (A - gamma E)|^2. Works with any transfer function.

    Args:
      layers: from `find_layers`.
      learning_rate: eta of the local iterations, a number or a schedule.
      gamma: the activation step size, constant. The loss's cotangents carry 1/B for a mean over a
        batch of B; the paper's choices for B = 1000 are 10 to 5000.
      iterations: T, how many local steps are taken for each batch.
      optimizer: the local optimizer's constructor, called with the learning rate of each step.
      l2_weight: of 1/2 |W~ - W|^2; left out if None, as in the paper's Algorithms.

    Returns:
      A complete optimizer. Its `update` needs `captured`, from `value_grad_and_capture`.

    Raises:
      ValueError, TypeError: as `scale_by_local_loss`.
    """
    return _locoprop("squared", layers, learning_rate, gamma, iterations, optimizer, l2_weight)


def locoprop_m(
    layers: Layers,
    learning_rate: optax.ScalarOrSchedule,
    *,
    gamma: float = 100.0,
    iterations: int = 10,
    optimizer: Callable[[Any], optax.GradientTransformation] = RMSPROP,
    l2_weight: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """LocoProp with local matching losses (LocoProp, eq. 7, Algorithm 2).

    Each layer moves f(outputs) towards a mirror-descent step on them, f(A) - gamma E, by
    `iterations` steps of `optimizer` on the matching loss of its transfer function f; at an output
    layer on the loss itself. Needs non-decreasing transfer functions.

    Args:
      layers: from `find_layers`.
      learning_rate: eta of the local iterations, a number or a schedule.
      gamma: the activation step size, constant. The loss's cotangents carry 1/B for a mean over a
        batch of B; the paper's choices for B = 1000 are 10 to 5000.
      iterations: T, how many local steps are taken for each batch.
      optimizer: the local optimizer's constructor, called with the learning rate of each step.
      l2_weight: of 1/2 |W~ - W|^2; left out if None, as in the paper's Algorithms.

    Returns:
      A complete optimizer. Its `update` needs `captured`, from `value_grad_and_capture`.

    Raises:
      ValueError, TypeError: as `scale_by_local_loss`.
    """
    return _locoprop("matching", layers, learning_rate, gamma, iterations, optimizer, l2_weight)


def _locoprop(
    divergence: str,
    layers: Layers,
    learning_rate: optax.ScalarOrSchedule,
    gamma: float,
    iterations: int,
    optimizer: Callable[[Any], optax.GradientTransformation],
    l2_weight: float | None,
) -> optax.GradientTransformationExtraArgs:
    return optax.chain(
        scale_by_local_loss(
            layers,
            learning_rate,
            gamma=gamma,
            divergence=divergence,
            regularizer=None if l2_weight is None else l2(l2_weight),
            solver=inner(optimizer, iterations),
        ),
        optax.scale(-1.0),
    )
