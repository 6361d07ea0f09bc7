"""What one batch left at each place where a layer is applied, and how to read it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from locoprop_jax._tracing import chains
from locoprop_jax._tracing.chains import Chain
from locoprop_jax._tracing.jaxpr import Path
from locoprop_jax._tracing.operands import OneHotReader, Patches, Reader, Times


@dataclasses.dataclass(frozen=True)
class Layout:
    """How raw arrays become (batch, shared, d), and outputs go back. Static."""

    reader: Reader
    loops: int  # how many axes are in front of what the reader takes
    by_example: bool  # whether a convolution's examples are its batch, and it runs once
    inputs: Chain  # of what the reader makes
    ids: Chain  # of the places of ones that an embedding's reader makes
    outputs: Chain
    outputs_back: Chain
    transferred: Chain | None  # of what the transfer function makes of the outputs
    constant: float | None = None  # one more input, for a bias that is a row of the kernel


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "operands",
        "outputs",
        "cotangents",
        "transferred_cotangents",
        "curvature",
        "transferred_curvature",
    ],
    meta_fields=["layout", "paths", "parts"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Use:
    """What one batch left where a layer is applied, as the model laid it out.

    Attributes:
      operands: what the layer's inputs are read from.
      outputs: the layer's, with the bias.
      cotangents: the derivative of the loss by the outputs.
      transferred_cotangents: the derivative of the loss by what the transfer function makes of
        them; None at an output layer, and where there is no transfer function.
      layout: how to read these arrays.
      paths: of both cotangents, among all that are captured.
      curvature: the curvature cotangents, with a leading axis of samples; None if they were not
        captured.
      transferred_curvature: those after the transfer function; None where the cotangents are.
      parts: how many batches these are, with their axis in front of all arrays; None for one.
    """

    operands: tuple[Array, ...]
    outputs: Array
    cotangents: Array
    transferred_cotangents: Array | None
    layout: Layout
    paths: tuple[Path, Path | None]
    curvature: Array | None = None
    transferred_curvature: Array | None = None
    parts: int | None = None

    def with_curvature(self, cotangents: Mapping[Path, Array]) -> Use:
        """With its own of the curvature cotangents."""
        own, transferred = (None if p is None else cotangents.get(p) for p in self.paths)
        return dataclasses.replace(self, curvature=own, transferred_curvature=transferred)

    def joined(self, parts: int) -> Use:
        """What was stacked, as of one batch whose loss is the mean."""
        shares = {
            "cotangents": 1 / parts,
            "transferred_cotangents": 1 / parts,
            "curvature": 1 / math.sqrt(parts),
            "transferred_curvature": 1 / math.sqrt(parts),
        }
        scaled = {
            name: None if getattr(self, name) is None else share * getattr(self, name)
            for name, share in shares.items()
        }
        return dataclasses.replace(self, parts=parts, **scaled)

    # In the one format of all methods, (batch, shared, d), with the stack in front.

    def read_outputs(self) -> Array:
        return self.read(self.layout.outputs, self.outputs)

    def read_cotangents(self) -> Array:
        return self.read(self.layout.outputs, self.cotangents)

    def read_curvature(self) -> Array:
        """With samples in front of the batch."""
        return self.read_samples(self.layout.outputs, self.curvature)

    def read(self, chain: Chain | None, raw: Array | None) -> Array:
        """Outputs, or what is like them, as (batch, shared, d_out), with the stack in front."""
        assert chain is not None
        return self._read(functools.partial(chains.apply, chain), raw)

    def read_samples(self, chain: Chain | None, raw: Array | None) -> Array:
        """The same with samples: the fourth axis from the end, the first of the raw array."""
        assert chain is not None
        return self._read(jax.vmap(functools.partial(chains.apply, chain), out_axes=-4), raw)

    def read_ids(self) -> Int[Array, "batch shared 1"]:
        """The places of the ones in one-hot inputs."""
        reader = self.layout.reader
        assert isinstance(reader, OneHotReader)

        def of_part(*operands: Array) -> Array:
            return chains.apply(self.layout.ids, reader.ids(*operands))

        return self._read(of_part, *self.operands)

    def read_data(self) -> tuple[Patches, Array]:
        """How a convolution's kernel is moved, and over what."""
        reader, scaled = self.layout.reader, lambda data: data
        if isinstance(reader, Times):
            reader, scaled = reader.reader, reader.scaled
        assert isinstance(reader, Patches)
        back = reader.data_axes[0] - (self.operands[0].ndim - (self.parts is not None))
        return reader, self._read(scaled, *self.operands, batch_axis=back)

    def read_inputs(self) -> Array:
        if not self.operands:
            outputs = self.read_outputs()
            return jnp.zeros((*outputs.shape[:-1], 0), outputs.dtype)
        read: Callable[..., Array] = self.layout.reader
        for _ in range(self.layout.loops):
            read = jax.vmap(read)

        def inputs(*operands: Array) -> Array:
            x = chains.apply(self.layout.inputs, read(*operands))
            if (constant := self.layout.constant) is None:
                return x
            return jnp.concatenate([x, jnp.full((*x.shape[:-1], 1), constant, x.dtype)], -1)

        return self._read(inputs, *self.operands)

    def _read(self, of_part: Callable[..., Array], *raw: Any, batch_axis: int = -3) -> Array:
        """Of all batches one after the other along their axis, which is counted from the end."""
        if self.parts is None:
            return of_part(*raw)
        x = jnp.moveaxis(jax.vmap(of_part)(*raw), 0, batch_axis - 1)
        axis = x.ndim + batch_axis
        return x.reshape(*x.shape[: axis - 1], -1, *x.shape[axis + 1 :])
