"""The loss as a function of an output layer's outputs."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from jaxtyping import Array, Float

from locoprop_jax._layers.uses import Layout
from locoprop_jax._tracing import chains, jaxpr
from locoprop_jax._tracing.jaxpr import StaticJaxpr


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["free"],
    meta_fields=["function", "layout", "dtype", "terms", "parts"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Head:
    """What lies between an output layer and the loss: the loss as a function of its outputs.

    Attributes:
      free: the other arrays the loss needs (labels, weights), held fixed.
      function: loss(raw outputs, *free), traced.
      layout: the layer's layout.
      dtype: of the raw outputs.
      terms: how many terms the loss averages over (mathematics: c), the number of rows where the
        loss does not show it.
      parts: of how many batches this is the mean loss, one after the other; None for one batch,
        else `free` has their axis in front.
    """

    free: tuple[Array, ...]
    function: StaticJaxpr
    layout: Layout
    dtype: Any
    terms: float
    parts: int | None = None

    def loss(self, outputs: Float[Array, "batch shared d_out"]) -> Float[Array, ""]:
        """The loss, were these the layer's outputs."""
        if self.parts is None:
            return self._loss(outputs, self.free)
        of_parts = outputs.reshape(self.parts, -1, *outputs.shape[1:])
        return jax.vmap(self._loss)(of_parts, self.free).mean()

    def _loss(self, outputs: Array, free: tuple[Array, ...]) -> Float[Array, ""]:
        raw = chains.apply(self.layout.outputs_back, outputs).astype(self.dtype)
        return jaxpr.as_callable(self.function.closed)(raw, *free)[0]

    def gradient(
        self, outputs: Float[Array, "batch shared d_out"]
    ) -> Float[Array, "batch shared d_out"]:
        """dL/dA at these outputs; at the captured ones it equals the cotangents."""
        return jax.grad(self.loss)(outputs)
