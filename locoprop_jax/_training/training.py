"""What training loops need around a method: an optimizer for the parameters in no layer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from locoprop_jax import _linalg
from locoprop_jax._layers.layers import Layers, parameter_paths
from locoprop_jax._trees import ascent, path_name


def with_fallback(
    tx: optax.GradientTransformation,
    layers: Layers,
    fallback: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Give the parameters in no layer an optimizer of their own.

    Args:
      tx: for the parameters of `layers`.
      layers: from `find_layers(..., on_uncaptured="pass")`.
      fallback: for all others, `optax.adam(1e-3)` for example. It gets complex gradients
        conjugated, as Optax's optimizers need them to descend.

    Returns:
      One optimizer for all parameters (an `optax.partition`). A batch whose gradient is not finite
      leaves the fallback and its parameters as they were, as a method does with its own.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, locoprop_jax as lp
      >>> def loss_fn(params, x, y):
      ...     return jnp.mean(((x @ params["kernel"]) ** params["power"] - y) ** 2)
      >>> params = {"kernel": jnp.ones((3, 1)), "power": jnp.ones(())}
      >>> x = jnp.abs(jnp.sin(jnp.arange(15.0).reshape(5, 3)))
      >>> y = x.sum(1, keepdims=True) ** 2
      >>> layers = lp.find_layers(loss_fn, params, x, y, on_uncaptured="pass")
      >>> [other.path for other in layers.uncaptured]
      ['power']
      >>> tx = lp.with_fallback(lp.lnb(layers), layers, optax.adam(0.1))
      >>> state = tx.init(params)
      >>> loss, grads, captured = jax.jit(lp.value_grad_and_capture(loss_fn))(params, x, y)
      >>> updates, state = jax.jit(tx.update)(grads, state, params, captured=captured)
      >>> print(f"{updates['power']:.2f}")
      0.10
    """
    captured = parameter_paths(layers)

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "layers" if path_name(path) in captured else "fallback",
            params,
        )

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        return for_others.update(ascent(updates), state, params, **extra_args)

    for_others = optax.with_extra_args_support(fallback)
    descending = optax.GradientTransformationExtraArgs(fallback.init, update)
    both: Any = optax.partition({"layers": tx, "fallback": descending}, labels)

    def update_both(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        ok = _linalg.all_finite(updates)
        new, after = both.update(updates, state, params, **extra_args)
        old, inner = state.inner_states["fallback"], after.inner_states
        kept = after._replace(
            inner_states={**inner, "fallback": _linalg.where(ok, inner["fallback"], old)}
        )
        guarded = jax.tree_util.tree_map_with_path(
            lambda path, u: (
                u if path_name(path) in captured else _linalg.where(ok, u, jnp.zeros_like(u))
            ),
            new,
        )
        return guarded, kept

    return optax.GradientTransformationExtraArgs(both.init, update_both)
