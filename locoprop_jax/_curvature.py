"""Curvature cotangents: what Fisher and Gauss-Newton methods pull back beside the gradient.

At the *target*, the network's outputs as the loss takes them, cotangents C are injected whose
products C'C sum, in expectation, to the Hessian H of the loss as written (mathematics: Curvature):

    fisher_mc         sqrt(w) e       e the gradient of one term for a label that the model predicts
    ggn_mc            H^(1/2) xi      xi = +-1
    ggn_exact         the columns of H^(1/2)

w is the weight of a term in the loss, 1/B in a mean. With a loss of `locoprop_jax.losses` the
target is what it takes, and each call of one is a target; else the target is the output of the one
output layer, and H is taken by Hessian-vector products of the head.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from locoprop_jax import _detect, _jaxpr, _separable, losses
from locoprop_jax._chains import Chain, Shape
from locoprop_jax._jaxpr import Equation, Program
from locoprop_jax._trace import Traced

KINDS = ("fisher_mc", "fisher_empirical", "ggn_mc", "ggn_exact")
SAMPLED = ("fisher_mc", "ggn_mc")
PULLED = ("fisher_mc", "ggn_mc", "ggn_exact")  # by passes of their own

REMEDY = (
    "Write the loss with `locoprop_jax.losses` (such as `losses.softmax_cross_entropy`), or mark "
    "your own loss of each example by `@losses.output_loss(sample=...)`, and only weight, sum and "
    "average its terms"
)


class Target(NamedTuple):
    """Where cotangents are injected.

    Attributes:
      value: the outputs of the network.
      examples: the axes of the outputs along which the Hessian is block-diagonal, in the order of
        the loss terms' axes if the loss is marked.
      outputs: the other axes: those of one block.
      alone: the axes along which exact columns differ: those of one block, and those whose entries
        meet in the network.
      call: of the marked loss; None for the output of a layer.
      loss: the marked loss; None for the output of a layer.
      mass_axes: of the labels, the axes in the order of `examples` (None where it has no such
        axis) and then all others; None unless the loss needs the mass of its labels.
    """

    value: int
    examples: Shape
    outputs: Shape
    alone: Shape
    call: Equation | None = None
    loss: losses.OutputLoss | None = None
    mass_axes: tuple[tuple[int | None, ...], Shape] | None = None

    @property
    def terms(self) -> int:
        """The marked loss's terms."""
        assert self.call is not None
        return self.call.outputs[0]

    @property
    def operands(self) -> tuple[int, ...]:
        """What the marked loss takes; nothing for the output of a layer."""
        return () if self.call is None else self.call.inputs


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


def check_rng(curvature: str, rng: Any) -> None:
    """Refuse a missing key.

    Raises:
      TypeError: there is none.
    """
    if rng is None:
        raise TypeError(
            f"`curvature={curvature!r}` draws random numbers: pass a key as the keyword `rng`, "
            f"`value_grad_and_capture(loss_fn, curvature={curvature!r})(params, batch, "
            f"rng=jax.random.key(0))`, another one at each step. The loss does not get it."
        )


# --- plan ----------------------------------------------------------------------------------------


def plan(
    traced: Traced, curvature: str, names: Sequence[str], to_rows: Sequence[Chain]
) -> tuple[Target, ...]:
    """Find the targets of a traced loss.

    Args:
      traced: the loss.
      curvature: one of `PULLED`.
      names: of the layers, for errors.
      to_rows: of the layers, what brings their outputs to (batch, shared, d_out).

    Raises:
      ValueError: the curvature of this loss cannot be told.
    """
    program, live = traced.program, traced.detection.live
    sites = traced.detection.sites
    if not sites:
        raise ValueError(
            f"`curvature={curvature!r}` found no layer in this loss function: `find_layers` says "
            f"why."
        )
    of_params = _reached(program, live, program.inputs[: traced.n_leaves])
    of_layers = _reached(program, live, [site.output for site in sites])
    marked: dict[int, tuple[Equation, losses.OutputLoss]] = {}
    for call in program.calls:
        loss = losses.find(str(call.params.get("name", "")))
        if loss is not None and program.is_inexact(call.outputs[0]):
            marked.setdefault(call.outputs[0], (call, loss))
    ends = [v for v in _linear_ends(program, of_params, set(marked)) if v in of_layers]
    plain = [v for v in ends if v not in marked]
    found = [marked[v] for v in ends if v in marked]
    if not plain:
        targets = [_marked_target(traced, *each, of_params) for each in found]
    elif curvature == "fisher_mc" or found:
        why = f"the loss reaches the layers' outputs through `{_producer(program, plain[0])}`"
        wish = "samples labels from the distribution that the model predicts"
        wish = wish if curvature == "fisher_mc" else "takes a loss whose terms are all marked"
        raise ValueError(
            f"`curvature={curvature!r}` {wish}, but {why} outside of a marked loss. {REMEDY}."
        )
    else:
        targets = [_layer_target(traced, curvature, plain, names)]
    if curvature == "ggn_exact":
        targets = [_with_columns(traced, target, names, to_rows) for target in targets]
    return tuple(targets)


def _reached(program: Program, live: Sequence[bool], sources: Sequence[int]) -> set[int]:
    """The values that depend on one of `sources` in a way that a gradient sees."""
    reached = set(sources)
    for i, equation in enumerate(program.equations):
        if live[i] and reached.intersection(equation.inputs):
            reached.update(v for v in equation.outputs if program.is_inexact(v))
    return reached


def _producer(program: Program, value: int) -> str:
    position = program.producers.get(value)
    return "a parameter" if position is None else str(program.equations[position].primitive)


def _linear_ends(program: Program, of_params: set[int], stop: set[int]) -> list[int]:
    """The values that the loss is a weighted sum of, the weights free of parameters.

    The loss is followed back through linear equations, up to marked losses and to what is computed
    in another way.
    """
    producers, ends = program.producers, dict[int, None]()
    seen, pending = set(), [program.outputs[0]]
    while pending:
        value = pending.pop()
        if value in seen or value not in of_params:
            continue
        seen.add(value)
        if value in stop or value not in producers:
            ends[value] = None
            continue
        equation = program.equations[producers[value]]
        moving = [v for v in equation.inputs if v in of_params]
        if equation.primitive in _LINEAR:
            pending.extend(moving)
        elif equation.primitive in _jaxpr.MUL | _jaxpr.DOT_GENERAL and len(moving) == 1:
            pending.extend(moving)
        elif equation.primitive in _jaxpr.DIV and equation.inputs[1] not in of_params:
            pending.extend(moving)
        else:
            ends[value] = None
    return list(ends)


_LINEAR = (
    _jaxpr.SUMS
    | _jaxpr.TRANSPOSE
    | _jaxpr.SELECT
    | _jaxpr.SLICE
    | _jaxpr.PAD
    | _jaxpr.CONCATENATE
    | _jaxpr.GATHER
    | _jaxpr.SPLIT
)


def _marked_target(
    traced: Traced, call: Equation, loss: losses.OutputLoss, of_params: set[int]
) -> Target:
    """The target of one call of a marked loss."""
    program = traced.program
    value, terms = call.inputs[0], call.outputs[0]
    if of_params.intersection(call.inputs[1:]):
        raise ValueError(
            f"The labels of {loss!r} depend on the parameters, so its Hessian by the outputs is "
            f"not all of its curvature. Put `jax.lax.stop_gradient` around the labels."
        )
    producer = program.producers.get(terms)
    if producer is not None and program.equations[producer].outputs[0] != terms:
        raise ValueError(
            f"{loss!r} returns a later result of a `{_producer(program, terms)}`, whose weights "
            f"in the loss capture cannot read. Add zero to it."
        )
    followed, _ = _separable.follow(program, terms, traced.detection.live)
    shape, of_terms = program.shape(value), program.shape(terms)
    axes = _axes_of(followed.get(value), shape, of_terms)
    if axes is None or None in axes[0] or loss.output_axes not in (None, len(axes[1])):
        raise ValueError(
            f"Capture cannot tell the examples of {loss!r} apart: its outputs have the shape "
            f"{shape}, its losses {of_terms}, and each of these has to depend on outputs of its "
            f"own. With `jax.vmap`, map over the outputs along their first axis."
        )
    examples, outputs = tuple(i for i in axes[0] if i is not None), axes[1]
    if _batch(traced, value) & set(outputs):
        raise ValueError(
            f"{loss!r} makes one loss of several examples. It has to return the loss of each, of "
            f"the leading shape of its outputs; take sums and means outside."
        )
    mass_axes = None
    if loss.mass is not None:
        labels = call.inputs[1]
        mass_axes = _axes_of(followed.get(labels), program.shape(labels), of_terms)
        if mass_axes is None:
            raise ValueError(f"Capture cannot tell the examples of the labels of {loss!r} apart.")
    return Target(value, examples, outputs, outputs, call, loss, mass_axes)


def _axes_of(
    axes: _separable.Axes | None, shape: Shape, terms: Shape
) -> tuple[tuple[int | None, ...], Shape] | None:
    """The axes of a marked loss's operand that belong to its terms' axes, and all others.

    None stands for an axis of the terms that the operand does not have. Where the loss contains
    what is not understood, its contract decides (the examples come first), unless `jax.vmap` may
    have moved the axes.
    """
    if axes is None:
        return None
    if _separable.is_unknown(axes):
        n = len(terms)
        moved = set(shape[n:]) & {size for size in shape[:n] if size > 1}
        if shape[:n] != terms or moved:
            return None
        return tuple(range(n)), tuple(range(n, len(shape)))
    found: list[int | None] = []
    single = [i for i, axis in enumerate(axes) if not axis]  # of length one
    for place, size in enumerate(terms):
        if size == 1:
            found.append(single.pop(0) if single else None)
            continue
        at = [i for i, axis in enumerate(axes) if [f.label for f in axis] == [place]]
        found.append(at[0] if len(at) == 1 and shape[at[0]] == size else None)
    return tuple(found), tuple(i for i in range(len(shape)) if i not in found)


def _layer_target(
    traced: Traced, curvature: str, ends: Sequence[int], names: Sequence[str]
) -> Target:
    """The output of the one output layer, whose head is not marked."""
    program, detection = traced.program, traced.detection
    heads = sorted(_detect.output_sites(program, detection))
    needs = f"`curvature={curvature!r}` needs the Hessian of the loss by the network's outputs, but"
    if len(heads) != 1:
        listed = ", ".join(names[i] for i in heads)
        raise ValueError(f"{needs} several layers are outputs: {listed}. {REMEDY}.")
    (head,) = heads
    site = detection.sites[head]
    past = _reached_past(traced, site.output)
    if program.outputs[0] in past:
        raise ValueError(
            f"{needs} the loss also depends on a layer in a way that does not pass through "
            f"{names[head]}, its last. {REMEDY}."
        )
    followed = [_separable.follow(program, end, detection.live)[0] for end in ends]
    found = [env[site.output] for env in followed if site.output in env]
    examples = tuple(
        i
        for i in range(len(program.shape(site.output)))
        if all(_is_separate(axes[i]) for axes in found)
    )
    outputs = tuple(i for i in range(len(program.shape(site.output))) if i not in examples)
    mixed = _batch(traced, site.output) & set(outputs)
    if mixed:
        raise ValueError(
            f"{needs} capture cannot tell that the examples do not meet between the layer "
            f"{names[head]} and the loss, so the Hessian may not be one block per example. "
            f"{REMEDY}."
        )
    return Target(site.output, examples, outputs, outputs)


def _is_separate(axis: _separable.Axis) -> bool:
    return all(f.label is not None and f.label != _separable.UNKNOWN for f in axis)


def _reached_past(traced: Traced, output: int) -> set[int]:
    """What the other layers reach without passing through a layer's output."""
    program, live = traced.program, traced.detection.live
    reached = {s.output for s in traced.detection.sites if s.output != output}
    for i, equation in enumerate(program.equations):
        passes = live[i] and output not in equation.outputs
        if passes and reached.intersection(equation.inputs):
            reached.update(v for v in equation.outputs if program.is_inexact(v))
    return reached


def _batch(traced: Traced, value: int) -> set[int]:
    """The batch axes of a value that are longer than one."""
    if traced.batch_axes is None:
        return set()
    return {i for i in traced.batch_axes[value] if traced.program.shape(value)[i] > 1}


def joins_positions(traced: Traced, targets: Sequence[Target]) -> bool:
    """Whether an exact column has entries at several positions of one example."""
    if traced.batch_axes is None:
        return False
    return any(
        traced.program.shape(target.value)[i] > 1
        for target in targets
        for i in target.examples
        if i not in target.alone and i not in traced.batch_axes[target.value]
    )


def _with_columns(
    traced: Traced, target: Target, names: Sequence[str], to_rows: Sequence[Chain]
) -> Target:
    """Along which axes of a target exact columns have to stand alone.

    One pull serves all the examples at once where no row of a layer reaches two of them.
    """
    program, sites = traced.program, traced.detection.sites
    followed, lost = _separable.follow(program, target.value, traced.detection.live)
    meeting: dict[int, str] = {}
    for site, name, chain in zip(sites, names, to_rows, strict=True):
        if site.output in followed:
            batch, shared, _ = _separable.rearranged(chain, followed[site.output])
            labels = _separable.labels((batch, shared))
            for axis in target.examples:
                if program.shape(target.value)[axis] > 1 and axis not in labels:
                    meeting.setdefault(axis, name)
    mixed = sorted(_batch(traced, target.value) & set(meeting))
    if mixed:
        axis = mixed[0]
        of_layers = _reached(program, traced.detection.live, [site.output for site in sites])
        through = [primitive for value, primitive in lost.get(axis, []) if value in of_layers]
        by = f" (at a `{through[0]}`)" if through else ""
        raise ValueError(
            f"`curvature='ggn_exact'` needs examples that do not meet in the network, but the "
            f"outputs of {meeting[axis]} reach the losses of other examples{by}: batch "
            f"normalisation in training mode does this. Use `curvature='ggn_mc'`, which stays "
            f"unbiased."
        )
    alone = tuple(sorted({*target.outputs, *meeting}))
    return target._replace(alone=alone)


# --- cotangents ----------------------------------------------------------------------------------


class Point(NamedTuple):
    """A target's arrays.

    Attributes:
      value: the outputs of the network.
      operands: of the marked loss's call; none for the output of a layer.
      weights: the derivative of the loss by the marked loss's terms; None for a layer.
      head: the loss as a function of the outputs; None for a marked loss.
    """

    value: Array
    operands: tuple[Any, ...] = ()
    weights: Array | None = None
    head: Callable[[Array], Array] | None = None


def cotangents(
    targets: Sequence[Target],
    points: Sequence[Point],
    curvature: str,
    samples: int,
    rng: Array | None,
) -> list[Array]:
    """What to inject at each target, of shape (samples, *outputs) each.

    Args:
      targets: from `plan`.
      points: the arrays of each.
      curvature: one of `PULLED`.
      samples: how many for a sampled one.
      rng: a key for a sampled one.
    """
    if curvature == "ggn_exact":
        columns = [_columns(target, point) for target, point in zip(targets, points, strict=True)]
        return _apart(columns)
    assert rng is not None
    draw = _labels_sampled if curvature == "fisher_mc" else _noise
    drawn = []
    for i, (target, point) in enumerate(zip(targets, points, strict=True)):
        keys = jax.random.split(jax.random.fold_in(rng, i), samples)
        each = jax.vmap(draw(target, point))(keys) / math.sqrt(samples)
        drawn.append(each.astype(point.value.dtype))
    return drawn


def _columns(target: Target, point: Point) -> Array:
    root = _root(target, point)
    dtype = losses.working_dtype(point.value.dtype)
    vectors = losses.unit_vectors(point.value.shape, target.alone, dtype)
    return jax.vmap(root)(vectors).astype(point.value.dtype)


def _apart(columns: Sequence[Array]) -> list[Array]:
    """The columns of several targets one after the other, zeros at the other targets."""
    total, start, result = sum(len(c) for c in columns), 0, []
    for each in columns:
        ends = (start, total - start - len(each))
        result.append(jnp.pad(each, [ends] + [(0, 0)] * (each.ndim - 1)))
        start += len(each)
    return result


def _noise(target: Target, point: Point) -> Callable[[Array], Array]:
    root = _root(target, point)
    dtype = losses.working_dtype(point.value.dtype)
    return lambda key: root(jax.random.rademacher(key, point.value.shape, dtype))


def _labels_sampled(target: Target, point: Point) -> Callable[[Array], Array]:
    """sqrt(w) times the gradient of each term, for labels that the model predicts."""
    assert target.loss is not None
    loss, outputs = target.loss, losses.at_least_float32(_by_example(target, point.value))
    if loss.sampler is None:
        loss.sample(jnp.zeros(()), outputs)  # says so
    scale = _scale(target, point)

    def draw(key: Array) -> Array:
        labels = jax.lax.stop_gradient(loss.sample(key, outputs))
        gradient = jax.grad(lambda z: jnp.sum(loss.function(z, labels)))(outputs)
        return _as_given(
            target, losses.spread(scale, outputs.ndim).astype(gradient.dtype) * gradient
        )

    return draw


def _root(target: Target, point: Point) -> Callable[[Array], Array]:
    """The product of vectors with the square root of the Hessian of the loss as written."""
    if target.loss is None:
        assert point.head is not None
        return losses.dense_root(point.head, point.value, target.outputs)
    if target.loss.root is None:
        return losses.dense_root(
            functools.partial(_weighted, target, point), point.value, target.outputs
        )
    of_examples, outputs = (
        target.loss.root,
        losses.at_least_float32(_by_example(target, point.value)),
    )
    scale = losses.spread(_scale(target, point), outputs.ndim).astype(outputs.dtype)

    def root(v: Array) -> Array:
        v = _by_example(target, v).astype(outputs.dtype)
        return _as_given(target, scale * of_examples(outputs, v))

    return root


def _weighted(target: Target, point: Point, outputs: Array) -> Array:
    """The marked terms of the loss, weighted as it weighs them, by the traced function itself."""
    assert target.call is not None and point.weights is not None
    operands = (outputs, *point.operands[1:])
    terms = _jaxpr.run_equation(target.call.jaxpr, target.call.eqn, operands)[0]
    return jnp.sum(jnp.maximum(point.weights, 0) * terms)


def _scale(target: Target, point: Point) -> Array:
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


def _by_example(target: Target, x: Array) -> Array:
    return x.transpose((*target.examples, *target.outputs))


def _as_given(target: Target, x: Array) -> Array:
    order = (*target.examples, *target.outputs)
    return x.transpose([order.index(i) for i in range(len(order))])
