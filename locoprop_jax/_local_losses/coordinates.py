"""The coordinates in which the iterates of a local problem are cheapest.

The input X of a layer never changes while its local problem is solved, which offers three ways to
iterate. Choose by their flops:

    direct   the displacement itself, two products with X in each iteration
    gram     the displacement itself, X'X once (squared losses only)
    dual     s slope + X'Y, with a row of Y for each row of X, and XX' once (plain steps only)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from locoprop_jax import _linalg
from locoprop_jax._layers.rows import Block, between_rows, gram, pull, push
from locoprop_jax._local_losses.local_problem import LocalProblem
from locoprop_jax._local_losses.regularizers import Penalty

PATHS = ("direct", "gram", "dual")


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


def path_flops(
    rows: int, d_in: int, d_out: int, iterations: int, *, linear: bool
) -> dict[str, int]:
    """The flops of each path's matrix products for `iterations`, of which the first is free.

    `linear` says that the loss is squared: gram is for such losses only, and dual then cheaper.
    """
    later = iterations - 1
    dual = 2 * rows**2 * d_in + 4 * rows * d_in * d_out
    if linear and rows < d_out:  # one square matrix is iterated for all outputs
        dual += later * 2 * rows**3 + 2 * rows**2 * d_out
    else:
        dual += later * 2 * rows**2 * d_out
    return {
        "direct": later * 4 * rows * d_in * d_out,
        "gram": 2 * rows * d_in**2 + later * 2 * d_in**2 * d_out,
        "dual": dual,
    }


def cheapest_path(
    rows: int, d_in: int, d_out: int, iterations: int, usable: Sequence[str], *, linear: bool
) -> str:
    """What "auto" takes of the usable paths."""
    costs = path_flops(rows, d_in, d_out, iterations, linear=linear)
    return min((p for p in usable if linear or p != "gram"), key=lambda path: costs[path])


def coordinates(
    problem: LocalProblem, iterations: int, path: str, allowed: Sequence[str]
) -> Coordinates:
    """The cheapest coordinates for so many iterations, or those that `path` names.

    Args:
      problem: the layer.
      iterations: how many gradients the solver takes, counting the one at W.
      path: "auto", or one of `PATHS` (tests and benchmarks).
      allowed: the paths that the solver can take.
    """
    x, gain, slope = problem.inputs, problem.gain, problem.slope
    d_out = next(iter(slope.values())).shape[-1]
    if path == "auto":
        rows, d_in = x.shape
        path = cheapest_path(rows, d_in, d_out, iterations, allowed, linear=gain is None)
    usable = [p for p in allowed if p != "gram" or gain is None]
    if path not in usable:
        raise ValueError(f"The {path} path cannot be taken here, only {', '.join(usable)}.")
    return {"direct": _direct, "gram": _gram, "dual": _dual}[path](problem)


def _direct(problem: LocalProblem) -> Coordinates:
    return Coordinates(problem.slope, problem.gained, lambda delta: delta)


def _gram(problem: LocalProblem) -> Coordinates:
    return Coordinates(problem.slope, gram(problem.inputs), lambda delta: delta)


def _dual(problem: LocalProblem) -> Coordinates:
    """Delta = s slope + X'Y, so that the outputs move by s X slope + XX'Y.

    For squared losses every Y is a square matrix times X slope: that matrix alone is iterated where
    it is smaller.
    """
    x, gain, slope = problem.inputs, problem.gain, problem.slope
    moved = push(x, slope)
    rows, d_out = moved.shape
    by_matrix = gain is None and rows < d_out
    start = jnp.eye(rows, dtype=x.dtype) if by_matrix else moved
    products = between_rows(x) if "kernel" in slope else jnp.zeros((rows, rows), x.dtype)
    if "bias" in slope:
        products += 1
    one, zero = jnp.ones((), x.dtype), jnp.zeros((), x.dtype)

    def gained(at: dict[str, Array]) -> dict[str, Array]:
        change = at["slope"] * start + products @ at["rows"]
        return {"slope": zero, "rows": change if gain is None else gain(change)}

    def block(at: dict[str, Array]) -> Block:
        pulled = pull(x, at["rows"] @ moved if by_matrix else at["rows"], slope)
        return jax.tree.map(lambda s, p: at["slope"] * s + p, slope, pulled)

    return Coordinates({"slope": one, "rows": jnp.zeros_like(start)}, gained, block)


def gradient(at: Coordinates, penalty: Penalty, delta: Any) -> Any:
    """The gradient of the local objective away from zero, in any coordinates."""
    return penalty.add_gradient(_linalg.add(at.slope, at.gain(delta)), delta)
