"""A diagonal FOOF, written as a new method is: one file, of the pieces that methods share."""

from __future__ import annotations

from typing import Any

import optax
from jax import numpy as jnp
from jaxtyping import Array, Float

from locoprop_jax import _linalg
from locoprop_jax._checks import check_layers, check_not_negative
from locoprop_jax._layers import rows
from locoprop_jax._layers.blocks import dtype_of
from locoprop_jax._layers.layers import Layers
from locoprop_jax._layers.method import Batch, kernel_shapes, transformation
from locoprop_jax._layers.rows import Block
from locoprop_jax._layers.stacking import map_layers, over_stack
from locoprop_jax._neurons.amortised import Amortisation, AmortisedState
from locoprop_jax._neurons.metric import average_gradients, descend, scale_by_metric_norm

Diagonal = Float[Array, " d_in"]


class DiagonalFoofState(AmortisedState):
    """State of `scale_by_diagonal_foof`: by layer the mean squares of its inputs, and inverses."""


def scale_by_diagonal_foof(
    layers: Layers,
    *,
    damping: float = 0.1,
    decay: float = 0.95,
    inverse_period: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """FOOF with the diagonal of X'X / N in its place: each input has a learning rate of its own.

    Args:
      layers: from `find_layers`.
      damping: in units of the mean square of the layer's inputs; not of the bias.
      decay: of the average of the diagonal.
      inverse_period: the steps from one inversion to the next.
    """
    check_layers(layers, "scale_by_diagonal_foof")
    check_not_negative(damping=damping)
    amortisation = Amortisation(decay, inverse_period, 1)
    amortisation.check()

    def init(params: Any) -> DiagonalFoofState:
        def zeros() -> dict[str, Diagonal]:
            kernels = kernel_shapes(layers, params)
            return {name: jnp.zeros(own.shape[:-1], own.dtype) for name, own in kernels.items()}

        return amortisation.init(DiagonalFoofState, zeros, zeros)

    def step(batch: Batch, state: DiagonalFoofState) -> tuple[Any, DiagonalFoofState]:
        slopes = batch.slopes
        inputs = {n: batch.captured[n].rows(dtype_of(slope)) for n, slope in slopes.items()}
        ok = batch.is_finite(inputs)

        def gather() -> dict[str, Diagonal]:
            names = [name for name in slopes if "kernel" in slopes[name]]
            return {n: over_stack(layers[n], rows.mean_square)(inputs[n]) for n in names}

        def invert(averages: dict[str, Diagonal]) -> dict[str, Diagonal]:
            def inverse(_: str, second: Diagonal) -> Diagonal:
                return _linalg.inverse(_linalg.damped(second, damping, relative=True))

            return map_layers(layers, inverse, averages)

        def divide(_: str, arrays: tuple[Block, Diagonal | None]) -> Block:
            slope, inverse = arrays
            if inverse is None:  # a bias alone, whose input is one
                return slope
            return {**slope, "kernel": _linalg.multiply(inverse, slope["kernel"])}

        state = amortisation.advance(state, ok, gather, invert)
        sources = {name: (slope, state.inverse.get(name)) for name, slope in slopes.items()}
        return batch.finish(map_layers(layers, divide, sources), state, ok)

    return transformation("scale_by_diagonal_foof", layers, init, step)


def diagonal_foof(
    layers: Layers,
    learning_rate: optax.ScalarOrSchedule = 1.0,
    *,
    damping: float = 0.1,
    inverse_period: int = 20,
    momentum: float = 0.9,
) -> optax.GradientTransformationExtraArgs:
    """The complete optimizer, with steps of a size that its own metric measures."""
    direction = scale_by_diagonal_foof(layers, damping=damping, inverse_period=inverse_period)
    return optax.chain(
        average_gradients(momentum),
        scale_by_metric_norm(direction),
        descend(learning_rate, 0.0),
    )
