"""What constructors refuse, in the same words everywhere.

Under `optax.inject_hyperparams` a hyperparameter is traced, and has no value to check.
"""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Mapping
from typing import Any

from locoprop_jax._trees import is_complex, leaves_by_path

# Of a matrix that is kept for a layer, in rows: 256 MiB in float32, and as much for its inverse.
# Longer sides are those of vocabularies and flattened images.
MAX_SIZE = 8192


class CostWarning(UserWarning):
    """Something makes a step or a state many times as costly as is usual for its method.

    It is shown once for each text, where a method is built or a step is traced, with the number and
    a remedy. `warnings.simplefilter("ignore", lp.CostWarning)` silences it, "error" refuses.
    """


def warn_of_cost(message: str) -> None:
    warnings.warn(message, CostWarning, stacklevel=2)


def warn_of_matrix(what: str, size: int, remedy: str) -> None:
    """Tell of a matrix that is larger than any that a method keeps by itself."""
    if size > MAX_SIZE:
        warn_of_cost(
            f"{what} is a matrix of {size} x {size} numbers ({size**2 / 2**28:.1f} GiB in "
            f"float32), and what is made of it takes {size}^3 steps of arithmetic. {remedy}."
        )


def is_number(value: Any) -> bool:
    """Whether a hyperparameter's value is known when the transformation is built."""
    return isinstance(value, int | float)


def check_layers(layers: Any, method: str) -> None:
    """Refuse what is not the layers of a model; there may be none if parameters are left over."""
    is_mapping = isinstance(layers, Mapping)
    are_some = is_mapping and (layers or getattr(layers, "uncaptured", ()))
    if not are_some or not all(hasattr(own, "parts") for own in layers.values()):
        got = f"a {type(layers).__name__}" if is_mapping and layers else repr(layers)
        raise ValueError(
            f"`{method}` needs the layers of the model: "
            f"`layers = locoprop_jax.find_layers(loss_fn, params, batch)`; got {got}."
        )


def check_not_negative(**values: Any) -> None:
    for name, value in values.items():
        if is_number(value) and not value >= 0:
            raise ValueError(f"`{name}` must not be negative, got {value}.")


def check_positive(**values: Any) -> None:
    for name, value in values.items():
        if is_number(value) and not value > 0:
            raise ValueError(f"`{name}` must be positive, got {value}.")


def check_decay(**values: Any) -> None:
    for name, value in values.items():
        if is_number(value) and not 0 <= value < 1:
            raise ValueError(f"`{name}` must be from 0 to below 1, got {value}.")


def check_whole(**values: Any) -> None:
    """Numbers that shape the program."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
            traced = not isinstance(value, numbers.Number)
            hint = " Name it in the `static_args` of `optax.inject_hyperparams`." if traced else ""
            raise ValueError(f"`{name}` must be a positive whole number, got {value!r}.{hint}")


def check_real(method: str, tree: Any) -> None:
    """Refuse complex parameters, or what is laid out like them.

    Raises:
      ValueError: there is one.
    """
    for path, leaf in leaves_by_path(tree).items():
        if is_complex(leaf.dtype):
            raise ValueError(
                f"`{method}` takes real parameters, but {path!r} is {leaf.dtype}. {REAL_REMEDY}"
            )


REAL_REMEDY = (
    "Take `foof` or `lnb`, which take complex layers. Or write the layer with real parameters `re` "
    "and `im` and real data: outputs `x.real @ re - x.imag @ im` and `x.real @ im + x.imag @ re`, "
    "with `real` and `imag` of the inputs as arrays of their own."
)


def check_state(method: str, state: Any, expected: Any) -> None:
    """Refuse a state that is laid out otherwise than `init` makes it for these parameters.

    Raises:
      ValueError: it is; the message names what differs.
    """
    found, own = (
        {path: leaf.shape for path, leaf in leaves_by_path(tree).items()}
        for tree in (state, expected)
    )
    if found != own:
        paths = [path for path in {**own, **found} if own.get(path) != found.get(path)]
        path = paths[0]
        has = f"the shape {found[path]}" if path in found else "nothing"
        wants = f"the shape {own[path]}" if path in own else "nothing"
        raise ValueError(
            f"`{method}` was given the state of another model, of other options or of another "
            f"version: at {path!r} it has {has} instead of {wants}"
            f"{f', and {len(paths) - 1} more differ' if paths[1:] else ''}. Restore a checkpoint "
            f"into `tx.init(params)` of the model and the options that it was made with."
        )


def check_fisher(method: str, damping: Any, curvature: str) -> None:
    if is_number(damping) and damping < 0:
        raise ValueError(f"`{method}` takes a damping that is not negative, got {damping}.")
    if curvature not in ("empirical", "captured"):
        raise ValueError(f"`curvature` is 'empirical' or 'captured', got {curvature!r}.")
