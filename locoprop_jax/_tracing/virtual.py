"""What is made of parameters, as labels like those of parameters: virtual leaves."""

from __future__ import annotations

from collections.abc import Sequence

from locoprop_jax._tracing import chains, primitives
from locoprop_jax._tracing.formulas import formula
from locoprop_jax._tracing.known import Scope
from locoprop_jax._tracing.labels import (
    Derived,
    Label,
    Scaled,
    Weight,
    leaves_of,
    without_number,
)
from locoprop_jax._tracing.program import Equation


def virtual(scope: Scope, label: Label, change: str = "", value: int | None = None) -> Label:
    """What is computed from parameters as an array like a parameter; else as it is.

    Args:
      scope: that the value is in.
      label: of the value.
      change: what an equation does to it besides, a key of `formulas.CHANGES`.
      value: where the label is, if a change is asked for.
    """
    chain: chains.Chain = ()
    if isinstance(label, Derived) and label.value is not None:
        value, chain = label.value, label.chain
    elif isinstance(label, Scaled):
        value, chain = _product(scope, label), label.chain
    elif not (change and isinstance(label, Weight)):
        return label
    assert value is not None
    found = formula(scope.program, value, leaves_of(label), scope.labels, change)
    if found is None:
        return label
    leaf = scope.known.number(found)
    return Weight(leaf, found.own, chain, found.loops, made=found.leaves)


def as_parameters(scope: Scope, equation: Equation, kinds: Sequence[Label]) -> list[Label]:
    """The labels of what data meet, what is made of parameters as arrays like them."""
    primitive, program = equation.primitive, scope.program
    result: list[Label] = []
    for i, (value, label) in enumerate(zip(equation.inputs, kinds, strict=True)):
        change = ""
        if i == 1 and primitive in primitives.SUB | primitives.DIV:
            change = str(primitive)
        is_kernel = primitive in primitives.DOT_GENERAL | primitives.CONVOLUTION
        is_number = is_kernel and isinstance(without_number(program, label), Weight)
        stays = isinstance(label, Scaled) and primitive in primitives.MUL
        is_spread = isinstance(label, Weight) and not chains.is_invertible(label.chain)
        if is_spread and (is_kernel or primitive in primitives.GATHER):
            result.append(virtual(scope, Derived(leaves_of(label), "broadcast_in_dim", value)))
        else:
            result.append(label if is_number or stays else virtual(scope, label, change, value))
    return result


def _product(scope: Scope, label: Scaled) -> int:
    """The value that is the product."""
    return scope.program.equations[label.factors[-1].position].outputs[0]
