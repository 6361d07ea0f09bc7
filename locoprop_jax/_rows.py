"""The rows X of a layer's inputs, and what methods do with them.

They are an array, or one-hot rows known by the number of their one: those of an embedding, whose
second moment is then diagonal and which is never written out.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from locoprop_jax import _linalg

Block = dict[str, Array]  # {"kernel": (d_in, d_out), "bias": (d_out,)}, or one of the two
Rows = Float[Array, "rows d_out"]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["ids"], meta_fields=["size", "dtype"]
)
@dataclasses.dataclass(frozen=True, eq=False)
class OneHot:
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

    def __len__(self) -> int:
        return len(self.ids)

    def total(self) -> Float[Array, " d_in"]:
        """How often each place has a one."""
        return jnp.zeros(self.size, self.dtype).at[self.ids].add(1, mode="drop")

    def write_out(self) -> Float[Array, "rows d_in"]:
        return jax.nn.one_hot(self.ids, self.size, dtype=self.dtype)


Inputs = Float[Array, "rows d_in"] | OneHot


def as_rows(x: Float[Array, "... d"], dtype: Any) -> Float[Array, "rows d"]:
    """All axes but the last joined, in the dtype of a block."""
    return x.reshape(-1, x.shape[-1]).astype(dtype)


def join_rows(x: Float[Array, "*stack batch shared d"], axes: int = 2) -> Array:
    """So many axes in front of the last, all that count rows, as one: (*stack, rows, d)."""
    end = x.ndim - 1
    rows = math.prod(x.shape[end - axes : end])
    return x.reshape(*x.shape[: end - axes], rows, x.shape[-1])


# --- products ------------------------------------------------------------------------------------


def push(inputs: Inputs, delta: Block) -> Rows:
    """How much the outputs move: X delta."""
    bias = delta.get("bias")
    if "kernel" not in delta:
        assert bias is not None
        return jnp.broadcast_to(bias[None], (len(inputs), *bias.shape))
    if isinstance(inputs, OneHot):
        change = delta["kernel"].at[inputs.ids].get(mode="fill", fill_value=0)
    else:
        change = inputs @ delta["kernel"]
    return change if bias is None else change + bias[None]


def pull(inputs: Inputs, rows: Rows, like: Block) -> Block:
    """X' rows, in the parts that `like` has."""

    def kernel() -> Array:
        if isinstance(inputs, OneHot):
            zeros = jnp.zeros((inputs.size, rows.shape[1]), rows.dtype)
            return zeros.at[inputs.ids].add(rows, mode="drop")
        return inputs.T @ rows

    parts = {"kernel": kernel, "bias": lambda: rows.sum(0)}
    return {part: parts[part]() for part in like}


def gram(inputs: Inputs) -> Callable[[Block], Block]:
    """The map delta -> X'X delta, with X'X computed once."""
    products, total, rows = second_moment(inputs), mean(inputs) * len(inputs), len(inputs)

    def apply(delta: Block) -> Block:
        kernel, bias = delta.get("kernel"), delta.get("bias")
        result = {}
        if kernel is not None:
            result["kernel"] = _linalg.multiply(products, kernel)
            if bias is not None:
                result["kernel"] += total[:, None] * bias[None]
        if bias is not None:
            result["bias"] = rows * bias
            if kernel is not None:
                result["bias"] += total @ kernel
        return result

    return apply


def second_moment(inputs: Inputs) -> Float[Array, "d_in d_in"] | Float[Array, " d_in"]:
    """X'X, or its diagonal where there is nothing else."""
    return inputs.total() if isinstance(inputs, OneHot) else _linalg.second_moment(inputs)


def between_rows(inputs: Inputs) -> Float[Array, "rows rows"]:
    """XX'."""
    if isinstance(inputs, OneHot):
        return (inputs.ids[:, None] == inputs.ids[None]).astype(inputs.dtype)
    return inputs @ inputs.T


def mean(inputs: Inputs) -> Float[Array, " d_in"]:
    return inputs.total() / len(inputs) if isinstance(inputs, OneHot) else inputs.mean(0)


def mean_square(inputs: Inputs) -> Float[Array, " d_in"]:
    return mean(inputs) if isinstance(inputs, OneHot) else jnp.square(inputs).mean(0)


def write_out(inputs: Inputs) -> Float[Array, "rows d_in"]:
    """As an array."""
    return inputs.write_out() if isinstance(inputs, OneHot) else inputs


def extend(inputs: Inputs, like: Block) -> Float[Array, "*rows d"]:
    """X with a column of ones for a bias: what multiplies the block as one matrix.

    Rows that are an array may have several axes.
    """
    inputs = write_out(inputs)
    ones = jnp.ones((*inputs.shape[:-1], 1), inputs.dtype)
    columns = {"kernel": inputs, "bias": ones}
    return jnp.concatenate([columns[part] for part in ("kernel", "bias") if part in like], -1)
