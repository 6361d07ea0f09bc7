"""KFRA: output factors from the loss, passed backward through a chain of dense layers."""

from __future__ import annotations

import itertools
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from locoprop_jax._checks import check_layers, warn_of_matrix
from locoprop_jax._curvature.complete import Steps, complete
from locoprop_jax._curvature.kronecker import Damping, scale_by_kronecker
from locoprop_jax._curvature.sequences import check_sequence, kernels
from locoprop_jax._layers.captured import Captured
from locoprop_jax._layers.layers import Layers
from locoprop_jax._layers.rows import Block, as_rows
from locoprop_jax._linalg import second_moment
from locoprop_jax._neurons.amortised import Amortisation

REMEDY = (
    "Use `scale_by_kfac`, which takes any network, with `curvature='ggn_exact'` or 'ggn_mc' in "
    "`value_grad_and_capture`"
)


def scale_by_kfra(
    layers: Layers,
    *,
    damping: float = 1.0,
    relative: bool = True,
    exact_damping: bool = False,
    decay: float = 0.95,
    inverse_period: int = 1,
    statistics_steps: int = 1,
    output_factor: str = "keep",
) -> optax.GradientTransformationExtraArgs:
    """KFRA: K-FAC with output factors by a recursion over layers (practical GN, section 3.5).

    The factor of the output layer is exact: the Hessian of the loss by its outputs, summed over
    rows. From it follows that of each layer below,

        Gamma <- (W Gamma W') * mean over rows of f' f''    (* by entries)

    with W the kernel of the layer above and f' the derivatives at the layer's own outputs: without
    a further pass, whatever the number of outputs, where KFLR (`scale_by_kfac` with "ggn_exact")
    takes one for each. For one row it is the Gauss-Newton matrix; for several it takes the product
    of means for the mean of products.

    Capture with `value_grad_and_capture(loss_fn, curvature="ggn_output")`. The network has to be a
    chain of dense layers with elementwise functions in between. Parameters in no layer keep their
    gradient; damping, averages, inversions and steps are those of `scale_by_kfac`.

    Args:
      layers: from `find_layers`.
      damping: k, in units of the mean eigenvalue of S (x) Gamma, or absolute.
      relative: which of the two.
      exact_damping: whether k is added in the eigenvectors of both factors.
      decay: how much of the averages of S and Gamma is left after a step; 0 for the current batch
        alone.
      inverse_period: the steps from one inversion to the next; with more inversions at first (after
        0, 1, 2, 4, 8... steps).
      statistics_steps: how many steps up to each inversion gather statistics, its own included.
      output_factor: "keep", or "constant" or "norm" as for `scale_by_kfac`.

    Returns:
      A transformation whose `update` needs `captured` and `params`. A batch whose gradient is not
      finite leaves its state as it was, but for `refused`, and updates nothing; statistics that
      overflow are not gathered.

    Raises:
      ValueError: at construction, for layers that are not a chain and a transfer function without
        a derivative by entries, naming the layer, and for options out of range as `scale_by_kfac`;
        at update, for `captured` from another model or without "ggn_output", and for a masked
        kernel above a layer that is not masked.
      TypeError: at update, `captured` or `params` is missing.

    References:
      Botev et al., `Practical Gauss-Newton Optimisation for Deep Learning
      <https://arxiv.org/abs/1706.03662>`_, 2017: section 3.5, eq. 26, Algorithm 1.
    """
    return _direction(
        layers,
        Damping(damping, relative, exact_damping, output_factor),
        Amortisation(decay, inverse_period, statistics_steps),
    )


def _direction(
    layers: Layers, damping: Damping, amortisation: Amortisation
) -> optax.GradientTransformationExtraArgs:
    check_layers(layers, "scale_by_kfra")
    names = check_sequence(layers, "scale_by_kfra", REMEDY)
    for name, layer in layers.items():
        warn_of_matrix(
            f"The larger factor that `scale_by_kfra` keeps of the layer {name}",
            max(layer.d_in + 1, layer.d_out),
            "Use `scale_by_kfac` or `kfac`, which keep such factors by their diagonals",
        )

    def output_factors(
        captured: Captured, params: Any, slopes: dict[str, Block]
    ) -> dict[str, Array]:
        hessian = captured[names[-1]].output_hessian
        if hessian is None:
            raise ValueError(
                "`scale_by_kfra` starts from the Hessian of the loss by the outputs, but it was "
                "not captured: ask for it by `value_grad_and_capture(loss_fn, "
                'curvature="ggn_output")`.'
            )
        wanted = [i for i, name in enumerate(names) if name in slopes]
        if not wanted:
            return {}
        passed = names[wanted[0] :]
        above = kernels(layers, params, passed[1:], "scale_by_kfra", captured.points)
        outputs = {
            name: as_rows(captured[name].outputs, above[after].dtype)
            for name, after in itertools.pairwise(passed)
        }
        return _factors(layers, names[-1], hessian, outputs, above)

    return scale_by_kronecker("scale_by_kfra", layers, output_factors, damping, amortisation)


def _factors(
    layers: Layers,
    last: str,
    hessian: Float[Array, "d_out d_out"] | Float[Array, " d_out"],
    outputs: dict[str, Float[Array, "rows d_out"]],
    kernels: dict[str, Float[Array, "d_in d_out"]],
) -> dict[str, Float[Array, "d d"]]:
    """Gamma of each layer passed (practical GN, eq. 26).

    Args:
      layers: all.
      last: the output layer.
      hessian: its factor, a matrix or its diagonal.
      outputs: by layer, but for the output layer, its pre-activations.
      kernels: by layer, but for the last wanted, its kernel.
    """
    gamma, above = hessian, last
    result = {last: jnp.diag(gamma) if gamma.ndim == 1 else gamma}
    for name, rows in reversed(outputs.items()):
        back, gamma = kernels[above].T, gamma.astype(kernels[above].dtype)
        after = gamma[:, None] * back if gamma.ndim == 1 else second_moment(gamma, back)
        gamma = second_moment(back, after)
        slopes = layers[name].transfer.derivative(rows)
        gamma = gamma * second_moment(slopes) / len(slopes)
        result[name], above = gamma, name
    return result


def kfra(
    layers: Layers,
    learning_rate: optax.ScalarOrSchedule = 1.0,
    *,
    damping: float = 1.0,
    step_damping: float = 0.1,
    adapt_damping: bool = False,
    exact_damping: bool = False,
    decay: float = 0.95,
    inverse_period: int = 20,
    statistics_steps: int = 1,
    momentum: bool = True,
    l2: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """KFRA with steps and damping from the Gauss-Newton model (practical GN, Algorithm 1).

    The direction of `scale_by_kfra`, amortised, with the step of `scale_by_gauss_newton_step`;
    nothing is sampled and nothing is left to tune. Algorithm 1 has no momentum.

    Args:
      layers: from `find_layers`, a chain of dense layers.
      learning_rate: multiplies the step of the model; best left at one.
      damping: the first gamma, in units of each layer's mean eigenvalue of S (x) Gamma.
      step_damping: the first tau, in units of the curvature along the first direction.
      adapt_damping: whether gamma is adapted too: every 20 steps the best of three, which costs
        three more inversions. The step makes up for much of what gamma does.
      exact_damping: whether gamma is added in the eigenvectors of both factors.
      decay: of the averages of S and Gamma.
      inverse_period: the steps from one inversion to the next; of 20 it should be a divisor or a
        multiple, because where nothing is inverted gamma has no effect.
      statistics_steps: how many steps up to each inversion gather statistics.
      momentum: whether the step is the best one along the direction and the last update.
      l2: eta of `eta / 2 |params|^2`, added to the loss.

    Returns:
      A complete optimizer. Its `update` needs `captured` (with `curvature="ggn_output"`), the
      parameters, `value`, `grad` and `value_fn`, as for `kfac`.

    Raises:
      ValueError, TypeError: as `scale_by_kfra` and `scale_by_gauss_newton_step`.
    """
    amortisation = Amortisation(decay, inverse_period, statistics_steps)
    return complete(
        lambda gamma: _direction(layers, Damping(gamma, exact=exact_damping), amortisation),
        damping,
        learning_rate,
        Steps(step_damping, adapt_damping, momentum, l2),
    )
