"""Equations that are run together, and chunks that are alike by one function.

JAX takes a traced function apart equation by equation to differentiate it, which is most of the
time to trace a gradient; what is under one `jax.jit` it differentiates once, and remembers. A
network of equal layers is many chunks of few kinds. As `inline` functions they leave no trace in
the program.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from locoprop_jax._tracing.jaxpr import context, context_here, inner_jaxprs, is_literal, scope


def is_traced(tree: Any) -> bool:
    """Whether any of these arrays are traced, to be compiled as a whole later."""
    return any(isinstance(x, Tracer) for x in jax.tree.leaves(tree))


Run = Callable[..., list[jax.Array]]
Keyed = tuple[Any, Any]  # an equation with its key


class Chunks:
    """The functions that chunks of equations were made so far, for one evaluation.

    Where nothing is traced there are to be no chunks: each would be compiled anew in every step.
    """

    def __init__(self, in_chunks: bool) -> None:
        self._context = context_here() if in_chunks else None
        self._in_chunks = in_chunks
        self._functions: dict[Any, Run] = {}

    def pieces(
        self, jaxpr: Any, is_special: Callable[[int], bool]
    ) -> Iterator[tuple[int, list[Keyed]]]:
        """The equations in order, as chunks of one scope and as single ones to run as they are.

        Args:
          jaxpr: that they are of.
          is_special: whether the equation of a number has to be run by itself.

        Yields:
          The number of equations so far, and the last of them, each with its key; None as the key
          of a single one.
        """
        waiting: list[Keyed] = []
        for i, eqn in enumerate(jaxpr.eqns):
            key = None if is_special(i) else self._key(eqn)
            if waiting and (key is None or scope(eqn) != scope(waiting[0][0])):
                yield i, waiting
                waiting = []
            if key is None:
                yield i + 1, [(eqn, None)]
            else:
                waiting.append((eqn, key))
        if waiting:
            yield len(jaxpr.eqns), waiting

    def _key(self, eqn: Any) -> Any:
        """What an equation does to its operands; None if it has to be run as it is.

        That is where it holds other programs, which JAX remembers by itself, has effects, or stands
        in a context of its own.
        """
        if not self._in_chunks or eqn.effects or inner_jaxprs(eqn) or context(eqn) != self._context:
            return None
        key = eqn.primitive, tuple(sorted(eqn.params.items(), key=lambda item: item[0]))
        try:
            hash(key)
        except TypeError:
            return None
        return key

    def run(
        self, chunk: Sequence[Keyed], env: Mapping[Any, Any], wanted: Sequence[Any]
    ) -> list[jax.Array]:
        """The values of some variables.

        Args:
          chunk: of the equations that compute them.
          env: the values of the variables that they start from.
          wanted: the variables.
        """
        numbers: dict[Any, int] = {}
        free: list[Any] = []
        keys = []
        for eqn, key in chunk:
            operands = []
            for atom in eqn.invars:
                if is_literal(atom):
                    operands.append((np.asarray(atom.val).tobytes(), atom.aval))
                    continue
                if atom not in numbers:
                    numbers[atom] = len(numbers)
                    free.append(atom)
                operands.append(numbers[atom])
            for var in eqn.outvars:
                numbers[var] = len(numbers)
            keys.append((key, tuple(operands)))
        whole = tuple(keys), tuple(numbers[var] for var in wanted)
        if whole not in self._functions:
            function = _as_function([eqn for eqn, _ in chunk], free, wanted)
            self._functions[whole] = jax.jit(function, inline=True)
        name = scope(chunk[0][0])
        with jax.named_scope(name) if name else contextlib.nullcontext():
            return self._functions[whole](*(env[var] for var in free))


def _as_function(equations: Sequence[Any], free: Sequence[Any], wanted: Sequence[Any]) -> Run:
    """Some equations as a function of the variables that they start from."""

    def function(*values: Any) -> list[jax.Array]:
        env = dict(zip(free, values, strict=True))
        for eqn in equations:
            operands = [atom.val if is_literal(atom) else env[atom] for atom in eqn.invars]
            results = eqn.primitive.bind(*operands, **eqn.params)
            results = results if eqn.primitive.multiple_results else [results]
            env.update(zip(eqn.outvars, results, strict=True))
        return [env[var] for var in wanted]

    return function
