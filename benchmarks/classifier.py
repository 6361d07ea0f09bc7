"""The review's classifier: Fashion-MNIST, five hidden layers of 512 tanh units, cross-entropy."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from benchmarks.data import Dataset
from benchmarks.steps import Batch, Params
from benchmarks.training import Problem, make_evaluation

NAME = "classifier"
HIDDEN = (512,) * 5  # locoprop_review, section 4
CLASSES = 10


class Classifier(nn.Module):
    hidden: tuple[int, ...] = HIDDEN

    @nn.compact
    def __call__(self, images: Float[Array, "batch 784"]) -> Float[Array, "batch 10"]:
        activations = images
        for width in self.hidden:
            activations = nn.tanh(nn.Dense(width)(activations))
        return nn.Dense(CLASSES)(activations)


def make_problem(dataset: Dataset, network: Classifier) -> Problem:
    """Tell the ten classes apart: softmax cross-entropy, mean over the batch.

    The data set has to come with its labels.
    """

    def loss_fn(params: Params, batch: Batch) -> Float[Array, ""]:
        logits: Any = network.apply(params, batch["images"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        return losses.mean()

    return Problem(
        NAME,
        init=lambda key: network.init(key, dataset.train[:1]),
        loss_fn=loss_fn,
        train={"images": dataset.train, "labels": dataset.train_labels},
        test={"images": dataset.test, "labels": dataset.test_labels},
    )


def test_accuracy(network: Classifier, params: Params, dataset: Dataset) -> float:
    """The share of the test images that the network classifies correctly."""

    def accuracy(params: Params, batch: Batch) -> Float[Array, ""]:
        logits: Any = network.apply(params, batch["images"])
        hits = jnp.argmax(logits, -1) == batch["labels"]
        return hits.astype(np.float32).mean()

    return make_evaluation(accuracy)(params, make_problem(dataset, network).test)
