"""The Gauss-Newton factor of the output layer: its rows' Hessians of the loss, added up.

At the target of curvature (`targets`) the Hessian of the loss as written is R R', and J leads
there from the layer's outputs: the factor is the sum of J' R R' J over rows, J most often the
identity (practical Gauss-Newton, equation 16 and section 3.5, where the recursion starts).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from locoprop_jax import losses
from locoprop_jax._capture import curvature
from locoprop_jax._capture.curvature import Point
from locoprop_jax._capture.target import Target
from locoprop_jax._capture.targets import find_targets
from locoprop_jax._layers.uses import Layout
from locoprop_jax._tracing import chains, separable
from locoprop_jax._tracing.chains import Chain
from locoprop_jax._tracing.heads import output_sites, reached_past
from locoprop_jax._tracing.trace import Traced

REMEDY = (
    "Use `scale_by_kfac` with `value_grad_and_capture(loss_fn, curvature='ggn_exact')`, or with "
    "'ggn_mc'"
)


class OutputPlan(NamedTuple):
    """What the factor of an output layer is made of.

    Attributes:
      site: the number of the layer.
      output: the value that it outputs.
      targets: where the Hessian of the loss is known.
      is_diagonal: whether the loss takes each output by itself.
    """

    site: int
    output: int
    targets: tuple[Target, ...]
    is_diagonal: bool


def plan(traced: Traced, names: Sequence[str], to_rows: Sequence[Chain]) -> OutputPlan:
    """Find the output layer of a traced loss and what separates its rows.

    Args:
      traced: the loss.
      names: of the layers, for errors.
      to_rows: of the layers, what brings their outputs to (batch, shared, d_out).

    Raises:
      ValueError: there are several output layers, the loss depends on a layer past the last, or
        rows meet in the loss.
    """
    program, detection = traced.program, traced.detection
    ends = output_sites(traced)
    if len(ends) > 1:
        listed = ", ".join(names[i] for i in ends)
        raise ValueError(
            f"`curvature='ggn_output'` needs one output layer, but several are: {listed}. {REMEDY}."
        )
    targets = find_targets(traced, "ggn_output", names, to_rows)
    (site,) = ends
    output, name = detection.sites[site].output, names[site]
    if program.outputs[0] in reached_past(traced, output):
        raise ValueError(
            f"`curvature='ggn_output'` needs a loss that depends on all layers through {name}, the "
            f"last, but another one also reaches it in another way. {REMEDY}."
        )
    is_diagonal = True
    for target in targets:
        followed, _ = separable.follow(program, target.value, detection.live)
        *_, batch, shared, features = separable.rearranged(to_rows[site], followed[output])
        separate = functools.partial(_is_separate, target)
        if not (separate(batch) and separate(shared)):
            raise ValueError(
                f"`curvature='ggn_output'` needs rows of {name}, the output layer, that do not "
                f"meet in the loss, but capture cannot tell that they do not: pooling over "
                f"positions, contrastive losses and batch normalisation make them meet. {REMEDY}."
            )
        is_diagonal = is_diagonal and separate(features)
    return OutputPlan(site, output, targets, is_diagonal)


def _is_separate(target: Target, axis: separable.Axis) -> bool:
    return all(factor.axis in target.examples for factor in axis)


def total(
    plan: OutputPlan,
    points: Sequence[Point],
    between: Sequence[Callable[[Array], Array]],
    outputs: Array,
    layout: Layout,
) -> Float[Array, "d_out d_out"] | Float[Array, " d_out"]:
    """The factor: a matrix, or its diagonal.

    Args:
      plan: from `plan`.
      points: the arrays of each target.
      between: what leads from the layer's outputs to each target.
      outputs: of the layer, raw.
      layout: how to read them.
    """
    parts = [
        _of_loss(plan, target, point)
        if _is_in_closed_form(plan, target, outputs, layout)
        else _of_products(plan, target, point, function, outputs, layout)
        for target, point, function in zip(plan.targets, points, between, strict=True)
    ]
    return functools.reduce(jnp.add, parts)


def _is_in_closed_form(plan: OutputPlan, target: Target, outputs: Array, layout: Layout) -> bool:
    """Whether a row of the layer is an example of a loss that knows the sum."""
    if target.loss is None or target.loss.total is None or target.value != plan.output:
        return False
    d_out = chains.result_shape(layout.outputs, outputs.shape)[-1]
    size = math.prod(outputs.shape[i] for i in target.outputs)
    return size == d_out and not plan.is_diagonal


def _of_loss(plan: OutputPlan, target: Target, point: Point) -> Float[Array, "d_out d_out"]:
    assert target.loss is not None and target.loss.total is not None
    rows = losses.at_least_float32(curvature.by_example(target, point.value))
    weights = jnp.square(curvature.scale_of(target, point)).astype(rows.dtype)
    weights = jnp.broadcast_to(weights, rows.shape[:-1])
    return target.loss.total(rows.reshape(-1, rows.shape[-1]), weights.ravel())


def _of_products(
    plan: OutputPlan,
    target: Target,
    point: Point,
    between: Callable[[Array], Array],
    outputs: Array,
    layout: Layout,
) -> Array:
    """By products with unit vectors, the same in all rows: never a matrix for each of these.

    But for a loss that may not be convex, whose root is made of matrices.
    """
    root = curvature.root_of(target, point)
    pull = jax.vjp(between, outputs)[1]
    dtype = losses.working_dtype(point.value.dtype)

    def back(v: Array) -> Float[Array, "batch shared d_out"]:
        at_target = root(v)
        if target.value != plan.output:
            (at_target,) = pull(at_target.astype(point.value.dtype))
        return chains.apply(layout.outputs, at_target.astype(dtype))

    zeros = jnp.zeros(point.value.shape, dtype)
    shape = jax.eval_shape(back, zeros).shape
    forth = jax.vjp(back, zeros)[1]

    def product(v: Float[Array, " d_out"]) -> Float[Array, " d_out"]:
        (at_target,) = forth(jnp.broadcast_to(v[None, None], shape))
        return back(at_target).sum((0, 1))

    if plan.is_diagonal:
        return product(jnp.ones(shape[-1], dtype))
    return jax.lax.map(product, jnp.eye(shape[-1], dtype=dtype))
