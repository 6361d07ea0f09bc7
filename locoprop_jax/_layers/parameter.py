"""Where a kernel or bias that is an array of the tree, or a part of one, lies in it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from locoprop_jax._tracing import chains
from locoprop_jax._tracing.chains import Chain, Part, Shape


@dataclasses.dataclass(frozen=True)
class Parameter:
    """Where a layer's kernel or bias lies in the parameter tree, and how it is laid out there.

    Attributes:
      path: its path in the tree, "Dense_0/kernel".
      shape: its shape in the tree.
      chain: what brings it to (d_in, d_out), or to (d_out,) for a bias; with the axis of a stack
        in front.
      part: the part of the array that it is, None for all of it.
    """

    path: str
    shape: Shape
    chain: Chain = ()
    part: Part | None = None

    def read(self, leaf: Array) -> Array:
        """From the tree's layout to the block's."""
        return chains.apply(self.chain, leaf if self.part is None else self.part.take(leaf))

    def write(self, block: Array, leaf: Array | None = None) -> Array:
        """From the block's layout to the tree's; a part of an array into `leaf`, or into zeros."""
        shape = self.shape
        if self.part is not None:
            pairs = zip(self.part.starts, self.part.limits, strict=True)
            shape = tuple(limit - start for start, limit in pairs)
        own = chains.apply(chains.inverse(self.chain, shape), block)
        if self.part is None:
            return own
        return self.part.put(jnp.zeros(self.shape, own.dtype) if leaf is None else leaf, own)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, see `Layers.to_dict`."""
        part = self.part and [list(span) for span in zip(*self.part[1:], strict=True)]
        return {"path": self.path, "shape": list(self.shape), "part": part}
