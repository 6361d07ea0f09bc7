"""K-FAC: the Fisher or Gauss-Newton matrix of each layer as a Kronecker product."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from locoprop_jax import _layers, _linalg
from locoprop_jax._amortised import Amortisation, AmortisedState
from locoprop_jax._blocks import (
    Block,
    as_rows,
    blocks,
    curvature_rows,
    dtype_of,
    extend,
    matrix,
    matrix_sizes,
    replace,
    unmatrix,
)
from locoprop_jax._checks import check_fisher, check_layers
from locoprop_jax._layers import Captured, Layers
from locoprop_jax._stacking import map_layers


class Factors(NamedTuple):
    """Of a layer whose block W is a matrix (d, d_out), its bias the last row.

    Attributes:
      inputs: S = X'X / N, X with its column of ones.
      outputs: Gamma = C'C, summed over samples and rows.
    """

    inputs: Float[Array, "d d"]
    outputs: Float[Array, "d_out d_out"]


class EigenFactors(NamedTuple):
    """The eigenvectors of both factors, and the damped inverse in their basis.

    Attributes:
      bases: of the inputs' and the outputs' factor, in columns.
      scale: 1 / (a_i b_j + damping) for the eigenvalues a and b.
    """

    bases: Factors
    scale: Float[Array, "d d_out"]


class KfacState(AmortisedState):
    """State of `scale_by_kfac`.

    Attributes:
      count: finite batches so far. shape=(), dtype=int32
      gathered: `count` after the last batch whose factors were gathered. shape=(), dtype=int32
      failures: factorisations that did not succeed; their layers kept the inverse they had.
        shape=(), dtype=int32
      statistics: `Factors` by layer, their running sums. Empty for the current batch's alone.
      inverse: by layer, the inverses of the damped `Factors`, or `EigenFactors`.
    """


def scale_by_kfac(
    layers: Layers,
    *,
    damping: float = 1.0,
    relative: bool = True,
    exact_damping: bool = False,
    curvature: str = "captured",
    decay: float = 0.95,
    inverse_period: int = 1,
    statistics_steps: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """K-FAC: (S (x) Gamma + k I)^-1 G for each layer (Benzing, section 3; practical GN, eq. 18).

    S is the second moment of a layer's inputs, its column of ones included, and Gamma that of
    curvature cotangents, so that S (x) Gamma approximates the layer's block of the Fisher or
    Gauss-Newton matrix of the loss as written. Which matrix is said by what was captured: labels
    sampled from the model ("fisher_mc"), noise ("ggn_mc") or all columns ("ggn_exact", which makes
    this KFLR, practical GN, section 3.4). Parameters in no layer keep their gradient.

    Damping is factored as Martens and Grosse have it: (S + sqrt(k) pi)^-1 G (Gamma +
    sqrt(k) / pi)^-1, with pi^2 the ratio of the factors' mean eigenvalues; or exact (Benzing calls
    it correct), which takes two eigendecompositions at each inversion. Weights that an example uses
    at several positions have each taken for a row.

    For steps that its metric measures chain `scale_by_metric_norm(scale_by_kfac(...))` and
    `optax.scale_by_learning_rate`; their squared length is in units of the loss.

    Args:
      layers: from `find_layers`.
      damping: k, in units of the mean eigenvalue of S (x) Gamma, or absolute.
      relative: which of the two. Relative, a layer's direction does not depend on the size of the
        loss, but for its inverse.
      exact_damping: whether k is added in the eigenvectors of both factors.
      curvature: "captured" takes the cotangents of `value_grad_and_capture(..., curvature=...)`,
        "empirical" those of the loss itself, which makes the empirical Fisher.
      decay: how much of the averages of S and Gamma is left after a step; 0 for the current batch
        alone.
      inverse_period: the steps from one inversion to the next; with more inversions at first (after
        0, 1, 2, 4, 8... steps).
      statistics_steps: how many steps up to each inversion gather statistics, its own included.

    Returns:
      A transformation whose `update` needs `captured`. A batch that is not finite leaves its state
      as it was, and updates nothing.

    Raises:
      ValueError: at construction, for no layers, negative damping, a decay outside [0, 1), a
        period or a number of statistics steps below one, more of these than the period, an unknown
        `curvature`; at update, for `captured` from another model or without curvature.
      TypeError: at update, `captured` is missing.

    References:
      J. Martens, R. Grosse, `Optimizing Neural Networks with Kronecker-factored Approximate
      Curvature <https://arxiv.org/abs/1503.05671>`_, 2015; Benzing, sections 3 and 4, appendix B;
      Botev et al., `Practical Gauss-Newton Optimisation for Deep Learning
      <https://arxiv.org/abs/1706.03662>`_, 2017: sections 3.4 and B.
    """
    amortisation = Amortisation(decay, inverse_period, statistics_steps)
    check_layers(layers, "scale_by_kfac")
    check_fisher("scale_by_kfac", damping, curvature)
    amortisation.check()

    def init(params: Any) -> KfacState:
        statistics, inverse = {}, {}
        for name, (d, d_out, dtype) in matrix_sizes(layers, params).items():

            def factors(d: int = d, d_out: int = d_out, dtype: Any = dtype) -> Factors:
                return Factors(jnp.zeros((d, d), dtype), jnp.zeros((d_out, d_out), dtype))

            if amortisation.is_averaged:
                statistics[name] = factors()
            if exact_damping:
                inverse[name] = EigenFactors(factors(), jnp.zeros((d, d_out), dtype))
            else:
                inverse[name] = factors()

        def zero() -> Array:  # one for each: a buffer cannot be donated twice
            return jnp.zeros([], jnp.int32)

        return KfacState(zero(), zero(), zero(), statistics, inverse)

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        captured: Captured | None = None,
        **extra_args: Any,
    ) -> tuple[Any, KfacState]:
        del params, extra_args
        captured = _layers.check_captured(layers, captured, "scale_by_kfac")
        slopes = blocks(layers, updates)
        rows = {}
        for name, slope in slopes.items():
            dtype = dtype_of(slope)
            inputs = as_rows(captured[name].inputs, dtype)
            rows[name] = inputs, curvature_rows(captured, name, curvature, dtype)
        ok = _linalg.all_finite((updates, rows))

        def gather() -> dict[str, Factors]:
            return {name: _factors(x, c, slopes[name]) for name, (x, c) in rows.items()}

        def invert(averages: dict[str, Factors]) -> dict[str, Any]:
            def one(_: str, factors: Factors) -> Any:
                return (_eigen if exact_damping else _inverses)(factors, damping, relative)

            return map_layers(one, averages)

        def apply(_: str, arrays: tuple[Block, Any]) -> Block:
            slope, inverse = arrays
            return unmatrix(_divide(matrix(slope), inverse), slope)

        state = amortisation.advance(state, ok, gather, invert)
        new = map_layers(apply, {name: (slopes[name], state.inverse[name]) for name in slopes})
        directions = replace(layers, updates, new)
        state = state._replace(count=state.count + ok.astype(jnp.int32))
        return _linalg.where(ok, directions, _linalg.zeros_like(directions)), state

    return optax.GradientTransformationExtraArgs(init, update)


# --- one layer -----------------------------------------------------------------------------------


def _factors(
    inputs: Float[Array, "rows d_in"], curvature: Float[Array, "samples_rows d_out"], like: Block
) -> Factors:
    x = extend(inputs, like)
    return Factors(_linalg.second_moment(x) / len(x), _linalg.second_moment(curvature))


def _mean_eigenvalues(factors: Factors) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """One for a factor of zeros: a gradient that never met data is not made long."""
    means = (jnp.diagonal(factor).mean() for factor in factors)
    inputs, outputs = (jnp.where(mean > 0, mean, 1) for mean in means)
    return inputs, outputs


def _amount(factors: Factors, damping: Any, relative: bool) -> Float[Array, ""]:
    inputs, outputs = _mean_eigenvalues(factors)
    amount = jnp.asarray(damping, inputs.dtype)
    return amount * inputs * outputs if relative else amount


def _inverses(factors: Factors, damping: Any, relative: bool) -> Factors:
    """Of both factors, with factored damping."""
    inputs, outputs = _mean_eigenvalues(factors)
    pi, root = jnp.sqrt(inputs / outputs), jnp.sqrt(_amount(factors, damping, relative))
    return Factors(
        _linalg.inverse(_linalg.damped(factors.inputs, root * pi)),
        _linalg.inverse(_linalg.damped(factors.outputs, root / pi)),
    )


def _eigen(factors: Factors, damping: Any, relative: bool) -> EigenFactors:
    values, bases = zip(*(jnp.linalg.eigh((f + f.T) / 2) for f in factors), strict=True)
    inputs, outputs = (jnp.maximum(value, 0) for value in values)
    products = inputs[:, None] * outputs[None] + _amount(factors, damping, relative)
    tiny = jnp.finfo(products.dtype).tiny
    return EigenFactors(Factors(*bases), 1 / jnp.maximum(products, tiny))


def _divide(gradient: Float[Array, "d d_out"], by: Factors | EigenFactors) -> Array:
    if isinstance(by, Factors):
        return by.inputs @ gradient @ by.outputs
    left, right = by.bases
    return left @ (by.scale * (left.T @ gradient @ right)) @ right.T
