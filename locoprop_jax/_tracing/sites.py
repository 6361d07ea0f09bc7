"""Sites: the places in a trace where a layer's weights are applied, one kind after the other.

Each reader looks at one equation whose operands' labels say that a parameter meets data, and
returns a `Site`, or the reason why there is none.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from locoprop_jax._tracing import chains, reasons
from locoprop_jax._tracing.chains import Chain, Shape
from locoprop_jax._tracing.evaluate import Address
from locoprop_jax._tracing.labels import (
    Derived,
    Label,
    Loop,
    Operand,
    Output,
    Scaled,
    Weight,
    changed,
    leaves_of,
)
from locoprop_jax._tracing.operands import (
    AsItIs,
    Nothing,
    OneHotReader,
    Patches,
    Product,
    Reader,
    Stage,
    Times,
)
from locoprop_jax._tracing.program import Program
from locoprop_jax._tracing.reasons import Reason

BatchAxes = Sequence[Shape] | None  # for each value, the axes that grow with the batch


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
      position: of the equation that applies the weights.
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
        weights = [(w.leaf, w.part) for w in (self.weight, self.added) if w is not None]
        return (*sizes, *weights, self.weight is None, self.kernel, self.bias_chain)


def is_transposed(site: Site, other: Site) -> bool:
    """Whether the other applies the same kernel transposed."""
    pair = (site, other)
    if any(s.kind not in ("dense", "embedding") or s.stack is not None for s in pair):
        return False
    weight = site.weight
    if site.kind == "embedding" or weight is None or other.weight is None:
        return False
    same = (weight.leaf, weight.part) == (other.weight.leaf, other.weight.part)
    if not same or (site.d_in, site.d_out) != (other.d_out, other.d_in):
        return False
    sizes = (site.d_in, site.d_out)
    if chains.extend(site.kernel, sizes, "transpose", (1, 0)) == other.kernel:
        return True
    numbers = _numbers(weight.own)
    kernels = (chains.apply(s.kernel, numbers) for s in pair)
    return np.array_equal(next(kernels), next(kernels).T)


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


def output_address(site: Site) -> Address:
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


# --- matrix products -----------------------------------------------------------------------------


def dense(
    program: Program, position: int, kinds: Sequence[Label], batch_axes: BatchAxes
) -> Site | Reason:
    """A `dot_general` of data and a kernel; a stack of layers if the kernel has batch axes."""
    equation = program.equations[position]
    (kernel_at,) = (i for i, k in enumerate(kinds) if isinstance(k, Weight))
    label, data_at = kinds[kernel_at], 1 - kernel_at
    assert isinstance(label, Weight)
    contract, batch = equation.params["dimension_numbers"]
    if why := _refused(label, equation.inputs[data_at], batch_axes):
        return why
    shape, data_shape = (program.shape(equation.inputs[i]) for i in (kernel_at, data_at))
    contracted, stack = tuple(contract[kernel_at]), tuple(batch[kernel_at])
    of_data, stack_of_data = tuple(contract[data_at]), tuple(batch[data_at])
    free = _others(shape, (*contracted, *stack))
    rows = _others(data_shape, (*of_data, *stack_of_data))
    # A product's axes: those of the batch, then what is free of the left and of the right operand.
    lengths = [len(stack), len(rows), len(free)]
    if data_at == 1:
        lengths = [len(stack), len(free), len(rows)]
    starts = np.cumsum([0, *lengths])
    spans = [tuple(range(a, b)) for a, b in itertools.pairwise(starts)]
    out_stack, out_rows, out_free = spans if data_at == 0 else (spans[0], spans[2], spans[1])
    groups = (contracted, free) if not stack else (stack, contracted, free)
    return Site(
        program=program,
        kind="dense",
        position=position,
        weight=label,
        kernel=label.stacked(chains.group(label.chain, shape, groups), 2),
        own_stack=math.prod(shape[i] for i in stack) if stack else None,
        d_in=math.prod(shape[i] for i in contracted),
        d_out=math.prod(shape[i] for i in free),
        operands=(Operand(position, data_at),),
        reader=AsItIs(),
        inputs=Axes(stack_of_data, rows, of_data),
        outputs=Axes(out_stack, out_rows, out_free),
        output=equation.outputs[0],
        row_axes=out_rows,
    )


def _refused(kernel: Weight, data: int, batch_axes: BatchAxes) -> Reason | None:
    """The reason, if this is no layer whatever is done to kernel and data."""
    if not chains.is_invertible(kernel.chain):
        return reasons.BROADCAST
    if batch_axes is not None and not batch_axes[data]:
        return reasons.NOT_THE_BATCH
    return None


def _others(shape: Shape, axes: Shape) -> Shape:
    return tuple(i for i in range(len(shape)) if i not in axes)


# --- convolutions --------------------------------------------------------------------------------


def convolution(
    program: Program, position: int, kinds: Sequence[Label], batch_axes: BatchAxes
) -> Site | Reason:
    """A convolution of data with a kernel; a stack of layers if its features are in groups."""
    equation = program.equations[position]
    label = kinds[1]
    if not isinstance(label, Weight):
        return reasons.MOVED_OVER
    data, kernel = equation.inputs
    if why := _refused(label, data, batch_axes):
        return why
    params = equation.params
    if params["batch_group_count"] != 1:
        return reasons.BATCH_IN_GROUPS
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    shape, out = program.shape(kernel), program.shape(equation.outputs[0])
    to_outputs, to_inputs, *spatial = numbers.rhs_spec
    window = tuple(shape[i] for i in spatial)
    d_out = shape[to_outputs] // groups
    # (groups, d_out) is how output features are laid out; the same for the patches' (channels, *).
    split, spread = (), list(numbers.out_spec)
    feature = spread[1]
    if groups > 1:
        split = chains.extend(
            (), out, "reshape", (*out[:feature], groups, d_out, *out[feature + 1 :])
        )
        spread = [axis + (axis > feature) for axis in spread]
    batch, _, *pixels = spread
    axes = Axes(
        (feature,) if groups > 1 else (),
        (batch, *pixels),
        (feature + 1,) if groups > 1 else (feature,),
    )
    by_group = chains.extend(
        label.chain,
        shape,
        "transpose",
        (to_outputs, to_inputs, *spatial),
    )
    d_in = shape[to_inputs] * math.prod(window)
    by_group = chains.extend(
        by_group,
        tuple(shape[i] for i in numbers.rhs_spec),
        "reshape",
        (groups, d_out, d_in) if groups > 1 else (d_out, d_in),
    )
    last = (0, 2, 1) if groups > 1 else (1, 0)
    return Site(
        program=program,
        kind="conv",
        position=position,
        weight=label,
        kernel=label.stacked(
            chains.extend(by_group, (groups, d_out, d_in)[-len(last) :], "transpose", last), 2
        ),
        own_stack=groups if groups > 1 else None,
        d_in=d_in,
        d_out=d_out,
        operands=(Operand(position, 0),),
        reader=Patches(
            window,
            tuple(params["window_strides"]),
            tuple(map(tuple, params["padding"])),
            tuple(params["lhs_dilation"]),
            tuple(params["rhs_dilation"]),
            tuple(numbers.lhs_spec),
            tuple(numbers.out_spec),
            groups,
        ),
        inputs=axes,
        outputs=axes,
        output=equation.outputs[0],
        row_axes=tuple(i for i in numbers.out_spec if i != feature),
        window=window,
        split=split,
    )


# --- embeddings ----------------------------------------------------------------------------------


def embedding(program: Program, position: int, kinds: Sequence[Label]) -> Site | Reason:
    """A `gather` of whole rows of a table."""
    equation = program.equations[position]
    label = kinds[0]
    assert isinstance(label, Weight), "a gradient flows through the table alone"
    if not chains.is_invertible(label.chain):
        return reasons.BROADCAST
    shape, sizes = program.shape(equation.inputs[0]), tuple(equation.params["slice_sizes"])
    numbers = equation.params["dimension_numbers"]
    taken = tuple(i for i in numbers.start_index_map if sizes[i] == 1 != shape[i])
    if numbers.operand_batching_dims or len(taken) != 1:
        return reasons.NOT_ROWS
    (table,) = taken
    features = _others(shape, taken)
    if any(sizes[i] != shape[i] for i in features):
        return reasons.PARTS_OF_ROWS
    indices = program.shape(equation.inputs[1])
    out = program.shape(equation.outputs[0])
    spans = tuple(numbers.offset_dims)
    n_rows = len(indices) - 1
    return Site(
        program=program,
        kind="embedding",
        position=position,
        weight=label,
        kernel=label.stacked(chains.group(label.chain, shape, (taken, features)), 2),
        own_stack=None,
        d_in=shape[table],
        d_out=math.prod(shape[i] for i in features),
        operands=(Operand(position, 1),),
        reader=OneHotReader(shape[table], tuple(numbers.start_index_map).index(table)),
        inputs=Axes((), tuple(range(n_rows)), (n_rows,)),
        outputs=Axes((), _others(out, spans), spans),
        output=equation.outputs[0],
        row_axes=_others(out, spans),
    )


# --- entry by entry ------------------------------------------------------------------------------


def scaled(
    program: Program, position: int, kinds: Sequence[Label], sites: Sequence[Site]
) -> Scaled | Reason:
    """The product of a parameter, or of what is that already, with one more factor.

    A normalisation may multiply by a parameter before its last factor of data: a site whose output
    goes nowhere else is taken back and begun anew.
    """
    equation = program.equations[position]
    specials = [i for i, k in enumerate(kinds) if leaves_of(k)]
    ours = specials or [i for i, k in enumerate(kinds) if isinstance(k, Output)]
    if len(ours) != 1 or isinstance(kinds[ours[0]], Derived):
        why = changed(program, position, kinds)
        assert why is not None, "two parameters that are as they were are no data"
        return why
    label, factor = kinds[ours[0]], Operand(position, 1 - ours[0])
    shape = program.shape(equation.outputs[0])
    if isinstance(label, Weight):
        return Scaled(label, (Stage(label.chain, shape),), (factor,))
    if isinstance(label, Output):
        before, chain = sites[label.site], label.chain
        assert isinstance(before.reader, Product) and before.weight is not None
        stages, weight, factors = before.reader.stages, before.weight, before.operands
    else:
        assert isinstance(label, Scaled)
        stages, weight, factors, chain = label.stages, label.weight, label.factors, label.chain
    return Scaled(weight, (*stages, Stage(chain, shape)), (*factors, factor))


def times_number(site: Site | Reason, kinds: Sequence[Label]) -> Site | Reason:
    """The site with its inputs multiplied by the number that its kernel was, if there is one."""
    if isinstance(site, Reason):
        return site
    factors = [operand for k in kinds if isinstance(k, Scaled) for operand in k.factors]
    if factors:
        assert isinstance(site.reader, AsItIs | Patches)
        site.operands, site.reader = (*site.operands, *factors), Times(site.reader)
    return site


def scale(program: Program, position: int, product: Scaled) -> Site | Reason:
    """A product of data and a parameter, entry by entry: as many layers with one input each."""
    shape = product.weight.own
    numbers = _numbers(shape)
    for stage in product.stages:
        numbers = np.broadcast_to(chains.apply(stage.chain, numbers), stage.shape)
    value = program.equations[position].outputs[0]
    return _by_entry("scale", program, position, value, product.weight, numbers, product)


def bias(program: Program, position: int, result: int, weight: Weight) -> Site | Reason:
    """A parameter that is added to data, or put beside data, each entry a layer without inputs.

    Args:
      program: the loss.
      position: of the equation.
      result: which result of it the parameter's entries are spread over.
      weight: the parameter.
    """
    shape = weight.own
    value = program.equations[position].outputs[result]
    numbers = np.broadcast_to(chains.apply(weight.chain, _numbers(shape)), program.shape(value))
    return _by_entry("bias", program, position, value, weight, numbers)


def _by_entry(
    kind: str,
    program: Program,
    position: int,
    value: int,
    weight: Weight,
    numbers: np.ndarray,
    product: Scaled | None = None,
) -> Site | Reason:
    """As many layers as a parameter has entries, with one input each, or with none for a bias.

    Args:
      kind: "scale" or "bias".
      program: the loss.
      position: of the equation.
      value: the output.
      weight: the parameter.
      numbers: which of its entries each entry of the output meets.
      product: the factors that it meets; None for a bias.
    """
    size = math.prod(weight.own)
    axes = _entry_axes(numbers, size)
    if axes is None:
        return reasons.ENTRIES
    is_bias = product is None
    shape = (size, 1) if is_bias else (size, 1, 1)
    chain = weight.stacked(chains.extend((), weight.own, "reshape", shape), len(shape) - 1)
    return Site(
        program=program,
        kind=kind,
        position=position,
        weight=None if is_bias else weight,
        kernel=() if is_bias else chain,
        own_stack=size,
        d_in=0 if is_bias else 1,
        d_out=1,
        operands=() if product is None else product.factors,
        reader=Nothing() if product is None else Product(product.stages),
        inputs=axes,
        outputs=axes,
        output=value,
        row_axes=axes.rows,
        added=weight if is_bias else None,
        bias_chain=chain if is_bias else (),
    )


def _numbers(shape: Shape) -> np.ndarray:
    """Each entry's number: followed through rearrangements it says where the entry goes."""
    return np.arange(math.prod(shape)).reshape(shape)


def _entry_axes(numbers: np.ndarray, size: int) -> Axes | None:
    """Along which axes an array of entries' numbers varies, if these have all entries in order."""
    stack = tuple(i for i, size in enumerate(numbers.shape) if size > 1 and varies(numbers, i))
    rows = _others(numbers.shape, stack)
    entries = numbers[tuple(slice(None) if i in stack else 0 for i in range(numbers.ndim))]
    if not np.array_equal(entries.ravel(), np.arange(size)):
        return None
    return Axes(stack, rows, ())


def varies(numbers: np.ndarray, axis: int) -> bool:
    """Whether an array changes along an axis; what was broadcast does not and is not looked at."""
    if numbers.strides[axis] == 0:
        return False
    numbers = numbers[tuple(slice(0, 1) if s == 0 else slice(None) for s in numbers.strides)]
    return bool(np.any(np.diff(numbers, axis=axis)))


def bias_chain(
    program: Program, position: int, site: Site, output: Output, weight: Weight
) -> Chain | None:
    """Leaf -> (d_out,) if each row of the output gets each entry of the leaf once, in order."""
    assert site.weight is not None
    size = math.prod(weight.own)
    if size != site.d_out * (site.own_stack or 1) or weight.loops != site.weight.loops:
        return None
    numbers = chains.apply(weight.chain, _numbers(weight.own))
    numbers = np.broadcast_to(numbers, program.shape(program.equations[position].outputs[0]))
    raw_shape = program.shape(raw_output(site))
    numbers = chains.apply(chains.inverse(output.chain, raw_shape), numbers)
    numbers = chains.apply(site.split, numbers)
    if any(varies(numbers, axis) for axis in site.outputs.rows):
        return None
    inside = (*site.outputs.stack, *site.outputs.features)
    row = numbers.transpose((*site.outputs.rows, *inside))[(0,) * len(site.outputs.rows)]
    if not np.array_equal(row.ravel(), np.arange(size)):
        return None
    shape = (size,) if site.own_stack is None else (site.own_stack, site.d_out)
    return weight.stacked(chains.extend((), weight.own, "reshape", shape), 1)
