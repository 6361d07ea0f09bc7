"""Flax's own layers, in linen and in NNX, beyond those that the tests here use everywhere."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from tests.outside.registry import Problem, cross_entropy, floats, integers, model, normal

BATCH, CLASSES = 6, 5


def linen(module: nn.Module, x, y) -> Problem:
    """New state (power iterations) is dropped."""
    variables = floats(module.init(jax.random.key(0), x))
    state = {name: values for name, values in variables.items() if name != "params"}

    def loss_fn(params, x, y):
        return cross_entropy(module.apply({"params": params, **state}, x), y)

    return Problem(loss_fn, variables["params"], (x, y))


def of_nnx(module: nnx.Module, x, y) -> Problem:
    graph, params, state = nnx.split(module, nnx.Param, ...)

    def loss_fn(params, x, y):
        return cross_entropy(nnx.merge(graph, params, state, copy=True)(x), y)

    return Problem(loss_fn, floats(params), (x, y))


class Classifier(nn.Module):
    hidden: nn.Module
    update_stats: bool = False

    @nn.compact
    def __call__(self, x):
        options = {"update_stats": False} if self.update_stats else {}
        x = nn.relu(self.hidden(x, **options))
        return nn.Dense(CLASSES)(x.reshape(len(x), -1))


@model("flax: linen, weight normalisation")
def linen_weight_norm():
    module = Classifier(nn.WeightNorm(nn.Dense(8)))
    return linen(module, normal(BATCH, 7), integers(CLASSES, BATCH))


@model("flax: linen, spectral normalisation")
def linen_spectral_norm():
    module = Classifier(nn.SpectralNorm(nn.Conv(4, (3, 3))), update_stats=True)
    return linen(module, normal(BATCH, 6, 6, 2), integers(CLASSES, BATCH))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, words):
        x = nn.Embed(11, 4)(words)
        exact = {"param_dtype": jnp.result_type(float)}
        lstm, gru = nn.OptimizedLSTMCell(5, **exact), nn.GRUCell(5, **exact)
        both = nn.Bidirectional(nn.RNN(lstm), nn.RNN(gru))
        return nn.Dense(CLASSES)(both(x)[:, -1])


@model("flax: linen, bidirectional LSTM and GRU")
def linen_recurrent():
    return linen(Recurrent(), integers(11, BATCH, 6), integers(CLASSES, BATCH))


class LocalConvolutions(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.ConvLocal(3, (3, 3))(x))
        x = nn.relu(nn.Conv(6, (3, 3), kernel_dilation=2, feature_group_count=3)(x))
        x = nn.InstanceNorm()(x)
        x = nn.PReLU()(nn.ConvTranspose(4, (2, 2), strides=(2, 2), transpose_kernel=True)(x))
        return nn.DenseGeneral(CLASSES, (1, 2, 3))(x)


@model("flax: linen, local and transposed convolutions")
def linen_local_convolutions():
    return linen(LocalConvolutions(), normal(BATCH, 8, 8, 2), integers(CLASSES, BATCH))


class Sequence(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.words = nnx.Embed(11, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.norm = nnx.RMSNorm(8, rngs=rngs)
        exact = {"param_dtype": jnp.result_type(float)}
        self.rnn = nnx.RNN(nnx.OptimizedLSTMCell(8, 5, rngs=rngs, **exact), rngs=rngs)
        self.bilinear = nnx.Linear(5, CLASSES, rngs=rngs)

    def __call__(self, words):
        x = self.words(words)
        x = self.norm(x + self.attention(x))
        return self.bilinear(self.rnn(x)[:, -1])


@model("flax: NNX, attention and LSTM")
def nnx_sequence():
    return of_nnx(Sequence(nnx.Rngs(0)), integers(11, BATCH, 6), integers(CLASSES, BATCH))


class Normalised(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, wrap):
        self.hidden = wrap(nnx.Linear(7, 8, rngs=rngs), rngs)
        self.last = nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.hidden(x)))


@model("flax: NNX, weight normalisation")
def nnx_weight_norm():
    module = Normalised(nnx.Rngs(0), lambda layer, rngs: nnx.WeightNorm(layer, rngs=rngs))
    return of_nnx(module, normal(BATCH, 7), integers(CLASSES, BATCH))


@model("flax: NNX, low rank adaptation")
def nnx_lora():
    def wrap(layer, rngs):
        return nnx.LoRA(7, 2, 8, base_module=layer, rngs=rngs, b_initializer=nnx.initializers.ones)

    graph, params, state = nnx.split(Normalised(nnx.Rngs(0), wrap), nnx.LoRAParam, ...)

    def loss_fn(params, x, y):
        return cross_entropy(nnx.merge(graph, params, state, copy=True)(x), y)

    return Problem(loss_fn, floats(params), (normal(BATCH, 7), integers(CLASSES, BATCH)))


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                h = nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))
                return x + h, None

        x = nn.Dense(8)(x)
        split, axes = {"params": True}, {"params": 0}
        blocks = nn.scan(nn.remat(Block), variable_axes=axes, split_rngs=split, length=3)
        return nn.Dense(CLASSES)(blocks()(x, None)[0])


@model("flax: linen, scanned and rematerialised blocks")
def linen_scanned():
    return linen(Scanned(), normal(BATCH, 7), integers(CLASSES, BATCH))


class Expert(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(8)(nn.relu(nn.Dense(self.width)(x)))


class Switch(nn.Module):
    """An expert that the batch chooses."""

    def setup(self):
        self.first, self.last = nn.Dense(7), nn.Dense(CLASSES)
        self.experts = [Expert(4), Expert(6)]

    def __call__(self, x):
        x = self.first(x)
        branches = [lambda module, x, i=i: module.experts[i](x) for i in range(2)]
        if self.is_initializing():
            for branch in branches:
                branch(self, x)
        return self.last(nn.switch(jnp.int32(x.mean() > 0), branches, self, x))


@model("flax: linen, switch")
def linen_switch():
    return linen(Switch(), normal(BATCH, 7), integers(CLASSES, BATCH))
