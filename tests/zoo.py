"""Models as people write them, small: linen, NNX, Equinox, Haiku and plain JAX.

Each entry of `ZOO` makes a loss, its parameters and a batch in float32. `missing` says which
parameters capture does not understand, and why. Nothing here compiles: initializers are only asked
for shapes, and what is done to the data is done in NumPy.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

CLASSES, BATCH = 3, 4


@dataclasses.dataclass(frozen=True)
class Model:
    """A model of the zoo.

    Attributes:
      build: makes (loss(params, batch), params, batch).
      missing: reasons by the path of each parameter that is in no layer.
    """

    build: Callable[[], tuple[Callable, Any, Any]]
    missing: dict[str, str] = dataclasses.field(default_factory=dict)


ZOO: dict[str, Model] = {}


def entry(name: str, **missing: str) -> Callable:
    def add(build: Callable) -> Callable:
        ZOO[name] = Model(build, {path.replace("__", "/"): why for path, why in missing.items()})
        return build

    return add


def images(size: int = 8, channels: int = 2) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(BATCH, size, size, channels)).astype(np.float32)


def words(length: int = 6, vocabulary: int = 11) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocabulary, (BATCH, length))


LABELS = np.asarray([0, 2, 1, 2])


def filled(shapes: Any) -> Any:
    """Weights at random; what scales a normalised input, and its variance, around one."""
    rng = np.random.default_rng(0)

    def leaf(path: Any, shape: jax.ShapeDtypeStruct) -> jax.Array:
        name, values = jax.tree_util.keystr(path), rng.normal(size=shape.shape)
        is_vector = name.endswith(".weight") and len(shape.shape) == 1
        scales = is_vector or re.search("scale|var", name)
        return jnp.asarray(1 + 0.05 * values if scales else 0.4 * values, jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# --- linen ---------------------------------------------------------------------------------------


def linen(module: nn.Module, x: Any, y: Any = LABELS, loss: Callable = cross_entropy) -> tuple:
    """Statistics of a batch are computed and dropped; dropout has a fixed key."""
    variables = filled(jax.eval_shape(module.init, jax.random.key(0), x))
    params, state = variables["params"], {k: v for k, v in variables.items() if k != "params"}

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        x, y = batch
        outputs, _ = module.apply({"params": params, **state}, x, mutable=list(state) or ["none"])
        return loss(outputs, y)

    return loss_fn, params, (x, y)


def module(function: Callable) -> nn.Module:
    """A linen module of a function, its layers named in order."""

    class Whole(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return function(x)

    return Whole()


def squared(a: jax.Array, y: jax.Array) -> jax.Array:
    return optax.l2_loss(a, y).sum(-1).mean()


@entry("mlp")
def mlp() -> tuple:
    return linen(
        module(lambda x: nn.Dense(CLASSES)(nn.relu(nn.Dense(5)(x)))), images().mean((1, 2))
    )


@entry("lenet")
def lenet() -> tuple:
    def apply(x: jax.Array) -> jax.Array:
        for features in (3, 4):
            x = nn.relu(nn.Conv(features, (3, 3))(x))
            x = nn.avg_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(6)(x.reshape(len(x), -1)))
        return nn.Dense(CLASSES)(x)

    return linen(module(apply), images())


def residual_block(x: jax.Array, features: int, stride: int, norm: Callable) -> jax.Array:
    h = nn.Conv(features, (3, 3), stride, use_bias=False)(x)
    h = nn.relu(norm(h))
    h = norm(nn.Conv(features, (3, 3), use_bias=False)(h))
    if x.shape != h.shape:
        x = norm(nn.Conv(features, (1, 1), stride, use_bias=False)(x))
    return nn.relu(x + h)


def resnet(norm: Callable, widths: tuple[int, ...] = (3, 4)) -> nn.Module:
    def apply(x: jax.Array) -> jax.Array:
        x = nn.relu(norm(nn.Conv(4, (3, 3))(x)))
        for i, features in enumerate(widths):
            x = residual_block(x, features, 1 + (i > 0), norm)
        return nn.Dense(CLASSES)(x.mean((1, 2)))

    return module(apply)


@entry("resnet, batch normalisation")
def resnet_batch() -> tuple:
    return linen(resnet(lambda h: nn.BatchNorm(use_running_average=False)(h)), images())


@entry("resnet, running averages")
def resnet_running() -> tuple:
    return linen(resnet(lambda h: nn.BatchNorm(use_running_average=True)(h)), images())


@entry("resnet, no normalisation")
def resnet_plain() -> tuple:
    return linen(resnet(lambda h: h), images())


@entry("wide resnet, group normalisation")
def wide_resnet() -> tuple:
    return linen(resnet(lambda h: nn.GroupNorm(num_groups=2)(h), (4, 6, 8)), images())


@entry("vgg")
def vgg() -> tuple:
    def apply(x: jax.Array) -> jax.Array:
        for features in (3, 4, 5):
            x = nn.max_pool(nn.relu(nn.Conv(features, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.relu(nn.Dense(6)(x.reshape(len(x), -1)))
        return nn.Dense(CLASSES)(x)

    return linen(module(apply), images())


@entry("unet")
def unet() -> tuple:
    def apply(x: jax.Array) -> jax.Array:
        skip = nn.relu(nn.Conv(3, (3, 3))(x))
        h = nn.relu(nn.Conv(4, (3, 3), 2)(skip))
        h = nn.relu(nn.ConvTranspose(3, (2, 2), (2, 2))(h))
        return nn.Conv(1, (1, 1))(jnp.concatenate([skip, h], -1))[..., 0]

    return linen(module(apply), images(), images()[..., 0], squared)


def attention_block(x: jax.Array, mask: Any = None) -> jax.Array:
    h = nn.LayerNorm()(x)
    x = x + nn.MultiHeadDotProductAttention(num_heads=2)(h, mask=mask)
    h = nn.LayerNorm()(x)
    return x + nn.Dense(4)(nn.gelu(nn.Dense(8)(h)))


class Vit(nn.Module):
    """Patches, a class token, positions, attention."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(4, (4, 4), (4, 4), padding="VALID")(x)
        x = x.reshape(len(x), -1, 4)
        token = self.param("token", nn.initializers.normal(0.5), (1, 1, 4))
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, 4)), x], 1)
        x = x + self.param("positions", nn.initializers.normal(0.5), (1, x.shape[1], 4))
        for _ in range(2):
            x = attention_block(x)
        return nn.Dense(CLASSES)(nn.LayerNorm()(x)[:, 0])


@entry("vit")
def vit() -> tuple:
    return linen(Vit(), images())


def language_model(
    block: Callable, positions: bool = True, tied: bool = False, remat: bool = False
) -> nn.Module:
    def apply(x: jax.Array) -> jax.Array:
        table = nn.Embed(11, 4)
        h = table(x)
        if positions:
            h = h + nn.Embed(6, 4)(jnp.arange(x.shape[1]))[None]
        mask = nn.make_causal_mask(x)
        for _ in range(2):
            h = block(h, mask)
        h = nn.LayerNorm()(h)
        return table.attend(h) if tied else nn.Dense(11, use_bias=False)(h)

    return module(apply)


def next_word(logits: jax.Array, y: jax.Array) -> jax.Array:
    return cross_entropy(logits[:, :-1], y[:, 1:])


@entry("gpt")
def gpt() -> tuple:
    return linen(language_model(attention_block), words(), words(), next_word)


@entry("gpt, tied embedding")
def gpt_tied() -> tuple:
    return linen(language_model(attention_block, tied=True), words(), words(), next_word)


def rotate(x: jax.Array) -> jax.Array:
    """Rotary positions: (batch, length, heads, features)."""
    angles = jnp.arange(x.shape[1], dtype=x.dtype)[None, :, None, None]
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate(
        [a * jnp.cos(angles) - b * jnp.sin(angles), a * jnp.sin(angles) + b * jnp.cos(angles)], -1
    )


def llama_block(x: jax.Array, mask: jax.Array) -> jax.Array:
    h = nn.RMSNorm()(x)
    q, k, v = (nn.DenseGeneral((2, 2), use_bias=False)(h) for _ in range(3))
    h = nn.dot_product_attention(rotate(q), rotate(k), v, mask=mask)
    x = x + nn.DenseGeneral(4, (-2, -1), use_bias=False)(h)
    h = nn.RMSNorm()(x)
    gate = nn.silu(nn.Dense(6, use_bias=False)(h)) * nn.Dense(6, use_bias=False)(h)
    return x + nn.Dense(4, use_bias=False)(gate)


@entry("llama")
def llama() -> tuple:
    return linen(language_model(llama_block, positions=False), words(), words(), next_word)


@entry("mlp-mixer")
def mixer() -> tuple:
    def apply(x: jax.Array) -> jax.Array:
        x = nn.Conv(4, (4, 4), (4, 4))(x).reshape(len(x), -1, 4)
        h = nn.LayerNorm()(x).transpose(0, 2, 1)
        x = x + nn.Dense(4)(nn.gelu(nn.Dense(5)(h))).transpose(0, 2, 1)
        x = x + nn.Dense(4)(nn.gelu(nn.Dense(5)(nn.LayerNorm()(x))))
        return nn.Dense(CLASSES)(x.mean(1))

    return linen(module(apply), images())


class ConvNext(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(4, (2, 2), (2, 2))(x)
        h = nn.LayerNorm()(nn.Conv(4, (3, 3), feature_group_count=4)(x))
        h = nn.Dense(4)(nn.gelu(nn.Dense(8)(h)))
        x = x + h * self.param("scale", nn.initializers.constant(0.5), (4,))[None, None, None]
        return nn.Dense(CLASSES)(x.mean((1, 2)))


@entry("convnext")
def convnext() -> tuple:
    return linen(ConvNext(), images())


@entry("autoencoder")
def autoencoder() -> tuple:
    x = np.exp(-np.logaddexp(0, -images())).reshape(BATCH, -1)

    def apply(x: jax.Array) -> jax.Array:
        for width in (6, 3, 6):
            x = jnp.tanh(nn.Dense(width)(x))
        return nn.Dense(128)(x)

    return linen(
        module(apply),
        x,
        x,
        lambda a, y: optax.sigmoid_binary_cross_entropy(a, y).sum(-1).mean(),
    )


@entry("deep set")
def deep_set() -> tuple:
    def apply(x: jax.Array) -> jax.Array:
        h = nn.relu(nn.Dense(5)(nn.relu(nn.Dense(5)(x))))
        return nn.Dense(CLASSES)(nn.relu(nn.Dense(5)(h.sum(1))))

    return linen(module(apply), images().reshape(BATCH, -1, 2))


@entry("siren")
def siren() -> tuple:
    x = images().reshape(-1, 2)[:20]

    def apply(x: jax.Array) -> jax.Array:
        for _ in range(2):
            x = jnp.sin(3.0 * nn.Dense(6)(x))
        return nn.Dense(1)(x)

    return linen(module(apply), x, np.cos(x[:, :1]), squared)


@entry("graph network")
def graph_network() -> tuple:
    x = images().reshape(BATCH, -1, 2)[:, :6]
    edges = (np.random.default_rng(1).random((6, 6)) < 0.4).astype(np.float32)

    def apply(x: jax.Array) -> jax.Array:
        for _ in range(2):
            own, others = nn.Dense(4)(x), nn.Dense(4, use_bias=False)(x)
            x = nn.relu(own + jnp.einsum("nm,bmd->bnd", edges, others))
        return nn.Dense(CLASSES)(x.mean(1))

    return linen(module(apply), x)


class Experts(nn.Module):
    """Every expert sees every token, weighted by its gate."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gates = jax.nn.softmax(nn.Dense(3)(x))
        up = self.param("up", nn.initializers.lecun_normal(), (3, 2, 5))
        down = self.param("down", nn.initializers.lecun_normal(), (3, 5, 4))
        h = nn.relu(jnp.einsum("bd,edh->beh", x, up))
        h = jnp.einsum("beh,ehd->bed", h, down)
        return nn.Dense(CLASSES)(jnp.einsum("be,bed->bd", gates, h))


@entry("mixture of experts")
def experts() -> tuple:
    return linen(Experts(), images().mean((1, 2)))


@entry("diffusion unet block")
def diffusion_block() -> tuple:
    def apply(inputs: tuple) -> jax.Array:
        x, time = inputs
        waves = time[:, None] * jnp.asarray([[1.0, 2.0, 4.0]])
        t = jnp.concatenate([jnp.sin(waves), jnp.cos(waves)], -1)
        t = nn.Dense(4)(nn.silu(nn.Dense(6)(t)))
        h = nn.Conv(4, (3, 3))(nn.silu(nn.GroupNorm(num_groups=2)(x)))
        h = nn.silu(nn.GroupNorm(num_groups=2)(h + t[:, None, None]))
        x = nn.Conv(4, (1, 1))(x) + nn.Conv(4, (3, 3))(h)
        tokens = x.reshape(len(x), -1, 4)
        h = nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(tokens))
        x = (tokens + h).reshape(x.shape)
        return nn.Conv(2, (3, 3))(x)

    x = (images(4), np.linspace(0, 1, BATCH, dtype=np.float32))
    return linen(module(apply), x, images(4), lambda a, y: optax.l2_loss(a, y).mean())


@entry("lstm")
def lstm() -> tuple:
    def apply(x: jax.Array) -> jax.Array:
        return nn.Dense(CLASSES)(jnp.asarray(nn.RNN(nn.LSTMCell(4))(x))[:, -1])

    return linen(module(apply), images().reshape(BATCH, -1, 2)[:, :5])


@entry("gru")
def gru() -> tuple:
    def apply(x: jax.Array) -> jax.Array:
        return nn.Dense(CLASSES)(jnp.asarray(nn.RNN(nn.GRUCell(4))(x))[:, -1])

    return linen(module(apply), images().reshape(BATCH, -1, 2)[:, :5])


class Scanned(nn.Module):
    """A language model whose blocks are one loop over stacked parameters, rematerialised."""

    depth: int = 24

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        class Block(nn.Module):
            @nn.compact
            def __call__(self, h: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
                return attention_block(h, mask), None

        blocks = nn.scan(
            nn.remat(Block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.depth,
        )
        h, _ = blocks(name="blocks")(nn.Embed(11, 4)(x), nn.make_causal_mask(x))
        return nn.Dense(11, use_bias=False)(nn.LayerNorm()(h))


@entry("scanned transformer")
def scanned_transformer() -> tuple:
    return linen(Scanned(), words(), words(), next_word)


# --- the other front ends ------------------------------------------------------------------------


@entry("nnx, convolutions")
def nnx_convolutions() -> tuple:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.out = nnx.Linear(4, CLASSES, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.out(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))

    graph, *states = nnx.split(nnx.eval_shape(lambda: Net(nnx.Rngs(0))), nnx.Param, ...)
    params, rest = map(filled, states)

    def loss(params: Any, batch: Any) -> jax.Array:
        x, y, rest = batch
        return cross_entropy(nnx.merge(graph, params, rest, copy=True)(x), y)

    return loss, params, (images(), LABELS, rest)


@entry("nnx, attention")
def nnx_attention() -> tuple:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.embed = nnx.Embed(11, 4, rngs=rngs)
            self.norm = nnx.LayerNorm(4, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
            self.out = nnx.Linear(4, 11, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            h = self.embed(x)
            return self.out(h + self.attention(self.norm(h)))

    graph, shapes = nnx.split(nnx.eval_shape(lambda: Net(nnx.Rngs(0))), nnx.Param)
    params = filled(shapes)

    def loss(params: Any, batch: Any) -> jax.Array:
        return next_word(nnx.merge(graph, params)(batch), batch)

    return loss, params, words()


def equinox(build: Callable, x: Any, y: Any, loss: Callable) -> tuple:
    model = eqx.filter_eval_shape(build)
    shapes, static = eqx.partition(model, lambda leaf: hasattr(leaf, "dtype"))
    params = filled(shapes)

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        x, y = batch
        return loss(jax.vmap(eqx.combine(params, static))(x), y)

    return loss_fn, params, (x, y)


@entry("equinox, convolutions")
def equinox_convolutions() -> tuple:
    def build() -> eqx.Module:
        key = jax.random.key(0)
        return eqx.nn.Sequential(
            [
                eqx.nn.Conv2d(2, 4, 3, key=key),
                eqx.nn.GroupNorm(2, 4),
                eqx.nn.Lambda(jax.nn.relu),
                eqx.nn.Conv2d(4, 4, 3, groups=2, key=key),
                eqx.nn.Lambda(lambda x: jax.nn.relu(x).mean((1, 2))),
                eqx.nn.Linear(4, CLASSES, key=key),
            ]
        )

    return equinox(build, images().transpose(0, 3, 1, 2), LABELS, cross_entropy)


@entry("equinox, attention")
def equinox_attention() -> tuple:
    class Net(eqx.Module):
        embed: eqx.nn.Embedding
        norm: eqx.nn.LayerNorm
        attention: eqx.nn.MultiheadAttention
        out: eqx.nn.Linear

        def __call__(self, x: jax.Array) -> jax.Array:
            h = jax.vmap(self.embed)(x)
            n = jax.vmap(self.norm)(h)
            return jax.vmap(self.out)(h + self.attention(n, n, n))

    def build() -> eqx.Module:
        key = jax.random.key(0)
        return Net(
            eqx.nn.Embedding(11, 4, key=key),
            eqx.nn.LayerNorm(4),
            eqx.nn.MultiheadAttention(2, 4, key=key),
            eqx.nn.Linear(4, 11, key=key),
        )

    return equinox(build, words(), words(), next_word)


def haiku(function: Callable, x: Any, y: Any, loss: Callable) -> tuple:
    net = hk.without_apply_rng(hk.transform(function))

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        x, y = batch
        return loss(net.apply(params, x), y)

    return loss_fn, filled(jax.eval_shape(net.init, jax.random.key(0), x)), (x, y)


@entry("haiku, convolutions")
def haiku_convolutions() -> tuple:
    def apply(x: jax.Array) -> jax.Array:
        h = jax.nn.relu(hk.Conv2D(4, 3)(x))
        h = jax.nn.relu(hk.LayerNorm(-1, True, True)(hk.DepthwiseConv2D(1, 3)(h)))
        return hk.Linear(CLASSES)(h.mean((1, 2)))

    return haiku(apply, images(), LABELS, cross_entropy)


@entry("haiku, attention")
def haiku_attention() -> tuple:
    def apply(x: jax.Array) -> jax.Array:
        h = hk.Embed(11, 4)(x)
        n = hk.LayerNorm(-1, True, True)(h)
        init = hk.initializers.VarianceScaling(1.0)
        h = h + hk.MultiHeadAttention(2, 2, w_init=init, model_size=4)(n, n, n)
        return hk.Linear(11)(h)

    return haiku(apply, words(), words(), next_word)


@entry("long convolution", b="`pad` changes it")
def long_convolution() -> tuple:
    """A convolution as long as its input, by Fourier transforms as S4 has it."""
    rng = np.random.default_rng(0)
    params = {
        "a": jnp.asarray(rng.normal(size=(2, 4)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=(8, 4)), jnp.float32),
        "c": jnp.asarray(rng.normal(size=(4, CLASSES)), jnp.float32),
    }

    def loss(params: Any, batch: Any) -> jax.Array:
        x, y = batch
        h = jnp.fft.rfft(x @ params["a"], 16, axis=1) * jnp.fft.rfft(params["b"], 16, axis=0)[None]
        h = jnp.tanh(jnp.fft.irfft(h, 16, axis=1)[:, :8])
        return cross_entropy(h.mean(1) @ params["c"], y)

    return loss, params, (images()[:, :, 0], LABELS)
