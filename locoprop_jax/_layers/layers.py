"""`Layers`: which parameters form which layer. Static: no arrays, hashable, for any batch size."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from locoprop_jax._layers.transfer import Transfer
from locoprop_jax._tracing import chains
from locoprop_jax._tracing.chains import Chain, Part, Shape
from locoprop_jax._tracing.reasons import Reason
from locoprop_jax._trees import leaves_by_path, path_name


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


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer, as capture understood it.

    Attributes:
      name: the path of its kernel's parent ("encoder/Dense_0").
      kind: "dense", "conv", "scale" (a product entry by entry), "embedding" (rows of a table),
        "bias" (a parameter added to data) or "tied" (a dense layer whose kernel is used transposed
        elsewhere: as a table, or by another layer).
      d_in: inputs per row; of a convolution the entries of a patch, (channels, *window).
      d_out: outputs per row.
      kernel: where its kernel lies, None for a bias on its own.
      bias: where its bias lies, None without one.
      rows: rows per example (`shared`) in the batch it was found with; None where the batch axis
        could not be told.
      transfer: the elementwise function that the network applies to its outputs.
      is_output: whether its outputs go straight into the loss, not into another layer.
      source: the layer whose transferred outputs are, row by row, this layer's inputs; None where
        anything else happens in between.
      stack: how many independent layers of these sizes it is, None for one that is no stack. All
        its arrays then have an axis for them in front. A scale and a bias are stacks, of one layer
        for each entry.
      window: the spatial shape of a convolution's kernel.
      uses: how often the network applies it; the rows of all uses are joined.
      bypasses: whether its outputs reach the loss past all other layers, beside those that they
        feed: by a residual connection around the last layer, or by a penalty on activations.
    """

    name: str
    kind: str
    d_in: int
    d_out: int
    kernel: Parameter | None
    bias: Parameter | None
    rows: int | None = dataclasses.field(compare=False)
    transfer: Transfer
    is_output: bool
    source: str | None = None
    bypasses: bool = False
    stack: int | None = None
    window: Shape = ()
    uses: int = 1

    @property
    def uses_head(self) -> bool:
        """Whether the loss itself stands in for the transfer function: unless one was given."""
        return self.is_output and not self.transfer.given and self.is_single

    @property
    def is_single(self) -> bool:
        """Whether it is one layer, applied once."""
        return self.stack is None and self.uses == 1

    @property
    def is_lookup(self) -> bool:
        """Whether its inputs are one-hot, so that their second moment is diagonal."""
        return self.kind == "embedding"

    @property
    def parts(self) -> dict[str, Parameter]:
        """Those that it has of its kernel and its bias."""
        both = {"kernel": self.kernel, "bias": self.bias}
        return {part: own for part, own in both.items() if own is not None}

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return tuple(self.parts.values())

    @property
    def size(self) -> int:
        """How many numbers its parameters hold."""
        return (self.stack or 1) * self.d_out * (self.d_in + (self.bias is not None))

    def signature(self) -> tuple:
        """What has to agree for captured arrays to belong to this layer."""
        return (self.kind, self.stack, self.d_in, self.d_out, self.uses, self.kernel, self.bias)

    def block(self, params: Any) -> Float[Array, "*stack d_in_with_bias d_out"]:
        """Kernel and bias as one matrix, the bias its last row."""
        leaves = leaves_by_path(params)
        parts = []
        if self.kernel is not None:
            parts.append(self.kernel.read(leaves[self.kernel.path]))
        if self.bias is not None:
            parts.append(self.bias.read(leaves[self.bias.path])[..., None, :])
        return jnp.concatenate(parts, -2)

    def unblock(self, block: Float[Array, "*stack d_in_with_bias d_out"]) -> dict[str, Array]:
        """The inverse of `block`: arrays in the tree's layout, by path.

        A layer that has a part of an array gives it with zeros around.
        """
        leaves: dict[str, Array] = {}
        for part, value in self.split(block).items():
            parameter = self.parts[part]
            leaves[parameter.path] = parameter.write(value, leaves.get(parameter.path))
        return leaves

    def split(self, block: Float[Array, "*stack d_in_with_bias d_out"]) -> dict[str, Array]:
        """A block's kernel (*stack, d_in, d_out) and bias (*stack, d_out), those that there are."""
        both = {"kernel": block[..., : self.d_in, :], "bias": block[..., -1, :]}
        return {part: both[part] for part in self.parts}


@dataclasses.dataclass(frozen=True)
class Uncaptured:
    """A parameter in no layer: where it is and why."""

    path: str
    shape: Shape
    reason: Reason
    has_gradient: bool

    @property
    def remedy(self) -> str:
        """How to write the model so that it is in a layer; empty if there is nothing to remedy."""
        return self.reason.remedy


class Layers(Mapping[str, Layer]):
    """The layers of a model by name, in the order the data meets them. Static and hashable.

    Attributes:
      uncaptured: the parameters in no layer, each with the reason.
    """

    def __init__(self, layers: Sequence[Layer], uncaptured: Sequence[Uncaptured] = ()):
        self._layers = {layer.name: layer for layer in layers}
        self.uncaptured = tuple(uncaptured)

    def __getitem__(self, name: str) -> Layer:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def _key(self) -> tuple:
        return tuple(self._layers.values()), self.uncaptured

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layers) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def block(self, params: Any, name: str) -> Float[Array, "d_in_with_bias d_out"]:
        """A layer's kernel and bias as one matrix, the bias its last row."""
        return self[name].block(params)

    def unblock(self, block: Float[Array, "d_in_with_bias d_out"], name: str) -> dict[str, Array]:
        """The inverse of `block`: arrays in the parameter tree's layout, by path."""
        return self[name].unblock(block)

    def replace(self, tree: Any, new: Mapping[str, Array]) -> Any:
        """A tree like the parameters with new blocks in it, and all else as it was.

        Args:
          tree: the parameters or their updates, of which some may be masked; leaves keep their
            dtypes.
          new: blocks by the layer's name, each (*stack, d_in [+ 1], d_out).
        """
        return replace(self, tree, {name: self[name].split(block) for name, block in new.items()})

    def __repr__(self) -> str:
        return f"<Layers: {', '.join(self)}>"

    def __str__(self) -> str:
        rows = [
            (
                layer.name,
                layer.kind,
                _sizes(layer),
                "yes" if layer.bias else "no",
                "?" if layer.rows is None else str(layer.rows),
                _describe(layer),
                f"{layer.size:,}",
            )
            for layer in self.values()
        ]
        header = ("layer", "kind", "shape", "bias", "rows", "transfer", "parameters")
        total = f"{len(rows)} layers, {sum(layer.size for layer in self.values()):,} parameters"
        text = [_table([header, *rows], right=(4, 6)), total]
        for title, flag in (
            ("Not in a layer (their gradient passes unchanged):", True),
            ("Without a gradient:", False),
        ):
            lines = [
                f"  {other.path} {list(other.shape)}: {other.reason}"
                for other in self.uncaptured
                if other.has_gradient is flag
            ]
            text += ["", title, *lines] if lines else []
        return "\n".join(text)


def replace(
    layers: Layers,
    tree: Any,
    new: Mapping[str, Mapping[str, Array]],
    other: Callable[[Array], Array] = lambda leaf: leaf,
) -> Any:
    """The tree with the layers' new blocks in it, in its own dtypes, and `other` of the rest."""
    by_path: dict[str, list[tuple[Parameter, Array]]] = {}
    for name, block in new.items():
        for part, value in block.items():
            parameter = layers[name].parts[part]
            by_path.setdefault(parameter.path, []).append((parameter, value))

    def replaced(path: Any, leaf: Array) -> Array:
        found = by_path.get(path_name(path), [])
        if not found or found[0][0].part is not None:
            leaf = other(leaf)
        for parameter, value in found:
            leaf = parameter.write(value.astype(leaf.dtype), leaf)
        return leaf

    return jax.tree_util.tree_map_with_path(replaced, tree)


def parameter_paths(layers: Mapping[str, Layer]) -> set[str]:
    """The paths of the parameters that are in a layer."""
    return {parameter.path for layer in layers.values() for parameter in layer.parameters}


def _sizes(layer: Layer) -> str:
    if layer.kind in ("scale", "bias"):
        return str(layer.stack)
    d_in = str(layer.d_in)
    if layer.kind == "conv":
        channels = layer.d_in // math.prod(layer.window)
        d_in = "x".join(map(str, (*layer.window, channels)))
    return (
        f"{layer.stack} x ({d_in} -> {layer.d_out})" if layer.stack else f"{d_in} -> {layer.d_out}"
    )


def _describe(layer: Layer) -> str:
    if layer.uses_head:
        return "(loss)"
    name, note = layer.transfer.name, layer.transfer.note
    return f"{name}: {note}" if note else name


def _table(rows: Sequence[Sequence[str]], right: Sequence[int]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
