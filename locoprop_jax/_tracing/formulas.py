"""Kernels that are functions of parameters: what is computed from which, and when it is the same.

A `Formula` stands for an array like a parameter of its own, a virtual leaf: the readers of layers
take it as they take parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from locoprop_jax._tracing import chains
from locoprop_jax._tracing.chains import Shape
from locoprop_jax._tracing.labels import Label, Weight, leaves_of
from locoprop_jax._tracing.program import Program

CHANGES: Mapping[str, Callable[[Any], Any]] = {
    "sub": jnp.negative,  # what is subtracted from data
    "div": jnp.reciprocal,  # what data are divided by
}


@dataclasses.dataclass(frozen=True, eq=False)
class Formula:
    """How a value is computed from parameters.

    Attributes:
      program: that it is part of.
      target: the value.
      roots: the values of the program that it is computed from, as parameters.
      free: those from outside that are none, each with its number in the whole program.
      loops: around it, as in `Weight`.
      change: what is done to it at last, a key of `CHANGES` or "".
    """

    program: Program
    target: int
    roots: tuple[tuple[int, Weight], ...]
    free: tuple[tuple[int, int], ...]
    loops: tuple
    change: str

    @property
    def leaves(self) -> frozenset[int]:
        return frozenset().union(*(leaves_of(weight) for _, weight in self.roots))

    @property
    def own(self) -> Shape:
        """The shape of the value."""
        return self.program.shape(self.target)

    @property
    def shape(self) -> Shape:
        """That of the virtual leaf, the loops in front."""
        return (*(length for _, length in self.loops), *self.own)

    def key(self) -> tuple:
        """The same for values that are computed in the same way from the same."""
        equations, _ = self.program.slice([v for v, _ in self.roots], self.target)
        known: dict[int, Any] = {**dict(self.free), **dict(self.roots)}

        def reference(value: int) -> Any:
            if value in known:
                return known[value]
            if value in self.program.literals:
                return "literal", np.asarray(self.program.constants[value]).tobytes()
            return "free", value

        steps = []
        for equation in equations:
            operands = tuple(map(reference, equation.inputs))
            steps.append((str(equation.primitive), str(dict(equation.params)), operands))
            known |= {v: ("step", len(steps), i) for i, v in enumerate(equation.outputs)}
        return reference(self.target), tuple(steps), self.change

    def evaluate(self, read: Callable[[int], Any], free: Mapping[int, Any]) -> Any:
        """The virtual leaf.

        Args:
          read: gives the leaf of a number, virtual ones too.
          free: the values from outside, by their numbers in the whole program.
        """
        equations, _ = self.program.slice([v for v, _ in self.roots], self.target)
        values = [v for v, _ in self.roots]

        def one(*roots: Any) -> Any:
            env = dict(zip(values, roots, strict=True))
            env |= {v: free[outer] for v, outer in self.free}
            result = self.program.call(equations, env, self.target)
            return CHANGES[self.change](result) if self.change else result

        arrays = [_read(weight, read(weight.leaf)) for _, weight in self.roots]
        axes = [0 if weight.loops else None for _, weight in self.roots]
        function = one
        for _ in self.loops:
            function = jax.vmap(function, in_axes=axes)
        return function(*arrays)


def _read(weight: Weight, leaf: Any) -> Any:
    """What a label stands for, the axes of its loops in front."""
    if weight.part is not None:
        leaf = weight.part.take(leaf)
    return chains.apply(weight.whole(weight.chain), leaf)


def formula(
    program: Program,
    target: int,
    leaves: frozenset[int],
    labels: Mapping[int, Label],
    change: str = "",
    outer: Mapping[int, int] | None = None,
) -> Formula | None:
    """How a value is computed, None where that is from more than can be told.

    Args:
      program: that it is part of.
      target: the value.
      leaves: the parameters that it is made of; an equation on its way may take others.
      labels: of the program's inputs.
      change: what is done to it at last.
      outer: of what enters the body of a loop as it is outside, the number in the whole program.
    """
    entering = {
        v: label
        for v in program.inputs
        if isinstance(label := labels[v], Weight) and leaves_of(label) <= leaves
    }
    _, free = program.slice(entering, target)
    roots = tuple((v, entering[v]) for v in free if v in entering)
    others = tuple(v for v in free if v not in entering and v not in program.constants)
    if program.is_body:
        pairs = {v: outer[v] for v in others if outer and v in outer}
    else:
        pairs = {v: v for v in others}
    loops = {weight.loops for _, weight in roots if weight.loops}
    if any(_is_complex(program, v) != _is_complex(program, target) for v, _ in roots):
        return None  # a real parameter whose kernel is complex: a Fourier transform
    if not roots or len(loops) > 1 or len(pairs) < len(others):
        return None
    return Formula(program, target, roots, tuple(pairs.items()), next(iter(loops), ()), change)


def _is_complex(program: Program, value: int) -> bool:
    return jnp.issubdtype(program.avals[value].dtype, jnp.complexfloating)
