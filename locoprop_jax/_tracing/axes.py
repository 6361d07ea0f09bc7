"""Which axes of a traced program count the same things.

Each axis of each value gets a name, and equations make names equal: those of the operands of a sum
position by position, those of a batch of products, those of what a loop hands on. An axis that a
reshape merges from others has their names one after the other, so that (batch * tokens) comes apart
again. Data that meet the batch late, such as labels, masks and closed-over weights, share its name
as well as what comes before.

What an unknown equation makes has names of its own, unless it has the shape of an operand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

from locoprop_jax._tracing import primitives
from locoprop_jax._tracing.axis_names import Axes, Axis, Names, unify_all
from locoprop_jax._tracing.jaxpr import (
    body,
    branches,
    inner_jaxprs,
    is_literal,
    open_jaxpr,
    scan_of,
)
from locoprop_jax._tracing.program import Equation, Program


class NamedAxes:
    """The axes of all values of a program.

    Args:
      program: the program.
      counts: by equation, whether what it mixes counts.
    """

    def __init__(self, program: Program, counts: Mapping[int, bool] | None = None):
        self.names = Names()
        self._axes: dict[int, Axes] = {}
        for value in program.inputs:
            self._axes[value] = self.names.axes(program.shape(value))
        self._follow(program, counts or {})

    @property
    def values(self) -> Set[int]:
        """Those whose axes have names."""
        return self._axes.keys()

    def __call__(self, value: int) -> Axes:
        return tuple(map(self.names.solved, self._axes[value]))

    def _follow(self, program: Program, counts: Mapping[int, bool]) -> None:
        for value in program.constants:
            self._axes.setdefault(value, self.names.axes(program.shape(value)))
        for position, equation in enumerate(program.equations):
            self._equation(program, position, equation, counts.get(position, True))

    def _equation(self, program: Program, position: int, equation: Equation, counts: bool) -> None:
        axes = [self._axes[v] for v in equation.inputs]
        if position not in program.bodies:
            results = Rules(self.names, counts).results(equation.eqn, axes)
        elif equation.primitive in primitives.COND:
            results = self._branches(program.bodies[position], axes[1:])
        else:
            results = self._scan(equation, program.bodies[position][0], axes)
        self._axes.update(zip(equation.outputs, results, strict=True))

    def _branches(self, programs: Sequence[Program], axes: list[Axes]) -> list[Axes]:
        results: list[Axes] = []
        for inner in programs:
            self._axes.update(zip(inner.inputs, axes, strict=True))
            self._follow(inner, {})
            found = [self._axes[v] for v in inner.outputs]
            for one, other in zip(results, found, strict=False):
                unify_all(self.names, one, other)
            results = results or found
        return results

    def _scan(self, equation: Equation, inner: Program, axes: list[Axes]) -> list[Axes]:
        scan = scan_of(equation.eqn)
        end = scan.consts + scan.carry
        time = (self.names.new(equation.params["length"]),)
        for each in axes[end:]:
            self.names.unify(each[0], time)
        given = [*axes[:end], *(each[1:] for each in axes[end:])]
        self._axes.update(zip(inner.inputs, given, strict=True))
        self._follow(inner, {})
        results = [self._axes[v] for v in inner.outputs]
        for before, after in zip(axes[scan.consts : end], results, strict=False):
            unify_all(self.names, before, after)
        if scan.carry:
            self.names.mix(time)
        return [*results[: scan.carry], *((time, *each) for each in results[scan.carry :])]


class Rules:
    """The axes of what an equation computes, by its primitive.

    Args:
      names: of the axes.
      counts: whether an axis that is summed or contracted is mixed.
    """

    def __init__(self, names: Names, counts: bool = True):
        self.names, self.counts = names, counts

    def results(self, eqn: Any, axes: Sequence[Axes]) -> list[Axes]:
        inner = self._inner(eqn)
        if inner:
            return self._calls(eqn, inner, axes)
        rule = _RULES.get(eqn.primitive, Rules.by_shape)
        found = rule(self, eqn, axes)
        shapes = [tuple(getattr(v.aval, "shape", ())) for v in eqn.outvars]
        if found is None or len(found) != len(shapes):
            return [self.names.axes(shape) for shape in shapes]
        return found

    def _inner(self, eqn: Any) -> list[Any]:
        """The jaxprs that an equation runs on its own operands, if there are any."""
        if (called := body(eqn)) is not None:
            return [called]
        if eqn.primitive in primitives.CUSTOM:
            return inner_jaxprs(eqn)[:1]
        return list(branches(eqn))

    def _calls(self, eqn: Any, inner: Sequence[Any], axes: Sequence[Axes]) -> list[Axes]:
        given = list(axes[1:]) if eqn.primitive in primitives.COND else list(axes)
        results: list[Axes] | None = None
        for called in inner:
            found = self._jaxpr(called, given)
            if found is None:
                return [self.names.axes(tuple(v.aval.shape)) for v in eqn.outvars]
            for one, other in zip(results or [], found, strict=False):
                unify_all(self.names, one, other)
            results = results or found
        return results or []

    def _jaxpr(self, closed: Any, axes: Sequence[Axes]) -> list[Axes] | None:
        jaxpr, _ = open_jaxpr(closed)
        if len(jaxpr.invars) != len(axes):
            return None
        env = dict(zip(jaxpr.invars, axes, strict=True))

        def read(atom: Any) -> Axes:
            if is_literal(atom) or atom not in env:
                return self.names.axes(tuple(getattr(atom.aval, "shape", ())))
            return env[atom]

        for eqn in jaxpr.eqns:
            env.update(
                zip(eqn.outvars, self.results(eqn, [read(v) for v in eqn.invars]), strict=True)
            )
        return [read(v) for v in jaxpr.outvars]

    def mix(self, axis: Sequence[int]) -> None:
        if self.counts:
            self.names.mix(axis)

    # --- one rule for each kind of equation ------------------------------------------------------

    def by_shape(self, eqn: Any, axes: Sequence[Axes]) -> list[Axes] | None:
        """Entry by entry, or unknown: what has the shape of the result has its axes."""
        results = []
        for out in eqn.outvars:
            shape, result = tuple(getattr(out.aval, "shape", ())), None
            for operand, own in zip(eqn.invars, axes, strict=True):
                if tuple(getattr(operand.aval, "shape", ())) != shape:
                    continue
                if result is None:
                    result = own
                else:
                    unify_all(self.names, result, own)
            results.append(self.names.axes(shape) if result is None else result)
        return results

    def broadcast(self, eqn: Any, axes: Sequence[Axes]) -> list[Axes]:
        shape, (own, *_) = eqn.params["shape"], axes
        result = list(self.names.axes(tuple(shape)))
        for axis, at in zip(own, eqn.params["broadcast_dimensions"], strict=True):
            if math.prod(self.names.sizes[name] for name in axis) == shape[at]:
                result[at] = axis
        return [tuple(result)]

    def reshape(self, eqn: Any, axes: Sequence[Axes]) -> list[Axes]:
        order = primitives.order_read(eqn)
        own = axes[0] if order is None else tuple(axes[0][i] for i in order)
        return [self.names.regroup(own, tuple(eqn.outvars[0].aval.shape))]

    def squeeze(self, eqn: Any, axes: Sequence[Axes]) -> list[Axes]:
        return [_without(axes[0], eqn.params["dimensions"])]

    def transpose(self, eqn: Any, axes: Sequence[Axes]) -> list[Axes]:
        return [tuple(axes[0][i] for i in eqn.params["permutation"])]

    def reduce(self, eqn: Any, axes: Sequence[Axes]) -> list[Axes]:
        for i in eqn.params["axes"]:
            self.mix(axes[0][i])
        return [_without(axes[0], eqn.params["axes"]) for _ in eqn.outvars]

    def cumulate(self, eqn: Any, axes: Sequence[Axes]) -> list[Axes]:
        self.mix(axes[0][eqn.params["axis"]])
        return [axes[0]]

    def sort(self, eqn: Any, axes: Sequence[Axes]) -> list[Axes]:
        self.mix(axes[0][eqn.params["dimension"]])
        return list(axes)

    def dot(self, eqn: Any, axes: Sequence[Axes]) -> list[Axes]:
        (contract, batch), (left, right) = eqn.params["dimension_numbers"], axes
        for i, j in zip(*batch, strict=True):
            self.names.unify(left[i], right[j])
        for i, j in zip(*contract, strict=True):
            self.names.unify(left[i], right[j])
            self.mix(left[i])
        rows = _without(left, (*contract[0], *batch[0]))
        columns = _without(right, (*contract[1], *batch[1]))
        return [(*(left[i] for i in batch[0]), *rows, *columns)]

    def convolution(self, eqn: Any, axes: Sequence[Axes]) -> list[Axes]:
        numbers = eqn.params["dimension_numbers"]
        result = list(self.names.axes(tuple(eqn.outvars[0].aval.shape)))
        (batch, features, *space), data = numbers.lhs_spec, axes[0]
        if eqn.params["batch_group_count"] == 1:
            result[numbers.out_spec[0]] = data[batch]
        kernel = tuple(eqn.invars[1].aval.shape)
        for at, i, window in zip(numbers.out_spec[2:], space, numbers.rhs_spec[2:], strict=True):
            if kernel[window] == 1 and result[at] and self._size(data[i]) == self._size(result[at]):
                result[at] = data[i]
            else:
                self.mix(data[i])
        self.mix(data[features])
        if eqn.params["feature_group_count"] == 1:
            result[numbers.out_spec[1]] = axes[1][numbers.rhs_spec[0]]
        return [tuple(result)]

    def concatenate(self, eqn: Any, axes: Sequence[Axes]) -> list[Axes]:
        at = eqn.params["dimension"]
        result = list(axes[0])
        for own in axes[1:]:
            for i, (one, other) in enumerate(zip(result, own, strict=True)):
                if i != at:
                    self.names.unify(one, other)
        pieces = {self.names.solved(own[at]) for own in axes}
        if len(pieces) == 1:  # (views * batch) comes apart
            result[at] = (self.names.new(len(axes)), *axes[0][at])
        else:
            (result[at],) = self.names.axes((eqn.outvars[0].aval.shape[at],))
        return [tuple(result)]

    def cut(self, eqn: Any, axes: Sequence[Axes]) -> list[Axes]:
        """Parts of an array, or a padded one: axes of the same length are the same."""
        results = []
        for out in eqn.outvars:
            pairs = zip(axes[0], eqn.invars[0].aval.shape, out.aval.shape, strict=True)
            results.append(tuple(self._part(axis, old, new) for axis, old, new in pairs))
        return results

    def update(self, eqn: Any, axes: Sequence[Axes]) -> list[Axes]:
        for one, other in zip(axes[0], axes[1], strict=True):
            if self._size(one) == self._size(other):
                self.names.unify(one, other)
        return [axes[0]]

    def gather(self, eqn: Any, axes: Sequence[Axes]) -> list[Axes]:
        numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
        (data, indices, *_), shape = axes, eqn.invars[0].aval.shape
        batching = getattr(numbers, "operand_batching_dims", ())
        for i, j in zip(batching, getattr(numbers, "start_indices_batching_dims", ()), strict=True):
            self.names.unify(data[i], indices[j])
        result = list(self.names.axes(tuple(eqn.outvars[0].aval.shape)))
        places = [i for i in range(len(result)) if i not in numbers.offset_dims]
        for at, axis in zip(places, indices[:-1], strict=True):
            result[at] = axis
        kept = [i for i in range(len(shape)) if i not in {*numbers.collapsed_slice_dims, *batching}]
        for at, i in zip(numbers.offset_dims, kept, strict=True):
            if sizes[i] == shape[i]:
                result[at] = data[i]
        for i in numbers.start_index_map:
            self.mix(data[i])
        return [tuple(result)]

    def scatter(self, eqn: Any, axes: Sequence[Axes]) -> list[Axes]:
        numbers, (data, indices, updates) = eqn.params["dimension_numbers"], axes
        batching = getattr(numbers, "operand_batching_dims", ())
        for i, j in zip(
            batching, getattr(numbers, "scatter_indices_batching_dims", ()), strict=True
        ):
            self.names.unify(data[i], indices[j])
        window = numbers.update_window_dims
        kept = [i for i in range(len(data)) if i not in {*numbers.inserted_window_dims, *batching}]
        for at, i in zip(window, kept, strict=True):
            if self._size(updates[at]) == self._size(data[i]):
                self.names.unify(updates[at], data[i])
        places = [i for i in range(len(updates)) if i not in window]
        for at, axis in zip(places, indices[:-1], strict=True):
            self.names.unify(updates[at], axis)
            self.mix(axis)
        return [data]

    def _part(self, axis: Axis, old: int, new: int) -> Axis:
        if old == new:
            return axis
        if old > new > 1 and old % new == 0:  # one of the pieces that were concatenated
            (*_, last) = self.names.solved(axis)
            if self.names.sizes[last] == new:
                return (last,)
        return self.names.cut(axis, new)

    def _size(self, axis: Axis) -> int:
        return math.prod(self.names.sizes[name] for name in axis)


def _without(axes: Axes, dropped: Sequence[int]) -> Axes:
    return tuple(axis for i, axis in enumerate(axes) if i not in dropped)


_BY_KIND = (
    (Rules.broadcast, primitives.BROADCAST),
    (Rules.reshape, primitives.RESHAPE - primitives.SQUEEZE),
    (Rules.squeeze, primitives.SQUEEZE),
    (Rules.transpose, primitives.TRANSPOSE),
    (Rules.reduce, primitives.REDUCE | primitives.REDUCE_OTHER),
    (Rules.cumulate, primitives.CUMULATIVE),
    (Rules.sort, primitives.SORT),
    (Rules.dot, primitives.DOT_GENERAL),
    (Rules.convolution, primitives.CONVOLUTION),
    (Rules.concatenate, primitives.CONCATENATE),
    (Rules.cut, primitives.SLICE | primitives.SPLIT | primitives.PAD),
    (Rules.update, primitives.UPDATE_SLICE),
    (Rules.gather, primitives.GATHER),
    (Rules.scatter, primitives.SCATTER),
)
_RULES = {primitive: rule for rule, found in _BY_KIND for primitive in found}
