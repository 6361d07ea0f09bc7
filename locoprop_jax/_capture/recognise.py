"""Common losses, recognised in a trace for what they are, whoever wrote them.

Whatever enters a loss linearly has no Hessian, so of a cross entropy only the normaliser counts:
log sum exp of the logits, softplus of a logit. Labels, their smoothing and masks decide no more
than its weight in the loss, which is the derivative of the loss by it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from locoprop_jax import losses
from locoprop_jax._tracing import ends, jaxpr, primitives
from locoprop_jax._tracing.chains import Shape
from locoprop_jax._tracing.program import Equation, Program, flatten


class Recognised(NamedTuple):
    """An end of a loss whose Hessian is that of a known loss.

    Attributes:
      value: the outputs that the known loss takes.
      outputs: the axes of the outputs of one example.
      loss: the known loss.
      sign: by what its Hessian is multiplied.
      axes: of the end, those that belong to the axes of examples, in their order; None for one
        that it does not have. Along all others the end's derivative is added up.
    """

    value: int
    outputs: Shape
    loss: losses.OutputLoss
    sign: float
    axes: tuple[int | None, ...]


class Reader:
    """What the ends of one loss are read in.

    Attributes:
      program: the loss.
      live: which equations a gradient flows through.
      moving: the values that depend on the layers' outputs.
      outputs: the layers' outputs.
      passed: the values that enter the loss linearly.
    """

    def __init__(
        self,
        program: Program,
        live: Sequence[bool],
        moving: Collection[int],
        outputs: Collection[int],
        passed: Collection[int],
    ):
        self.program, self.live, self.moving = program, live, moving
        self.outputs, self.passed = outputs, passed

    def recognise(self, end: int) -> Recognised | None:
        """Tell which known loss has an end's Hessian, if one has."""
        return self._square(end) or self._softmax(end) or self._sigmoid(end)

    def _equation(self, value: int) -> Equation | None:
        position = self.program.producers.get(value)
        return None if position is None else self.program.equations[position]

    def _is_same(self, a: int, b: int) -> bool:
        """Whether two values are computed alike: programs repeat what is written twice."""
        one, other = self._equation(a), self._equation(b)
        if a == b or one is None or other is None:
            return a == b
        same = one.primitive == other.primitive and one.inputs == other.inputs
        return same and str(one.params) == str(other.params)

    def _own_axes(self, value: int) -> tuple[int, ...]:
        return tuple(range(len(self.program.shape(value))))

    def is_linear(self, value: int) -> bool:
        """Whether a value is a linear map of the layers' outputs."""
        return ends.is_linear(self.program, value, self.moving, self.outputs)

    def _through(self, value: int, passing: frozenset) -> Equation | None:
        """The equation that a value comes from, but for some that change nothing here."""
        equation = self._equation(value)
        while equation is not None and equation.primitive in passing:
            equation = self._equation(equation.inputs[0])
        return equation

    def _square(self, end: int) -> Recognised | None:
        """(a - y)^2 of outputs a, entry by entry, or summed as a product of vectors."""
        equation = self._equation(end)
        if equation is None:
            return None
        primitive, (base, *others) = equation.primitive, equation.inputs
        axes: tuple[int | None, ...] = self._own_axes(base)
        is_square = primitive in primitives.SQUARE and equation.params.get("y", 2) == 2
        is_product = primitive in primitives.MUL and self._is_same(base, *others)
        if primitive in primitives.DOT_GENERAL and self._is_same(base, *others):
            contract, batch = equation.params["dimension_numbers"]
            is_product = contract[0] == contract[1] and batch[0] == batch[1]
            is_product = is_product and len(contract[0]) + len(batch[0]) == len(axes)
            axes = tuple(batch[0].index(i) if i in batch[0] else None for i in range(len(axes)))
        if not (is_square or is_product) or not self.is_linear(base):
            return None
        while (before := self._without_label(base)) is not None:
            base = before
        return Recognised(base, (), losses.squared_error, 1.0, axes)

    def _without_label(self, value: int) -> int | None:
        """The outputs a of a - y or y - a; None of anything else."""
        equation = self._equation(value)
        passing = primitives.ADD | primitives.SUB | primitives.NEG
        if value in self.outputs or equation is None or equation.primitive not in passing:
            return None
        moving = [v for v in equation.inputs if v in self.moving]
        same = all(self.program.shape(v) == self.program.shape(value) for v in moving)
        return moving[0] if len(moving) == 1 and same else None

    def _softmax(self, end: int) -> Recognised | None:
        """Log sum exp of logits along an axis, or the logarithm of their softmax.

        Logits that are no linear map of the layers' outputs (capped ones) are where the network
        ends if the loss also takes them as they are, as cross entropies take that of the label.
        """
        equation = self._equation(end)
        if equation is None or equation.primitive not in primitives.LOG:
            return None
        before = self._through(equation.inputs[0], _MOVED)
        if before is not None and before.primitive in primitives.DIV:
            added, sign = self._through(before.inputs[1], _SPREAD | primitives.RESHAPE), -1.0
            divided = self._through(before.inputs[0], _SAME)
        else:
            added, sign, divided = before, 1.0, None
        if added is None or added.primitive not in primitives.REDUCE_SUM:
            return None
        raised = self._through(added.inputs[0], _SAME)
        if (
            raised is None
            or raised.primitive not in primitives.EXP
            or divided not in (None, raised)
        ):
            return None
        axes: Shape = tuple(added.params["axes"])
        examples = self._axes_of(end, raised.outputs[0], axes)
        if len(axes) != 1 or examples is None:
            return None
        (logits,) = raised.inputs
        is_taken = sign < 0 or logits in self.passed
        while (before_shift := self._unshifted(logits, axes[0])) is not None:
            logits = before_shift
            is_taken = is_taken or logits in self.passed
        if not (is_taken or self.is_linear(logits)):
            return None
        loss = losses.softmax_cross_entropy_with_integer_labels
        return Recognised(logits, axes, loss, sign, examples)

    def _axes_of(self, end: int, value: int, without: Shape) -> tuple[int | None, ...] | None:
        """The axes of an end that belong to a value's axes; None for a value's axis of length one.

        None where they do not belong together.
        """
        found: list[int | None] = []
        for i, axis in enumerate(ends.axes_between(self.program, self.live, value, end)):
            if i in without:
                continue
            label = axis[0].label if len(axis) == 1 else None
            if axis and not (isinstance(label, int) and label >= 0):
                return None
            found.append(label if isinstance(label, int) else None)
        return tuple(found)

    def _unshifted(self, value: int, axis: int) -> int | None:
        """The logits before something was subtracted from all of a row, such as their maximum."""
        equation = self._equation(value)
        if equation is None or equation.primitive not in primitives.SUB:
            return None
        logits, shift = equation.inputs
        same = self.program.shape(logits) == self.program.shape(value)
        if shift in self.moving or not same or not self._is_same_along(shift, axis):
            return None
        return logits

    def _is_same_along(self, value: int, axis: int) -> bool:
        shape, equation = self.program.shape(value), self._equation(value)
        if not shape or shape[axis] == 1:
            return True
        while equation is not None and equation.primitive in _SPREAD:
            if equation.primitive in primitives.BROADCAST:
                places = list(equation.params["broadcast_dimensions"])
                source = self.program.shape(equation.inputs[0])
                return axis not in places or source[places.index(axis)] == 1
            equation = self._equation(equation.inputs[0])
        return False

    def _sigmoid(self, end: int) -> Recognised | None:
        """An elementwise function of logits with second derivative p (1 - p), or -p (1 - p)."""
        program = self.program
        for value in reversed(self._elementwise_sources(end)):
            if self.is_linear(value) or value in self.passed:
                sign = _sign_of_curvature(program, value, end)
                if sign:
                    loss = losses.sigmoid_binary_cross_entropy
                    return Recognised(value, (), loss, sign, self._own_axes(value))
        return None

    def _elementwise_sources(self, end: int) -> list[int]:
        """The values of which, each by itself, an end is an elementwise function."""
        program, found = self.program, list[int]()
        pending = {end}
        while pending:
            value = max(pending, key=lambda v: program.producers.get(v, -1))
            pending.remove(value)
            if not pending and value != end:
                found.append(value)
            equation = self._equation(value)
            if value in self.outputs or equation is None or not self._is_by_entry(equation):
                break
            pending.update(v for v in equation.inputs if v not in program.uniform)
        return found

    def _is_by_entry(self, equation: Equation) -> bool:
        shape = self.program.shape(equation.outputs[0])
        inputs = (v for v in equation.inputs if v not in self.program.uniform)
        if equation.primitive in primitives.CUSTOM:
            bodies = jaxpr.inner_jaxprs(equation.eqn)
            if [len(jaxpr.open_jaxpr(body)[0].invars) for body in bodies] != [len(equation.inputs)]:
                return False
        return (
            len(equation.outputs) == 1
            and jaxpr.is_elementwise(equation.eqn)
            and all(self.program.shape(v) == shape for v in inputs)
        )


_SAME = primitives.CAST | primitives.SAME
# Of each row one entry, or several, or all of them.
_MOVED = primitives.RESHAPE | primitives.BROADCAST | primitives.TRANSPOSE | primitives.ABS | _SAME
_MOVED |= primitives.GATHER | primitives.SLICE
_SPREAD = primitives.BROADCAST | primitives.STOP_GRADIENT | _SAME


_POINTS = np.linspace(-4.0, 4.0, 16)


def _sign_of_curvature(program: Program, source: int, end: int) -> float:
    """1 or -1 where the second derivative is that often p (1 - p), by trying; 0 where it is not."""
    dtype = program.avals[source].dtype
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 32:
        return 0.0
    equations, _ = program.slice([source], end)

    def function(x: Any) -> Any:
        known = _numbers(program) | {source: x}
        return _of_numbers(equations, known)[end].astype(dtype)

    with jax.ensure_compile_time_eval(), jax.numpy_dtype_promotion("standard"):
        second = jax.jit(jax.vmap(jax.grad(jax.grad(function))))
        found = np.asarray(second(jnp.asarray(_POINTS, dtype)), np.float64)
    p = 1 / (1 + np.exp(-_POINTS))
    # What rounding leaves of log(1 - p).
    precision = 30 * float(jnp.finfo(dtype).eps) * np.exp(2 * np.abs(_POINTS))
    for sign in (1.0, -1.0):
        if np.all(np.abs(sign * found - p * (1 - p)) <= precision):
            return sign
    return 0.0


def _numbers(program: Program) -> dict[int, Any]:
    """The constants of one entry."""
    constants = program.constants.items()
    is_one = ((v, x) for v, x in constants if not isinstance(x, Tracer) and np.size(x) == 1)
    return {v: jnp.reshape(jnp.asarray(x), ()) for v, x in is_one}


def _of_numbers(equations: Sequence[Equation], known: dict[int, Any]) -> dict[int, Any]:
    """Run elementwise equations, written for arrays, on single numbers."""
    for equation in equations:
        operands = [known[v] for v in equation.inputs]
        if equation.primitive in primitives.BROADCAST | primitives.RESHAPE:
            results = operands[:1]
        elif equation.primitive in primitives.CUSTOM:
            # By its body, because the rule of its derivative is written for arrays too.
            inner = flatten(jaxpr.inner_jaxprs(equation.eqn)[0])
            inside = _numbers(inner) | dict(zip(inner.inputs, operands, strict=True))
            inside = _of_numbers(inner.equations, inside)
            results = [inside[v] for v in inner.outputs]
        else:
            results = jaxpr.run_equation(equation.jaxpr, equation.eqn, operands)
        known = known | dict(zip(equation.outputs, results, strict=True))
    return known
