"""Which entries of a value reach which entries of a later one.

A Hessian is block-diagonal over examples, and columns of its root can be pulled back for all
examples at once, only where no example meets another. `follow` reads that off a `Program`: it goes
backward from a value whose axes are named, and names an axis of an earlier value where its entry
number t reaches only the entries of the same number along the axis of that name.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from locoprop_jax._tracing import jaxpr, primitives
from locoprop_jax._tracing.chains import Chain, Shape
from locoprop_jax._tracing.program import Equation, Program, flatten

UNKNOWN = -1  # an axis behind an equation that is not understood


class Part(NamedTuple):
    """A part of an axis of the target, which a reshape there merged from others.

    Attributes:
      axis: of the target.
      whole: how long that is.
      stride: how far apart along it two neighbours are.
      size: how many there are.
    """

    axis: int
    whole: int
    stride: int
    size: int


class Factor(NamedTuple):
    """A part of an axis: an axis that a reshape merged from others has several.

    Attributes:
      size: how long it is, never one.
      label: the axis of the target that it runs along, or the part of one; None if its entries
        reach several or all entries along every axis, `UNKNOWN` if that cannot be told.
    """

    size: int
    label: int | Part | None

    @property
    def axis(self) -> int | None:
        """That of the target."""
        label = self.label.axis if isinstance(self.label, Part) else self.label
        return None if label == UNKNOWN else label


Axis = tuple[Factor, ...]  # none for an axis of length one
Axes = tuple[Axis, ...]


def labels(axes: Axes) -> set[int]:
    """The axes of the target that some axis runs along, or several with their parts."""
    parts: dict[int, set[Part]] = {}
    found = set()
    for factor in (factor for axis in axes for factor in axis):
        if isinstance(factor.label, Part):
            parts.setdefault(factor.label.axis, set()).add(factor.label)
        elif factor.axis is not None:
            found.add(factor.axis)
    for axis, own in parts.items():
        if math.prod(part.size for part in own) == next(iter(own)).whole:
            found.add(axis)
    return found


def is_unknown(axes: Axes) -> bool:
    return any(factor.label == UNKNOWN for axis in axes for factor in axis)


def is_separate(axis: Axis) -> bool:
    """Whether each entry along an axis reaches entries of its own along one of the target's."""
    return all(factor.axis is not None for factor in axis)


def rearranged(chain: Chain, axes: Axes) -> Axes:
    """The axes of a value after a chain of transpositions and reshapes."""
    for step, argument in chain:
        if step == "transpose":
            axes = tuple(axes[i] for i in argument)
        else:
            axes = _regroup([factor for axis in axes for factor in axis], argument)
    return axes


def follow(
    program: Program, target: int, use: Sequence[bool] | None = None
) -> tuple[dict[int, Axes], dict[int, list[tuple[int, str]]]]:
    """Go backward from a value, each axis of which is its own label.

    Args:
      program: the program.
      target: the value.
      use: which equations to follow; None for all.

    Returns:
      The axes of each value that reaches the target; and for each axis of the target, the values
      whose equation lost it, with that equation's primitive.
    """
    return _walk(program, {target: own_axes(program.shape(target))}, use)


def own_axes(shape: Shape) -> Axes:
    """The axes of a value of this shape, each its own label."""
    return tuple(_axis(size, i) for i, size in enumerate(shape))


def _walk(
    program: Program, env: dict[int, Axes], use: Sequence[bool] | None
) -> tuple[dict[int, Axes], dict[int, list[tuple[int, str]]]]:
    env = dict(env)
    lost: dict[int, list[tuple[int, str]]] = {}
    for i in reversed(range(len(program.equations))):
        equation = program.equations[i]
        reached = [v in env for v in equation.outputs]
        if not any(reached) or (use is not None and not use[i]):
            continue
        after = set().union(*(labels(env[v]) for v in equation.outputs if v in env))
        for value, axes in zip(equation.inputs, _operands(program, equation, env), strict=True):
            if axes is None or not program.is_inexact(value):
                continue
            for label in after - labels(axes):
                lost.setdefault(label, []).append((value, str(equation.primitive)))
            env[value] = _merge(env[value], axes) if value in env else axes
    return env, lost


def _axis(size: int, label: int | None) -> Axis:
    return () if size == 1 else (Factor(size, label),)


def _all(shape: Shape, label: int | None) -> Axes:
    return tuple(_axis(size, label) for size in shape)


def _merge(a: Axes, b: Axes) -> Axes:
    """The axes of a value with two uses."""

    def both(x: int | Part | None, y: int | Part | None) -> int | Part | None:
        if x == y:
            return x
        return None if x is None or y is None or UNKNOWN not in (x, y) else UNKNOWN

    def axis(x: Axis, y: Axis) -> Axis:
        if [f.size for f in x] == [f.size for f in y]:
            return tuple(Factor(f.size, both(f.label, g.label)) for f, g in zip(x, y, strict=True))
        return _axis(math.prod(f.size for f in x), None)

    return tuple(axis(x, y) for x, y in zip(a, b, strict=True))


def _operands(program: Program, equation: Equation, env: dict[int, Axes]) -> list[Axes | None]:
    """The axes of each operand, as this equation's results see them; None if they do not."""
    shapes = [program.shape(v) for v in equation.inputs]
    primitive, params = equation.primitive, equation.params
    if primitive in primitives.CUSTOM:
        return _inside(equation, env) or [_all(shape, UNKNOWN) for shape in shapes]
    if primitive in primitives.SPLIT:
        parts = [v for v in equation.outputs if v in env]
        kept = {i: i for i in range(len(shapes[0])) if i != params["axis"]}
        uses = [_kept(shapes[0], env[v], kept) for v in parts]
        return [functools.reduce(_merge, uses)]
    if len(equation.outputs) != 1:
        return [_all(shape, UNKNOWN) for shape in shapes]
    after, result = env[equation.outputs[0]], program.shape(equation.outputs[0])
    if jaxpr.is_elementwise(equation.eqn):
        return [_aligned(shape, result, after, range(len(shape))) for shape in shapes]
    if primitive in primitives.RESHAPE:
        order = primitives.order_read(equation) or range(len(shapes[0]))
        read = _regroup([f for axis in after for f in axis], tuple(shapes[0][i] for i in order))
        return [tuple(read[order.index(axis)] for axis in range(len(order)))]
    if primitive in primitives.TRANSPOSE:
        kept = {source: i for i, source in enumerate(params["permutation"])}
    elif primitive in primitives.BROADCAST:
        kept = dict(enumerate(params["broadcast_dimensions"]))
        return [_aligned(shapes[0], result, after, kept.values()), *[None] * (len(shapes) - 1)]
    elif primitive in primitives.REDUCE:
        left = [i for i in range(len(shapes[0])) if i not in params["axes"]]
        kept = {source: i for i, source in enumerate(left)}
    elif primitive in primitives.DOT_GENERAL:
        return _of_dot(shapes, params["dimension_numbers"], after)
    elif primitive in primitives.CONVOLUTION and params["batch_group_count"] == 1:
        numbers = params["dimension_numbers"]
        batch = {numbers.lhs_spec[0]: numbers.out_spec[0]}
        return [_kept(shapes[0], after, batch), _all(shapes[1], None)]
    elif primitive in primitives.GATHER:
        kept = _of_gather(shapes, params, result)
    elif primitive in primitives.CONCATENATE | primitives.CUMULATIVE:
        axis = params["dimension" if primitive in primitives.CONCATENATE else "axis"]
        kept = {i: i for i in range(len(result)) if i != axis}
    elif primitive in primitives.STACK:
        kept = {i: i + (i >= params["axis"]) for i in range(len(shapes[0]))}
        return [_kept(shape, after, kept) for shape in shapes]
    elif primitive in primitives.REVERSE:
        kept = {i: i for i in range(len(result)) if i not in params["dimensions"]}
    elif primitive in primitives.SLICE:
        kept = {i: i for i, size in enumerate(shapes[0]) if size == result[i]}
    elif primitive in primitives.PAD:
        kept = {i: i for i, (*by,) in enumerate(params["padding_config"]) if not any(by)}
    else:
        return [_all(shape, UNKNOWN) for shape in shapes]
    same = [shape for shape in shapes if len(shape) == len(shapes[0])]
    if primitive in primitives.CONCATENATE:
        return [_kept(shape, after, kept) for shape in same]
    rest: list[Axes | None] = [_all(shape, None) for shape in shapes[1:]]
    return [_kept(shapes[0], after, kept), *rest]


def _kept(shape: Shape, after: Axes, kept: dict[int, int]) -> Axes:
    """An operand whose axis i is the result's axis `kept[i]`."""
    return tuple(after[kept[i]] if i in kept else _axis(size, None) for i, size in enumerate(shape))


def _aligned(shape: Shape, result: Shape, after: Axes, places: Any) -> Axes:
    """An operand that is broadcast to the result along its axes of length one."""
    return tuple(
        after[place] if size == result[place] else _axis(size, None)
        for size, place in zip(shape, places, strict=True)
    )


def _regroup(factors: Sequence[Factor], shape: Shape) -> Axes:
    """The same entries in row-major order, with other axes."""
    left: list[Factor] = list(factors)
    axes: list[Axis] = []
    for size in shape:
        axis: list[Factor] = []
        while size > 1:
            factor = left.pop(0)
            common = math.gcd(size, factor.size)
            if common == size < factor.size:
                factor, rest = _split(factor, size)
                left.insert(0, rest)
            elif common != factor.size:
                return _all(shape, None)
            axis.append(factor)
            size //= factor.size
        axes.append(_joined(axis))
    return tuple(axes)


def _split(factor: Factor, outer: int) -> tuple[Factor, Factor]:
    """An axis as two, of which the first is so long."""
    inner, label = factor.size // outer, factor.label
    if label is None or label == UNKNOWN:
        return Factor(outer, label), Factor(inner, label)
    own = label if isinstance(label, Part) else Part(label, factor.size, 1, factor.size)
    first = own._replace(stride=own.stride * inner, size=outer)
    return Factor(outer, first), Factor(inner, own._replace(size=inner))


def _joined(factors: Sequence[Factor]) -> Axis:
    """The same axis, neighbouring parts of an axis of the target put together again."""
    axis: list[Factor] = []
    for factor in factors:
        before, own = axis[-1].label if axis else None, factor.label
        if isinstance(before, Part) and isinstance(own, Part):
            if before.axis == own.axis and before.stride == own.stride * own.size:
                axis.pop()
                own = own._replace(size=before.size * own.size)
                factor = Factor(own.size, own.axis if own.size == own.whole else own)
        axis.append(factor)
    return tuple(axis)


def _of_dot(shapes: Sequence[Shape], numbers: Any, after: Axes) -> list[Axes | None]:
    contract, batch = numbers
    free = [
        [i for i in range(len(shape)) if i not in (*contract[k], *batch[k])]
        for k, shape in enumerate(shapes)
    ]
    start = (len(batch[0]), len(batch[0]) + len(free[0]))
    return [
        _kept(
            shapes[k],
            after,
            {
                **{axis: i for i, axis in enumerate(batch[k])},
                **{axis: start[k] + i for i, axis in enumerate(free[k])},
            },
        )
        for k in (0, 1)
    ]


def _of_gather(shapes: Sequence[Shape], params: Any, result: Shape) -> dict[int, int]:
    """Batched axes, and those that are taken whole."""
    numbers = params["dimension_numbers"]
    offsets = numbers.offset_dims
    from_indices = [i for i in range(len(result)) if i not in offsets]
    pairs = zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
    kept = {int(axis): from_indices[int(at)] for axis, at in pairs}
    gone = {*map(int, numbers.collapsed_slice_dims), *map(int, numbers.operand_batching_dims)}
    sliced = [i for i in range(len(shapes[0])) if i not in gone]
    whole = {
        i: offset
        for i, offset in zip(sliced, offsets, strict=True)
        if params["slice_sizes"][i] == shapes[0][i] and i not in numbers.start_index_map
    }
    return kept | whole


def _inside(equation: Equation, env: dict[int, Axes]) -> list[Axes | None] | None:
    """A function with its own derivative: what its body says."""
    bodies = jaxpr.inner_jaxprs(equation.eqn)
    if len(bodies) != 1:
        return None
    program = flatten(bodies[0])
    if len(program.inputs) != len(equation.inputs):
        return None
    ends: dict[int, Axes] = {}
    for inner, outer in zip(program.outputs, equation.outputs, strict=True):
        if outer in env:
            ends[inner] = _merge(ends[inner], env[outer]) if inner in ends else env[outer]
    inside, _ = _walk(program, ends, None)
    return [inside.get(v) for v in program.inputs]
