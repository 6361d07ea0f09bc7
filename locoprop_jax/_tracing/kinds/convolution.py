"""Convolutions."""

from __future__ import annotations

import math
from collections.abc import Sequence

from locoprop_jax._tracing import chains
from locoprop_jax._tracing.labels import Label, Operand, Weight
from locoprop_jax._tracing.operands import Patches
from locoprop_jax._tracing.program import Program
from locoprop_jax._tracing.reasons import BATCH_IN_GROUPS, MOVED_OVER, Reason
from locoprop_jax._tracing.sites import Axes, Site


def convolution(program: Program, position: int, kinds: Sequence[Label]) -> Site | Reason:
    """A convolution of data with a kernel; a stack of layers if its features are in groups."""
    equation = program.equations[position]
    label = kinds[1]
    if not isinstance(label, Weight):
        return MOVED_OVER
    assert chains.is_invertible(label.chain), "what was broadcast comes as an array of its own"
    params = equation.params
    if params["batch_group_count"] != 1:
        return BATCH_IN_GROUPS
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    shape, out = program.shape(equation.inputs[1]), program.shape(equation.outputs[0])
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
    by_group = chains.extend(label.chain, shape, "transpose", (to_outputs, to_inputs, *spatial))
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
