"""Equinox's modules, mapped over a batch."""

import equinox as eqx
import jax
import jax.numpy as jnp

from tests.outside.registry import Problem, cross_entropy, integers, model, normal

BATCH, CLASSES = 6, 5


def keys(n: int):
    return jax.random.split(jax.random.key(0), n)


def problem(network, x, y, loss=cross_entropy, apply=lambda network, x: jax.vmap(network)(x)):
    params, static = eqx.partition(network, eqx.is_inexact_array)

    def loss_fn(params, x, y):
        return loss(apply(eqx.combine(params, static), x), y)

    return Problem(loss_fn, params, (x, y))


@model("equinox: MLP")
def mlp():
    network = eqx.nn.MLP(7, CLASSES, 8, 2, key=jax.random.key(0))
    return problem(network, normal(BATCH, 7), integers(CLASSES, BATCH))


@model("equinox: convolutions, group normalisation")
def convolutions():
    k = keys(4)
    network = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(3, 4, 3, key=k[0]),
            eqx.nn.GroupNorm(2, 4),
            eqx.nn.Lambda(jax.nn.silu),
            eqx.nn.MaxPool2d(2, 2),
            eqx.nn.Conv2d(4, 4, 3, groups=2, key=k[1]),
            eqx.nn.Lambda(eqx.nn.PReLU()),
            eqx.nn.ConvTranspose2d(4, 4, 2, stride=2, key=k[2]),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(16, CLASSES, key=k[3]),
        ]
    )
    return problem(network, normal(BATCH, 3, 8, 8), integers(CLASSES, BATCH))


@model("equinox: batch normalisation")
def batch_normalisation():
    k = keys(2)
    network, state = eqx.nn.make_with_state(eqx.nn.Sequential)(
        [
            eqx.nn.Linear(7, 8, key=k[0]),
            eqx.nn.BatchNorm(8, "batch", mode="batch"),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Linear(8, CLASSES, key=k[1]),
        ]
    )

    def apply(network, x):
        mapped = jax.vmap(network, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        return mapped(x, state)[0]

    return problem(network, normal(BATCH, 7), integers(CLASSES, BATCH), apply=apply)


@model("equinox: weight normalisation")
def weight_normalisation():
    k = keys(2)
    first = eqx.nn.WeightNorm(eqx.nn.Linear(7, 8, key=k[0]))
    last = eqx.nn.Linear(8, CLASSES, key=k[1])
    network = eqx.nn.Sequential([first, eqx.nn.Lambda(jax.nn.relu), last])
    return problem(network, normal(BATCH, 7), integers(CLASSES, BATCH))


@model("equinox: spectral normalisation")
def spectral_normalisation():
    k = keys(3)

    def make():
        first = eqx.nn.SpectralNorm(eqx.nn.Linear(7, 8, key=k[0]), "weight", key=k[1])
        last = eqx.nn.Linear(8, CLASSES, key=k[2])
        return eqx.nn.Sequential([first, eqx.nn.Lambda(jax.nn.relu), last])

    network, state = eqx.nn.make_with_state(make)()

    def apply(network, x):
        return jax.vmap(network, in_axes=(0, None), out_axes=(0, None))(x, state)[0]

    return problem(network, normal(BATCH, 7), integers(CLASSES, BATCH), apply=apply)


class Recurrent(eqx.Module):
    cell: eqx.nn.GRUCell
    last: eqx.nn.Linear

    def __call__(self, xs):
        start = jnp.zeros(self.cell.hidden_size, xs.dtype)
        state, _ = jax.lax.scan(lambda state, x: (self.cell(x, state), None), start, xs)
        return self.last(state)


@model("equinox: GRU")
def gru():
    k = keys(2)
    network = Recurrent(eqx.nn.GRUCell(3, 5, key=k[0]), eqx.nn.Linear(5, CLASSES, key=k[1]))
    return problem(network, normal(BATCH, 4, 3), integers(CLASSES, BATCH))


class Transformer(eqx.Module):
    words: eqx.nn.Embedding
    turns: eqx.nn.RotaryPositionalEmbedding
    attention: eqx.nn.MultiheadAttention
    norms: list[eqx.nn.RMSNorm]
    mlp: eqx.nn.MLP
    last: eqx.nn.Linear

    def __call__(self, words):
        def turned(query, key, value):
            turn = jax.vmap(self.turns, 1, 1)
            return turn(query), turn(key), value

        x = jax.vmap(self.words)(words)
        h = jax.vmap(self.norms[0])(x)
        x = x + self.attention(h, h, h, process_heads=turned)
        x = x + jax.vmap(self.mlp)(jax.vmap(self.norms[1])(x))
        return jax.vmap(self.last)(x)


@model("equinox: attention")
def attention():
    k = keys(4)
    network = Transformer(
        eqx.nn.Embedding(11, 8, key=k[0]),
        eqx.nn.RotaryPositionalEmbedding(4),
        eqx.nn.MultiheadAttention(2, 8, use_query_bias=True, key=k[1]),
        [eqx.nn.RMSNorm(8), eqx.nn.RMSNorm(8)],
        eqx.nn.MLP(8, 8, 16, 1, jax.nn.gelu, key=k[2]),
        eqx.nn.Linear(8, 11, key=k[3]),
    )
    return problem(network, integers(11, BATCH, 6), integers(11, BATCH, 6, seed=1))
