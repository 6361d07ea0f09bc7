"""Rows of inputs that are not written out: they are larger than what they are read from.

A convolution's rows overlap; its products are convolutions. One-hot rows are known by the place of
their one; their second moment is diagonal.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import ConvDimensionNumbers
from jaxtyping import Array, Float, Int

from locoprop_jax import _linalg
from locoprop_jax._operands import Patches


class Structured(abc.ABC):
    """Rows X, an array (rows, d_in) that is not written out.

    Attributes:
      dtype: of its entries.
    """

    dtype: Any

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]:
        """As of the array."""

    def __len__(self) -> int:
        return self.shape[0]

    @abc.abstractmethod
    def write_out(self) -> Float[Array, "rows d_in"]:
        """The array itself."""

    @abc.abstractmethod
    def push(self, kernel: Float[Array, "d_in d_out"]) -> Float[Array, "rows d_out"]:
        """X kernel."""

    @abc.abstractmethod
    def pull(self, rows: Float[Array, "rows d_out"]) -> Float[Array, "d_in d_out"]:
        """X' rows."""

    @abc.abstractmethod
    def second_moment(self) -> Float[Array, "d_in d_in"] | Float[Array, " d_in"]:
        """X'X, or its diagonal where there is nothing else."""

    @abc.abstractmethod
    def between_rows(self) -> Float[Array, "rows rows"]:
        """XX'."""

    @abc.abstractmethod
    def total(self) -> Float[Array, " d_in"]:
        """The sum of the rows."""

    @abc.abstractmethod
    def total_squares(self) -> Float[Array, " d_in"]:
        """The sum of the rows' squares."""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["ids"], meta_fields=["size", "dtype"]
)
@dataclasses.dataclass(frozen=True, eq=False)
class OneHot(Structured):
    """Rows with a single one each.

    Attributes:
      ids: its place in each row.
      size: how long they are.
      dtype: what they count as.
    """

    ids: Int[Array, " rows"]
    size: int
    dtype: Any

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.ids), self.size

    def write_out(self) -> Float[Array, "rows d_in"]:
        return jax.nn.one_hot(self.ids, self.size, dtype=self.dtype)

    def push(self, kernel: Float[Array, "d_in d_out"]) -> Float[Array, "rows d_out"]:
        return kernel.at[self.ids].get(mode="fill", fill_value=0)

    def pull(self, rows: Float[Array, "rows d_out"]) -> Float[Array, "d_in d_out"]:
        zeros = jnp.zeros((self.size, rows.shape[1]), rows.dtype)
        return zeros.at[self.ids].add(rows, mode="drop")

    def second_moment(self) -> Float[Array, " d_in"]:
        return self.total()

    def between_rows(self) -> Float[Array, "rows rows"]:
        return (self.ids[:, None] == self.ids[None]).astype(self.dtype)

    def total(self) -> Float[Array, " d_in"]:
        return jnp.zeros(self.size, self.dtype).at[self.ids].add(1, mode="drop")

    def total_squares(self) -> Float[Array, " d_in"]:
        return self.total()


@functools.partial(jax.tree_util.register_dataclass, data_fields=["data"], meta_fields=["patches"])
@dataclasses.dataclass(frozen=True, eq=False)
class Windows(Structured):
    """What a convolution's kernel meets, a row for each pixel of each example.

    Attributes:
      data: what it is moved over.
      patches: how; without feature groups.
    """

    data: Float[Array, "..."]
    patches: Patches

    @property
    def dtype(self) -> Any:
        return self.data.dtype

    @property
    def shape(self) -> tuple[int, int]:
        batch, *pixels, d_in = self._canonical.shape(self.data.shape)
        return batch * math.prod(pixels), d_in

    @property
    def _canonical(self) -> Patches:
        """Those that come as (batch, *pixels, d_in)."""
        n = len(self.patches.window)
        return dataclasses.replace(self.patches, out_axes=(0, n + 1, *range(1, n + 1)))

    def write_out(self) -> Float[Array, "rows d_in"]:
        rows, window = self._unfolded(self.data), self.patches.window
        return jnp.moveaxis(rows.reshape(len(rows), math.prod(window), -1), 1, 2).reshape(
            self.shape
        )

    def push(self, kernel: Float[Array, "d_in d_out"]) -> Float[Array, "rows d_out"]:
        patches, n, d_out = self._canonical, len(self.patches.window), kernel.shape[1]
        outputs = jax.lax.conv_general_dilated(
            self.data,
            kernel.reshape(-1, *patches.window, d_out),
            patches.strides,
            patches.padding,
            patches.data_dilation,
            patches.window_dilation,
            ConvDimensionNumbers(patches.data_axes, (n + 1, 0, *range(1, n + 1)), patches.out_axes),
        )
        return outputs.reshape(-1, d_out)

    def pull(self, rows: Float[Array, "rows d_out"]) -> Float[Array, "d_in d_out"]:
        d_out = rows.shape[1]
        if jax.default_backend() != "cpu":
            kernel = jax.ShapeDtypeStruct((self.shape[1], d_out), rows.dtype)
            return jax.linear_transpose(self.push, kernel)(rows)[0]
        # A CPU's convolutions are slow backwards.
        of_examples = rows.reshape(self._batch, -1, d_out)
        product = self._sum(lambda x, e: x.T @ e.reshape(-1, d_out), of_examples)
        return self._in_order(product)

    def second_moment(self) -> Float[Array, "d_in d_in"]:
        return self._in_order(self._in_order(self._sum(_linalg.second_moment)).T)

    def between_rows(self) -> Float[Array, "rows rows"]:
        rows = self._unfolded(self.data)
        return rows @ rows.T

    def total(self) -> Float[Array, " d_in"]:
        return self.pull(jnp.ones((len(self), 1), self.dtype))[:, 0]

    def total_squares(self) -> Float[Array, " d_in"]:
        return dataclasses.replace(self, data=jnp.square(self.data)).total()

    # Written out, the rows are (*window, channels): a channel's neighbours are copied at once.

    @property
    def _batch(self) -> int:
        return self.data.shape[self.patches.data_axes[0]]

    def _unfolded(self, data: Array) -> Float[Array, "rows d"]:
        """The rows of some examples."""
        patches = self.patches
        window = math.prod(patches.window)
        if window > 64:  # as many slices would take long to compile
            rows = self._canonical(data)
            rows = jnp.moveaxis(rows.reshape(-1, rows.shape[-1] // window, window), 1, 2)
            return rows.reshape(len(rows), -1)
        data = jnp.moveaxis(data, patches.data_axes, (0, -1, *range(1, data.ndim - 1)))
        sides = zip(patches.padding, patches.data_dilation, strict=True)
        pads = [(0, 0, 0), *((*pad, by - 1) for pad, by in sides), (0, 0, 0)]
        data = jax.lax.pad(data, jnp.zeros((), data.dtype), pads)
        _, *pixels, _ = self._canonical.shape(self.data.shape)

        def at(offset: tuple[int, ...]) -> Array:
            starts = [i * by for i, by in zip(offset, patches.window_dilation, strict=True)]
            spans = zip(starts, pixels, patches.strides, strict=True)
            cuts = [slice(a, a + (n - 1) * by + 1, by) for a, n, by in spans]
            return data[:, *cuts]

        rows = jnp.concatenate([at(offset) for offset in np.ndindex(*patches.window)], -1)
        return rows.reshape(-1, rows.shape[-1])

    def _in_order(self, product: Float[Array, "d m"]) -> Float[Array, "d_in m"]:
        """From (*window, channels) to the (channels, *window) of the weights."""
        window, (d_in, m) = math.prod(self.patches.window), product.shape
        return jnp.swapaxes(product.reshape(window, -1, m), 0, 1).reshape(d_in, m)

    def _sum(self, product: Callable[..., Array], *others: Float[Array, "batch ..."]) -> Array:
        """A product summed over examples, so few at a time that their rows take little memory."""
        axis, (rows, d_in) = self.patches.data_axes[0], self.shape
        batch = self._batch
        most = max(self.data.size, 2**20)  # no more entries than the data has, if these are many
        size = max(1, min(batch, batch * most // max(rows * d_in, 1)))
        times, rest = divmod(batch, size)

        def of(start: Any, size: int) -> Array:
            def cut(x: Array, axis: int = 0) -> Array:
                return jax.lax.dynamic_slice_in_dim(x, start, size, axis)

            return product(self._unfolded(cut(self.data, axis)), *map(cut, others))

        total = of(0, size)
        if times > 1:
            add = lambda i, total: total + of(i * size, size)  # noqa: E731
            total = jax.lax.fori_loop(1, times, add, total)
        return total + of(times * size, rest) if rest else total
