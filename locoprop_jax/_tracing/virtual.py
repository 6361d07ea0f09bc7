"""What is made of parameters, as labels like those of parameters: virtual leaves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from locoprop_jax._tracing import chains, flow, primitives
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
    outer = scope.known.outer
    found = formula(scope.program, value, leaves_of(label), scope.labels, change, outer)
    if found is None:
        return label
    leaf = scope.known.number(found)
    return Weight(leaf, found.own, chain, found.loops, made=found.leaves)


def as_parameters(scope: Scope, equation: Equation, kinds: Sequence[Label]) -> list[Label]:
    """The labels of what data meet, what is made of parameters as arrays like them."""
    primitive, program = equation.primitive, scope.program
    result: list[Label] = []
    is_kernel = primitive in primitives.DOT_GENERAL | primitives.CONVOLUTION
    for i, (value, label) in enumerate(zip(equation.inputs, kinds, strict=True)):
        change = ""
        if i == 1 and primitive in primitives.SUB | primitives.DIV:
            change = str(primitive)
        is_number = is_kernel and isinstance(without_number(program, label), Weight)
        stays = isinstance(label, Scaled) and primitive in primitives.MUL
        if not is_number and not stays:
            label = virtual(scope, label, change, value)
        if is_kernel or primitive in primitives.GATHER:
            label = _not_spread(scope, value, label)
        result.append(label)
    return result


def _not_spread(scope: Scope, value: int, label: Label) -> Label:
    """What was broadcast as an array of its own."""
    plain = without_number(scope.program, label)
    if not isinstance(plain, Weight) or chains.is_invertible(plain.chain):
        return label
    return virtual(scope, Derived(leaves_of(label), "broadcast_in_dim", value))


def in_order(scope: Scope, met: Iterable[tuple[int, Label]]) -> list[Label]:
    """Parameters whose entries meet data in another order, or more than once, as other arrays.

    Args:
      scope: that they are in.
      met: what meets, each with its label.
    """
    program, result = scope.program, []
    for value, label in met:
        chain: chains.Chain = ()
        equation = (
            program.equations[at] if (at := program.producers.get(value)) is not None else None
        )
        if equation is not None and equation.primitive in primitives.BROADCAST:
            chain = flow.rearranged(program, equation, ()) or ()
            value = equation.inputs[0]
        made = Derived(leaves_of(label), "reshape", value, chain)
        result.append(virtual(scope, made) if leaves_of(label) else label)
    return result


def _product(scope: Scope, label: Scaled) -> int:
    """The value that is the product."""
    return scope.program.equations[label.factors[-1].position].outputs[0]
