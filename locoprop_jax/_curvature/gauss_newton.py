"""Step sizes and damping from the quadratic model of the full Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from locoprop_jax import _linalg
from locoprop_jax._checks import check_not_negative, check_positive, check_whole, is_number
from locoprop_jax._curvature.products import Linearised, linearise

Scalar = Float[Array, ""]
Tree = Any
ValueFn = Callable[[Any], Array]


class GaussNewtonStepState(NamedTuple):
    """State of `scale_by_gauss_newton_step`.

    Attributes:
      count: finite batches so far. shape=(), dtype=int32
      damping: tau, of the Gauss-Newton matrix. shape=()
      inner_damping: gamma, of the direction's own matrix. shape=()
      step_size: alpha of the last step. shape=()
      reduction_ratio: rho, how much the loss fell over how much the model fell, when that was last
        measured. shape=()
      previous: the last update, for momentum; None without.
      inner: the state of the direction.
    """

    count: Int[Array, ""]
    damping: Scalar
    inner_damping: Scalar
    step_size: Scalar
    reduction_ratio: Scalar
    previous: Any
    inner: Any


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
) -> optax.GradientTransformationExtraArgs:
    """The step along a direction that is best for the full Gauss-Newton model (practical GN, B.2).

    For a direction d and the gradient g the update is alpha d, with alpha = d'g / d'Cd (eq. 40) and
    C = GGN + (tau + l2) I the Gauss-Newton matrix of the current batch; nothing is left to tune. A
    direction that ascends is turned around. With momentum the step is the best one in the plane of
    d and the last update (Martens and Grosse, section 7). Negated (`optax.scale(-1)`), it is meant
    to be taken as it is.

    tau follows Levenberg and Marquardt (B.3.1): every so many steps the loss is evaluated after the
    step too, and where it fell by less than a quarter of what the model says, tau grows; where by
    more than three quarters, it shrinks. (The paper's text has this the wrong way round.)
    It starts at `damping` times the curvature per squared length of the first direction.

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

    Returns:
      A transformation whose `update` needs the parameters and, as Optax's line searches do,
      `value`, `grad` and `value_fn`: the loss, its gradient and the loss as a function of the
      parameters, all for one batch: `tx.update(grads, state, params, captured=captured,
      value=loss, grad=grads, value_fn=lambda p: loss_fn(p, batch))`. It costs one forward-mode
      pass. A batch whose gradient or loss is not finite leaves its state as it was, but for that
      of the direction if only the loss is not finite, and updates nothing.

    Raises:
      ValueError: at construction, for negative numbers or periods below one; at update, for a loss
        whose outputs cannot be told, as `gauss_newton_vector_product`.
      TypeError: at update, `params`, `value`, `grad` or `value_fn` are missing.

    References:
      Botev et al., `Practical Gauss-Newton Optimisation for Deep Learning
      <https://arxiv.org/abs/1706.03662>`_, 2017: appendices B.2 and B.3; J. Martens, R. Grosse,
      `Optimizing Neural Networks with Kronecker-factored Approximate Curvature
      <https://arxiv.org/abs/1503.05671>`_, 2015: sections 6.4 to 7.
    """
    name = "scale_by_gauss_newton_step"
    check_not_negative(damping=damping, inner_damping=inner_damping, l2=l2)
    check_positive(decay=decay)
    check_whole(damping_period=damping_period, inner_damping_period=inner_damping_period)
    is_adapted = callable(direction)

    def of_damping(gamma: Any) -> optax.GradientTransformationExtraArgs:
        chosen = direction(gamma) if callable(direction) else direction
        return optax.with_extra_args_support(optax.identity() if chosen is None else chosen)

    def init(params: Tree) -> GaussNewtonStepState:
        def number(value: Any) -> Array:  # one for each: a buffer cannot be donated twice
            return jnp.asarray(value, dtype_of_model(params))

        return GaussNewtonStepState(
            jnp.zeros([], jnp.int32),
            number(damping),
            number(inner_damping),
            number(0),
            number(1),
            _linalg.zeros_like(_linalg.wide(params)) if momentum else None,
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
        network = linearise(value_fn, params, (), {}, False, name)
        previous = [] if state.previous is None else [like(state.previous, params)]

        def candidate(gamma: Array) -> Candidate:
            found, inner = of_damping(gamma).update(incoming, state.inner, params, **extra_args)
            directions = [found, *previous]
            model = quadratic_model(network, slope, directions)
            first = jnp.asarray(damping, dtype) * model.rayleigh
            tau = jnp.where(state.count == 0, first, state.damping)
            steps, change = minimum(model, tau + jnp.asarray(l2, dtype))
            return Candidate(directions, inner, tau, steps, change)

        def best_of_three() -> Array:
            factor = jnp.asarray(decay, dtype) ** inner_damping_period

            def better(k: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
                gamma = state.inner_damping * factor ** (1 - k).astype(dtype)
                change = candidate(gamma).change
                return _linalg.where(change < best[1], (gamma, change), best)

            start = state.inner_damping, jnp.asarray(jnp.inf, dtype)
            return jax.lax.fori_loop(0, 3, better, start)[0]

        gamma = state.inner_damping
        if is_adapted:
            # What comes out of a conditional is copied: a number, and not the direction's state.
            due = ok & (state.count % inner_damping_period == 0) & (state.count > 0)
            gamma = jax.lax.cond(due, best_of_three, lambda: state.inner_damping)
        best = candidate(gamma)
        step, last = _combined(best.directions, best.steps), state.previous
        if last is not None:  # one array is the state and what the update is made of
            last = _linalg.where(ok, _linalg.wide(step), last)
            step = like(last, params)

        def adapted() -> tuple[Array, Array]:
            ratio = reduction_ratio(value_fn, value, params, step, l2, best.change)
            factor = jnp.asarray(decay, dtype) ** damping_period
            return levenberg_marquardt(best.damping, ratio, factor), ratio

        tau, ratio = jax.lax.cond(
            (state.count + 1) % damping_period == 0,
            adapted,
            lambda: (best.damping, state.reduction_ratio),
        )
        new = state._replace(
            count=state.count + 1,
            damping=tau,
            inner_damping=gamma,
            step_size=best.steps[0],
            reduction_ratio=ratio,
            previous=None,
            inner=None,
        )
        kept = _linalg.where(ok, new, state._replace(previous=None, inner=None))
        step = _linalg.where(ok, step, _linalg.zeros_like(step))
        return step, kept._replace(previous=last, inner=best.inner)

    return optax.GradientTransformationExtraArgs(init, update)


class Candidate(NamedTuple):
    """A step that may be taken.

    Attributes:
      directions: what it is made of.
      inner: the state of the first direction.
      damping: tau.
      steps: how much of each direction is in it.
      change: of the model by the step; not positive.
    """

    directions: list[Tree]
    inner: Any
    damping: Scalar
    steps: Float[Array, " k"]
    change: Scalar


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
        length = self.lengths[0, 0]
        return jnp.where(length > 0, self.curvature[0, 0] / jnp.where(length > 0, length, 1), 0)


def quadratic_model(network: Linearised, slope: Tree, directions: list[Tree]) -> Model:
    """What the model knows of some directions: one forward-mode pass for each."""
    pushed = [network.push(direction) for direction in directions]
    bent = [network.hessian(outputs) for outputs in pushed]

    def product(a: Tree, b: Tree) -> Array:
        return _linalg.dot(_linalg.wide(a), _linalg.wide(b))

    def gram(left: list[Tree], right: list[Tree]) -> Array:
        half = {(i, j): product(left[i], right[j]) for i in range(len(left)) for j in range(i + 1)}
        rows = [[half[max(i, j), min(i, j)] for j in range(len(left))] for i in range(len(left))]
        return jnp.stack([jnp.stack(row) for row in rows])

    return Model(
        jnp.stack([product(slope, direction) for direction in directions]),
        gram(pushed, bent),
        gram(directions, directions),
    )


def minimum(model: Model, damping: Scalar) -> tuple[Float[Array, " k"], Scalar]:
    """The steps (to be subtracted) that lower the damped model most, and how it then changes.

    Zero where the model has no minimum: along a direction of no or negative curvature.
    """
    matrix = model.curvature + damping.astype(model.lengths.dtype) * model.lengths
    diagonal = jnp.diagonal(matrix)
    good = diagonal > 0
    root = jnp.where(good, 1 / jnp.sqrt(jnp.where(good, diagonal, 1)), 0)
    unit = matrix * root[:, None] * root[None]
    # Directions may be parallel, or zero.
    eps = float(10 * jnp.finfo(matrix.dtype).eps)
    steps = root * _linalg.solve(_linalg.damped(unit, eps), (root * model.slope)[:, None])[:, 0]
    steps = jnp.where(jnp.isfinite(steps).all(), steps, 0)
    change = steps @ matrix @ steps / 2 - steps @ model.slope
    return steps, jnp.where(jnp.isfinite(change), change, 0)


def with_l2(gradient: Tree, params: Tree, l2: Any) -> Tree:
    """The gradient of the loss with eta / 2 |params|^2 added."""
    if is_number(l2) and l2 == 0:
        return gradient
    return jax.tree.map(lambda g, p: g + jnp.asarray(l2, g.dtype) * p, gradient, params)


def reduction_ratio(
    value_fn: ValueFn, value: Any, params: Tree, update: Tree, l2: Any, change: Scalar
) -> Scalar:
    """rho: how much the loss falls when the update is subtracted, over the model's fall (eq. 42).

    The loss includes its l2 term.
    """
    new, dtype = jax.tree.map(jnp.subtract, params, update), change.dtype
    fall = value_fn(new).astype(dtype) - jnp.asarray(value, dtype)
    if not is_number(l2) or l2 > 0:
        growth = _squares(new) - _squares(params)
        fall = fall + jnp.asarray(l2, dtype) / 2 * growth.astype(dtype)
    return fall / jnp.where(change < 0, change, -jnp.inf)


def levenberg_marquardt(damping: Scalar, ratio: Scalar, factor: Scalar) -> Scalar:
    """Less damping where the loss fell as the model said, more where it did not (B.3.1).

    A ratio that is not a number counts as a loss that did not fall.
    """
    grown = jnp.maximum(damping, jnp.finfo(damping.dtype).tiny) / factor
    kept = jnp.where(ratio > 0.75, damping * factor, damping)
    return jnp.where(ratio >= 0.25, kept, grown)


def check_line(method: str, *, value_fn: ValueFn | None, **others: Any) -> ValueFn:
    """The loss as a function of the parameters; refuse missing arguments, and masked parameters.

    Raises:
      TypeError: one is missing.
      ValueError: some parameters are masked.
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
    return value_fn


def _is_masked(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def like(tree: Tree, other: Tree) -> Tree:
    """The tree in the dtypes of another."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, other)


def dtype_of_model(params: Tree) -> Any:
    """Of the quadratic model's numbers: float64 if a parameter is, else float32."""
    wide = any(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(params))
    return jnp.float64 if wide else jnp.float32


def _squares(params: Tree) -> Scalar:
    return _linalg.dot(_linalg.wide(params), _linalg.wide(params))


def _combined(directions: list[Tree], steps: Float[Array, " k"]) -> Tree:
    scaled = [_linalg.scale(d, step) for d, step in zip(directions, steps, strict=True)]
    total = scaled[0]
    for other in scaled[1:]:
        total = _linalg.add(total, other)
    return total


def complete(
    direction: Callable[..., optax.GradientTransformation],
    learning_rate: optax.ScalarOrSchedule,
    *,
    damping: float,
    step_damping: float,
    adapt_damping: bool,
    momentum: bool,
    l2: float,
) -> optax.GradientTransformationExtraArgs:
    """Directions of some `damping` with Gauss-Newton steps: a complete optimizer (Algorithm 1)."""

    def of_damping(gamma: Any) -> optax.GradientTransformation:
        return direction(damping=gamma)

    step = scale_by_gauss_newton_step(
        of_damping if adapt_damping else of_damping(damping),
        damping=step_damping,
        inner_damping=damping,
        l2=l2,
        momentum=momentum,
    )
    return optax.chain(step, descend(learning_rate))


def descend(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Minus the updates times the learning rate, which may be of another dtype."""
    if callable(learning_rate):
        return optax.scale_by_learning_rate(learning_rate)

    def scale(updates: Tree, params: Tree = None) -> Tree:
        del params
        return jax.tree.map(lambda u: -jnp.asarray(learning_rate, u.dtype) * u, updates)

    return optax.stateless(scale)
