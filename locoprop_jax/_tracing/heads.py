"""What lies between the layers and the loss: which of them are outputs, and their heads.

A head is cut out of the program as a function of one value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from locoprop_jax._tracing import flow, jaxpr
from locoprop_jax._tracing.evaluate import Address
from locoprop_jax._tracing.program import Program
from locoprop_jax._tracing.sites import of_input
from locoprop_jax._tracing.trace import Traced


def _positions(traced: Traced) -> set[int]:
    """Where sites are in the whole program: those in a loop at the loop."""
    sites = traced.detection.sites
    return {site.loops[0].position if site.loops else site.position for site in sites}


def output_sites(traced: Traced) -> list[int]:
    """The sites whose outputs reach the loss without passing another site; none in a loop."""
    program, detection = traced.program, traced.detection
    positions, feeding = _positions(traced), set[int]()  # the values that reach a site
    for i in reversed(range(len(program.equations))):
        equation = program.equations[i]
        if detection.live[i] and (i in positions or not feeding.isdisjoint(equation.outputs)):
            feeding.update(equation.inputs)
    return [
        i
        for i, site in enumerate(detection.sites)
        if not site.loops and site.position >= 0 and site.output not in feeding
    ]


def bypasses(traced: Traced, site: int) -> bool:
    """Whether a site's outputs reach the loss past all sites, beside those that they feed."""
    program, live, positions = traced.program, traced.detection.live, _positions(traced)
    outputs = traced.detection.sites[site].outside
    reached = flow.reached_live(program, live, outputs, without=positions)
    feeds = any(live[i] and reached.intersection(program.equations[i].inputs) for i in positions)
    return feeds and program.outputs[0] in reached


def reached_past(traced: Traced, output: int) -> set[int]:
    """What the other layers reach without passing through a layer's output."""
    program = traced.program
    others = {v for site in traced.detection.sites for v in site.outside} - {output}
    own = {program.producers[output]}
    return flow.reached_live(program, traced.detection.live, others, without=own)


class Cut(NamedTuple):
    """A part of the program as a function of one value, and the other values it needs."""

    closed: Any
    free: list[int]

    def function(self, known: Mapping[int, Any]) -> Callable[[jax.Array], jax.Array]:
        """The same as a function of the one value alone, the others held fixed."""
        free = [known[v] for v in self.free]
        return lambda value: jaxpr.as_callable(self.closed)(value, *free)[0]


def cut(traced: Traced, source: int, end: int) -> Cut:
    """Cut what lies between two values out of the program: to the loss, an output layer's head.

    What is computed from other parameters (regularizers, other output layers) is held fixed at its
    value, what is computed from the arguments alone is computed again.
    """
    program = traced.program
    equations, free = program.slice([source, *other_params(traced, [source], end)], end)
    free = [v for v in free if v != source]

    def function(value: Any, *values: Any) -> Any:
        return program.call(equations, {source: value, **dict(zip(free, values, strict=True))}, end)

    avals = [program.avals[v] for v in (source, *free)]
    return Cut(jax.make_jaxpr(function)(*map(as_struct, avals)), free)


def other_params(traced: Traced, starts: Sequence[int], end: int) -> set[int]:
    """The values of parameters that enter on the way from values to another, past the first.

    None where there is no such way.
    """
    program = traced.program
    moving = flow.reached_from(program, starts)
    if end not in moving:
        return set()
    of_params = flow.reached_from(program, program.inputs[: traced.n_leaves])
    equations, _ = program.slice(starts, end)
    return {v for e in equations for v in e.inputs if v in of_params and v not in moving}


def as_struct(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def addresses(program: Program, values: Sequence[int]) -> dict[int, Address]:
    """Where the running program has these values: constants are nowhere, but known already."""
    producers, inputs = program.producers, {v: i for i, v in enumerate(program.inputs)}
    found = {}
    for value in values:
        if value in inputs:  # a parameter that is a layer at its own value, and its penalty
            found[value] = Address((of_input(inputs[value]),), "out", 0)
        elif value in producers:
            equation = program.equations[producers[value]]
            found[value] = Address(equation.path, "out", equation.outputs.index(value))
    return found
