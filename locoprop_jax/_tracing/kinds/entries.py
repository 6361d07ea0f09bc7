"""Products and sums entry by entry: scales, and biases that are layers of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from locoprop_jax._tracing import chains
from locoprop_jax._tracing.labels import (
    Derived,
    Label,
    Operand,
    Output,
    Scaled,
    Weight,
    changed,
    leaves_of,
)
from locoprop_jax._tracing.operands import Nothing, Product, Stage
from locoprop_jax._tracing.program import Program
from locoprop_jax._tracing.reasons import Reason
from locoprop_jax._tracing.sites import Axes, Site, of_input


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


def scale(program: Program, position: int, product: Scaled) -> Site | None:
    """A product of data and a parameter, entry by entry: as many layers with one input each.

    None where the entries meet the data in another order, or more than once in a row.
    """
    numbers = chains.numbers(product.weight.own)
    for stage in product.stages:
        numbers = np.broadcast_to(chains.apply(stage.chain, numbers), stage.shape)
    value = program.equations[position].outputs[0]
    return _by_entry("scale", program, position, value, product.weight, numbers, product)


def bias(program: Program, position: int, result: int, weight: Weight) -> Site | None:
    """A parameter that is added to data, or put beside data, each entry a layer without inputs.

    None where the entries are in another order, or more than once in a row.

    Args:
      program: the loss.
      position: of the equation.
      result: which result of it the parameter's entries are spread over.
      weight: the parameter.
    """
    value = program.equations[position].outputs[result]
    numbers = chains.apply(weight.chain, chains.numbers(weight.own))
    numbers = np.broadcast_to(numbers, program.shape(value))
    return _by_entry("bias", program, position, value, weight, numbers)


def own_value(program: Program, leaf: int) -> Site:
    """A parameter as a layer at its own value, wherever that goes: its entries have one row each.

    For one whose uses entry by entry do not agree, such as a deviation that data are divided by and
    whose logarithm is added to the loss.
    """
    value = program.inputs[leaf]
    weight = Weight(leaf, program.shape(value), ())
    found = _by_entry("bias", program, of_input(leaf), value, weight, chains.numbers(weight.own))
    assert isinstance(found, Site), "each entry stands once, in order"
    return found


def _by_entry(
    kind: str,
    program: Program,
    position: int,
    value: int,
    weight: Weight,
    numbers: np.ndarray,
    product: Scaled | None = None,
) -> Site | None:
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
        return None
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


def _entry_axes(numbers: np.ndarray, size: int) -> Axes | None:
    """Along which axes an array of entries' numbers varies, if these have all entries in order."""
    sizes = enumerate(numbers.shape)
    stack = tuple(i for i, size in sizes if size > 1 and chains.varies(numbers, i))
    rows = chains.others(numbers.shape, stack)
    entries = numbers[tuple(slice(None) if i in stack else 0 for i in range(numbers.ndim))]
    if not np.array_equal(entries.ravel(), np.arange(size)):
        return None
    return Axes(stack, rows, ())
