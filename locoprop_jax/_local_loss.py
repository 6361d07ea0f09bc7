"""Local losses: improve each layer on its own (LocoProp, section 2).

With its input X held fixed, each layer minimises over its own weights W~

    D(X W~, target) + gamma <Rg, W~> + R(W~, W)

where D is a divergence, the target is where the loss wants the layer's output to go, Rg is the
part of the gradient that never touched data (weight decay in the loss) and R keeps W~ near W.
Every divergence here starts at the gradient of the loss, so with G the incoming updates

    gradient of the local objective = gamma G + X' (residual(A~) - residual(A)) + dR/dW~

and one plain gradient step is BackProp. In this form the target needs no arithmetic of its own and
the first iteration no matrix product.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from locoprop_jax import _layers
from locoprop_jax._layers import Captured, Layer, LayerArrays, Layers

Block = dict[str, Array]  # {"kernel": (d_in, d_out), "bias": (d_out,)}, or one of the two
Residual = Callable[[Float[Array, "rows d_out"]], Float[Array, "rows d_out"]]

# --- divergences ---------------------------------------------------------------------------------

# The target that starts each divergence at the gradient (mathematics: only these pairs do).
TARGET_OF = {"squared": "gd", "matching": "md"}


def _residual(divergence: str, layer: Layer, arrays: LayerArrays, dtype: Any) -> Residual | None:
    """What the divergence's gradient by A~ gains as the outputs move away from A.

    None stands for A~ - A, the residual of the squared loss, which is linear.
    """
    if divergence == "squared" or (layer.transfer.is_identity and not layer.uses_head):
        return None
    outputs = arrays.outputs
    if not layer.uses_head:
        f = layer.transfer
        start = f(_rows(outputs, dtype))
        return lambda moved: f(moved) - start
    # At the last layer the loss itself takes the place of the matching loss, times the number of
    # terms it averages over: Proposition 4 then holds at gamma = that number.
    head = arrays.head
    assert head is not None
    start = _rows(arrays.cotangents, dtype)

    def of_head(moved: Float[Array, "rows d_out"]) -> Float[Array, "rows d_out"]:
        gradient = head.gradient(moved.reshape(outputs.shape))
        return head.terms * (_rows(gradient, dtype) - start)

    return of_head


def _rows(x: Float[Array, "batch shared d"], dtype: Any) -> Float[Array, "rows d"]:
    return x.reshape(-1, x.shape[-1]).astype(dtype)


# --- regularizers --------------------------------------------------------------------------------


class L2(NamedTuple):
    """weight/2 |W~ - W|^2: see `l2`."""

    weight: float | Array


def l2(weight: float) -> L2:
    """Keep the new weights near the old ones: weight/2 |W~ - W|^2 (LocoProp, eq. 3).

    The paper's objective has weight 1/eta, with eta the learning rate; its Algorithms 1 and 2 as
    printed leave the term out, and so do the defaults here. The review's "fixed" variant is
    `l2(1 / learning_rate)`.
    """
    if _is_number(weight) and weight < 0:
        raise ValueError(f"`l2` takes a weight that is not negative, got {weight}.")
    return L2(weight)


# --- the local problem ---------------------------------------------------------------------------


def gram_is_cheaper(rows: int, d_in: int, d_out: int, iterations: int) -> bool:
    """Whether a squared loss takes fewer flops by X'X than by X, from the second iteration on."""
    direct = 4 * rows * d_in * d_out * (iterations - 1)
    return 2 * d_in**2 * (rows + d_out * (iterations - 1)) < direct


def _gradient_gain(
    inputs: Float[Array, "rows d_in"],
    outputs: Float[Array, "rows d_out"],
    residual: Residual | None,
    regularizer: L2 | None,
    iterations: int,
) -> Callable[[Block], Block]:
    """What the gradient of the local objective gains with the displacement W~ - W.

    The squared loss needs the inputs only through X'X, which is smaller than X when there are more
    rows than inputs.
    """
    rows, d_in = inputs.shape
    d_out = outputs.shape[1]
    if residual is None and gram_is_cheaper(rows, d_in, d_out, iterations):
        gram, total = inputs.T @ inputs, inputs.sum(0)

        def moved(delta: Block) -> Block:
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

    else:

        def moved(delta: Block) -> Block:
            change = inputs @ delta["kernel"] if "kernel" in delta else jnp.zeros_like(outputs)
            if "bias" in delta:
                change += delta["bias"][None]
            slope = change if residual is None else residual(outputs + change)
            full = {"kernel": lambda: inputs.T @ slope, "bias": lambda: slope.sum(0)}
            return {part: full[part]() for part in delta}

    def gain(delta: Block) -> Block:
        if regularizer is None:
            return moved(delta)
        weight = regularizer.weight
        return jax.tree.map(lambda g, d: g + jnp.asarray(weight, d.dtype) * d, moved(delta), delta)

    return gain


# --- solvers -------------------------------------------------------------------------------------


class Inner(NamedTuple):
    """Iterations of an Optax optimizer: see `inner`."""

    optimizer: Callable[[Any], optax.GradientTransformation]
    iterations: int


def inner(optimizer: Callable[[Any], optax.GradientTransformation], iterations: int = 10) -> Inner:
    """Minimise each local loss by a few steps of an Optax optimizer (LocoProp, Algorithms 1, 2).

    Iteration k of T has learning rate eta max(1 - k/T, 1/4), the reference's schedule. The
    optimizer's state persists across batches.

    Args:
      optimizer: the optimizer's constructor, called with the learning rate:
        `functools.partial(optax.rmsprop, momentum=0.9)`.
      iterations: T, at least 1.

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
    try:
        iterations = operator.index(iterations)
    except TypeError:
        raise TypeError(
            f"`iterations` has to be a static int, got {iterations!r}. With "
            '`optax.inject_hyperparams`, name it in `static_args=("iterations", "optimizer")`.'
        ) from None
    if iterations < 1:
        raise ValueError(f"`iterations` has to be at least 1, got {iterations}.")
    return Inner(optimizer, iterations)


def _solve_inner(
    solver: Inner,
    first: Block,
    gain: Callable[[Block], Block],
    weights: Block,
    eta: Array,
    state: Any,
    ok: Array,
) -> tuple[Block, Any]:
    """T iterations from W; returns W_T - W and the optimizer's state.

    Without `ok` there are no iterations, which leaves the state as it is at no cost.
    """

    def body(k: Array, carry: tuple[Block, Any]) -> tuple[Block, Any]:
        delta, state = carry
        slope = first
        if solver.iterations > 1:
            gained = jax.lax.cond(k > 0, gain, _zeros_like, delta)
            slope = jax.tree.map(jnp.add, first, gained)
        decay = jnp.maximum(1 - k.astype(eta.dtype) / solver.iterations, 0.25)
        at = jax.tree.map(jnp.add, weights, delta)
        updates, state = solver.optimizer(eta * decay).update(slope, state, at)
        return jax.tree.map(lambda d, u: d + u.astype(d.dtype), delta, updates), state

    steps = jnp.where(ok, solver.iterations, 0)
    return jax.lax.fori_loop(0, steps, body, (_zeros_like(first), state))


def _zeros_like(tree: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, tree)


# --- the transformation --------------------------------------------------------------------------


class LocalLossState(NamedTuple):
    """State of `scale_by_local_loss`.

    Attributes:
      count: updates so far. shape=(), dtype=int32
      inner: the solver's state by layer, laid out like the layer's block.
    """

    count: Int[Array, ""]
    inner: dict[str, Any]


def scale_by_local_loss(
    layers: Layers,
    learning_rate: optax.ScalarOrSchedule,
    *,
    gamma: float,
    divergence: str = "squared",
    target: str | None = None,
    regularizer: L2 | None = None,
    solver: Inner,
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
      divergence: "squared" (LocoProp-S) or "matching" (LocoProp-M: the matching loss of each
        layer's transfer function, at an output layer the loss itself).
      target: "gd" (A - gamma E) for the squared, "md" (f(A) - gamma E) for the matching
        divergence; what the divergence asks for if not given.
      regularizer: None (Algorithms 1 and 2 as printed) or `l2(weight)`.
      solver: `inner(optimizer, iterations)`.

    Returns:
      A transformation whose `update` needs `captured` and `params`.

    Raises:
      ValueError: at construction, for an unknown name, a pair of divergence and target that does
        not start at the gradient, a negative gamma or learning rate, no layers, or a transfer
        function that is not monotone with the matching divergence; at update, for `captured` from
        another model.
      TypeError: at update, `captured` is missing.

    References:
      Amid, Anil, Warmuth, `LocoProp: Enhancing BackProp via Local Loss Optimization
      <https://arxiv.org/abs/2106.06199>`_, 2022: eqs. 3 and 7, Algorithms 1 and 2.
    """
    _check_arguments(layers, learning_rate, gamma, divergence, target, regularizer, solver)

    def init(params: Any) -> LocalLossState:
        blocks: dict[str, Any] = dict(_blocks(layers, params))
        if not jax.tree.leaves(params):  # the stand-in of `optax.tree.map_params`
            blocks = dict.fromkeys(layers, params)
        state = {name: solver.optimizer(0.0).init(block) for name, block in blocks.items()}
        return LocalLossState(jnp.zeros([], jnp.int32), state)

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
        inputs = {
            name: _rows(captured[name].inputs, next(iter(slope.values())).dtype)
            for name, slope in slopes.items()
        }
        # A batch that is not finite leaves everything as it is, in all layers.
        ok = _all_finite((updates, inputs))
        new, states = {}, {}
        for name, slope in slopes.items():
            layer, arrays, x = layers[name], captured[name], inputs[name]
            a = _rows(arrays.outputs, x.dtype)
            scale = jnp.asarray(gamma, x.dtype)
            residual = _residual(divergence, layer, arrays, x.dtype)
            delta, states[name] = _solve_inner(
                solver,
                {part: scale * g for part, g in slope.items()},
                _gradient_gain(x, a, residual, regularizer, solver.iterations),
                weights[name],
                jnp.asarray(eta, x.dtype),
                state.inner[name],
                ok,
            )
            new.update(_write(layer, delta))

        def displacement(path: Any, g: Array) -> Array:
            name = _layers.path_name(path)
            if name in new:
                return -new[name].astype(g.dtype)
            step = jnp.asarray(eta, g.dtype) * jnp.asarray(gamma, g.dtype) * g
            return jnp.where(ok, step, jnp.zeros_like(step))

        result = jax.tree_util.tree_map_with_path(displacement, updates)
        return result, LocalLossState(jnp.asarray(optax.safe_increment(state.count)), states)

    return optax.GradientTransformationExtraArgs(init, update)


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
    return jnp.stack(sums).all()


# --- checks --------------------------------------------------------------------------------------


def _is_number(x: Any) -> bool:
    """Whether a value is known when the transformation is built (not under inject_hyperparams)."""
    return isinstance(x, int | float)


def _check_arguments(
    layers: Layers,
    learning_rate: Any,
    gamma: Any,
    divergence: str,
    target: str | None,
    regularizer: Any,
    solver: Any,
) -> None:
    if not isinstance(layers, Mapping) or not layers:
        raise ValueError(
            "`scale_by_local_loss` needs the layers of the model: "
            f"`layers = locoprop_jax.find_layers(loss_fn, params, batch)`; got {layers!r}."
        )
    if divergence not in TARGET_OF:
        known = ", ".join(map(repr, TARGET_OF))
        raise ValueError(f"`divergence` is one of {known}, got {divergence!r}.")
    if target not in (None, TARGET_OF[divergence]):
        raise ValueError(
            f"The {divergence} divergence starts at the gradient only with the target "
            f"{TARGET_OF[divergence]!r}, got {target!r}."
        )
    if not isinstance(regularizer, L2 | None):
        raise TypeError(f"`regularizer` is None or `l2(weight)`, got {regularizer!r}.")
    if not isinstance(solver, Inner):
        raise TypeError(f"`solver` is `inner(optimizer, iterations)`, got {solver!r}.")
    for name, value in (("gamma", gamma), ("learning_rate", learning_rate)):
        if _is_number(value) and value < 0:
            raise ValueError(f"`{name}` must not be negative, got {value}.")
    if divergence == "matching":
        wrong = [
            f"{name} ({layer.transfer.name})"
            for name, layer in layers.items()
            if not layer.uses_head and not layer.transfer.is_monotone()
        ]
        if wrong:
            raise ValueError(
                "LocoProp-M needs non-decreasing transfer functions, or its local losses are not "
                f"convex; these decrease somewhere: {', '.join(wrong)}. Use LocoProp-S "
                '(`locoprop_s`, `divergence="squared"`), or give another function for them: '
                "`find_layers(..., transfer={name: function})`."
            )
