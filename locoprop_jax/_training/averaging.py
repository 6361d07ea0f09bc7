"""An average of the parameters, beside those that are trained."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from locoprop_jax import _linalg
from locoprop_jax._checks import check_decay
from locoprop_jax._trees import real_dtype


class IterateAverageState(NamedTuple):
    """State of `average_iterates`.

    Attributes:
      count: steps so far. shape=(), dtype=int32
      iterates: the average, like the parameters, in float32 at least.
    """

    count: Int[Array, ""]
    iterates: Any

    def diagnostics(self) -> dict[str, Array]:
        """The counter."""
        return {"count": self.count}


def average_iterates(decay: float = 0.95) -> optax.GradientTransformation:
    """Keep an average of the parameters in the state; updates pass (practical GN, B.4, eq. 44).

    After t steps the average is beta times the last one and (1 - beta) times the parameters, with
    beta = min(decay, 1 - 1 / t): the plain mean at first. It makes up for what methods without
    momentum lack, has no effect on training, and is what to evaluate: read it by `averaged_params`.

    Args:
      decay: of the average, once it is no longer the plain mean.

    Returns:
      A transformation to put last in a chain, where updates are what is added to the parameters.
      Its `update` needs the parameters.

    Raises:
      ValueError: the decay is not in [0, 1); at update, there are no parameters.

    Examples:
      >>> import jax.numpy as jnp, optax, locoprop_jax as lp
      >>> tx = optax.chain(optax.sgd(1.0), lp.average_iterates())
      >>> params = {"w": jnp.array(4.0)}
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update({"w": jnp.array(1.0)}, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> float(lp.averaged_params(state)["w"])
      2.5
    """
    check_decay(decay=decay)

    def init(params: Any) -> IterateAverageState:
        # A copy: a buffer cannot be donated twice.
        return IterateAverageState(
            jnp.zeros([], jnp.int32), jax.tree.map(jnp.copy, _linalg.wide(params))
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, IterateAverageState]:
        if params is None:
            raise ValueError(
                "`average_iterates` needs the parameters: call `tx.update(grads, state, params)`."
            )
        count = state.count + 1

        def mean(old: Array, update: Array, leaf: Array) -> Array:
            real = real_dtype(old.dtype)
            most = jnp.asarray(decay, real)
            beta = jnp.minimum(most, 1 - 1 / count.astype(real)).astype(old.dtype)
            return beta * old + (1 - beta) * (leaf + update).astype(old.dtype)

        return updates, IterateAverageState(
            count, jax.tree.map(mean, state.iterates, updates, params)
        )

    return optax.GradientTransformation(init, update)


def averaged_params(opt_state: Any) -> Any:
    """The average that `average_iterates` keeps, from anywhere in an optimizer's state.

    Raises:
      ValueError: there is none, or several.
    """
    found = [node for node in jax.tree.leaves(opt_state, is_leaf=_is_average) if _is_average(node)]
    if len(found) != 1:
        raise ValueError(
            f"The state holds {len(found)} averages of parameters, not one. Put "
            f"`locoprop_jax.average_iterates()` last in the chain of the optimizer."
        )
    return found[0].iterates


def _is_average(node: Any) -> bool:
    return isinstance(node, IterateAverageState)
