"""Layer-local optimizers for JAX: LocoProp and its relatives as Optax transformations."""

import typing as _typing

from locoprop_jax import losses as losses
from locoprop_jax._capture.accumulate import accumulate as accumulate
from locoprop_jax._capture.capture import value_grad_and_capture as value_grad_and_capture
from locoprop_jax._capture.find import find_layers as find_layers
from locoprop_jax._checks import CostWarning as CostWarning
from locoprop_jax._curvature.fisher import fisher_norm as fisher_norm
from locoprop_jax._curvature.fisher import fisher_product as fisher_product
from locoprop_jax._curvature.fisher import inverse_fisher_product as inverse_fisher_product
from locoprop_jax._curvature.fisher import sample_laplace as sample_laplace
from locoprop_jax._curvature.gauss_newton import GaussNewtonStepState as GaussNewtonStepState
from locoprop_jax._curvature.gauss_newton import (
    scale_by_gauss_newton_step as scale_by_gauss_newton_step,
)
from locoprop_jax._curvature.hessian import hessian_blocks as hessian_blocks
from locoprop_jax._curvature.hessian_free import HessianFreeState as HessianFreeState
from locoprop_jax._curvature.hessian_free import hessian_free as hessian_free
from locoprop_jax._curvature.hessian_free import scale_by_hessian_free as scale_by_hessian_free
from locoprop_jax._curvature.kfac import kfac as kfac
from locoprop_jax._curvature.kfac import kflr as kflr
from locoprop_jax._curvature.kfac import scale_by_kfac as scale_by_kfac
from locoprop_jax._curvature.kfra import kfra as kfra
from locoprop_jax._curvature.kfra import scale_by_kfra as scale_by_kfra
from locoprop_jax._curvature.kronecker import KfacState as KfacState
from locoprop_jax._curvature.natural import NaturalGradientState as NaturalGradientState
from locoprop_jax._curvature.natural import natural_gradient as natural_gradient
from locoprop_jax._curvature.natural import scale_by_natural_gradient as scale_by_natural_gradient
from locoprop_jax._curvature.products import fisher_vector_product as fisher_vector_product
from locoprop_jax._curvature.products import (
    gauss_newton_vector_product as gauss_newton_vector_product,
)
from locoprop_jax._diagnostics import diagnostics as diagnostics
from locoprop_jax._layers.arrays import LayerArrays as LayerArrays
from locoprop_jax._layers.captured import Captured as Captured
from locoprop_jax._layers.layers import Layer as Layer
from locoprop_jax._layers.layers import Layers as Layers
from locoprop_jax._layers.transfer import Transfer as Transfer
from locoprop_jax._layers.transfer import TransferFunction as TransferFunction
from locoprop_jax._layers.transfer import matching_loss as matching_loss
from locoprop_jax._local_losses.divergences import Divergence as Divergence
from locoprop_jax._local_losses.divergences import Target as Target
from locoprop_jax._local_losses.divergences import natural as natural
from locoprop_jax._local_losses.divergences import oracle as oracle
from locoprop_jax._local_losses.fixed_point import anderson as anderson
from locoprop_jax._local_losses.fixed_point import fixed_point as fixed_point
from locoprop_jax._local_losses.inner import inner as inner
from locoprop_jax._local_losses.linear import conjugate_gradient as conjugate_gradient
from locoprop_jax._local_losses.linear import exact as exact
from locoprop_jax._local_losses.local_loss import LocalLossState as LocalLossState
from locoprop_jax._local_losses.local_loss import scale_by_local_loss as scale_by_local_loss
from locoprop_jax._local_losses.local_problem import LocalProblem as LocalProblem
from locoprop_jax._local_losses.locoprop import locoprop_kfac as locoprop_kfac
from locoprop_jax._local_losses.locoprop import locoprop_m as locoprop_m
from locoprop_jax._local_losses.locoprop import locoprop_s as locoprop_s
from locoprop_jax._local_losses.locoprop import pocoprop_m as pocoprop_m
from locoprop_jax._local_losses.locoprop import pocoprop_s as pocoprop_s
from locoprop_jax._local_losses.locoprop import proxprop as proxprop
from locoprop_jax._local_losses.newton import newton as newton
from locoprop_jax._local_losses.regularizers import Penalty as Penalty
from locoprop_jax._local_losses.regularizers import Regularizer as Regularizer
from locoprop_jax._local_losses.regularizers import l1 as l1
from locoprop_jax._local_losses.regularizers import l2 as l2
from locoprop_jax._local_losses.regularizers import mahalanobis as mahalanobis
from locoprop_jax._local_losses.solver import Solver as Solver
from locoprop_jax._neurons.boosting import LnbState as LnbState
from locoprop_jax._neurons.boosting import lnb as lnb
from locoprop_jax._neurons.boosting import scale_by_lnb as scale_by_lnb
from locoprop_jax._neurons.foof import FoofState as FoofState
from locoprop_jax._neurons.foof import foof as foof
from locoprop_jax._neurons.foof import scale_by_foof as scale_by_foof
from locoprop_jax._neurons.length import scale_by_output_rms as scale_by_output_rms
from locoprop_jax._neurons.metric import scale_by_metric_norm as scale_by_metric_norm
from locoprop_jax._plotting import plot as plot
from locoprop_jax._training.averaging import IterateAverageState as IterateAverageState
from locoprop_jax._training.averaging import average_iterates as average_iterates
from locoprop_jax._training.averaging import averaged_params as averaged_params
from locoprop_jax._training.training import with_fallback as with_fallback

if _typing.TYPE_CHECKING:
    from locoprop_jax._training.flax import TrainState as TrainState

    __version__: str
else:  # where a type checker saw this, no misspelt name would be a mistake

    def __getattr__(name: str) -> object:
        if name == "TrainState":  # Flax is imported only by those who use it
            try:
                from locoprop_jax._training.flax import TrainState
            except ModuleNotFoundError as error:
                raise ModuleNotFoundError(
                    "`TrainState` extends Flax's: pip install 'locoprop_jax[flax]'", name=error.name
                ) from error
            return TrainState
        if name == "__version__":
            from importlib.metadata import version

            return version("locoprop_jax")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
