"""Gradients, activations and cotangents of a batch that is too large for one backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from locoprop_jax._layers.captured import Captured


def accumulate(
    capture: Callable[..., tuple[Any, Any, Captured]],
) -> Callable[..., tuple[Any, Any, Captured]]:
    """Capture several micro-batches, one after the other, as one batch whose loss is their mean.

    `optax.MultiSteps` averages gradients, but hands a method the captured arrays of the last
    micro-batch alone. Here it gets those of all, so its step is that of the whole batch. Only
    captured arrays are kept from one micro-batch to the next, not what else the backward pass
    needs.

    Args:
      capture: from `value_grad_and_capture`, of a loss that is a mean over examples.

    Returns:
      A function of the parameters and of the same arguments as the loss, each array with one more
      axis in front, which counts micro-batches: so must keys, `rng` too. It returns what `capture`
      does: the mean loss and gradients, `captured` of all examples, and `aux` of each micro-batch.

    Raises:
      ValueError: the arguments have no common first axis.

    Examples:
      >>> import jax.numpy as jnp, locoprop_jax as lp
      >>> def loss_fn(w, x):
      ...     return jnp.mean((x @ w["kernel"]) ** 2)
      >>> w, x = {"kernel": jnp.ones((3, 2))}, jnp.ones((8, 3))
      >>> capture = lp.accumulate(lp.value_grad_and_capture(loss_fn))
      >>> loss, grads, captured = capture(w, x.reshape(4, 2, 3))
      >>> captured["kernel"].inputs.shape
      (8, 1, 3)
    """

    @functools.wraps(capture)
    def wrapped(params: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any, Captured]:
        sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves((args, kwargs))}
        if len(sizes) != 1 or () in sizes:
            raise ValueError(
                "`accumulate` needs arguments that all have the number of micro-batches as their "
                f"first axis, got the first axes {sorted(sizes)}. Reshape a batch by "
                "`x.reshape(micro_batches, -1, *x.shape[1:])`, split a key by "
                "`jax.random.split(key, micro_batches)`, close over what they share."
            )
        ((parts,),) = sizes

        def one(total: Any, batch: Any) -> tuple[Any, Any]:
            args, kwargs = batch
            value, grads, captured = capture(params, *args, **kwargs)
            return jax.tree.map(jnp.add, total, grads), (value, captured.pulled())

        total, (values, captured) = jax.lax.scan(
            one, jax.tree.map(jnp.zeros_like, params), (args, kwargs)
        )
        has_aux = isinstance(values, tuple)
        value = (values[0].mean(), values[1]) if has_aux else values.mean()
        return value, jax.tree.map(lambda g: g / parts, total), captured.joined(parts)

    return wrapped
