"""The larger experiments' images: what they are read from, and networks that look at them."""

import jax
import numpy as np
import pytest

import locoprop_jax as lp
from benchmarks.shared import cifar, images
from benchmarks.shared.data import DataError, Dataset, load_dataset

RNG = np.random.default_rng(0)
LABELS = (np.arange(20) % 10).astype(np.int32)
GREY = RNG.uniform(size=(20, 784)).astype(np.float32)
COLOUR = RNG.uniform(size=(20, 3072)).astype(np.float32)


def write_cifar(directory, per_file=2):
    """Files of CIFAR-10's binary version; their pixels and labels in order."""
    directory.mkdir(parents=True, exist_ok=True)
    names = cifar.TRAIN + cifar.TEST
    pixels = RNG.integers(0, 256, (len(names), per_file, 3, 32, 32), np.uint8)
    labels = RNG.integers(0, 10, (len(names), per_file), np.uint8)
    for name, some, of in zip(names, pixels, labels, strict=True):
        records = [bytes([label]) + image.tobytes() for label, image in zip(of, some, strict=True)]
        (directory / name).write_bytes(b"".join(records))
    return pixels, labels


@pytest.mark.parametrize("folder", [".", "cifar-10-batches-bin", "cifar-10"])
def test_cifar_is_read_from_its_binary_files(tmp_path, folder):
    pixels, labels = write_cifar(tmp_path / folder)
    dataset = load_dataset("cifar-10", tmp_path)
    assert dataset.train.shape == (10, 3072) and dataset.test.shape == (2, 3072)
    np.testing.assert_array_equal(dataset.train_labels, labels[:5].ravel())
    np.testing.assert_array_equal(dataset.test_labels, labels[5])
    image = images.CHANNELS[3072]
    np.testing.assert_allclose(
        dataset.test.reshape(-1, *image), pixels[5].transpose(0, 2, 3, 1) / 255, rtol=1e-6
    )


def test_what_is_no_cifar_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no CIFAR-10: looked there and in"):
        load_dataset("cifar-10", tmp_path)
    write_cifar(tmp_path)
    with (tmp_path / cifar.TRAIN[2]).open("ab") as file:
        file.write(b"more")
    with pytest.raises(DataError, match=r"data_batch_3.bin does not hold whole records"):
        load_dataset("cifar-10", tmp_path)


def test_scenes_show_what_their_labels_say():
    """An image of one grey value each tells where it is."""
    values = np.linspace(0.5, 1, 20, dtype=np.float32)
    flat = np.broadcast_to(values[:, None], (20, 784))
    scenes = images.scenes(flat, LABELS, np.random.default_rng(0))
    assert scenes["images"].shape == (10, 48, 48, 1) and scenes["labels"].shape == (10, 48, 48)
    for i, (canvas, truth) in enumerate(
        zip(scenes["images"][..., 0], scenes["labels"], strict=True)
    ):
        for j in range(2):
            shown = np.isclose(canvas, values[2 * i + j])
            assert np.all(truth[shown] == LABELS[2 * i + j] + 1)
            assert shown.sum() == 28 * 28 or j == 0  # the later one is in front
        assert np.all(canvas[truth == images.BACKGROUND] <= 0.3)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("make", [images.vit, images.unet, images.wide_resnet, images.vgg])
@pytest.mark.parametrize("pixels", [GREY, COLOUR], ids=["grey", "colour"])
def test_every_parameter_of_the_networks_is_in_a_layer(make, pixels):
    if make is images.unet and pixels is COLOUR:
        pytest.skip("its scenes are of grey images")
    problem = make(Dataset("random", "generated", pixels, pixels, LABELS, LABELS), 8)
    params = jax.eval_shape(problem.init, jax.random.key(0))
    batch = jax.tree.map(lambda x: x[:4], problem.train)
    layers = lp.find_layers(problem.loss_fn, params, batch)
    assert not layers.uncaptured
