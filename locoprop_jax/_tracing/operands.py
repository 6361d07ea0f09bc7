"""From recorded operands to a layer's inputs: what its weights multiply, one kind after the other.

A reader is static. It takes the raw operands and returns an array whose axes are those of the
stack, of the rows and of the features, in some order; `shape` tells its shape from theirs.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import ConvDimensionNumbers, Precision
from jaxtyping import Array

from locoprop_jax._tracing import chains
from locoprop_jax._tracing.chains import Chain, Shape


@dataclasses.dataclass(frozen=True)
class AsItIs:
    """The operand of a matrix product."""

    def __call__(self, operand: Array) -> Array:
        return operand

    def shape(self, operand: Shape) -> Shape:
        return operand


@dataclasses.dataclass(frozen=True)
class Nothing:
    """A bias on its own has no inputs."""

    def __call__(self) -> Array:
        raise AssertionError("nothing was recorded")

    def shape(self) -> Shape:
        return ()


@dataclasses.dataclass(frozen=True)
class OneHotReader:
    """Rows of a table: indices (..., columns), of which one column counts its rows."""

    size: int
    column: int

    def ids(self, indices: Array) -> Array:
        return indices[..., self.column]

    def __call__(self, indices: Array) -> Array:
        return jax.nn.one_hot(self.ids(indices), self.size, dtype=jnp.float32)

    def shape(self, indices: Shape) -> Shape:
        return (*indices[:-1], self.size)


@dataclasses.dataclass(frozen=True)
class Times:
    """What a reader makes, times a number that the kernel was multiplied by."""

    reader: AsItIs | Patches

    def __call__(self, data: Array, factor: Array) -> Array:
        return self.reader(self.scaled(data, factor))

    def scaled(self, data: Array, factor: Array) -> Array:
        """What the reader reads: it is linear."""
        return data * factor.reshape(()).astype(data.dtype)

    def shape(self, data: Shape, factor: Shape) -> Shape:
        del factor
        return self.reader.shape(data)


class Stage(NamedTuple):
    """How a product was rearranged and broadcast before it met one more factor."""

    chain: Chain
    shape: Shape


@dataclasses.dataclass(frozen=True)
class Product:
    """Factors that a parameter was multiplied by, one after the other."""

    stages: tuple[Stage, ...]

    def __call__(self, *factors: Array) -> Array:
        product = jnp.broadcast_to(factors[0], self.stages[0].shape)
        for factor, stage in zip(factors[1:], self.stages[1:], strict=True):
            rearranged = chains.apply(stage.chain, product)
            product = jnp.broadcast_to(rearranged, stage.shape) * factor
        return product

    def shape(self, *factors: Shape) -> Shape:
        del factors
        return self.stages[-1].shape


@dataclasses.dataclass(frozen=True)
class Patches:
    """What a convolution's kernel meets at each pixel, (channels, *window) as one axis.

    With feature groups these are an axis more, in front of it.
    """

    window: Shape
    strides: Shape
    padding: tuple[tuple[int, int], ...]
    data_dilation: Shape
    window_dilation: Shape
    data_axes: Shape  # of batch, features and space
    out_axes: Shape
    groups: int

    def __call__(self, data: Array) -> Array:
        patches = jax.lax.conv_general_dilated_patches(
            data,
            self.window,
            self.strides,
            self.padding,
            self.data_dilation,
            self.window_dilation,
            ConvDimensionNumbers(self.data_axes, tuple(range(len(self.data_axes))), self.out_axes),
            precision=Precision.HIGHEST,
        )
        if self.groups == 1:
            return patches
        axis, shape = self.out_axes[1], patches.shape
        return patches.reshape(*shape[:axis], self.groups, -1, *shape[axis + 1 :])

    def shape(self, data: Shape) -> Shape:
        batch, features, *space = self.data_axes
        pixels = [
            (_dilated(data[axis], before) + sum(pads) - _dilated(size, after)) // stride + 1
            for axis, size, pads, before, after, stride in zip(
                space,
                self.window,
                self.padding,
                self.data_dilation,
                self.window_dilation,
                self.strides,
                strict=True,
            )
        ]
        made = (data[batch], data[features] * math.prod(self.window), *pixels)
        shape = [0] * len(made)
        for axis, size in zip(self.out_axes, made, strict=True):
            shape[axis] = size
        if self.groups > 1:
            axis = self.out_axes[1]
            shape[axis : axis + 1] = [self.groups, shape[axis] // self.groups]
        return tuple(shape)


def _dilated(size: int, dilation: int) -> int:
    return (size - 1) * dilation + 1 if size else 0


Reader = AsItIs | Nothing | OneHotReader | Product | Patches | Times
