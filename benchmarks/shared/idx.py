"""Read images and labels from IDX files, the format of MNIST and its drop-in replacements."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int32, UInt8

GZIP_MAGIC = b"\x1f\x8b"
# Unsigned bytes in three dimensions (images, rows, columns), and in one.
MAGIC = {"images": 0x0803, "labels": 0x0801}
HEADER = {"images": struct.Struct(">iiii"), "labels": struct.Struct(">ii")}  # magic, dimensions


class DataError(ValueError):
    """The data cannot be had as asked; the message says why and what to do."""


def read_idx_images(path: Path) -> Float32[np.ndarray, "images pixels"]:
    """The images of an IDX file, gzip or plain, one per row, scaled to [0, 1].

    Raises:
      DataError: the file cannot be read, or is not a complete IDX file of images.
    """
    pixels = _read_idx(path, "images")
    return pixels.reshape(len(pixels), -1).astype(np.float32) / np.float32(255)


def read_idx_labels(path: Path) -> Int32[np.ndarray, " labels"]:
    """The labels of an IDX file, gzip or plain.

    Raises:
      DataError: the file cannot be read, or is not a complete IDX file of labels.
    """
    return _read_idx(path, "labels").astype(np.int32)


def _read_idx(path: Path, kind: str) -> UInt8[np.ndarray, "examples ..."]:
    data, header = _read_bytes(path), HEADER[kind]
    if len(data) < header.size:
        raise DataError(
            f"{path} is truncated: its header needs {header.size} bytes and the file holds "
            f"{len(data)}. Fetch it again."
        )
    magic, *shape = header.unpack_from(data)
    if magic != MAGIC[kind]:
        others = [other for other, number in MAGIC.items() if number == magic]
        hint = f" (that is an IDX file of {others[0]})" if others else ""
        raise DataError(
            f"{path} has the wrong magic number: expected {MAGIC[kind]} for an IDX file of "
            f"{kind}, got {magic}{hint}."
        )
    of_size = f" of {'x'.join(map(str, shape[1:]))}" if shape[1:] else ""
    if min(shape) < 1:
        raise DataError(f"{path} holds no {kind}: its header says {shape[0]}{of_size}.")
    expected, held = math.prod(shape), len(data) - header.size
    if held != expected:
        cause = "is truncated" if held < expected else "has sizes that do not match"
        raise DataError(
            f"{path} {cause}: its header says {shape[0]} {kind}{of_size}, which is "
            f"{expected} bytes, and {held} bytes follow it. Fetch it again."
        )
    return np.frombuffer(data, np.uint8, offset=header.size).reshape(shape)


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
