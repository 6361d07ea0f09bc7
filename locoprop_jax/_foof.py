"""Gradient descent on neurons: FOOF, amortised over steps."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from locoprop_jax import _layers, _linalg
from locoprop_jax._blocks import Block, as_rows, blocks, extend, matrix, replace, unmatrix
from locoprop_jax._checks import (
    check_decay,
    check_layers,
    check_not_negative,
    check_whole,
    is_number,
)
from locoprop_jax._layers import Captured, LayerArrays, Layers
from locoprop_jax._metric import (
    average_directions,
    descend,
    scale_by_metric_norm,
)
from locoprop_jax._stacking import map_layers

Matrices = dict[str, Float[Array, "d d"]]  # by layer; d is d_in, one more with a bias


class FoofState(NamedTuple):
    """State of `scale_by_foof`.

    Attributes:
      count: finite batches so far. shape=(), dtype=int32
      gathered: `count` after the last batch whose statistics were gathered. shape=(), dtype=int32
      failures: factorisations that did not succeed; their layers kept the inverse they had, or
        stood still. shape=(), dtype=int32
      gram: the running sum behind the average of X'X / N. Empty for the current batch's alone.
      inverse: the damped inverse. Empty if every step has its own.
    """

    count: Int[Array, ""]
    gathered: Int[Array, ""]
    failures: Int[Array, ""]
    gram: Matrices
    inverse: Matrices


class LayerRows(NamedTuple):
    """One layer.

    Attributes:
      samples: the rows of the statistics, with a one for the bias.
      cotangents: those that `samples` meets in the updates; zeros if there are none.
      updates: the incoming block.
      damping: of each row of the block.
    """

    samples: Float[Array, "rows d"]
    cotangents: Float[Array, "rows d_out"]
    updates: Float[Array, "d d_out"]
    damping: Float[Array, " d"]


def scale_by_foof(
    layers: Layers,
    *,
    damping: float = 1.0,
    relative: bool = True,
    damp_bias: bool = False,
    decay: float = 0.95,
    inverse_period: int = 1,
    statistics_steps: int = 1,
    shared: str = "expand",
) -> optax.GradientTransformationExtraArgs:
    """Gradient descent on neurons (FOOF; Benzing, eq. 6, Algorithm 1).

    A layer's gradient G becomes (S + lambda I)^-1 G, with S the average of X'X / N over the N rows
    of a batch and over batches: of all changes of the weights, the one that moves the layer's
    outputs most nearly along their cotangents. Parameters in no layer keep their gradient.

    With the statistics of the current batch (`decay=0`) and absolute damping lambda, a step of size
    alpha is LocoProp-S solved exactly with gamma = alpha N, eta = 1 / (lambda N) (its bias is
    damped), and Linear Neuron Boosting with its systems solved to the end, alpha = sqrt(eps / z)
    and ridge lambda (its bias is not). Benzing sums over rows where this averages: his lambda is N
    of these.

    Args:
      layers: from `find_layers`.
      damping: lambda, in units of the mean eigenvalue of S, or absolute.
      relative: which of the two.
      damp_bias: whether the bias is damped like the kernel.
      decay: m, how much of the average of S is left after a step; 0 for the current batch alone.
        Unlike Algorithm 1's it counts steps, not updates of S: an amortised average is as recent.
      inverse_period: T, the steps from one inversion to the next. The first T steps have more,
        before steps 1, 2, 3, 5, 9..., because early statistics age fast.
      statistics_steps: how many steps up to each inversion gather statistics, its own included.
      shared: of weights that an example uses at several positions; "expand" takes each position
        for a row, "reduce" averages an example's inputs first.

    Returns:
      A transformation whose `update` needs `captured`. A batch that is not finite leaves its state
      as it was, and updates nothing.

    Raises:
      ValueError: at construction, for no layers, negative damping, a decay outside [0, 1), a
        period or a number of statistics steps below one, more of these than the period, an unknown
        `shared`; at update, for `captured` from another model.
      TypeError: at update, `captured` is missing.

    References:
      Benzing, `Gradient Descent on Neurons and its Link to Approximate Second-Order Optimization
      <https://arxiv.org/abs/2201.12250>`_, 2022: section 4, appendices D and K.
    """
    _check(layers, damping, decay, inverse_period, statistics_steps, shared)
    is_amortised = inverse_period > 1
    is_averaged = not is_number(decay) or decay > 0

    def init(params: Any) -> FoofState:
        zeros, zero = _zeros(layers, params), jnp.zeros([], jnp.int32)
        return FoofState(
            zero, zero, zero, zeros if is_averaged else {}, zeros if is_amortised else {}
        )

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        captured: Captured | None = None,
        **extra_args: Any,
    ) -> tuple[Any, FoofState]:
        del params, extra_args
        _layers.check_captured(layers, captured, "scale_by_foof")
        assert captured is not None
        slopes = blocks(layers, updates)
        rows = {
            name: _layer_rows(captured[name], slope, damping, damp_bias, shared)
            for name, slope in slopes.items()
        }
        ok = _linalg.all_finite((updates, [own.samples for own in rows.values()]))
        return jax.lax.cond(
            ok,
            lambda: precondition(updates, slopes, rows, state),
            lambda: (_linalg.zeros_like(updates), state),
        )

    def precondition(
        updates: Any, slopes: dict[str, Block], rows: dict[str, LayerRows], state: FoofState
    ) -> tuple[Any, FoofState]:
        gram, gathered = state.gram, state.gathered
        inverse, failures = state.inverse, state.failures
        due = _is_due(state.count, inverse_period)
        if is_averaged:
            soon = (-state.count) % inverse_period < statistics_steps
            gram, gathered = jax.lax.cond(
                due | soon,
                lambda: (_average(rows, state, decay), state.count + 1),
                lambda: (state.gram, state.gathered),
            )

        def damped(own: LayerRows, gram: Float[Array, "d d"] | None) -> Float[Array, "d d"]:
            if gram is None:
                mean = _second_moment(own)
            else:
                mean = _linalg.debiased(gram, decay, gathered)
            return _linalg.damped(mean, own.damping, relative=relative)

        def invert(_: str, arrays: tuple[LayerRows, Any]) -> Float[Array, "d d"]:
            return _linalg.inverse(damped(*arrays))

        def apply(_: str, arrays: tuple[Array, Array]) -> Float[Array, "d d_out"]:
            inverse, slope = arrays
            return inverse @ slope

        def has_free_bias(name: str) -> bool:
            return "bias" in slopes[name] and not damp_bias

        def solve(name: str, arrays: tuple[LayerRows, Any]) -> Float[Array, "d d_out"]:
            own, gram = arrays
            if gram is None:
                return _solve_by_fewest(own, relative, has_free_bias(name))
            return _linalg.solve(damped(own, gram), own.updates)

        with_gram = {name: (own, gram.get(name)) for name, own in rows.items()}
        if is_amortised:
            inverse, failures = jax.lax.cond(
                due,
                lambda: _keep_finite(map_layers(invert, with_gram), inverse, failures),
                lambda: (inverse, failures),
            )
            new = map_layers(apply, {n: (inverse[n], own.updates) for n, own in rows.items()})
        else:
            new = map_layers(solve, with_gram, kind=has_free_bias)
            new, failures = _keep_finite(new, _linalg.zeros_like(new), failures)
        directions = {name: unmatrix(new[name], slopes[name]) for name in slopes}
        return replace(layers, updates, directions), FoofState(
            state.count + 1, gathered, failures, gram, inverse
        )

    return optax.GradientTransformationExtraArgs(init, update)


def foof(
    layers: Layers,
    learning_rate: optax.ScalarOrSchedule = 4.0,
    *,
    damping: float = 1.0,
    relative: bool = True,
    damp_bias: bool = False,
    decay: float = 0.95,
    inverse_period: int = 20,
    statistics_steps: int = 1,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    floor: float = 1e-4,
) -> optax.GradientTransformationExtraArgs:
    """FOOF with steps of a size that its own metric measures, amortised.

    The gradient is preconditioned (`scale_by_foof`), scaled to length one in the metric
    (`scale_by_metric_norm`), averaged over steps and multiplied by the square root of the learning
    rate. For plain FOOF chain `scale_by_foof`, `optax.trace` and `optax.scale_by_learning_rate`.

    Args:
      layers: from `find_layers`.
      learning_rate: eps, the squared length of a step in the metric: how far the outputs of all
        layers together move for an average row, were all their inputs held fixed. A number or a
        schedule, as for `lnb`.
      damping: lambda, as for `scale_by_foof`.
      relative: whether it is in units of the mean eigenvalue.
      damp_bias: whether biases are damped as well.
      decay: of the average of S.
      inverse_period: T, the steps from one inversion to the next.
      statistics_steps: how many of them gather statistics.
      momentum: decay of the average of the steps; where these disagree it is shorter than eps
        says.
      weight_decay: rho; parameters shrink by sqrt(eps) rho in each step.
      floor: as for `scale_by_metric_norm`.

    Returns:
      A complete optimizer. Its `update` needs `captured`, from `value_grad_and_capture`, and the
      parameters if there is weight decay.

    Raises:
      ValueError, TypeError: as `scale_by_foof` and `scale_by_metric_norm`.
    """
    direction = scale_by_foof(
        layers,
        damping=damping,
        relative=relative,
        damp_bias=damp_bias,
        decay=decay,
        inverse_period=inverse_period,
        statistics_steps=statistics_steps,
    )
    return optax.chain(
        scale_by_metric_norm(direction, floor=floor),
        average_directions(momentum),
        descend(learning_rate, weight_decay),
    )


# --- statistics ----------------------------------------------------------------------------------


def _layer_rows(
    arrays: LayerArrays, slope: Block, damping: Any, damp_bias: bool, shared: str
) -> LayerRows:
    updates = matrix(slope)
    dtype = updates.dtype
    x, e = arrays.inputs, as_rows(arrays.cotangents, dtype)
    if shared == "reduce":
        x, e = x.astype(dtype).mean(1), jnp.zeros((len(x), e.shape[1]), dtype)
    damped = jnp.full(len(updates), damping, dtype)
    if "bias" in slope and not damp_bias:
        damped = damped.at[-1].set(0)
    return LayerRows(extend(as_rows(x, dtype), slope), e, updates, damped)


def _second_moment(own: LayerRows) -> Float[Array, "d d"]:
    return _linalg.second_moment(own.samples) / len(own.samples)


def _average(rows: dict[str, LayerRows], state: FoofState, decay: Any) -> Matrices:
    """The running sum with this batch; what it forgets is counted in steps."""
    dtype = jnp.result_type(*state.gram.values())
    kept = _linalg.power(decay, state.count + 1 - state.gathered, dtype)
    new = {name: _second_moment(own) for name, own in rows.items()}
    return _linalg.average(state.gram, new, kept)


def _is_due(count: Int[Array, ""], period: int) -> Bool[Array, ""]:
    """Whether this step inverts: each `period` of them, and early on after 0, 1, 2, 4, 8..."""
    is_power_of_two = count & (count - 1) == 0
    return (count % period == 0) | ((count < period) & is_power_of_two)


# --- solving -------------------------------------------------------------------------------------


def _solve_by_fewest(
    own: LayerRows, relative: bool, has_free_bias: bool
) -> Float[Array, "d d_out"]:
    """With the current batch alone, by its rows where these are fewer than the inputs.

    A bias that is not damped is eliminated, which centres the inputs.
    """
    x, right = own.samples, own.updates
    rows, d = x.shape
    damping = own.damping[0]
    if relative:
        damping = damping * jnp.vdot(x, x) / (rows * d)
    weight = rows * jnp.maximum(damping, jnp.finfo(damping.dtype).tiny)
    if not has_free_bias:
        return rows * _linalg.ridge(x, right, own.cotangents, weight)
    mean, bias = x[:, :-1].mean(0), right[-1:]
    centred, right = x[:, :-1] - mean[None], right[:-1] - mean[:, None] * bias
    kernel = rows * _linalg.ridge(centred, right, own.cotangents, weight)
    return jnp.concatenate([kernel, bias - mean[None] @ kernel])


def _keep_finite(
    new: dict[str, Array], old: dict[str, Array], failures: Int[Array, ""]
) -> tuple[dict[str, Array], Int[Array, ""]]:
    """The new arrays where they are finite, the old ones elsewhere, and how often that was."""
    finite = {name: _linalg.all_finite(array) for name, array in new.items()}
    kept = {name: jnp.where(finite[name], new[name], old[name]) for name in new}
    failed = [1 - flag.astype(jnp.int32) for flag in finite.values()]
    return kept, sum(failed, start=failures)


# --- checks --------------------------------------------------------------------------------------


def _zeros(layers: Layers, params: Any) -> Matrices:
    """Zeros in the place of each layer's statistics."""
    if not jax.tree.leaves(params):  # the stand-in of `optax.tree.map_params`
        return dict.fromkeys(layers, jnp.zeros((1, 1)))
    result = {}
    for name, block in blocks(layers, params).items():
        like = matrix(block)
        result[name] = jnp.zeros((len(like), len(like)), like.dtype)
    return result


def _check(
    layers: Any,
    damping: Any,
    decay: Any,
    inverse_period: int,
    statistics_steps: int,
    shared: str,
) -> None:
    check_layers(layers, "scale_by_foof")
    check_not_negative(damping=damping)
    check_decay(decay=decay)
    check_whole(inverse_period=inverse_period, statistics_steps=statistics_steps)
    if statistics_steps > inverse_period:
        raise ValueError(
            f"`statistics_steps` are some of the {inverse_period} of `inverse_period`, got "
            f"{statistics_steps}."
        )
    if shared not in ("expand", "reduce"):
        raise ValueError(f'`shared` is "expand" or "reduce", got {shared!r}.')
