"""The quadratic model of a loss on the span of some directions, and how far it is to be trusted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from locoprop_jax import _linalg
from locoprop_jax._checks import check_real, is_number
from locoprop_jax._curvature.products import Linearised, Network
from locoprop_jax._trees import wide_dtype

# The first radius of the trust region, as a share of the first loss; chosen on the problems of
# `python -m benchmarks defaults`.
RADIUS = 0.01

Scalar = Float[Array, ""]
Tree = Any
ValueFn = Callable[[Any], Array]


class Model(NamedTuple):
    """The quadratic model on the span of some directions.

    Attributes:
      slope: the gradient along each.
      curvature: of the Gauss-Newton matrix.
      lengths: the inner products of the directions.
    """

    slope: Float[Array, " k"]
    curvature: Float[Array, "k k"]
    lengths: Float[Array, "k k"]

    @property
    def rayleigh(self) -> Scalar:
        """The curvature per squared length along the first direction."""
        return _quotient(self.curvature[0, 0], self.lengths[0, 0])

    def damped(self, damping: Scalar) -> Float[Array, "k k"]:
        """The curvature with that of the damping."""
        return self.curvature + damping.astype(self.lengths.dtype) * self.lengths

    def change(self, damping: Scalar, steps: Float[Array, " k"]) -> Scalar:
        """Of the damped model by steps that are subtracted; zero where it is not a number."""
        change = steps @ self.damped(damping) @ steps / 2 - steps @ self.slope
        return jnp.where(jnp.isfinite(change), change, 0)


def quadratic_model(
    slope: Tree,
    directions: list[Tree],
    curvature: Callable[[Float[Array, " k"]], Float[Array, "k k"]],
) -> Model:
    """What the model knows of some directions; their curvature is told of their slopes."""
    slopes = jnp.stack([_product(slope, direction) for direction in directions])
    return Model(slopes, curvature(slopes), _gram(directions, directions))


def curvature_along(network: Linearised, directions: list[Tree]) -> Float[Array, "k k"]:
    """Of the Gauss-Newton matrix on some directions: one forward-mode pass for each."""
    pushed = [network.push(direction) for direction in directions]
    return _gram(pushed, [network.hessian(outputs) for outputs in pushed])


def _product(a: Tree, b: Tree) -> Array:
    return _linalg.dot(_linalg.wide(a), _linalg.wide(b))


def _gram(left: list[Tree], right: list[Tree]) -> Float[Array, "k k"]:
    half = {(i, j): _product(left[i], right[j]) for i in range(len(left)) for j in range(i + 1)}
    rows = [[half[max(i, j), min(i, j)] for j in range(len(left))] for i in range(len(left))]
    return jnp.stack([jnp.stack(row) for row in rows])


class Carried(NamedTuple):
    """What one step's curvature says of the next ones', which are not measured.

    A direction d = M^-1 g is as long in its own metric M as it is steep, d'Md = d'g. How many times
    that the Gauss-Newton matrix C has along it changes slowly, and so does the angle between d and
    the last update in the metric of C.

    Attributes:
      ratio: d'Cd / d'g.
      cosine: of that angle.
      square: s'Cs of the last update s.
    """

    ratio: Scalar
    cosine: Scalar
    square: Scalar

    def curvature(self, slope: Float[Array, " k"]) -> Float[Array, "k k"]:
        """What it has to be along a direction of this slope, and along the last update."""
        own = self.ratio * jnp.maximum(slope[0], 0)
        if len(slope) == 1:
            return own[None, None]
        both = self.cosine * jnp.sqrt(own * self.square)
        return jnp.stack([jnp.stack([own, both]), jnp.stack([both, self.square])])

    @classmethod
    def of(cls, model: Model, steps: Float[Array, " k"]) -> Carried:
        """From the model of this step, and the steps that were taken."""
        curvature = model.curvature
        own, both, last = curvature[0, 0], curvature[0, -1], curvature[-1, -1]
        size = jnp.sqrt(jnp.maximum(own * last, 0))
        return cls(
            _quotient(own, model.slope[0]),
            _quotient(both, size),
            jnp.maximum(steps @ curvature @ steps, 0),
        )


def _quotient(x: Scalar, y: Scalar) -> Scalar:
    """Zero where the divisor is not positive."""
    return jnp.where(y > 0, x / jnp.where(y > 0, y, 1), 0)


def minimum(
    model: Model,
    damping: Scalar,
    loss: Any = jnp.inf,
    most: Any = jnp.inf,
    radius: Any = jnp.inf,
) -> Float[Array, " k"]:
    """The steps (to be subtracted) that lower the damped model most.

    Zero where the model has no minimum: along a direction of no or negative curvature. Shorter
    where the outputs would move further than the radius; and where the model would fall by more
    than the loss: a saturated softmax has next to no curvature. That of squared errors never does.

    Args:
      model: of one direction, or of a direction and the last update.
      damping: tau.
      loss: by how much the model may fall: all of a loss that is never negative.
      most: of the last update, forwards or backwards.
      radius: of half the squared length of the step in the metric of the undamped matrix.
    """
    matrix = model.damped(damping)
    steps = _solution(matrix, model.slope)
    if len(steps) == 2:
        held = jnp.clip(steps[1], -most, most)
        rest = _solution(matrix[:1, :1], model.slope[:1] - matrix[:1, 1] * held)
        steps = jnp.where(held == steps[1], steps, jnp.stack([rest[0], held]))
    length, radius = steps @ model.curvature @ steps / 2, jnp.asarray(radius, steps.dtype)
    is_long = length > radius
    steps = steps * jnp.where(is_long, jnp.sqrt(radius / jnp.where(is_long, length, 1)), 1)
    slope, most_slope = steps @ model.slope, 2 * jnp.asarray(loss, steps.dtype)
    is_more = slope > most_slope  # at its minimum along a step the model has fallen by half of it
    return steps * jnp.where(is_more, most_slope / jnp.where(is_more, slope, 1), 1)


def _solution(matrix: Float[Array, "k k"], slope: Float[Array, " k"]) -> Float[Array, " k"]:
    diagonal = jnp.diagonal(matrix)
    good = diagonal > 0
    root = jnp.where(good, 1 / jnp.sqrt(jnp.where(good, diagonal, 1)), 0)
    unit = matrix * root[:, None] * root[None]
    # Directions may be parallel, or zero.
    eps = float(10 * jnp.finfo(matrix.dtype).eps)
    steps = root * _linalg.solve(_linalg.damped(unit, eps), (root * slope)[:, None])[:, 0]
    return jnp.where(jnp.isfinite(steps).all(), steps, 0)


def most_fall(network: Network, value: Any, l2: Any, dtype: Any) -> Scalar:
    """All of the loss, where it is made of marked losses that are never negative; else infinity.

    A loss of unknown sign may fall by any amount, and with l2 its model has a part more.
    """
    if not network.is_non_negative or not is_number(l2) or l2 != 0:
        return jnp.asarray(jnp.inf, dtype)
    value = jnp.asarray(value, dtype)
    return jnp.where(value > 0, value, jnp.inf)


def adapted_radius(radius: Scalar, length: Scalar, verdict: Verdict, factor: Scalar) -> Scalar:
    """Less after a step that was too long and made the next batch's loss rise, else room to grow.

    It grows twice as fast as it shrinks, and only where the last step was held back by it and
    lowered the loss of the next batch.

    Args:
      radius: of the last step.
      length: of the last step, in the same units.
      verdict: on it.
      factor: below one, by which the radius shrinks.
    """
    has_failed = (verdict.fall < 0) & verdict.is_too_long | ~jnp.isfinite(verdict.ratio)
    was_held = length > 0.99 * radius  # equal, but for rounding
    grown = jnp.where(was_held & (verdict.fall > 0), factor**-2, 1)
    return radius * jnp.where(has_failed, factor, grown)


def with_l2(gradient: Tree, params: Tree, l2: Any) -> Tree:
    """The gradient of the loss with eta / 2 |params|^2 added."""
    if is_number(l2) and l2 == 0:
        return gradient
    return jax.tree.map(lambda g, p: g + jnp.asarray(l2, g.dtype) * p, gradient, params)


class Verdict(NamedTuple):
    """What a batch says of the step that was taken before it.

    Attributes:
      ratio: rho, how much its loss fell over how much the model fell (eq. 42).
      fall: of its loss.
      rest: by how much its loss would go on to fall, to first order, if the step were taken again.
    """

    ratio: Scalar
    fall: Scalar
    rest: Scalar

    @property
    def is_too_long(self) -> Bool[Array, ""]:
        """Whether the loss rises again at the end of the step."""
        return ~(self.rest > 0)

    @property
    def is_too_short(self) -> Bool[Array, ""]:
        """Whether the loss would be lower after more than twice the step.

        By the parabola through the fall and the slope that is left: its slope at the start is more
        than twice its curvature.
        """
        curvature = 2 * (self.fall - self.rest)
        return (self.rest > 0) & (self.rest > curvature)


def judge(
    value_fn: ValueFn,
    value: Any,
    slope: Tree,
    params: Tree,
    update: Tree,
    l2: Any,
    change: Scalar,
) -> Verdict:
    """The verdict of a batch on an update that led to its parameters.

    Args:
      value_fn: the loss of the batch.
      value: it after the update.
      slope: its gradient after the update.
      params: after the update.
      update: that was subtracted.
      l2: eta of the term that the loss includes, and the slope too.
      change: of the model.
    """
    old, dtype = jax.tree.map(jnp.add, params, update), change.dtype
    fall = value_fn(old).astype(dtype) - jnp.asarray(value, dtype)
    if not is_number(l2) or l2 > 0:
        growth = _squared_norm(params) - _squared_norm(old)
        fall = fall - jnp.asarray(l2, dtype) / 2 * growth.astype(dtype)
    rest = _linalg.dot(_linalg.wide(slope), _linalg.wide(update)).astype(dtype)
    return Verdict(-fall / jnp.where(change < 0, change, -jnp.inf), fall, rest)


def levenberg_marquardt(damping: Scalar, verdict: Verdict, factor: Scalar) -> Scalar:
    """Less damping where the loss fell as the model said, more where it did not (B.3.1).

    Of a small batch the model promises several times what its step can keep on another batch,
    however well its length is chosen: the gradient is mostly noise. So a small fall alone is no
    reason for more damping, the step has to be too long as well; and one that is too short is
    reason for less. After a step that was too long and made the loss larger by more than twice what
    was promised, beyond what noise does, damping grows four times as fast. A ratio that is not a
    number counts as a loss that did not fall.
    """
    good = (verdict.ratio > 0.75) | verdict.is_too_short
    bad = (verdict.ratio < 0.25) & verdict.is_too_long | ~jnp.isfinite(verdict.ratio)
    factor_of_growth = jnp.where(verdict.ratio >= -2, factor, factor**4)
    grown = jnp.maximum(damping, jnp.finfo(damping.dtype).tiny) / factor_of_growth
    return jnp.where(bad, grown, jnp.where(good, damping * factor, damping))


def best_of_three(change: Callable[[Scalar], Scalar], gamma: Scalar, factor: Scalar) -> Scalar:
    """Of gamma times the factor, itself and over it, the one that lowers the model most (B.3.2).

    Args:
      change: of the model, by the step of a direction of this damping.
      gamma: the last one, which stays where no change is a number.
      factor: below one.
    """

    def better(k: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        other = gamma * factor ** (1 - k).astype(factor.dtype)
        new = change(other)
        return _linalg.where(new < best[1], (other, new), best)

    return jax.lax.fori_loop(0, 3, better, (gamma, jnp.asarray(jnp.inf, factor.dtype)))[0]


def share_without_rise(
    value_fn: ValueFn,
    value: Any,
    params: Tree,
    step: Tree,
    l2: Any,
    halvings: int,
    dtype: Any,
) -> Scalar:
    """The first of 1, 1/2, 1/4... of a step with which the loss does not rise; zero if none is.

    Args:
      value_fn: the loss of the batch.
      value: it at the parameters.
      params: where the step begins.
      step: that is subtracted, in a wide dtype.
      l2: eta of `eta / 2 |params|^2`, which the loss includes.
      halvings: at most; with none the step is not looked at.
      dtype: of the share.
    """
    whole = jnp.ones((), dtype)
    if halvings == 0:
        return whole

    def total(loss: Any, at: Tree) -> Array:
        return loss.astype(dtype) + jnp.asarray(l2, dtype) / 2 * _squared_norm(at).astype(dtype)

    now = total(jnp.asarray(value), params)

    def rises(share: Array) -> Array:
        new = jax.tree.map(jnp.subtract, params, like(_linalg.scale(step, share), params))
        return ~(total(value_fn(new), new) <= now + 8 * jnp.finfo(dtype).eps * jnp.abs(now))

    def is_open(found: tuple[Array, Array, Array]) -> Array:
        _, is_rising, count = found
        return is_rising & (count < halvings)

    def halve(found: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        share, _, count = found
        return share / 2, rises(share / 2), count + 1

    share, is_rising, _ = jax.lax.while_loop(
        is_open, halve, (whole, rises(whole), jnp.zeros([], jnp.int32))
    )
    return jnp.where(is_rising, 0, share)


def check_line(method: str, *, value_fn: ValueFn | None, **others: Any) -> ValueFn:
    """The loss as a function of the parameters; refuse missing arguments, and some parameters.

    Raises:
      TypeError: an argument is missing.
      ValueError: some parameters are masked, or complex.
    """
    missing = [f"`{name}`" for name, value in others.items() if value is None]
    if value_fn is None or missing:
        missing += ["`value_fn`"] if value_fn is None else []
        raise TypeError(
            f"`{method}` needs {', '.join(missing)}: call `tx.update(grads, state, params, "
            f"captured=captured, value=loss, grad=grads, value_fn=lambda p: loss_fn(p, batch))`, "
            f"with the batch of the gradients."
        )
    leaves = jax.tree.leaves(others["params"], is_leaf=_is_masked)
    if any(map(_is_masked, leaves)):
        raise ValueError(
            f"`{method}` needs all parameters, because it runs the whole network: use it outside "
            f"of `optax.masked`, `optax.partition` and `with_fallback`, which may stand before it "
            f"in a chain. Parameters in no layer then follow their gradient."
        )
    check_real(method, others["params"])
    return value_fn


def _is_masked(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def like(tree: Tree, other: Tree) -> Tree:
    """The tree in the dtypes of another."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, other)


def dtype_of_model(params: Tree) -> Any:
    """Of the quadratic model's numbers: float64 if a parameter is, else float32."""
    return wide_dtype(jax.tree.leaves(params))


def _squared_norm(params: Tree) -> Scalar:
    return _linalg.dot(_linalg.wide(params), _linalg.wide(params))
