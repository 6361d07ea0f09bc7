"""Where curvature cotangents are injected into a traced loss: at its targets.

Each call of a loss of `locoprop_jax.losses` is a target, what it takes; what else the loss is made
of has targets as `unmarked` finds them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from locoprop_jax import losses
from locoprop_jax._capture import unmarked
from locoprop_jax._capture.recognise import Reader
from locoprop_jax._capture.target import KINDS, PULLED, REMEDY, Target, Weight, asker, batch_of
from locoprop_jax._tracing import ends, separable
from locoprop_jax._tracing.chains import Chain, Shape
from locoprop_jax._tracing.flow import reached_from, reached_live
from locoprop_jax._tracing.program import Equation, Program
from locoprop_jax._tracing.sites import Site, raw_output
from locoprop_jax._tracing.trace import Traced
from locoprop_jax._trees import is_complex


def find_targets(
    traced: Traced, curvature: str, names: Sequence[str], to_rows: Sequence[Chain]
) -> tuple[Target, ...]:
    """Find the targets of a traced loss.

    Args:
      traced: the loss.
      curvature: which; one that needs targets, or the name of a method that takes products with
        the Hessian, for which examples may meet in the head.
      names: of the layers, for errors.
      to_rows: of the layers, what brings their outputs to (batch, shared, d_out).

    Raises:
      ValueError: the curvature of this loss cannot be told.
    """
    program, live = traced.program, traced.detection.live
    sites = traced.detection.sites
    of_params = reached_live(program, live, program.inputs[: traced.n_leaves])
    outputs, of_layers = {v for site in sites for v in site.outside}, _of_layers(traced)
    marked = _marked_calls(program)
    found = _ends(traced, of_layers, outputs, marked)
    reader = Reader(program, live, of_layers, found.outputs, found.passed)
    known = unmarked.known(traced, found.unmarked, reader)
    if known:  # what they take is the network's outputs, whatever made it
        taken = found.outputs | {each.value for each in known.values()}
        found = _ends(traced, of_layers, taken, marked)
    plain = [end for end in found.unmarked if end not in known]
    if not sites and (plain or curvature in KINDS):
        why = "`find_layers` says why"
        if traced.batch_axes is None:
            why += ", given the batch as an argument. Scales are layers only where it is known"
        raise ValueError(f"{asker(curvature)} found no layer in this loss function: {why}.")
    if plain and curvature == "fisher_mc":
        raise ValueError(
            f"{asker(curvature)} samples labels from the distribution that the model predicts, but "
            f"the loss reaches the layers' outputs through `{_producer(program, plain[0])}` "
            f"outside of a marked loss. {REMEDY}."
        )
    targets = [_marked_target(traced, *marked[v], of_params) for v in found.marked]
    targets += unmarked.known_targets(traced, known)
    held = [*found.marked, *known]
    targets += unmarked.head_targets(traced, curvature, plain, held, of_layers, names)
    if any(is_complex(program.avals[target.value].dtype) for target in targets):
        raise ValueError(
            f"{asker(curvature)} needs real outputs of the network, but the loss takes complex "
            f"ones. Hand a loss of `locoprop_jax.losses`, or one marked by `@losses.output_loss`, "
            f"their real and imaginary parts: `jnp.concatenate([z.real, z.imag], -1)`."
        )
    if curvature in PULLED and to_rows:  # products of the whole network need no layers
        targets = [t._replace(batch=_examples(traced, t, to_rows)) for t in targets]
    if curvature == "ggn_exact":
        targets = [_with_columns(traced, target, names, to_rows) for target in targets]
    return tuple(targets)


def is_non_negative(traced: Traced, targets: Sequence[Target]) -> bool:
    """Whether a loss is made of marked losses that are never negative, and of nothing else."""
    if any(t.call is None or t.loss not in losses.NON_NEGATIVE for t in targets):
        return False
    terms = {v for target in targets for v in target.weighing}
    of_layers = _of_layers(traced)
    found = ends.linear(traced.program, traced.program.outputs[0], of_layers, terms, kinks=False)
    return terms.issuperset(found.ends)


def _of_layers(traced: Traced) -> set[int]:
    """What depends on outputs of layers; on parameters, where there are no layers.

    Products need none where the loss says what the outputs are.
    """
    program, sites = traced.program, traced.detection.sites
    outputs = [v for site in sites for v in site.outside]
    start = outputs if sites else program.inputs[: traced.n_leaves]
    return reached_live(program, traced.detection.live, start)


Marked = tuple[Equation, losses.OutputLoss]


def _marked_calls(program: Program) -> dict[int, Marked]:
    """The calls of marked losses, by their terms."""
    found: dict[int, Marked] = {}
    for call in program.calls:
        loss = losses.find(str(call.params.get("name", "")))
        if loss is not None and program.is_inexact(call.outputs[0]):
            found.setdefault(call.outputs[0], (call, loss))
    return found


class _Ends(NamedTuple):
    """What a loss is a weighted sum of.

    Attributes:
      passed: what is linear on the way.
      unmarked: its ends but for marked terms.
      marked: these.
      outputs: the layers' outputs that are the network's.
    """

    passed: frozenset[int]
    unmarked: list[int]
    marked: list[int]
    outputs: set[int]


def _ends(traced: Traced, moving: set[int], outputs: set[int], marked: Collection[int]) -> _Ends:
    """Follow a loss back to where it stops being linear.

    Penalties on parameters alone are no end, not even where these are layers at their own value.
    Marked terms of which another end is made are no weighted terms, and followed like any others.
    A scale that the loss is linear in is the weight of what it scales, and no output. Of a loss
    without second derivatives all ends are given, so that its curvature is zero.
    """
    program, loss = traced.program, traced.program.outputs[0]
    sites = traced.detection.sites
    scales = {v for site in sites if site.kind in ("scale", "bias") for v in site.outside}
    terms = set(marked)
    while True:
        found = ends.linear(program, loss, moving, terms | outputs)
        read = {v for v in found.ends if unmarked.is_read(traced, v, found.ends)}
        weights = scales.intersection(found.ends, outputs) - read
        if not (weights or terms & read):
            break
        terms, outputs = terms - read, outputs - weights
    # A loss without layers may be of no data at all, which is an error that says so.
    start = program.others(traced.n_leaves) if sites else program.inputs
    of_data = reached_from(program, filter(program.is_data, start))
    curved = [v for v in found.ends if v not in outputs and v in of_data]
    if not curved:
        smooth = ends.linear(program, loss, moving, outputs, kinks=False).ends
        curved = [v for v in smooth if v in of_data]
    rest = [v for v in curved if v not in terms]
    return _Ends(found.passed, rest, [v for v in curved if v in terms], outputs)


def _producer(program: Program, value: int) -> str:
    position = program.producers.get(value)
    return "a parameter" if position is None else str(program.equations[position].primitive)


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
    followed, _ = separable.follow(program, terms, traced.detection.live)
    shape, of_terms = program.shape(value), program.shape(terms)
    axes = _axes_of(followed.get(value), shape, of_terms)
    if axes is None or None in axes[0] or loss.output_axes not in (None, len(axes[1])):
        raise ValueError(
            f"Capture cannot tell the examples of {loss!r} apart: its outputs have the shape "
            f"{shape}, its losses {of_terms}, and each of these has to depend on outputs of its "
            f"own. With `jax.vmap`, map over the outputs along their first axis."
        )
    examples, outputs = tuple(i for i in axes[0] if i is not None), axes[1]
    if batch_of(traced, value) & set(outputs):
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
    return Target(
        value,
        examples,
        outputs,
        outputs,
        loss=loss,
        to_terms=(("transpose", (*examples, *outputs)),),
        weights=(Weight(terms),),
        call=call,
        mass_axes=mass_axes,
    )


def _axes_of(
    axes: separable.Axes | None, shape: Shape, terms: Shape
) -> tuple[tuple[int | None, ...], Shape] | None:
    """The axes of a marked loss's operand that belong to its terms' axes, and all others.

    None stands for an axis of the terms that the operand does not have. Where the loss contains
    what is not understood, its contract decides (the examples come first), unless `jax.vmap` may
    have moved the axes.
    """
    if axes is None:
        return None
    if separable.is_unknown(axes):
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


def _constant(
    traced: Traced, names: Sequence[str], followed: Mapping[int, separable.Axes]
) -> str | None:
    """A layer that has a use without an axis of examples; None if there is none."""
    for site, name in zip(traced.detection.sites, names, strict=True):
        if _is_constant(traced, site) and not followed.keys().isdisjoint(site.outside):
            return name
    return None


def _is_constant(traced: Traced, site: Site) -> bool:
    """Whether a use has no axis of examples: each of its rows may be of all of them."""
    return traced.batch_axes is not None and not traced.batch_axes[raw_output(site)]


def _examples(traced: Traced, target: Target, to_rows: Sequence[Chain]) -> int | None:
    """How many examples a target has, if each reaches outputs of its own; else None."""
    followed, _ = separable.follow(traced.program, target.value, traced.detection.live)
    batches = set()
    for site, chain in zip(traced.detection.sites, to_rows, strict=True):
        if site.output in followed:
            if site.loops:
                return None
            *_, batch, _, _ = separable.rearranged(chain, followed[site.output])
            batches.add(batch)
    if len(batches) != 1 or not separable.is_separate(next(iter(batches))):
        return None
    return math.prod(factor.size for factor in batches.pop())


def _with_columns(
    traced: Traced, target: Target, names: Sequence[str], to_rows: Sequence[Chain]
) -> Target:
    """Along which axes of a target exact columns have to stand alone.

    One pull serves all the examples at once where no row of a layer reaches two of them.
    """
    program, sites = traced.program, traced.detection.sites
    followed, lost = separable.follow(program, target.value, traced.detection.live)
    meeting: dict[int, str] = {}
    of_positions: set[int | None] = set()
    growing = batch_of(traced, target.value)
    others = [axis for axis in target.examples if axis not in growing]
    for i, (site, name, chain) in enumerate(zip(sites, names, to_rows, strict=True)):
        if site.loops:  # which are not looked into: positions may meet there
            lost_here = target.examples if _is_constant(traced, site) else others
            meeting.update((axis, name) for axis in lost_here)
        if site.output in followed:
            *_, batch, shared, _ = separable.rearranged(chain, followed[site.output])
            # What a transposed use makes of a column is a sum over positions.
            is_turned = i in traced.detection.transposed
            labels = separable.labels((batch,) if is_turned else (batch, shared))
            of_positions.update(factor.axis for factor in shared)
            for axis in target.examples:
                if program.shape(target.value)[axis] > 1 and axis not in labels:
                    meeting.setdefault(axis, name)
    mixed = sorted(growing & set(meeting))
    if mixed and (name := _constant(traced, names, followed)) is not None:
        raise ValueError(
            f"`curvature='ggn_exact'` needs rows of each example, but {name} is applied to what "
            f"is the same for all examples, as in a derivative along a fixed direction under "
            f"`jax.vmap`. Differentiate the network of the whole batch instead, along a tangent as "
            f"large as its inputs: `jax.jvp(f, (x,), (jnp.broadcast_to(v, x.shape),))`; or use "
            f"`curvature='ggn_mc'`."
        )
    if mixed:
        axis = mixed[0]
        outputs = [v for site in sites for v in site.outside]
        of_layers = reached_live(program, traced.detection.live, outputs)
        through = [primitive for value, primitive in lost.get(axis, []) if value in of_layers]
        by = f" (at a `{through[0]}`)" if through else ""
        raise ValueError(
            f"`curvature='ggn_exact'` needs examples that do not meet in the network, but the "
            f"outputs of {meeting[axis]} reach the losses of other examples{by}: batch "
            f"normalisation in training mode does this, and so do positions that meet, if they "
            f"are joined with the examples before the loss. Use `curvature='ggn_mc'`, which stays "
            f"unbiased, or keep them on an axis of their own."
        )
    alone = tuple(sorted({*target.outputs, *meeting}))
    joins = not of_positions.isdisjoint(set(target.examples).difference(alone))
    return target._replace(alone=alone, joins_positions=joins)
