"""Problems of data drawn from a seed: regression, recommendation, sets, graphs, diffusion."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import locoprop_jax as lp
from benchmarks.defaults.problem import Arrays, Problem, init_of, split_off

TEST = 2000  # examples held out


class MLP(nn.Module):
    hidden: Sequence[int]
    outputs: int = 1
    activation: Callable[[Array], Array] = nn.tanh

    @nn.compact
    def __call__(self, x: Float[Array, "*examples inputs"]) -> Float[Array, "*examples outputs"]:
        for width in self.hidden:
            x = self.activation(nn.Dense(width)(x))
        return nn.Dense(self.outputs)(x)


class Recommender(nn.Module):
    """A user's and an item's embedding, and a small network for the two."""

    users: int = 2000
    items: int = 1000
    width: int = 16

    @nn.compact
    def __call__(
        self, users: Int[Array, " batch"], items: Int[Array, " batch"]
    ) -> Float[Array, "batch 1"]:
        user = nn.Embed(self.users, self.width)(users)
        item = nn.Embed(self.items, self.width)(items)
        x = jnp.concatenate([user, item, user * item], -1)
        return MLP((64, 32), activation=nn.relu)(x)


class DeepSet(nn.Module):
    """A network for each element, the mean of its outputs, a network for that."""

    width: int = 64

    @nn.compact
    def __call__(self, x: Float[Array, "batch elements 2"]) -> Float[Array, "batch outputs"]:
        h = nn.relu(MLP((self.width,), self.width, nn.relu)(x))
        return MLP((self.width,), 2, nn.relu)(h.mean(1))


class GraphNetwork(nn.Module):
    """Message passing: each node's own features and the sum of its neighbours'."""

    width: int = 32
    depth: int = 3

    @nn.compact
    def __call__(self, edges: Float[Array, "batch nodes nodes"]) -> Float[Array, "batch 1"]:
        degrees = edges.sum(-1, keepdims=True) / 4
        x = jnp.concatenate([degrees, degrees**2], -1)
        for _ in range(self.depth):
            others = nn.Dense(self.width, use_bias=False)(x)
            x = nn.relu(nn.Dense(self.width)(x) + edges @ others / 4)
        return nn.Dense(1)(nn.relu(nn.Dense(self.width)(x.mean(1))))


def _regress(
    name: str,
    what: str,
    network: nn.Module,
    inputs: Sequence[str],
    data: tuple[Arrays, Arrays],
    batch_size: int,
    steps: int,
) -> Problem:
    """Squared error, summed over the outputs, mean over examples."""

    def loss_fn(params: Any, batch: Any) -> Float[Array, ""]:
        outputs: Any = network.apply({"params": params}, *(batch[key] for key in inputs))
        return lp.losses.squared_error(outputs, batch["targets"]).sum(-1).mean()

    train, test = data
    init = init_of(network, *(train[key] for key in inputs))
    return Problem(name, what, init, loss_fn, train, test, batch_size, steps)


def _float32(**arrays: np.ndarray) -> Arrays:
    return {key: array.astype(np.float32) for key, array in arrays.items()}


def scales(name: str) -> Problem:
    """Twenty inputs of scales 1e-2 to 1e2, of which a random network makes the targets."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(10_000, 20))
    hidden = np.tanh(x @ rng.normal(size=(20, 32)) / np.sqrt(20))
    targets = hidden @ rng.normal(size=(32, 4)) / np.sqrt(32) * 2
    noise = 0.1 * rng.normal(size=targets.shape)
    data = split_off(_float32(x=x * np.logspace(-2, 2, 20), targets=targets + noise), TEST)
    what = "MLP 2 x 128, tanh, regression on inputs of scales 1e-2 to 1e2"
    return _regress(name, what, MLP((128, 128), 4), ["x"], data, 256, 200)


def smooth(name: str) -> Problem:
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (512 + TEST, 2))
    targets = np.sin(3 * x[:, :1]) * np.cos(3 * x[:, 1:]) + np.sin(5 * x[:, :1] * x[:, 1:])
    data = split_off(_float32(x=x, targets=targets), TEST)
    what = "MLP 3 x 64, tanh, a smooth function of two inputs, full batch"
    return _regress(name, what, MLP((64, 64, 64)), ["x"], data, 512, 300)


def recommender(name: str) -> Problem:
    """Ratings, of factors of rank four and biases; users and items are as frequent as Zipf's."""
    rng = np.random.default_rng(0)
    network = Recommender()

    def draw(count: int, examples: int) -> np.ndarray:
        frequencies = 1 / np.arange(1, count + 1)
        return rng.choice(count, examples, p=frequencies / frequencies.sum()).astype(np.int32)

    users, items = draw(network.users, 30_000), draw(network.items, 30_000)
    of_users = rng.normal(size=(network.users, 5))
    of_items = rng.normal(size=(network.items, 5))
    ratings = (of_users[users, :4] * of_items[items, :4]).sum(-1) / 2
    ratings += of_users[users, 4] / 2 + of_items[items, 4] / 2 + 0.3 * rng.normal(size=len(users))
    targets = (3 + ratings).astype(np.float32)[:, None]
    data = split_off({"users": users, "items": items, "targets": targets}, TEST)
    what = "two tables of embeddings and an MLP, generated ratings with rare users and items"
    return _regress(name, what, network, ["users", "items"], data, 256, 200)


def deep_set(name: str) -> Problem:
    """The largest distance of two of sixteen points, and how many lie in a disc."""
    rng = np.random.default_rng(0)
    means, deviations = rng.normal(size=(8000, 1, 2)), rng.uniform(0.2, 1.5, (8000, 1, 2))
    points = means + deviations * rng.normal(size=(8000, 16, 2))
    distances = np.linalg.norm(points[:, :, None] - points[:, None], axis=-1)
    inside = (np.linalg.norm(points, axis=-1) < 1).mean(-1)
    targets = np.stack([distances.max((1, 2)), 4 * inside], -1)
    data = split_off(_float32(points=points, targets=targets), TEST)
    what = "deep set of 64 units, ReLU, a set's diameter and count"
    return _regress(name, what, DeepSet(), ["points"], data, 64, 250)


def graph(name: str) -> Problem:
    """How many triangles a random graph of sixteen nodes has, as a logarithm."""
    rng = np.random.default_rng(0)
    upper = np.triu(rng.random((6000, 16, 16)) < rng.uniform(0.1, 0.6, (6000, 1, 1)), 1)
    edges = (upper | upper.transpose(0, 2, 1)).astype(np.float32)
    triangles = np.einsum("nij,njk,nki->n", edges, edges, edges, optimize=True) / 6
    targets = np.log1p(triangles)[:, None].astype(np.float32)
    data = split_off({"edges": edges, "targets": targets}, TEST)
    what = "graph network of three rounds, the number of triangles"
    return _regress(name, what, GraphNetwork(), ["edges"], data, 64, 250)


def diffusion(name: str) -> Problem:
    """The noise in points of two half moons, mixed in at a random time of a cosine schedule."""
    rng = np.random.default_rng(0)
    count = 22_000
    angle, side = rng.uniform(0, np.pi, count), rng.integers(0, 2, count)
    sign = 1 - 2 * side
    moons = np.stack([np.cos(angle) * sign + side, np.sin(angle) * sign + side / 2], -1)
    points = (moons - [0.5, 0.25]) * 1.5 + 0.05 * rng.normal(size=(count, 2))
    noise, time = rng.normal(size=(count, 2)), rng.random((count, 1))
    mixed = np.cos(time * np.pi / 2) * points + np.sin(time * np.pi / 2) * noise
    waves = time * np.pi * 2.0 ** np.arange(4)
    x = np.concatenate([mixed, np.sin(waves), np.cos(waves)], -1)
    data = split_off(_float32(x=x, targets=noise), TEST)
    what = "MLP 3 x 128, SiLU, the noise of a diffusion in two dimensions"
    return _regress(name, what, MLP((128,) * 3, 2, nn.silu), ["x"], data, 128, 250)


def tabular(name: str) -> Problem:
    """A table as incomes and prices are: log-normal columns, heavy-tailed noise, an interaction."""
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(8000, 10)) @ (np.eye(10) + 0.3 * rng.normal(size=(10, 10)))
    x = np.concatenate([np.exp(normal[:, :5]), normal[:, 5:]], -1)
    x = (x - x.mean(0)) / x.std(0)
    signal = np.abs(normal[:, 0]) + normal[:, 5] * (normal[:, 6] > 0) + np.sin(2 * normal[:, 7])
    noise = 0.3 * rng.standard_t(3, len(x))
    data = split_off(_float32(x=x, targets=(signal + noise)[:, None]), TEST)
    what = "MLP 2 x 64, ReLU, a table with heavy tails"
    return _regress(name, what, MLP((64, 64), activation=nn.relu), ["x"], data, 64, 250)
