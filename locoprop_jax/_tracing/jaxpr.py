"""Read and run jaxprs.

The only file that imports `jax.extend.core` or knows how one JAX release differs from the next.
It offers two views of a traced function:

* `flatten` gives a `Program`: every equation in order, calls inlined, each value a number. All
  analysis (what is a layer? what is its transfer function?) reads this view.
* `evaluate` runs the traced function as it is, calls and rematerialisation intact, records values
  on the way and lets perturbations in. Differentiating with respect to a perturbation gives the
  cotangent of the value it was added to.

Both name an equation by its *path*: its index, preceded by the indices of the calls around it.
JAX shares equation objects between calls of one function, so the objects themselves name nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import numpy as np
from jax.core import Tracer
from jax.extend.core import primitives

Path = tuple[int, ...]


def _primitives(*names: str) -> frozenset:
    """The primitives of these names that this JAX has; they are compared as objects ever after."""
    found = (getattr(primitives, f"{name}_p", None) for name in names)
    return frozenset(primitive for primitive in found if primitive is not None)


# Calls whose body is evaluated in place, and rematerialisation, which is rebuilt around its body.
CALLS = _primitives("jit", "pjit", "closed_call", "core_call")
REMAT = _primitives("remat")
SCAN = _primitives("scan")
CUSTOM = _primitives("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
STOP_GRADIENT = _primitives("stop_gradient")
DOT_GENERAL = _primitives("dot_general")
ADD = _primitives("add", "add_any")
TRANSPOSE = _primitives("transpose")
RESHAPE = _primitives("reshape", "squeeze")
BROADCAST = _primitives("broadcast_in_dim")
CAST = _primitives("convert_element_type", "reduce_precision")
SAME = _primitives("copy", "copy_p", "name", "sharding_constraint")
MUL = _primitives("mul")
DIV = _primitives("div")
REDUCE_SUM = _primitives("reduce_sum")
REDUCE = REDUCE_SUM | _primitives("reduce_max", "reduce_min", "reduce_prod")
CUMULATIVE = _primitives("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
DYNAMIC_SLICE = _primitives("dynamic_slice")
SLICE = DYNAMIC_SLICE | _primitives("slice")
PAD = _primitives("pad")
REVERSE = _primitives("rev")
CONCATENATE = _primitives("concatenate")
GATHER = _primitives("gather")
SELECT = _primitives("select_n")
CONVOLUTION = _primitives("conv_general_dilated")
# Not exported by name.
SPLIT = frozenset(
    eqn.primitive
    for eqn in jax.make_jaxpr(lambda x: jax.lax.split(x, (1, 1)))(np.zeros(2, np.float32)).eqns
)
# Equations through which a loss is a weighted sum of its terms.
SUMS = ADD | _primitives("sub", "neg", "reduce_sum") | RESHAPE | BROADCAST | CAST | SAME
ELEMENTWISE = (
    ADD
    | CAST
    | MUL
    | DIV
    | STOP_GRADIENT
    | _primitives(
        *[
            "abs",
            "acos",
            "acosh",
            "and",
            "asin",
            "asinh",
            "atan",
            "atan2",
            "atanh",
            "cbrt",
            "ceil",
            "clamp",
            "copy",
            "cos",
            "cosh",
            "digamma",
            "eq",
            "erf",
            "erf_inv",
            "erfc",
            "exp",
            "exp2",
            "expm1",
            "floor",
            "ge",
            "gt",
            "integer_pow",
            "is_finite",
            "le",
            "lgamma",
            "log",
            "log1p",
            "logistic",
            "lt",
            "max",
            "min",
            "ne",
            "neg",
            "nextafter",
            "not",
            "or",
            "pow",
            "rem",
            "round",
            "rsqrt",
            "select_n",
            "sign",
            "sin",
            "sinh",
            "sqrt",
            "square",
            "sub",
            "tan",
            "tanh",
            "xor",
        ]
    )
)


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """The equations of a jaxpr and the values of its constants.

    A call's jaxpr is closed over its constants, a rematerialised one is not, and from JAX 0.12
    the two are one type.
    """
    return getattr(jaxpr, "jaxpr", jaxpr), tuple(getattr(jaxpr, "consts", ()))


def body(eqn: Any) -> Any | None:
    """The jaxpr that a call or a rematerialised equation runs; None for any other equation."""
    if eqn.primitive in CALLS:
        return eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
    return eqn.params["jaxpr"] if eqn.primitive in REMAT else None


class Scan(NamedTuple):
    """What a `scan` hands from the outside to its body and back, told by their ranks.

    Attributes:
      consts: how many operands the body sees the same each time.
      carry: how many it takes over from the time before.
      results: how many of its results stack up.
    """

    consts: int
    carry: int
    results: int


def scan_of(eqn: Any) -> Scan:
    inner = open_jaxpr(eqn.params["jaxpr"])[0]

    def differ(outer: Sequence[Any], inner: Sequence[Any]) -> int:
        return sum(
            len(getattr(a.aval, "shape", ())) != len(getattr(b.aval, "shape", ()))
            for a, b in zip(outer, inner, strict=True)
        )

    results = differ(eqn.outvars, inner.outvars)
    carry = len(inner.outvars) - results
    return Scan(len(eqn.invars) - carry - differ(eqn.invars, inner.invars), carry, results)


def as_callable(closed: Any) -> Callable[..., list[jax.Array]]:
    """A traced function as a function of its flat arguments."""
    return jex.jaxpr_as_fun(closed)


def inner_jaxprs(eqn: Any) -> list[Any]:
    """The jaxprs among an equation's parameters."""
    return list(jex.jaxprs_in_params(eqn.params))


def as_function(jaxpr: Any, eqn: Any) -> Callable[..., list[jax.Array]]:
    """One equation as a function of its non-literal operands, in its own context (mesh, names)."""
    operands = [v for v in eqn.invars if not isinstance(v, jex.Literal)]
    results = [v for v in eqn.outvars if not isinstance(v, jex.DropVar)]
    alone = jaxpr.replace(constvars=[], invars=operands, outvars=results, eqns=[eqn])
    closed = jex.ClosedJaxpr(alone, [])  # pyright: ignore[reportPrivateImportUsage]
    return jex.jaxpr_as_fun(closed)


def run_equation(jaxpr: Any, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """The results of one equation, None where the result is dropped."""
    values = [
        x for v, x in zip(eqn.invars, operands, strict=True) if not isinstance(v, jex.Literal)
    ]
    results = iter(as_function(jaxpr, eqn)(*values))
    return [None if isinstance(v, jex.DropVar) else next(results) for v in eqn.outvars]


# --- the flat view -------------------------------------------------------------------------------


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


END = -1  # stands among the consumers of a result that leaves the body of a loop


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A traced function, calls inlined. A value is a number below `len(avals)`.

    The equations of a call stand among the others; `calls` notes where it was. A `scan` is one
    equation, and its body a program of its own, which shares the numbers of values.
    """

    equations: tuple[Equation, ...]
    calls: tuple[Equation, ...]  # the inlined ones, an outer call before those inside it
    avals: Sequence[Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    constants: Mapping[int, Any]  # values known when tracing: literals and closed-over arrays
    literals: Set[int]
    bodies: Mapping[int, Program]  # of scans, by position
    is_body: bool = False

    def all_equations(self) -> Iterator[Equation]:
        """Its own and those of all loops."""
        yield from self.equations
        for inner in self.bodies.values():
            yield from inner.all_equations()

    def shape(self, value: int) -> tuple[int, ...]:
        return tuple(getattr(self.avals[value], "shape", ()))

    def is_inexact(self, value: int) -> bool:
        dtype = getattr(self.avals[value], "dtype", None)
        return dtype is not None and jax.numpy.issubdtype(dtype, np.inexact)

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


def flatten(closed: Any) -> Program:
    """Inline the calls of a traced function.

    The numbering depends only on the structure, so the programs of one function traced at two
    batch sizes can be compared value by value.
    """
    avals: list[Any] = []
    constants: dict[int, Any] = {}
    literals: set[int] = set()

    def new(aval: Any) -> int:
        avals.append(aval)
        return len(avals) - 1

    def constant(aval: Any, value: Any) -> int:
        number = new(aval)
        constants[number] = value
        return number

    def program(jaxpr: Any, consts: Sequence[Any], path: Path, is_body: bool) -> Program:
        equations: list[Equation] = []
        calls: list[Equation | None] = []
        bodies: dict[int, Program] = {}

        def walk(jaxpr: Any, consts: Sequence[Any], args: Sequence[int], path: Path) -> list[int]:
            env: dict[Any, int] = dict(zip(jaxpr.invars, args, strict=True))
            for var, value in zip(jaxpr.constvars, consts, strict=True):
                env[var] = constant(var.aval, value)

            def read(atom: Any) -> int:
                if not isinstance(atom, jex.Literal):
                    return env[atom]
                number = constant(atom.aval, atom.val)
                literals.add(number)
                return number

            for i, eqn in enumerate(jaxpr.eqns):
                inputs, here = [read(v) for v in eqn.invars], (*path, i)
                if (inner := body(eqn)) is not None:
                    place = len(calls)
                    calls.append(None)
                    outputs = walk(*open_jaxpr(inner), inputs, here)
                    calls[place] = Equation(here, eqn, jaxpr, tuple(inputs), tuple(outputs))
                else:
                    outputs = [new(v.aval) for v in eqn.outvars]
                    if eqn.primitive in SCAN:
                        inner = open_jaxpr(eqn.params["jaxpr"])
                        bodies[len(equations)] = program(*inner, here, True)
                    equations.append(Equation(here, eqn, jaxpr, tuple(inputs), tuple(outputs)))
                env.update(zip(eqn.outvars, outputs, strict=True))
            return [read(v) for v in jaxpr.outvars]

        inputs = [new(v.aval) for v in jaxpr.invars]
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

    return program(*open_jaxpr(closed), (), False)


def is_elementwise(equation: Any) -> bool:
    """Whether an equation computes each entry of its result from the same entry of its operands.

    A custom derivative rule (`jax.nn.relu`) is elementwise when the function it belongs to is.
    """
    if equation.primitive in ELEMENTWISE | SAME:
        return True
    if equation.primitive not in CUSTOM | CALLS:
        return False
    return all(
        is_elementwise(inner)
        or (inner.primitive in BROADCAST and getattr(inner.invars[0].aval, "size", 0) == 1)
        for jaxpr in inner_jaxprs(equation)
        for inner in jaxpr.eqns
    )


# --- the running view ----------------------------------------------------------------------------


class Address(NamedTuple):
    """A value of a running program: operand or result `index` of the equation at `path`."""

    path: Path
    side: str  # "in" or "out"
    index: int


@jax.custom_jvp
def tap(x: jax.Array, perturbation: jax.Array) -> jax.Array:
    """`x` itself; only derivatives see the perturbation.

    Adding zeros instead would change -0.0, cross the optimization barriers of rematerialisation
    and keep an addition in the compiled forward pass.
    """
    del perturbation
    return x


@tap.defjvp
def _tap_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    return primals[0], jax.tree.map(jax.numpy.add, tangents[0], tangents[1])


def evaluate(
    closed: Any,
    args: Sequence[Any],
    record: frozenset[Address],
    perturbations: Mapping[Path, jax.Array],
) -> tuple[list[Any], dict[Address, jax.Array]]:
    """Run a traced function, record the values at `record`, perturb first results.

    Args:
      closed: the jaxpr of the function.
      args: its flat arguments.
      record: which values to return besides the results.
      perturbations: for an equation's path, what to add (to derivatives only) to its first
        result, of that result's shape and dtype.

    Returns:
      The flat results, and the recorded values by address.
    """
    entered = {address.path[:n] for address in record for n in range(1, len(address.path))}
    entered |= {path[:n] for path in perturbations for n in range(1, len(path))}

    def run(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], z: Mapping, path: Path):
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        recorded: dict[Address, jax.Array] = {}

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, jex.Literal) else env[atom]

        for i, eqn in enumerate(jaxpr.eqns):
            here = (*path, i)
            operands = [read(v) for v in eqn.invars]
            if here in entered:
                results, inner = enter(eqn, operands, z, here)
                recorded.update(inner)
            else:
                results = run_equation(jaxpr, eqn, operands)
            if here in z:
                results[0] = tap(results[0], z[here])
            values = {"in": operands, "out": results}
            for side, index in by_path.get(here, ()):
                recorded[Address(here, side, index)] = values[side][index]
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars], recorded

    def enter(eqn: Any, operands: Sequence[Any], z: Mapping, here: Path):
        if eqn.primitive in CALLS:
            return run(*open_jaxpr(body(eqn)), operands, z, here)
        # What is rematerialised stays so: the perturbations enter as arguments, the records leave
        # as results. Those of a loop have an axis for it in front.
        inner = {path: value for path, value in z.items() if path[: len(here)] == here}
        inside = [a for a in sorted(record) if a.path[: len(here)] == here != a.path]
        if eqn.primitive in SCAN:
            return scanned(eqn, operands, inner, inside, here)
        jaxpr, consts = open_jaxpr(body(eqn))
        policy = {key: eqn.params[key] for key in ("prevent_cse", "policy")}

        def rematerialised(operands, values):
            z = dict(zip(inner, values, strict=True))
            results, recorded = run(jaxpr, consts, operands, z, here)
            return results, [recorded[address] for address in inside]

        results, values = jax.checkpoint(rematerialised, **policy)(operands, list(inner.values()))
        return results, dict(zip(inside, values, strict=True))

    def scanned(
        eqn: Any,
        operands: Sequence[Any],
        inner: Mapping[Path, jax.Array],
        inside: Sequence[Address],
        here: Path,
    ):
        (jaxpr, consts), scan = open_jaxpr(eqn.params["jaxpr"]), scan_of(eqn)
        fixed, start = operands[: scan.consts], operands[scan.consts : scan.consts + scan.carry]

        def step(carry: Any, given: Any):
            xs, values = given
            z = dict(zip(inner, values, strict=True))
            results, recorded = run(jaxpr, consts, [*fixed, *carry, *xs], z, here)
            return results[: scan.carry], (results[scan.carry :], [recorded[a] for a in inside])

        options = {key: eqn.params[key] for key in ("length", "reverse", "unroll")}
        given = (operands[scan.consts + scan.carry :], list(inner.values()))
        carry, (ys, values) = jax.lax.scan(step, list(start), given, **options)
        return [*carry, *ys], dict(zip(inside, values, strict=True))

    by_path: dict[Path, list[tuple[str, int]]] = {}
    for address in sorted(record):
        by_path.setdefault(address.path, []).append((address.side, address.index))
    jaxpr, consts = open_jaxpr(closed)
    return run(jaxpr, consts, args, perturbations, ())
