"""Local losses: improve each layer on its own (LocoProp, section 2).

With its input X held fixed, each layer minimises over its own weights W~

    D(X W~, target) + gamma <Rg, W~> + R(W~, W)

where D is a divergence, the target is where the loss wants the layer's output to go
(`divergences`), Rg is the part of the gradient that never touched data (weight decay in the loss)
and R keeps W~ near W (`regularizers`). A solver (`solver`) sees one layer's `LocalProblem`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from locoprop_jax import _linalg
from locoprop_jax._checks import check_layers, check_not_negative
from locoprop_jax._layers.blocks import unit_norm
from locoprop_jax._layers.layers import Layer, Layers
from locoprop_jax._layers.method import Batch, blocks_like, transformation, zero_count
from locoprop_jax._layers.rows import Block, pull, push, write_out
from locoprop_jax._layers.stacking import map_layers
from locoprop_jax._local_losses.divergences import DIVERGENCES, Divergence, Target
from locoprop_jax._local_losses.local_problem import LayerData, Rates, layer_data, local_problem
from locoprop_jax._local_losses.regularizers import Regularizer
from locoprop_jax._local_losses.solver import Solver


class LocalLossState(NamedTuple):
    """State of `scale_by_local_loss`.

    Attributes:
      count: updates so far. shape=(), dtype=int32
      refused: those of them whose batch was not finite, and that changed nothing. shape=(),
        dtype=int32
      failures: solutions that were not finite; their layers stood still and kept their states.
        shape=(), dtype=int32
      inner: the solver's state by layer, laid out like the layer's block.
      target: the target's state by layer.
    """

    count: Int[Array, ""]
    refused: Int[Array, ""]
    failures: Int[Array, ""]
    inner: dict[str, Any]
    target: dict[str, Any]

    def diagnostics(self) -> dict[str, Array]:
        """The counters."""
        return {"count": self.count, "refused": self.refused, "failures": self.failures}


class Result(NamedTuple):
    """What became of a layer: its displacement, the new states, and whether these are finite."""

    delta: Block
    inner: Any
    target: Any
    is_finite: Bool[Array, ""]


def scale_by_local_loss(
    layers: Layers,
    learning_rate: optax.ScalarOrSchedule,
    *,
    gamma: float,
    relative: bool = False,
    divergence: str | Divergence = "squared",
    target: str | Target | None = None,
    regularizer: Regularizer | None = None,
    solver: Solver,
    correction: float | None = None,
    stack: bool | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Replace the gradient by the displacement that improves each layer's local loss.

    The update is W - W_T, with W_T what the solver makes of W; follow it by `optax.scale(-1)`, as
    `locoprop_s` and `locoprop_m` do. Parameters in no layer get learning_rate * gamma * gradient,
    which is what one iteration of plain gradient descent would make of any layer (BackProp).

    Args:
      layers: from `find_layers`.
      learning_rate: eta, the step size of the local iterations, or a schedule of it.
      gamma: the activation step size. It multiplies cotangents of the loss as written, which carry
        1/B for a mean over a batch of B: gamma = B asks a matching loss for its minimum.
      relative: whether gamma and eta are in units of the layer, or absolute as in the paper. Then
        gamma is a distance: the target of each layer is that far from its outputs (root mean square
        over rows and outputs), but at an output layer never beyond the minimum of a matching loss.
        And eta = 1 is a local step that goes about so far: gamma over the norm of an average input
        for optimizers that move each weight by about eta, and for all else 1 / sum |x|^2, below
        which plain gradient steps converge. Neither depends on the batch, the width or the scale of
        the loss. Parameters in no layer get eta * gamma times their gradient's direction.
      divergence: "squared" (LocoProp-S), "matching" (LocoProp-M: the matching loss of each layer's
        transfer function, at an output layer the loss itself), "post_squared" (PocoProp-S) or
        "dual_matching" (PocoProp-M), or your own `Divergence`. The last two need
        `value_grad_and_capture(loss_fn, transferred=True)`, and are squared at an output layer.
      target: None for the one that belongs to the divergence, or its name: "gd" (A - gamma E) for
        the squared, "md" (f(A) - gamma E) for the matching, "post_gd" (f(A) - gamma H, with H the
        cotangents after f) for the post-activation squared, "dual_md" (A - gamma H) for the dual
        matching divergence. `natural(...)` and `oracle(...)` change E or H first.
      regularizer: None (Algorithms 1 and 2 as printed), `l2(...)`, `l1(...)` or
        `mahalanobis(...)`.
      solver: `inner(optimizer, iterations)`, `fixed_point`, `anderson`, `conjugate_gradient`,
        `newton` or `exact`.
      correction: None is the paper's: all layers at once. With a number they are solved one after
        the other, and each sees its input move towards what the new weights of the layer that
        feeds it make of theirs: by at most this much times sqrt(d_in), over the whole batch.
      stack: whether to solve for all layers of equal shapes at once; None for what is fastest:
        apart on a CPU, stacked elsewhere.

    Returns:
      A transformation whose `update` needs `captured` and `params`.

    Raises:
      ValueError: at construction, for an unknown name, a combination that makes no sense (the
        message says why), a negative gamma or learning rate, no layers, or a transfer function
        that is not monotone with the matching divergence; at update, for `captured` from another
        model or without the cotangents that the divergence or target needs.
      TypeError: at update, `captured` is missing.

    References:
      Amid, Anil, Warmuth, `LocoProp: Enhancing BackProp via Local Loss Optimization
      <https://arxiv.org/abs/2106.06199>`_, 2022: eqs. 3, 7, 17 and 19, Algorithms 1 to 4.
    """
    divergence = _named_divergence(divergence)
    transform = target if isinstance(target, Target) else None
    _check_arguments(layers, learning_rate, gamma, divergence, target, regularizer, solver)
    _check_correction(layers, correction)
    curvatures = transform and transform.curvature, regularizer and regularizer.curvature

    def init(params: Any) -> LocalLossState:
        own = blocks_like(layers, params)
        inner = {name: _solver_state(layers[name], solver, block) for name, block in own.items()}
        targets = {}
        if transform is not None:
            targets = {n: _target_state(layers[n], transform, block) for n, block in own.items()}
        return LocalLossState(zero_count(), zero_count(), zero_count(), inner, targets)

    def step(batch: Batch, state: LocalLossState) -> tuple[Any, LocalLossState]:
        if batch.params is None:
            raise ValueError(
                "`scale_by_local_loss` needs the parameters: call "
                "`tx.update(grads, opt_state, params, captured=captured)`."
            )
        captured, weights = batch.captured.pulled(), batch.values()
        eta = learning_rate(state.count) if callable(learning_rate) else learning_rate
        data = {
            name: layer_data(
                layers[name],
                captured,
                divergence,
                curvatures,
                (weights[name], slope),
                (state.inner[name], state.target.get(name, ())),
            )
            for name, slope in batch.slopes.items()
        }
        # A batch that is not finite leaves everything as it is, in all layers.
        ok = batch.is_finite([layer.inputs for layer in data.values()])

        def improve(name: str, arrays: LayerData) -> Result:
            problem, target = local_problem(
                layers[name],
                captured[name],
                arrays,
                (divergence, transform, regularizer),
                Rates(gamma, eta, relative, solver.is_per_weight),
                ok,
            )
            delta, inner = solver.solve(problem, arrays.inner)
            return _kept(ok, delta, (inner, target), arrays)

        if correction is not None:
            results = _one_by_one(layers, data, improve, correction)
        else:
            kind = functools.partial(_kind, layers)
            results = map_layers(layers, improve, data, kind=kind, stack=stack)
        moved = {name: jax.tree.map(jnp.negative, result.delta) for name, result in results.items()}

        failed = [jnp.sum(ok & ~own.is_finite, dtype=jnp.int32) for own in results.values()]

        def backprop(g: Array) -> Array:
            unit = unit_norm(g) if relative else g
            step = jnp.asarray(eta, g.dtype) * jnp.asarray(gamma, g.dtype) * unit
            return jnp.where(ok, step, jnp.zeros_like(step))

        return batch.replaced(moved, backprop), LocalLossState(
            jnp.asarray(optax.safe_increment(state.count)),
            state.refused + 1 - ok.astype(jnp.int32),
            sum(failed, start=state.failures),
            {name: result.inner for name, result in results.items()},
            {n: result.target for n, result in results.items() if transform is not None},
        )

    return transformation("scale_by_local_loss", layers, init, step)


def _solver_state(layer: Layer, solver: Solver, block: Block) -> Any:
    # `optax.tree.map_params` has a stand-in without arrays.
    is_stack = layer.stack is not None and jax.tree.leaves(block)
    return jax.vmap(solver.init)(block) if is_stack else solver.init(block)


def _target_state(layer: Layer, target: Target, block: Block) -> Any:
    leaves = jax.tree.leaves(block)
    dtype = leaves[0].dtype if leaves else jnp.float32
    if layer.stack is None:
        return target.init(layer.d_out, dtype)
    return jax.vmap(lambda _: target.init(layer.d_out, dtype))(jnp.arange(layer.stack))


def _kept(ok: Bool[Array, ""], delta: Block, states: tuple[Any, Any], old: LayerData) -> Result:
    """What a solver made of a layer where it is finite; else nothing, and the states it had.

    States that were not finite before (an optimizer may begin with an infinity) are no reason.
    """
    before = old.inner, old.target
    sound = _linalg.all_finite(states) | ~_linalg.all_finite(before)
    finite = _linalg.all_finite(delta) & sound
    inner, target = _linalg.where(ok & finite, states, before)
    return Result(_linalg.where(finite, delta, _linalg.zeros_like(delta)), inner, target, finite)


# --- the order of layers -------------------------------------------------------------------------

Improve = Callable[[str, LayerData], Result]


def _kind(layers: Layers, name: str) -> Any:
    """What solves for one layer solves for others of its kind; output layers have a loss each."""
    return name if layers[name].uses_head else layers[name].transfer


def _one_by_one(
    layers: Layers, data: Mapping[str, LayerData], improve: Improve, correction: float
) -> dict[str, Result]:
    """Each layer after the one that feeds it, its input moved towards that layer's new outputs.

    The local problem starts anew at the moved input: its outputs follow, its cotangents stay.
    """
    results: dict[str, Result] = {}
    at: dict[str, LayerData] = {}
    for name, arrays in data.items():
        source, kernel = layers[name].source, arrays.weights.get("kernel")
        if source in results and kernel is not None:
            inputs = write_out(arrays.inputs)
            moved = push(at[source].inputs, results[source].delta)
            fed = layers[source].transfer(at[source].outputs + moved)
            change = _limited(fed - inputs, correction)
            more = pull(change, arrays.cotangents, {"kernel": kernel})
            arrays = arrays._replace(
                inputs=inputs + change,
                outputs=arrays.outputs + change @ kernel,
                updates={**arrays.updates, "kernel": arrays.updates["kernel"] + more["kernel"]},
            )
        results[name], at[name] = improve(name, arrays), arrays
    return results


def _limited(change: Float[Array, "rows d"], correction: float) -> Float[Array, "rows d"]:
    """Shortened to correction * sqrt(d), over all rows together."""
    norm = jnp.linalg.norm(change) + jnp.finfo(change.dtype).tiny
    most = jnp.asarray(correction, change.dtype) * change.shape[1] ** 0.5
    return change * (jnp.minimum(norm, most) / norm)


# --- checks --------------------------------------------------------------------------------------


def _check_correction(layers: Layers, correction: Any) -> None:
    if correction is None:
        return
    check_not_negative(correction=correction)
    if not any(layer.source in layers for layer in layers.values()):
        raise ValueError(
            "`correction` moves the input of a layer after the layer that feeds it, but no layer "
            f"is fed by another's transfer function alone: {', '.join(layers)}."
        )


def _named_divergence(divergence: str | Divergence) -> Divergence:
    if isinstance(divergence, Divergence):
        return divergence
    if divergence not in DIVERGENCES:
        known = ", ".join(map(repr, DIVERGENCES))
        raise ValueError(f"`divergence` is one of {known}, got {divergence!r}.")
    return DIVERGENCES[divergence]


def _check_arguments(
    layers: Layers,
    learning_rate: Any,
    gamma: Any,
    divergence: Divergence,
    target: Any,
    regularizer: Any,
    solver: Any,
) -> None:
    check_layers(layers, "scale_by_local_loss")
    if not isinstance(target, Target) and target not in (None, divergence.target):
        raise ValueError(
            f"The {divergence.name} divergence starts at the gradient only with the target "
            f"{divergence.target!r}, got {target!r}."
        )
    if not isinstance(regularizer, Regularizer | None):
        raise TypeError(f"`regularizer` is None or like `l2(weight)`, got {regularizer!r}.")
    if not isinstance(solver, Solver):
        raise TypeError(f"`solver` is like `inner(optimizer, iterations)`, got {solver!r}.")
    if reason := solver.refuse(divergence, regularizer):
        penalty = regularizer.name if regularizer else "no"
        raise ValueError(
            f"`{solver.name}` cannot solve the {divergence.name} divergence with {penalty} "
            f"regularizer: {reason}."
        )
    check_not_negative(gamma=gamma, learning_rate=learning_rate)
    if divergence.after_transfer:
        given = [name for name, layer in layers.items() if layer.transfer.given]
        if given:
            raise ValueError(
                f"The {divergence.name} divergence steps on what the model's own transfer "
                f"functions return, but others were given for {', '.join(given)}."
            )
    if divergence.name in ("matching", "dual_matching"):
        wrong = [
            f"{name} ({layer.transfer.name})"
            for name, layer in layers.items()
            if not layer.uses_head and not layer.transfer.is_monotone()
        ]
        if wrong:
            method = {"matching": "LocoProp-M", "dual_matching": "PocoProp-M"}[divergence.name]
            raise ValueError(
                f"{method} needs non-decreasing transfer functions, or its local losses are not "
                f"convex; these decrease somewhere: {', '.join(wrong)}. Use LocoProp-S "
                '(`locoprop_s`, `divergence="squared"`), or give another function for them: '
                "`find_layers(..., transfer={name: function})`."
            )
