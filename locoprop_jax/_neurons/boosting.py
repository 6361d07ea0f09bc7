"""Linear Neuron Boosting: conjugate gradient on each layer's own metric, matrix-free."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from locoprop_jax import _linalg
from locoprop_jax._checks import (
    check_decay,
    check_layers,
    check_not_negative,
    check_positive,
    check_whole,
    is_number,
)
from locoprop_jax._layers import rows as _rows
from locoprop_jax._layers.arrays import LayerArrays
from locoprop_jax._layers.blocks import dtype_of, others
from locoprop_jax._layers.layers import Layers
from locoprop_jax._layers.method import (
    Batch,
    blocks_like,
    counted,
    kernel_shapes,
    transformation,
    zero_count,
)
from locoprop_jax._layers.rows import Block, Inputs
from locoprop_jax._layers.stacking import map_layers, over_stack
from locoprop_jax._neurons.layer_system import LayerSystem, Moments, solve_layer
from locoprop_jax._neurons.length import DAMPING, LEARNING_RATE, check_unit, unit_steps
from locoprop_jax._neurons.metric import average_gradients, descend, metric_factor, scaled
from locoprop_jax._trees import real_dtype


class LnbState(NamedTuple):
    """State of `scale_by_lnb`.

    Attributes:
      count: finite batches so far. shape=(), dtype=int32
      refused: batches that were not finite, and updated nothing. shape=(), dtype=int32
      moments: by layer; empty for batch boosting, and for a layer whose kernel is masked.
      solution: theta by layer, laid out like the layer's block; empty for batch boosting.
    """

    count: Int[Array, ""]
    refused: Int[Array, ""]
    moments: dict[str, Moments]
    solution: dict[str, Block]

    def diagnostics(self) -> dict[str, Array]:
        """The counters."""
        return {"count": self.count, "refused": self.refused}


def scale_by_lnb(
    layers: Layers,
    *,
    ridge: float = 10.0,
    relative: bool = True,
    iterations: int = 2,
    online: bool = True,
    moment_decay: float = 0.99,
    shrinkage: float = 0.0,
    fraction: float = 1.0,
    unit: str = "joint",
    floor: float = 1e-4,
) -> optax.GradientTransformationExtraArgs:
    """Linear Neuron Boosting: theta / sqrt(z), with M theta = g solved layer by layer (LNB).

    M v = J'(J v) / N + ridge v, with J v what the layer's linear function makes of v at the batch's
    N rows: never formed where that costs more (section 3.2). Conjugate gradient goes on from the
    last batch's theta, preconditioned by the incomplete Cholesky factor of M (section 3.3, 3.5).
    The paper has one length for all parameters: z = sum theta' M theta, which is theta . g where
    theta solves its system, and unlike that never negative. Parameters in no layer have M = I.
    With `unit="neuron"` each neuron has a length of its own, as `scale_by_output_rms` describes.
    Complex gradients are taken as JAX has them, and conjugated: what is returned is a direction in
    which the loss rises.

    Three departures from the paper's text: each output of a layer has conjugate gradient steps of
    its own, at no cost; they start from the best multiple of the last theta, so that theta always
    descends; and z is taken from the residual.

    Args:
      layers: from `find_layers`.
      ridge: added to the diagonal of M, except for biases, in units of the mean variance of the
        layer's inputs (the mean square without a bias), or absolute as in the paper.
      relative: which of the two. Relative, the update does not change when inputs are scaled. In
        float32 an input whose mean is a thousand times its deviation counts as constant.
      iterations: of conjugate gradient.
      online: whether moments and solutions are carried from batch to batch (Algorithm 2), or each
        batch is solved from zero (Algorithm 1: take as many iterations as that needs).
      moment_decay: of the average input and the average squared input, both debiased.
      shrinkage: how far the variances in the preconditioner are moved to their mean.
      fraction: of the batch's examples whose rows make the metric; the first ones.
      unit: what has length one: "joint" for all parameters together, as in the paper; "neuron" or
        "layer" for each on its own.
      floor: of "joint", z below which steps shrink with the gradient: the paper's minimum norm z0;
        of the others, a share of the layer's mean, as for `scale_by_output_rms`.

    Returns:
      A transformation whose `update` needs `captured`; follow it by a learning rate, the paper's
      sqrt(eps).
      A batch that is not finite leaves its state as it was, but for `refused`, and updates nothing.

    Raises:
      ValueError: at construction, for no layers, a negative ridge, iterations below one, a decay
        outside [0, 1), a shrinkage outside [0, 1], a fraction outside (0, 1], an unknown unit or a
        floor that is not positive; at `init`, for a layer with a real and a complex parameter; at
        update, for `captured` from another model.
      TypeError: at update, `captured` is missing.

    References:
      Linear Neuron Boosting: eqs. 10 to 12, Algorithms 1 and 2.
    """
    _check(layers, ridge, iterations, moment_decay, shrinkage, fraction, floor)
    check_unit(unit)
    solve = functools.partial(
        solve_layer, ridge=ridge, relative=relative, iterations=iterations, shrinkage=shrinkage
    )

    def init(params: Any) -> LnbState:
        if not online:
            return LnbState(zero_count(), zero_count(), {}, {})
        moments = {
            name: _zero_moments(kernel, is_lookup=layers[name].is_lookup)
            for name, kernel in kernel_shapes(layers, params).items()
        }
        solution = _linalg.zeros_like(blocks_like(layers, params))
        return LnbState(zero_count(), zero_count(), moments, solution)

    def step(batch: Batch, state: LnbState) -> tuple[Any, LnbState]:
        slopes = batch.slopes
        inputs = {name: _rows_of(batch.captured[name], slopes[name], fraction) for name in slopes}

        def boost() -> tuple[Any, LnbState]:
            sums = {
                name: over_stack(layers[name], _moments)(inputs[name])
                for name in slopes
                if "kernel" in slopes[name]
            }
            moments = sums
            if online:
                sums = _linalg.average(state.moments, moments, moment_decay)
                moments = _linalg.debiased(sums, moment_decay, state.count + 1)
            systems = {
                name: LayerSystem(
                    inputs[name], slopes[name], moments.get(name), state.solution.get(name)
                )
                for name in slopes
            }
            solved = map_layers(layers, lambda _, system: solve(system), systems)
            thetas = {name: theta for name, (theta, _) in solved.items()}
            images = {name: image for name, (_, image) in solved.items()}
            if unit == "joint":
                direction = _of_length_one(batch, thetas, images, floor)
            else:
                points = batch.captured.points
                direction = unit_steps(layers, batch.updates, thetas, images, unit, floor, points)
            return direction, state._replace(moments=sums, solution=thetas) if online else state

        ok = batch.is_finite(inputs)
        nothing = lambda: (_linalg.zeros_like(batch.updates), state)  # noqa: E731
        direction, state = jax.lax.cond(ok, boost, nothing)
        return direction, counted(state, ok)

    return transformation("scale_by_lnb", layers, init, step, takes_complex=True)


def lnb(
    layers: Layers,
    learning_rate: optax.ScalarOrSchedule = LEARNING_RATE,
    *,
    ridge: float = DAMPING,
    relative: bool = True,
    iterations: int = 2,
    online: bool = True,
    momentum: float = 0.9,
    moment_decay: float = 0.99,
    shrinkage: float = 0.0,
    fraction: float = 1.0,
    weight_decay: float = 0.0,
    unit: str = "neuron",
    floor: float = 1e-4,
) -> optax.GradientTransformationExtraArgs:
    """Linear Neuron Boosting, complete (LNB, Algorithms 1 and 2).

    Args:
      layers: from `find_layers`.
      learning_rate: the root-mean-square change of a pre-activation per step: so far does each
        neuron's output move on an average row of the batch, were the layer's input held fixed. A
        number, or better a schedule that falls, because no step is shorter than that. Why one
        default carries from network to network: `scale_by_output_rms`.
      ridge: as for `scale_by_lnb`.
      relative: whether it is in units of the mean variance.
      iterations: of conjugate gradient.
      online: Algorithm 2; if not, Algorithm 1.
      momentum: decay of the average of the gradients.
      moment_decay: of the moments that precondition.
      shrinkage: of their variances.
      fraction: of the batch's examples whose rows make the metric.
      weight_decay: rho; all parameters shrink by learning_rate * rho in each step, even in one
        whose batch is not finite.
      unit: "neuron", "layer" or "joint". The paper's step of size eps is
        `lnb(layers, eps**0.5, unit="joint", ridge=10.0)`: one length for all layers together, the
        square of the learning rate.
      floor: as for `scale_by_lnb`.

    Returns:
      A complete optimizer. Its `update` needs `captured`, from `value_grad_and_capture`, and the
      parameters if there is weight decay.

    Raises:
      ValueError, TypeError: as `scale_by_lnb`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, locoprop_jax as lp
      >>> def loss_fn(params, x, y):
      ...     hidden = jnp.tanh(x @ params["in"])
      ...     return jnp.mean((hidden @ params["out"] - y) ** 2)
      >>> params = {"in": jnp.cos(jnp.arange(12.0).reshape(3, 4)), "out": jnp.ones((4, 1))}
      >>> x = jnp.sin(jnp.arange(15.0).reshape(5, 3))
      >>> y = x[:, :1] * x[:, 1:2]
      >>> tx = lp.lnb(lp.find_layers(loss_fn, params, x, y))
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
    boosted = scale_by_lnb(
        layers,
        ridge=ridge,
        relative=relative,
        iterations=iterations,
        online=online,
        moment_decay=moment_decay,
        shrinkage=shrinkage,
        fraction=fraction,
        unit=unit,
        floor=floor,
    )
    return optax.chain(
        average_gradients(momentum),
        boosted,
        descend(learning_rate, weight_decay),
    )


def _of_length_one(
    batch: Batch, thetas: dict[str, Block], images: dict[str, Block], floor: Any
) -> Any:
    """The updates made of thetas with images M theta, and of all else, where M = I."""
    rest = _linalg.wide(others(batch.layers, batch.updates))
    factor = metric_factor(_linalg.dot_for_many((rest, thetas), (rest, images)), floor)
    steps = jax.tree.map(lambda theta: scaled(theta, factor), thetas)
    return batch.replaced(steps, lambda g: scaled(g, factor))


# --- moments -------------------------------------------------------------------------------------


def _rows_of(arrays: LayerArrays, slope: Block, fraction: float) -> Inputs:
    """Of one layer or of a stack."""
    examples = arrays.outputs.shape[-3]
    return arrays.rows(dtype_of(slope), max(1, round(fraction * examples)))


def _zero_moments(kernel: jax.ShapeDtypeStruct, *, is_lookup: bool) -> Moments:
    shape, real = kernel.shape[:-1], real_dtype(kernel.dtype)
    return Moments(jnp.zeros(shape, real if is_lookup else kernel.dtype), jnp.zeros(shape, real))


def _moments(inputs: Inputs) -> Moments:
    return Moments(_rows.mean(inputs), _rows.mean_square(inputs))


# --- checks --------------------------------------------------------------------------------------


def _check(
    layers: Any,
    ridge: Any,
    iterations: Any,
    moment_decay: Any,
    shrinkage: Any,
    fraction: Any,
    floor: Any,
) -> None:
    check_layers(layers, "scale_by_lnb")
    check_not_negative(ridge=ridge)
    check_whole(iterations=iterations)
    check_decay(moment_decay=moment_decay)
    check_positive(floor=floor)
    if is_number(shrinkage) and not 0 <= shrinkage <= 1:
        raise ValueError(f"`shrinkage` must be from 0 to 1, got {shrinkage}.")
    if not is_number(fraction) or not 0 < fraction <= 1:
        raise ValueError(f"`fraction` must be above 0 and at most 1, got {fraction}.")
