"""What capture hands to the methods: `Layers` (static) and `Captured` (arrays).

`Layers` says which parameters form which layer; it holds no arrays, can be hashed and does not
depend on the batch size. `Captured` holds the activations and cotangents of one batch, raw, with
the static layout that turns them into the one format all methods read:

    inputs      X   (batch, shared, d_in)
    outputs     A   (batch, shared, d_out)    pre-activations, bias included
    cotangents  E   (batch, shared, d_out)    dL/dA of the loss as written
    curvature       (samples, batch, shared, d_out)    cotangents of Fisher and Gauss-Newton methods
    output_hessian  (d_out, d_out) or (d_out,)    at the output layer, for `scale_by_kfra`

`shared` counts the positions where one example meets the weights (1 for a plain dense layer).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from locoprop_jax import _chains, _jaxpr
from locoprop_jax._chains import Chain, Shape
from locoprop_jax._jaxpr import Path
from locoprop_jax._transfer import Transfer


def path_name(path: Sequence[Any]) -> str:
    """A parameter's path as text: "encoder/Dense_0/kernel". NNX's trailing `.value` is left out."""
    if path and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value":
        path = path[:-1]
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a parameter tree by path; masked-out ones (`optax.MaskedNode`) are absent."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


# --- static --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Parameter:
    """Where a layer's kernel or bias lies in the parameter tree, and how it is laid out there.

    Attributes:
      path: its path in the tree, "Dense_0/kernel".
      shape: its shape in the tree.
      chain: what brings it to (d_in, d_out), or to (d_out,) for a bias.
    """

    path: str
    shape: Shape
    chain: Chain = ()

    def read(self, leaf: Array) -> Array:
        """From the tree's layout to the block's."""
        return _chains.apply(self.chain, leaf)

    def write(self, block: Array) -> Array:
        """From the block's layout to the tree's."""
        return _chains.apply(_chains.inverse(self.chain, self.shape), block)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer, as capture understood it.

    Attributes:
      name: the path of its kernel's parent ("encoder/Dense_0").
      kind: "dense".
      d_in: inputs per row.
      d_out: outputs per row.
      kernel: where its kernel lies.
      bias: where its bias lies, None without one.
      rows: rows per example (`shared`) in the batch it was found with; None where the batch axis
        could not be told.
      transfer: the elementwise function that the network applies to its outputs.
      is_output: whether its outputs go straight into the loss, not into another layer.
      source: the layer whose transferred outputs are, row by row, this layer's inputs; None where
        anything else happens in between.
      bypasses: whether its outputs reach the loss past all other layers, beside those that they
        feed: by a residual connection around the last layer, or by a penalty on activations.
    """

    name: str
    kind: str
    d_in: int
    d_out: int
    kernel: Parameter
    bias: Parameter | None
    rows: int | None = dataclasses.field(compare=False)
    transfer: Transfer
    is_output: bool
    source: str | None = None
    bypasses: bool = False

    @property
    def uses_head(self) -> bool:
        """Whether the loss itself stands in for the transfer function: unless one was given."""
        return self.is_output and not self.transfer.given

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return (self.kernel,) if self.bias is None else (self.kernel, self.bias)

    @property
    def size(self) -> int:
        """How many numbers its parameters hold."""
        return self.d_in * self.d_out + (self.d_out if self.bias else 0)

    def signature(self) -> tuple:
        """What has to agree for captured arrays to belong to this layer."""
        return (self.kind, self.d_in, self.d_out, self.kernel, self.bias)

    def block(self, params: Any) -> Float[Array, "d_in_with_bias d_out"]:
        """Kernel and bias as one matrix, the bias its last row."""
        leaves = leaves_by_path(params)
        kernel = self.kernel.read(leaves[self.kernel.path])
        if self.bias is None:
            return kernel
        return jnp.concatenate([kernel, self.bias.read(leaves[self.bias.path])[None]])

    def unblock(self, block: Float[Array, "d_in_with_bias d_out"]) -> dict[str, Array]:
        """The inverse of `block`: arrays in the tree's layout, by path."""
        leaves = {self.kernel.path: self.kernel.write(block[: self.d_in])}
        if self.bias is not None:
            leaves[self.bias.path] = self.bias.write(block[self.d_in])
        return leaves


@dataclasses.dataclass(frozen=True)
class Uncaptured:
    """A parameter in no layer: where it is and why."""

    path: str
    shape: Shape
    reason: str
    has_gradient: bool


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

    def __repr__(self) -> str:
        return f"<Layers: {', '.join(self)}>"

    def __str__(self) -> str:
        rows = [
            (
                layer.name,
                layer.kind,
                f"{layer.d_in} -> {layer.d_out}",
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


def parameter_paths(layers: Mapping[str, Layer]) -> set[str]:
    """The paths of the parameters that are in a layer."""
    return {parameter.path for layer in layers.values() for parameter in layer.parameters}


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


# --- arrays --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Layout:
    """How raw arrays become (batch, shared, d), and outputs go back. Static."""

    inputs: Chain
    outputs: Chain
    outputs_back: Chain
    transferred: Chain | None  # of what the transfer function makes of the outputs


class StaticJaxpr:
    """A traced function as static data of a pytree: compared by its text."""

    def __init__(self, closed: Any):
        self.closed = closed

    @functools.cached_property
    def text(self) -> str:
        return str(self.closed)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StaticJaxpr) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["free"],
    meta_fields=["function", "layout", "dtype", "terms"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Head:
    """What lies between an output layer and the loss: the loss as a function of its outputs.

    Attributes:
      free: the other arrays the loss needs (labels, weights), held fixed.
      function: loss(raw outputs, *free), traced.
      layout: the layer's layout.
      dtype: of the raw outputs.
      terms: how many terms the loss averages over (mathematics: c), the number of rows where the
        loss does not show it.
    """

    free: tuple[Array, ...]
    function: StaticJaxpr
    layout: Layout
    dtype: Any
    terms: float

    def loss(self, outputs: Float[Array, "batch shared d_out"]) -> Float[Array, ""]:
        """The loss, were these the layer's outputs."""
        raw = _chains.apply(self.layout.outputs_back, outputs).astype(self.dtype)
        return _jaxpr.as_callable(self.function.closed)(raw, *self.free)[0]

    def gradient(
        self, outputs: Float[Array, "batch shared d_out"]
    ) -> Float[Array, "batch shared d_out"]:
        """dL/dA at these outputs; at the captured ones it equals the cotangents."""
        return jax.grad(self.loss)(outputs)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["back", "columns"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True, eq=False)
class Deferred:
    """Curvature cotangents that nobody has read yet: one more backward pass makes them.

    Attributes:
      back: the backward pass from the targets to the cotangents by path.
      columns: what is injected at the targets, (columns, *outputs) each.
    """

    back: Callable[[Any], Mapping[Path, Array]]
    columns: Any

    def pull(self) -> Mapping[Path, Array]:
        """The cotangents by path, with a leading axis of columns."""
        return jax.vmap(self.back)(self.columns)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "raw_inputs",
        "raw_outputs",
        "raw_cotangents",
        "raw_transferred_cotangents",
        "head",
        "raw_curvature",
        "raw_transferred_curvature",
        "output_hessian",
        "deferred",
    ],
    meta_fields=["signature", "layout", "has_transferred", "paths"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class LayerArrays:
    """What one batch left at one layer. The views cost nothing until they are read.

    Attributes:
      raw_inputs: what the layer's matrix product read, as the model laid it out.
      raw_outputs: its result with the bias.
      raw_cotangents: the derivative of the loss by it.
      raw_transferred_cotangents: the derivative of the loss by what the transfer function makes
        of it; None at an output layer, and where there is no transfer function.
      head: the loss as a function of the outputs; None unless this is an output layer.
      signature: of the layer these arrays belong to.
      layout: how to read the raw arrays.
      has_transferred: whether `transferred_cotangents` were captured.
      raw_curvature: the curvature cotangents, with a leading axis of samples; None if they were
        not captured.
      raw_transferred_curvature: those after the transfer function; None where the cotangents are.
      output_hessian: the sum over rows of the Hessian of the loss as written by the outputs of
        each, (d_out, d_out), or its diagonal (d_out,) where the loss takes each output by itself.
        None unless `curvature="ggn_output"` was captured and this is the output layer.
      paths: of `raw_cotangents` and of `raw_transferred_cotangents`, among all that are captured.
      deferred: what makes the curvature cotangents once they are read.
    """

    raw_inputs: Array
    raw_outputs: Array
    raw_cotangents: Array
    raw_transferred_cotangents: Array | None
    head: Head | None
    signature: tuple
    layout: Layout
    has_transferred: bool = False
    raw_curvature: Array | None = None
    raw_transferred_curvature: Array | None = None
    output_hessian: Array | None = None
    paths: tuple[Path | None, Path | None] = (None, None)
    deferred: Deferred | None = None

    def with_curvature(self, cotangents: Mapping[Path, Array]) -> LayerArrays:
        """With its own of the curvature cotangents."""
        raw, transferred = (None if p is None else cotangents.get(p) for p in self.paths)
        return dataclasses.replace(
            self, raw_curvature=raw, raw_transferred_curvature=transferred, deferred=None
        )

    @property
    def inputs(self) -> Float[Array, "batch shared d_in"]:
        return _chains.apply(self.layout.inputs, self.raw_inputs)

    @property
    def outputs(self) -> Float[Array, "batch shared d_out"]:
        return _chains.apply(self.layout.outputs, self.raw_outputs)

    @property
    def cotangents(self) -> Float[Array, "batch shared d_out"]:
        return _chains.apply(self.layout.outputs, self.raw_cotangents)

    @property
    def transferred_cotangents(self) -> Float[Array, "batch shared d_out"]:
        """dL/df(A), the cotangents after the transfer function: E itself without one.

        Raises:
          ValueError: they were not captured.
        """
        if not self.has_transferred:
            raise ValueError(
                "The cotangents after the transfer functions were not captured: ask for them by "
                "`value_grad_and_capture(loss_fn, transferred=True)`."
            )
        if self.raw_transferred_cotangents is None:
            return self.cotangents
        assert self.layout.transferred is not None
        return _chains.apply(self.layout.transferred, self.raw_transferred_cotangents)

    @property
    def curvature(self) -> Float[Array, "samples batch shared d_out"]:
        """The curvature cotangents C: sum C'C has the expectation of the Gauss-Newton block.

        Summed over samples and rows, with no further factor of the batch size.

        Raises:
          ValueError: they were not captured.
        """
        if self.deferred is not None:
            return self.with_curvature(self.deferred.pull()).curvature
        if self.raw_curvature is None:
            raise ValueError(
                "The curvature cotangents were not captured: ask for them by "
                '`value_grad_and_capture(loss_fn, curvature="ggn_mc")` (or another kind).'
            )
        return jax.vmap(lambda c: _chains.apply(self.layout.outputs, c))(self.raw_curvature)

    @property
    def transferred_curvature(self) -> Float[Array, "samples batch shared d_out"]:
        """The curvature cotangents after the transfer function: `curvature` itself without one.

        Raises:
          ValueError: they were not captured.
        """
        if self.deferred is not None:
            return self.with_curvature(self.deferred.pull()).transferred_curvature
        if self.raw_curvature is None or not self.has_transferred:
            raise ValueError(
                "The curvature cotangents after the transfer functions were not captured: ask for "
                'them by `value_grad_and_capture(loss_fn, transferred=True, curvature="ggn_mc")` '
                "(or another kind)."
            )
        if self.raw_transferred_curvature is None:
            return self.curvature
        layout = self.layout.transferred
        assert layout is not None
        return jax.vmap(lambda c: _chains.apply(layout, c))(self.raw_transferred_curvature)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["_arrays", "_deferred"],
    meta_fields=["_names", "has_joint_columns"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Captured(Mapping[str, LayerArrays]):
    """The arrays of every layer by its name: a pytree, so it crosses `jit`, `scan` and `vmap`.

    Attributes:
      has_joint_columns: whether an exact column was injected at several positions of an example at
        once, because they do not meet in the network. Its rows then belong to the curvature each
        on their own; products between them do not.
    """

    _names: tuple[str, ...]  # in the order the data meets the layers, which a dict would lose
    _arrays: tuple[LayerArrays, ...]
    has_joint_columns: bool = False
    _deferred: Deferred | None = None

    def __getitem__(self, name: str) -> LayerArrays:
        if name not in self._names:
            raise KeyError(name)
        arrays = self._arrays[self._names.index(name)]
        if self._deferred is None:
            return arrays
        return dataclasses.replace(arrays, deferred=self._deferred)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"<Captured: {', '.join(self)}>"

    def pulled(self) -> Captured:
        """With deferred curvature cotangents pulled, once for all layers; else as it is."""
        if self._deferred is None:
            return self
        cotangents = self._deferred.pull()
        arrays = tuple(own.with_curvature(cotangents) for own in self._arrays)
        return dataclasses.replace(self, _arrays=arrays, _deferred=None)

    @property
    def terms(self) -> float:
        """How many terms the loss averages over; the batch where output layers disagree on it."""
        counts = {arrays.head.terms for arrays in self._arrays if arrays.head is not None}
        return counts.pop() if len(counts) == 1 else float(self._arrays[0].inputs.shape[0])


def check_captured(layers: Layers, captured: Any, method: str) -> Captured:
    """The captured arrays; refuse missing ones, and those of another model.

    Raises:
      TypeError: `captured` is missing or is not a `Captured`.
      ValueError: it lacks layers, or holds layers of other shapes or parameters.
    """
    if not isinstance(captured, Captured):
        got = "nothing" if captured is None else f"a {type(captured).__name__}"
        raise TypeError(
            f"`{method}` needs the activations and cotangents of the batch as `captured`, got "
            f"{got}. Take them from `loss, grads, captured = "
            f"locoprop_jax.value_grad_and_capture(loss_fn)(params, batch)` and pass them on: "
            f"`tx.update(grads, opt_state, params, captured=captured)`."
        )
    different = [
        name
        for name, layer in layers.items()
        if name not in captured or captured[name].signature != layer.signature()
    ]
    if different:
        raise ValueError(
            f"`captured` does not belong to the layers that `{method}` was built with: "
            f"{', '.join(different)} {'differs' if len(different) == 1 else 'differ'} "
            f"(`captured` holds {', '.join(captured) or 'no layers'}). Call `find_layers` with the "
            f"same loss function, and parameters of the same tree and shapes, that "
            f"`value_grad_and_capture` gets."
        )
    return captured
