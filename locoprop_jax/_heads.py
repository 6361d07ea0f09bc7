"""The head of a network: the part of a traced loss between some value and the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from locoprop_jax import _flow
from locoprop_jax._jaxpr import Address, Program
from locoprop_jax._trace import Traced


class HeadPlan(NamedTuple):
    """The loss as a function of one value, and the other values it needs."""

    closed: Any
    free: list[int]


def head_plan(traced: Traced, value: int) -> HeadPlan:
    """Cut out of the program what leads from a value to the loss.

    What the loss computes from other parameters (regularizers, other output layers) is held fixed
    at its value, what it computes from the arguments alone is computed again.
    """
    program, loss = traced.program, traced.program.outputs[0]
    moving = _flow.reached_from(program, [value])
    of_params = _flow.reached_from(program, program.inputs[: traced.n_leaves])
    equations, _ = program.slice([value], loss)
    fixed = {v for e in equations for v in e.inputs if v in of_params and v not in moving}
    equations, free = program.slice([value, *fixed], loss)
    free = [v for v in free if v != value]

    def head(output: Any, *values: Any) -> Any:
        return program.call(
            equations,
            {value: output, **dict(zip(free, values, strict=True))},
            loss,
        )

    avals = [program.avals[v] for v in (value, *free)]
    return HeadPlan(jax.make_jaxpr(head)(*map(as_struct, avals)), free)


def as_struct(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def addresses(program: Program, values: Sequence[int]) -> dict[int, Address]:
    """Where the running program computes these values; those that are inputs are known already."""
    producers = program.producers
    found = {}
    for value in values:
        if value in producers:
            equation = program.equations[producers[value]]
            found[value] = Address(equation.path, "out", equation.outputs.index(value))
    return found
