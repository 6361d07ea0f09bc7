"""Curvature cotangents: what Fisher and Gauss-Newton methods pull back beside the gradient.

At the *target*, the network's outputs as the loss takes them, cotangents C are injected whose
products C'C sum, in expectation, to the Hessian H of the loss as written (mathematics: Curvature):

    fisher_mc         sqrt(w) e       e the gradient of one term for a label that the model predicts
    ggn_mc            H^(1/2) xi      xi = +-1
    ggn_exact         the columns of H^(1/2)

w is the weight of a term in the loss, 1/B in a mean. Where the loss is not known, marked or
recognised, H is taken by Hessian-vector products of the head.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from locoprop_jax import losses
from locoprop_jax._capture.target import KINDS, Target, Weight
from locoprop_jax._checks import warn_of_cost
from locoprop_jax._tracing import chains, jaxpr
from locoprop_jax._tracing.chains import Shape

# More columns than these make a step ten times as long: with two units of work for each backward
# pass and one for the pass forward, 3 + 2 * 32 against 3 + 2.
MOST_COLUMNS = 32

SAMPLED = ("fisher_mc", "ggn_mc")


def check_arguments(curvature: str | None, samples: int) -> None:
    """Refuse an unknown kind of curvature, and samples of what is not sampled.

    Raises:
      ValueError: as it says.
    """
    if curvature is not None and curvature not in KINDS:
        known = ", ".join(repr(kind) for kind in KINDS)
        raise ValueError(f"`curvature` is None or one of {known}, got {curvature!r}.")
    if samples < 1:
        raise ValueError(f"`samples` is at least 1, got {samples}.")
    if samples != 1 and curvature not in SAMPLED:
        raise ValueError(
            f"`samples={samples}` needs a `curvature` that is sampled, 'fisher_mc' or 'ggn_mc', "
            f"got {curvature!r}."
        )


def take_rng(curvature: str | None, loss_fn: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    """The key of a sampled curvature, taken out of the keyword arguments; None for any other.

    Raises:
      TypeError: it is missing, or there is one that neither curvature nor loss takes.
    """
    if curvature in SAMPLED:
        rng = kwargs.pop("rng", None)
        if rng is None:
            raise TypeError(
                f"`curvature={curvature!r}` draws random numbers: pass a key as the keyword `rng`, "
                f"`value_grad_and_capture(loss_fn, curvature={curvature!r})(params, batch, "
                f"rng=jax.random.key(0))`, another one at each step. The loss does not get it."
            )
        return rng
    if curvature is not None and "rng" in kwargs:
        known = inspect.signature(loss_fn).parameters
        if "rng" not in known and all(p.kind != p.VAR_KEYWORD for p in known.values()):
            raise TypeError(
                f"`curvature={curvature!r}` draws no random numbers, and the loss has no keyword "
                f"`rng`: leave it out."
            )
    return None


class Point(NamedTuple):
    """A target's arrays.

    Attributes:
      value: the outputs of the network.
      operands: of the marked loss's call; none where nothing is marked.
      weights: the derivative of the loss by the known loss's terms; None for a head.
      head: the loss as a function of the outputs; None for a known loss.
    """

    value: Array
    operands: tuple[Any, ...] = ()
    weights: Array | None = None
    head: Callable[[Array], Array] | None = None


def point(
    target: Target, known: Mapping[int, Any], value: Array, derivatives: Mapping[int, Array]
) -> Point:
    """The arrays of a target.

    Args:
      target: from `find_targets`.
      known: by number, the values that it needs.
      value: the outputs.
      derivatives: of the loss, by the number of what weighs the target.
    """
    if target.head is not None:
        return Point(value, head=target.head.function(known))
    operands = () if target.call is None else tuple(known[v] for v in target.call.inputs)
    assert target.loss is not None
    shape = chains.result_shape(target.to_terms, value.shape)
    shape = shape[: len(shape) - (target.loss.output_axes or 0)]
    weights = [_of_terms(weight, derivatives[weight.value], shape) for weight in target.weights]
    return Point(value, operands, functools.reduce(jnp.add, weights))


def _of_terms(weight: Weight, derivative: Array, shape: Shape) -> Array:
    """The weight of each term, of which there are so many."""
    if weight.axes is None:
        return weight.sign * derivative
    kept = [i for i in weight.axes if i is not None]
    added = tuple(i for i in range(derivative.ndim) if i not in kept)
    ordered = derivative.transpose((*kept, *added))
    total = ordered.sum(tuple(range(len(kept), ordered.ndim)))
    spread = [1 if i is None else n for i, n in zip(weight.axes, shape, strict=True)]
    return weight.sign * jnp.broadcast_to(total.reshape(spread), shape)


def cotangents(
    targets: Sequence[Target],
    points: Sequence[Point],
    curvature: str,
    samples: int,
    rng: Array | None,
) -> list[Array]:
    """What to inject at each target, of shape (samples, *outputs) each.

    Args:
      targets: from `find_targets`.
      points: the arrays of each.
      curvature: one of `PULLED`.
      samples: how many for a sampled one.
      rng: a key for a sampled one.
    """
    if curvature == "ggn_exact":
        columns = [_columns(target, point) for target, point in zip(targets, points, strict=True)]
        return _apart(columns, [target.batch for target in targets])
    assert rng is not None
    draw = _labels_sampled if curvature == "fisher_mc" else _noise
    drawn = []
    for i, (target, point) in enumerate(zip(targets, points, strict=True)):
        keys = jax.random.split(jax.random.fold_in(rng, i), samples)
        each = jax.vmap(draw(target, point))(keys) / math.sqrt(samples)
        drawn.append(each.astype(point.value.dtype))
    return drawn


def _columns(target: Target, point: Point) -> Array:
    count = math.prod(point.value.shape[axis] for axis in target.alone)
    if count > MOST_COLUMNS:
        warn_of_cost(
            f"`curvature='ggn_exact'` takes {count} columns through the network at the outputs of "
            f"shape {point.value.shape}, each in a backward pass of its own and with arrays of its "
            f"own at every layer. `curvature='ggn_mc'` takes one for each sample, and is the same "
            f"on average."
        )
    root = root_of(target, point)
    dtype = losses.working_dtype(point.value.dtype)
    vectors = losses.unit_vectors(point.value.shape, target.alone, dtype)
    return jax.vmap(root)(vectors).astype(point.value.dtype)


def _apart(columns: Sequence[Array], batches: Sequence[int | None]) -> list[Array]:
    """The columns of several targets one after the other, zeros at the other targets.

    Batches of other sizes have no row in common: their columns are pulled together.
    """
    ends: dict[int | None, int] = {}
    starts = []
    for each, batch in zip(columns, batches, strict=True):
        own = batch if None not in batches else None
        starts.append(ends.get(own, 0))
        ends[own] = starts[-1] + len(each)
    total = max(ends.values(), default=0)
    return [
        jnp.pad(each, [(start, total - start - len(each))] + [(0, 0)] * (each.ndim - 1))
        for each, start in zip(columns, starts, strict=True)
    ]


def _noise(target: Target, point: Point) -> Callable[[Array], Array]:
    root = root_of(target, point)
    dtype = losses.working_dtype(point.value.dtype)
    return lambda key: root(jax.random.rademacher(key, point.value.shape, dtype))


def _labels_sampled(target: Target, point: Point) -> Callable[[Array], Array]:
    """sqrt(w) times the gradient of each term, for labels that the model predicts."""
    assert target.loss is not None
    loss, outputs = target.loss, losses.at_least_float32(by_example(target, point.value))
    if loss.sampler is None:
        loss.sample(jnp.zeros(()), outputs)  # says so
    scale = scale_of(target, point)

    def draw(key: Array) -> Array:
        labels = jax.lax.stop_gradient(loss.sample(key, outputs))
        gradient = jax.grad(lambda z: jnp.sum(loss.function(z, labels)))(outputs)
        scaled = losses.spread(scale, outputs.ndim).astype(gradient.dtype) * gradient
        return _as_given(target, scaled, point.value.shape)

    return draw


def root_of(target: Target, point: Point) -> Callable[[Array], Array]:
    """The product of vectors with the square root of the Hessian of the loss as written."""
    if target.loss is None or target.loss.root is None:
        size = math.prod(point.value.shape[axis] for axis in target.outputs)
        if size > MOST_COLUMNS:
            warn_of_cost(
                f"The Hessian of the loss by the {size} outputs of a row is not known: it takes "
                f"{size} products, and a factorisation of {size} x {size} numbers for each row of "
                f"the outputs of shape {point.value.shape}. Use a loss of `locoprop_jax.losses`, "
                f"or one of your own by `losses.output_loss(root=...)`."
            )
    if target.loss is None:
        assert point.head is not None
        return losses.dense_root(point.head, point.value, target.outputs)
    if target.loss.root is None:
        return losses.dense_root(
            functools.partial(weighted, target, point), point.value, target.outputs
        )
    of_examples, outputs = (
        target.loss.root,
        losses.at_least_float32(by_example(target, point.value)),
    )
    scale = losses.spread(scale_of(target, point), outputs.ndim).astype(outputs.dtype)

    def root(v: Array) -> Array:
        v = by_example(target, v).astype(outputs.dtype)
        return _as_given(target, scale * of_examples(outputs, v), point.value.shape)

    return root


def weighted(target: Target, point: Point, outputs: Array) -> Array:
    """The marked terms of the loss, weighted as it weighs them, by the traced function itself."""
    assert target.call is not None and point.weights is not None
    operands = (outputs, *point.operands[1:])
    terms = jaxpr.run_equation(target.call.jaxpr, target.call.eqn, operands)[0]
    return jnp.sum(jnp.maximum(point.weights, 0) * terms)


def scale_of(target: Target, point: Point) -> Array:
    """The square root of each term's weight, of the shape of the terms."""
    assert point.weights is not None
    scale = jnp.sqrt(jnp.maximum(losses.at_least_float32(point.weights), 0))
    if target.mass_axes is None:
        return scale
    assert target.loss is not None and target.loss.mass is not None
    examples, others = target.mass_axes
    labels = jnp.asarray(point.operands[1])
    labels = labels.transpose([*(i for i in examples if i is not None), *others])
    sizes = iter(labels.shape)
    present = [1 if i is None else next(sizes) for i in examples]
    mass = target.loss.mass(labels.reshape(*present, *sizes)).astype(scale.dtype)
    return scale * jnp.sqrt(jnp.maximum(mass, 0))


def by_example(target: Target, x: Array) -> Array:
    """An array like the outputs, as the known loss takes it."""
    return chains.apply(target.to_terms, x)


def _as_given(target: Target, x: Array, shape: Shape) -> Array:
    return chains.apply(chains.inverse(target.to_terms, shape), x)
