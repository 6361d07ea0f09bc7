"""Layer-local optimizers for JAX: LocoProp and its relatives as Optax transformations."""

import typing as _typing

from locoprop_jax import losses as losses
from locoprop_jax._accumulate import accumulate as accumulate
from locoprop_jax._averaging import IterateAverageState as IterateAverageState
from locoprop_jax._averaging import average_iterates as average_iterates
from locoprop_jax._averaging import averaged_params as averaged_params
from locoprop_jax._boosting import LnbState as LnbState
from locoprop_jax._boosting import lnb as lnb
from locoprop_jax._boosting import scale_by_lnb as scale_by_lnb
from locoprop_jax._capture import value_grad_and_capture as value_grad_and_capture
from locoprop_jax._captured import Captured as Captured
from locoprop_jax._captured import LayerArrays as LayerArrays
from locoprop_jax._divergences import Divergence as Divergence
from locoprop_jax._divergences import Target as Target
from locoprop_jax._divergences import natural as natural
from locoprop_jax._divergences import oracle as oracle
from locoprop_jax._find import find_layers as find_layers
from locoprop_jax._fisher import fisher_norm as fisher_norm
from locoprop_jax._fisher import fisher_product as fisher_product
from locoprop_jax._fisher import inverse_fisher_product as inverse_fisher_product
from locoprop_jax._fisher import sample_laplace as sample_laplace
from locoprop_jax._foof import FoofState as FoofState
from locoprop_jax._foof import foof as foof
from locoprop_jax._foof import scale_by_foof as scale_by_foof
from locoprop_jax._gauss_newton import GaussNewtonStepState as GaussNewtonStepState
from locoprop_jax._gauss_newton import (
    scale_by_gauss_newton_step as scale_by_gauss_newton_step,
)
from locoprop_jax._hessian import hessian_blocks as hessian_blocks
from locoprop_jax._hessian_free import HessianFreeState as HessianFreeState
from locoprop_jax._hessian_free import hessian_free as hessian_free
from locoprop_jax._hessian_free import scale_by_hessian_free as scale_by_hessian_free
from locoprop_jax._kfac import KfacState as KfacState
from locoprop_jax._kfac import kfac as kfac
from locoprop_jax._kfac import kflr as kflr
from locoprop_jax._kfac import scale_by_kfac as scale_by_kfac
from locoprop_jax._kfra import kfra as kfra
from locoprop_jax._kfra import scale_by_kfra as scale_by_kfra
from locoprop_jax._layers import Layer as Layer
from locoprop_jax._layers import Layers as Layers
from locoprop_jax._local_loss import LocalLossState as LocalLossState
from locoprop_jax._local_loss import scale_by_local_loss as scale_by_local_loss
from locoprop_jax._local_problem import LocalProblem as LocalProblem
from locoprop_jax._locoprop import locoprop_kfac as locoprop_kfac
from locoprop_jax._locoprop import locoprop_m as locoprop_m
from locoprop_jax._locoprop import locoprop_s as locoprop_s
from locoprop_jax._locoprop import pocoprop_m as pocoprop_m
from locoprop_jax._locoprop import pocoprop_s as pocoprop_s
from locoprop_jax._locoprop import proxprop as proxprop
from locoprop_jax._metric import scale_by_metric_norm as scale_by_metric_norm
from locoprop_jax._natural import NaturalGradientState as NaturalGradientState
from locoprop_jax._natural import natural_gradient as natural_gradient
from locoprop_jax._natural import scale_by_natural_gradient as scale_by_natural_gradient
from locoprop_jax._products import fisher_vector_product as fisher_vector_product
from locoprop_jax._products import gauss_newton_vector_product as gauss_newton_vector_product
from locoprop_jax._regularizers import Penalty as Penalty
from locoprop_jax._regularizers import Regularizer as Regularizer
from locoprop_jax._regularizers import l1 as l1
from locoprop_jax._regularizers import l2 as l2
from locoprop_jax._regularizers import mahalanobis as mahalanobis
from locoprop_jax._solvers import Solver as Solver
from locoprop_jax._solvers import anderson as anderson
from locoprop_jax._solvers import conjugate_gradient as conjugate_gradient
from locoprop_jax._solvers import exact as exact
from locoprop_jax._solvers import fixed_point as fixed_point
from locoprop_jax._solvers import inner as inner
from locoprop_jax._solvers import newton as newton
from locoprop_jax._training import with_fallback as with_fallback
from locoprop_jax._transfer import Transfer as Transfer
from locoprop_jax._transfer import TransferFunction as TransferFunction
from locoprop_jax._transfer import matching_loss as matching_loss

if _typing.TYPE_CHECKING:
    from locoprop_jax._flax import TrainState as TrainState


def __getattr__(name: str) -> object:
    if name == "TrainState":  # Flax is imported only by those who use it
        try:
            from locoprop_jax._flax import TrainState
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "`TrainState` extends Flax's: pip install 'locoprop_jax[flax]'", name=error.name
            ) from error
        return TrainState
    if name == "__version__":
        from importlib.metadata import version

        return version("locoprop_jax")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
