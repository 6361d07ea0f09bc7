"""Gradient descent on neurons: FOOF, amortised over steps."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array

from locoprop_jax import _linalg
from locoprop_jax._checks import check_layers, check_not_negative
from locoprop_jax._layers.division import divide_layers
from locoprop_jax._layers.layers import Layers
from locoprop_jax._layers.method import Batch, kernel_shapes, transformation
from locoprop_jax._layers.stacking import map_layers
from locoprop_jax._neurons.amortised import (
    Amortisation,
    AmortisedState,
    is_too_large,
    keep_finite,
    row_limit,
)
from locoprop_jax._neurons.length import DAMPING, LEARNING_RATE, check_unit, scale_by_output_rms
from locoprop_jax._neurons.metric import average_gradients, descend, scale_by_metric_norm
from locoprop_jax._neurons.second_moment import (
    Damping,
    Metric,
    Statistics,
    apply,
    divide_bias,
    inverse,
    layer_rows,
    solve,
    statistics_of,
    zero_metric,
)


class FoofState(AmortisedState):
    """State of `scale_by_foof`.

    Attributes:
      count: finite batches so far. shape=(), dtype=int32
      refused: batches that were not finite, and updated nothing. shape=(), dtype=int32
      gathered: `count` after the last batch whose statistics were gathered. shape=(), dtype=int32
      failures: factorisations that did not succeed; their layers kept the inverse they had, or
        stood still. shape=(), dtype=int32
      statistics: `Statistics` by layer, their running sums. Empty for the current batch's alone.
      inverse: `Metric` by layer, with its inverse. Empty if every step solves its own.
    """

    def spectra(self) -> dict[str, Array]:
        """The eigenvalues of S, and of the inverse of what is left of it, damped, by layer."""
        return {
            f"{layer}/{name}": _linalg.eigenvalues(own[0], is_diagonal=own[0].ndim == own.mean.ndim)
            for name, kept in (("inputs", self.statistics), ("damped_inputs", self.inverse))
            for layer, own in kept.items()
        }


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
    max_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Gradient descent on neurons (FOOF; Benzing, eq. 6, Algorithm 1).

    A layer's gradient G becomes (S + lambda I)^-1 G, with S the average of X'X / N over the N rows
    of a batch and over batches: of all changes of the weights, the one that moves the layer's
    outputs most nearly along their cotangents. Parameters in no layer keep their gradient. Complex
    gradients are taken as JAX has them, and conjugated: what is returned is a direction in which
    the loss rises.

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
      max_size: of a layer with more inputs S is kept by its diagonal, less what the mean explains
        if it has a bias. 8192 if it is None. What solves the current batch alone (`decay=0`,
        `inverse_period=1`) keeps nothing, and is exact.

    Returns:
      A transformation whose `update` needs `captured`. A batch that is not finite leaves its state
      as it was, but for `refused`, and updates nothing.

    Raises:
      ValueError: at construction, for no layers, negative damping, a decay outside [0, 1), a
        period or a number of statistics steps below one, more of these than the period, an unknown
        `shared`; at `init`, for a layer with a real and a complex parameter; at update, for
        `captured` from another model.
      TypeError: at update, `captured` is missing.

    References:
      Benzing, `Gradient Descent on Neurons and its Link to Approximate Second-Order Optimization
      <https://arxiv.org/abs/2201.12250>`_, 2022: section 4, appendices D and K.
    """
    amortisation = Amortisation(decay, inverse_period, statistics_steps)
    _check(layers, damping, amortisation, shared)
    limit = row_limit(max_size)
    is_amortised = inverse_period > 1
    damped = Damping(damping, relative, damp_bias)

    def init(params: Any) -> FoofState:
        kernels = kernel_shapes(layers, params)

        def zeros(name: str) -> Metric:
            is_large = is_too_large(kernels[name].shape[-2], limit)
            return zero_metric(kernels[name], is_diagonal=layers[name].is_lookup or is_large)

        return amortisation.init(
            FoofState,
            lambda: {name: Statistics(*zeros(name)[:2]) for name in kernels},
            lambda: {name: zeros(name) for name in kernels} if is_amortised else {},
        )

    def step(batch: Batch, state: FoofState) -> tuple[Any, FoofState]:
        rows = {n: layer_rows(batch.captured[n], s, shared) for n, s in batch.slopes.items()}
        ok = batch.is_finite([] if is_amortised else [own.inputs for own in rows.values()])
        biases = {name: own for name, own in rows.items() if "kernel" not in own.slope}
        rows = {name: own for name, own in rows.items() if name not in biases}

        def gather() -> dict[str, Statistics]:
            inputs = {name: own.inputs for name, own in rows.items()}
            return map_layers(layers, lambda _, own: statistics_of(own, limit), inputs)

        def invert(averages: dict[str, Statistics]) -> dict[str, Metric]:
            sources = {name: (averages[name], rows[name].slope) for name in averages}
            return divide_layers(
                layers, lambda n, own: inverse(*own, damped.of_rows(rows[n].inputs)), sources
            )

        if is_amortised:
            state = amortisation.advance(state, ok, gather, invert, _second_moment)
            sources = {name: (own.slope, state.inverse[name]) for name, own in rows.items()}
            new = map_layers(layers, lambda _, own: apply(*own), sources)
        else:
            if amortisation.is_averaged:
                state = amortisation.advance(state, ok, gather, lambda averages: {}, _second_moment)
            averages = amortisation.averages(state)
            sources = {name: (own, averages.get(name)) for name, own in rows.items()}
            new = map_layers(layers, lambda _, own: solve(*own, damped), sources)
            new, failures = keep_finite(new, _linalg.zeros_like(new), state.failures)
            state = state._replace(failures=jnp.where(ok, failures, state.failures))
        alone = map_layers(layers, lambda _, own: divide_bias(own, damped), biases)
        return batch.finish(new | alone, state, ok)

    return transformation("scale_by_foof", layers, init, step, takes_complex=True)


def _second_moment(own: Statistics | Metric) -> Any:
    """Its diagonal, or its inverse's: where it is finite all else is."""
    return _linalg.diagonals(own[0])


def foof(
    layers: Layers,
    learning_rate: optax.ScalarOrSchedule = LEARNING_RATE,
    *,
    damping: float = DAMPING,
    relative: bool = True,
    damp_bias: bool = False,
    decay: float = 0.95,
    inverse_period: int = 20,
    statistics_steps: int = 1,
    shared: str = "expand",
    max_size: int | None = None,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    unit: str = "neuron",
    floor: float = 1e-4,
) -> optax.GradientTransformationExtraArgs:
    """FOOF with steps measured by how far they move each neuron, amortised.

    The gradient is averaged over steps, preconditioned (`scale_by_foof`), scaled so that each
    neuron's output moves by one (`scale_by_output_rms`) and multiplied by the learning rate. For
    plain FOOF chain `scale_by_foof`, `optax.trace` and `optax.scale_by_learning_rate`.

    Args:
      layers: from `find_layers`.
      learning_rate: the root-mean-square change of a pre-activation per step: so far does each
        neuron's output move on an average row, were the layer's input held fixed. A number, or
        better a schedule that falls, because no step is shorter than that. Why one default carries
        from network to network: `scale_by_output_rms`.
      damping: lambda, as for `scale_by_foof`.
      relative: whether it is in units of the inputs' mean variance.
      damp_bias: whether biases are damped as well.
      decay: of the average of S.
      inverse_period: T, the steps from one inversion to the next.
      statistics_steps: how many of them gather statistics.
      shared: "expand" or "reduce".
      max_size: of a layer with more inputs S is kept by its diagonal, as for `scale_by_foof`.
      momentum: decay of the average of the gradients.
      weight_decay: rho; parameters shrink by learning_rate * rho in each step, even in one whose
        batch is not finite.
      unit: what moves so far: "neuron" or "layer", as for `scale_by_output_rms`, or "joint" for
        all layers together, as for `scale_by_metric_norm`.
      floor: as for these.

    Returns:
      A complete optimizer. Its `update` needs `captured`, from `value_grad_and_capture`, and the
      parameters if there is weight decay.

    Raises:
      ValueError, TypeError: as `scale_by_foof`, `scale_by_output_rms` and `scale_by_metric_norm`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, locoprop_jax as lp
      >>> def loss_fn(params, x, y):
      ...     hidden = jnp.tanh(x @ params["in"])
      ...     return jnp.mean((hidden @ params["out"] - y) ** 2)
      >>> params = {"in": jnp.cos(jnp.arange(12.0).reshape(3, 4)), "out": jnp.ones((4, 1))}
      >>> x = jnp.sin(jnp.arange(15.0).reshape(5, 3))
      >>> y = x[:, :1] * x[:, 1:2]
      >>> tx = lp.foof(lp.find_layers(loss_fn, params, x, y))
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     loss, grads, captured = lp.value_grad_and_capture(loss_fn)(params, x, y)
      ...     updates, state = tx.update(grads, state, params, captured=captured)
      ...     return optax.apply_updates(params, updates), state, loss
      >>> losses = []
      >>> for _ in range(5):
      ...     params, state, loss = step(params, state)
      ...     losses.append(f"{loss:.3f}")
      >>> print(*losses)
      0.665 0.571 0.484 0.405 0.334
    """
    check_unit(unit)
    direction = scale_by_foof(
        layers,
        damping=damping,
        relative=relative,
        damp_bias=damp_bias,
        decay=decay,
        inverse_period=inverse_period,
        statistics_steps=statistics_steps,
        shared=shared,
        max_size=max_size,
    )
    if unit == "joint":
        steps = scale_by_metric_norm(direction, floor=floor)
    else:
        steps = scale_by_output_rms(layers, direction, unit=unit, floor=floor)
    return optax.chain(
        average_gradients(momentum),
        steps,
        descend(learning_rate, weight_decay),
    )


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
