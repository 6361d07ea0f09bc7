"""Read CIFAR-10's binary version: a byte of label, then a plane of bytes for each colour."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int32

from benchmarks.shared.idx import DataError

SHAPE = (3, 32, 32)
RECORD = 1 + 3 * 32 * 32
TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST = ("test_batch.bin",)
FOLDER = "cifar-10-batches-bin"  # what its archive holds
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"


def find_cifar(directory: Path) -> Path | None:
    """Where the files are: in the directory, or in the folder of the archive."""
    folders = (directory, directory / "cifar-10")
    places = [place for folder in folders for place in (folder, folder / FOLDER)]
    return next((p for p in places if all((p / name).is_file() for name in TRAIN + TEST)), None)


def read_cifar(
    paths: Sequence[Path],
) -> tuple[Float32[np.ndarray, "n 3072"], Int32[np.ndarray, " n"]]:
    """Images, (height, width, channels) as one axis and scaled to [0, 1], and labels.

    Raises:
      DataError: a file is not made of whole records.
    """
    records = []
    for path in paths:
        raw = np.fromfile(path, np.uint8)
        if raw.size % RECORD or not raw.size:
            raise DataError(f"{path} does not hold whole records of CIFAR-10, {RECORD} bytes each.")
        records.append(raw.reshape(-1, RECORD))
    joined = np.concatenate(records)
    images = joined[:, 1:].reshape(-1, *SHAPE).transpose(0, 2, 3, 1).reshape(len(joined), -1)
    return images.astype(np.float32) / np.float32(255), joined[:, 0].astype(np.int32)
