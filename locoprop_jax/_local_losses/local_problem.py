"""One layer's local problem, and how captured arrays become it.

A solver looks for the displacement delta = W~ - W of a layer's weights. The local loss has

    gradient at W + delta = slope + X' gain(X delta) + gradient of the regularizer at delta

with slope the incoming updates (times gamma), so the first iteration needs no matrix product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from locoprop_jax import _linalg
from locoprop_jax._layers.arrays import LayerArrays
from locoprop_jax._layers.blocks import curvature_rows, dtype_of
from locoprop_jax._layers.captured import Captured
from locoprop_jax._layers.layers import Layer
from locoprop_jax._layers.rows import Block, Inputs, Rows, as_rows, pull, push
from locoprop_jax._layers.transfer import identity
from locoprop_jax._local_losses import units
from locoprop_jax._local_losses.divergences import Divergence, Target
from locoprop_jax._local_losses.regularizers import Layerwise, Penalty, Regularizer, penalty_of


class LocalProblem(NamedTuple):
    """What a solver minimises for one layer.

    Attributes:
      slope: the gradient of the local loss at W.
      inputs: X.
      cotangents: what X' makes the slope of, as far as it met data; gamma included.
      gain: what the divergence's gradient by the outputs gains as these move by C from A; None
        where that is C itself (squared losses).
      outputs_apart: whether no output's gain depends on another output.
      penalty: the regularizer.
      weights: W.
      learning_rate: eta.
      ok: False for a batch that is not finite: the solver must then return zeros, state unchanged.
    """

    slope: Block
    inputs: Inputs
    cotangents: Rows
    gain: Callable[[Rows], Rows] | None
    outputs_apart: bool
    penalty: Penalty
    weights: Block
    learning_rate: Float[Array, ""]
    ok: Bool[Array, ""]

    def gradient(self, delta: Block) -> Block:
        """The gradient of the local loss at W + delta, for any kind of layer.

        Args:
          delta: a displacement like `slope`: a kernel (d_in, d_out), a bias (d_out,), or one of
            them.
        """
        return self.penalty.add_gradient(_linalg.add(self.slope, self.gained(delta)), delta)

    def gained(self, delta: Block) -> Block:
        """What the divergence's gradient gains on the way: X' gain(X delta)."""
        moved = push(self.inputs, delta)
        return pull(self.inputs, moved if self.gain is None else self.gain(moved), delta)


class Rates(NamedTuple):
    """How far to go.

    Attributes:
      gamma: the activation step size.
      eta: the learning rate of the local iterations.
      relative: whether both are in units of the layer (`units`), or absolute.
      is_per_weight: whether the solver moves every weight by about eta.
    """

    gamma: Any
    eta: Any
    relative: bool
    is_per_weight: bool

    def of(
        self, inputs: Inputs, cotangents: Rows, like: Block, most: Any
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Gamma and eta of one layer."""
        if not self.relative:
            gamma, eta = (jnp.asarray(rate, cotangents.dtype) for rate in self[:2])
            return gamma, eta
        gamma = units.activation_step(self.gamma, cotangents, most)
        eta = units.local_rate(self.eta, self.gamma, inputs, like, is_per_weight=self.is_per_weight)
        return gamma, eta.astype(gamma.dtype)


class LayerData(NamedTuple):
    """One layer's arrays for one update; layers of equal shapes are stacked by them.

    Those of a stack have its axis in front.

    Attributes:
      inputs: X.
      outputs: A.
      cotangents: E.
      transferred: the cotangents after the transfer function, None where they are not needed.
      target_curvature: the rows that the target asks for, or None.
      curvature: those that the regularizer asks for, or None.
      weights: W.
      updates: the incoming ones.
      inner: the solver's state.
      target: the target's state.
    """

    inputs: Inputs
    outputs: Float[Array, "rows d_out"]
    cotangents: Float[Array, "rows d_out"]
    transferred: Float[Array, "rows d_out"] | None
    target_curvature: Float[Array, "samples_rows d_out"] | None
    curvature: Float[Array, "samples_rows d_out"] | None
    weights: Block
    updates: Block
    inner: Any
    target: Any


# --- from captured arrays ------------------------------------------------------------------------


def layer_data(
    layer: Layer,
    captured: Captured,
    divergence: Divergence,
    curvatures: tuple[str | None, str | None],
    blocks: tuple[Block, Block],
    states: tuple[Any, Any],
) -> LayerData:
    arrays, dtype = captured[layer.name], dtype_of(blocks[1])
    is_after = _is_after_transfer(divergence, layer)
    for_target, for_penalty = curvatures

    def curvature(source: str | None, is_after: bool) -> Float[Array, "samples_rows d_out"] | None:
        if source is None:
            return None
        return curvature_rows(captured, layer.name, source, dtype, is_after=is_after)

    return LayerData(
        inputs=arrays.rows(dtype),
        outputs=arrays.output_rows(dtype),
        cotangents=arrays.cotangent_rows(dtype),
        transferred=arrays.transferred_rows(dtype) if is_after else None,
        target_curvature=curvature(for_target, is_after),
        curvature=curvature(for_penalty, False),
        weights=blocks[0],
        updates=blocks[1],
        inner=states[0],
        target=states[1],
    )


def _is_after_transfer(divergence: Divergence, layer: Layer) -> bool:
    """Whether the layer's target is a step after its transfer function: not at an output layer."""
    return divergence.after_transfer and not layer.uses_head and not layer.transfer.is_identity


def local_problem(
    layer: Layer,
    arrays: LayerArrays,
    data: LayerData,
    components: tuple[Divergence, Target | None, Regularizer | None],
    rates: Rates,
    ok: Bool[Array, ""],
) -> tuple[LocalProblem, Any]:
    """The local problem of one layer, and the target's new state."""
    x, a, e = data.inputs, data.outputs, data.cotangents
    divergence, target, regularizer = components
    is_after = data.transferred is not None
    along, state = e if data.transferred is None else data.transferred, data.target
    most = arrays.head.terms if layer.uses_head and arrays.head is not None else jnp.inf
    gamma, eta = rates.of(x, along, data.updates, most)
    slope = {part: gamma * g for part, g in data.updates.items()}
    change: Callable[[Array], Array] = lambda rows: rows  # noqa: E731
    if target is not None:
        change, state = target.update(along, data.target_curvature, state)
    step = gamma * change(along)
    f = identity() if layer.uses_head else layer.transfer
    if is_after:
        residual = divergence.residual(f, a, step)
        start = residual(a)
        if target is not None:
            extra = pull(x, start - gamma * e, slope)
            slope = jax.tree.map(jnp.add, slope, extra)
        gain = lambda moved: residual(a + moved) - start  # noqa: E731
    else:
        # The same linear map of the features for all rows commutes with X'.
        slope, start = jax.tree.map(change, slope), step
        gain = _gain_before_transfer(layer, arrays, divergence, a)
    problem = LocalProblem(
        slope=slope,
        inputs=x,
        cotangents=start,
        gain=gain,
        outputs_apart=gain is None or (f.is_elementwise and not layer.uses_head),
        penalty=penalty_of(regularizer, Layerwise(x, data.curvature, slope, eta)),
        weights=data.weights,
        learning_rate=eta,
        ok=ok,
    )
    return problem, state


def _gain_before_transfer(
    layer: Layer, arrays: LayerArrays, divergence: Divergence, a: Float[Array, "rows d_out"]
) -> Callable[[Array], Array] | None:
    """See `LocalProblem.gain`; the target's step cancels in it."""
    if divergence.name == "matching" and layer.uses_head:
        return _gain_of_head(arrays, a)
    f = identity() if layer.uses_head else layer.transfer
    if divergence.is_linear(f):
        return None
    residual = divergence.residual(f, a, jnp.zeros((1, 1), a.dtype))
    return lambda moved: residual(a + moved)


def _gain_of_head(arrays: LayerArrays, a: Float[Array, "rows d_out"]) -> Callable[[Array], Array]:
    """At an output layer the loss takes the matching loss's place, times the terms it averages.

    Proposition 4 then holds at gamma = that number.
    """
    head, shape = arrays.head, arrays.outputs.shape
    assert head is not None

    def gradient(a: Float[Array, "rows d_out"]) -> Float[Array, "rows d_out"]:
        return as_rows(head.gradient(a.reshape(shape)), a.dtype)

    start = gradient(a)  # the cotangents, unless a correction moved the outputs

    def gain(moved: Float[Array, "rows d_out"]) -> Float[Array, "rows d_out"]:
        return head.terms * (gradient(a + moved) - start)

    return gain
