"""Solvers of the local problem. A new one is a function that returns a `Solver`."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from locoprop_jax import _linalg
from locoprop_jax._layers.blocks import matrix, unmatrix
from locoprop_jax._layers.rows import Block, extend, extended_moment, pull, push
from locoprop_jax._local_losses import coordinates
from locoprop_jax._local_losses.coordinates import Coordinates
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


def _count(what: str, value: Any, hint: str = "") -> int:
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"`{what}` has to be a static int, got {value!r}.{hint}") from None
    if value < 1:
        raise ValueError(f"`{what}` has to be at least 1, got {value}.")
    return value


def _rounds(problem: LocalProblem, iterations: int) -> Array:
    """None for a batch that is not finite: the state stays as it is, at no cost."""
    return jnp.where(problem.ok, iterations, 0)


def _stateless(block: Block) -> tuple:
    del block
    return ()


def _is_quadratic(regularizer: Regularizer | None) -> bool:
    return regularizer is not None and regularizer.is_quadratic


# --- iterations of an optimizer ------------------------------------------------------------------


def inner(
    optimizer: Callable[[Any], optax.GradientTransformation],
    iterations: int = 10,
    *,
    path: str = "auto",
) -> Solver:
    """Minimise each local loss by a few steps of an Optax optimizer (LocoProp, Algorithms 1, 2).

    Iteration k of T has learning rate eta max(1 - k/T, 1/4), the reference's schedule. The
    optimizer's state persists across batches. `inner(optax.sgd, T)` is plain gradient descent,
    which can run in the space of the batch's rows: much cheaper for batches smaller than a layer.

    Args:
      optimizer: the optimizer's constructor, called with the learning rate:
        `functools.partial(optax.rmsprop, momentum=0.9)`.
      iterations: T, at least 1.
      path: "auto" takes the cheapest way to the same iterates; "direct", "gram" and "dual" name
        one, for tests and benchmarks.

    Raises:
      TypeError: `optimizer` is an optimizer instead of its constructor, or `iterations` is no int.
      ValueError: `iterations` is below 1.
    """
    if isinstance(optimizer, optax.GradientTransformation) or not callable(optimizer):
        raise TypeError(
            "`inner` takes the constructor of an optimizer, which it calls with the learning rate "
            "of each iteration, such as `functools.partial(optax.rmsprop, momentum=0.9)`; got "
            f"{optimizer!r}."
        )
    iterations = _count(
        "iterations",
        iterations,
        ' With `optax.inject_hyperparams`, name it in `static_args=("iterations", "optimizer")`.',
    )
    is_plain = optimizer is optax.sgd

    def rate(problem: LocalProblem, k: Array) -> Array:
        eta = problem.learning_rate
        return eta * jnp.maximum(1 - k.astype(eta.dtype) / iterations, 0.25)

    def plain(problem: LocalProblem, state: Any) -> tuple[Block, Any]:
        shrink = problem.penalty.shrink
        allowed = ["direct", "gram", *(["dual"] if _acts_as_number(problem) else [])]
        at = coordinates.coordinates(problem, iterations, path, allowed)

        def step(k: Array, delta: Any) -> Any:
            eta = rate(problem, k)
            delta = _linalg.add(delta, _linalg.scale(_slope(problem, at, k, delta), -eta))
            return delta if shrink is None else shrink(delta, eta)

        count = _rounds(problem, iterations)
        delta = jax.lax.fori_loop(0, count, step, _linalg.zeros_like(at.slope))
        return at.block(delta), state

    def adaptive(problem: LocalProblem, state: Any) -> tuple[Block, Any]:
        at = coordinates.coordinates(problem, iterations, path, ["direct", "gram"])

        def step(k: Array, carry: tuple[Block, Any]) -> tuple[Block, Any]:
            delta, state = carry
            slope = _slope(problem, at, k, delta)
            weights = _linalg.add(problem.weights, delta)
            updates, state = optimizer(rate(problem, k)).update(slope, state, weights)
            return jax.tree.map(lambda d, u: d + u.astype(d.dtype), delta, updates), state

        count = _rounds(problem, iterations)
        return jax.lax.fori_loop(0, count, step, (_linalg.zeros_like(problem.slope), state))

    def _slope(problem: LocalProblem, at: Coordinates, k: Array, delta: Any) -> Any:
        """The local gradient; at W it is known."""
        if iterations == 1:
            return at.slope
        return jax.lax.cond(
            k > 0,
            lambda d: coordinates.gradient(at, problem.penalty, d),
            lambda d: at.slope,
            delta,
        )

    def refuse(divergence: Divergence, regularizer: Regularizer | None) -> str:
        if regularizer is None or regularizer.name != "l1" or is_plain:
            return ""
        return (
            "`l1` is a proximal step, which is known for plain gradient steps only: use "
            "`inner(optax.sgd, iterations)`"
        )

    def init(block: Block) -> Any:
        return optimizer(0.0).init(block)

    return Solver("inner", init, plain if is_plain else adaptive, refuse)


def _acts_as_number(problem: LocalProblem) -> bool:
    """Whether the regularizer only scales iterates, so that it acts in any coordinates."""
    penalty = problem.penalty
    return penalty.weight is not None or (penalty.gradient is None and penalty.shrink is None)


# --- the implicit equation -----------------------------------------------------------------------


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
    iterations = _count("iterations", iterations)
    _check_relaxation(relaxation)

    def solve(problem: LocalProblem, state: Any) -> tuple[Block, Any]:
        allowed = ["direct", "gram", *(["dual"] if problem.penalty.weight is not None else [])]
        at = coordinates.coordinates(problem, iterations, path, allowed)
        step = _fixed_point_step(problem, at, relaxation)
        count = _rounds(problem, iterations)
        start = _linalg.zeros_like(at.slope)
        return at.block(jax.lax.fori_loop(0, count, lambda k, d: step(d), start)), state

    return Solver("fixed_point", _stateless, solve, _needs_quadratic)


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
    iterations, memory = _count("iterations", iterations), _count("memory", memory)
    _check_relaxation(relaxation)

    def solve(problem: LocalProblem, state: Any) -> tuple[Block, Any]:
        at = coordinates.coordinates(problem, iterations, "auto", ["direct", "gram"])
        step = _fixed_point_step(problem, at, relaxation)
        count = _rounds(problem, iterations)
        start = _linalg.zeros_like(at.slope)
        return at.block(_linalg.anderson(step, start, count, min(memory, iterations))), state

    return Solver("anderson", _stateless, solve, _needs_quadratic)


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
    if _is_quadratic(regularizer):
        return ""
    return (
        "the fixed-point equation divides by the regularizer's curvature: use `l2()` or "
        "`mahalanobis()`"
    )


# --- linear systems ------------------------------------------------------------------------------


def conjugate_gradient(iterations: int = 10) -> Solver:
    """Conjugate gradient on the local optimum of a squared loss, matrix-free.

    Each output is a system of its own. Without a regularizer the iterations go towards the least
    squares solution that is nearest to W.

    Raises:
      TypeError, ValueError: wrong iterations.
    """
    iterations = _count("iterations", iterations)

    def solve(problem: LocalProblem, state: Any) -> tuple[Block, Any]:
        at = coordinates.coordinates(problem, iterations + 1, "auto", ["direct", "gram"])
        penalty = problem.penalty

        def apply(delta: Block) -> Block:
            image = at.gain(delta)
            return (
                image if penalty.gradient is None else _linalg.add(image, penalty.gradient(delta))
            )

        right = jax.tree.map(jnp.negative, at.slope)
        inner_product = _linalg.dot_by_column if _acts_as_number(problem) else _linalg.dot
        count = _rounds(problem, iterations)
        return _linalg.conjugate_gradient(apply, right, inner_product, count)[0], state

    def refuse(divergence: Divergence, regularizer: Regularizer | None) -> str:
        if divergence.name != "squared":
            return "its equations are not linear: use `newton()`, `anderson()` or `inner(...)`"
        if regularizer is not None and not regularizer.is_quadratic:
            return f"`{regularizer.name}` is not quadratic: use `inner(optax.sgd, iterations)`"
        return ""

    return Solver("conjugate_gradient", _stateless, solve, refuse)


def exact() -> Solver:
    """The local optimum of a squared loss in closed form (LocoProp, eqs. 5 and 15).

    With `l2` W - gamma (lambda_r I + X'X)^-1 G, by Cholesky of the smaller of X'X and XX'; with
    `mahalanobis` in the eigenbases of its two factors.
    """

    def solve(problem: LocalProblem, state: Any) -> tuple[Block, Any]:
        if problem.penalty.weight is not None:
            solution = _exact_l2
        elif problem.penalty.factors is not None:
            solution = _exact_kronecker
        else:
            raise ValueError("`exact` knows the regularizers `l2` and `mahalanobis` only.")
        zeros = _linalg.zeros_like(problem.slope)
        return jax.lax.cond(problem.ok, lambda: solution(problem), lambda: zeros), state

    def refuse(divergence: Divergence, regularizer: Regularizer | None) -> str:
        if divergence.name != "squared":
            return "there is no closed form: use `newton()`, `anderson()` or `inner(...)`"
        if not _is_quadratic(regularizer):
            return "the closed form needs `l2()` or `mahalanobis()`, without which it is singular"
        return ""

    return Solver("exact", _stateless, solve, refuse)


def _exact_l2(problem: LocalProblem) -> Block:
    slope, weight = problem.slope, problem.penalty.weight
    assert weight is not None
    x = extend(problem.inputs, slope)
    return unmatrix(-_linalg.ridge(x, matrix(slope), problem.cotangents, weight), slope)


def _exact_kronecker(problem: LocalProblem) -> Block:
    """X'X delta + weight A delta B = -slope, with A of the eigenvectors of X'X."""
    slope, factors = problem.slope, problem.penalty.factors
    assert factors is not None
    weight, left, right = factors
    values, q = jnp.linalg.eigh(extended_moment(problem.inputs, slope))
    left_values = jnp.einsum("ji,jk,ki->i", q, left, q)
    right_values, p = jnp.linalg.eigh(right)
    metric = weight * left_values[:, None] * right_values[None]
    denominator = jnp.maximum(values, 0)[:, None] + metric
    return unmatrix(-q @ (q.T @ matrix(slope) @ p / denominator) @ p.T, slope)


# --- Newton --------------------------------------------------------------------------------------


def newton(iterations: int = 3, *, cg_iterations: int = 10) -> Solver:
    """Newton's method on the matching loss, each system by conjugate gradient.

    The Hessian of the local loss for output j is X' diag(f'(A~_j)) X + lambda_r I, never formed.
    As gamma -> 0 one iteration, solved to convergence, is LocoProp-M's solution (Proposition 3 for
    one example). A step is halved until the local loss descends all along it.

    Args:
      iterations: Newton steps, at least 1.
      cg_iterations: for each of them, at least 1.

    Raises:
      TypeError, ValueError: wrong iterations.
    """
    iterations = _count("iterations", iterations)
    cg_iterations = _count("cg_iterations", cg_iterations)

    def solve(problem: LocalProblem, state: Any) -> tuple[Block, Any]:
        x, penalty, gain = problem.inputs, problem.penalty, problem.gain or (lambda change: change)
        assert penalty.gradient is not None
        penalty_gradient = penalty.gradient
        apart = problem.outputs_apart and penalty.weight is not None
        inner_product = _linalg.dot_by_column if apart else _linalg.dot

        def step(_: Array, carry: tuple[Block, Array]) -> tuple[Block, Array]:
            delta, change = carry
            rows, derivative = jax.linearize(gain, change)
            slope = _linalg.add(
                _linalg.add(problem.slope, pull(x, rows, delta)), penalty_gradient(delta)
            )

            def hessian(v: Block) -> Block:
                return _linalg.add(pull(x, derivative(push(x, v)), v), penalty_gradient(v))

            right = jax.tree.map(jnp.negative, slope)
            direction, _ = _linalg.conjugate_gradient(hessian, right, inner_product, cg_iterations)
            moved = push(x, direction)
            # The derivative of the local loss along the direction needs no more products with X.
            fixed = inner_product(_linalg.add(problem.slope, penalty_gradient(delta)), direction)
            growth = inner_product(penalty_gradient(direction), direction)

            def along(t: Array) -> Array:
                at_rows = gain(change + _linalg.scale(moved, t))
                return fixed + t * growth + inner_product(at_rows, moved)

            flat = 1e-3 * jnp.abs(inner_product(slope, direction))
            t = jax.lax.fori_loop(
                0,
                10,
                lambda _, t: jnp.where(along(t) <= flat, t, t / 2),
                jnp.ones_like(growth),
            )
            return (
                _linalg.add(delta, _linalg.scale(direction, t)),
                change + _linalg.scale(moved, t),
            )

        start = _linalg.zeros_like(problem.slope)
        count = _rounds(problem, iterations)
        change = jnp.zeros_like(problem.cotangents)
        return jax.lax.fori_loop(0, count, step, (start, change))[0], state

    def refuse(divergence: Divergence, regularizer: Regularizer | None) -> str:
        if divergence.name == "squared":
            return "a squared loss takes one Newton step: use `exact()` or `conjugate_gradient()`"
        if not divergence.is_convex:
            return "its Hessian is indefinite: use `anderson()` or `inner(...)`"
        if not _is_quadratic(regularizer):
            return "matching losses may be unbounded below: use `l2()` or `mahalanobis()`"
        return ""

    return Solver("newton", _stateless, solve, refuse)
