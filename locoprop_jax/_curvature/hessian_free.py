"""Hessian-free optimization: conjugate gradient on the damped Gauss-Newton matrix."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from locoprop_jax import _iterative, _linalg
from locoprop_jax._checks import (
    check_not_negative,
    check_positive,
    check_real,
    check_state,
    check_whole,
)
from locoprop_jax._curvature.complete import descend
from locoprop_jax._curvature.products import linearise
from locoprop_jax._curvature.quadratic import (
    ValueFn,
    check_line,
    curvature_along,
    dtype_of_model,
    judge,
    levenberg_marquardt,
    like,
    quadratic_model,
    share_without_rise,
    with_l2,
)


class HessianFreeState(NamedTuple):
    """State of `scale_by_hessian_free`.

    Attributes:
      count: finite batches so far. shape=(), dtype=int32
      refused: batches that were not finite, or whose products were not, and that updated nothing.
        shape=(), dtype=int32
      damping: lambda. shape=()
      model_change: by how much the model fell with the last step; not positive. shape=()
      reduction_ratio: rho, how much the loss of the next batch fell by a step over how much the
        model of its own batch fell. shape=()
      iterations: of conjugate gradient in the last step. shape=(), dtype=int32
      previous: the last step, in whose direction the next iterations start.
    """

    count: Int[Array, ""]
    refused: Int[Array, ""]
    damping: Float[Array, ""]
    model_change: Float[Array, ""]
    reduction_ratio: Float[Array, ""]
    iterations: Int[Array, ""]
    previous: Any

    def diagnostics(self) -> dict[str, Array]:
        """All numbers."""
        numbers = self._asdict()
        del numbers["previous"]
        return numbers


def scale_by_hessian_free(
    *,
    damping: float = 0.1,
    iterations: int = 50,
    tolerance: float = 5e-4,
    damping_decay: float = 2 / 3,
    halvings: int = 10,
    l2: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """(GGN + lambda I)^-1 g by conjugate gradient (Martens; practical GN, section 4).

    The iterations start from the best multiple of the last step and end when they make little
    progress. lambda follows Levenberg and Marquardt: the loss before the last step is evaluated
    too, and where the step lowered it by less than a quarter of what the quadratic model said and
    was too long, lambda grows; where by more than three quarters, or the step was too short, it
    shrinks. It starts at `damping` times the curvature per squared length of the first gradient. A
    step is judged by the batch that follows it, because its own batch would confirm a step that
    fits no other. The network's layers need not be found beforehand; parameters in none are solved
    for like all others.

    Args:
      damping: the first lambda, in units of g'Gg / g'g.
      iterations: at most so many, each one pass forward and one backward.
      tolerance: the iterations end where an average one of the last k = max(10, i / 10) lowers the
        quadratic by less than this share (Martens, section 4.4); 0 for all of them.
      damping_decay: by what lambda shrinks, or is divided to grow; 1 to keep it.
      halvings: how often a step is halved, at most, as long as the loss of its own batch would rise
        (Martens searches along his as well); where it still does, nothing moves. 0 for the solution
        as it is, which costs a pass forward less.
      l2: eta, where the loss is to be understood as `loss + eta / 2 |params|^2`, and the incoming
        updates are the gradient of the loss alone.

    Returns:
      A transformation whose `update` needs the parameters, `value` and `value_fn`, as for
      `scale_by_gauss_newton_step`, all for one batch. Negated, its update is meant to be taken as
      it is. A batch that is not finite, or whose products are not, leaves its state as it was, but
      for `refused`, and updates nothing.

    Raises:
      ValueError: at construction, for numbers out of range; at update, for a loss whose outputs
        cannot be told.
      TypeError: at update, `params`, `value` or `value_fn` are missing.

    References:
      J. Martens, `Deep learning via Hessian-free optimization
      <https://www.cs.toronto.edu/~jmartens/docs/Deep_HessianFree.pdf>`_, 2010; Botev et al.,
      `Practical Gauss-Newton Optimisation for Deep Learning <https://arxiv.org/abs/1706.03662>`_,
      2017, appendices B and F.2.
    """
    name = "scale_by_hessian_free"
    check_not_negative(damping=damping, tolerance=tolerance, l2=l2)
    check_positive(damping_decay=damping_decay)
    check_whole(iterations=iterations)
    check_not_negative(halvings=halvings)

    def init(params: Any) -> HessianFreeState:
        check_real(name, params)

        def number(value: Any) -> Array:
            return jnp.asarray(value, dtype_of_model(params))

        def count() -> Array:
            return jnp.zeros([], jnp.int32)

        previous = _linalg.zeros_like(_linalg.wide(params))
        numbers = number(damping), number(0), number(1)
        return HessianFreeState(count(), count(), *numbers, count(), previous)

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        value: Any = None,
        value_fn: ValueFn | None = None,
        **extra_args: Any,
    ) -> tuple[Any, HessianFreeState]:
        del extra_args
        value_fn = check_line(name, params=params, value=value, value_fn=value_fn)
        check_state(name, state, jax.eval_shape(init, params))
        network = linearise(value_fn, params, (), {}, False, name)
        dtype = dtype_of_model(params)
        eta = jnp.asarray(l2, dtype)
        slope = with_l2(_linalg.wide(updates), _linalg.wide(params), l2)
        ok = _linalg.all_finite((updates, jnp.asarray(value)))

        def product(vector: Any) -> Any:
            pushed = network.push(like(vector, params))
            return _linalg.wide(network.pull(network.hessian(pushed)))

        along = [like(slope, params)]
        unit = quadratic_model(slope, along, lambda _: curvature_along(network, along)).rayleigh
        first = jnp.asarray(damping, dtype) * unit.astype(dtype)
        last, factor = like(state.previous, params), jnp.asarray(damping_decay, dtype)
        verdict = judge(value_fn, value, slope, params, last, l2, state.model_change)
        adapted = levenberg_marquardt(state.damping, verdict, factor)
        is_first = state.count == 0
        amount = jnp.where(is_first, first, adapted)

        def damped(vector: Any) -> Any:
            return _linalg.add(product(vector), _linalg.scale(vector, amount + eta))

        solution, residual, made = _iterative.truncated_conjugate_gradient(
            damped, slope, iterations, tolerance, start=state.previous
        )
        share = share_without_rise(value_fn, value, params, solution, l2, halvings, dtype)
        fall, rest = _linalg.dot(solution, slope), _linalg.dot(solution, residual)
        change = share * (share * (fall - rest) / 2 - fall)
        solution = _linalg.scale(solution, share)
        new = HessianFreeState(
            state.count + 1,
            state.refused,
            amount,
            change,
            jnp.where(is_first, state.reduction_ratio, verdict.ratio),
            made,
            solution,
        )
        step = like(solution, updates)
        # A product that overflows would leave a solution or a damping that is none.
        ok = ok & _linalg.all_finite((solution, change, amount))
        refused = state._replace(refused=state.refused + 1)
        return _linalg.where(ok, step, _linalg.zeros_like(step)), _linalg.where(ok, new, refused)

    return optax.GradientTransformationExtraArgs(init, update)


def hessian_free(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    *,
    damping: float = 0.1,
    iterations: int = 50,
    tolerance: float = 5e-4,
    damping_decay: float = 2 / 3,
    halvings: int = 10,
    l2: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Hessian-free optimization: `scale_by_hessian_free` and a learning rate, best left at one.

    Its `update` needs the parameters, `value` and `value_fn`: no `captured`.

    Args:
      learning_rate: a number or a schedule.
      damping: the first lambda, in units of the curvature along the first gradient.
      iterations: of conjugate gradient, at most.
      tolerance: of its progress.
      damping_decay: by what lambda shrinks, or is divided to grow.
      halvings: of a step that makes the loss of its own batch rise, at most.
      l2: eta of `eta / 2 |params|^2`, added to the loss.

    Returns:
      A complete optimizer.

    Raises:
      ValueError, TypeError: as `scale_by_hessian_free`.
    """
    direction = scale_by_hessian_free(
        damping=damping,
        iterations=iterations,
        tolerance=tolerance,
        damping_decay=damping_decay,
        halvings=halvings,
        l2=l2,
    )
    return optax.chain(direction, descend(learning_rate))
