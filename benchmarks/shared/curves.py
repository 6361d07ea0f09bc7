"""CURVES: the synthetic images of Hinton and Salakhutdinov (2006), generated from a seed.

Every image shows one smooth curve that three random points in the square determine. The authors'
file is not needed: this draws images from the same kind of distribution, so losses on it compare
methods with each other, not with numbers published for the original file.
"""

import numpy as np
from jaxtyping import Float32

TRAIN_IMAGES, TEST_IMAGES = 20_000, 10_000
SIDE = 28
MARGIN = 4.0  # pixels; a parabola leaves its points' box by an eighth at most, so none is cut off
PEN_SIGMA = 0.75  # pixels; a Gaussian pen this wide draws anti-aliased strokes of about two pixels
SEGMENTS = 64  # a segment is then no longer than the pen is wide (its full width at half height)
CHUNK = 1000  # images drawn at once: bounds the memory


def generate_curves(
    seed: int = 0, train_images: int = TRAIN_IMAGES, test_images: int = TEST_IMAGES
) -> tuple[Float32[np.ndarray, "train 784"], Float32[np.ndarray, "test 784"]]:
    """The training and the test images, in [0, 1]; the same seed gives the same images."""
    # A stream of its own for each: a smaller training set leaves the test set as it is.
    return _draw_many(seed, 0, train_images), _draw_many(seed, 1, test_images)


def _draw_many(seed: int, stream: int, count: int) -> Float32[np.ndarray, "images 784"]:
    random = np.random.default_rng([seed, stream])
    points = random.uniform(MARGIN, SIDE - MARGIN, size=(count, 3, 2)).astype(np.float32)
    images = np.empty((count, SIDE * SIDE), np.float32)
    for start in range(0, count, CHUNK):
        images[start : start + CHUNK] = _draw(points[start : start + CHUNK])
    return images


def _draw(points: Float32[np.ndarray, "images 3 2"]) -> Float32[np.ndarray, "images 784"]:
    """Draw the parabola that runs through the three points at the times 0, 1/2 and 1.

    Ink is the line integral of a Gaussian pen along the curve, scaled to one on a straight line and
    cut there. The Gaussian factorises over rows and columns, so an image is one small product.
    """
    time = np.linspace(0, 1, SEGMENTS + 1, dtype=np.float32)
    lagrange = np.stack(
        [(1 - time) * (1 - 2 * time), 4 * time * (1 - time), time * (2 * time - 1)], axis=1
    )
    curve = np.einsum("tk,nkd->ntd", lagrange, points)
    middles = (curve[:, 1:] + curve[:, :-1]) / 2
    lengths = np.linalg.norm(curve[:, 1:] - curve[:, :-1], axis=-1)

    pixels = np.arange(SIDE, dtype=np.float32) + np.float32(0.5)
    offsets = (middles[..., None] - pixels) / np.float32(PEN_SIGMA)  # images, points, 2, side
    pen = np.exp(-(offsets**2) / 2)
    columns, rows = pen[:, :, 0], pen[:, :, 1]
    ink = np.matmul((rows * lengths[..., None]).transpose(0, 2, 1), columns)
    ink /= np.float32(np.sqrt(2 * np.pi) * PEN_SIGMA)
    return np.minimum(ink, 1).reshape(len(points), SIDE * SIDE)
