"""`Layers`: which parameters form which layer. Static: no arrays, hashable, for any batch size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from locoprop_jax._layers import made, table
from locoprop_jax._layers.made import Made, Part, Point, Space
from locoprop_jax._layers.parameter import Parameter
from locoprop_jax._layers.transfer import Transfer
from locoprop_jax._tracing.chains import Shape
from locoprop_jax._tracing.reasons import Reason
from locoprop_jax._trees import leaves_by_path, path_name

Points = Mapping[tuple[str, str], Point]  # by layer and part, "kernel" or "bias"


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
    kernel: Part | None
    bias: Part | None
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
    def parts(self) -> dict[str, Part]:
        """Those that it has of its kernel and its bias."""
        both = {"kernel": self.kernel, "bias": self.bias}
        return {part: own for part, own in both.items() if own is not None}

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The arrays of the tree, or parts of them, that its kernel and bias are made of."""
        return _sources(self.kernel) + _sources(self.bias)

    @property
    def has_bias(self) -> bool:
        """Whether it has a bias, apart or as the last row of its kernel."""
        return self.bias is not None or (isinstance(self.kernel, Made) and self.kernel.has_bias)

    @property
    def size(self) -> int:
        """How many numbers its kernel and its bias hold."""
        return (self.stack or 1) * self.d_out * (self.d_in + (self.bias is not None))

    def signature(self) -> tuple:
        """What has to agree for captured arrays to belong to this layer."""
        return (self.kind, self.stack, self.d_in, self.d_out, self.uses, self.kernel, self.bias)

    def block(self, params: Any) -> Float[Array, "*stack d_in_with_bias d_out"]:
        """Kernel and bias as one matrix, the bias its last row."""
        leaves = leaves_by_path(params)
        own = {part: made.read(place, leaves, "values") for part, place in self.parts.items()}
        if "bias" in own:
            own["bias"] = own["bias"][..., None, :]
        return jnp.concatenate(list(own.values()), -2)

    def unblock(self, block: Float[Array, "*stack d_in_with_bias d_out"]) -> dict[str, Array]:
        """The inverse of `block`: arrays in the tree's layout, by path.

        A layer that has a part of an array gives it with zeros around. Of a kernel that the network
        makes of parameters there is no inverse, but of a bias as its last row.
        """
        leaves = {source.path: jnp.zeros(source.shape, block.dtype) for source in self.parameters}
        for part, value in self.split(block).items():
            leaves |= made.write(self.parts[part], value, leaves, "changes")
        return leaves

    def split(self, block: Float[Array, "*stack d_in_with_bias d_out"]) -> dict[str, Array]:
        """A block's kernel (*stack, d_in, d_out) and bias (*stack, d_out), those that there are."""
        both = {"kernel": block[..., : self.d_in, :], "bias": block[..., -1, :]}
        return {part: both[part] for part in self.parts}

    def to_dict(self) -> dict[str, Any]:
        """As plain data, see `Layers.to_dict`."""
        own = {name: getattr(self, name) for name in _AS_THEY_ARE}
        parameters = {"kernel": _sources(self.kernel), "bias": _sources(self.bias)}
        return own | {
            "window": list(self.window),
            "transfer": self.transfer.name,
            "note": self.transfer.note,
            "parameters": {
                part: [source.to_dict() for source in sources]
                for part, sources in parameters.items()
            },
        }


_AS_THEY_ARE = (
    *("name", "kind", "d_in", "d_out", "stack", "has_bias", "rows", "uses", "size"),
    *("is_output", "uses_head", "source", "bypasses"),
)


def _sources(part: Part | None) -> tuple[Parameter, ...]:
    """The arrays of the tree, or parts of them, that a kernel or bias is made of."""
    if isinstance(part, Made):
        return part.sources
    return () if part is None else (part,)


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

    def to_dict(self) -> dict[str, Any]:
        """As plain data, see `Layers.to_dict`."""
        return {
            "path": self.path,
            "shape": list(self.shape),
            "reason": str(self.reason),
            "remedy": self.remedy,
            "has_gradient": self.has_gradient,
        }


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
        return self.table()

    def table(self, *, fold: bool | None = None) -> str:
        """The text of `print(layers)`: a line for each layer, then the parameters in none.

        Args:
          fold: whether layers that differ in the numbers of their names alone share a line, whose
            name has these numbers in braces: "h_{0..11}/attn" is twelve layers. Of several braces
            all combinations are meant. None folds what would take more than 40 lines.
        """
        return table.table(self.to_dict(), fold)

    def to_dict(self) -> dict[str, Any]:
        """What is known of the model as plain data, which `json.dumps` takes.

        Returns:
          A dictionary with three entries.

          "layers" is a list with a dictionary for each layer, in the order the data meets them.
          It has the attributes of `Layer` under their names; "transfer" and "note" are the transfer
          function's. "parameters" has two lists, "kernel" and "bias", of the arrays that these are
          made of, each with its "path" and "shape". Its "part" is None for all of the array, or the
          [start, limit] by axis.

          "uncaptured" is a list of the parameters in no layer, each with its "path", "shape",
          "reason", "remedy" and "has_gradient".

          "size" is how many numbers the kernels and biases of all layers hold.
        """
        return {
            "layers": [layer.to_dict() for layer in self.values()],
            "uncaptured": [other.to_dict() for other in self.uncaptured],
            "size": sum(layer.size for layer in self.values()),
        }


def replace(
    layers: Layers,
    tree: Any,
    new: Mapping[str, Mapping[str, Array]],
    other: Callable[[Array], Array] = lambda leaf: leaf,
    space: Space = "changes",
    points: Points | None = None,
) -> Any:
    """The tree with the layers' new blocks in it, in its own dtypes, and `other` of the rest.

    Args:
      layers: from `find_layers`.
      tree: like the parameters.
      new: blocks by layer.
      other: what becomes of leaves in no layer, or only in part.
      space: whether the blocks are changes or gradients.
      points: where kernels that are made of parameters are linearised, from `Captured`.
    """
    leaves = leaves_by_path(tree)
    places = [
        (layers[name].parts[part], value, (points or {}).get((name, part)))
        for name, block in new.items()
        for part, value in block.items()
        if leaves.keys() >= set(made.paths(layers[name].parts[part]))  # none of it is masked
    ]
    whole = {
        path
        for place, *_ in places
        for path in made.paths(place)
        if not isinstance(place, Parameter) or place.part is None
    }
    written = {path: leaf if path in whole else other(leaf) for path, leaf in leaves.items()}
    for place, value, point in places:
        found = made.write(place, value, written, space, point)
        written |= {path: array.astype(leaves[path].dtype) for path, array in found.items()}
    return jax.tree_util.tree_map_with_path(lambda path, _: written[path_name(path)], tree)


def parameter_paths(layers: Mapping[str, Layer]) -> set[str]:
    """The paths of the parameters that are in a layer."""
    return {parameter.path for layer in layers.values() for parameter in layer.parameters}
