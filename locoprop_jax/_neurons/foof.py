"""Gradient descent on neurons: FOOF, amortised over steps."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from locoprop_jax import _linalg
from locoprop_jax._checks import check_layers, check_not_negative
from locoprop_jax._layers import rows as _rows
from locoprop_jax._layers.arrays import LayerArrays
from locoprop_jax._layers.blocks import blocks, divide, dtype_of
from locoprop_jax._layers.captured import Captured, check_captured
from locoprop_jax._layers.layers import Layers, replace
from locoprop_jax._layers.rows import Block, Inputs
from locoprop_jax._layers.stacking import map_layers, over_stack
from locoprop_jax._layers.structured import OneHot, Structured, Windows
from locoprop_jax._neurons.amortised import Amortisation, AmortisedState, keep_finite
from locoprop_jax._neurons.metric import average_gradients, descend, scale_by_metric_norm


class Statistics(NamedTuple):
    """Of a layer's inputs over N rows: X'X / N (an embedding's by its diagonal) and their mean."""

    second: Float[Array, "d_in d_in"] | Float[Array, " d_in"]
    mean: Float[Array, " d_in"]


class Metric(NamedTuple):
    """The damped second moment M of (x, 1), or of x, with the bias eliminated.

    Attributes:
      kernel: what then remains for the kernel, or its inverse: with a free bias the damped
        covariance of the inputs.
      mean: of the inputs.
      bias: the inverse of the bias's own entry, zero without a bias.
    """

    kernel: Float[Array, "d_in d_in"] | Float[Array, " d_in"]
    mean: Float[Array, " d_in"]
    bias: Float[Array, ""]


class FoofState(AmortisedState):
    """State of `scale_by_foof`.

    Attributes:
      count: finite batches so far. shape=(), dtype=int32
      gathered: `count` after the last batch whose statistics were gathered. shape=(), dtype=int32
      failures: factorisations that did not succeed; their layers kept the inverse they had, or
        stood still. shape=(), dtype=int32
      statistics: `Statistics` by layer, their running sums. Empty for the current batch's alone.
      inverse: `Metric` by layer, with its inverse. Empty if every step solves its own.
    """


class LayerRows(NamedTuple):
    """One layer.

    Attributes:
      inputs: the rows of the statistics.
      cotangents: those that the inputs meet in the updates; zeros if there are none.
      slope: the incoming block.
    """

    inputs: Inputs
    cotangents: Float[Array, "rows d_out"]
    slope: Block


def scale_by_foof(
    layers: Layers,
    *,
    damping: float = 10.0,
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

    Departures from Algorithm 1: a step sees its own batch's statistics, and the inverse made of
    them if one is due, so that no warm-up before training is needed; the first T steps have more
    inversions (after 0, 1, 2, 4, 8... steps), because early statistics age fast; and `decay` counts
    steps, not updates of S, so that an amortised average is as recent as one that is not. Small
    batches then need some `statistics_steps`. Under `vmap` over seeds each step inverts.

    With the statistics of the current batch (`decay=0`) and absolute damping lambda, a step of size
    alpha is LocoProp-S solved exactly with gamma = alpha N, eta = 1 / (lambda N) (its bias is
    damped), and Linear Neuron Boosting with its systems solved to the end, alpha = sqrt(eps / z)
    and ridge lambda (its bias is not). Benzing sums over rows where this averages: his lambda is N
    of these.

    Args:
      layers: from `find_layers`.
      damping: lambda, in units of the mean variance of the layer's inputs (of their mean square
        without a bias), or absolute.
      relative: which of the two.
      damp_bias: whether the bias is damped like the kernel.
      decay: m, how much of the average of S is left after a step; 0 for the current batch alone.
      inverse_period: T, the steps from one inversion to the next.
      statistics_steps: how many steps up to each inversion gather statistics, its own included;
        with `decay=0` its own alone count.
      shared: of weights that an example uses at several positions; "expand" takes each position
        for a row, "reduce" averages an example's inputs first, which is refused where weights are
        used transposed too.

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
    amortisation = Amortisation(decay, inverse_period, statistics_steps)
    _check(layers, damping, amortisation, shared)
    is_amortised = inverse_period > 1
    damped = Damping(damping, relative, damp_bias)

    def init(params: Any) -> FoofState:
        # Each array is made on its own, because one buffer cannot be donated twice.
        def zeros(*shape: int, dtype: Any = jnp.int32) -> Array:
            return jnp.zeros(shape, dtype)

        statistics, inverse = {}, {}
        for name, kernel in _kernels(layers, params).items():
            *stack, d, _ = kernel.shape
            make = functools.partial(zeros, *stack, dtype=kernel.dtype)
            square = (d,) if layers[name].is_lookup else (d, d)
            if amortisation.is_averaged:
                statistics[name] = Statistics(make(*square), make(d))
            if is_amortised:
                inverse[name] = Metric(make(*square), make(d), make())
        return FoofState(zeros(), zeros(), zeros(), statistics, inverse)

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        captured: Captured | None = None,
        **extra_args: Any,
    ) -> tuple[Any, FoofState]:
        del params, extra_args
        captured = check_captured(layers, captured, "scale_by_foof")
        slopes = blocks(layers, updates)
        rows = {name: _layer_rows(captured[name], slopes[name], shared) for name in slopes}
        with_kernel = {name: own for name, own in rows.items() if "kernel" in own.slope}
        ok = _linalg.all_finite((updates, [own.inputs for own in rows.values()]))

        def gather() -> dict[str, Statistics]:
            return {
                name: over_stack(layers[name], _statistics)(own.inputs)
                for name, own in with_kernel.items()
            }

        def invert(_: str, arrays: tuple[Statistics, Block]) -> Metric:
            metric = _metric(*arrays, damped)
            return metric._replace(kernel=_linalg.inverse(metric.kernel))

        def invert_all(averages: dict[str, Statistics]) -> dict[str, Metric]:
            sources = {name: (averages[name], with_kernel[name].slope) for name in averages}
            return map_layers(layers, invert, sources) if is_amortised else {}

        def apply(_: str, arrays: tuple[Block, Metric]) -> Block:
            slope, inverse = arrays
            return divide(
                slope, inverse.mean, inverse.bias, lambda g: _linalg.multiply(inverse.kernel, g)
            )

        def solve(_: str, arrays: tuple[LayerRows, Statistics | None]) -> Block:
            own, average = arrays
            if average is None:
                return _solve_batch(own, damped)
            return _solve_average(average, own.slope, damped)

        if amortisation.is_averaged or is_amortised:
            state = amortisation.advance(state, ok, gather, invert_all)
        failures = state.failures
        if is_amortised:
            sources = {n: (own.slope, state.inverse[n]) for n, own in with_kernel.items()}
            new = map_layers(layers, apply, sources)
        else:
            averages = amortisation.averages(state)
            sources = {n: (own, averages.get(n)) for n, own in with_kernel.items()}
            new = map_layers(layers, solve, sources)
            new, failed = keep_finite(new, _linalg.zeros_like(new), failures)
            failures = jnp.where(ok, failed, failures)
        biases = {name: own for name, own in rows.items() if name not in with_kernel}
        alone = map_layers(layers, lambda _, own: _divide_bias(own, damped), biases)
        directions = replace(layers, updates, new | alone)
        state = state._replace(count=state.count + ok.astype(jnp.int32), failures=failures)
        return _linalg.where(ok, directions, _linalg.zeros_like(directions)), state

    return optax.GradientTransformationExtraArgs(init, update)


def foof(
    layers: Layers,
    learning_rate: optax.ScalarOrSchedule = 4.0,
    *,
    damping: float = 10.0,
    relative: bool = True,
    damp_bias: bool = False,
    decay: float = 0.95,
    inverse_period: int = 20,
    statistics_steps: int = 1,
    shared: str = "expand",
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    floor: float = 1e-4,
) -> optax.GradientTransformationExtraArgs:
    """FOOF with steps of a size that its own metric measures, amortised.

    The gradient is averaged over steps, preconditioned (`scale_by_foof`), scaled to length one in
    the metric (`scale_by_metric_norm`) and multiplied by the square root of the learning rate. For
    plain FOOF chain `scale_by_foof`, `optax.trace` and `optax.scale_by_learning_rate`.

    Args:
      layers: from `find_layers`.
      learning_rate: eps, the squared length of a step in the damped metric: at most so far do the
        outputs of all layers together move for an average row, were all their inputs held fixed.
        A number, or better a schedule that falls, because no step is shorter than that.
      damping: lambda, as for `scale_by_foof`.
      relative: whether it is in units of the inputs' mean variance.
      damp_bias: whether biases are damped as well.
      decay: of the average of S.
      inverse_period: T, the steps from one inversion to the next.
      statistics_steps: how many of them gather statistics.
      momentum: decay of the average of the gradients.
      shared: "expand" or "reduce".
      weight_decay: rho; parameters shrink by sqrt(eps) rho in each step, even in one whose batch is
        not finite.
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
        shared=shared,
    )
    return optax.chain(
        average_gradients(momentum),
        scale_by_metric_norm(direction, floor=floor),
        descend(learning_rate, weight_decay),
    )


# --- statistics ----------------------------------------------------------------------------------


def _layer_rows(arrays: LayerArrays, slope: Block, shared: str) -> LayerRows:
    """Of one layer or of a stack."""
    dtype = dtype_of(slope)
    x, e = arrays.rows(dtype), arrays.cotangent_rows(dtype)
    if shared == "reduce" and not isinstance(x, OneHot):
        x = arrays.inputs.astype(dtype).mean(-2)
        return LayerRows(x, jnp.zeros((*x.shape[:-1], e.shape[-1]), dtype), slope)
    return LayerRows(x, e, slope)


def _statistics(inputs: Inputs) -> Statistics:
    return Statistics(_rows.second_moment(inputs) / _rows.count(inputs), _rows.mean(inputs))


# --- solving -------------------------------------------------------------------------------------


class Damping(NamedTuple):
    """What is added to M's diagonal: for the kernel, and for the bias where it is damped."""

    amount: Any
    relative: bool
    bias: bool

    def of(
        self, variances: Float[Array, " d_in"], squares: Float[Array, " d_in"]
    ) -> Float[Array, ""]:
        """The number to add, for inputs of these variances and mean squares.

        Inputs of which none varies beyond rounding errors are damped by the amount itself:
        gradients that never met data, of weight decay for example, are theirs all the same.
        """
        amount, eps = jnp.asarray(self.amount, variances.dtype), jnp.finfo(variances.dtype).eps
        if self.relative and variances.size:
            unit = jnp.where(variances > 10 * eps * squares, variances, 0).mean()
            amount = amount * jnp.where(unit > eps**2, unit, 1)
        return amount


def _metric(now: Statistics, slope: Block, damping: Damping) -> Metric:
    second, mean = now
    squares = _linalg.diagonal(second)
    amount = damping.of(squares - jnp.square(mean) if "bias" in slope else squares, squares)
    bias = _inverse_of_bias(slope, amount, damping)
    if "bias" in slope:
        second = second - bias * mean[:, None] * mean[None]
    return Metric(_linalg.damped(second, amount), mean, bias)


def _inverse_of_bias(slope: Block, amount: Float[Array, ""], damping: Damping) -> Float[Array, ""]:
    """M's entry for the bias is one, and its damping."""
    if "bias" not in slope:
        return jnp.zeros_like(amount)
    return 1 / (1 + amount) if damping.bias else jnp.ones_like(amount)


def _divide_bias(own: LayerRows, damping: Damping) -> Block:
    """M^-1 slope of a bias whose kernel is masked."""
    squares = _rows.mean_square(own.inputs)
    amount = damping.of(squares - jnp.square(_rows.mean(own.inputs)), squares)
    return _linalg.scale(own.slope, _inverse_of_bias(own.slope, amount, damping))


def _solve_average(statistics: Statistics, slope: Block, damping: Damping) -> Block:
    metric = _metric(statistics, slope, damping)
    solve = functools.partial(_linalg.solve, metric.kernel)
    return divide(slope, metric.mean, metric.bias, solve)


def _solve_batch(own: LayerRows, damping: Damping) -> Block:
    """With the current batch's statistics alone, by the smaller of two systems.

    What remains for the kernel is the second moment of the centred rows, and of a row more for what
    a damped bias leaves of the mean.
    """
    rows, d_in = own.inputs.shape
    by_rows = _linalg.solves_by_rows(rows, d_in, own.slope["kernel"].shape[1])
    if isinstance(own.inputs, Structured) and not (isinstance(own.inputs, Windows) and by_rows):
        return _solve_average(_statistics(own.inputs), own.slope, damping)
    x, e = _rows.write_out(own.inputs), own.cotangents
    mean = x.mean(0)
    if "bias" in own.slope:
        x = x - mean[None]
    amount = damping.of(jnp.square(x).mean(0), _rows.mean_square(own.inputs))
    bias = _inverse_of_bias(own.slope, amount, damping)
    if "bias" in own.slope and damping.bias:
        rest = jnp.sqrt(1 - bias)
        x = jnp.concatenate([x, rows**0.5 * rest * mean[None]])
        e = jnp.concatenate([e, rest / rows**0.5 * e.sum(0, keepdims=True)])
    weight = jnp.maximum(rows * amount, jnp.finfo(amount.dtype).tiny)
    return divide(own.slope, mean, bias, lambda right: rows * _linalg.ridge(x, right, e, weight))


# --- checks --------------------------------------------------------------------------------------


def _kernels(layers: Layers, params: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of each kernel among the parameters, by layer."""
    if not jax.tree.leaves(params):  # the stand-in of `optax.tree.map_params`
        return dict.fromkeys(layers, jax.ShapeDtypeStruct((1, 1), jnp.float32))
    return {
        name: jax.ShapeDtypeStruct(block["kernel"].shape, block["kernel"].dtype)
        for name, block in blocks(layers, params).items()
        if "kernel" in block
    }


def _check(layers: Any, damping: Any, amortisation: Amortisation, shared: str) -> None:
    check_layers(layers, "scale_by_foof")
    check_not_negative(damping=damping)
    amortisation.check()
    if shared not in ("expand", "reduce"):
        raise ValueError(f'`shared` is "expand" or "reduce", got {shared!r}.')
    tied = [layer.name for layer in layers.values() if layer.kind == "tied"]
    if shared == "reduce" and tied:
        raise ValueError(
            f'`shared="reduce"` averages the inputs of an example, but the weights of {tied[0]} '
            f'are used transposed as well: use `shared="expand"`.'
        )
