"""Where a loss stops being linear: its ends, and the outputs that each of them is made of.

A loss is a weighted sum of its *ends*, which are computed from the network's outputs in some other
way; whatever enters it linearly (the logit of the label) has no second derivative. Two outputs
*meet* where one end is made of both otherwise than by a linear map: only there can the loss have a
second derivative by one and by the other.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax

from locoprop_jax._tracing import primitives, separable
from locoprop_jax._tracing.flow import reached_live
from locoprop_jax._tracing.heads import Cut, as_struct, other_params
from locoprop_jax._tracing.program import Program
from locoprop_jax._tracing.trace import Traced

_LINEAR = (
    primitives.SUMS
    | primitives.TRANSPOSE
    | primitives.SELECT
    | primitives.SLICE
    | primitives.PAD
    | primitives.CONCATENATE
    | primitives.GATHER
    | primitives.SPLIT
    | primitives.REVERSE
    | primitives.CUMSUM
    | primitives.STACK
)


class Linear(NamedTuple):
    """What a value is a weighted sum of.

    Attributes:
      ends: the values it is made of, the weights free of what moves.
      passed: these and all sums on the way.
    """

    ends: list[int]
    passed: frozenset[int]


def linear(
    program: Program,
    value: int,
    moving: Collection[int],
    stop: Collection[int] = (),
    kinks: bool = True,
) -> Linear:
    """Follow a value back through linear equations.

    It ends at `stop`, and at what is computed in another way.

    Args:
      program: the program.
      value: where to begin.
      moving: the values that are followed; all others count as constants.
      stop: where to end in any case.
      kinks: whether what is linear but for kinks (absolute values, maxima) counts as linear: it has
        no second derivative nearly everywhere.
    """
    producers, ends = program.producers, dict[int, None]()
    seen, pending = set[int](), [value]
    while pending:
        value = pending.pop()
        if value in seen or value not in moving:
            continue
        seen.add(value)
        if value in stop or value not in producers:
            ends[value] = None
            continue
        equation = program.equations[producers[value]]
        own = [v for v in equation.inputs if v in moving]
        is_factor = equation.primitive in primitives.MUL | primitives.DOT_GENERAL and len(own) == 1
        is_divided = equation.primitive in primitives.DIV and equation.inputs[1] not in moving
        is_linear = equation.primitive in (_LINEAR | primitives.PIECEWISE if kinks else _LINEAR)
        if is_linear or is_factor or is_divided:
            pending.extend(own)
        else:
            ends[value] = None
    return Linear(list(ends), frozenset(seen))


def sources(
    program: Program, end: int, moving: Collection[int], outputs: Collection[int]
) -> tuple[set[int], list[int]]:
    """The outputs that an end is made of, and the values that all of them pass on the way.

    Args:
      program: the program.
      end: of the loss.
      moving: the values that depend on outputs.
      outputs: what the layers put out; what they are made of in turn does not count.

    Returns:
      The outputs; and the values before the end through which every way from them to it leads, the
      one nearest to the outputs last.
    """
    producers, found, passed, whole = program.producers, set[int](), list[int](), True
    pending = {end}
    while pending:
        value = max(pending, key=lambda v: (producers.get(v, -1), v))
        pending.remove(value)
        # The equation may have another result that is yet to be followed.
        if whole and not pending and value != end:
            passed.append(value)
        if value in outputs or value not in producers:
            found.add(value)
            whole = False
            continue
        pending.update(v for v in program.equations[producers[value]].inputs if v in moving)
    return found, passed


def network_output(
    program: Program, end: int, moving: Collection[int], outputs: Collection[int]
) -> tuple[int | None, set[int]]:
    """The value at which the network that leads to an end becomes the loss.

    It is the one output that the end is made of, or a linear map of several that the end sees
    nothing else of, such as their sum.

    Returns:
      The value, None where several outputs meet; and the outputs.
    """
    if end in outputs:
        return end, {end}
    found, passed = sources(program, end, moving, outputs)
    if not passed or not is_linear(program, passed[-1], moving, outputs):
        return None, found
    return passed[-1], found


def is_linear(
    program: Program, value: int, moving: Collection[int], outputs: Collection[int]
) -> bool:
    """Whether a value is a linear map of outputs."""
    return set(linear(program, value, moving, outputs, kinks=False).ends) <= set(outputs)


def axes_between(program: Program, live: Sequence[bool], value: int, end: int) -> separable.Axes:
    """The axes of a value, as those of a later one that is made of it (`separable.follow`)."""
    between = reached_live(program, live, [value])
    use = [
        is_live and not between.isdisjoint(equation.inputs)
        for is_live, equation in zip(live, program.equations, strict=True)
    ]
    return separable.follow(program, end, use)[0][value]


def head(traced: Traced, source: int, ends: Sequence[int], others: Sequence[int]) -> Cut:
    """The loss as a function of a value, as far as it depends on that by some of its ends.

    Other ends, and what else enters that is computed from parameters, are held fixed.

    Args:
      traced: the loss.
      source: the value.
      ends: those that move.
      others: those that do not.
    """
    program = traced.program
    loss, held = program.outputs[0], [*ends, *others]
    tail, free = program.slice([*held, *other_params(traced, held, loss)], loss)
    parts = []
    for end in ends:
        equations, more = program.slice([source, *other_params(traced, [source], end)], end)
        parts.append(equations)
        free = [*free, *more]
    free = [v for v in dict.fromkeys(free) if v != source and v not in ends]

    def function(value: Any, *values: Any) -> Any:
        known = {source: value, **dict(zip(free, values, strict=True))}
        moved = [program.call(part, known, end) for part, end in zip(parts, ends, strict=True)]
        return program.call(tail, {**known, **dict(zip(ends, moved, strict=True))}, loss)

    avals = [program.avals[v] for v in (source, *free)]
    return Cut(jax.make_jaxpr(function)(*map(as_struct, avals)), free)
