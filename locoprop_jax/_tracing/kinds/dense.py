"""Matrix products: dense layers, and stacks of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from locoprop_jax._tracing import chains
from locoprop_jax._tracing.labels import Label, Operand, Weight
from locoprop_jax._tracing.operands import AsItIs
from locoprop_jax._tracing.program import Program
from locoprop_jax._tracing.sites import Axes, Site


def dense(program: Program, position: int, kinds: Sequence[Label]) -> Site:
    """A `dot_general` of data and a kernel; a stack of layers if the kernel has batch axes."""
    equation = program.equations[position]
    (kernel_at,) = (i for i, k in enumerate(kinds) if isinstance(k, Weight))
    label, data_at = kinds[kernel_at], 1 - kernel_at
    assert isinstance(label, Weight)
    contract, batch = equation.params["dimension_numbers"]
    assert chains.is_invertible(label.chain), "what was broadcast comes as an array of its own"
    shape, data_shape = (program.shape(equation.inputs[i]) for i in (kernel_at, data_at))
    contracted, stack = tuple(contract[kernel_at]), tuple(batch[kernel_at])
    of_data, stack_of_data = tuple(contract[data_at]), tuple(batch[data_at])
    free = chains.others(shape, (*contracted, *stack))
    rows = chains.others(data_shape, (*of_data, *stack_of_data))
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
