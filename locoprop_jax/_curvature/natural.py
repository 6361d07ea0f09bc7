"""The natural gradient of a subsampled Fisher, exact."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int

from locoprop_jax import _linalg
from locoprop_jax._checks import check_fisher, check_layers, check_positive, check_whole
from locoprop_jax._curvature import woodbury
from locoprop_jax._curvature.complete import Steps, complete
from locoprop_jax._curvature.woodbury import Columns, System
from locoprop_jax._layers.captured import check_captured
from locoprop_jax._layers.layers import Layers
from locoprop_jax._layers.method import Batch, matrix_shapes, transformation, zero_count
from locoprop_jax._neurons.amortised import keep_finite
from locoprop_jax._trees import wide_dtype

METHOD = "scale_by_natural_gradient"


class NaturalGradientState(NamedTuple):
    """State of `scale_by_natural_gradient`.

    Attributes:
      count: finite batches so far. shape=(), dtype=int32
      refused: batches that were not finite, and updated nothing. shape=(), dtype=int32
      failures: factorisations that did not succeed; their layers kept the one they had, or stood
        still. shape=(), dtype=int32
      systems: what later steps are divided by: of "all" layers, or of each by its name; with
        damping zero before the first. Empty without `batch_size`.
    """

    count: Int[Array, ""]
    refused: Int[Array, ""]
    failures: Int[Array, ""]
    systems: dict[str, System]

    def diagnostics(self) -> dict[str, Array]:
        """The counters, and lambda of each system that is kept."""
        own = {"count": self.count, "refused": self.refused, "failures": self.failures}
        return own | {f"damping/{name}": system.damping for name, system in self.systems.items()}

    def spectra(self) -> dict[str, Array]:
        """The eigenvalues of lambda I + G'G of each system that is kept."""
        return {
            f"{name}/damped": _linalg.eigenvalues(
                system.cholesky @ system.cholesky.T, is_diagonal=False
            )
            for name, system in self.systems.items()
        }


def scale_by_natural_gradient(
    layers: Layers,
    batch_size: int | None = None,
    *,
    samples: int = 1,
    damping: float = 1.0,
    relative: bool = True,
    block_diagonal: bool = False,
    curvature: str = "captured",
    period: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """The exact natural gradient (lambda I + F)^-1 g of a subsampled Fisher (Benzing, section 2.1).

    F is the Fisher or Gauss-Newton matrix of the loss as written, over all layers together and of
    one batch. Which matrix is said by what was captured: labels sampled from the model
    ("fisher_mc"), noise ("ggn_mc") or all columns ("ggn_exact"). A step factorises a matrix with a
    row for each of the batch's examples, times the samples; gradients of single examples are not
    formed. Parameters in no layer keep their gradient.

    The gradient and F had better come from different batches (appendix I.5). With `batch_size` the
    state keeps what was captured of the previous batch, by whose F a step is divided; the first
    step has only its own. Else F is that of the extra argument `fisher`, what was captured of
    another batch, or without it of the step's own batch.

    For steps that its metric measures chain
    `scale_by_metric_norm(scale_by_natural_gradient(...))` and `optax.scale_by_learning_rate`; their
    squared length is in units of the loss.

    Args:
      layers: from `find_layers`.
      batch_size: examples per batch, to keep the previous one; None to keep none.
      samples: of the curvature cotangents of the batch kept, the length of their first axis: the
        samples captured, or the number of columns of "ggn_exact".
      damping: lambda, in units of the mean of the eigenvalues that F can have (as many as examples
        times samples), or absolute.
      relative: which of the two. Relative, the direction does not depend on the size of the loss.
      block_diagonal: whether only the layers' own blocks of F count, each with a lambda of its own
        if that is relative.
      curvature: "captured" takes the cotangents of `value_grad_and_capture(..., curvature=...)`,
        "empirical" those of the loss itself, which makes the empirical Fisher.
      period: the steps from one replacement of the batch kept to the next. Those in between cost
        little more than a gradient step.

    Returns:
      A transformation whose `update` needs `captured`, and takes `fisher`. A batch that is not
      finite leaves its state as it was, but for `refused`, and updates nothing. Where the axis of
      the batch could not be told, each row counts as an example.

    Raises:
      ValueError: at construction, for no layers, damping that is not positive, a size, samples or a
        period below one, samples or a period without `batch_size`, `batch_size` for layers whose
        axis of the batch could not be told, an unknown `curvature`; at update, for `captured` or
        `fisher` from another model, without curvature, with exact columns that join positions or of
        another size than said, for `fisher`
        beside `batch_size`, for layers that differ in their examples.
      TypeError: at update, `captured` is missing.

    References:
      Benzing, `Gradient Descent on Neurons and its Link to Approximate Second-Order Optimization
      <https://arxiv.org/abs/2201.12250>`_, 2022: sections 2.1 and 3, appendix I.
    """
    _check(layers, batch_size, samples, damping, curvature, period)

    def init(params: Any) -> NaturalGradientState:
        systems = {}
        if batch_size is not None:
            systems = _empty(layers, params, batch_size, samples, block_diagonal)
        return NaturalGradientState(zero_count(), zero_count(), zero_count(), systems)

    def step(batch: Batch, state: NaturalGradientState) -> tuple[Any, NaturalGradientState]:
        source = batch.captured
        if (fisher := batch.extra_args.get("fisher")) is not None:
            _check_fisher_argument(batch_size)
            source = check_captured(layers, fisher, METHOD)
        source = source.pulled()
        own = woodbury.same_dtype(batch.slopes)
        columns = woodbury.columns_of(source, own, curvature)
        if batch_size is not None:
            _check_sizes(layers, columns, batch_size, samples)
        ok = batch.is_finite(columns)
        systems = woodbury.groups(own, block_diagonal)
        for names in systems.values():
            woodbury.check_examples(METHOD, {n: columns[n] for n in names})

        def factorised() -> dict[str, System]:
            return {
                system: woodbury.factorise(
                    {n: columns[n] for n in names}, damping, relative=relative
                )
                for system, names in systems.items()
            }

        if batch_size is None:
            new = factorised()
            used, failures = keep_finite(new, _linalg.zeros_like(new), state.failures)
            state = state._replace(failures=jnp.where(ok, failures, state.failures))
        else:
            used, state = _renewed(state, ok, period, factorised)
        new = {}
        for system in used.values():
            new |= woodbury.divide(system, own)
        return batch.finish(new, state, ok)

    return transformation(METHOD, layers, init, step)


def natural_gradient(
    layers: Layers,
    learning_rate: optax.ScalarOrSchedule = 1.0,
    batch_size: int | None = None,
    *,
    samples: int = 1,
    damping: float = 1.0,
    step_damping: float = 0.1,
    adapt_damping: bool = True,
    block_diagonal: bool = False,
    curvature: str = "captured",
    period: int = 1,
    momentum: bool = True,
    halvings: int = 10,
    l2: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """The exact natural gradient with steps from the Gauss-Newton model: nothing to tune.

    The direction of `scale_by_natural_gradient` with the step of `scale_by_gauss_newton_step`, as
    `kfac`. For the plain method chain `scale_by_natural_gradient` and
    `optax.scale_by_learning_rate`.

    Args:
      layers: from `find_layers`.
      learning_rate: multiplies the step of the model; best left at one.
      batch_size: examples per batch, to divide by the Fisher of the previous one.
      samples: of its curvature cotangents.
      damping: the first lambda, in units of the Fisher's mean eigenvalue, and the largest.
      step_damping: the first tau, in units of the curvature along the first direction.
      adapt_damping: whether lambda is adapted too. It shrinks to a tenth where the next batch finds
        that the model kept three quarters of what it promised, as it does without noise, and grows
        back where it kept less than a quarter. Full batches of physics-informed losses need next to
        no damping, small batches all of it.
      block_diagonal: whether each layer has a system of its own.
      curvature: "captured" or "empirical".
      period: the steps from one replacement of the batch kept to the next.
      momentum: whether the step is the best one along the direction and the last update.
      halvings: of a step that makes the loss of its own batch rise, at most; 0 for none.
      l2: eta of `eta / 2 |params|^2`, added to the loss.

    Returns:
      A complete optimizer. Its `update` needs `captured`, the parameters, `value`, `grad` and
      `value_fn`, as for `kfac`.

    Raises:
      ValueError, TypeError: as `scale_by_natural_gradient` and `scale_by_gauss_newton_step`.
    """
    direction = functools.partial(
        scale_by_natural_gradient,
        layers,
        batch_size,
        samples=samples,
        block_diagonal=block_diagonal,
        curvature=curvature,
        period=period,
    )
    return complete(
        lambda gamma: direction(damping=gamma),
        damping,
        learning_rate,
        Steps(step_damping, adapt_damping, momentum, l2, halvings=halvings, is_judged=True),
    )


# --- the batch kept ------------------------------------------------------------------------------


def _empty(
    layers: Layers, params: Any, batch_size: int, samples: int, block_diagonal: bool
) -> dict[str, System]:
    """Systems of zeros."""
    sizes = matrix_shapes(layers, params)
    dtype = wide_dtype(sizes.values())

    def of_layer(name: str) -> Columns:
        (*stack, d, d_out), shared = sizes[name].shape, layers[name].rows
        return Columns(
            jnp.zeros((*stack, batch_size, shared, d), dtype),
            jnp.zeros((*stack, samples, batch_size, shared, d_out), dtype),
        )

    count = samples * batch_size
    return {
        system: System(
            {name: of_layer(name) for name in names},
            jnp.zeros((count, count), dtype),
            jnp.zeros([], dtype),
        )
        for system, names in woodbury.groups(sizes, block_diagonal).items()
    }


def _renewed(
    state: NaturalGradientState,
    ok: Bool[Array, ""],
    period: int,
    factorised: Callable[[], dict[str, System]],
) -> tuple[dict[str, System], NaturalGradientState]:
    """The systems to divide by, the last ones where there are any, and those of this batch kept."""
    exist = {system: old.damping > 0 for system, old in state.systems.items()}
    due = ok & ((state.count % period == 0) | ~_all(exist))
    kept, failures = jax.lax.cond(
        due,
        lambda: keep_finite(factorised(), state.systems, state.failures),
        lambda: (state.systems, state.failures),
    )
    used = {
        system: _linalg.where(exist[system], old, kept[system])
        for system, old in state.systems.items()
    }
    return used, state._replace(failures=failures, systems=kept)


def _all(flags: dict[str, Bool[Array, ""]]) -> Bool[Array, ""]:
    return jnp.stack([jnp.array(True), *flags.values()]).all()


# --- checks --------------------------------------------------------------------------------------


def _check(
    layers: Any, batch_size: Any, samples: Any, damping: Any, curvature: str, period: Any
) -> None:
    check_layers(layers, METHOD)
    check_positive(damping=damping)
    check_fisher(METHOD, damping, curvature)
    check_whole(samples=samples, period=period)
    if batch_size is None:
        if (samples, period) != (1, 1):
            raise ValueError(
                f"`samples={samples}` and `period={period}` are about the batch that `{METHOD}` "
                f"keeps: say of how many examples it is by `batch_size`."
            )
        return
    check_whole(batch_size=batch_size)
    unknown = [name for name, layer in layers.items() if layer.rows is None]
    if unknown:
        raise ValueError(
            f"`{METHOD}` with `batch_size` has to know the rows per example of all layers, but "
            f"`find_layers` could not tell the axis of the batch at {', '.join(unknown)}. Leave "
            f"`batch_size` out and pass what was captured of another batch as "
            f"`tx.update(..., fisher=...)`."
        )


def _check_fisher_argument(batch_size: int | None) -> None:
    if batch_size is not None:
        raise ValueError(
            f"`{METHOD}` was built with `batch_size={batch_size}`, to divide by the Fisher of the "
            f"previous batch: either leave that out or `fisher`."
        )


def _check_sizes(
    layers: Layers, columns: dict[str, Columns], batch_size: int, samples: int
) -> None:
    for name, own in columns.items():
        got = own.cotangents.shape[-4:-1]
        expected = (samples, batch_size, layers[name].rows)
        if got != expected:
            raise ValueError(
                f"`{METHOD}` was built for `samples={samples}` and `batch_size={batch_size}` with "
                f"{expected[2]} rows per example at {name}, but captured there were {got[0]} "
                f"samples of {got[1]} examples with {got[2]} rows. Build it with the sizes of the "
                f"batches that are captured; all must have the same."
            )
