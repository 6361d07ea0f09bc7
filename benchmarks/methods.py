"""The methods that the experiments compare: one entry of `METHODS` each."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import optax

import locoprop_jax as lp

Hyperparameters = Mapping[str, float]


class LogUniform(NamedTuple):
    low: float
    high: float


class Choice(NamedTuple):
    values: tuple[float, ...]


SearchSpace = Mapping[str, LogUniform | Choice]

# The paper's names beta1 and beta2 are what Optax calls momentum and decay (RMSProp), b1 and b2
# (Adam). They are kept as one minus themselves, because that is what is searched on a log scale.
FIRST_ORDER_SPACE: SearchSpace = {  # locoprop, Table 3
    "learning_rate": LogUniform(1e-7, 0.1),
    "one_minus_beta1": LogUniform(1e-3, 0.1),
    "one_minus_beta2": LogUniform(1e-3, 0.1),
    "eps": LogUniform(1e-10, 1e-5),
}
LOCOPROP_SPACE: SearchSpace = {  # locoprop, Table 5
    "gamma": Choice((10.0, 100.0, 500.0, 1000.0, 2000.0, 3000.0, 5000.0)),
    **FIRST_ORDER_SPACE,
}


class Method(NamedTuple):
    """How a method is built and what may be tuned.

    Attributes:
      label: its name in tables and plots.
      build: `build(layers, learning_rate, **hyperparameters)` gives the complete optimizer;
        `learning_rate` is a schedule. `layers` is None for a method without capture.
      space: the hyperparameters and where to search them.
      needs_capture: whether its step captures the layers' inputs and cotangents. A baseline must
        not pay for capture, and a method that needs it must.
      options: the experiment's options, of the same name, that `build` takes as well.
      starts: where a search begins, after the values tuned so far: what a person would try.
    """

    label: str
    build: Callable[..., optax.GradientTransformationExtraArgs]
    space: SearchSpace
    needs_capture: bool = True
    options: tuple[str, ...] = ()
    starts: tuple[Hyperparameters, ...] = ()


def tensorflow_rmsprop(
    learning_rate: optax.ScalarOrSchedule,
    *,
    one_minus_beta1: float,
    one_minus_beta2: float,
    eps: float,
) -> optax.GradientTransformationExtraArgs:
    """RMSProp with momentum as TensorFlow, and so the paper, has it."""
    return optax.with_extra_args_support(
        optax.rmsprop(
            learning_rate,
            decay=1 - one_minus_beta2,
            eps=eps,
            eps_in_sqrt=True,
            initial_scale=1.0,
            momentum=1 - one_minus_beta1,
        )
    )


def _rmsprop(
    layers: None, learning_rate: optax.Schedule, **hyperparameters: float
) -> optax.GradientTransformationExtraArgs:
    del layers
    return tensorflow_rmsprop(learning_rate, **hyperparameters)


def _adam(
    layers: None,
    learning_rate: optax.Schedule,
    *,
    one_minus_beta1: float,
    one_minus_beta2: float,
    eps: float,
) -> optax.GradientTransformationExtraArgs:
    del layers
    return optax.with_extra_args_support(
        optax.adam(learning_rate, b1=1 - one_minus_beta1, b2=1 - one_minus_beta2, eps=eps)
    )


def _locoprop(
    constructor: Callable[..., optax.GradientTransformationExtraArgs],
    layers: Any,
    learning_rate: optax.Schedule,
    *,
    gamma: float,
    iterations: int,
    **rmsprop_hyperparameters: float,
) -> optax.GradientTransformationExtraArgs:
    return constructor(
        layers,
        learning_rate,
        gamma=gamma,
        iterations=iterations,
        optimizer=functools.partial(tensorflow_rmsprop, **rmsprop_hyperparameters),
    )


def _values(
    learning_rate: float,
    one_minus_beta1: float,
    one_minus_beta2: float,
    eps: float,
    **others: float,
) -> Hyperparameters:
    return {
        "learning_rate": learning_rate,
        "one_minus_beta1": one_minus_beta1,
        "one_minus_beta2": one_minus_beta2,
        "eps": eps,
        **others,
    }


LOCOPROP_STARTS = (
    _values(4e-5, 0.0015, 0.1, 1e-7, gamma=100.0),
    _values(1e-4, 0.1, 0.1, 1e-8, gamma=100.0),
    _values(2e-4, 0.1, 0.1, 1e-8, gamma=500.0),
)

METHODS: Mapping[str, Method] = {
    "locoprop_m": Method(
        "LocoProp-M",
        functools.partial(_locoprop, lp.locoprop_m),
        LOCOPROP_SPACE,
        options=("iterations",),
        starts=LOCOPROP_STARTS,
    ),
    "locoprop_s": Method(
        "LocoProp-S",
        functools.partial(_locoprop, lp.locoprop_s),
        LOCOPROP_SPACE,
        options=("iterations",),
        starts=LOCOPROP_STARTS,
    ),
    "rmsprop": Method(
        "RMSProp",
        _rmsprop,
        FIRST_ORDER_SPACE,
        needs_capture=False,
        starts=(
            _values(1e-4, 0.1, 0.1, 1e-6),
            _values(3e-4, 0.1, 0.02, 1e-6),
            _values(6e-4, 0.1, 0.1, 1e-8),
        ),
    ),
    "adam": Method(
        "Adam",
        _adam,
        FIRST_ORDER_SPACE,
        needs_capture=False,
        starts=(
            _values(2e-3, 0.1, 0.01, 1e-8),
            _values(1e-3, 0.1, 0.01, 1e-8),
            _values(2e-3, 0.1, 0.001, 1e-6),
        ),
    ),
}
