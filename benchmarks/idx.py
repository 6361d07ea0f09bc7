"""Read images from IDX files, the format of MNIST and of its drop-in replacements."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import Float32

GZIP_MAGIC = b"\x1f\x8b"
IMAGES_MAGIC, LABELS_MAGIC = 0x0803, 0x0801  # unsigned bytes in three dimensions, in one
HEADER = struct.Struct(">iiii")  # magic number, images, rows, columns


class DataError(ValueError):
    """The data cannot be had as asked; the message says why and what to do."""


def read_idx_images(path: Path) -> Float32[np.ndarray, "images pixels"]:
    """The images of an IDX file, gzip or plain, one per row, scaled to [0, 1].

    Raises:
      DataError: the file cannot be read, or is not a complete IDX file of images.
    """
    data = _read_bytes(path)
    if len(data) < HEADER.size:
        raise DataError(
            f"{path} is truncated: its header needs {HEADER.size} bytes and the file holds "
            f"{len(data)}. Fetch it again."
        )
    magic, count, rows, columns = HEADER.unpack_from(data)
    if magic != IMAGES_MAGIC:
        hint = " (that is an IDX file of labels)" if magic == LABELS_MAGIC else ""
        raise DataError(
            f"{path} has the wrong magic number: expected {IMAGES_MAGIC} for an IDX file of "
            f"images, got {magic}{hint}."
        )
    if min(count, rows, columns) < 1:
        raise DataError(f"{path} holds no images: its header says {count} of {rows}x{columns}.")
    expected, held = math.prod((count, rows, columns)), len(data) - HEADER.size
    if held != expected:
        cause = "is truncated" if held < expected else "has sizes that do not match"
        raise DataError(
            f"{path} {cause}: its header says {count} images of {rows}x{columns}, which is "
            f"{expected} bytes, and {held} bytes follow it. Fetch it again."
        )
    pixels = np.frombuffer(data, np.uint8, offset=HEADER.size)
    return pixels.reshape(count, rows * columns).astype(np.float32) / np.float32(255)


def _read_bytes(path: Path) -> bytes:
    """The file's bytes, unpacked when they are gzip, whatever the file's name says."""
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if data.startswith(GZIP_MAGIC) else data
    except EOFError as error:
        raise DataError(f"{path} is truncated: its gzip stream ends early. Fetch it again.") from (
            error
        )
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is corrupt gzip: {error}. Fetch it again.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
