"""The papers' deep autoencoder: its networks, and the problem they are trained on."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import locoprop_jax as lp
from benchmarks.shared.data import Dataset
from benchmarks.shared.steps import Params
from benchmarks.shared.training import Problem

NAME = "autoencoder"
SIZES = {  # locoprop, section 3: the encoder's hidden layers and the code
    "standard": ((1000, 500, 250), 30),
    "wide": ((4000, 2000, 1000), 120),
    "deep": ((1000, *(500,) * 8, 250), 30),
}


class Autoencoder(nn.Module):
    """The standard deep autoencoder: tanh everywhere but at the code and at the logits."""

    activation: Callable[[Array], Array] = nn.tanh
    encoder: tuple[int, ...] = (1000, 500, 250)
    code: int = 30
    decoder: tuple[int, ...] = (250, 500, 1000)
    pixels: int = 784

    @nn.compact
    def __call__(self, images: Float[Array, "batch pixels"]) -> Float[Array, "batch pixels"]:
        hidden = images
        for width in self.encoder:
            hidden = self.activation(nn.Dense(width)(hidden))
        hidden = nn.Dense(self.code)(hidden)
        for width in self.decoder:
            hidden = self.activation(nn.Dense(width)(hidden))
        return nn.Dense(self.pixels)(hidden)


def make_network(
    size: str = "standard", activation: Callable[[Array], Array] = nn.tanh, shrink: int = 1
) -> Autoencoder:
    """One of the paper's three autoencoders, every hidden layer `shrink` times narrower."""
    encoder, code = SIZES[size]
    narrow, (narrow_code,) = narrower(encoder, shrink), narrower((code,), shrink)
    return Autoencoder(
        activation=activation, encoder=narrow, code=narrow_code, decoder=narrow[::-1]
    )


def narrower(widths: Sequence[int], shrink: int) -> tuple[int, ...]:
    return tuple(max(1, width // shrink) for width in widths)


def make_problem(dataset: Dataset, network: nn.Module | None = None) -> Problem:
    """Reconstruct the images: cross-entropy summed over pixels, mean over the batch.

    `network` is an `Autoencoder`, the standard one if None.
    """
    network = network or Autoencoder()

    def loss_fn(params: Params, images: Float[Array, "batch 784"]) -> Float[Array, ""]:
        logits: Any = network.apply(params, images)
        return lp.losses.sigmoid_binary_cross_entropy(logits, images).sum(-1).mean()

    return Problem(
        NAME,
        init=lambda key: network.init(key, dataset.train[:1]),
        loss_fn=loss_fn,
        train=dataset.train,
        test=dataset.test,
    )


def reconstruct(
    params: Params, images: Float[np.ndarray, "images 784"]
) -> Float[np.ndarray, "images 784"]:
    return np.asarray(nn.sigmoid(Autoencoder().bind(params)(jnp.asarray(images))))
