"""Sites: the places in a trace where a layer's weights are applied, whatever its kind."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

from locoprop_jax._tracing.chains import Chain, Shape
from locoprop_jax._tracing.evaluate import Address
from locoprop_jax._tracing.labels import Loop, Operand, Weight, leaves_of
from locoprop_jax._tracing.operands import Reader
from locoprop_jax._tracing.program import Program

BatchAxes = Sequence[Shape] | None  # for each value, the axes that count examples


class Axes(NamedTuple):
    """The axes of an array by what they count: layers of a stack, rows, features."""

    stack: Shape
    rows: Shape
    features: Shape


@dataclasses.dataclass
class Site:
    """A layer in the making, later with its bias.

    Attributes:
      program: that it is part of: the whole, or the body of a loop.
      kind: "dense", "conv", "scale", "embedding" or "bias".
      position: of the equation that applies the weights; see `of_input` for a parameter itself.
      weight: the kernel; None for a bias on its own.
      kernel: leaf -> (d_in, d_out), with the stack in front if there is one.
      own_stack: how many independent layers this is each time that it runs, None for one that is
        no stack.
      d_in: inputs of a row.
      d_out: outputs of a row.
      operands: where the data is read.
      reader: what they make: an array with `inputs` axes.
      inputs: the axes of that array.
      outputs: the axes of what `split` makes of the raw output.
      output: the value that is the layer's output.
      row_axes: the axes of the raw output that count rows, in the order of `inputs` too.
      window: the spatial shape of a convolution's kernel.
      split: raw output -> an array with an axis for the stack.
      output_chain: raw output -> `output`.
      added: the bias.
      bias_chain: leaf -> (d_out,), with the stack in front.
      tapped: position of the equation that computes `output`.
      loops: those around it, the outermost first.
      returned: what the outermost loop returns.
    """

    program: Program
    kind: str
    position: int
    weight: Weight | None
    kernel: Chain
    own_stack: int | None
    d_in: int
    d_out: int
    operands: tuple[Operand, ...]
    reader: Reader
    inputs: Axes
    outputs: Axes
    output: int
    row_axes: Shape
    window: Shape = ()
    split: Chain = ()
    output_chain: Chain = ()
    added: Weight | None = None
    bias_chain: Chain = ()
    tapped: int = dataclasses.field(init=False)
    loops: tuple[Loop, ...] = ()
    returned: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.tapped = self.position

    @property
    def leaf(self) -> int | None:
        """The kernel's."""
        return None if self.weight is None else self.weight.leaf

    @property
    def bias(self) -> int | None:
        """The bias's leaf."""
        return None if self.added is None else self.added.leaf

    @property
    def leaves(self) -> frozenset[int]:
        """The parameters that its kernel and its bias are, or are made of."""
        weights = [w for w in (self.weight, self.added) if w is not None]
        return frozenset().union(*map(leaves_of, weights))

    @property
    def sliced(self) -> tuple[bool, ...]:
        """Which of the loops give each turn weights of its own."""
        weight = self.weight or self.added
        assert weight is not None
        own = [path for path, _ in weight.loops]
        return tuple(loop.path in own for loop in self.loops)

    @property
    def lengths(self) -> Shape:
        return tuple(loop.length for loop in self.loops)

    @property
    def stack(self) -> int | None:
        """How many independent layers this is, those of loops that slice its weights included."""
        pairs = zip(self.lengths, self.sliced, strict=True)
        sizes = [length for length, is_sliced in pairs if is_sliced]
        if self.own_stack is not None:
            sizes.append(self.own_stack)
        return math.prod(sizes) if sizes else None

    @property
    def outside(self) -> tuple[int, ...]:
        """The values of the whole program that its output is, or that its loop returns."""
        return (self.output,) if not self.loops else self.returned

    def key(self) -> tuple:
        """What sites of one layer have in common."""
        sizes = (self.kind, self.stack, self.d_in, self.d_out)
        weight = self.weight or self.added
        assert weight is not None
        chain = self.bias_chain if self.weight is None else self.kernel
        return (*sizes, weight.leaf, weight.part, self.weight is None, chain)


def raw_output(site: Site) -> int:
    """The value that the weights make, before a bias is added."""
    if site.kind == "bias":
        return site.output
    return site.program.equations[site.position].outputs[0]


def input_addresses(site: Site) -> tuple[Address, ...]:
    return tuple(
        Address(site.program.equations[operand.position].path, "in", operand.index)
        for operand in site.operands
    )


def has_rows(site: Site) -> bool:
    """Whether its weights meet several rows at a time; one row in a loop may be power iteration."""
    shape = site.program.shape(raw_output(site))
    return not site.loops or any(shape[axis] > 1 for axis in site.row_axes)


def of_input(leaf: int) -> int:
    """The position that stands for an input of the whole program, which no equation computes."""
    return -1 - leaf


def output_address(site: Site) -> Address:
    if site.tapped < 0:
        return Address((site.tapped,), "out", 0)
    equation = site.program.equations[site.tapped]
    return Address(equation.path, "out", equation.outputs.index(site.output))


def grouped_axes(site: Site, batch_axes: BatchAxes) -> tuple[tuple[Shape, ...], tuple[Shape, ...]]:
    """The axes of the inputs and of the split raw output: (stack,) batch, shared, features.

    Both have the axes of the loops in front. Where the batch is not known every row counts as
    batch.
    """
    growing = site.row_axes if batch_axes is None else batch_axes[raw_output(site)]
    is_batch = [axis in growing for axis in site.row_axes]
    n = len(site.loops)
    of_loops = [tuple(i for i in range(n) if site.sliced[i] is want) for want in (True, False)]

    def moved(axes: Shape) -> Shape:
        return tuple(axis + n for axis in axes)

    def groups(axes: Axes) -> tuple[Shape, ...]:
        pairs = list(zip(axes.rows, is_batch, strict=True))
        batch, shared = (moved(tuple(a for a, b in pairs if b is want)) for want in (True, False))
        stack = () if site.stack is None else ((*of_loops[0], *moved(axes.stack)),)
        if batch_axes is None:
            return (*stack, (*of_loops[1], *batch, *shared), (), moved(axes.features))
        return (*stack, batch, (*of_loops[1], *shared), moved(axes.features))

    return groups(site.inputs), groups(site.outputs)
