"""The benchmarks' images and labels: where they are looked for, what stands in offline."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pooch
from jaxtyping import Float32, Int32

from benchmarks.shared import cifar
from benchmarks.shared.curves import generate_curves
from benchmarks.shared.idx import DataError, read_idx_images, read_idx_labels

__all__ = ["DATASETS", "DataError", "Dataset", "inverted", "load_dataset", "standardised", "subset"]

DATASETS = ("auto", "fashion-mnist", "mnist", "cifar-10", "curves")
DATA_VARIABLE = "LOCOPROP_DATA"
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist
IMAGE_SHAPE = (28, 28)
MNIST_MEAN, MNIST_DEVIATION = 0.1307, 0.3081  # what Benzing standardised Fashion-MNIST with
DOWNLOAD_TIMEOUT = 10  # seconds to connect, and between two pieces: offline must not mean waiting

SPLITS = {"training": "train", "test": "t10k"}  # MNIST's names for them
IDX = {"images": "idx3", "labels": "idx1"}  # and for the formats of the two kinds of files


class Dataset(NamedTuple):
    name: str
    source: str  # where the images came from, for the reader of the results
    train: Float32[np.ndarray, "train pixels"]  # 784, of CIFAR-10 3072
    test: Float32[np.ndarray, "test pixels"]
    train_labels: Int32[np.ndarray, " train"] | None = None  # loaded on request only
    test_labels: Int32[np.ndarray, " test"] | None = None


class Download(NamedTuple):
    url: str
    sha256: dict[str, str]  # of the published gzip files, by name


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
            "train-labels-idx1-ubyte.gz": (
                "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"
            ),
            "t10k-labels-idx1-ubyte.gz": (
                "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"
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
            "train-labels-idx1-ubyte.gz": (
                "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"
            ),
            "t10k-labels-idx1-ubyte.gz": (
                "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"
            ),
        },
    ),
}


def load_dataset(
    name: str = "auto",
    data_dir: Path | None = None,
    seed: int = 0,
    notify: Callable[[str], None] = lambda message: print(message, file=sys.stderr),
    *,
    labels: bool = False,
) -> Dataset:
    """The images of a data set, from the first place that has them.

    A place that the user named (`data_dir`, else the environment variable LOCOPROP_DATA) is the
    only one looked at. Without one: Debian's package, then pooch's cache, then the network.
    CIFAR-10 comes with its labels.

    Args:
      name: one of `DATASETS`; "auto" is Fashion-MNIST, or CURVES where it cannot be had.
      data_dir: a directory with IDX files (CIFAR-10: of its binary version), or with a folder of
        them named after the data set.
      seed: of the generated CURVES images.
      notify: told what takes time (a download) and what differs from what was asked (CURVES).
      labels: whether to load the labels as well. CURVES has none and stands in for nothing then.

    Raises:
      DataError: the data cannot be had; the message says what was looked for, and the remedy.
    """
    kinds = ("images", "labels") if labels else ("images",)
    if name == "curves":
        if labels:
            raise DataError("CURVES has no labels. Use --dataset fashion-mnist or mnist.")
        return _curves(seed)
    wanted = "fashion-mnist" if name == "auto" else name
    variable = os.environ.get(DATA_VARIABLE)
    if name == "cifar-10":
        return _cifar(data_dir or (Path(variable) if variable else None), notify)
    if data_dir is not None:
        return _from_directory(wanted, data_dir, "--data-dir", kinds)
    if variable:
        origin = f"the environment variable {DATA_VARIABLE}"
        return _from_directory(wanted, Path(variable), origin, kinds)
    if wanted == "fashion-mnist" and _find(DEBIAN_FASHION_MNIST, "training", "images"):
        return _from_directory(wanted, DEBIAN_FASHION_MNIST, "Debian's package", kinds)
    try:
        return _from_download(wanted, notify, kinds)
    except DataError as error:
        if name != "auto" or labels:
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
    fields = dataset._asdict()
    splits = ("train", "test", "train_labels", "test_labels")
    cut = {at: fields[at][:train_images] for at in splits if fields[at] is not None}
    return dataset._replace(**cut)


def inverted(dataset: Dataset) -> Dataset:
    """Every pixel as one minus itself."""
    return dataset._replace(train=1 - dataset.train, test=1 - dataset.test)


def standardised(dataset: Dataset) -> Dataset:
    scaled = {
        name: ((getattr(dataset, name) - MNIST_MEAN) / MNIST_DEVIATION).astype(np.float32)
        for name in ("train", "test")
    }
    return dataset._replace(**scaled)


def _curves(seed: int) -> Dataset:
    return Dataset("curves", f"generated from seed {seed}", *generate_curves(seed))


def _cifar(directory: Path | None, notify: Callable[[str], None]) -> Dataset:
    """From a directory, or downloaded into pooch's cache."""
    folder = directory or Path(pooch.os_cache("locoprop_jax"))
    place = cifar.find_cifar(folder)
    if place is None and directory is None:
        notify(f"Downloading CIFAR-10 from {cifar.URL} to {folder}.")
        try:
            pooch.retrieve(
                cifar.URL,
                f"md5:{cifar.MD5}",
                path=folder,
                processor=pooch.Untar(extract_dir="cifar-10"),
                downloader=_downloader(),
            )
        except (OSError, ValueError) as error:
            raise DataError(
                f"CIFAR-10 could not be downloaded from {cifar.URL} ({type(error).__name__}). "
                f"Go online, or unpack its binary version and name the directory with "
                f"--data-dir or {DATA_VARIABLE}."
            ) from error
        place = cifar.find_cifar(folder)
    if place is None:
        raise DataError(
            f"{folder} holds no CIFAR-10: looked there and in {folder}/{cifar.FOLDER} for "
            f"{cifar.TRAIN[0]} to {cifar.TRAIN[-1]} and {cifar.TEST[0]}, of its binary version."
        )
    train, test = (
        cifar.read_cifar([place / name for name in names]) for names in (cifar.TRAIN, cifar.TEST)
    )
    return Dataset("cifar-10", str(place), train[0], test[0], train[1], test[1])


def _from_directory(name: str, directory: Path, origin: str, kinds: Sequence[str]) -> Dataset:
    places = (directory / name, directory)
    wanted = [(split, kind) for kind in kinds for split in SPLITS]
    for place in places:
        paths = [_find(place, split, kind) for split, kind in wanted]
        if all(paths):
            return _read(name, str(place), [path for path in paths if path])
    missing = [at for at in wanted if not any(_find(place, *at) for place in places)] or wanted
    looked_for = ", and ".join(" or ".join(_file_names(*at)[::2]) for at in missing)
    problem = "holds no" if directory.is_dir() else "is no directory, so it holds no"
    what = " and no ".join(
        f"{' or '.join(splits)} {kind}"
        for kind in kinds
        if (splits := [split for split, of in missing if of == kind])
    )
    raise DataError(
        f"{directory} (from {origin}) {problem} {what} of {name}. "
        f"Looked there and in {places[0]} for {looked_for}, plain or gzip (.gz). Put the files "
        f"there{_without_files(kinds)}, or name another directory."
    )


def _without_files(kinds: Sequence[str]) -> str:
    """What else can be done, where CURVES would do."""
    return "" if "labels" in kinds else ", or train without files: --dataset curves"


def _file_names(split: str, kind: str) -> tuple[str, ...]:
    return tuple(
        f"{SPLITS[split]}-{kind}{dot}{IDX[kind]}-ubyte{gz}" for dot in "-." for gz in ("", ".gz")
    )


def _find(directory: Path, split: str, kind: str) -> Path | None:
    files = (directory / name for name in _file_names(split, kind))
    return next((file for file in files if file.is_file()), None)


def _read(name: str, source: str, paths: Sequence[Path]) -> Dataset:
    """The data set in these files: training and test images, and perhaps labels of both."""
    splits = [_read_images(path) for path in paths[:2]]
    labels = [read_idx_labels(path) for path in paths[2:]]
    for path, images, of in zip(paths[2:], splits, labels, strict=False):
        if len(images) != len(of):
            raise DataError(f"{path} holds {len(of)} labels for {len(images)} images.")
    return Dataset(name, source, *splits, *labels)


def _read_images(path: Path) -> Float32[np.ndarray, "images 784"]:
    images = read_idx_images(path)
    pixels = IMAGE_SHAPE[0] * IMAGE_SHAPE[1]
    if images.shape[1] != pixels:
        raise DataError(
            f"{path} holds images of {images.shape[1]} pixels; the network needs {pixels} (28x28)."
        )
    return images


def _downloader() -> Any:
    return pooch.HTTPDownloader(sys.stderr.isatty(), timeout=DOWNLOAD_TIMEOUT)


def _from_download(name: str, notify: Callable[[str], None], kinds: Sequence[str]) -> Dataset:
    url, published = DOWNLOADS[name]
    files = [f"{SPLITS[split]}-{kind}-{IDX[kind]}-ubyte.gz" for kind in kinds for split in SPLITS]
    cache = Path(pooch.os_cache("locoprop_jax")) / name
    if not all((cache / file).is_file() for file in files):
        notify(f"Downloading {name} from {url} to {cache}.")
    pooch.get_logger().setLevel("WARNING")  # the line above says it already
    downloader = _downloader()
    try:
        paths = [
            Path(
                pooch.retrieve(
                    url + file, f"sha256:{published[file]}", file, cache, downloader=downloader
                )
            )
            for file in files
        ]
    # OSError: the network (requests' errors are such) or the disk. ValueError: pooch, a wrong hash.
    except (OSError, ValueError) as error:
        wrong_hash = isinstance(error, ValueError) and not isinstance(error, OSError)
        reason = "the file is not the published one" if wrong_hash else type(error).__name__
        raise DataError(
            f"{name} could not be downloaded from {url} ({reason}). Go online, or "
            f"put {' and '.join(files)} into a directory and name it with --data-dir or "
            f"{DATA_VARIABLE}{_without_files(kinds)}."
        ) from error
    return _read(name, f"{url}, cached in {cache}", paths)
