"""The flat view of a traced function: all its equations in order, each value a number."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from locoprop_jax._tracing.jaxpr import (
    Path,
    body,
    branches,
    is_elementwise,
    is_literal,
    open_jaxpr,
    own_function,
    run_equation,
)
from locoprop_jax._tracing.primitives import BROADCAST, CUSTOM, RESHAPE, SCAN
from locoprop_jax._tracing.rules import is_true_derivative


class Equation(NamedTuple):
    """One equation of a `Program`: values are numbers, shared across the calls they pass."""

    path: Path
    eqn: Any
    jaxpr: Any  # the jaxpr it stands in
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def primitive(self) -> Any:
        return self.eqn.primitive

    @property
    def params(self) -> Mapping[str, Any]:
        return self.eqn.params


PARAMETERS, DATA = frozenset({"parameters"}), frozenset({"data"})  # what a value is made of
END = -1  # stands among the consumers of a result that leaves the body of a loop


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A traced function, calls inlined. A value is a number below `len(avals)`.

    The equations of a call stand among the others; `calls` notes where it was. So do those of a
    function with its own derivative that a parameter and data enter (`rules`). A `scan` is one
    equation, and its body a program of its own, which shares the numbers of values; so is a `cond`,
    with a program for each branch.
    """

    equations: tuple[Equation, ...]
    calls: tuple[Equation, ...]  # the inlined ones, an outer call before those inside it
    avals: Sequence[Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    constants: Mapping[int, Any]  # values known when tracing: literals and closed-over arrays
    literals: Set[int]
    bodies: Mapping[int, tuple[Program, ...]]  # of scans and branches, by position
    is_body: bool = False

    def all_equations(self) -> Iterator[Equation]:
        """Its own and those of all loops."""
        yield from self.equations
        for inner in (inner for programs in self.bodies.values() for inner in programs):
            yield from inner.all_equations()

    def shape(self, value: int) -> tuple[int, ...]:
        return tuple(getattr(self.avals[value], "shape", ()))

    def is_inexact(self, value: int) -> bool:
        dtype = getattr(self.avals[value], "dtype", None)
        return dtype is not None and jax.numpy.issubdtype(dtype, np.inexact)

    def others(self, n_leaves: int) -> tuple[int, ...]:
        """The values from outside that are no parameters."""
        return (*self.inputs[n_leaves:], *self.constants)

    def is_data(self, value: int) -> bool:
        """Whether a value from outside is data if no parameter: an array, and no random key."""
        return _is_data(self.avals[value])

    @functools.cached_property
    def consumers(self) -> dict[int, list[int]]:
        """For each value, the positions of the equations that read it."""
        table: dict[int, list[int]] = {}
        for position, equation in enumerate(self.equations):
            for value in dict.fromkeys(equation.inputs):
                table.setdefault(value, []).append(position)
        if self.is_body:
            for value in dict.fromkeys(self.outputs):
                table.setdefault(value, []).append(END)
        return table

    @functools.cached_property
    def producers(self) -> dict[int, int]:
        """For each computed value, the position of the equation that writes it."""
        return {v: i for i, eq in enumerate(self.equations) for v in eq.outputs}

    @functools.cached_property
    def uniform(self) -> set[int]:
        """The values that are a number known when tracing, or arrays with that in all places."""
        known = {
            v
            for v, value in self.constants.items()
            if not isinstance(value, Tracer) and np.size(value) == 1
        }
        for equation in self.equations:
            if all(v in known for v in equation.inputs):
                spreads = equation.primitive in BROADCAST | RESHAPE
                if spreads or is_elementwise(equation.eqn):
                    known.update(equation.outputs)
        return known

    def slice(self, sources: Iterable[int], target: int) -> tuple[list[Equation], list[int]]:
        """The equations that compute `target`, cut at `sources`, and the values they start from.

        The values returned are program inputs, `sources` or closed-over arrays.
        """
        producers, cut = self.producers, set(sources)
        needed: set[int] = set()
        free: dict[int, None] = {}
        pending = [target]
        while pending:
            value = pending.pop()
            if value in self.literals:
                continue
            if value in cut or value not in producers:
                free[value] = None
            elif producers[value] not in needed:
                needed.add(producers[value])
                pending.extend(self.equations[producers[value]].inputs)
        return [self.equations[i] for i in sorted(needed)], list(free)

    def call(self, equations: Sequence[Equation], env: dict[int, Any], target: int) -> Any:
        """Evaluate `equations` from the values in `env` and return the value `target`."""
        env = {**self.constants, **env}
        for equation in equations:
            operands = [env.get(v) for v in equation.inputs]
            results = run_equation(equation.jaxpr, equation.eqn, operands)
            env.update(zip(equation.outputs, results, strict=True))
        return env[target]


def _is_data(aval: Any) -> bool:
    dtype = getattr(aval, "dtype", None)
    is_key = dtype is not None and jax.numpy.issubdtype(dtype, jax.dtypes.prng_key)
    return bool(getattr(aval, "shape", ())) and not is_key


def flatten(closed: Any, n_leaves: int = 0) -> Program:
    """Inline the calls of a traced function.

    Args:
      closed: its jaxpr.
      n_leaves: how many of its inputs, the first ones, are parameters: functions with their own
        derivative that these and data enter are inlined too if that is the true one.
    """
    avals: list[Any] = []
    constants: dict[int, Any] = {}
    literals: set[int] = set()
    origins: dict[int, frozenset[str]] = {}  # of each value: "parameters" and "data"

    def new(aval: Any, origin: frozenset[str] = frozenset()) -> int:
        avals.append(aval)
        origins[len(avals) - 1] = origin
        return len(avals) - 1

    def constant(aval: Any, value: Any) -> int:
        number = new(aval, DATA if _is_data(aval) else frozenset())
        constants[number] = value
        return number

    def program(
        jaxpr: Any, consts: Sequence[Any], path: Path, is_body: bool, given: Sequence[frozenset]
    ) -> Program:
        equations: list[Equation] = []
        calls: list[Equation | None] = []
        bodies: dict[int, tuple[Program, ...]] = {}

        def walk(jaxpr: Any, consts: Sequence[Any], args: Sequence[int], path: Path) -> list[int]:
            env: dict[Any, int] = dict(zip(jaxpr.invars, args, strict=True))
            for var, value in zip(jaxpr.constvars, consts, strict=True):
                env[var] = constant(var.aval, value)

            def read(atom: Any) -> int:
                if not is_literal(atom):
                    return env[atom]
                number = constant(atom.aval, atom.val)
                literals.add(number)
                return number

            for i, eqn in enumerate(jaxpr.eqns):
                inputs, here = [read(v) for v in eqn.invars], (*path, i)
                own = [origins[v] for v in inputs]
                inner = body(eqn)
                if eqn.primitive in CUSTOM and PARAMETERS in own and any(DATA <= o for o in own):
                    known = [constants.get(v) for v in inputs]
                    inner = own_function(eqn) if is_true_derivative(jaxpr, eqn, known) else None
                if inner is not None:
                    place = len(calls)
                    calls.append(None)
                    outputs = walk(*open_jaxpr(inner), inputs, here)
                    calls[place] = Equation(here, eqn, jaxpr, tuple(inputs), tuple(outputs))
                else:
                    origin = frozenset().union(*own)
                    outputs = [new(v.aval, origin) for v in eqn.outvars]
                    if eqn.primitive in SCAN:
                        inner = open_jaxpr(eqn.params["jaxpr"])
                        bodies[len(equations)] = (program(*inner, here, True, own),)
                    elif found := branches(eqn):
                        bodies[len(equations)] = tuple(
                            program(*open_jaxpr(branch), (*here, k), True, own[1:])
                            for k, branch in enumerate(found)
                        )
                    equations.append(Equation(here, eqn, jaxpr, tuple(inputs), tuple(outputs)))
                env.update(zip(eqn.outvars, outputs, strict=True))
            return [read(v) for v in jaxpr.outvars]

        inputs = [new(v.aval, origin) for v, origin in zip(jaxpr.invars, given, strict=True)]
        outputs = walk(jaxpr, consts, inputs, path)
        return Program(
            tuple(equations),
            tuple(call for call in calls if call is not None),
            avals,
            tuple(inputs),
            tuple(outputs),
            constants,
            literals,
            bodies,
            is_body,
        )

    jaxpr, consts = open_jaxpr(closed)
    given = [PARAMETERS] * n_leaves
    given += [DATA if _is_data(v.aval) else frozenset() for v in jaxpr.invars[n_leaves:]]
    return program(jaxpr, consts, (), False, given)
