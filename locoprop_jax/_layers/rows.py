"""The rows X of a layer's inputs, and what methods do with them.

They are an array, or `Structured`: known by less than that, and not written out.

They may be complex: X' is then the conjugate transpose, and the rows that it meets are conjugated
cotangents, so that X'E is the direction in which the loss rises (`ascent`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from locoprop_jax import _linalg
from locoprop_jax._layers.structured import Structured
from locoprop_jax._trees import is_complex

Block = dict[str, Array]  # {"kernel": (d_in, d_out), "bias": (d_out,)}, or one of the two
Rows = Float[Array, "rows d_out"]


Inputs = Float[Array, "rows d_in"] | Structured


def count(inputs: Inputs) -> int:
    """N, over which means are taken."""
    return inputs.count if isinstance(inputs, Structured) else len(inputs)


def as_rows(x: Float[Array, "... d"], dtype: Any) -> Float[Array, "rows d"]:
    """All axes but the last joined, in the dtype of a block."""
    return x.reshape(-1, x.shape[-1]).astype(dtype)


def join_rows(x: Float[Array, "*stack batch shared d"], axes: int = 2) -> Array:
    """So many axes in front of the last, all that count rows, as one: (*stack, rows, d)."""
    end = x.ndim - 1
    rows = math.prod(x.shape[end - axes : end])
    return x.reshape(*x.shape[: end - axes], rows, x.shape[-1])


# --- products ------------------------------------------------------------------------------------


def times(inputs: Inputs, kernel: Float[Array, "d_in d_out"]) -> Rows:
    """X kernel."""
    return inputs.push(kernel) if isinstance(inputs, Structured) else inputs @ kernel


def turned_times(inputs: Inputs, rows: Rows) -> Float[Array, "d_in d_out"]:
    """X' rows."""
    if isinstance(inputs, Structured):
        return inputs.pull(rows)
    return _linalg.adjoint(inputs) @ rows


def push(inputs: Inputs, delta: Block) -> Rows:
    """How much the outputs move: X delta."""
    bias = delta.get("bias")
    if "kernel" not in delta:
        assert bias is not None
        return jnp.broadcast_to(bias[None], (inputs.shape[0], *bias.shape))
    change = times(inputs, delta["kernel"])
    return change if bias is None else change + bias[None].astype(change.dtype)


def pull(inputs: Inputs, rows: Rows, like: Block) -> Block:
    """X' rows, in the parts that `like` has."""

    def bias() -> Array:
        total = rows.sum(0)
        return total if is_complex(like["bias"].dtype) else jnp.real(total)

    parts = {"kernel": lambda: turned_times(inputs, rows), "bias": bias}
    return {part: parts[part]() for part in like}


def gram(inputs: Inputs) -> Callable[[Block], Block]:
    """The map delta -> X'X delta, with X'X computed once."""
    products, rows = second_moment(inputs), count(inputs)
    total = mean(inputs) * rows

    def apply(delta: Block) -> Block:
        kernel, bias = delta.get("kernel"), delta.get("bias")
        result = {}
        if kernel is not None:
            result["kernel"] = _linalg.multiply(products, kernel)
            if bias is not None:
                result["kernel"] += jnp.conj(total)[:, None] * bias[None]
        if bias is not None:
            result["bias"] = rows * bias
            if kernel is not None:
                result["bias"] += total @ kernel
        return result

    return apply


def second_moment(inputs: Inputs) -> Float[Array, "d_in d_in"] | Float[Array, " d_in"]:
    """X'X, or its diagonal where there is nothing else."""
    if isinstance(inputs, Structured):
        return inputs.second_moment()
    return _linalg.second_moment(inputs)


def extended_moment(inputs: Inputs, like: Block) -> Float[Array, "d d"] | Float[Array, " d"]:
    """The second moment of `extend`ed rows, or its diagonal where there is nothing else."""
    if not isinstance(inputs, Structured):
        return _linalg.second_moment(extend(inputs, like))
    rows = jnp.full((1,), inputs.count, inputs.dtype)
    if "kernel" not in like:
        return rows[None]
    products = inputs.second_moment()
    if "bias" not in like or products.ndim == 1:  # what is looked up has no bias
        return products
    total = inputs.total()[None]
    return jnp.block([[products, _linalg.adjoint(total)], [total, rows[None]]])


def extended_squares(inputs: Inputs, like: Block) -> Float[Array, " d"]:
    """The diagonal of `extended_moment`."""
    squares = mean_square(inputs) * count(inputs)
    rows = jnp.full((1,), count(inputs), squares.dtype)
    columns = {"kernel": squares, "bias": rows}
    return jnp.concatenate([columns[part] for part in ("kernel", "bias") if part in like])


def between_rows(inputs: Inputs) -> Float[Array, "rows rows"]:
    """XX'."""
    if isinstance(inputs, Structured):
        return inputs.between_rows()
    return inputs @ _linalg.adjoint(inputs)


def mean(inputs: Inputs) -> Float[Array, " d_in"]:
    return inputs.total() / inputs.count if isinstance(inputs, Structured) else inputs.mean(0)


def mean_square(inputs: Inputs) -> Float[Array, " d_in"]:
    if isinstance(inputs, Structured):
        return inputs.total_squares() / inputs.count
    return _linalg.squares(inputs).mean(0)


def write_out(inputs: Inputs) -> Float[Array, "rows d_in"]:
    """As an array."""
    return inputs.write_out() if isinstance(inputs, Structured) else inputs


def extend(inputs: Inputs, like: Block) -> Float[Array, "*rows d"]:
    """X with a column of ones for a bias: what multiplies the block as one matrix.

    Rows that are an array may have several axes.
    """
    inputs = write_out(inputs)
    ones = jnp.ones((*inputs.shape[:-1], 1), inputs.dtype)
    columns = {"kernel": inputs, "bias": ones}
    return jnp.concatenate([columns[part] for part in ("kernel", "bias") if part in like], -1)
