"""Random dense networks in every front end, and the same networks written out by hand.

A `Network` describes one; `problems()` draws them. Its loss is any front end's, `reference` is the
mathematics of the same network on the blocks W = [kernel; bias], with the arrays that capture
should find: X, A and E of each layer.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from hypothesis import strategies as st

import locoprop_jax as lp
from locoprop_jax._layers.layers import replace


def np_sigmoid(a):
    return 1 / (1 + np.exp(-a))


def np_softmax(a):
    e = np.exp(a - a.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class Function(NamedTuple):
    """A transfer function for the network; for the reference itself and its derivative."""

    jax: Callable
    numpy: Callable
    derivative: Callable


TRANSFERS = {
    "identity": Function(lambda a: a, lambda a: a, np.ones_like),
    "relu": Function(jax.nn.relu, lambda a: np.maximum(a, 0), lambda a: (a > 0).astype(float)),
    "leaky_relu": Function(
        jax.nn.leaky_relu,
        lambda a: np.where(a > 0, a, 0.01 * a),
        lambda a: np.where(a > 0, 1, 0.01),
    ),
    "sigmoid": Function(jax.nn.sigmoid, np_sigmoid, lambda a: np_sigmoid(a) * np_sigmoid(-a)),
    "softplus": Function(jax.nn.softplus, lambda a: np.logaddexp(a, 0), np_sigmoid),
    "tanh": Function(jnp.tanh, np.tanh, lambda a: 1 - np.tanh(a) ** 2),
}


class RowLoss(NamedTuple):
    """The loss of each row; for the reference the loss of all rows and the gradient of one."""

    jax: Callable
    numpy: Callable
    gradient: Callable


# Targets come from `Network.data`: any number, a number in (0, 1), a distribution.
HEADS = {
    "squared": RowLoss(
        lambda a, y: optax.l2_loss(a, y).sum(-1),
        lambda a, y: ((a - y) ** 2).sum() / 2,
        lambda a, y: a - y,
    ),
    "sigmoid": RowLoss(
        lambda a, y: optax.sigmoid_binary_cross_entropy(a, y).sum(-1),
        lambda a, y: (np.logaddexp(a, 0) - a * y).sum(),
        lambda a, y: np_sigmoid(a) - y,
    ),
    "softmax": RowLoss(
        optax.softmax_cross_entropy,
        lambda a, y: -(y * np.log(np_softmax(a))).sum(),
        lambda a, y: np_softmax(a) - y,
    ),
}
TARGETS = {"squared": lambda y: y, "sigmoid": np_sigmoid, "softmax": np_softmax}

WRAPPERS = {
    "nothing": lambda f: f,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "jit of checkpoint": lambda f: jax.jit(jax.checkpoint(f)),
    "checkpoint of jit": lambda f: jax.checkpoint(jax.jit(f)),
}


@dataclasses.dataclass(frozen=True)
class Network:
    """A dense network and its loss, a mean over batch and tokens, perhaps with weight decay.

    Attributes:
      widths: of the input, the hidden layers and the output.
      transfer: of the hidden layers.
      head: the loss of one row.
      front_end: how the layers are written.
      bias: whether the layers have one.
      batch: how many examples.
      tokens: the positions of one example; None for inputs (batch, features).
      wrapper: what is around each layer (Flax and Haiku: around the network).
      decay: the loss contains decay / 2 |W|^2 of all parameters.
    """

    widths: tuple[int, ...] = (3, 4, 2)
    transfer: str = "tanh"
    head: str = "squared"
    front_end: str = "plain"
    bias: bool = True
    batch: int = 5
    tokens: int | None = None
    wrapper: str = "nothing"
    decay: float = 0.0

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(d_in, d_out) of each layer."""
        return list(zip(self.widths, self.widths[1:], strict=False))

    @property
    def transfers(self) -> list[str]:
        return [self.transfer] * (len(self.widths) - 2) + ["identity"]

    @property
    def terms(self) -> int:
        """c: how many terms the loss averages over."""
        return self.batch * (self.tokens or 1)

    @functools.cached_property
    def _model(self) -> tuple[Any, Callable]:
        """The parameters' shapes and apply(params, x)."""
        return FRONT_ENDS[self.front_end](self)

    def params(self, seed: int = 0, dtype: Any = float) -> Any:
        rng = np.random.default_rng(seed)
        return jax.tree.map(
            lambda leaf: on_device(rng.normal(size=leaf.shape), dtype), self._model[0]
        )

    def data(self, seed: int = 1, dtype: Any = float) -> tuple[jax.Array, jax.Array]:
        rng = np.random.default_rng(seed)
        rows = (self.batch,) if self.tokens is None else (self.batch, self.tokens)
        x = rng.normal(size=(*rows, self.widths[0]))
        y = TARGETS[self.head](rng.normal(size=(*rows, self.widths[-1])))
        return on_device(x, dtype), on_device(y, dtype)

    def apply(self, params: Any, x: jax.Array) -> jax.Array:
        return self._model[1](params, x)

    def loss(self, params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        data_loss = HEADS[self.head].jax(self.apply(params, x), y).mean()
        if not self.decay:
            return data_loss
        return data_loss + self.decay / 2 * sum(jnp.sum(p**2) for p in jax.tree.leaves(params))


class Arrays(NamedTuple):
    """What one layer sees: X (extended by ones if it has a bias), A and E, one row per line."""

    inputs: np.ndarray
    outputs: np.ndarray
    cotangents: np.ndarray


def reference(network: Network, blocks: list, x: Any, y: Any) -> tuple[float, list[Arrays]]:
    """Backpropagation by hand: the loss without decay, and each layer's arrays.

    A = X W, W = [kernel; bias], and the next x = f(A); the last E is the head's gradient over the
    number of rows, the E below is E W' * f'(A).
    """
    blocks = [np.asarray(block) for block in blocks]
    fs = [TRANSFERS[name] for name in network.transfers]
    head, y = HEADS[network.head], np.asarray(y).reshape(-1, network.widths[-1])
    h, inputs, outputs = np.asarray(x).reshape(len(y), -1), [], []
    for block, f in zip(blocks, fs, strict=True):
        inputs.append(np.hstack([h, np.ones((len(h), int(network.bias)))]))
        outputs.append(inputs[-1] @ block)
        h = f.numpy(outputs[-1])
    cotangents = [head.gradient(h, y) / len(y)]
    for block, f, a in list(zip(blocks[1:], fs, outputs, strict=False))[::-1]:
        kernel = block[: a.shape[1]]
        cotangents.insert(0, cotangents[0] @ kernel.T * f.derivative(a))
    arrays = [Arrays(*xae) for xae in zip(inputs, outputs, cotangents, strict=True)]
    return head.numpy(h, y) / len(y), arrays


# Half the time to compile, for tests that compare to a tolerance.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def on_device(values, dtype=None):
    """As `jnp.asarray`, which compiles a program for each shape."""
    return jax.device_put(np.asarray(values, dtype))


def normal(seed, *shape, dtype=float):
    return on_device(np.random.default_rng(seed).normal(size=shape), dtype)


def block_gradient(arrays: lp.LayerArrays, has_bias: bool) -> jax.Array:
    """X'E over all rows, X extended by a one if the layer has a bias; of each layer of a stack."""
    cotangents = arrays.cotangents
    inputs = arrays.inputs.astype(cotangents.dtype)
    if has_bias:
        ones = jnp.ones((*inputs.shape[:-1], 1), inputs.dtype)
        inputs = jnp.concatenate([inputs, ones], -1)
    return jnp.einsum("...bsi,...bso->...io", inputs, cotangents, precision="highest")


def brought_back(layers: lp.Layers, captured: lp.Captured, gradients: Any) -> Any:
    """X'E of each layer in place of its parameters' gradients; all other leaves as they are."""
    blocks = {n: block_gradient(captured[n], layers[n].bias is not None) for n in layers}
    own = {n: layers[n].split(block) for n, block in blocks.items()}
    return replace(layers, gradients, own, space="gradients", points=captured.points)


def assert_captured(loss_fn, params, *args, tolerance=1e-10) -> tuple[lp.Layers, lp.Captured]:
    """Each parameter with a gradient is in a layer, gradients are JAX's, X'E is the gradient."""
    layers = lp.find_layers(loss_fn, params, *args)

    @quick_jit
    def everything(params, args):
        value, grads, captured = lp.value_grad_and_capture(loss_fn)(params, *args)
        # A parameter that only a regularizer meets is in no layer, and keeps its gradient.
        back = brought_back(layers, captured, grads)
        return captured, ((value, grads), back), (jax.value_and_grad(loss_fn)(params, *args), grads)

    captured, found, expected = everything(params, args)
    chex.assert_trees_all_close(found, expected, rtol=tolerance, atol=tolerance)
    return layers, captured


# --- front ends: a network's parameter shapes and its apply(params, x) ---------------------------


def spread(bias: jax.Array, x: jax.Array) -> jax.Array:
    """A bias with the rank of `x`: the tests run with rank promotion forbidden."""
    return bias.reshape((1,) * (x.ndim - 1) + (-1,))


def _functional(kernel_shape: Callable, multiply: Callable) -> Callable:
    """Parameters in nested dictionaries, layers as functions of theirs."""

    def build(network: Network):
        def layer(f):
            def apply(p, x):
                x = multiply(x, p["kernel"])
                return f(x + spread(p["bias"], x) if network.bias else x)

            return WRAPPERS[network.wrapper](apply)

        shapes = {}
        for i, (d_in, d_out) in enumerate(network.sizes):
            shapes[f"layer{i}"] = {"kernel": jax.ShapeDtypeStruct(kernel_shape(d_in, d_out), float)}
            if network.bias:
                shapes[f"layer{i}"]["bias"] = jax.ShapeDtypeStruct((d_out,), float)

        def apply(params, x):
            for name, transfer in zip(shapes, network.transfers, strict=True):
                x = layer(TRANSFERS[transfer].jax)(params[name], x)
            return x

        return shapes, apply

    return build


class EquinoxLinear(eqx.Module):
    """w @ z + b, for one row."""

    weight: jax.Array
    bias: jax.Array | None

    def __call__(self, z):
        return self.weight @ z if self.bias is None else self.weight @ z + self.bias


class EquinoxNetwork(eqx.Module):
    layers: list[EquinoxLinear]


def _equinox(network: Network):
    def struct(*shape):
        return jax.ShapeDtypeStruct(shape, float)

    model = EquinoxNetwork(
        [EquinoxLinear(struct(o, i), struct(o) if network.bias else None) for i, o in network.sizes]
    )

    def row(model, z):
        for layer, name in zip(model.layers, network.transfers, strict=True):
            z = WRAPPERS[network.wrapper](lambda m, z, f=TRANSFERS[name].jax: f(m(z)))(layer, z)
        return z

    def apply(model, x):
        over_rows = jax.vmap(row, (None, 0))
        return (over_rows if network.tokens is None else jax.vmap(over_rows, (None, 0)))(model, x)

    return model, apply


def _linen(network: Network):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            for (_, d_out), name in zip(network.sizes, network.transfers, strict=True):
                x = nn.Dense(d_out, use_bias=network.bias, param_dtype=float)(x)
                x = TRANSFERS[name].jax(x)
            return x

    model = Model()
    x = jax.ShapeDtypeStruct((1, network.widths[0]), float)
    return jax.eval_shape(model.init, jax.random.key(0), x), WRAPPERS[network.wrapper](model.apply)


def _nnx(network: Network):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List(
                nnx.Linear(i, o, use_bias=network.bias, param_dtype=float, rngs=rngs)
                for i, o in network.sizes
            )

        def __call__(self, x):
            for layer, name in zip(self.layers, network.transfers, strict=True):
                x = TRANSFERS[name].jax(layer(x))
            return x

    graph, params = nnx.split(nnx.eval_shape(lambda: Model(nnx.Rngs(0))))
    return params, WRAPPERS[network.wrapper](lambda params, x: nnx.merge(graph, params)(x))


def _haiku(network: Network):
    def model(x):
        for (_, d_out), name in zip(network.sizes, network.transfers, strict=True):
            x = TRANSFERS[name].jax(hk.Linear(d_out, with_bias=network.bias)(x))
        return x

    init, apply = hk.without_apply_rng(hk.transform(model))
    x = jax.ShapeDtypeStruct((1, network.widths[0]), float)
    shapes = jax.eval_shape(init, jax.random.key(0), x)
    return shapes, WRAPPERS[network.wrapper](apply)


FRONT_ENDS = {
    "plain": _functional(lambda d_in, d_out: (d_in, d_out), lambda x, w: x @ w),
    "transposed": _functional(lambda d_in, d_out: (d_out, d_in), lambda x, w: x @ w.T),
    "einsum": _functional(
        lambda d_in, d_out: (d_in, d_out), lambda x, w: jnp.einsum("io,...i->...o", w, x)
    ),
    "equinox": _equinox,
    "linen": _linen,
    "nnx": _nnx,
    "haiku": _haiku,
}

# --- strategies ----------------------------------------------------------------------------------


class Problem(NamedTuple):
    """A network with parameters and a batch: `loss_fn(params, *batch)`."""

    network: Network
    seed: int

    @property
    def loss_fn(self) -> Callable:
        return self.network.loss

    @property
    def params(self) -> Any:
        return self.network.params(self.seed)

    @property
    def batch(self) -> tuple[jax.Array, jax.Array]:
        return self.network.data(self.seed + 1)


@st.composite
def networks(draw: st.DrawFn, **fixed: Any) -> Network:
    """Small networks of every kind; `fixed` sets attributes instead of drawing them."""
    sizes = st.integers(1, 7)
    strategies = {
        "widths": st.lists(sizes, min_size=2, max_size=5).map(tuple),
        "transfer": st.sampled_from(sorted(TRANSFERS)),
        "head": st.sampled_from(sorted(HEADS)),
        "front_end": st.sampled_from(sorted(FRONT_ENDS)),
        "bias": st.booleans(),
        "batch": st.integers(1, 6),
        "tokens": st.none() | st.integers(1, 3),
        "wrapper": st.sampled_from(sorted(WRAPPERS)),
        "decay": st.sampled_from([0.0, 0.1]),
    }
    drawn = {name: draw(s) for name, s in strategies.items() if name not in fixed}
    return Network(**fixed, **drawn)


def problems(**fixed: Any) -> st.SearchStrategy[Problem]:
    """Networks with parameters and a batch, in float64."""
    return st.builds(Problem, networks(**fixed), st.integers(0, 2**16))
