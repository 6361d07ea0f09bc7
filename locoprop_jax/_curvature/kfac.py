"""K-FAC: the Fisher or Gauss-Newton matrix of each layer as a Kronecker product."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import optax
from jax.lax import Precision
from jaxtyping import Array, Float

from locoprop_jax import _linalg
from locoprop_jax._checks import check_fisher, check_layers
from locoprop_jax._curvature.complete import Steps, complete
from locoprop_jax._curvature.kronecker import Damping, scale_by_kronecker
from locoprop_jax._curvature.shared_weights import has_trace_ratio, trace_ratio
from locoprop_jax._layers import rows
from locoprop_jax._layers.blocks import curvature_of, dtype_of
from locoprop_jax._layers.captured import Captured
from locoprop_jax._layers.layers import Layers
from locoprop_jax._layers.rows import Block
from locoprop_jax._layers.stacking import over_stack
from locoprop_jax._neurons.amortised import Amortisation, is_too_large, row_limit


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
    output_factor: str = "keep",
    match_trace: bool = False,
    max_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """K-FAC: (S (x) Gamma + k I)^-1 G for each layer (Benzing, section 3; practical GN, eq. 20).

    S is the second moment of a layer's inputs, its column of ones included, and Gamma that of
    curvature cotangents, so that S (x) Gamma approximates the layer's block of the Fisher or
    Gauss-Newton matrix of the loss as written. Which matrix is said by what was captured: labels
    sampled from the model ("fisher_mc"), noise ("ggn_mc") or all columns ("ggn_exact", which makes
    this KFLR, practical GN, section 3.4). Parameters in no layer keep their gradient.

    Damping is factored as Martens and Grosse have it: (S + sqrt(k) pi)^-1 G (Gamma +
    sqrt(k) / pi)^-1, with pi^2 the ratio of the factors' mean eigenvalues; or exact (Benzing calls
    it correct), which takes two eigendecompositions at each inversion. Weights that an example uses
    at several positions have each taken for a row.

    Without its second factor and with the same damping of the first this is a FOOF whose damping is
    K-FAC's (Benzing, D.8): `output_factor="constant"` puts a number in its place, sqrt(k) / pi,
    its damping (his Figure 3), "norm" gives each layer's step the length that K-FAC's own has (his
    Figure 4C).

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
      output_factor: "keep" for K-FAC, "constant" or "norm" for FOOF with its damping, which is
        factored.
      match_trace: whether the product S (x) Gamma of a dense layer that an example uses at several
        positions (the tokens of a transformer, the steps of a recurrent network) is scaled to have
        the trace of the exact block. K-FAC takes positions for independent, which underestimates
        the curvature of recurrent weights many times over.
      max_size: factors of more rows (the vocabulary of a language model, say) are kept by their
        diagonals, and so are their inverses. 8192 if it is None.

    Returns:
      A transformation whose `update` needs `captured`. A batch whose gradient is not finite leaves
      its state as it was, but for `refused`, and updates nothing; statistics that overflow are not
      gathered.

    Raises:
      ValueError: at construction, for no layers, negative damping, a decay outside [0, 1), a
        period or a number of statistics steps below one, more of these than the period, an unknown
        `curvature` or `output_factor`, exact damping of a factor that is left out; at update, for
        `captured` from another model or without curvature.
      TypeError: at update, `captured` is missing.

    References:
      J. Martens, R. Grosse, `Optimizing Neural Networks with Kronecker-factored Approximate
      Curvature <https://arxiv.org/abs/1503.05671>`_, 2015; Benzing, sections 3 and 4, appendix B;
      Botev et al., `Practical Gauss-Newton Optimisation for Deep Learning
      <https://arxiv.org/abs/1706.03662>`_, 2017: sections 3.4 and B.
    """
    return _direction(
        layers,
        curvature,
        Damping(damping, relative, exact_damping, output_factor),
        Amortisation(decay, inverse_period, statistics_steps),
        match_trace,
        max_size,
    )


def _direction(
    layers: Layers,
    curvature: str,
    damping: Damping,
    amortisation: Amortisation,
    match_trace: bool,
    max_size: int | None,
) -> optax.GradientTransformationExtraArgs:
    check_layers(layers, "scale_by_kfac")
    check_fisher("scale_by_kfac", damping.amount, curvature)
    limit = row_limit(max_size)

    def output_factors(
        captured: Captured, params: Any, slopes: dict[str, Block]
    ) -> dict[str, Array]:
        del params
        captured = captured.pulled()

        def factor(name: str, slope: Block) -> Array:
            layer, arrays, dtype = layers[name], captured[name], dtype_of(slope)
            columns = curvature_of(captured, name, curvature, dtype)
            is_large = is_too_large(columns.shape[-1], limit)
            of_columns = _sum_of_squares if is_large else _second_moment
            moment = over_stack(layer, of_columns)(columns)
            if match_trace and has_trace_ratio(layer, arrays, slope):
                inputs = arrays.inputs.astype(dtype)
                count = rows.count(arrays.rows(dtype))
                of_layer = functools.partial(trace_ratio, count=count)
                ratio = over_stack(layer, of_layer)(inputs, columns, slope)
                moment = over_stack(layer, _linalg.scale)(moment, ratio)
            return moment

        return {name: factor(name, slope) for name, slope in slopes.items()}

    return scale_by_kronecker("scale_by_kfac", layers, output_factors, damping, amortisation, limit)


# Columns are not joined to rows here: of examples on several devices, which lie behind the samples,
# all would be gathered for that.


def _second_moment(columns: Float[Array, "samples batch shared d"]) -> Float[Array, "d d"]:
    return jnp.einsum("sbpi,sbpj->ij", columns, columns, precision=Precision.HIGHEST)


def _sum_of_squares(columns: Float[Array, "samples batch shared d"]) -> Float[Array, " d"]:
    return _linalg.squares(columns).sum((0, 1, 2))


def kfac(
    layers: Layers,
    learning_rate: optax.ScalarOrSchedule = 1.0,
    *,
    damping: float = 0.3,
    step_damping: float = 0.1,
    adapt_damping: bool = False,
    exact_damping: bool = False,
    curvature: str = "captured",
    decay: float = 0.95,
    inverse_period: int = 20,
    statistics_steps: int = 1,
    momentum: bool = True,
    model_period: int = 5,
    match_trace: bool = True,
    max_size: int | None = None,
    l2: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """K-FAC with steps and damping from the Gauss-Newton model: nothing to tune.

    The direction of `scale_by_kfac`, amortised, with the step of `scale_by_gauss_newton_step`
    (Martens and Grosse; practical GN, appendices B and G). Without momentum, evaluate the
    average of the parameters: `optax.chain(kfac(layers, momentum=False), average_iterates())`.

    Args:
      layers: from `find_layers`.
      learning_rate: multiplies the step of the model; best left at one.
      damping: the first gamma, in units of each layer's mean eigenvalue of S (x) Gamma.
      step_damping: the first tau, in units of the curvature along the first direction.
      adapt_damping: whether gamma is adapted too: every 20 steps the best of three, which costs
        three more inversions. The step makes up for much of what gamma does.
      exact_damping: whether gamma is added in the eigenvectors of both factors.
      curvature: "captured" or "empirical", as for `scale_by_kfac`.
      decay: of the averages of S and Gamma.
      inverse_period: the steps from one inversion to the next; of 20 it should be a divisor or a
        multiple, because where nothing is inverted gamma has no effect.
      statistics_steps: how many steps up to each inversion gather statistics.
      momentum: whether the step is the best one along the direction and the last update.
      model_period: the steps from one measurement of the model's curvature to the next, where
        batches are noisy, as for `scale_by_gauss_newton_step`.
      match_trace: whether the curvature of weights that an example uses at several positions has
        the exact block's trace, as for `scale_by_kfac`.
      max_size: factors of more rows are kept by their diagonals, as for `scale_by_kfac`.
      l2: eta of `eta / 2 |params|^2`, added to the loss.

    Returns:
      A complete optimizer. Its `update` needs `captured` (with `curvature="ggn_mc"`,
      "fisher_mc", or another kind, and `defer_curvature=True` to save time), the parameters,
      `value`, `grad` and `value_fn`:
      `tx.update(grads, state, params, captured=captured, value=loss, grad=grads,
      value_fn=lambda p: loss_fn(p, batch))`.

    Raises:
      ValueError, TypeError: as `scale_by_kfac` and `scale_by_gauss_newton_step`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, locoprop_jax as lp
      >>> def loss_fn(params, x, y):
      ...     hidden = jnp.tanh(x @ params["in"])
      ...     return jnp.mean((hidden @ params["out"] - y) ** 2)
      >>> params = {"in": jnp.cos(jnp.arange(12.0).reshape(3, 4)), "out": jnp.ones((4, 1))}
      >>> x = jnp.sin(jnp.arange(15.0).reshape(5, 3))
      >>> y = x[:, :1] * x[:, 1:2]
      >>> tx = lp.kfac(lp.find_layers(loss_fn, params, x, y))
      >>> state = tx.init(params)
      >>> capture = lp.value_grad_and_capture(loss_fn, curvature="ggn_exact")
      >>> @jax.jit
      ... def step(params, state):
      ...     loss, grads, captured = capture(params, x, y)
      ...     more = {"value": loss, "grad": grads, "value_fn": lambda p: loss_fn(p, x, y)}
      ...     updates, state = tx.update(grads, state, params, captured=captured, **more)
      ...     return optax.apply_updates(params, updates), state, loss
      >>> losses = []
      >>> for _ in range(5):
      ...     params, state, loss = step(params, state)
      ...     losses.append(f"{loss:.3f}")
      >>> print(*losses)
      0.665 0.049 0.035 0.031 0.029
    """
    amortisation = Amortisation(decay, inverse_period, statistics_steps)
    return complete(
        lambda gamma: _direction(
            layers,
            curvature,
            Damping(gamma, exact=exact_damping),
            amortisation,
            match_trace,
            max_size,
        ),
        damping,
        learning_rate,
        Steps(step_damping, adapt_damping, momentum, l2, model_period),
    )


def kflr(
    layers: Layers, learning_rate: optax.ScalarOrSchedule = 1.0, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """KFLR: K-FAC with exact output factors (practical GN, section 3.4), for few outputs.

    It is `kfac` for what `value_grad_and_capture(loss_fn, curvature="ggn_exact")` captures: all
    columns of a square root of the loss Hessian, pulled back through the network.

    Args:
      layers: from `find_layers`.
      learning_rate: multiplies the step of the model; best left at one.
      **options: those of `kfac`, but for `curvature`.

    Returns:
      A complete optimizer, whose `update` needs what `kfac` needs.

    Raises:
      ValueError, TypeError: as `kfac`.
    """
    return kfac(layers, learning_rate, **options)
