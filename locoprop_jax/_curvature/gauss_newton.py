"""Steps along a direction that are best for the quadratic model of the full Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int

from locoprop_jax import _linalg
from locoprop_jax._checks import (
    check_not_negative,
    check_positive,
    check_real,
    check_state,
    check_whole,
)
from locoprop_jax._curvature.candidate import Candidate, combined, halved, judged_damping
from locoprop_jax._curvature.products import network_of
from locoprop_jax._curvature.quadratic import (
    RADIUS,
    Carried,
    Scalar,
    Tree,
    ValueFn,
    adapted_radius,
    best_of_three,
    check_line,
    curvature_along,
    dtype_of_model,
    judge,
    levenberg_marquardt,
    like,
    minimum,
    most_fall,
    quadratic_model,
    with_l2,
)


class GaussNewtonStepState(NamedTuple):
    """State of `scale_by_gauss_newton_step`.

    Attributes:
      count: finite batches so far. shape=(), dtype=int32
      refused: batches that were not finite, and updated nothing. shape=(), dtype=int32
      damping: tau, of the Gauss-Newton matrix. shape=()
      inner_damping: gamma, of the direction's own matrix. shape=()
      step_size: alpha of the last step. shape=()
      model_change: by how much the model fell with the last step; not positive. shape=()
      reduction_ratio: rho, how much the loss of the next batch fell by a step over how much the
        model of its own batch fell, when that was last measured. shape=()
      radius: how far the last step was allowed to move the outputs. shape=()
      length: how far the model's step, of learning rate one, would move them: s'GGN s / 2. shape=()
      carried: what the curvature of the last step says of the next ones.
      previous: the last update.
      inner: the state of the direction.
    """

    count: Int[Array, ""]
    refused: Int[Array, ""]
    damping: Scalar
    inner_damping: Scalar
    step_size: Scalar
    model_change: Scalar
    reduction_ratio: Scalar
    radius: Scalar
    length: Scalar
    carried: Carried
    previous: Any
    inner: Any

    def diagnostics(self) -> dict[str, Array]:
        """All numbers."""
        numbers = self._asdict() | {"curvature_ratio": self.carried.ratio}
        del numbers["carried"], numbers["previous"], numbers["inner"]
        return numbers


def scale_by_gauss_newton_step(
    direction: Callable[[Array], optax.GradientTransformation]
    | optax.GradientTransformation
    | None = None,
    *,
    damping: float = 0.1,
    inner_damping: float = 1.0,
    damping_period: int = 5,
    inner_damping_period: int = 20,
    decay: float = 0.95,
    l2: float = 0.0,
    momentum: bool = False,
    bounded: bool = True,
    model_period: int = 1,
    halvings: int = 0,
    inner_damping_by: str = "model",
    learning_rate: optax.ScalarOrSchedule = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """The step along a direction that is best for the full Gauss-Newton model (practical GN, B.2).

    For a direction d and the gradient g the update is alpha d, with alpha = d'g / d'Cd (eq. 40) and
    C = GGN + (tau + l2) I the Gauss-Newton matrix of the current batch; nothing is left to tune. A
    direction that ascends is turned around. With momentum the step is the best one in the plane of
    d and the last update (Martens and Grosse, section 7). Negated (`optax.scale(-1)`), it is meant
    to be taken as it is.

    tau follows Levenberg and Marquardt (B.3.1): every so many steps, the loss before the last step
    is evaluated too, and where the step lowered it by less than a quarter of what the model said,
    tau grows; where by more than three quarters, it shrinks. (The paper's text has this the wrong
    way round.) It starts at `damping` times the curvature per squared length of the first
    direction.

    A step is judged by the batch that follows it: its own batch would confirm a step that fits this
    batch and no other, and tau would fall until the network diverges. tau grows only where the step
    was too long as well (the loss rises again at its end), and shrinks where it was less than half
    as long as it should be (`levenberg_marquardt`).

    A `direction` that is a function of a damping gamma has gamma adapted as well (B.3.2): every so
    many steps the best of three, by the model, is kept.

    Args:
      direction: what makes d of the incoming updates: a function of gamma such as
        `lambda gamma: scale_by_kfac(layers, damping=gamma)`, a transformation, or None for updates
        that are a direction already (`optax.chain(scale_by_foof(layers),
        scale_by_gauss_newton_step())`). Whether it takes a batch that is not finite is up to it:
        a direction of this library refuses updates that are not.
      damping: the first tau, in units of the curvature d'Gd / d'd of the first direction.
      inner_damping: the first gamma.
      damping_period: the steps from one adaptation of tau to the next.
      inner_damping_period: the same of gamma. A direction that inverts its matrix every so many
        steps should do it at these.
      decay: by how much tau and gamma change, for each step of their periods; 1 to keep them.
      l2: eta, where the loss is to be understood as `loss + eta / 2 |params|^2`, and the incoming
        updates and `grad` are of the loss alone. It is in C, its gradient is in g and in what
        `direction` gets.
      momentum: whether the last update is a direction as well. It costs one more product.
      bounded: whether three things hold a step back. No more than the last update itself is added
        as momentum: a small batch may have next to no curvature along that update, and ask for any
        multiple of it. And of a loss made of those of `losses` that are never negative, the model
        never falls by more than the loss, and a step s moves the outputs no further than a radius:
        s'GGN s / 2, which of a likelihood is the Kullback-Leibler divergence to second order, is at
        most a hundredth of the first loss (the trust region of Ba et al.). The radius grows as
        long as steps that reach it do not fail, and shrinks where the loss of the next batch rose,
        when tau is adapted. It keeps the first steps, which are the longest, from where a network
        does not come back. False for eq. 40 as it is.
      model_period: the steps from one measurement of the curvature to the next; one to measure in
        each step. Between them the direction has the curvature that its own metric says, times the
        ratio of both that was measured last, and the last update the angle with it that it had
        then. Every step is measured as long as the model keeps three quarters of what it promises,
        as it does without noise.
      halvings: how often a step is halved, at most, as long as the loss of its own batch would
        rise; where it still does, nothing moves. Each look costs a pass forward. 0 to take the step
        as it is.
      inner_damping_by: how gamma is adapted: "model" as said above, or "next" as the next batch
        judges, when tau is: it shrinks to a tenth where the model kept three quarters of its
        promise twice in a row, and grows twice as fast, up to the first gamma, where it kept less
        than a quarter.
      learning_rate: multiplies the step of the model; a number or a schedule. What the state keeps
        of the last step, momentum and the judgment are of the step as it was taken.

    Returns:
      A transformation whose `update` needs the parameters and, as Optax's line searches do,
      `value`, `grad` and `value_fn`: the loss, its gradient and the loss as a function of the
      parameters, all for one batch: `tx.update(grads, state, params, captured=captured,
      value=loss, grad=grads, value_fn=lambda p: loss_fn(p, batch))`. It costs one forward-mode
      pass. A batch whose gradient, loss or model is not finite leaves its state as it was, but for
      `refused`, and for that of the direction if the gradient is finite; it updates nothing.

    Raises:
      ValueError: at construction, for negative numbers or periods below one; at update, for a loss
        whose outputs cannot be told, as `gauss_newton_vector_product`.
      TypeError: at update, `params`, `value`, `grad` or `value_fn` are missing.

    References:
      Botev et al., `Practical Gauss-Newton Optimisation for Deep Learning
      <https://arxiv.org/abs/1706.03662>`_, 2017: appendices B.2 and B.3; J. Martens, R. Grosse,
      `Optimizing Neural Networks with Kronecker-factored Approximate Curvature
      <https://arxiv.org/abs/1503.05671>`_, 2015: sections 6.4 to 7; J. Ba, R. Grosse, J. Martens,
      `Distributed Second-Order Optimization using Kronecker-Factored Approximations
      <https://openreview.net/forum?id=SkkTMpjex>`_, 2017: section 5, the trust region.
    """
    name = "scale_by_gauss_newton_step"
    check_not_negative(damping=damping, inner_damping=inner_damping, l2=l2)
    check_positive(decay=decay)
    check_whole(damping_period=damping_period, inner_damping_period=inner_damping_period)
    check_whole(model_period=model_period)
    check_not_negative(halvings=halvings)
    if inner_damping_by not in ("model", "next"):
        raise ValueError(f"`inner_damping_by` is 'model' or 'next', got {inner_damping_by!r}.")
    is_adapted = callable(direction)

    def of_damping(gamma: Any) -> optax.GradientTransformationExtraArgs:
        chosen = direction(gamma) if callable(direction) else direction
        return optax.with_extra_args_support(optax.identity() if chosen is None else chosen)

    def init(params: Tree) -> GaussNewtonStepState:
        check_real(name, params)

        def number(value: Any) -> Array:  # one for each: a buffer cannot be donated twice
            return jnp.asarray(value, dtype_of_model(params))

        return GaussNewtonStepState(
            jnp.zeros([], jnp.int32),
            jnp.zeros([], jnp.int32),
            number(damping),
            number(inner_damping),
            number(0),
            number(0),
            number(1),
            number(0),
            number(0),
            Carried(number(0), number(0), number(0)),
            _linalg.zeros_like(_linalg.wide(params)),
            of_damping(number(inner_damping)).init(params),
        )

    def update(
        updates: Tree,
        state: Any,
        params: Tree = None,
        *,
        value: Any = None,
        grad: Tree = None,
        value_fn: ValueFn | None = None,
        **extra_args: Any,
    ) -> tuple[Tree, GaussNewtonStepState]:
        value_fn = check_line(name, params=params, value=value, grad=grad, value_fn=value_fn)
        dtype = dtype_of_model(params)
        extra_args |= {"value": value, "grad": grad, "value_fn": value_fn}
        slope = with_l2(grad, params, l2)
        incoming = updates if direction is None else with_l2(updates, params, l2)
        ok = _linalg.all_finite((updates, jnp.asarray(value)))
        check_state(name, state, jax.eval_shape(init, params))
        network = network_of(value_fn, params, (), {}, False, name)
        # The step that is judged next is always measured, and all are as long as the model keeps
        # what it promises: then every step gains by it, else it fits the noise of a batch.
        is_due = (state.count + 1) % model_period == 0
        is_measured = is_due | (state.reduction_ratio > 0.75)
        previous = like(state.previous, params)

        def judged() -> tuple[Array, Array, Array]:
            change = state.model_change
            verdict = judge(value_fn, value, slope, params, previous, l2, change)
            factor = jnp.asarray(decay, dtype) ** damping_period
            radius = adapted_radius(state.radius, state.length, verdict, factor)
            return levenberg_marquardt(state.damping, verdict, factor), radius, verdict.ratio

        is_judged = ok & (state.count % damping_period == 0) & (state.model_change < 0)
        adapted, radius, ratio = jax.lax.cond(
            is_judged,
            judged,
            lambda: (state.damping, state.radius, state.reduction_ratio),
        )

        loss = most_fall(network, value, l2, dtype)
        radius_before = radius
        radius = jnp.where(radius > 0, radius, RADIUS * loss)
        bounds = (loss, 1.0, radius) if bounded else ()
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        rate = jnp.asarray(rate, dtype)

        def candidate(gamma: Array, is_tried: bool = False) -> Candidate:
            found, inner = of_damping(gamma).update(incoming, state.inner, params, **extra_args)
            directions = [found, previous] if momentum else [found]

            def measured(slopes: Array) -> Array:
                return curvature_along(network.at(params), directions).astype(slopes.dtype)

            def carried(slopes: Array) -> Array:
                return state.carried.curvature(slopes).astype(slopes.dtype)

            def measured_if_due(slopes: Array) -> Array:
                return jax.lax.cond(is_measured, measured, carried, slopes)

            is_always = is_tried or model_period == 1
            curvature = measured if is_always else measured_if_due
            model = quadratic_model(slope, directions, curvature)
            first = jnp.asarray(damping, dtype) * model.rayleigh
            tau = jnp.where(state.count == 0, first, adapted)
            total = tau + jnp.asarray(l2, dtype)
            steps = minimum(model, total, *bounds)
            length = (steps @ model.curvature @ steps / 2).astype(dtype)
            steps = rate * steps
            change = model.change(total, steps)
            known = jax.tree.map(lambda x: x.astype(dtype), Carried.of(model, steps))
            fall = (steps @ model.slope).astype(dtype)
            return Candidate(directions, inner, tau, steps, change, fall, length, known)

        def tried(gamma: Array) -> Array:
            return candidate(gamma, is_tried=True).change

        gamma = state.inner_damping
        if is_adapted and inner_damping_by == "next":
            gamma = jnp.where(
                is_judged,
                judged_damping(gamma, inner_damping, ratio, state.reduction_ratio),
                gamma,
            )
        elif is_adapted:
            # What comes out of a conditional is copied: a number, and not the direction's state.
            due = ok & (state.count % inner_damping_period == 0) & (state.count > 0)
            factor = jnp.asarray(decay, dtype) ** inner_damping_period
            gamma = jax.lax.cond(
                due,
                lambda: best_of_three(tried, state.inner_damping, factor),
                lambda: state.inner_damping,
            )
        best = candidate(gamma)
        if halvings:
            best = halved(best, value_fn, value, params, l2, halvings)
        # A model that overflows would leave a damping or a radius that no later batch can shrink.
        ok = ok & _linalg.all_finite((best.damping, best.steps, best.length))
        # One array is the state and what the update is made of.
        step = _linalg.wide(combined(best.directions, best.steps))
        last = _linalg.where(ok, step, state.previous)
        step = like(last, params)
        new = state._replace(
            count=state.count + 1,
            damping=best.damping,
            inner_damping=gamma,
            step_size=best.steps[0],
            model_change=best.change,
            reduction_ratio=ratio,
            # A loss of zero has no share to be the first radius.
            radius=jnp.where(jnp.asarray(value) == 0, radius_before, radius),
            length=best.length,
            carried=best.carried,
        )
        step = _linalg.where(ok, step, _linalg.zeros_like(step))
        refused = state._replace(refused=state.refused + 1)
        return step, _kept(ok, new, refused)._replace(previous=last, inner=best.inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _kept(
    ok: Bool[Array, ""], new: GaussNewtonStepState, old: GaussNewtonStepState
) -> GaussNewtonStepState:
    """The numbers of the new state, or of the old; the trees are not for this to choose."""
    numbers = (state._replace(previous=None, inner=None) for state in (new, old))
    return _linalg.where(ok, *numbers)
