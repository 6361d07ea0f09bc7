"""What a solver of the local problem is. A new one is a function that returns a `Solver`."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from locoprop_jax._layers.rows import Block
from locoprop_jax._local_losses.divergences import Divergence
from locoprop_jax._local_losses.local_problem import LocalProblem
from locoprop_jax._local_losses.regularizers import Regularizer

Refusal = Callable[[Divergence, Regularizer | None], str]
Solve = Callable[[LocalProblem, Any], tuple[Block, Any]]


class Solver(NamedTuple):
    """A way to solve the local problem.

    Attributes:
      name: for messages.
      init: `init(block)` makes one layer's state.
      solve: `solve(problem, state)` returns the displacement and the new state. Where `problem.ok`
        is False it returns zeros and the state as it was.
      refuse: why it cannot solve for a divergence and a regularizer; empty if it can.
    """

    name: str
    init: Callable[[Block], Any]
    solve: Solve
    refuse: Refusal = lambda divergence, regularizer: ""


# --- what solvers share --------------------------------------------------------------------------


def static_count(what: str, value: Any, hint: str = "") -> int:
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"`{what}` has to be a static int, got {value!r}.{hint}") from None
    if value < 1:
        raise ValueError(f"`{what}` has to be at least 1, got {value}.")
    return value


def rounds(problem: LocalProblem, iterations: int) -> Array:
    """None for a batch that is not finite: the state stays as it is, at no cost."""
    return jnp.where(problem.ok, iterations, 0)


def stateless(block: Block) -> tuple:
    del block
    return ()


def is_quadratic(regularizer: Regularizer | None) -> bool:
    return regularizer is not None and regularizer.is_quadratic


def acts_as_number(problem: LocalProblem) -> bool:
    """Whether the regularizer only scales iterates, so that it acts in any coordinates."""
    penalty = problem.penalty
    return penalty.weight is not None or (penalty.gradient is None and penalty.shrink is None)
