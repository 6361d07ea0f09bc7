"""Weights used transposed: the table that tokens are looked up in, as the output layer's kernel.

A layer A = X W may have a use B = Z W' besides. Its gradient by W is F'Z for cotangents F, and a
change D of W moves it by |Z D'|^2, where a change of X W is |X D|^2: a metric by the outputs' side
of W, not by the inputs'. As rows of the layer, which all methods take, it is

    inputs u I    outputs u W    cotangents F'Z / u    with u^2 = |Z|^2 / d_out:

the gradient is exact, and so is the metric but for one thing. Where the entries of Z matter
differently (a lookup, whose Z'Z is the tokens' counts), each output gets their mean: the trace of
Z'Z is spread evenly. Such a layer has no bias: that is a layer of its own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from locoprop_jax import _linalg, losses
from locoprop_jax._layers.rows import Inputs, join_rows, pull
from locoprop_jax._layers.structured import OneHot, Structured
from locoprop_jax._layers.uses import Use
from locoprop_jax._tracing.jaxpr import Path
from locoprop_jax._tracing.operands import OneHotReader
from locoprop_jax._trees import ascent, real_dtype


@functools.partial(jax.tree_util.register_dataclass, data_fields=["use", "kernel"], meta_fields=[])
@dataclasses.dataclass(frozen=True, eq=False)
class Transposed:
    """What one batch left where a layer is applied transposed, as rows of the layer.

    An example's own are as many as the layer has inputs, and so are those of the batch together.

    Attributes:
      use: what was captured, in its own orientation.
      kernel: the layer's.
    """

    use: Use
    kernel: Float[Array, "d_in d_out"]

    def with_curvature(self, cotangents: Mapping[Path, Array]) -> Transposed:
        return dataclasses.replace(self, use=self.use.with_curvature(cotangents))

    def joined(self, parts: int) -> Transposed:
        return Transposed(self.use.joined(parts), self.kernel[0])  # the same in all parts

    # --- by example ------------------------------------------------------------------------------

    def read_inputs(self) -> Float[Array, "batch d_in d_in"]:
        identity = jnp.eye(len(self.kernel), dtype=self._dtype)
        return self._for_each(_linalg.scale(identity, self.unit(1)))

    def read_outputs(self) -> Float[Array, "batch d_in d_out"]:
        return self._for_each(_linalg.scale(self.kernel.astype(self._dtype), self.unit(1)))

    def read_cotangents(self) -> Float[Array, "batch d_in d_out"]:
        return self._cotangents_of(self.use.read_cotangents())

    def read_curvature(self) -> Float[Array, "samples batch d_in d_out"]:
        return jax.vmap(self._cotangents_of)(self.use.read_curvature())

    # --- of the batch ----------------------------------------------------------------------------

    def gradient(self) -> Float[Array, "d_in d_out"]:
        """F'Z, in the direction of ascent."""
        rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), self._rows)
        return self._gradient(rows, ascent(join_rows(self.use.read_cotangents())))

    def unit(self, examples: int | None = None) -> Float[Array, ""]:
        """The number u of so many examples, None for all."""
        rows, dtype = self._rows, self._dtype
        # The mean over rows of |z|^2, which is one for rows with a single one.
        mean = 1.0 if isinstance(rows, OneHot) else _linalg.squares(rows).sum(-1).mean()
        square = jnp.asarray(mean * self.count(examples) / self.kernel.shape[1], real_dtype(dtype))
        return jnp.sqrt(jnp.maximum(square, jnp.finfo(dtype).tiny))

    def count(self, examples: int | None = None) -> int:
        """How many rows Z has, of so many examples."""
        batch, shared, _ = self.use.read_outputs().shape
        return shared * (batch if examples is None else min(examples, batch))

    # --- what both are made of -------------------------------------------------------------------

    @property
    def _dtype(self) -> Any:
        return losses.working_dtype(self.kernel.dtype)

    @property
    def _rows(self) -> OneHot | Array:
        """Z, (batch, shared, d_out); of one-hot rows the places, (batch, shared)."""
        reader = self.use.layout.reader
        if isinstance(reader, OneHotReader):
            return OneHot(self.use.read_ids()[..., 0], reader.size, real_dtype(self._dtype))
        return self.use.read_inputs().astype(self._dtype)

    def _cotangents_of(
        self, cotangents: Float[Array, "batch shared d_in"]
    ) -> Float[Array, "batch d_in d_out"]:
        gradients = ascent(jax.vmap(self._gradient)(self._rows, ascent(cotangents)))
        return _linalg.scale(gradients, 1 / self.unit(1))

    def _gradient(
        self, rows: Inputs, cotangents: Float[Array, "rows d_in"]
    ) -> Float[Array, "d_in d_out"]:
        like = {"kernel": self.kernel}
        return pull(rows, cotangents.astype(self._dtype), like)["kernel"].T

    def _for_each(self, rows: Float[Array, "rows d"]) -> Float[Array, "batch rows d"]:
        batch = self.use.read_outputs().shape[-3]
        return jnp.broadcast_to(rows[None], (batch, *rows.shape))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["rows", "unit"], meta_fields=["counted"]
)
@dataclasses.dataclass(frozen=True, eq=False)
class Extended(Structured):
    """The rows of a layer's own uses, and those that stand for its transposed ones.

    Attributes:
      rows: of its own uses.
      unit: the number whose multiple of the identity follows them.
      counted: how many rows all uses together have.
    """

    rows: Float[Array, "rows d_in"]
    unit: Float[Array, ""]
    counted: int

    @property
    def count(self) -> int:
        return self.counted

    @property
    def dtype(self) -> Any:
        return self.rows.dtype

    @property
    def shape(self) -> tuple[int, int]:
        rows, d_in = self.rows.shape
        return rows + d_in, d_in

    def write_out(self) -> Float[Array, "more d_in"]:
        return jnp.concatenate([self.rows, _linalg.scale(self._identity, self.unit)])

    @property
    def _identity(self) -> Float[Array, "d_in d_in"]:
        return jnp.eye(self.rows.shape[1], dtype=self.dtype)

    def push(self, kernel: Float[Array, "d_in d_out"]) -> Float[Array, "more d_out"]:
        return jnp.concatenate([self.rows @ kernel, _linalg.scale(kernel, self.unit)])

    def pull(self, rows: Float[Array, "more d_out"]) -> Float[Array, "d_in d_out"]:
        own = len(self.rows)
        return _linalg.adjoint(self.rows) @ rows[:own] + _linalg.scale(rows[own:], self.unit)

    def second_moment(self) -> Float[Array, "d_in d_in"]:
        added = _linalg.scale(self._identity, jnp.square(self.unit))
        return _linalg.second_moment(self.rows) + added

    def between_rows(self) -> Float[Array, "more more"]:
        rows = self.write_out()
        return rows @ _linalg.adjoint(rows)

    def total(self) -> Float[Array, " d_in"]:
        return self.rows.sum(0) + self.unit.astype(self.dtype)

    def total_squares(self) -> Float[Array, " d_in"]:
        return _linalg.squares(self.rows).sum(0) + jnp.square(self.unit)
