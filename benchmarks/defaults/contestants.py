"""Who is compared: Optax's optimizers, tuned over a grid, and the library's methods as they come.

The rivals are given the best setting of their grid; our methods get no argument but the learning
rate, which is their default times the schedule. Everybody's learning rate has the same shape, a
linear warm-up over the first 5% of the steps, then a cosine to zero, but for the two that make do
without: Schedule-Free stays at its peak, and K-FAC's steps have the length of its model.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float
from optax import contrib

import locoprop_jax as lp
from benchmarks.shared.steps import WARMUP, Params

Setting = Mapping[str, Any]  # numbers by name; arguments of a compiled step, so tracers too
Shape = Callable[[ArrayLike], optax.Schedule]  # from the number of steps to shares of the peak
Kind = Literal["plain", "captured", "gauss_newton"]

MULTIPLIERS = (1.0, 1 / 3, 3.0)  # of a default learning rate; the default is first
ADAM = "adam"  # whom all others are held against in training loss,
ADAMW = "adamw"  # and in test loss


class Contestant(NamedTuple):
    """A method, and how it takes part.

    Attributes:
      name: its key.
      label: its name in tables and plots.
      kind: what its update needs: "plain" nothing that Optax's optimizers do not, "captured" the
        layers' arrays, "gauss_newton" also sampled curvature and the loss as a function.
      make: `make(layers, setting, schedule)` gives the optimizer; the schedule's peak is one.
      grid: the settings that are tried.
      tuned_by: the losses by which the best of the grid is taken. Without any, the first setting is
        the one that counts, and the others tell how much the choice matters.
      shape: of the learning rate.
      evaluated: the parameters whose loss counts, from the optimizer's state and those trained.
    """

    name: str
    label: str
    kind: Kind
    make: Callable[[lp.Layers | None, Setting, optax.Schedule], optax.GradientTransformation]
    grid: tuple[Setting, ...]
    tuned_by: tuple[Literal["train_loss", "test_loss"], ...]
    shape: Shape
    evaluated: Callable[[Any, Params], Params] = lambda opt_state, params: params


# --- the shapes of the learning rate -------------------------------------------------------------


def warmup_constant(steps: ArrayLike) -> optax.Schedule:
    """Linear warm-up over the first 5% of the steps, then one. No step is wasted on a rate of zero.

    The number of steps may be a tracer: one compilation serves training of any length.
    """
    warmup = _warmup(steps)
    return lambda count: _rise(count, warmup)


def warmup_cosine(steps: ArrayLike) -> optax.Schedule:
    """Linear warm-up over the first 5% of the steps, then a cosine that would be zero after all."""
    warmup = _warmup(steps)

    def schedule(count: ArrayLike) -> Float[Array, ""]:
        share = (jnp.float32(count) - warmup) / jnp.maximum(1, jnp.float32(steps) - warmup)
        return _rise(count, warmup) * (1 + jnp.cos(jnp.pi * jnp.clip(share, 0, 1))) / 2

    return schedule


def _warmup(steps: ArrayLike) -> Float[Array, ""]:
    return jnp.maximum(1, jnp.round(WARMUP * jnp.float32(steps)))


def _rise(count: ArrayLike, warmup: Float[Array, ""]) -> Float[Array, ""]:
    return jnp.minimum(1, (jnp.float32(count) + 1) / warmup)


def constant(steps: ArrayLike) -> optax.Schedule:
    del steps
    return lambda count: jnp.ones((), jnp.float32)


# --- the rivals ----------------------------------------------------------------------------------


def _rates(*rates: float) -> tuple[Setting, ...]:
    return tuple({"learning_rate": rate} for rate in rates)


def _rival(
    name: str,
    label: str,
    optimizer: Callable[..., optax.GradientTransformation],
    grid: tuple[Setting, ...],
    shape: Shape = warmup_cosine,
    **others: Any,
) -> Contestant:
    """An optimizer whose first argument is a learning rate; the rest of a setting by name."""

    def make(
        layers: lp.Layers | None, setting: Setting, schedule: optax.Schedule
    ) -> optax.GradientTransformation:
        del layers
        rest = dict(setting)
        return optimizer(_scaled(schedule, rest.pop("learning_rate")), **rest)

    tuned_by = others.pop("tuned_by", ("train_loss",))
    return Contestant(name, label, "plain", make, grid, tuned_by, shape, **others)


def _scaled(schedule: optax.Schedule, peak: ArrayLike) -> optax.Schedule:
    return lambda count: peak * schedule(count)


RIVALS = (
    _rival(ADAM, "Adam", optax.adam, _rates(1e-3, 3e-3, 1e-2, 3e-2)),
    _rival(
        ADAMW,
        "AdamW",
        optax.adamw,
        tuple(
            {**rate, "weight_decay": decay}
            for rate in _rates(3e-3, 1e-2, 3e-2)
            for decay in (1e-2, 1e-1)
        ),
        tuned_by=("train_loss", "test_loss"),
    ),
    _rival("muon", "Muon", contrib.muon, _rates(3e-3, 1e-2, 3e-2)),
    _rival("prodigy", "Prodigy", contrib.prodigy, _rates(1.0)),  # its default: nothing to tune
    _rival(
        "schedule_free",
        "Schedule-Free",
        contrib.schedule_free_adamw,
        _rates(1e-3, 3e-3, 1e-2),
        shape=warmup_constant,
        evaluated=contrib.schedule_free_eval_params,
    ),
)


# --- ours ----------------------------------------------------------------------------------------


def default_rate(constructor: Callable[..., Any]) -> float | None:
    """The learning rate that a method comes with; None for a method without one."""
    default = inspect.signature(constructor).parameters["learning_rate"].default
    return float(default) if isinstance(default, int | float) else None


def _ours(
    label: str,
    constructor: Callable[..., optax.GradientTransformation],
    kind: Kind = "captured",
    shape: Shape = warmup_cosine,
) -> Contestant | None:
    rate = default_rate(constructor)
    if rate is None:
        return None

    def make(
        layers: lp.Layers | None, setting: Setting, schedule: optax.Schedule
    ) -> optax.GradientTransformation:
        return constructor(layers, _scaled(schedule, rate * setting["multiplier"]))

    grid = tuple({"multiplier": multiplier} for multiplier in MULTIPLIERS)
    return Contestant(constructor.__name__, label, kind, make, grid, (), shape)


OURS = tuple(
    contestant
    for contestant in (
        _ours("FOOF", lp.foof),
        _ours("LNB", lp.lnb),
        _ours("K-FAC", lp.kfac, "gauss_newton", constant),
        _ours("LocoProp-S", lp.locoprop_s),
        _ours("LocoProp-M", lp.locoprop_m),
    )
    if contestant is not None
)

CONTESTANTS = {contestant.name: contestant for contestant in (*RIVALS, *OURS)}


def describe(setting: Setting) -> str:
    """A setting in a word or two: how it is stored, and what tells it from others."""
    return " ".join(f"{name}={value:g}" for name, value in setting.items())
