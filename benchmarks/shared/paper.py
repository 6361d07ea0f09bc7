"""The methods with their papers' parameters, which the experiments are written in.

A learning rate of `foof` and `lnb` is here the squared length eps of one step for all layers
together; `gamma` and learning rates of local losses are absolute.
"""

import functools
from typing import Any

import jax.numpy as jnp
import optax

import locoprop_jax as lp


def root(eps: optax.ScalarOrSchedule) -> optax.ScalarOrSchedule:
    if callable(eps):
        return lambda count: jnp.sqrt(eps(count))
    return jnp.sqrt(eps)


def foof(
    layers: lp.Layers,
    learning_rate: optax.ScalarOrSchedule = 4.0,
    *,
    damping: Any = 10.0,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """FOOF with the step of Linear Neuron Boosting."""
    return lp.foof(layers, root(learning_rate), damping=damping, unit="joint", **options)


def lnb(
    layers: lp.Layers,
    learning_rate: optax.ScalarOrSchedule = 4.0,
    *,
    ridge: Any = 10.0,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Linear Neuron Boosting (Algorithms 1 and 2)."""
    return lp.lnb(layers, root(learning_rate), ridge=ridge, unit="joint", **options)


_ABSOLUTE: dict[str, Any] = {"gamma": 100.0, "relative": False}
locoprop_s = functools.partial(lp.locoprop_s, **_ABSOLUTE)
locoprop_m = functools.partial(lp.locoprop_m, **_ABSOLUTE)
pocoprop_s = functools.partial(lp.pocoprop_s, **_ABSOLUTE)
pocoprop_m = functools.partial(lp.pocoprop_m, **_ABSOLUTE)
