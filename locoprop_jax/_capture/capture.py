"""`value_grad_and_capture`: the gradients of a loss, and what each layer saw.

The loss is traced, its layers are detected in the trace, and the trace is run again with each
layer's input recorded and a zero perturbation tapped into its output. One `jax.value_and_grad`
over (parameters, perturbations) then gives the gradients and the cotangents in the same backward
pass, at the cost of the gradients alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from locoprop_jax._capture.assemble import assemble
from locoprop_jax._capture.curvature import check_arguments, take_rng
from locoprop_jax._capture.passes import plan_passes, run
from locoprop_jax._capture.plan import plan_layers
from locoprop_jax._layers.captured import Captured


def value_grad_and_capture(
    loss_fn: Callable[..., Any],
    has_aux: bool = False,
    *,
    transferred: bool = False,
    curvature: str | None = None,
    samples: int = 1,
    defer_curvature: bool = False,
) -> Callable[..., tuple[Any, Any, Captured]]:
    """`jax.value_and_grad` that also returns what each layer saw.

    With `curvature`, each layer also gets cotangents C whose products C'C, summed over samples and
    rows, have the expectation of its pre-activation Fisher or Gauss-Newton block, that of the loss
    as written (practical Gauss-Newton, sections 2 and 3). They come from the same forward pass, by
    one more backward pass for each sample or column, batched by `jax.vmap`:

    * "fisher_mc": the gradients of terms with labels that the model predicts. The loss has to be
      one of `locoprop_jax.losses`, or a cross entropy or squared error that is recognised.
    * "fisher_empirical": the cotangents times sqrt(c), where c is the number of terms that the
      loss averages over: the gradients for the labels given. No further pass.
    * "ggn_mc": random signs times a square root of the loss Hessian.
    * "ggn_exact": the columns of that root: as many as outputs per example, times the positions
      of an example that meet in the network. No example may meet another.

    "ggn_output" gives no cotangents but the Gauss-Newton factor of the output layer alone, from
    which `scale_by_kfra` computes those of all others: `output_hessian`, the sum over rows of the
    Hessian of the loss as written by the outputs of the row, (d_out, d_out), or its diagonal
    (d_out,) where the loss takes each output by itself. No further pass. The loss has one output
    layer, and no row of it meets another in the loss.

    Losses of `locoprop_jax.losses` have square roots in closed form, and so have softmax and
    sigmoid cross entropies and squared errors that Optax or the user wrote. Any other loss works
    for "ggn_mc" and "ggn_exact" if its Hessian is seen to be one block per example. There may be
    several losses, of outputs of several layers, unless unmarked outputs meet in one term. A
    negative part of an example's Hessian counts as zero, as does a term with a negative weight.

    Args:
      loss_fn: `loss_fn(params, *args, **kwargs)` with a scalar loss, or a pair (loss, aux).
      has_aux: whether it returns a pair.
      transferred: whether to capture the cotangents after the transfer functions too, which the
        post-activation methods (`pocoprop_s`, `pocoprop_m`) need.
      curvature: which curvature cotangents to capture, None for none.
      samples: how many, for those that are sampled.
      defer_curvature: whether the further backward passes wait until a method reads what they make.
        An amortised method reads it inside a conditional, so that steps that gather no statistics
        do not pay for them. For an update in the same `jax.jit`: such a `captured` holds the
        backward pass itself, and cannot be sliced, stacked or carried through a loop.

    Returns:
      A function of the same arguments that returns `(loss, gradients, captured)`, or
      `((loss, aux), gradients, captured)`. The gradients are those of `jax.value_and_grad`, under
      `jax.jit` bit for bit unless arrays that leave the jit change what XLA fuses; `captured` is a
      `Captured`, the arrays of each layer by name: inputs (batch, shared, d_in), outputs and
      cotangents (batch, shared, d_out), curvature (samples, batch, shared, d_out). Complex
      gradients and cotangents are JAX's, dL/du - i dL/dv for a number u + iv. It costs what
      `jax.value_and_grad` costs, and the passes that `curvature` asks for; what is not used of it
      is not kept. With "fisher_mc" or "ggn_mc" the function needs a key as the keyword `rng`,
      which the loss does not get.

    Raises:
      TypeError: the loss is not a scalar, a parameter is not an array, or `rng` is missing.
      ValueError: `curvature` or `samples` is out of range, or the curvature of this loss cannot be
        told, or is asked of complex layers; the message says why and what to do.

    Examples:
      >>> import jax, jax.numpy as jnp, locoprop_jax as lp
      >>> def loss_fn(w, x):
      ...     return jnp.mean((x @ w["kernel"]) ** 2)
      >>> w, x = {"kernel": jnp.ones((3, 2))}, jnp.ones((4, 3))
      >>> loss, grads, captured = jax.jit(lp.value_grad_and_capture(loss_fn))(w, x)
      >>> captured["kernel"].cotangents.shape
      (4, 1, 2)
    """
    check_arguments(curvature, samples)

    @functools.wraps(loss_fn)
    def wrapped(params: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any, Captured]:
        rng = take_rng(curvature, loss_fn, kwargs)
        layers = plan_layers(loss_fn, params, args, kwargs, has_aux)
        plan = plan_passes(layers, transferred, curvature)
        passes = run(plan, params)
        captured = assemble(plan, params, passes, samples, rng)
        captured = captured if defer_curvature else captured.pulled()
        return layers.traced.rebuild_output(passes.results), passes.grads, captured

    return wrapped
