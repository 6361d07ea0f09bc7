"""Images as (batch, height, width, channels), to be classified whole or pixel by pixel."""

from typing import Any

import numpy as np
import optax
from jaxtyping import Array, Float, Float32, Int32

from benchmarks.shared.autoencoder import narrower
from benchmarks.shared.data import Dataset
from benchmarks.shared.models import VGG, ResNet, UNet, ViT
from benchmarks.shared.steps import Batch, Params
from benchmarks.shared.training import Problem

CLASSES = 10
CHANNELS = {784: (28, 28, 1), 3072: (32, 32, 3)}  # pixels: shape
CANVAS = 48  # pixels that four images are put on
BACKGROUND = 0


def shaped(images: Float32[np.ndarray, "n pixels"]) -> Float32[np.ndarray, "n h w c"]:
    """Images with their axes, standardised by what they are on average."""
    images = images.reshape(-1, *CHANNELS[images.shape[1]])
    return ((images - images.mean()) / images.std()).astype(np.float32)


def classification(network: Any, dataset: Dataset) -> Problem:
    """The mean cross-entropy of a linen network's logits."""
    splits = [
        {"images": shaped(images), "labels": labels}
        for images, labels in (
            (dataset.train, dataset.train_labels),
            (dataset.test, dataset.test_labels),
        )
    ]
    return _problem(network, *splits)


def segmentation(network: Any, dataset: Dataset, seed: int = 0) -> Problem:
    """The mean cross-entropy of each pixel's logits: what it is part of, or background."""
    train = scenes(dataset.train, dataset.train_labels, np.random.default_rng([seed, 0]))
    test = scenes(dataset.test, dataset.test_labels, np.random.default_rng([seed, 1]))
    return _problem(network, train, test)


def _problem(network: Any, train: Batch, test: Batch) -> Problem:
    def loss_fn(params: Params, batch: Batch) -> Float[Array, ""]:
        logits = network.apply({"params": params}, batch["images"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        return losses.mean()

    def init(key: Array) -> Params:
        return network.init(key, train["images"][:1])["params"]

    return Problem(type(network).__name__.lower(), init, loss_fn, train, test)


def scenes(
    images: Float32[np.ndarray, "n 784"],
    labels: Int32[np.ndarray, " n"] | None,
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
    """Half as many scenes: two images each, anywhere on a noisy canvas, the later one in front.

    Pixels are labelled by the class of what they show, plus one; zero is the background.
    """
    assert labels is not None
    count, (h, w, _) = len(images) // 2, CHANNELS[images.shape[1]]
    canvas = rng.uniform(0, 0.3, (count, CANVAS, CANVAS)).astype(np.float32)
    truth = np.full(canvas.shape, BACKGROUND, np.int32)
    places = rng.integers(0, CANVAS - h + 1, (count, 2, 2))
    for i in range(count):
        for j in range(2):
            image, (top, left) = images[2 * i + j].reshape(h, w), places[i, j]
            region = (i, slice(top, top + h), slice(left, left + w))
            seen = image > 0.2
            canvas[region] = np.where(seen, image, canvas[region])
            truth[region] = np.where(seen, labels[2 * i + j] + 1, truth[region])
    return {"images": canvas[..., None], "labels": truth}


def vit(dataset: Dataset, shrink: int) -> Problem:
    """LNB, section 5.3: with four layers of 64 units, of patches of four by four pixels."""
    return classification(ViT(CLASSES, depth=4, width=max(4, 64 // shrink)), dataset)


def unet(dataset: Dataset, shrink: int) -> Problem:
    """LNB, section 5.4, on scenes of two images."""
    return segmentation(UNet(CLASSES + 1, narrower((16, 32, 64), shrink)), dataset)


def wide_resnet(dataset: Dataset, shrink: int) -> Problem:
    """Benzing, appendix D: a ResNet18, an eighth as wide as there."""
    return classification(ResNet(CLASSES, narrower((16, 32, 64, 128), shrink)), dataset)


def vgg(dataset: Dataset, shrink: int) -> Problem:
    """Benzing, appendix D: VGG11 without normalisation, an eighth as wide as there."""
    widths = [max(1, width // (8 * shrink)) if width else 0 for width in VGG(CLASSES).widths]
    return classification(VGG(CLASSES, widths), dataset)
