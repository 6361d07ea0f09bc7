"""What an optimizer's state knows of a run, as a flat dict of scalars."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

# What is read of the states of Optax that stand around a method.
WRAPPERS: Mapping[type, tuple[str, ...]] = {
    optax.ApplyIfFiniteState: ("notfinite_count", "last_finite", "total_notfinite"),
    optax.MultiStepsState: ("mini_step", "gradient_step"),
}


def diagnostics(opt_state: Any, *, condition_numbers: bool = False) -> dict[str, Array]:
    """What the states of this library know of a run: a flat dict of scalars, for a log.

    They are found wherever they are: in `optax.chain`, `masked`, `partition`,
    `inject_hyperparams`, `MultiSteps`, `apply_if_finite`, `with_fallback`, a Flax `TrainState`.
    Nothing is computed for it unless it is called, and then next to nothing.

    A name is that of the state's class and of what it counts or measures; its docstring says what
    that is:

    * of all methods "foof/count" (batches taken) and "foof/refused" (batches that were not finite),
      with "lnb", "kfac" (also of `kfra`), "natural_gradient", "gauss_newton_step", "hessian_free"
      or "local_loss" for "foof". "local_loss/count" has the refused ones in it;
    * of those that factorise "foof/failures", and of those that average "foof/age", the steps
      since statistics were last gathered;
    * of steps by a quadratic model "gauss_newton_step/damping", ".../step_size",
      ".../reduction_ratio", ".../length" (how far the last step moved the outputs) and so on. The
      steps of `foof` and `lnb` have the length that their learning rate says;
    * "hyperparams/learning_rate" and all others that `optax.inject_hyperparams` made, and of
      Optax's `apply_if_finite` and `MultiSteps` their counters.

    A second state of the same class begins with "foof_1/", and so on.

    Args:
      opt_state: the state of an optimizer, or a tree that has it in it.
      condition_numbers: whether to have those of the matrices that are kept as well:
        "foof/condition/LAYER/inputs" of the statistics as they are, and
        "foof/condition/LAYER/damped_inputs" of what was inverted; of `kfac` also of the outputs'
        factor. Of stacked layers the largest; infinite where an eigenvalue is not positive, as
        before the first step. It takes the eigenvalues of each: do not ask in every step.

    Returns:
      Arrays of shape (), inside of `jit` as well as outside; with the axes of `vmap` in front.

    Raises:
      ValueError: there is no state of this library in it.

    Example:
      >>> import jax.numpy as jnp, locoprop_jax as lp
      >>> def loss_fn(w, x):
      ...     return jnp.mean((x @ w["kernel"]) ** 2)
      >>> w, x = {"kernel": jnp.ones((3, 2))}, jnp.ones((8, 3))
      >>> state = lp.foof(lp.find_layers(loss_fn, w, x)).init(w)
      >>> {name: int(number) for name, number in lp.diagnostics(state).items()}
      {'foof/count': 0, 'foof/refused': 0, 'foof/failures': 0, 'foof/age': 0}
    """
    found: dict[str, Array] = {}
    taken: dict[str, int] = {}
    is_ours = False
    for state in _states(opt_state):
        is_ours |= _is_ours(state)
        name = _name(state)
        number = taken[name] = taken.get(name, -1) + 1
        prefix = f"{name}_{number}" if number else name
        found |= {f"{prefix}/{own}": value for own, value in _numbers(state).items()}
        if condition_numbers and hasattr(state, "spectra"):
            for own, eigenvalues in state.spectra().items():
                found[f"{prefix}/condition/{own}"] = _condition(eigenvalues)
    if not is_ours:
        raise ValueError(
            "`diagnostics` found no state of this library. Give it the state of an optimizer: what "
            "`tx.init(params)` or `tx.update(...)` returned, as it is. A checkpoint that was "
            "restored without a template has lost its classes."
        )
    return found


def _states(tree: Any) -> Iterator[Any]:
    """Every state with something to say, from the outside inwards."""
    for node in jax.tree.leaves(tree, is_leaf=_is_known):
        if _is_known(node):
            yield node
            yield from _states(tuple(node))


def _is_ours(node: Any) -> bool:
    return isinstance(node, tuple) and hasattr(node, "diagnostics")


def _is_injected(node: Any) -> bool:
    return isinstance(node, tuple) and hasattr(node, "hyperparams")


def _is_known(node: Any) -> bool:
    return _is_ours(node) or _is_injected(node) or isinstance(node, tuple(WRAPPERS))


def _name(state: Any) -> str:
    """Of a `GaussNewtonStepState` "gauss_newton_step"."""
    if _is_injected(state):
        return "hyperparams"
    words = type(state).__name__.removesuffix("State")
    return re.sub(r"(?<!^)(?=[A-Z])", "_", words).lower()


def _numbers(state: Any) -> Mapping[str, Array]:
    if _is_ours(state):
        return state.diagnostics()
    if _is_injected(state):
        return state.hyperparams
    (names,) = [names for kind, names in WRAPPERS.items() if isinstance(state, kind)]
    return {name: getattr(state, name) for name in names}


def _condition(eigenvalues: Float[Array, "*stack n"]) -> Float[Array, ""]:
    """The largest of a stack; infinite where an eigenvalue is not positive."""
    largest, smallest = eigenvalues.max(-1), eigenvalues.min(-1)
    is_positive = smallest > 0
    ratio = jnp.where(is_positive, largest / jnp.where(is_positive, smallest, 1), jnp.inf)
    return ratio.max()
