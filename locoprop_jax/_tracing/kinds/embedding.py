"""Rows looked up in a table."""

from __future__ import annotations

import math
from collections.abc import Sequence

from locoprop_jax._tracing import chains
from locoprop_jax._tracing.labels import Label, Operand, Weight
from locoprop_jax._tracing.operands import OneHotReader
from locoprop_jax._tracing.program import Program
from locoprop_jax._tracing.reasons import NOT_ROWS, PARTS_OF_ROWS, Reason
from locoprop_jax._tracing.sites import Axes, Site


def embedding(program: Program, position: int, kinds: Sequence[Label]) -> Site | Reason:
    """A `gather` of whole rows of a table."""
    equation = program.equations[position]
    label = kinds[0]
    assert isinstance(label, Weight), "a gradient flows through the table alone"
    assert chains.is_invertible(label.chain), "what was broadcast comes as an array of its own"
    shape, sizes = program.shape(equation.inputs[0]), tuple(equation.params["slice_sizes"])
    numbers = equation.params["dimension_numbers"]
    taken = tuple(i for i in numbers.start_index_map if sizes[i] == 1 != shape[i])
    if numbers.operand_batching_dims or len(taken) != 1:
        return NOT_ROWS
    (table,) = taken
    features = chains.others(shape, taken)
    if any(sizes[i] != shape[i] for i in features):
        return PARTS_OF_ROWS
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
        outputs=Axes((), chains.others(out, spans), spans),
        output=equation.outputs[0],
        row_axes=chains.others(out, spans),
    )
