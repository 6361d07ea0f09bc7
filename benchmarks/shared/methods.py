"""The methods that the experiments compare: one entry of `METHODS` each."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import optax

import locoprop_jax as lp
from benchmarks.shared import paper

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

METRIC_SPACE: dict[str, LogUniform | Choice] = {"learning_rate": LogUniform(0.03, 300.0)}


class Method(NamedTuple):
    """How a method is built and what may be tuned.

    Attributes:
      label: its name in tables and plots.
      build: `build(layers, learning_rate, **hyperparameters)` gives the complete optimizer;
        `learning_rate` is a schedule. `layers` is None for a method without capture.
      space: the hyperparameters and where to search them.
      needs_capture: whether its step captures the layers' inputs and cotangents. A baseline must
        not pay for capture, and a method that needs it must.
      transferred: whether that capture holds the cotangents after the transfer functions too.
      curvature: which curvature it holds, None for none.
      schedule: (learning rate, steps) -> its schedule; None for a warm-up and a linear decay.
      options: the experiment's options, of the same name, that `build` takes as well.
      starts: where a search begins, after the values tuned so far: what a person would try.
    """

    label: str
    build: Callable[..., optax.GradientTransformationExtraArgs]
    space: SearchSpace
    needs_capture: bool = True
    transferred: bool = False
    curvature: str | None = None
    schedule: Callable[[float, int], optax.Schedule] | None = None
    options: tuple[str, ...] = ()
    starts: tuple[Hyperparameters, ...] = ()


def momentum(
    learning_rate: optax.ScalarOrSchedule, *, one_minus_beta1: float, nesterov: bool = False
) -> optax.GradientTransformationExtraArgs:
    """SGD with heavy-ball or Nesterov's momentum."""
    return optax.with_extra_args_support(
        optax.sgd(learning_rate, momentum=1 - one_minus_beta1, nesterov=nesterov)
    )


def adam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    one_minus_beta1: float,
    one_minus_beta2: float,
    eps: float,
) -> optax.GradientTransformationExtraArgs:
    return optax.with_extra_args_support(
        optax.adam(learning_rate, b1=1 - one_minus_beta1, b2=1 - one_minus_beta2, eps=eps)
    )


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


def _first_order(
    optimizer: Callable[..., Any],
    layers: None,
    learning_rate: optax.Schedule,
    **hyperparameters: float,
) -> optax.GradientTransformationExtraArgs:
    del layers
    return optax.with_extra_args_support(optimizer(learning_rate, **hyperparameters))


def _locoprop(
    constructor: Callable[..., optax.GradientTransformationExtraArgs],
    optimizer: Callable[..., Any],
    layers: Any,
    learning_rate: optax.Schedule,
    *,
    gamma: float,
    iterations: int,
    **hyperparameters: float,
) -> optax.GradientTransformationExtraArgs:
    if hyperparameters:  # plain SGD has none; the library knows it, and its shortcuts, by itself
        optimizer = functools.partial(optimizer, **hyperparameters)
    return constructor(
        layers, learning_rate, gamma=gamma, iterations=iterations, optimizer=optimizer
    )


def _exact(
    layers: Any, learning_rate: optax.Schedule, *, gamma: float
) -> optax.GradientTransformationExtraArgs:
    """LocoProp-S solved exactly; 1 / learning_rate is the damping."""
    local = lp.scale_by_local_loss(
        layers, learning_rate, gamma=gamma, regularizer=lp.l2(), solver=lp.exact()
    )
    return optax.chain(local, optax.scale(-1.0))


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
        functools.partial(_locoprop, paper.locoprop_m, tensorflow_rmsprop),
        LOCOPROP_SPACE,
        options=("iterations",),
        starts=LOCOPROP_STARTS,
    ),
    "locoprop_s": Method(
        "LocoProp-S",
        functools.partial(_locoprop, paper.locoprop_s, tensorflow_rmsprop),
        LOCOPROP_SPACE,
        options=("iterations",),
        starts=LOCOPROP_STARTS,
    ),
    "foof": Method("FOOF", paper.foof, METRIC_SPACE | {"damping": LogUniform(0.1, 100.0)}),
    "lnb": Method("LNB", paper.lnb, METRIC_SPACE | {"ridge": LogUniform(0.1, 100.0)}),
    "kfac": Method(
        "K-FAC",
        lp.kfac,
        {"learning_rate": LogUniform(0.1, 1.0), "damping": LogUniform(0.01, 100.0)},
        curvature="ggn_mc",
        schedule=lambda peak, steps: optax.constant_schedule(peak),
    ),
    "rmsprop": Method(
        "RMSProp",
        functools.partial(_first_order, tensorflow_rmsprop),
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
        functools.partial(_first_order, adam),
        FIRST_ORDER_SPACE,
        needs_capture=False,
        starts=(
            _values(2e-3, 0.1, 0.01, 1e-8),
            _values(1e-3, 0.1, 0.01, 1e-8),
            _values(2e-3, 0.1, 0.001, 1e-6),
        ),
    ),
}


def _baseline(label: str, optimizer: Callable[..., Any], *names: str) -> Method:
    build = functools.partial(_first_order, optimizer)
    return Method(label, build, _space("learning_rate", *names), needs_capture=False)


def _local(
    label: str,
    constructor: Callable[..., optax.GradientTransformationExtraArgs],
    optimizer: Callable[..., Any] = tensorflow_rmsprop,
    *names: str,
    transferred: bool = False,
) -> Method:
    """LocoProp or a relative, with this local optimizer and its hyperparameters."""
    return Method(
        label,
        functools.partial(_locoprop, constructor, optimizer),
        _space("gamma", "learning_rate", *names),
        transferred=transferred,
        options=("iterations",),
    )


def _space(*names: str) -> SearchSpace:
    """The paper's space without the hyperparameters that a method does not have."""
    return {name: LOCOPROP_SPACE[name] for name in names}


ADAPTIVE = ("one_minus_beta1", "one_minus_beta2", "eps")

# Those of the ablations, beside the ones above. No values of them are in tuned.json.
MORE_METHODS: Mapping[str, Method] = {
    "pocoprop_m": _local(
        "PocoProp-M", paper.pocoprop_m, tensorflow_rmsprop, *ADAPTIVE, transferred=True
    ),
    "pocoprop_s": _local(
        "PocoProp-S", paper.pocoprop_s, tensorflow_rmsprop, *ADAPTIVE, transferred=True
    ),
    "locoprop_m_sgd": _local("LocoProp-M", paper.locoprop_m, optax.sgd),
    "locoprop_m_momentum": _local("LocoProp-M", paper.locoprop_m, momentum, "one_minus_beta1"),
    "locoprop_m_adam": _local("LocoProp-M", paper.locoprop_m, adam, *ADAPTIVE),
    "locoprop_s_exact": Method("LocoProp-S, exact", _exact, _space("gamma", "learning_rate")),
    "sgd": _baseline("SGD", optax.sgd),
    "momentum": _baseline("Momentum", momentum, "one_minus_beta1"),
    "nesterov": _baseline(
        "Nesterov", functools.partial(momentum, nesterov=True), "one_minus_beta1"
    ),
    "adagrad": _baseline("AdaGrad", optax.adagrad, "eps"),
}

ALL_METHODS: Mapping[str, Method] = {**METHODS, **MORE_METHODS}
