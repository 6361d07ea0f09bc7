"""Regularizers: what keeps a layer's new weights near the old ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from locoprop_jax import _linalg
from locoprop_jax._checks import check_fisher, is_number
from locoprop_jax._layers import rows
from locoprop_jax._layers.blocks import matrix, unmatrix
from locoprop_jax._layers.rows import Block, Inputs, Rows

# A weight of 1 / learning_rate is infinite where a schedule starts at 0; there this stands in.
SMALLEST_RATE = 1e-12


class Penalty(NamedTuple):
    """A regularizer at work in one layer: zero, with gradient zero, at delta = 0.

    Attributes:
      gradient: its gradient at a displacement.
      solve: the inverse of `gradient`, where that is a positive definite linear map.
      weight: lambda_r, where the regularizer is lambda_r / 2 |delta|^2.
      shrink: the proximal step of size eta, `shrink(delta, eta)`, which stands in for a gradient.
      factors: (weight, A, B) where the gradient is weight A delta B, on blocks as matrices.
    """

    gradient: Callable[[Block], Block] | None = None
    solve: Callable[[Block], Block] | None = None
    weight: Array | None = None
    shrink: Callable[[Block, Array], Block] | None = None
    factors: tuple[Array, Array, Array] | None = None

    def add_gradient(self, total: Any, delta: Any) -> Any:
        """The total with this regularizer's gradient at a displacement, if it has one."""
        if self.weight is not None:
            return _linalg.add(total, _linalg.scale(delta, self.weight))
        if self.gradient is not None:
            return _linalg.add(total, self.gradient(delta))
        return total


class Layerwise(NamedTuple):
    """What a regularizer may read of a layer: inputs, curvature rows, a block, and eta."""

    inputs: Inputs
    curvature: Rows | None
    block: Block
    learning_rate: Float[Array, ""]


class Regularizer(NamedTuple):
    """A regularizer R(W~, W) of the local loss.

    Attributes:
      name: "l2", "l1", "mahalanobis" or your own.
      penalty: what it is for one layer and batch.
      is_quadratic: whether its penalty has a gradient and `solve`, its inverse.
      curvature: as a target's: "empirical", "captured" or None.
    """

    name: str
    penalty: Callable[[Layerwise], Penalty]
    is_quadratic: bool = False
    curvature: str | None = None


def _weight(weight: Any, layer: Layerwise) -> Array:
    if weight is None:
        return 1 / jnp.maximum(layer.learning_rate, SMALLEST_RATE)
    return jnp.asarray(weight, layer.learning_rate.dtype)


def _check_weight(name: str, weight: Any) -> None:
    if is_number(weight) and weight < 0:
        raise ValueError(f"`{name}` takes a weight that is not negative, got {weight}.")


def l2(weight: float | Array | None = None) -> Regularizer:
    """weight/2 |W~ - W|^2 (LocoProp, eq. 3).

    Args:
      weight: lambda_r; None for the paper's 1/eta, with eta the learning rate at this batch (not
        the decaying one of the local iterations). The paper's Algorithms 1 and 2 as printed leave
        the term out; with it the review's Algorithm 2 ("fixed") results.

    Raises:
      ValueError: the weight is negative.
    """
    _check_weight("l2", weight)

    def penalty(layer: Layerwise) -> Penalty:
        by = _weight(weight, layer)
        return Penalty(
            gradient=lambda delta: _linalg.scale(delta, by),
            solve=lambda slope: _linalg.scale(slope, 1 / by),
            weight=by,
        )

    return Regularizer("l2", penalty, is_quadratic=True)


def l1(weight: float | Array) -> Regularizer:
    """Weight |W~ - W|_1, for updates with few entries (LocoProp, appendix E.3).

    Each plain gradient step is followed by a soft threshold: proximal gradient descent, so it goes
    with `inner(optax.sgd, iterations)`.

    Raises:
      ValueError: the weight is negative.
    """
    _check_weight("l1", weight)

    def penalty(layer: Layerwise) -> Penalty:
        del layer

        def shrink(delta: Block, eta: Array) -> Block:
            def soft(d: Array) -> Array:
                threshold = eta * jnp.asarray(weight, d.dtype)
                return jnp.sign(d) * jnp.maximum(jnp.abs(d) - threshold, 0)

            return jax.tree.map(soft, delta)

        return Penalty(shrink=shrink)

    return Regularizer("l1", penalty)


def mahalanobis(
    weight: float | Array | None = None,
    *,
    damping: float = 1e-2,
    relative: bool = True,
    curvature: str = "empirical",
) -> Regularizer:
    """weight/2 (w~ - w)' F (w~ - w) in the metric of the layer's Fisher matrix (appendix E.3).

    F is taken as the product of the second moments of inputs (mean over rows) and of curvature
    cotangents (sum over rows), as K-FAC does, each damped. One fixed-point iteration is then a
    natural gradient step, -eta gamma F^-1 G at weight 1/eta.

    Args:
      weight: None for 1/eta.
      damping: added to the diagonal of both factors.
      relative: whether in units of their mean eigenvalues.
      curvature: "empirical" or "captured", as in `natural`.

    Raises:
      ValueError: a negative weight or damping, or an unknown source of curvature.
    """
    _check_weight("mahalanobis", weight)
    check_fisher("mahalanobis", damping, curvature)

    def penalty(layer: Layerwise) -> Penalty:
        by = _weight(weight, layer)
        assert layer.curvature is not None
        of_inputs = rows.extended_moment(layer.inputs, layer.block) / rows.count(layer.inputs)
        moments = of_inputs, _linalg.second_moment(layer.curvature)
        left, right = (_linalg.damped(m, damping, relative=relative) for m in moments)

        def gradient(delta: Block) -> Block:
            return unmatrix(by * (left @ matrix(delta) @ right), delta)

        def solve(slope: Block) -> Block:
            half = _linalg.solve(left, matrix(slope))
            return unmatrix(_linalg.solve(right, half.T).T / by, slope)

        return Penalty(gradient=gradient, solve=solve, factors=(by, left, right))

    return Regularizer("mahalanobis", penalty, is_quadratic=True, curvature=curvature)


def penalty_of(regularizer: Regularizer | None, layer: Layerwise) -> Penalty:
    """A layer's penalty; without a regularizer the empty one."""
    return Penalty() if regularizer is None else regularizer.penalty(layer)
