"""What depends on what in a traced loss.

Which equations a gradient flows through, of which terms the loss is a sum, and how far the
elementwise function goes that the model applies to a layer's output.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from locoprop_jax._tracing import chains, jaxpr, primitives
from locoprop_jax._tracing.chains import Chain
from locoprop_jax._tracing.program import END, Equation, Program


def live_equations(program: Program, *targets: int) -> tuple[bool, ...]:
    """Which equations a gradient of the targets flows through; dead ones exist in any jaxpr."""
    needed, live = set(targets), [False] * len(program.equations)
    for i in reversed(range(len(program.equations))):
        equation = program.equations[i]
        if equation.primitive in primitives.STOP_GRADIENT:
            continue
        if any(v in needed and program.is_inexact(v) for v in equation.outputs):
            live[i] = True
            needed.update(v for v in equation.inputs if program.is_inexact(v))
    return tuple(live)


def live_consumers(program: Program, live: Sequence[bool]) -> dict[int, list[int]]:
    """For each value, the positions of the live equations that read it, and `END`."""
    return {v: [i for i in at if i == END or live[i]] for v, at in program.consumers.items()}


def reached_from(program: Program, sources: Iterable[int]) -> set[int]:
    """The values that depend on one of `sources`, themselves among them."""
    reached = set(sources)
    for equation in program.equations:
        if reached.intersection(equation.inputs):
            reached.update(equation.outputs)
    return reached


def reached_live(
    program: Program, live: Sequence[bool], sources: Iterable[int], without: Container[int] = ()
) -> set[int]:
    """The same in a way that a gradient sees, and not through the equations at some positions."""
    reached = set(sources)
    for i, equation in enumerate(program.equations):
        if live[i] and i not in without and reached.intersection(equation.inputs):
            reached.update(v for v in equation.outputs if program.is_inexact(v))
    return reached


def loss_terms(
    program: Program, loss: int, constants: set[int], of_params: set[int]
) -> dict[int, float]:
    """The values whose weighted sum is the loss, with the number of terms it averages over.

    The loss is followed back through sums, products with constants and quotients by what no
    parameter moves. Dividing a sum by how many it sums makes a mean, and that number counts; any
    other factor weighs the terms. The number is NaN below a divisor that is not known when tracing
    (the sum of a mask).
    """
    producers = program.producers
    terms = {loss: 1.0}
    pending: list[tuple[int, tuple[float, ...]]] = [(loss, ())]  # value, divisors since a sum
    while pending:
        value, divisors = pending.pop()
        if value not in producers:
            continue
        equation, count = program.equations[producers[value]], terms[value]
        operands = equation.inputs
        if equation.primitive in primitives.DIV:
            if operands[1] in of_params:
                continue
            divisors = (*divisors, known_number(program, operands[1]))
            operands = operands[:1]
        elif equation.primitive in primitives.MUL:
            factors = [v for v in operands if v in constants]
            operands = tuple(v for v in operands if v not in constants)
            if len(factors) != 1:
                continue
            factor = known_number(program, factors[0])
            # One half is no mean of two but the half of a square; no other number hides a mean.
            if factor not in (0.0, 0.5) and not math.isnan(factor):
                divisors = (*divisors, 1 / factor)
        elif equation.primitive in primitives.REDUCE_SUM:
            shape = program.shape(operands[0])
            count *= _averaged(divisors, [shape[i] for i in equation.params["axes"]])
            divisors = ()
        elif equation.primitive not in primitives.SUMS:
            continue
        for v in operands:
            if v not in terms and v not in constants:
                terms[v] = count
                pending.append((v, divisors))
    return terms


def _averaged(divisors: Sequence[float], sizes: Sequence[int]) -> float:
    """Over how many a sum along axes of these sizes is averaged by these divisors.

    The divisor nearest to the sum is looked at first; each axis counts once. Twice a size, as in
    sum / (2 n), is the mean of halves.
    """
    if any(map(math.isnan, divisors)):
        return math.nan
    count, left = 1.0, list(sizes)
    for divisor in reversed(divisors):
        for chosen in _subsets(left):
            size = math.prod(chosen)
            if size > 1 and any(math.isclose(divisor, n * size, rel_tol=1e-5) for n in (1, 2)):
                count *= size
                for axis in chosen:
                    left.remove(axis)
                break
    return count


def _subsets(sizes: Sequence[int]) -> Iterable[tuple[int, ...]]:
    """All choices among a few sizes, the largest choices first."""
    lengths = range(len(sizes), 0, -1)
    return itertools.chain.from_iterable(itertools.combinations(sizes, n) for n in lengths)


def known_number(program: Program, value: int) -> float:
    """The number that a constant of one entry is known to be when tracing, else NaN."""
    known = program.constants.get(value)
    dtype = getattr(known, "dtype", None)
    if known is None or isinstance(known, Tracer) or np.size(known) != 1:
        return math.nan
    if dtype is not None and not jnp.issubdtype(dtype, np.number):
        return math.nan
    number = np.asarray(known).ravel()[0]
    return math.nan if np.iscomplexobj(number) else float(number)


def averaged_terms(program: Program, terms: Mapping[int, float], output: int) -> float:
    """How many terms the loss averages over, as seen from a layer's output; NaN if not known.

    Args:
      program: the loss.
      terms: from `loss_terms`.
      output: the layer's output.
    """
    moving = reached_from(program, [output])
    producers = program.producers
    ends = {
        count
        for v, count in terms.items()
        if v in moving
        and not any(u in terms and u in moving for u in program.equations[producers[v]].inputs)
    }
    return ends.pop() if len(ends) == 1 else math.nan  # a NaN among others makes two


def rearranged(program: Program, equation: Equation, chain: Chain) -> Chain | None:
    """The chain through one more equation, None if that does more than rearrange."""
    shape = program.shape(equation.inputs[0])
    result = program.shape(equation.outputs[0])
    if equation.primitive in primitives.CAST | primitives.SAME:
        return chain
    if equation.primitive in primitives.TRANSPOSE:
        return chains.extend(chain, shape, "transpose", tuple(equation.params["permutation"]))
    if equation.primitive in primitives.RESHAPE:
        if (order := primitives.order_read(equation)) is not None:
            chain = chains.extend(chain, shape, "transpose", tuple(order))
            shape = tuple(shape[i] for i in order)
        return chains.extend(chain, shape, "reshape", result)
    if equation.primitive in primitives.BROADCAST:
        axes = equation.params["broadcast_dimensions"]
        spread = [1] * len(result)
        for size, axis in zip(shape, axes, strict=True):
            spread[axis] = size
        chain = chains.extend(chain, shape, "reshape", tuple(spread))
        return chains.extend(chain, tuple(spread), "broadcast", result)
    return None


def unchanged(program: Program, equation: Equation) -> int | None:
    """Which operand the result is: of a sum with zero, or of a product with one."""
    neutral = 0.0 if equation.primitive in primitives.ADD | primitives.SUB else 1.0
    if equation.primitive not in primitives.ADD | primitives.SUB | primitives.MUL | primitives.DIV:
        return None
    is_symmetric = equation.primitive in primitives.ADD | primitives.MUL
    for i in (0, 1) if is_symmetric else (0,):
        value, other = equation.inputs[i], equation.inputs[1 - i]
        same = program.shape(value) == program.shape(equation.outputs[0])
        if same and other in program.literals and known_number(program, other) == neutral:
            return i
    return None


class Piece(NamedTuple):
    """An elementwise piece of a program that starts at a layer's output.

    Attributes:
      begin: the value it begins with: the output, perhaps rearranged.
      chain: how: output -> `begin`.
      equations: its equations, none for the identity.
      end: the value it ends in, of the shape of `begin`.
      note: why there are no equations, for a layer table.
    """

    begin: int
    chain: Chain
    equations: list[Equation]
    end: int
    note: str = ""


def transfer_piece(program: Program, live: Sequence[bool], output: int) -> Piece:
    """The largest elementwise piece from a layer's output to its first other use."""
    chain: Chain = ()

    def uses_of(value: int) -> list[int]:
        return [i for i in program.consumers.get(value, ()) if i == END or live[i]]

    while len(uses := uses_of(output)) == 1 and uses != [END]:
        after = program.equations[uses[0]]
        if after.primitive not in primitives.TRANSPOSE | primitives.RESHAPE:
            break
        chain = rearranged(program, after, chain) or ()
        output = after.outputs[0]
    shape = program.shape(output)
    uniform = program.uniform
    inside: dict[int, int] = {}  # value -> position of its equation
    pending = sorted(set(program.consumers.get(output, ())) - {END})  # a heap
    while pending:
        i = heapq.heappop(pending)
        while pending and pending[0] == i:
            heapq.heappop(pending)
        equation = program.equations[i]
        if not all(v in uniform or v in inside or v == output for v in equation.inputs):
            continue
        result = equation.outputs[0]
        counts = live[i] or not program.is_inexact(result)  # comparisons carry no gradient
        if counts and program.shape(result) == shape and jaxpr.is_elementwise(equation.eqn):
            inside.update(dict.fromkeys(equation.outputs, i))
            for v in equation.outputs:
                for after in program.consumers.get(v, ()):
                    if after != END:
                        heapq.heappush(pending, after)

    def ancestors(value: int) -> set[int]:
        found, pending = {output}, [value]
        while pending:
            v = pending.pop()
            if v in inside and v not in found:
                found.add(v)
                pending.extend(program.equations[inside[v]].inputs)
        return found

    for end in sorted(inside, key=lambda v: inside[v], reverse=True):
        piece = ancestors(end)
        positions = {inside[v] for v in piece if v in inside}
        uses = {i for v in piece - {end} for i in uses_of(v)}
        is_first = program.equations[inside[end]].outputs[0] == end  # the result that is tapped
        if is_first and uses <= positions and program.is_inexact(end):
            return Piece(output, chain, program.slice([output], end)[0], end)
    after = uses_of(output)
    if len(after) > 1:
        return Piece(output, chain, [], output, f"used by {len(after)} operations")
    following = [program.equations[i].primitive for i in after if i != END]
    if not following or following[0] in primitives.DOT_GENERAL:
        return Piece(output, chain, [], output)
    return Piece(output, chain, [], output, f"then `{following[0]}`")
