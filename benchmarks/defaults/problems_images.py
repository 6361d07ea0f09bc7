"""Problems of images: Fashion-MNIST (or what stands in for it) and scikit-learn's digits."""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import numpy as np
from jaxtyping import Array, Float
from sklearn.datasets import load_digits

import locoprop_jax as lp
from benchmarks.defaults.problem import Arrays, Problem, init_of
from benchmarks.shared.autoencoder import Autoencoder
from benchmarks.shared.classifier import Classifier
from benchmarks.shared.data import DataError, load_dataset
from benchmarks.shared.models import VGG, UNet, ViT

CLASSES = 10
TRAIN_IMAGES = 20_000  # more than the longest run sees of them
TEST_IMAGES = 2000
HELD_OUT_DIGITS = 400
SHIFTS = 10  # copies of each digit that stand in for Fashion-MNIST


# --- the images ----------------------------------------------------------------------------------


@functools.cache
def fashion_mnist() -> tuple[Arrays, Arrays]:
    """Training and test images (28, 28, 1) with labels; shifted digits where it cannot be had."""
    try:
        data = load_dataset("fashion-mnist", labels=True)
    except DataError as error:
        print(
            f"NOTICE: {error}\nNOTICE: scikit-learn's digits, enlarged and shifted, stand in for "
            "Fashion-MNIST. Losses on them do not compare with those on Fashion-MNIST.",
            file=sys.stderr,
        )
        return enlarged_digits()
    assert data.train_labels is not None and data.test_labels is not None
    return (
        _images(data.train[:TRAIN_IMAGES], data.train_labels[:TRAIN_IMAGES]),
        _images(data.test[:TEST_IMAGES], data.test_labels[:TEST_IMAGES]),
    )


def _images(pixels: np.ndarray, labels: np.ndarray) -> Arrays:
    return {"images": pixels.reshape(-1, 28, 28, 1), "labels": labels.astype(np.int32)}


@functools.cache
def digits() -> tuple[Arrays, Arrays]:
    """Training and test images (8, 8, 1), in an order of their own."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images = (images[order] / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    labels = labels[order].astype(np.int32)
    cut = len(images) - HELD_OUT_DIGITS
    return (
        {"images": images[:cut], "labels": labels[:cut]},
        {"images": images[cut:], "labels": labels[cut:]},
    )


def enlarged_digits() -> tuple[Arrays, Arrays]:
    """The digits at three times their size, at random places of an image of 28 x 28."""
    rng = np.random.default_rng(0)

    def enlarge(split: Arrays, copies: int) -> Arrays:
        small = np.tile(split["images"], (copies, 1, 1, 1))
        large = small.repeat(3, 1).repeat(3, 2)
        images = np.zeros((len(large), 28, 28, 1), np.float32)
        for image, digit, (top, left) in zip(
            images, large, rng.integers(0, 5, (len(large), 2)), strict=True
        ):
            image[top : top + 24, left : left + 24] = digit
        return {"images": images, "labels": np.tile(split["labels"], copies)}

    train, test = digits()
    return enlarge(train, SHIFTS), enlarge(test, SHIFTS // 2)


def _flat(examples: Arrays) -> Arrays:
    return examples | {"images": examples["images"].reshape(len(examples["images"]), -1)}


def _halved(examples: Arrays) -> Arrays:
    """Images of half the size, each pixel the mean of four."""
    images = examples["images"]
    n, h, w, c = images.shape
    return examples | {"images": images.reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))}


def _both(change: Callable[[Arrays], Arrays], data: tuple[Arrays, Arrays]) -> tuple[Arrays, Arrays]:
    """Training and test examples, changed alike."""
    train, test = data
    return change(train), change(test)


def _classify(
    name: str,
    what: str,
    network: nn.Module,
    data: tuple[Arrays, Arrays],
    batch_size: int,
    steps: int,
) -> Problem:
    """Softmax cross-entropy, mean over images."""

    def loss_fn(params: Any, batch: Any) -> Float[Array, ""]:
        logits: Any = network.apply({"params": params}, batch["images"])
        losses = lp.losses.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        return losses.mean()

    train, test = data
    init = init_of(network, train["images"])
    return Problem(name, what, init, loss_fn, train, test, batch_size, steps)


# --- the networks --------------------------------------------------------------------------------


class ResNet(nn.Module):
    """Residual blocks of two convolutions with group normalisation, one for each width."""

    widths: Sequence[int] = (8, 16, 32)

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch classes"]:
        def layer(x: Array, width: int, window: int, stride: int = 1) -> Array:
            x = nn.Conv(width, (window, window), (stride, stride), use_bias=False)(x)
            return nn.GroupNorm(num_groups=4)(x)

        x = nn.relu(layer(x, self.widths[0], 3))
        for i, width in enumerate(self.widths):
            stride = 2 if i else 1
            h = layer(nn.relu(layer(x, width, 3, stride)), width, 3)
            x = nn.relu(h + (layer(x, width, 1, stride) if i else x))
        return nn.Dense(CLASSES)(x.mean((1, 2)))


class LayerNormConvNet(nn.Module):
    """Convolutions, each followed by layer normalisation over its channels."""

    widths: Sequence[int] = (16, 32)

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch classes"]:
        for width in self.widths:
            x = nn.relu(nn.LayerNorm()(nn.Conv(width, (3, 3))(x)))
            x = nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(CLASSES)(x.reshape(len(x), -1))


class Mixer(nn.Module):
    """MLP-Mixer: layers across patches and across channels in turn."""

    patch: int = 7
    width: int = 32
    depth: int = 2

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch classes"]:
        def mlp(x: Array) -> Array:
            return nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(2 * x.shape[-1])(x)))

        size = (self.patch, self.patch)
        x = nn.Conv(self.width, size, size, "VALID")(x)
        x = x.reshape(len(x), -1, self.width)
        for _ in range(self.depth):
            x = x + mlp(nn.LayerNorm()(x).transpose(0, 2, 1)).transpose(0, 2, 1)
            x = x + mlp(nn.LayerNorm()(x))
        return nn.Dense(CLASSES)(nn.LayerNorm()(x).mean(1))


class RowLSTM(nn.Module):
    """An LSTM that reads an image row by row."""

    width: int = 64

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w 1"]) -> Float[Array, "batch classes"]:
        hidden: Any = nn.RNN(nn.LSTMCell(self.width))(x[..., 0])
        return nn.Dense(CLASSES)(hidden[:, -1])


# --- the problems --------------------------------------------------------------------------------


def autoencoder(name: str) -> Problem:
    network = Autoencoder(encoder=(500, 250, 125), code=15, decoder=(125, 250, 500))

    def loss_fn(params: Any, batch: Any) -> Float[Array, ""]:
        logits: Any = network.apply({"params": params}, batch["images"])
        return lp.losses.sigmoid_binary_cross_entropy(logits, batch["images"]).sum(-1).mean()

    train, test = ({"images": _flat(part)["images"]} for part in fashion_mnist())
    what = "deep autoencoder at half width, tanh, Fashion-MNIST, sigmoid cross-entropy per image"
    return Problem(name, what, init_of(network, train["images"]), loss_fn, train, test, 500, 60)


def mlp_tanh(name: str) -> Problem:
    network = Classifier((512,) * 3)
    data = _both(_flat, fashion_mnist())
    return _classify(name, "MLP 3 x 512, tanh, Fashion-MNIST", network, data, 500, 80)


def vgg(name: str) -> Problem:
    network = VGG(CLASSES, (8, 16, 0, 16, 32, 0, 32, 32))
    data = _both(_halved, fashion_mnist())
    what = "VGG of six convolutions without normalisation, Fashion-MNIST at 14 x 14"
    return _classify(name, what, network, data, 100, 80)


def resnet(name: str) -> Problem:
    data = _both(_halved, fashion_mnist())
    what = "ResNet of three blocks, group normalisation, Fashion-MNIST at 14 x 14"
    return _classify(name, what, ResNet(), data, 100, 80)


def vit(name: str) -> Problem:
    network = ViT(CLASSES, patch=2, depth=2, width=32, heads=4)
    return _classify(name, "vision transformer of two blocks, digits", network, digits(), 128, 150)


def unet(name: str) -> Problem:
    """Take normal noise of deviation 0.5 off images; each has its own, the same in all epochs."""
    network = UNet(1, (8, 16, 32))

    def loss_fn(params: Any, batch: Any) -> Float[Array, ""]:
        outputs: Any = network.apply({"params": params}, batch["noisy"])
        return lp.losses.squared_error(outputs, batch["images"]).mean()

    rng = np.random.default_rng(0)

    def noisy(examples: Arrays, count: int) -> Arrays:
        images = examples["images"][:count]
        noise = rng.normal(0, 0.5, images.shape).astype(np.float32)
        return {"images": images, "noisy": images + noise}

    train, test = (
        noisy(part, count) for part, count in zip(fashion_mnist(), (4000, 500), strict=True)
    )
    what = "UNet of three sizes, denoising Fashion-MNIST, squared error per pixel"
    init = init_of(network, train["noisy"])
    return Problem(name, what, init, loss_fn, train, test, 32, 60, evaluated=500)


def mlp_small_batch(name: str) -> Problem:
    network = Classifier((256, 256), nn.relu)
    data = _both(_flat, fashion_mnist())
    what = "MLP 2 x 256, ReLU, Fashion-MNIST, small batches"
    return _classify(name, what, network, data, 32, 300)


def lstm(name: str) -> Problem:
    data = _both(_halved, fashion_mnist())
    return _classify(name, "LSTM over rows, Fashion-MNIST at 14 x 14", RowLSTM(), data, 64, 200)


def mixer(name: str) -> Problem:
    what = "MLP-Mixer of two blocks, Fashion-MNIST"
    return _classify(name, what, Mixer(), fashion_mnist(), 64, 200)


def conv_layer_norm(name: str) -> Problem:
    what = "convolutional network, layer normalisation, digits, tiny batches"
    return _classify(name, what, LayerNormConvNet(), digits(), 8, 300)


def narrow(name: str) -> Problem:
    network = Classifier((32,) * 8, nn.relu, kernel_init=nn.initializers.he_normal())
    data = _both(_flat, digits())
    return _classify(name, "narrow MLP 8 x 32, ReLU, digits", network, data, 64, 250)


def imbalanced(name: str) -> Problem:
    """Each class has 0.6 times as many images as the one before, and each tenth label is random."""
    rng = np.random.default_rng(0)

    def spoil(examples: Arrays) -> Arrays:
        labels = examples["labels"]
        kept = np.flatnonzero(rng.random(len(labels)) < 0.6 ** labels.astype(float))
        labels = labels[kept]
        wrong = rng.random(len(labels)) < 0.1
        random_labels = rng.integers(0, CLASSES, len(labels), dtype=np.int32)
        return {
            "images": examples["images"][kept],
            "labels": np.where(wrong, random_labels, labels),
        }

    data = _both(lambda part: spoil(_flat(_halved(part))), fashion_mnist())
    what = "MLP 2 x 128, ReLU, imbalanced Fashion-MNIST at 14 x 14, a tenth of the labels random"
    return _classify(name, what, Classifier((128, 128), nn.relu), data, 64, 250)
