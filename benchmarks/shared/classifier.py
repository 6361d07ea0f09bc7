"""Dense classifiers of images; by default the review's: five hidden layers of 512 tanh units."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import locoprop_jax as lp
from benchmarks.shared.autoencoder import narrower
from benchmarks.shared.data import Dataset, standardised
from benchmarks.shared.steps import Batch, Params
from benchmarks.shared.training import Problem, make_evaluation

NAME = "classifier"
HIDDEN = (512,) * 5  # locoprop_review, section 4
CLASSES = 10


class Classifier(nn.Module):
    hidden: tuple[int, ...] = HIDDEN
    activation: Callable[[Array], Array] = nn.tanh
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    outputs: int = CLASSES

    @nn.compact
    def __call__(self, images: Float[Array, "batch 784"]) -> Float[Array, "batch outputs"]:
        activations = images
        options: dict[str, Any] = {"use_bias": self.use_bias, "kernel_init": self.kernel_init}
        for width in self.hidden:
            activations = self.activation(nn.Dense(width, **options)(activations))
        return nn.Dense(self.outputs, **options)(activations)


def make_problem(dataset: Dataset, network: Classifier) -> Problem:
    """Tell the ten classes apart: softmax cross-entropy, mean over the batch.

    The data set has to come with its labels.
    """

    def loss_fn(params: Params, batch: Batch) -> Float[Array, ""]:
        logits: Any = network.apply(params, batch["images"])
        losses = lp.losses.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        return losses.mean()

    return Problem(
        NAME,
        init=lambda key: network.init(key, dataset.train[:1]),
        loss_fn=loss_fn,
        train={"images": dataset.train, "labels": dataset.train_labels},
        test={"images": dataset.test, "labels": dataset.test_labels},
    )


def boosting_mlp(dataset: Dataset, shrink: int) -> Problem:
    """Two layers of 800 tanh units, Glorot's initial weights (LNB, section 5.2)."""
    hidden = narrower((800, 800), shrink)
    network = Classifier(hidden, kernel_init=nn.initializers.glorot_normal())
    return make_problem(dataset, network)


def benzing_mlp(dataset: Dataset, shrink: int) -> Problem:
    """Three layers of 1000 units without biases, He's initial weights (Benzing, appendix D)."""
    hidden = narrower((1000,) * 3, shrink)
    network = Classifier(hidden, nn.relu, False, nn.initializers.he_normal())
    return make_problem(standardised(dataset), network)


def test_accuracy(network: Classifier, params: Params, dataset: Dataset) -> float:
    """The share of the test images that the network classifies correctly."""

    def accuracy(params: Params, batch: Batch) -> Float[Array, ""]:
        logits: Any = network.apply(params, batch["images"])
        hits = jnp.argmax(logits, -1) == batch["labels"]
        return hits.astype(np.float32).mean()

    return make_evaluation(accuracy)(params, make_problem(dataset, network).test)
