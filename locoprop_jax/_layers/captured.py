"""`Captured`: the activations and cotangents of one batch, by layer.

They are kept raw, with the static layout that turns them into the one format all methods read:

    inputs      X   (batch, shared, d_in)
    outputs     A   (batch, shared, d_out)    pre-activations, bias included
    cotangents  E   (batch, shared, d_out)    dL/dA of the loss as written
    curvature       (samples, batch, shared, d_out)    cotangents of Fisher and Gauss-Newton methods
    output_hessian  (d_out, d_out) or (d_out,)    at the output layer, for `scale_by_kfra`

`shared` counts the positions where one example meets the weights (1 for a plain dense layer). A
stack of layers has its axis in front of all others.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from locoprop_jax._layers.layers import Layers
from locoprop_jax._layers.rows import Inputs, join_rows
from locoprop_jax._layers.structured import OneHot, Windows
from locoprop_jax._layers.transposed import Extended, Transposed
from locoprop_jax._layers.uses import Layout, Use
from locoprop_jax._tracing import chains, jaxpr
from locoprop_jax._tracing.jaxpr import Path
from locoprop_jax._tracing.operands import OneHotReader
from locoprop_jax._trees import wide_dtype


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
    meta_fields=["function", "layout", "dtype", "terms", "parts"],
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
      parts: of how many batches this is the mean loss, one after the other; None for one batch,
        else `free` has their axis in front.
    """

    free: tuple[Array, ...]
    function: StaticJaxpr
    layout: Layout
    dtype: Any
    terms: float
    parts: int | None = None

    def loss(self, outputs: Float[Array, "batch shared d_out"]) -> Float[Array, ""]:
        """The loss, were these the layer's outputs."""
        if self.parts is None:
            return self._loss(outputs, self.free)
        of_parts = outputs.reshape(self.parts, -1, *outputs.shape[1:])
        return jax.vmap(self._loss)(of_parts, self.free).mean()

    def _loss(self, outputs: Array, free: tuple[Array, ...]) -> Float[Array, ""]:
        raw = chains.apply(self.layout.outputs_back, outputs).astype(self.dtype)
        return jaxpr.as_callable(self.function.closed)(raw, *free)[0]

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
    data_fields=["uses", "head", "output_hessian", "deferred"],
    meta_fields=["signature", "has_transferred"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class LayerArrays:
    """What one batch left at one layer. The views cost nothing until they are read.

    A stack of layers has its axis in front of all others.

    Attributes:
      uses: what was captured, at each place where the layer is applied, transposed uses last.
      head: the loss as a function of the outputs; None unless this is an output layer.
      signature: of the layer these arrays belong to.
      has_transferred: whether `transferred_cotangents` were captured.
      output_hessian: the sum over rows of the Hessian of the loss as written by the outputs of
        each, (d_out, d_out), or its diagonal (d_out,) where the loss takes each output by itself.
        None unless `curvature="ggn_output"` was captured and this is the output layer.
      deferred: what makes the curvature cotangents once they are read.
    """

    uses: tuple[Use | Transposed, ...]
    head: Head | None
    signature: tuple
    has_transferred: bool = False
    output_hessian: Array | None = None
    deferred: Deferred | None = None

    def with_curvature(self, cotangents: Mapping[Path, Array]) -> LayerArrays:
        """With its own of the curvature cotangents."""
        uses = tuple(use.with_curvature(cotangents) for use in self.uses)
        return dataclasses.replace(self, uses=uses, deferred=None)

    def joined(self, parts: int) -> LayerArrays:
        """What was stacked, as of one batch whose loss is the mean."""
        head, hessian = self.head, self.output_hessian
        return dataclasses.replace(
            self,
            uses=tuple(use.joined(parts) for use in self.uses),
            head=head and dataclasses.replace(head, terms=parts * head.terms, parts=parts),
            output_hessian=None if hessian is None else hessian.mean(0),
        )

    @property
    def inputs(self) -> Float[Array, "*stack batch shared d_in"]:
        return _joined([use.read_inputs() for use in self.uses])

    @property
    def outputs(self) -> Float[Array, "*stack batch shared d_out"]:
        return _joined([use.read_outputs() for use in self.uses])

    @property
    def cotangents(self) -> Float[Array, "*stack batch shared d_out"]:
        return _joined([use.read_cotangents() for use in self.uses])

    # As methods read them: all rows of the batch on one axis, of transposed uses only those of the
    # batch together.

    def rows(self, dtype: Any, examples: int | None = None) -> Inputs:
        """The inputs, of the first so many examples, None for all.

        Those of an embedding and of a convolution are not written out. A stack of layers has its
        axis in front.
        """
        layout = self.first.layout
        reader = layout.reader
        if isinstance(reader, OneHotReader):
            ids = _joined([use.read_ids() for use in self._straight])[..., :examples, :, :]
            return OneHot(ids.reshape(*ids.shape[:-3], -1), reader.size, dtype)
        if layout.by_example and len(self.uses) == 1:
            patches, data = self.first.read_data()
            start = (slice(None),) * patches.data_axes[0]
            return Windows(data[*start, :examples].astype(dtype), patches)
        rows = self._straight_rows(lambda use: use.read_inputs()[..., :examples, :, :], dtype)
        if not (turned := self._turned):
            return rows
        count = len(rows) + sum(use.count(examples) for use in turned)
        return Extended(rows, self._unit(examples).astype(dtype), count)

    def output_rows(self, dtype: Any) -> Float[Array, "*stack rows d_out"]:
        """The outputs of `rows`."""
        rows = self._straight_rows(Use.read_outputs, dtype)
        if not (turned := self._turned):
            return rows
        return jnp.concatenate([rows, (self._unit() * turned[0].kernel).astype(dtype)])

    def cotangent_rows(self, dtype: Any) -> Float[Array, "*stack rows d_out"]:
        """The cotangents of `rows`."""
        rows = self._straight_rows(Use.read_cotangents, dtype)
        if not (turned := self._turned):
            return rows
        gradient = functools.reduce(jnp.add, [use.gradient() for use in turned])
        return jnp.concatenate([rows, (gradient / self._unit()).astype(dtype)])

    def transferred_rows(self, dtype: Any) -> Float[Array, "*stack rows d_out"]:
        """The cotangents of `rows` after the transfer function.

        Raises:
          ValueError: they were not captured.
        """
        own = join_rows(self.transferred_cotangents).astype(dtype)
        return self.cotangent_rows(dtype) if len(self.uses) > 1 else own

    def _straight_rows(
        self, read: Callable[[Use], Array], dtype: Any
    ) -> Float[Array, "*stack rows d"]:
        return join_rows(_joined([read(use) for use in self._straight])).astype(dtype)

    def _unit(self, examples: int | None = None) -> Float[Array, ""]:
        """That of all transposed uses together."""
        squares = [jnp.square(use.unit(examples)) for use in self._turned]
        return jnp.sqrt(functools.reduce(jnp.add, squares))

    @property
    def first(self) -> Use:
        """A layer is read as where it is first applied."""
        use = self.uses[0]
        assert isinstance(use, Use), "transposed uses come last"
        return use

    @property
    def _straight(self) -> list[Use]:
        return [use for use in self.uses if isinstance(use, Use)]

    @property
    def _turned(self) -> list[Transposed]:
        return [use for use in self.uses if isinstance(use, Transposed)]

    @property
    def transferred_cotangents(self) -> Float[Array, "*stack batch shared d_out"]:
        """dL/df(A), the cotangents after the transfer function: E itself without one.

        Raises:
          ValueError: they were not captured.
        """
        if not self.has_transferred:
            raise ValueError(
                "The cotangents after the transfer functions were not captured: ask for them by "
                "`value_grad_and_capture(loss_fn, transferred=True)`."
            )
        first = self.first
        if first.transferred_cotangents is None:
            return self.cotangents
        return first.read(first.layout.transferred, first.transferred_cotangents)

    @property
    def curvature(self) -> Float[Array, "*stack samples batch shared d_out"]:
        """The curvature cotangents C: sum C'C has the expectation of the Gauss-Newton block.

        Summed over samples and rows, with no further factor of the batch size.

        Raises:
          ValueError: they were not captured.
        """
        if self.deferred is not None:
            return self.with_curvature(self.deferred.pull()).curvature
        if self.first.curvature is None:
            raise ValueError(
                "The curvature cotangents were not captured: ask for them by "
                '`value_grad_and_capture(loss_fn, curvature="ggn_mc")` (or another kind).'
            )
        return _joined([use.read_curvature() for use in self.uses])

    @property
    def transferred_curvature(self) -> Float[Array, "*stack samples batch shared d_out"]:
        """The curvature cotangents after the transfer function: `curvature` itself without one.

        Raises:
          ValueError: they were not captured.
        """
        if self.deferred is not None:
            return self.with_curvature(self.deferred.pull()).transferred_curvature
        first = self.first
        if first.curvature is None or not self.has_transferred:
            raise ValueError(
                "The curvature cotangents after the transfer functions were not captured: ask for "
                'them by `value_grad_and_capture(loss_fn, transferred=True, curvature="ggn_mc")` '
                "(or another kind)."
            )
        if first.transferred_curvature is None:
            return self.curvature
        return first.read_samples(first.layout.transferred, first.transferred_curvature)


def _joined(arrays: Sequence[Array]) -> Array:
    """The rows of several uses, as further positions of each example if they have the same.

    Arrays are (..., batch, shared, d).
    """
    if len(arrays) == 1:
        return arrays[0]
    if len({x.dtype for x in arrays}) > 1:
        arrays = [x.astype(wide_dtype(arrays)) for x in arrays]
    if len({x.shape[-3] for x in arrays}) == 1:
        return jnp.concatenate(arrays, -2)
    return jnp.concatenate([join_rows(x)[..., None, :] for x in arrays], -3)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["_arrays", "_deferred"],
    meta_fields=["_names", "has_joint_columns", "_terms"],
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
    _terms: float | None = None  # None where output layers disagree on it

    def __getitem__(self, name: str) -> LayerArrays:
        if name not in self._names:
            raise KeyError(f"No layer {name!r} was captured; there are {', '.join(self._names)}.")
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

    def joined(self, parts: int) -> Captured:
        """Those of so many batches, stacked by a loop, as of one batch whose loss is the mean."""
        arrays = tuple(own.joined(parts) for own in self._arrays)
        terms = None if self._terms is None else parts * self._terms
        return dataclasses.replace(self, _arrays=arrays, _terms=terms)

    @property
    def terms(self) -> float:
        """How many terms the loss averages over; the batch where output layers disagree on it."""
        return float(self._arrays[0].outputs.shape[-3]) if self._terms is None else self._terms


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
