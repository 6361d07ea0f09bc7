"""The benchmarks' images: where they are looked for, and what stands in for them offline."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pooch
from jaxtyping import Float32

from benchmarks.curves import generate_curves
from benchmarks.idx import DataError, read_idx_images

__all__ = ["DATASETS", "DataError", "Dataset", "load_dataset", "subset"]

DATASETS = ("auto", "fashion-mnist", "mnist", "curves")
DATA_VARIABLE = "LOCOPROP_DATA"
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist
IMAGE_SHAPE = (28, 28)
DOWNLOAD_TIMEOUT = 10  # seconds to connect, and between two pieces: offline must not mean waiting

SPLITS = {"training": "train", "test": "t10k"}  # MNIST's names for them


class Dataset(NamedTuple):
    name: str
    source: str  # where the images came from, for the reader of the results
    train: Float32[np.ndarray, "train 784"]
    test: Float32[np.ndarray, "test 784"]


class Download(NamedTuple):
    url: str
    sha256: dict[str, str]  # of the published gzip files, by name: training images, test images


DOWNLOADS = {
    "fashion-mnist": Download(
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        {
            "train-images-idx3-ubyte.gz": (
                "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"
            ),
            "t10k-images-idx3-ubyte.gz": (
                "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"
            ),
        },
    ),
    "mnist": Download(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        {
            "train-images-idx3-ubyte.gz": (
                "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"
            ),
            "t10k-images-idx3-ubyte.gz": (
                "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"
            ),
        },
    ),
}


def load_dataset(
    name: str = "auto",
    data_dir: Path | None = None,
    seed: int = 0,
    notify: Callable[[str], None] = lambda message: print(message, file=sys.stderr),
) -> Dataset:
    """The images of a data set, from the first place that has them.

    A place that the user named (`data_dir`, else the environment variable LOCOPROP_DATA) is the
    only one looked at. Without one: Debian's package, then pooch's cache, then the network.

    Args:
      name: one of `DATASETS`; "auto" is Fashion-MNIST, or CURVES where it cannot be had.
      data_dir: a directory with IDX files, or with a folder of them named after the data set.
      seed: of the generated CURVES images.
      notify: told what takes time (a download) and what differs from what was asked (CURVES).

    Raises:
      DataError: the data cannot be had; the message says what was looked for, and the remedy.
    """
    if name == "curves":
        return _curves(seed)
    wanted = "fashion-mnist" if name == "auto" else name
    variable = os.environ.get(DATA_VARIABLE)
    if data_dir is not None:
        return _from_directory(wanted, data_dir, "--data-dir")
    if variable:
        return _from_directory(wanted, Path(variable), f"the environment variable {DATA_VARIABLE}")
    if wanted == "fashion-mnist" and _find_images(DEBIAN_FASHION_MNIST, "training"):
        return _from_directory(wanted, DEBIAN_FASHION_MNIST, "Debian's package")
    try:
        return _from_download(wanted, notify)
    except DataError as error:
        if name != "auto":
            raise
        notify(
            f"NOTICE: {error}\n"
            f"NOTICE: CURVES, generated from seed {seed}, stands in for Fashion-MNIST. "
            "Its losses do not compare with those on Fashion-MNIST."
        )
        return _curves(seed)


def subset(dataset: Dataset, train_images: int) -> Dataset:
    """The data set with only its first training images, and no more test images than those."""
    available = len(dataset.train)
    if train_images > available:
        raise DataError(
            f"{train_images} training images were asked for and {dataset.name} has {available}. "
            f"Ask for --train-images {available} or fewer."
        )
    return dataset._replace(train=dataset.train[:train_images], test=dataset.test[:train_images])


def _curves(seed: int) -> Dataset:
    return Dataset("curves", f"generated from seed {seed}", *generate_curves(seed))


def _from_directory(name: str, directory: Path, origin: str) -> Dataset:
    places = (directory / name, directory)
    for place in places:
        train, test = (_find_images(place, split) for split in SPLITS)
        if train and test:
            return Dataset(name, str(place), _read_images(train), _read_images(test))
    missing = [split for split in SPLITS if not any(_find_images(at, split) for at in places)]
    looked_for = ", and ".join(" or ".join(_file_names(split)[::2]) for split in missing or SPLITS)
    problem = "holds no" if directory.is_dir() else "is no directory, so it holds no"
    raise DataError(
        f"{directory} (from {origin}) {problem} {' or '.join(missing or SPLITS)} images of {name}. "
        f"Looked there and in {places[0]} for {looked_for}, plain or gzip (.gz). Put the files "
        "there, name another directory, or train without files: --dataset curves."
    )


def _file_names(split: str) -> tuple[str, ...]:
    stem = SPLITS[split]
    return tuple(f"{stem}-images{dot}idx3-ubyte{gz}" for dot in "-." for gz in ("", ".gz"))


def _find_images(directory: Path, split: str) -> Path | None:
    files = (directory / name for name in _file_names(split))
    return next((file for file in files if file.is_file()), None)


def _read_images(path: Path) -> Float32[np.ndarray, "images 784"]:
    images = read_idx_images(path)
    pixels = IMAGE_SHAPE[0] * IMAGE_SHAPE[1]
    if images.shape[1] != pixels:
        raise DataError(
            f"{path} holds images of {images.shape[1]} pixels; the network needs {pixels} (28x28)."
        )
    return images


def _from_download(name: str, notify: Callable[[str], None]) -> Dataset:
    url, hashes = DOWNLOADS[name]
    cache = Path(pooch.os_cache("locoprop_jax")) / name
    if not all((cache / file).is_file() for file in hashes):
        notify(f"Downloading {name} from {url} to {cache}.")
    pooch.get_logger().setLevel("WARNING")  # the line above says it already
    downloader: Any = pooch.HTTPDownloader(sys.stderr.isatty(), timeout=DOWNLOAD_TIMEOUT)
    try:
        train, test = (
            Path(pooch.retrieve(url + file, f"sha256:{sha256}", file, cache, downloader=downloader))
            for file, sha256 in hashes.items()
        )
    # OSError: the network (requests' errors are such) or the disk. ValueError: pooch, a wrong hash.
    except (OSError, ValueError) as error:
        wrong_hash = isinstance(error, ValueError) and not isinstance(error, OSError)
        reason = "the file is not the published one" if wrong_hash else type(error).__name__
        raise DataError(
            f"{name} could not be downloaded from {url} ({reason}). Go online, or "
            f"put {' and '.join(hashes)} into a directory and name it with --data-dir or "
            f"{DATA_VARIABLE}, or train without files: --dataset curves."
        ) from error
    return Dataset(name, f"{url}, cached in {cache}", _read_images(train), _read_images(test))
