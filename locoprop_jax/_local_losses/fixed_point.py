"""The local problem by its implicit equation: a fixed-point iteration, plain or accelerated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from locoprop_jax import _iterative, _linalg
from locoprop_jax._layers.rows import Block
from locoprop_jax._local_losses import coordinates
from locoprop_jax._local_losses.coordinates import Coordinates
from locoprop_jax._local_losses.divergences import Divergence
from locoprop_jax._local_losses.local_problem import LocalProblem
from locoprop_jax._local_losses.regularizers import Regularizer
from locoprop_jax._local_losses.solver import Solver, is_quadratic, rounds, stateless, static_count


def fixed_point(iterations: int = 10, *, relaxation: float = 1.0, path: str = "auto") -> Solver:
    """Iterate the local optimum's own equation (LocoProp, eqs. 4 and 8; review, eq. 3).

    With `l2`: W~ <- W - (gradient of the divergence at W~) / lambda_r. One iteration is BackProp
    for each of the four divergences. It converges only if lambda_max(X'X) max f' < lambda_r:
    weigh the regularizer more, or take a smaller `relaxation`.

    Args:
      iterations: at least 1.
      relaxation: how much of each step to take, above 0 and up to 1.
      path: as for `inner`.

    Raises:
      TypeError, ValueError: wrong iterations or relaxation.
    """
    iterations = static_count("iterations", iterations)
    _check_relaxation(relaxation)

    def solve(problem: LocalProblem, state: Any) -> tuple[Block, Any]:
        allowed = ["direct", "gram", *(["dual"] if problem.penalty.weight is not None else [])]
        at = coordinates.coordinates(problem, iterations, path, allowed)
        step = _fixed_point_step(problem, at, relaxation)
        count = rounds(problem, iterations)
        start = _linalg.zeros_like(at.slope)
        return at.block(jax.lax.fori_loop(0, count, lambda k, d: step(d), start)), state

    return Solver("fixed_point", stateless, solve, _needs_quadratic)


def anderson(iterations: int = 10, *, memory: int = 5, relaxation: float = 1.0) -> Solver:
    """The fixed-point iteration with Anderson acceleration (review, after eq. 3).

    Converges where `fixed_point` does, faster, and often where it does not.

    Args:
      iterations: at least 1.
      memory: how many earlier steps each iterate mixes, at least 1. It keeps two copies of the
        layer's weights for each.
      relaxation: as for `fixed_point`.

    Raises:
      TypeError, ValueError: wrong iterations, memory or relaxation.
    """
    iterations, memory = static_count("iterations", iterations), static_count("memory", memory)
    _check_relaxation(relaxation)

    def solve(problem: LocalProblem, state: Any) -> tuple[Block, Any]:
        at = coordinates.coordinates(problem, iterations, "auto", ["direct", "gram"])
        step = _fixed_point_step(problem, at, relaxation)
        count = rounds(problem, iterations)
        start = _linalg.zeros_like(at.slope)
        return at.block(_iterative.anderson(step, start, count, min(memory, iterations))), state

    return Solver("anderson", stateless, solve, _needs_quadratic)


def _fixed_point_step(
    problem: LocalProblem, at: Coordinates, relaxation: float
) -> Callable[[Any], Any]:
    penalty = problem.penalty

    def solve(slope: Any) -> Any:
        if penalty.weight is not None:
            return _linalg.scale(slope, 1 / penalty.weight)
        assert penalty.solve is not None
        return penalty.solve(slope)

    def step(delta: Any) -> Any:
        target = solve(_linalg.add(at.slope, at.gain(delta)))
        return jax.tree.map(lambda d, t: (1 - relaxation) * d - relaxation * t, delta, target)

    return step


def _check_relaxation(relaxation: Any) -> None:
    if not 0 < relaxation <= 1:
        raise ValueError(f"`relaxation` has to be above 0 and at most 1, got {relaxation}.")


def _needs_quadratic(divergence: Divergence, regularizer: Regularizer | None) -> str:
    if is_quadratic(regularizer):
        return ""
    return (
        "the fixed-point equation divides by the regularizer's curvature: use `l2()` or "
        "`mahalanobis()`"
    )
