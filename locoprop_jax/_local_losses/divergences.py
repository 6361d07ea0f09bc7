"""Divergences and targets: what a layer's outputs are measured by, and where they should go.

A divergence D(A~, target) enters the local problem through its gradient by A~, the residual. With
`step` the change that the target asks for (gamma times the cotangents, or what a target makes of
them), f the transfer function and J_f' its transposed Jacobian at the moving A~:

    divergence      target                       residual                            paper
    squared         gd       A - step            A~ - A + step                       eq. 3
    matching        md       f(A) - step         f(A~) - f(A) + step                 eq. 7
    post_squared    post_gd  f(A) - step         J_f' (f(A~) - f(A) + step)          eq. 17
    dual_matching   dual_md  A - step            J_f' (A~ - A + step)                eq. 19

At A~ = A each is the gradient of the loss times gamma, so that one local iteration is BackProp; no
other pair is. The last two take the cotangents after the transfer function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from locoprop_jax import _linalg
from locoprop_jax._checks import check_fisher, is_number, warn_of_matrix
from locoprop_jax._layers.rows import Rows
from locoprop_jax._layers.transfer import Transfer

# --- divergences ---------------------------------------------------------------------------------


class Divergence(NamedTuple):
    """A divergence with the target that starts it at the gradient.

    Attributes:
      name: for messages.
      target: the name of its target.
      residual: `residual(f, outputs, step)` gives the residual as a function of the moving
        outputs.
      after_transfer: whether the target is a step on f(A), with the cotangents after f, or their
        dual; before f otherwise, and then `step` only shifts the residual.
      is_linear: whether the residual is A~ - A + step for this transfer function.
      is_convex: whether the local loss is convex in A~ for a non-decreasing f.
    """

    name: str
    target: str
    residual: Callable[[Transfer, Rows, Rows], Callable[[Rows], Rows]]
    after_transfer: bool = False
    is_linear: Callable[[Transfer], bool] = lambda f: False
    is_convex: bool = False


def _squared(f: Transfer, outputs: Rows, step: Rows) -> Callable[[Rows], Rows]:
    return lambda moved: moved - outputs + step


def _matching(f: Transfer, outputs: Rows, step: Rows) -> Callable[[Rows], Rows]:
    start = f(outputs)
    return lambda moved: f(moved) - start + step


def _post_squared(f: Transfer, outputs: Rows, step: Rows) -> Callable[[Rows], Rows]:
    start = f(outputs)

    def residual(moved: Rows) -> Rows:
        value, pullback = jax.vjp(f, moved)
        return pullback(value - start + step)[0]

    return residual


def _dual_matching(f: Transfer, outputs: Rows, step: Rows) -> Callable[[Rows], Rows]:
    def residual(moved: Rows) -> Rows:
        return jax.vjp(f, moved)[1](moved - outputs + step)[0]

    return residual


def _is_identity(f: Transfer) -> bool:
    return f.is_identity


DIVERGENCES = {
    d.name: d
    for d in (
        Divergence("squared", "gd", _squared, is_linear=lambda f: True, is_convex=True),
        Divergence("matching", "md", _matching, is_linear=_is_identity, is_convex=True),
        Divergence("post_squared", "post_gd", _post_squared, True, _is_identity),
        Divergence("dual_matching", "dual_md", _dual_matching, True, _is_identity),
    )
}

# --- targets -------------------------------------------------------------------------------------

Linear = Callable[[Array], Array]  # acts on the last axis


class Target(NamedTuple):
    """A target that changes the cotangents before it steps along them.

    Attributes:
      name: for messages.
      init: `init(d_out, dtype)` makes one layer's state.
      update: `update(cotangents, curvature, state)` returns a linear map of the features, the same
        for all rows, and the new state. `curvature` holds the rows that `curvature` names.
      curvature: "empirical" for cotangents scaled so that their second moment is the empirical
        Fisher's second factor, "captured" for those that `value_grad_and_capture(curvature=...)`
        brought, None for a target that needs none.
    """

    name: str
    init: Callable[[int, Any], Any]
    update: Callable[[Rows, Rows | None, Any], tuple[Linear, Any]]
    curvature: str | None = None


class NaturalState(NamedTuple):
    """The exponential moving average of a Fisher factor.

    Attributes:
      weight: the sum of the average's weights so far, which debiases it.
      moment: shape (d_out, d_out), or (d_out,) of a diagonal.
    """

    weight: Float[Array, ""]
    moment: Float[Array, "d_out d_out"] | Float[Array, " d_out"]


def natural(
    damping: float = 1e-2,
    *,
    relative: bool = True,
    curvature: str = "empirical",
    diagonal: bool = False,
    decay: float = 0.0,
) -> Target:
    """A natural-gradient step on the outputs: E D^-1 in place of E (LocoProp, appendix D).

    D is the Fisher information of the outputs, or of the transferred outputs with the
    post-activation divergences, as the sum over rows of c c' for curvature cotangents c; one for
    all rows. `exact()` with the squared divergence and this target is K-FAC with factored damping
    (Proposition 1).

    Args:
      damping: added to the diagonal of D.
      relative: whether in units of D's mean eigenvalue.
      curvature: "empirical" takes D from the loss's own cotangents; "captured" from those of
        `value_grad_and_capture(..., curvature=...)`, sampled or exact.
      diagonal: whether to keep only D's diagonal.
      decay: of D's moving average over batches, debiased; 0 is the current batch alone.

    Returns:
      A target for `scale_by_local_loss`.

    Raises:
      ValueError: a negative damping, a decay outside [0, 1), or an unknown source.
    """
    check_fisher("natural", damping, curvature)
    if is_number(decay) and not 0 <= decay < 1:
        raise ValueError(f"`natural` takes a decay from 0 to below 1, got {decay}.")

    def init(d_out: int, dtype: Any) -> NaturalState:
        shape = (d_out,) if diagonal else (d_out, d_out)
        if not diagonal:
            warn_of_matrix(
                "What the target `natural` keeps of a layer's outputs",
                d_out,
                "Use `natural(diagonal=True)`",
            )
        return NaturalState(jnp.zeros((), dtype), jnp.zeros(shape, dtype))

    def update(cotangents: Rows, curvature: Rows | None, state: Any) -> tuple[Linear, Any]:
        del cotangents
        assert curvature is not None
        now = (curvature**2).sum(0) if diagonal else _linalg.second_moment(curvature)
        state = _linalg.average(state, NaturalState(jnp.ones((), now.dtype), now), decay)
        fisher = _linalg.damped(state.moment / state.weight, damping, relative=relative)

        def precondition(x: Array) -> Array:
            return _linalg.solve(fisher, x.reshape(-1, x.shape[-1]).T).T.reshape(x.shape)

        return precondition, state

    return Target("natural", init, update, curvature)


def oracle(transform: optax.GradientTransformation) -> Target:
    """Steps that an Optax transformation takes on each feature's cotangents (review, section 6).

    The transformation sees the root mean square over the batch of each feature's cotangents, as
    one vector for each layer; by how much it scales a feature, that feature's cotangents are
    scaled. `oracle(optax.scale_by_adam(b1=0.0))` divides by a moving average of their size, which
    Adam does to gradients: gamma is then a step in units of the outputs.

    Args:
      transform: a `scale_by_` transformation, one that does not flip the sign.

    Returns:
      A target for `scale_by_local_loss`.
    """

    def init(d_out: int, dtype: Any) -> Any:
        return transform.init(jnp.zeros(d_out, dtype))

    def update(cotangents: Rows, curvature: Rows | None, state: Any) -> tuple[Linear, Any]:
        del curvature
        size = jnp.sqrt((cotangents**2).mean(0))
        new, state = transform.update(size, state, jnp.zeros_like(size))
        factor = jnp.where(size > 0, jnp.asarray(new) / jnp.where(size > 0, size, 1), 0)
        return lambda x: x * factor.reshape((1,) * (x.ndim - 1) + factor.shape), state

    return Target("oracle", init, update)
