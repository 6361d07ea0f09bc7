"""Who is compared: Adam tuned, L-BFGS, and the library's methods at their defaults.

K-FAC and the natural gradient take part a second time, with next to no damping and a line search:
the latter is the energy natural gradient of Mueller and Zeinhofer (2023).

The steps of Adam, FOOF and LNB fall to zero along a cosine within the seconds that a run has, after
a warm-up; all others find the length of their steps. Adam has the best of four rates.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

import locoprop_jax as lp

Loss = Callable[[Any], Array]
Step = Callable[[Any, Any, Array], tuple[Any, Any]]  # (params, state, factor) -> params, state
WARMUP = 0.05


class Method(NamedTuple):
    """A method.

    Attributes:
      label: its name in tables and plots.
      make: the optimizer, of the layers; None for one that needs none.
      kind: "gradient" for steps along a schedule, "line" for those that look at the loss besides,
        "captured" for what takes layers' arrays too, along a schedule, and "gauss_newton" for what
        takes their exact curvature and the loss.
      factors: of the steps, which are tried; the best counts.
    """

    label: str
    make: Callable[[Any], optax.GradientTransformation]
    kind: Literal["gradient", "line", "captured", "gauss_newton"]
    factors: tuple[float, ...] = (1.0,)


def along_a_line(direction: optax.GradientTransformation) -> optax.GradientTransformation:
    """The longest step that lowers the loss enough: 1, 1/2, 1/4... of the direction."""
    search = optax.scale_by_backtracking_linesearch(
        max_backtracking_steps=15, decrease_factor=0.5, increase_factor=2.0, max_learning_rate=1.0
    )
    return optax.chain(direction, optax.scale_by_learning_rate(1.0), search)


METHODS = {
    "adam": Method("Adam, tuned", lambda _: optax.adam(1.0), "gradient", (1e-3, 3e-3, 1e-2, 3e-2)),
    "lbfgs": Method("L-BFGS", lambda _: optax.lbfgs(), "line"),
    "foof": Method("FOOF", lp.foof, "captured"),
    "lnb": Method("LNB", lp.lnb, "captured"),
    "kfac": Method("K-FAC", lp.kfac, "gauss_newton"),
    "kfac_line": Method(
        "K-FAC, line search",
        lambda layers: along_a_line(lp.scale_by_kfac(layers, damping=1e-4, exact_damping=True)),
        "gauss_newton",
    ),
    "natural": Method("natural gradient", lp.natural_gradient, "gauss_newton"),
    "natural_line": Method(
        "natural gradient, line search",
        lambda layers: along_a_line(lp.scale_by_natural_gradient(layers, damping=1e-7)),
        "gauss_newton",
    ),
    "hessian_free": Method("Hessian-free", lambda _: lp.hessian_free(), "line"),
}


def schedule(share: float) -> float:
    """Of the steps, by the share of the time that is over."""
    rise = min(1.0, share / WARMUP) if share else 0.1
    return float(rise * (1 + jnp.cos(jnp.pi * min(1.0, share))) / 2)


def make_step(method: Method, loss: Loss, params: Any) -> tuple[Any, Step]:
    """The first state, and a step."""
    layers = None
    if method.kind in ("captured", "gauss_newton"):
        layers = lp.find_layers(loss, params)
    tx = optax.with_extra_args_support(method.make(layers))
    curvature = "ggn_exact" if method.kind == "gauss_newton" else None
    capture = lp.value_grad_and_capture(loss, curvature=curvature, defer_curvature=True)

    def step(params: Any, state: Any, factor: Array) -> tuple[Any, Any]:
        arrays = {}
        if layers is None:
            value, grads = jax.value_and_grad(loss)(params)
        else:
            value, grads, arrays["captured"] = capture(params)
        if method.kind in ("line", "gauss_newton"):
            arrays |= {"value": value, "grad": grads, "value_fn": lambda p, captured=None: loss(p)}
        updates, state = tx.update(grads, state, params, **arrays)
        if method.kind in ("gradient", "captured"):
            updates = jax.tree.map(lambda update: factor * update, updates)
        return optax.apply_updates(params, updates), state

    return tx.init(params), jax.jit(step)
