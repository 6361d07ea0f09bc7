"""The blocks of the Hessian, one for each layer, by the recursion of practical Gauss-Newton."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from locoprop_jax import losses
from locoprop_jax._checks import check_layers, warn_of_matrix
from locoprop_jax._curvature.sequences import check_sequence, kernels
from locoprop_jax._layers.arrays import LayerArrays
from locoprop_jax._layers.captured import Captured, check_captured, check_real_captured
from locoprop_jax._layers.head import Head
from locoprop_jax._layers.layers import Layer, Layers
from locoprop_jax._layers.rows import as_rows
from locoprop_jax._tracing import ends, separable
from locoprop_jax._tracing.flow import live_equations, reached_from
from locoprop_jax._tracing.program import flatten

REMEDY = "Use `jax.hessian` for other networks"

Hessians = Float[Array, "rows d_out d_out"]


def hessian_blocks(
    layers: Layers, params: Any, captured: Captured, *, gauss_newton: bool = False
) -> dict[str, Float[Array, "d d_out d d_out"]]:
    """The Hessian of the loss by each layer's parameters (practical GN, section 2.2, eqs. 7-10).

    For an analysis of small networks: a block holds (d d_out)^2 numbers, and each layer's
    pre-activation Hessians rows x d_out^2. They come from a single pass backward. With H of the
    layer above, per row,

        H <- B W H W' B + D,    B = diag f',    D = diag(f'' * dL/dy),

    where y = f(a). The block of a layer is the sum over rows of x x' (x) H.

    Where all transfer functions are piecewise linear the blocks are those of the Gauss-Newton
    matrix, and positive semi-definite for a convex loss (appendix E). What never meets data (weight
    decay inside the loss) is not in them.

    Args:
      layers: from `find_layers`, a chain of dense layers with elementwise functions in between.
      params: the parameters that were captured with.
      captured: from `value_grad_and_capture(loss_fn)`, with or without curvature.
      gauss_newton: whether to leave out D, which makes the exact Gauss-Newton blocks (eq. 22).

    Returns:
      Blocks by layer, (d, d_out, d, d_out) with d = d_in + 1 where there is a bias, the last row of
      each W as in `layers.block`, else d_in: what `jax.hessian` of the loss by W would return.

    Raises:
      ValueError: the layers are not such a chain, `captured` is from another model, a kernel is
        masked, or rows meet in the loss.
      TypeError: `params` or `captured` is missing.

    References:
      Botev et al., `Practical Gauss-Newton Optimisation for Deep Learning
      <https://arxiv.org/abs/1706.03662>`_, 2017: section 2.2, appendices A and E.

    Examples:
      >>> import jax.numpy as jnp, locoprop_jax as lp
      >>> def loss_fn(w, x):
      ...     return jnp.sum(jnp.tanh(x @ w["in"]) @ w["out"])
      >>> w, x = {"in": jnp.ones((3, 2)), "out": jnp.ones((2, 1))}, jnp.ones((4, 3))
      >>> layers = lp.find_layers(loss_fn, w, x)
      >>> captured = lp.value_grad_and_capture(loss_fn)(w, x)[2]
      >>> {name: block.shape for name, block in hessian_blocks(layers, w, captured).items()}
      {'in': (3, 2, 3, 2), 'out': (2, 1, 2, 1)}
    """
    check_layers(layers, "hessian_blocks")
    names = check_sequence(layers, "hessian_blocks", REMEDY)
    captured = check_captured(layers, captured, "hessian_blocks")
    for name, layer in layers.items():
        warn_of_matrix(
            f"The block of the layer {name}",
            (layer.d_in + (layer.bias is not None)) * layer.d_out,
            "Products with the whole matrix need no block: `gauss_newton_vector_product`",
        )
    check_real_captured(captured, "hessian_blocks")
    above = kernels(layers, params, names[1:], "hessian_blocks", captured.points)
    last = captured[names[-1]]
    assert last.head is not None
    _check_rows(last.head, names[-1])
    hessians = _of_head(last.head, last.outputs)
    result = {names[-1]: _block(layers[names[-1]], last, hessians)}
    for name, after in reversed(list(itertools.pairwise(names))):
        kernel = above[after].astype(hessians.dtype)
        hessians = jnp.einsum("ik,nkl,jl->nij", kernel, hessians, kernel, precision="highest")
        outputs = as_rows(captured[name].outputs, hessians.dtype)
        slope, pull = jax.vjp(layers[name].transfer.derivative, outputs)
        hessians = hessians * slope[:, :, None] * slope[:, None, :]
        if not gauss_newton:
            (second,) = pull(jnp.ones_like(outputs))
            back = as_rows(captured[after].cotangents, hessians.dtype) @ kernel.T
            hessians = hessians + jax.vmap(jnp.diag)(second * back)
        result[name] = _block(layers[name], captured[name], hessians)
    return {name: result[name] for name in names}


def _check_rows(head: Head, name: str) -> None:
    """Refuse a loss in which rows of the output layer meet.

    Raises:
      ValueError: they may.
    """
    program = flatten(head.function.closed)
    live, outputs = live_equations(program, program.outputs[0]), program.inputs[0]
    for end in ends.linear(program, program.outputs[0], reached_from(program, [outputs])).ends:
        followed, _ = separable.follow(program, end, live)
        if outputs in followed:
            *_, batch, shared, _ = separable.rearranged(head.layout.outputs, followed[outputs])
            if not (separable.is_separate(batch) and separable.is_separate(shared)):
                raise ValueError(
                    f"`hessian_blocks` needs rows of {name}, the output layer, that do not meet in "
                    f"the loss, but capture cannot tell that they do not. {REMEDY}."
                )


def _of_head(head: Head, outputs: Float[Array, "batch shared d_out"]) -> Hessians:
    """The Hessian of the loss by the outputs of each row, which need not be convex."""
    product = jax.vjp(head.gradient, outputs)[1]
    d_out = outputs.shape[-1]
    units = jnp.eye(d_out, dtype=outputs.dtype)[:, None, None]
    vectors = jnp.broadcast_to(units, (d_out, *outputs.shape))
    columns = jax.lax.map(lambda v: product(v)[0], vectors)
    columns = losses.at_least_float32(columns)
    hessians = columns.reshape(d_out, -1, d_out).transpose(1, 0, 2)
    return (hessians + hessians.transpose(0, 2, 1)) / 2


def _block(
    layer: Layer, arrays: LayerArrays, hessians: Hessians
) -> Float[Array, "d d_out d d_out"]:
    """The sum over rows of x x' (x) H (practical GN, eq. 7)."""
    x = as_rows(arrays.inputs, hessians.dtype)
    if layer.bias is not None:
        x = jnp.concatenate([x, jnp.ones((len(x), 1), x.dtype)], 1)
    products = (x[:, :, None] * x[:, None]).reshape(len(x), -1)
    blocks = jnp.matmul(products.T, hessians.reshape(len(x), -1), precision="highest")
    d, d_out = x.shape[1], hessians.shape[1]
    return blocks.reshape(d, d, d_out, d_out).transpose(0, 2, 1, 3)
