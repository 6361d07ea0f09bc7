"""Complex rows that a real kernel meets.

A change D of a real kernel moves complex outputs by X D, and their squared length is that of D in
the real part of X'X. The part that D could not follow, of gradients as of moments, drops out.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float

from locoprop_jax._layers import rows as _rows
from locoprop_jax._layers.rows import Inputs
from locoprop_jax._layers.structured import Structured
from locoprop_jax._trees import complex_dtype, real_dtype


@functools.partial(jax.tree_util.register_dataclass, data_fields=["rows"], meta_fields=[])
@dataclasses.dataclass(frozen=True, eq=False)
class RealPart(Structured):
    """Rows as they act on real kernels: what is pulled through them, and their moments, is real.

    Attributes:
      rows: complex; with the axis of a stack in front.
    """

    rows: Inputs

    @property
    def dtype(self) -> Any:
        return real_dtype(self.rows.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        rows, d_in = self.rows.shape
        return rows, d_in

    @property
    def count(self) -> int:
        return _rows.count(self.rows)

    def write_out(self) -> Complex[Array, "rows d_in"]:
        return _rows.write_out(self.rows)

    def push(self, kernel: Float[Array, "d_in d_out"]) -> Complex[Array, "rows d_out"]:
        return _rows.times(self.rows, kernel.astype(complex_dtype(kernel.dtype)))

    def pull(self, rows: Complex[Array, "rows d_out"]) -> Float[Array, "d_in d_out"]:
        return jnp.real(_rows.turned_times(self.rows, rows))

    def second_moment(self) -> Float[Array, "d_in d_in"]:
        return jnp.real(_rows.second_moment(self.rows))

    def between_rows(self) -> Complex[Array, "rows rows"]:
        return _rows.between_rows(self.rows)

    def total(self) -> Float[Array, " d_in"]:
        return jnp.real(_rows.mean(self.rows)) * self.count

    def total_squares(self) -> Float[Array, " d_in"]:
        return _rows.mean_square(self.rows) * self.count
