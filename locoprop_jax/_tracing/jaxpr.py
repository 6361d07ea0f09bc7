"""Jaxprs and their equations, one at a time.

Only this file and `primitives` import `jax.extend.core` or know how one JAX release differs from
the next. There are two views of a traced function as a whole:

* `program.flatten` gives a `Program`: every equation in order, calls inlined, each value a number.
  All analysis (what is a layer? what is its transfer function?) reads this view.
* `evaluate` runs the traced function as it is, calls and rematerialisation intact, records values
  on the way and lets perturbations in. Differentiating with respect to a perturbation gives the
  cotangent of the value it was added to.

Both name an equation by its *path*: its index, preceded by the indices of the calls around it.
JAX shares equation objects between calls of one function, so the objects themselves name nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex

from locoprop_jax._tracing.primitives import (
    BROADCAST,
    CALLS,
    COND,
    CUSTOM,
    ELEMENTWISE,
    REMAT,
    SAME,
)

Path = tuple[int, ...]


def is_literal(atom: Any) -> bool:
    """Whether an operand stands in the equation itself, as a number."""
    return isinstance(atom, jex.Literal)


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


def own_function(eqn: Any) -> Any:
    """The jaxpr of a function with its own derivative, which that is meant to be of."""
    return inner_jaxprs(eqn)[0]


def branches(eqn: Any) -> Sequence[Any]:
    """The jaxprs of which a `cond` or `switch` runs one; none for any other equation."""
    return eqn.params["branches"] if eqn.primitive in COND else ()


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


def closed_over_nothing(jaxpr: Any) -> Any:
    """A jaxpr with the values of its constants, of which it may have none."""
    inner, consts = open_jaxpr(jaxpr)
    return jex.ClosedJaxpr(inner, consts)  # pyright: ignore[reportPrivateImportUsage]


class StaticJaxpr:
    """A traced function as static data of a pytree: compared by its text."""

    def __init__(self, closed: Any):
        self.closed = closed

    @functools.cached_property
    def text(self) -> str:
        return str(self.closed)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StaticJaxpr) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)


def inner_jaxprs(eqn: Any) -> list[Any]:
    """The jaxprs among an equation's parameters."""
    return list(jex.jaxprs_in_params(eqn.params))


def as_function(jaxpr: Any, eqn: Any) -> Callable[..., list[jax.Array]]:
    """One equation as a function of its non-literal operands, in its own context (mesh, names)."""
    operands = [v for v in eqn.invars if not is_literal(v)]
    results = [v for v in eqn.outvars if not isinstance(v, jex.DropVar)]
    alone = jaxpr.replace(constvars=[], invars=operands, outvars=results, eqns=[eqn])
    closed = jex.ClosedJaxpr(alone, [])  # pyright: ignore[reportPrivateImportUsage]
    return jex.jaxpr_as_fun(closed)


def run_equation(jaxpr: Any, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """The results of one equation, None where the result is dropped."""
    values = [x for v, x in zip(eqn.invars, operands, strict=True) if not is_literal(v)]
    results = iter(as_function(jaxpr, eqn)(*values))
    return [None if isinstance(v, jex.DropVar) else next(results) for v in eqn.outvars]


def read_results(eqn: Any) -> list[Any]:
    """The shapes and dtypes of an equation's results, None where the result is dropped."""
    return [None if isinstance(v, jex.DropVar) else v.aval for v in eqn.outvars]


def context(eqn: Any) -> Any:
    """What an equation is formed under besides its operands: mesh, placement, and so on."""
    return getattr(eqn, "ctx", None)


def context_here() -> Any:
    """That of equations that are formed here and now."""
    return context(jax.make_jaxpr(jax.lax.neg)(1.0).eqns[0])


def scope(eqn: Any) -> str:
    """The `jax.named_scope`s that an equation stands in."""
    return str(getattr(eqn.source_info, "name_stack", ""))


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
