"""Data that parameters meet without rows: a batch of one, or masks, weights and statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence

from locoprop_jax._tracing import chains, primitives
from locoprop_jax._tracing.jaxpr import is_elementwise
from locoprop_jax._tracing.kinds.embedding import embedding
from locoprop_jax._tracing.known import Scope, kernel_key
from locoprop_jax._tracing.labels import Derived, Label, Weight, is_data, leaves_of
from locoprop_jax._tracing.program import Equation
from locoprop_jax._tracing.reasons import Reason


def is_one_row(scope: Scope, position: int, kinds: Sequence[Label]) -> bool:
    """Whether data from outside meet a parameter in one row.

    This may be a batch of one example; or a mask, the weights of a regularizer, or statistics,
    and what it makes is a kernel or only regularized. It is no layer unless the parameter is in
    none otherwise, or another layer comes after it.
    """
    equation = scope.program.equations[position]
    leaves = frozenset().union(*map(leaves_of, kinds))
    pairs = list(zip(equation.inputs, kinds, strict=True))
    data = [v for v, k in pairs if not leaves_of(k)]
    outer = scope.known.outer
    moved = any(outer.get(v, v) in scope.known.of_params for v in data)
    if moved or not leaves.isdisjoint(scope.known.at_once):
        return False
    of_arguments = any(outer.get(v, v) in scope.known.of_arguments for v in data)
    if equation.primitive in primitives.SCATTER:  # entries put in their places in a kernel
        met = any(is_data(k) and scope.program.is_inexact(v) for v, k in pairs)
        return not of_arguments and not met
    if equation.primitive in primitives.GATHER:
        if of_arguments or not isinstance(kinds[0], Weight):
            return not of_arguments
        no_rows = isinstance(embedding(scope.program, position, kinds), Reason)
        return no_rows or _is_kernel(scope, equation.outputs[0])
    if equation.primitive in primitives.DOT_GENERAL:
        kernel = kernel_key(next(k for k in kinds if leaves_of(k)))
        if kernel in scope.known.with_constants:
            return False
        scope.known.met_constants.add(kernel)
        contract, batch = equation.params["dimension_numbers"]
        at = equation.inputs.index(data[0])
        shape = scope.program.shape(data[0])
        rows = chains.others(shape, (*contract[at], *batch[at]))
        return math.prod(shape[i] for i in rows) == 1
    entries = max(math.prod(scope.program.shape(v)) for v, k in pairs if leaves_of(k))
    result = math.prod(scope.program.shape(equation.outputs[0]))
    return is_elementwise(equation.eqn) and result == entries


def note_networks(scope: Scope, equation: Equation, kinds: Sequence[Label]) -> None:
    """What data met in one row was a layer if another kernel is next, or if data pick entries.

    Entries are picked of the outputs of one example by its label; of a table rows are.
    """
    if equation.primitive in primitives.GATHER | primitives.DYNAMIC_SLICE:
        is_entry = math.prod(equation.params["slice_sizes"]) == 1
        if isinstance(kinds[0], Derived) and kinds[0].met_data and is_entry:
            scope.known.networks.update(leaves_of(kinds[0]))
        return
    if equation.primitive not in primitives.DOT_GENERAL | primitives.CONVOLUTION:
        return
    for one, other in (kinds[:2], kinds[1::-1]):
        of_data = isinstance(one, Derived) and one.met_data
        if of_data and not leaves_of(other) <= leaves_of(one):
            scope.known.networks.update(leaves_of(one))


def _is_kernel(scope: Scope, value: int) -> bool:
    """Whether a value, perhaps rearranged, goes into a product with data and nowhere else."""
    for after, operand in scope.sole_uses(value):
        if after.primitive in primitives.CONVOLUTION:
            return after.inputs[1] == operand
        if after.primitive in primitives.DOT_GENERAL:
            other = after.inputs[1 - after.inputs.index(operand)]
            _, (batch, _) = after.params["dimension_numbers"]
            return other in scope.known.of_data and not batch
    return False
