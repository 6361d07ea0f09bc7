"""The running view of a traced function: values recorded on the way, perturbations let in."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from locoprop_jax._tracing.chunks import Chunks
from locoprop_jax._tracing.jaxpr import (
    Path,
    body,
    is_literal,
    open_jaxpr,
    own_function,
    run_equation,
    scan_of,
)
from locoprop_jax._tracing.primitives import CALLS, COND, CUSTOM, SCAN


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


def is_inexact(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def evaluate(
    closed: Any,
    args: Sequence[Any],
    record: frozenset[Address],
    perturbations: Mapping[Path, jax.Array],
    *,
    in_chunks: bool = False,
) -> tuple[list[Any], dict[Address, jax.Array]]:
    """Run a traced function, record the values at `record`, perturb first results.

    Args:
      closed: the jaxpr of the function.
      args: its flat arguments.
      record: which values to return besides the results.
      perturbations: for an equation's path, what to add (to derivatives only) to its first
        result, of that result's shape and dtype. The path (-1 - i,) is the i-th argument itself.
      in_chunks: whether equations are run in `Chunks`: where all this is traced.

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
            return atom.val if is_literal(atom) else env[atom]

        def is_special(i: int) -> bool:
            return (*path, i) in entered or (*path, i) in z

        kept = {
            Address((*path, i), side, index): (eqn.invars if side == "in" else eqn.outvars)[index]
            for i, eqn in enumerate(jaxpr.eqns)
            for side, index in by_path.get((*path, i), ())
        }
        uses = last_uses(jaxpr, [*jaxpr.outvars, *kept.values()])
        for end, piece in chunks.pieces(jaxpr, is_special):
            (eqn, key), here = piece[0], (*path, end - 1)
            if key is not None:
                wanted = [v for eqn, _ in piece for v in eqn.outvars if uses.get(v, -1) >= end]
                env.update(zip(wanted, chunks.run(piece, env, wanted), strict=True))
                continue
            operands = [read(v) for v in eqn.invars]
            if here in entered:
                results, inner = enter(jaxpr, eqn, operands, z, here)
                recorded.update(inner)
            else:
                results = run_equation(jaxpr, eqn, operands)
            if here in z:
                results[0] = tap(results[0], z[here])
            env.update(zip(eqn.outvars, results, strict=True))
        recorded.update({address: read(atom) for address, atom in kept.items()})
        return [read(v) for v in jaxpr.outvars], recorded

    def enter(jaxpr: Any, eqn: Any, operands: Sequence[Any], z: Mapping, here: Path):
        if eqn.primitive in CALLS:
            return run(*open_jaxpr(body(eqn)), operands, z, here)
        if eqn.primitive in CUSTOM:
            return ruled(jaxpr, eqn, operands, z, here)
        # What is rematerialised stays so: the perturbations enter as arguments, the records leave
        # as results. Those of a loop have an axis for it in front.
        inner = {path: value for path, value in z.items() if path[: len(here)] == here}
        inside = [a for a in sorted(record) if a.path[: len(here)] == here != a.path]
        if eqn.primitive in SCAN:
            return scanned(eqn, operands, inner, inside, here)
        if eqn.primitive in COND:
            return chosen(eqn, operands, inner, inside, here)
        jaxpr, consts = open_jaxpr(body(eqn))
        policy = {key: eqn.params[key] for key in ("prevent_cse", "policy")}

        def rematerialised(operands, values):
            z = dict(zip(inner, values, strict=True))
            results, recorded = run(jaxpr, consts, operands, z, here)
            return results, [recorded[address] for address in inside]

        results, values = jax.checkpoint(rematerialised, **policy)(operands, list(inner.values()))
        return results, dict(zip(inside, values, strict=True))

    def ruled(jaxpr: Any, eqn: Any, operands: Sequence[Any], z: Mapping, here: Path):
        """A function with its own derivative: its results are the rule's.

        They see the perturbations through the function, whose other operands are held fixed then.
        """
        function = open_jaxpr(own_function(eqn))
        perturbed, _ = run(*function, jax.lax.stop_gradient(list(operands)), z, here)
        _, recorded = run(*function, operands, z, here)
        pairs = zip(run_equation(jaxpr, eqn, operands), perturbed, strict=True)
        return [x if x is None or not is_inexact(x) else tap(x, p) for x, p in pairs], recorded

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

    def chosen(
        eqn: Any,
        operands: Sequence[Any],
        inner: Mapping[Path, jax.Array],
        inside: Sequence[Address],
        here: Path,
    ):
        """One of the branches; the records of the others are zeros. All have an axis of one."""

        def branch(k: int, closed: Any, operands: Sequence[Any], values: Sequence[Any]):
            z = {path: value[0] for path, value in zip(inner, values, strict=True)}
            results, recorded = run(*open_jaxpr(closed), operands, z, (*here, k))
            return results, {a: x[None] for a, x in recorded.items() if a in inside}

        index, *rest = operands
        functions = [
            functools.partial(branch, k, closed) for k, closed in enumerate(eqn.params["branches"])
        ]
        values = list(inner.values())
        shapes: dict[Address, Any] = {}
        for function in functions:
            shapes |= jax.eval_shape(function, rest, values)[1]

        def complete(function: Any, operands: Sequence[Any], values: Sequence[Any]):
            results, recorded = function(operands, values)
            return results, [
                recorded.get(a, jnp.zeros(shapes[a].shape, shapes[a].dtype)) for a in inside
            ]

        cases = [functools.partial(complete, function) for function in functions]
        index = index.astype(jnp.int32) if index.dtype == jnp.bool_ else index
        results, recorded = jax.lax.switch(index, cases, rest, values)
        return results, dict(zip(inside, recorded, strict=True))

    chunks = Chunks(in_chunks)
    by_path: dict[Path, list[tuple[str, int]]] = {}
    for address in sorted(record):
        by_path.setdefault(address.path, []).append((address.side, address.index))
    args = list(args)
    for path, z in perturbations.items():
        if path[0] < 0:
            args[-1 - path[0]] = tap(args[-1 - path[0]], z)
    jaxpr, consts = open_jaxpr(closed)
    results, recorded = run(jaxpr, consts, args, perturbations, ())
    recorded |= {a: args[-1 - a.path[0]] for a in record if a.path[0] < 0}
    return results, recorded


def last_uses(jaxpr: Any, kept: Sequence[Any]) -> dict[Any, int]:
    """By variable, the last of the equations that read it; past their end for what is kept."""
    uses = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if not is_literal(v)}
    return uses | {v: len(jaxpr.eqns) for v in kept if not is_literal(v)}
