"""Local losses: improve each layer on its own (LocoProp, section 2).

With its input X held fixed, each layer minimises over its own weights W~

    D(X W~, target) + gamma <Rg, W~> + R(W~, W)

where D is a divergence, the target is where the loss wants the layer's output to go
(`_divergences`), Rg is the part of the gradient that never touched data (weight decay in the loss)
and R keeps W~ near W (`_regularizers`). A solver (`_solvers`) sees one layer's `LocalProblem`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from locoprop_jax import _layers
from locoprop_jax._divergences import DIVERGENCES, Divergence, Target
from locoprop_jax._layers import Captured, Layer, LayerArrays, Layers
from locoprop_jax._local_problem import Block, LocalProblem, pull
from locoprop_jax._regularizers import Layerwise, Regularizer, penalty_of
from locoprop_jax._solvers import Solver
from locoprop_jax._transfer import identity


class LocalLossState(NamedTuple):
    """State of `scale_by_local_loss`.

    Attributes:
      count: updates so far. shape=(), dtype=int32
      inner: the solver's state by layer, laid out like the layer's block.
      target: the target's state by layer.
    """

    count: Int[Array, ""]
    inner: dict[str, Any]
    target: dict[str, Any]


class LayerData(NamedTuple):
    """One layer's arrays for one update; layers of equal shapes are stacked by them.

    Attributes:
      inputs: X.
      outputs: A.
      cotangents: E.
      transferred: the cotangents after the transfer function, None where they are not needed.
      target_curvature: the rows that the target asks for, or None.
      curvature: those that the regularizer asks for, or None.
      weights: W.
      updates: the incoming ones.
      inner: the solver's state.
      target: the target's state.
    """

    inputs: Float[Array, "rows d_in"]
    outputs: Float[Array, "rows d_out"]
    cotangents: Float[Array, "rows d_out"]
    transferred: Float[Array, "rows d_out"] | None
    target_curvature: Float[Array, "samples_rows d_out"] | None
    curvature: Float[Array, "samples_rows d_out"] | None
    weights: Block
    updates: Block
    inner: Any
    target: Any


class Result(NamedTuple):
    """What became of a layer: its displacement and the new states."""

    delta: Block
    inner: Any
    target: Any


def scale_by_local_loss(
    layers: Layers,
    learning_rate: optax.ScalarOrSchedule,
    *,
    gamma: float,
    divergence: str | Divergence = "squared",
    target: str | Target | None = None,
    regularizer: Regularizer | None = None,
    solver: Solver,
    stack: bool = True,
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
      stack: whether to solve for all layers of equal shapes in one loop, which is compiled once.

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
    curvatures = transform and transform.curvature, regularizer and regularizer.curvature

    def init(params: Any) -> LocalLossState:
        blocks: dict[str, Any] = dict(_blocks(layers, params))
        if not jax.tree.leaves(params):  # the stand-in of `optax.tree.map_params`
            blocks = dict.fromkeys(layers, params)
        inner = {name: solver.init(block) for name, block in blocks.items()}
        targets = {}
        if transform is not None:
            for name, block in blocks.items():
                dtype = jax.tree.leaves(block)[0].dtype if jax.tree.leaves(block) else jnp.float32
                targets[name] = transform.init(layers[name].d_out, dtype)
        return LocalLossState(jnp.zeros([], jnp.int32), inner, targets)

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        captured: Captured | None = None,
        **extra_args: Any,
    ) -> tuple[Any, LocalLossState]:
        del extra_args
        _layers.check_captured(layers, captured, "scale_by_local_loss")
        assert captured is not None
        if params is None:
            raise ValueError(
                "`scale_by_local_loss` needs the parameters: call "
                "`tx.update(grads, opt_state, params, captured=captured)`."
            )
        eta = learning_rate(state.count) if callable(learning_rate) else learning_rate
        weights, slopes = _blocks(layers, params), _blocks(layers, updates)
        data = {
            name: _layer_data(
                layers[name],
                captured,
                divergence,
                curvatures,
                (weights[name], slope),
                (state.inner[name], state.target.get(name, ())),
            )
            for name, slope in slopes.items()
        }
        # A batch that is not finite leaves everything as it is, in all layers.
        ok = _all_finite((updates, [layer.inputs for layer in data.values()]))

        def improve(layer: Layer, arrays: LayerArrays, data: LayerData) -> Result:
            problem, target = _problem(
                layer, arrays, data, divergence, transform, regularizer, gamma, eta, ok
            )
            delta, inner = solver.solve(problem, data.inner)
            keep = lambda new, old: jnp.where(ok, new, old)  # noqa: E731
            return Result(
                jax.tree.map(lambda d: jnp.where(ok, d, jnp.zeros_like(d)), delta),
                inner,
                jax.tree.map(keep, target, data.target),
            )

        results: dict[str, Result] = {}
        for names in _groups(layers, data, stack):
            first = names[0]
            each = lambda d, first=first: improve(layers[first], captured[first], d)  # noqa: E731
            results.update(zip(names, _for_each(each, [data[n] for n in names]), strict=True))
        moved = {
            path: value
            for name, result in results.items()
            for path, value in _write(layers[name], result.delta).items()
        }

        def displacement(path: Any, g: Array) -> Array:
            name = _layers.path_name(path)
            if name in moved:
                return -moved[name].astype(g.dtype)
            step = jnp.asarray(eta, g.dtype) * jnp.asarray(gamma, g.dtype) * g
            return jnp.where(ok, step, jnp.zeros_like(step))

        return jax.tree_util.tree_map_with_path(displacement, updates), LocalLossState(
            jnp.asarray(optax.safe_increment(state.count)),
            {name: results[name].inner for name in slopes},
            {name: results[name].target for name in slopes if transform is not None},
        )

    return optax.GradientTransformationExtraArgs(init, update)


# --- from captured arrays to the local problem ---------------------------------------------------


def _rows(x: Float[Array, "... d"], dtype: Any) -> Float[Array, "rows d"]:
    return x.reshape(-1, x.shape[-1]).astype(dtype)


def _layer_data(
    layer: Layer,
    captured: Captured,
    divergence: Divergence,
    curvatures: tuple[str | None, str | None],
    blocks: tuple[Block, Block],
    states: tuple[Any, Any],
) -> LayerData:
    arrays, dtype = captured[layer.name], next(iter(blocks[1].values())).dtype
    is_after = _is_after_transfer(divergence, layer)
    for_target, for_penalty = curvatures
    return LayerData(
        inputs=_rows(arrays.inputs, dtype),
        outputs=_rows(arrays.outputs, dtype),
        cotangents=_rows(arrays.cotangents, dtype),
        transferred=_rows(arrays.transferred_cotangents, dtype) if is_after else None,
        target_curvature=_curvature(captured, arrays, for_target, is_after, dtype),
        curvature=_curvature(captured, arrays, for_penalty, False, dtype),
        weights=blocks[0],
        updates=blocks[1],
        inner=states[0],
        target=states[1],
    )


def _is_after_transfer(divergence: Divergence, layer: Layer) -> bool:
    """Whether the layer's target is a step after its transfer function: not at an output layer."""
    return divergence.after_transfer and not layer.uses_head and not layer.transfer.is_identity


def _curvature(
    captured: Captured, arrays: LayerArrays, source: str | None, is_after: bool, dtype: Any
) -> Float[Array, "samples_rows d_out"] | None:
    """Rows whose second moment, summed, is the Fisher's factor of the layer's outputs."""
    if source is None:
        return None
    if source == "captured":
        return _rows(arrays.transferred_curvature if is_after else arrays.curvature, dtype)
    empirical = arrays.transferred_cotangents if is_after else arrays.cotangents
    return _rows(empirical, dtype) * jnp.sqrt(jnp.asarray(captured.terms, dtype))


def _problem(
    layer: Layer,
    arrays: LayerArrays,
    data: LayerData,
    divergence: Divergence,
    target: Target | None,
    regularizer: Regularizer | None,
    gamma: Any,
    learning_rate: Any,
    ok: Bool[Array, ""],
) -> tuple[LocalProblem, Any]:
    """The local problem of one layer, and the target's new state."""
    x, a, e = data.inputs, data.outputs, data.cotangents
    gamma = jnp.asarray(gamma, x.dtype)
    eta = jnp.asarray(learning_rate, x.dtype)
    is_after = data.transferred is not None
    along, state = e if data.transferred is None else data.transferred, data.target
    slope = {part: gamma * g for part, g in data.updates.items()}
    change: Callable[[Array], Array] = lambda rows: rows  # noqa: E731
    if target is not None:
        change, state = target.update(along, data.target_curvature, state)
    step = gamma * change(along)
    f = identity() if layer.uses_head else layer.transfer
    if is_after:
        residual = divergence.residual(f, a, step)
        start = residual(a)
        if target is not None:
            extra = pull(x, start - gamma * e, slope)
            slope = jax.tree.map(jnp.add, slope, extra)
        gain = lambda moved: residual(a + moved) - start  # noqa: E731
    else:
        # The same linear map of the features for all rows commutes with X'.
        slope, start = jax.tree.map(change, slope), step
        gain = _gain_before_transfer(layer, arrays, divergence, a)
    problem = LocalProblem(
        slope=slope,
        inputs=x,
        cotangents=start,
        gain=gain,
        outputs_apart=gain is None or (f.is_elementwise and not layer.uses_head),
        penalty=penalty_of(regularizer, Layerwise(x, data.curvature, slope, eta)),
        weights=data.weights,
        learning_rate=eta,
        ok=ok,
    )
    return problem, state


def _gain_before_transfer(
    layer: Layer, arrays: LayerArrays, divergence: Divergence, a: Float[Array, "rows d_out"]
) -> Callable[[Array], Array] | None:
    """See `LocalProblem.gain`; the target's step cancels in it."""
    if divergence.name == "matching" and layer.uses_head:
        return _gain_of_head(arrays, a)
    f = identity() if layer.uses_head else layer.transfer
    if divergence.is_linear(f):
        return None
    residual = divergence.residual(f, a, jnp.zeros((1, 1), a.dtype))
    return lambda moved: residual(a + moved)


def _gain_of_head(arrays: LayerArrays, a: Float[Array, "rows d_out"]) -> Callable[[Array], Array]:
    """At an output layer the loss takes the matching loss's place, times the terms it averages.

    Proposition 4 then holds at gamma = that number.
    """
    head, shape = arrays.head, arrays.outputs.shape
    assert head is not None
    start = _rows(arrays.cotangents, a.dtype)

    def gain(moved: Float[Array, "rows d_out"]) -> Float[Array, "rows d_out"]:
        gradient = head.gradient((a + moved).reshape(shape))
        return head.terms * (_rows(gradient, a.dtype) - start)

    return gain


# --- layers of equal shapes ----------------------------------------------------------------------


def _groups(layers: Layers, data: Mapping[str, LayerData], stack: bool) -> list[list[str]]:
    """The layers that one loop can solve: equal in shapes, dtypes and transfer function."""
    groups: dict[Any, list[str]] = {}
    for name, arrays in data.items():
        leaves, structure = jax.tree.flatten(arrays)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        apart = name if layers[name].uses_head or not stack else None
        groups.setdefault((apart, layers[name].transfer, structure, shapes), []).append(name)
    return list(groups.values())


def _for_each(function: Callable[[LayerData], Result], data: Sequence[LayerData]) -> list[Result]:
    """One call for each layer, compiled once.

    On a CPU one after the other, for its batched matrix products are slow; elsewhere at once.
    """
    if len(data) == 1:
        return [function(data[0])]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *data)
    one_by_one = jax.default_backend() == "cpu"
    mapped = jax.lax.map(function, stacked) if one_by_one else jax.vmap(function)(stacked)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], mapped) for i in range(len(data))]


# --- parameters ----------------------------------------------------------------------------------


def _blocks(layers: Layers, tree: Any) -> dict[str, Block]:
    """The kernels and biases in a tree by layer, in float32 or float64, without masked ones."""
    leaves = _layers.leaves_by_path(tree)
    blocks = {}
    for name, layer in layers.items():
        parts = {"kernel": layer.kernel} | ({"bias": layer.bias} if layer.bias else {})
        found = {
            part: parameter.read(leaves[parameter.path])
            for part, parameter in parts.items()
            if parameter.path in leaves
        }
        if found:
            wide = any(leaf.dtype == jnp.float64 for leaf in found.values())
            dtype = jnp.float64 if wide else jnp.float32
            blocks[name] = {part: leaf.astype(dtype) for part, leaf in found.items()}
    return blocks


def _write(layer: Layer, block: Block) -> dict[str, Array]:
    """A block's parts in the layout of the parameter tree, by path."""
    parts = {"kernel": layer.kernel, "bias": layer.bias}
    return {parts[part].path: parts[part].write(value) for part, value in block.items()}


def _all_finite(tree: Any) -> Array:
    """Whether all entries are finite, by their sums: far quicker to compile than `isfinite`."""
    leaves = jax.tree.leaves(tree)
    wide = [jnp.float64 if x.dtype == jnp.float64 else jnp.float32 for x in leaves]
    sums = [jnp.isfinite(jnp.sum(x, dtype=t)) for x, t in zip(leaves, wide, strict=True)]
    return jnp.all(jnp.asarray(sums))  # there may be none: all may be masked


# --- checks --------------------------------------------------------------------------------------


def _is_number(x: Any) -> bool:
    """Whether a value is known when the transformation is built (not under inject_hyperparams)."""
    return isinstance(x, int | float)


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
    if not isinstance(layers, Mapping) or not layers:
        raise ValueError(
            "`scale_by_local_loss` needs the layers of the model: "
            f"`layers = locoprop_jax.find_layers(loss_fn, params, batch)`; got {layers!r}."
        )
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
    for name, value in (("gamma", gamma), ("learning_rate", learning_rate)):
        if _is_number(value) and value < 0:
            raise ValueError(f"`{name}` must not be negative, got {value}.")
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
