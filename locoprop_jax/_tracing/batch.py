"""Which axes of each value count the examples of the batch.

Layers need only rows, and an equation shows these. Which of them belong to one example matters to
few methods. It follows from where axes come from and where they end: the batch is an axis of the
data and of the rows of layers, the loss sums over it at its end, and nothing mixes its places
before. Batch normalisation does; then the first axes of the arguments decide. A loss of several
batches (points inside and at the boundary) has an axis of each, if no value has two of them.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

from locoprop_jax._tracing import primitives
from locoprop_jax._tracing.axes import NamedAxes
from locoprop_jax._tracing.chains import Shape
from locoprop_jax._tracing.detect import Detection
from locoprop_jax._tracing.flow import reached_from
from locoprop_jax._tracing.program import Program
from locoprop_jax._tracing.sites import raw_output


def batch_axes(program: Program, n_leaves: int, detection: Detection) -> list[Shape] | None:
    """For each value the axes that count examples; None where no axis can be told to do so.

    Args:
      program: the loss, its parameter leaves the first inputs.
      n_leaves: how many inputs are parameters.
      detection: the layers found in it.
    """
    mixing, sums = _mixing(program, n_leaves, detection)
    axes = NamedAxes(program, mixing)
    batches = _batches(program, n_leaves, detection, axes, sums)
    if not batches:
        return None
    known = axes.values
    return [
        tuple(i for i, axis in enumerate(axes(v)) if batches.intersection(axis))
        if v in known
        else ()
        for v in range(len(program.avals))
    ]


def _mixing(
    program: Program, n_leaves: int, detection: Detection
) -> tuple[dict[int, bool], list[int]]:
    """Which equations mix examples if they sum over them; the sums at the end of the loss do not.

    Nor does what no gradient flows through, or no parameter.
    """
    of_params = reached_from(program, program.inputs[:n_leaves])
    mixing: dict[int, bool] = {}
    sums: list[int] = []
    for i, equation in enumerate(program.equations):
        is_term = any(v in detection.terms for v in equation.outputs)
        is_sum = is_term and equation.primitive in primitives.REDUCE_SUM
        moves = detection.live[i] and not of_params.isdisjoint(equation.inputs)
        mixing[i] = moves and not is_sum
        if is_sum:
            sums.append(i)
    return mixing, sums


def _batches(
    program: Program, n_leaves: int, detection: Detection, axes: NamedAxes, sums: Sequence[int]
) -> set[int]:
    """The names of the batch's axis, and of those of further batches."""
    rows: set[int] = set()
    for site in detection.sites:
        raw = axes(raw_output(site))
        rows.update(name for i in site.row_axes for name in raw[i])
    summed = {
        name
        for i in sums
        for axis in program.equations[i].params["axes"]
        for name in axes(program.equations[i].inputs[0])[axis]
    }
    first: collections.Counter[int] = collections.Counter()
    anywhere: collections.Counter[int] = collections.Counter()
    of_constants: collections.Counter[int] = collections.Counter()
    order: dict[int, int] = {}
    arguments = program.inputs[n_leaves:]
    for value in (*arguments, *(v for v in program.constants if v not in program.literals)):
        own = axes(value)
        if not own or not program.is_data(value):
            continue
        for name in (name for axis in own for name in axis):
            order.setdefault(name, len(order))
            anywhere[name] += 1
        counted = first if value in arguments else of_constants
        counted[own[0][0]] += 1
    mixed = axes.names.mixed
    origins = {name: axes.names.origins(name) & order.keys() for name in rows}

    def is_apart(name: int) -> bool:
        return name not in mixed and name in summed

    def rank(name: int) -> tuple:
        counts = [sum(count[n] for n in origins[name]) for count in (first, anywhere, of_constants)]
        return is_apart(name), *counts, -min(order[n] for n in origins[name])

    ranked = sorted((name for name in rows if origins[name]), key=rank, reverse=True)
    chosen = set(ranked[:1])
    others = [name for name in ranked[1:] if axes.names.sizes[name] > 1]
    if others and all(map(is_apart, chosen)):
        together = _together(axes, rows)
        for name in filter(is_apart, others):
            if chosen.isdisjoint(together[name]):
                chosen.add(name)
    return chosen


def _together(axes: NamedAxes, names: set[int]) -> dict[int, set[int]]:
    """By each of some names, those that are beside it in some value."""
    found: dict[int, set[int]] = {name: set() for name in names}
    for value in axes.values:
        beside = names.intersection(name for axis in axes(value) for name in axis)
        for name in beside:
            found[name] |= beside
    return found
