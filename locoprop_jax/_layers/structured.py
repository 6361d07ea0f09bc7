"""Rows of inputs that are not written out: they are larger than what they are read from.

A convolution's rows overlap; its products are convolutions. One-hot rows are known by the place of
their one; their second moment is diagonal.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import ConvDimensionNumbers
from jaxtyping import Array, Float, Int

from locoprop_jax import _linalg
from locoprop_jax._tracing.operands import Patches


class Structured(abc.ABC):
    """Rows X, an array (rows, d_in) that is not written out; X' is its conjugate transpose.

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

    @property
    def count(self) -> int:
        """Over how many rows a mean is taken."""
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
        """The sum of the rows' squares, |x|^2."""


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
        # Features last and the window first: XLA for CPUs is slow in all other layouts where it
        # finds them in loops and conditionals.
        patches, d_out = self.patches, kernel.shape[1]
        by_window = jnp.swapaxes(kernel.reshape(-1, math.prod(patches.window), d_out), 0, 1)
        space = range(1, len(patches.window) + 1)
        data_axes = (0, len(space) + 1, *space)
        kernel_axes = (len(space) + 1, len(space), *range(len(space)))
        outputs = jax.lax.conv_general_dilated(
            self._features_last(self.data),
            by_window.reshape(*patches.window, -1, d_out),
            patches.strides,
            patches.padding,
            patches.data_dilation,
            patches.window_dilation,
            ConvDimensionNumbers(data_axes, kernel_axes, data_axes),
        )
        return outputs.reshape(-1, d_out)

    def pull(self, rows: Float[Array, "rows d_out"]) -> Float[Array, "d_in d_out"]:
        if jax.default_backend() != "cpu":
            kernel = jax.ShapeDtypeStruct((self.shape[1], rows.shape[1]), rows.dtype)
            return jnp.conj(jax.linear_transpose(self.push, kernel)(jnp.conj(rows))[0])
        # A CPU's convolutions are slow backwards: one product for each place of the window.
        patches, data = self.patches, self._padded(self.data)
        batch, *pixels, _ = self._canonical.shape(self.data.shape)
        spans = [(n - 1) * by + 1 for n, by in zip(pixels, patches.strides, strict=True)]
        places = np.asarray(list(np.ndindex(1, *patches.window, 1)), np.int32)
        places *= np.asarray((1, *patches.window_dilation, 1), np.int32)

        def at(place: Int[Array, " axes"]) -> Float[Array, "channels d_out"]:
            part = jax.lax.dynamic_slice(data, tuple(place), (batch, *spans, data.shape[-1]))[
                :, *(slice(None, None, by) for by in patches.strides)
            ]
            return _linalg.adjoint(part.reshape(len(rows), -1)) @ rows

        products = jax.lax.map(at, jnp.asarray(places))
        return self._in_order(products.reshape(-1, rows.shape[1]))

    def second_moment(self) -> Float[Array, "d_in d_in"]:
        """Of so few examples at a time that their rows take no more memory than all data."""
        axis, (rows, d_in) = self.patches.data_axes[0], self.shape
        batch = self.data.shape[axis]
        most = max(self.data.size, 2**20)
        size = max(1, min(batch, batch * most // max(rows * d_in, 1)))
        times, rest = divmod(batch, size)

        def of(start: Any, size: int) -> Array:
            data = jax.lax.dynamic_slice_in_dim(self.data, start, size, axis)
            return _linalg.second_moment(self._unfolded(data))

        total = jnp.zeros((d_in, d_in), self.dtype)
        total = jax.lax.fori_loop(0, times, lambda i, total: total + of(i * size, size), total)
        total = total + of(times * size, rest) if rest else total
        return self._in_order(_linalg.adjoint(self._in_order(total)))

    def between_rows(self) -> Float[Array, "rows rows"]:
        rows = self._unfolded(self.data)
        return rows @ _linalg.adjoint(rows)

    def total(self) -> Float[Array, " d_in"]:
        # The rows are linear in the data, so examples can be summed first.
        data = self.data.sum(self.patches.data_axes[0], keepdims=True)
        return dataclasses.replace(self, data=data).write_out().sum(0)

    def total_squares(self) -> Float[Array, " d_in"]:
        return dataclasses.replace(self, data=_linalg.squares(self.data)).total()

    def _features_last(self, data: Array) -> Float[Array, "batch *space channels"]:
        return jnp.moveaxis(data, self.patches.data_axes, (0, -1, *range(1, data.ndim - 1)))

    def _padded(self, data: Array) -> Float[Array, "batch *space channels"]:
        sides = zip(self.patches.padding, self.patches.data_dilation, strict=True)
        pads = [(0, 0, 0), *((*pad, by - 1) for pad, by in sides), (0, 0, 0)]
        return jax.lax.pad(self._features_last(data), jnp.zeros((), data.dtype), pads)

    # Written out, rows are (*window, channels): a channel's neighbours are copied at once.

    def _unfolded(self, data: Array) -> Float[Array, "rows d"]:
        """The rows of some examples."""
        patches, n = self.patches, len(self.patches.window)
        _, *pixels, d_in = self._canonical.shape(self.data.shape)
        places = []
        for axis in range(n):
            starts = np.arange(pixels[axis])[:, None] * patches.strides[axis]
            offsets = np.arange(patches.window[axis])[None] * patches.window_dilation[axis]
            shape = [1] * (2 * n)  # (*pixels, *window)
            shape[axis], shape[n + axis] = pixels[axis], patches.window[axis]
            places.append((starts + offsets).reshape(shape))
        return self._padded(data)[:, *places].reshape(-1, d_in)

    def _in_order(self, product: Float[Array, "d m"]) -> Float[Array, "d_in m"]:
        """From (*window, channels) to the (channels, *window) of the weights."""
        window, (d_in, m) = math.prod(self.patches.window), product.shape
        return jnp.swapaxes(product.reshape(window, -1, m), 0, 1).reshape(d_in, m)
