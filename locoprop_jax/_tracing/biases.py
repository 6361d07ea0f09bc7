"""A parameter that is added to a layer's output: whether it is the layer's bias."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from locoprop_jax._tracing import chains
from locoprop_jax._tracing.chains import Chain
from locoprop_jax._tracing.labels import Label, Output, Weight
from locoprop_jax._tracing.program import END, Program
from locoprop_jax._tracing.sites import Site, raw_output


def attach_bias(
    program: Program,
    position: int,
    kinds: Sequence[Label],
    sites: Sequence[Site],
    consumers: dict[int, list[int]],
) -> Output | None:
    """Give a site the parameter that is added to its output; None where that is no bias of it."""
    equation = program.equations[position]
    outputs = [k for k in kinds if isinstance(k, Output)]
    weights = [k for k in kinds if isinstance(k, Weight)]
    if len(outputs) != 1 or len(weights) != 1:
        return None
    (output,), (weight,) = outputs, weights
    site = sites[output.site]
    if site.added is not None or site.kind == "embedding":
        return None
    # The raw output must go nowhere else, or the layer would have two outputs.
    value = site.output
    target = next(v for v, k in zip(equation.inputs, kinds, strict=True) if k is output)
    while len(consumers[value]) == 1 and value != target and consumers[value] != [END]:
        value = program.equations[consumers[value][0]].outputs[0]
    if consumers[value] != [position]:
        return None
    grown = program.shape(target) != program.shape(equation.outputs[0])
    if grown or not chains.is_invertible(output.chain):
        return None
    chain = _bias_chain(program, position, site, output, weight)
    if chain is None:
        return None
    site.added, site.bias_chain = weight, chain
    site.output, site.output_chain, site.tapped = equation.outputs[0], output.chain, position
    return output


def _bias_chain(
    program: Program, position: int, site: Site, output: Output, weight: Weight
) -> Chain | None:
    """Leaf -> (d_out,) if each row of the output gets each entry of the leaf once, in order."""
    assert site.weight is not None
    size = math.prod(weight.own)
    if size != site.d_out * (site.own_stack or 1) or weight.loops != site.weight.loops:
        return None
    numbers = chains.apply(weight.chain, chains.numbers(weight.own))
    numbers = np.broadcast_to(numbers, program.shape(program.equations[position].outputs[0]))
    raw_shape = program.shape(raw_output(site))
    numbers = chains.apply(chains.inverse(output.chain, raw_shape), numbers)
    numbers = chains.apply(site.split, numbers)
    if any(chains.varies(numbers, axis) for axis in site.outputs.rows):
        return None
    inside = (*site.outputs.stack, *site.outputs.features)
    row = numbers.transpose((*site.outputs.rows, *inside))[(0,) * len(site.outputs.rows)]
    if not np.array_equal(row.ravel(), np.arange(size)):
        return None
    shape = (size,) if site.own_stack is None else (site.own_stack, site.d_out)
    return weight.stacked(chains.extend((), weight.own, "reshape", shape), 1)
