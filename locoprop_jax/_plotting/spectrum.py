"""The eigenvalues of the second moment of a layer's inputs, and where damping lies among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from locoprop_jax import _linalg
from locoprop_jax._layers.arrays import LayerArrays
from locoprop_jax._layers.captured import Captured
from locoprop_jax._layers.layers import Layer, Layers
from locoprop_jax._layers.rows import Inputs
from locoprop_jax._layers.stacking import over_stack
from locoprop_jax._neurons.amortised import row_limit
from locoprop_jax._neurons.second_moment import Damping, Statistics, statistics_of
from locoprop_jax._trees import wide_dtype


class Spectrum(NamedTuple):
    """Of one layer's inputs, from one batch; eigenvalues fall. A stack has its axis in front.

    Attributes:
      second: eigenvalues of X'X / N, N the rows.
      centred: of the same about the mean of the rows, which is what a free bias leaves to the
        kernel; None without a bias.
      damping: what `foof` adds to them.
    """

    second: Float[np.ndarray, "*stack d_in"]
    centred: Float[np.ndarray, "*stack d_in"] | None
    damping: Float[np.ndarray, "*stack"]

    @property
    def inverted(self) -> Float[np.ndarray, "*stack d_in"]:
        """The eigenvalues to which the damping is added."""
        return self.second if self.centred is None else self.centred

    @property
    def effective_rank(self) -> Float[np.ndarray, "*stack"]:
        """Of these: the exponential of the entropy of their shares in the sum (Roy, Vetterli)."""
        total = self.inverted.sum(-1, keepdims=True)
        share = self.inverted / np.where(total > 0, total, 1)
        return np.exp(-np.sum(share * np.log(np.where(share > 0, share, 1)), -1))

    @property
    def undamped(self) -> Float[np.ndarray, "*stack"]:
        """How many directions damping leaves free: the sum of s / (s + damping) over them."""
        shifted = self.inverted + self.damping[..., None]
        return np.sum(self.inverted / np.where(shifted > 0, shifted, 1), -1)


def has_spectrum(layer: Layer) -> bool:
    """Whether its inputs are more than one number: those of a scale and of a bias are not."""
    return layer.kernel is not None and layer.d_in > 1


def spectra(
    layers: Layers, captured: Captured, names: Sequence[str], damping: Damping
) -> dict[str, Spectrum]:
    """By name, of layers that have one. What `foof` keeps by its diagonal is one here too."""
    return {name: _spectrum(layers[name], captured[name], damping) for name in names}


def _spectrum(layer: Layer, arrays: LayerArrays, damping: Damping) -> Spectrum:
    is_free = layer.bias is not None

    def moments(inputs: Inputs) -> tuple[Statistics, jax.Array]:
        own = statistics_of(inputs, row_limit(None))
        squares = _linalg.diagonal(own.second)
        variances = squares - _linalg.squares(own.mean) if is_free else squares
        return own, damping.of_rows(inputs).of(variances, squares)

    inputs = arrays.rows(wide_dtype([arrays.first.outputs]))
    own, amount = over_stack(layer, moments)(inputs)
    second, mean = np.asarray(own.second), np.asarray(own.mean)
    centred = None
    if is_free:
        is_diagonal = second.ndim == mean.ndim
        conjugate = np.conj(mean)
        product = conjugate * mean if is_diagonal else conjugate[..., None] * mean[..., None, :]
        centred = _eigenvalues(second - product, mean)
    return Spectrum(_eigenvalues(second, mean), centred, np.asarray(amount, float))


def _eigenvalues(second: Any, mean: Any) -> Float[np.ndarray, "*stack d_in"]:
    """Falling, and not below zero; of a matrix, or of one given by its diagonal."""
    wide = second.astype(np.result_type(second.dtype, float))
    found = np.sort(wide.real, -1) if second.ndim == mean.ndim else np.linalg.eigvalsh(wide)
    return np.maximum(found[..., ::-1], 0)
