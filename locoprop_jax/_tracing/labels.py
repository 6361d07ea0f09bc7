"""Labels: what each value of a trace is made of, as far as capture follows it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from locoprop_jax._tracing import chains, flow, primitives, reasons
from locoprop_jax._tracing.chains import Chain, Part, Shape
from locoprop_jax._tracing.jaxpr import Path
from locoprop_jax._tracing.operands import Stage
from locoprop_jax._tracing.program import Program
from locoprop_jax._tracing.reasons import Reason


class Loop(NamedTuple):
    """A loop around equations.

    Attributes:
      path: of its equation, which is its name.
      length: how often it runs.
      position: of its equation in the program that it is part of.
    """

    path: Path
    length: int
    position: int


class Weight(NamedTuple):
    """One parameter leaf, seen through rearrangements, or a slice of it that a loop takes.

    Attributes:
      leaf: which.
      own: the shape before `chain`.
      chain: how it was rearranged, in the innermost loop that slices it.
      loops: the lengths of the loops that slice it, by their paths, the outermost first.
      prefix: leaf, or the part of it -> (*lengths, *own).
      part: of the leaf, None for all of it.
      made: the parameters that it is a function of, if it is none itself: see `formulas`.
    """

    leaf: int
    own: Shape
    chain: Chain
    loops: tuple[tuple[Path, int], ...] = ()
    prefix: Chain = ()
    part: Part | None = None
    made: frozenset[int] = frozenset()

    @property
    def lengths(self) -> Shape:
        return tuple(length for _, length in self.loops)

    def whole(self, chain: Chain) -> Chain:
        """From the leaf to what a chain makes of each slice, the loops' axes in front."""
        return (*self.prefix, *chains.lift(chain, self.lengths))

    def stacked(self, chain: Chain, kept: int) -> Chain:
        """The same with all axes but the last so many joined to one for the stack, if any."""
        result, own = self.whole(chain), chains.result_shape(chain, self.own)
        shape = (*self.lengths, *own)
        stack = shape[: len(shape) - kept]
        joined = (math.prod(stack), *shape[len(stack) :]) if stack else shape
        return chains.extend(result, shape, "reshape", joined)

    def slices(self, shape: Shape, loop: Loop) -> Weight:
        """What a loop takes of it, given its shape."""
        loops = (*self.loops, (loop.path, loop.length))
        return self._replace(own=shape[1:], chain=(), loops=loops, prefix=self.whole(self.chain))

    def cut(self, starts: Sequence[int], limits: Sequence[int]) -> Weight | None:
        """A box of it, None where it is one already or was broadcast."""
        if self.part is not None or self.loops or not chains.is_invertible(self.chain):
            return None
        part = Part(self.chain, tuple(starts), tuple(limits))
        own = tuple(b - a for a, b in zip(starts, limits, strict=True))
        return self._replace(own=own, chain=(), part=part)


class Operand(NamedTuple):
    """Where data is read: operand `index` of the equation at `position`."""

    position: int
    index: int


class Scaled(NamedTuple):
    """A parameter leaf multiplied by factors that are no parameters, which has not met data yet.

    Attributes:
      weight: the parameter.
      stages: one for each factor, from the first on.
      factors: where they are read.
      chain: how the product was rearranged since.
    """

    weight: Weight
    stages: tuple[Stage, ...]
    factors: tuple[Operand, ...]
    chain: Chain = ()


class Derived(NamedTuple):
    """Computed from parameters alone, in a way that is not a rearrangement.

    Attributes:
      leaves: the parameters.
      how: the first primitive that did more.
      value: what was computed; None where it is not known how.
      chain: how it was rearranged since.
      met_data: whether data from outside took part, without rows of their own.
    """

    leaves: frozenset[int]
    how: str
    value: int | None = None
    chain: Chain = ()
    met_data: bool = False


class Output(NamedTuple):
    """The raw output of a site, seen through rearrangements."""

    site: int
    chain: Chain


DATA = "data"  # depends on the batch
CONSTANT = "constant"
Label = Weight | Scaled | Derived | Output | str


def leaves_of(label: Label) -> frozenset[int]:
    """The parameter leaves that a label is about."""
    if isinstance(label, Scaled):
        label = label.weight
    if isinstance(label, Weight):
        return label.made or frozenset({label.leaf})
    return label.leaves if isinstance(label, Derived) else frozenset()


def is_data(label: Label) -> bool:
    return label is DATA or isinstance(label, Output)


def changed(program: Program, position: int, kinds: Sequence[Label]) -> Reason | None:
    """The reason, if one of the operands is a parameter changed beyond rearrangement."""
    hows = [k.how for k in kinds if isinstance(k, Derived)]
    hows += ["mul" for k in kinds if isinstance(k, Scaled)]
    if not hows:
        return None
    return reasons.changed(hows[0], str(program.equations[position].primitive))


# --- parts of parameters -------------------------------------------------------------------------


def parts(program: Program, position: int, kinds: Sequence[Label]) -> list[Label] | None:
    """The parts that an equation cuts out of a parameter, for each of its results."""
    equation = program.equations[position]
    weight, params = kinds[0], equation.params
    if not isinstance(weight, Weight) or any(leaves_of(k) for k in kinds[1:]):
        return None
    shape = program.shape(equation.inputs[0])
    boxes: list[tuple[list[int], list[int]]] = []
    if equation.primitive in primitives.SPLIT:
        start, axis = 0, params["axis"]
        for size in params["sizes"]:
            starts, limits = [0] * len(shape), list(shape)
            starts[axis], limits[axis] = start, start + size
            boxes.append((starts, limits))
            start += size
    elif equation.primitive in primitives.DYNAMIC_SLICE:
        known = [flow.known_number(program, v) for v in equation.inputs[1:]]
        if any(map(math.isnan, known)):
            return None
        sizes = params["slice_sizes"]
        bounds = zip(known, shape, sizes, strict=True)
        starts = [min(max(int(start), 0), n - size) for start, n, size in bounds]
        boxes.append((starts, [a + size for a, size in zip(starts, sizes, strict=True)]))
    elif equation.primitive in primitives.SLICE and params["strides"] in (None, (1,) * len(shape)):
        boxes.append((list(params["start_indices"]), list(params["limit_indices"])))
    else:
        return None
    found = [weight.cut(*box) for box in boxes]
    return None if None in found else [part for part in found if part is not None]


def without_number(program: Program, label: Label) -> Label:
    """A parameter that was multiplied by one number as the parameter itself."""
    if not isinstance(label, Scaled) or len(label.factors) != 1:
        return label
    (factor,), (stage,), weight = label.factors, label.stages, label.weight
    value = program.equations[factor.position].inputs[factor.index]
    is_number = math.prod(program.shape(value)) == 1
    if not is_number or chains.result_shape(stage.chain, weight.own) != stage.shape:
        return label
    return weight._replace(chain=(*stage.chain, *label.chain))
