"""One layer's local problem, and the coordinates in which its iterates are cheapest.

A solver looks for the displacement delta = W~ - W of a layer's weights. The local loss has

    gradient at W + delta = slope + X' gain(X delta) + gradient of the regularizer at delta

with slope the incoming updates (times gamma), so the first iteration needs no matrix product. The
input X never changes, which offers three ways to iterate. Choose by their flops:

    direct   delta itself, two products with X in each iteration
    gram     delta itself, X'X once (squared losses only)
    dual     delta = s slope + X'Y, with Y of one row per example and XX' once (plain steps only)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from locoprop_jax import _linalg

Block = dict[str, Array]  # {"kernel": (d_in, d_out), "bias": (d_out,)}, or one of the two
Rows = Float[Array, "rows d_out"]

PATHS = ("direct", "gram", "dual")


class Penalty(NamedTuple):
    """A regularizer at work in one layer: zero, with gradient zero, at delta = 0.

    Attributes:
      gradient: its gradient at a displacement.
      solve: the inverse of `gradient`, where that is a positive definite linear map.
      weight: lambda_r, where the regularizer is lambda_r / 2 |delta|^2.
      shrink: the proximal step of size eta, `shrink(delta, eta)`, which stands in for a gradient.
      factors: (weight, A, B) where the gradient is weight A delta B, on blocks as matrices.
    """

    gradient: Callable[[Block], Block] | None = None
    solve: Callable[[Block], Block] | None = None
    weight: Array | None = None
    shrink: Callable[[Block, Array], Block] | None = None
    factors: tuple[Array, Array, Array] | None = None


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
    inputs: Float[Array, "rows d_in"]
    cotangents: Rows
    gain: Callable[[Rows], Rows] | None
    outputs_apart: bool
    penalty: Penalty
    weights: Block
    learning_rate: Float[Array, ""]
    ok: Bool[Array, ""]


# --- a block and the rows ------------------------------------------------------------------------


def push(inputs: Float[Array, "rows d_in"], delta: Block) -> Rows:
    """How much the outputs move: X delta."""
    bias = delta.get("bias")
    if "kernel" not in delta:
        assert bias is not None
        return jnp.broadcast_to(bias[None], (len(inputs), *bias.shape))
    change = inputs @ delta["kernel"]
    return change if bias is None else change + bias[None]


def pull(inputs: Float[Array, "rows d_in"], rows: Rows, like: Block) -> Block:
    """X' rows, in the parts that `like` has."""
    parts = {"kernel": lambda: inputs.T @ rows, "bias": lambda: rows.sum(0)}
    return {part: parts[part]() for part in like}


def extend(inputs: Float[Array, "rows d_in"], like: Block) -> Float[Array, "rows d"]:
    """X with a column of ones for a bias: what multiplies the block as one matrix."""
    ones = jnp.ones((len(inputs), 1), inputs.dtype)
    columns = {"kernel": inputs, "bias": ones}
    return jnp.concatenate([columns[part] for part in _parts(like)], 1)


def matrix(block: Block) -> Float[Array, "d d_out"]:
    """A block as one matrix, the bias its last row."""
    return jnp.concatenate(
        [block[part].reshape(-1, block[part].shape[-1]) for part in _parts(block)]
    )


def unmatrix(value: Float[Array, "d d_out"], like: Block) -> Block:
    """The inverse of `matrix`."""
    parts = {"kernel": lambda: value[: like["kernel"].shape[0]], "bias": lambda: value[-1]}
    return {part: parts[part]() for part in like}


def _parts(block: Block) -> list[str]:
    return [part for part in ("kernel", "bias") if part in block]


# --- coordinates ---------------------------------------------------------------------------------


class Coordinates(NamedTuple):
    """Where iterates live: any tree, a zero tree for delta = 0.

    Attributes:
      slope: the gradient of the local loss at zero.
      gain: what that gradient gains away from zero.
      block: the displacement that a tree stands for.
    """

    slope: Any
    gain: Callable[[Any], Any]
    block: Callable[[Any], Block]


def path_flops(rows: int, d_in: int, d_out: int, iterations: int) -> dict[str, int]:
    """The flops of each path's matrix products for `iterations`, of which the first is free."""
    later = iterations - 1
    return {
        "direct": later * 4 * rows * d_in * d_out,
        "gram": 2 * rows * d_in**2 + later * 2 * d_in**2 * d_out,
        "dual": 2 * rows**2 * d_in + 4 * rows * d_in * d_out + later * 2 * rows**2 * d_out,
    }


def cheapest_path(rows: int, d_in: int, d_out: int, iterations: int, usable: Sequence[str]) -> str:
    """What "auto" takes of the usable paths."""
    costs = path_flops(rows, d_in, d_out, iterations)
    return min(usable, key=lambda path: costs[path])


def coordinates(problem: LocalProblem, iterations: int, path: str, allowed: Any) -> Coordinates:
    """The cheapest coordinates for so many iterations, or those that `path` names.

    Args:
      problem: the layer.
      iterations: how many gradients the solver takes, counting the one at W.
      path: "auto", or one of `PATHS` (tests and benchmarks).
      allowed: the paths that the solver can take.
    """
    x, gain, slope = problem.inputs, problem.gain, problem.slope
    d_out = next(iter(slope.values())).shape[-1]
    usable = [p for p in allowed if p != "gram" or gain is None]
    if path == "auto":
        path = cheapest_path(x.shape[0], x.shape[1], d_out, iterations, usable)
    elif path not in usable:
        raise ValueError(f"The {path} path cannot be taken here, only {', '.join(usable)}.")
    return {"direct": _direct, "gram": _gram, "dual": _dual}[path](problem)


def _direct(problem: LocalProblem) -> Coordinates:
    x, gain = problem.inputs, problem.gain

    def gained(delta: Block) -> Block:
        change = push(x, delta)
        return pull(x, change if gain is None else gain(change), delta)

    return Coordinates(problem.slope, gained, lambda delta: delta)


def _gram(problem: LocalProblem) -> Coordinates:
    x = problem.inputs
    gram, total, rows = x.T @ x, x.sum(0), len(x)

    def gained(delta: Block) -> Block:
        kernel, bias = delta.get("kernel"), delta.get("bias")
        result = {}
        if kernel is not None:
            result["kernel"] = gram @ kernel
            if bias is not None:
                result["kernel"] += total[:, None] * bias[None]
        if bias is not None:
            result["bias"] = rows * bias
            if kernel is not None:
                result["bias"] += total @ kernel
        return result

    return Coordinates(problem.slope, gained, lambda delta: delta)


def _dual(problem: LocalProblem) -> Coordinates:
    """Delta = s slope + X'Y, so that the outputs move by s X slope + XX'Y."""
    x, gain, slope = problem.inputs, problem.gain, problem.slope
    moved = push(x, slope)
    products = x @ x.T if "kernel" in slope else jnp.zeros((len(x), len(x)), x.dtype)
    if "bias" in slope:
        products += 1
    one, zero = jnp.ones((), x.dtype), jnp.zeros((), x.dtype)

    def gained(at: dict[str, Array]) -> dict[str, Array]:
        change = at["slope"] * moved + products @ at["rows"]
        return {"slope": zero, "rows": change if gain is None else gain(change)}

    def block(at: dict[str, Array]) -> Block:
        pulled = pull(x, at["rows"], slope)
        return jax.tree.map(lambda s, p: at["slope"] * s + p, slope, pulled)

    return Coordinates({"slope": one, "rows": jnp.zeros_like(moved)}, gained, block)


def gradient(at: Coordinates, penalty: Penalty, delta: Any) -> Any:
    """The gradient of the local objective away from zero, in any coordinates."""
    result = _linalg.add(at.slope, at.gain(delta))
    if penalty.weight is not None:
        return _linalg.add(result, _linalg.scale(delta, penalty.weight))
    if penalty.gradient is not None:
        return _linalg.add(result, penalty.gradient(delta))
    return result
