"""Weights used transposed: the table that tokens are looked up in, as the output layer's kernel.

A layer A = X W + b may have a use B = Z W' besides. Its gradient by W is F'Z for cotangents F, and
a change D of W moves it by |Z D'|^2, where a change of X W is |X D|^2: a metric by the outputs'
side of W, not by the inputs'. As rows of the layer, which all methods take, it is

    inputs +-u I    outputs +-u W + b    cotangents +-F'Z / 2u    with 2 u^2 = |Z|^2 / d_out:

the gradient is exact, and so is the metric but for one thing. Where the entries of Z matter
differently (a lookup, whose Z'Z is the tokens' counts), each output gets their mean: the trace of
Z'Z is spread evenly. Of both signs, so that neither the gradient of a bias nor the mean of the
inputs sees them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from locoprop_jax._jaxpr import Path
from locoprop_jax._operands import OneHotReader
from locoprop_jax._rows import Block, Inputs, join_rows, pull
from locoprop_jax._structured import OneHot
from locoprop_jax._uses import Use


@functools.partial(jax.tree_util.register_dataclass, data_fields=["use", "weights"], meta_fields=[])
@dataclasses.dataclass(frozen=True, eq=False)
class Transposed:
    """What one batch left where a layer is applied transposed, as rows of the layer.

    An example's own are twice as many as the layer has inputs. The batch's together are no more
    than those of one example: `merged_inputs` and so on.

    Attributes:
      use: what was captured, in its own orientation.
      weights: the layer's.
    """

    use: Use
    weights: Block

    def with_curvature(self, cotangents: Mapping[Path, Array]) -> Transposed:
        return dataclasses.replace(self, use=self.use.with_curvature(cotangents))

    def joined(self, parts: int) -> Transposed:
        weights = {part: own[0] for part, own in self.weights.items()}  # the same in all parts
        return Transposed(self.use.joined(parts), weights)

    # --- by example ------------------------------------------------------------------------------

    def read_inputs(self) -> Float[Array, "batch shared d_in"]:
        return self._for_each(self.merged_inputs(1))

    def read_outputs(self) -> Float[Array, "batch shared d_out"]:
        return self._for_each(self._outputs_of(1))

    def read_cotangents(self) -> Float[Array, "batch shared d_out"]:
        return self._cotangents_of(self.use.read_cotangents())

    def read_curvature(self) -> Float[Array, "samples batch shared d_out"]:
        return jax.vmap(self._cotangents_of)(self.use.read_curvature())

    # --- of the batch ----------------------------------------------------------------------------

    def merged_inputs(self, examples: int | None = None) -> Float[Array, "rows d_in"]:
        """Of so many examples, None for all."""
        kernel = self._kernel
        return _signed(self._unit(examples) * jnp.eye(len(kernel), dtype=kernel.dtype))

    def merged_outputs(self) -> Float[Array, "rows d_out"]:
        return self._outputs_of(None)

    def merged_cotangents(self) -> Float[Array, "rows d_out"]:
        rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), self._rows)
        gradient = self._gradient(rows, join_rows(self.use.read_cotangents()))
        return _signed(gradient / (2 * self._unit(None)))

    # --- what both are made of -------------------------------------------------------------------

    @property
    def _kernel(self) -> Float[Array, "d_in d_out"]:
        return self.weights["kernel"]

    @property
    def _rows(self) -> OneHot | Array:
        """Z, (batch, shared, d_out); of one-hot rows the places, (batch, shared)."""
        reader, dtype = self.use.layout.reader, self._kernel.dtype
        if isinstance(reader, OneHotReader):
            return OneHot(self.use.read_ids()[..., 0], reader.size, dtype)
        return self.use.read_inputs().astype(dtype)

    def _unit(self, examples: int | None) -> Float[Array, ""]:
        """That of so many examples, u; None for all."""
        rows, dtype = self._rows, self._kernel.dtype
        if isinstance(rows, OneHot):
            batch, shared = rows.ids.shape
            square = jnp.asarray(shared, dtype)
        else:
            batch = len(rows)
            square = jnp.square(rows).sum() / batch
        count = batch if examples is None else min(examples, batch)
        square = square * (count / (2 * self._kernel.shape[1]))
        return jnp.sqrt(jnp.maximum(square, jnp.finfo(dtype).tiny))

    def _outputs_of(self, examples: int | None) -> Float[Array, "rows d_out"]:
        outputs = _signed(self._unit(examples) * self._kernel)
        return outputs + self.weights["bias"][None] if "bias" in self.weights else outputs

    def _cotangents_of(
        self, cotangents: Float[Array, "batch shared d_in"]
    ) -> Float[Array, "batch rows d_out"]:
        gradients = jax.vmap(self._gradient)(self._rows, cotangents)
        return _signed(gradients / (2 * self._unit(1)))

    def _gradient(
        self, rows: Inputs, cotangents: Float[Array, "rows d_in"]
    ) -> Float[Array, "d_in d_out"]:
        """F'Z."""
        like = {"kernel": self._kernel}
        return pull(rows, cotangents.astype(self._kernel.dtype), like)["kernel"].T

    def _for_each(self, rows: Float[Array, "rows d"]) -> Float[Array, "batch rows d"]:
        batch = self.use.read_outputs().shape[-3]
        return jnp.broadcast_to(rows[None], (batch, *rows.shape))


def _signed(rows: Float[Array, "*batch rows d"]) -> Float[Array, "*batch more d"]:
    return jnp.concatenate([rows, -rows], -2)
