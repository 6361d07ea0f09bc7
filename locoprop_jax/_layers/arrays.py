"""`LayerArrays`: what one batch left at one layer, over all its uses.

Arrays are kept raw, with the static layout that turns them into the one format all methods read:

    inputs      X   (batch, shared, d_in)
    outputs     A   (batch, shared, d_out)    pre-activations, bias included
    cotangents  E   (batch, shared, d_out)    dL/dA of the loss as written, as JAX has it
    curvature       (samples, batch, shared, d_out)    cotangents of Fisher and Gauss-Newton methods
    output_hessian  (d_out, d_out) or (d_out,)    at the output layer, for `scale_by_kfra`

`shared` counts the positions where one example meets the weights (1 for a plain dense layer). A
stack of layers has its axis in front of all others.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from locoprop_jax import _linalg
from locoprop_jax._layers.head import Head
from locoprop_jax._layers.real_part import RealPart
from locoprop_jax._layers.rows import Inputs, join_rows
from locoprop_jax._layers.structured import OneHot, Windows
from locoprop_jax._layers.transposed import Extended, Transposed
from locoprop_jax._layers.uses import Use
from locoprop_jax._tracing.jaxpr import Path
from locoprop_jax._tracing.operands import OneHotReader
from locoprop_jax._trees import ascent, complex_dtype, is_complex, real_dtype, wide_dtype


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
    data_fields=["uses", "head", "output_hessian", "deferred", "points"],
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
      points: by part, what a kernel or bias that is no array of the tree is made of.
    """

    uses: tuple[Use | Transposed, ...]
    head: Head | None
    signature: tuple
    has_transferred: bool = False
    output_hessian: Array | None = None
    deferred: Deferred | None = None
    points: Mapping[str, tuple[Array, ...]] = dataclasses.field(default_factory=dict)

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
            points=jax.tree.map(lambda x: x[0], self.points),  # the same in all parts
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

    @property
    def is_complex(self) -> bool:
        """Whether its outputs are, because its inputs or its parameters are."""
        return is_complex(self.first.outputs.dtype)

    # As methods read them: all rows of the batch on one axis, of transposed uses only those of the
    # batch together. Complex cotangents are conjugated, see `ascent`.

    def rows(self, dtype: Any, examples: int | None = None) -> Inputs:
        """The inputs, of the first so many examples, None for all.

        Those of an embedding and of a convolution are not written out. A stack of layers has its
        axis in front.

        Args:
          dtype: of the layer's block. Complex rows that meet a real one are a `RealPart`.
          examples: how many.
        """
        rows = self._rows(self._kind(dtype), examples)
        return self._met_by(dtype, rows)

    def mean_rows(self, dtype: Any) -> Inputs:
        """The inputs of `rows`, averaged over the positions of each example."""
        return self._met_by(dtype, self.inputs.astype(self._kind(dtype)).mean(-2))

    def _kind(self, dtype: Any) -> Any:
        """Of the layer's arrays, for a block of this dtype."""
        return complex_dtype(dtype) if self.is_complex else dtype

    def _met_by(self, dtype: Any, rows: Inputs) -> Inputs:
        return RealPart(rows) if is_complex(rows.dtype) and not is_complex(dtype) else rows

    def _rows(self, dtype: Any, examples: int | None) -> Inputs:
        layout = self.first.layout
        reader = layout.reader
        if isinstance(reader, OneHotReader):
            ids = _joined([use.read_ids() for use in self._straight])[..., :examples, :, :]
            return OneHot(ids.reshape(*ids.shape[:-3], -1), reader.size, real_dtype(dtype))
        if layout.by_example and len(self.uses) == 1:
            patches, data = self.first.read_data()
            start = (slice(None),) * patches.data_axes[0]
            return Windows(data[*start, :examples].astype(dtype), patches)
        rows = self._straight_rows(lambda use: use.read_inputs()[..., :examples, :, :], dtype)
        if not (turned := self._turned):
            return rows
        count = len(rows) + sum(use.count(examples) for use in turned)
        return Extended(rows, self._unit(examples).astype(real_dtype(dtype)), count)

    def output_rows(self, dtype: Any) -> Float[Array, "*stack rows d_out"]:
        """The outputs of `rows`."""
        dtype = self._kind(dtype)
        rows = self._straight_rows(Use.read_outputs, dtype)
        if not (turned := self._turned):
            return rows
        outputs = _linalg.scale(turned[0].kernel, self._unit())
        return jnp.concatenate([rows, outputs.astype(dtype)])

    def cotangent_rows(self, dtype: Any) -> Float[Array, "*stack rows d_out"]:
        """The cotangents of `rows`."""
        dtype = self._kind(dtype)
        rows = ascent(self._straight_rows(Use.read_cotangents, dtype))
        if not (turned := self._turned):
            return rows
        gradient = functools.reduce(jnp.add, [use.gradient() for use in turned])
        cotangents = _linalg.scale(gradient, 1 / self._unit())
        return jnp.concatenate([rows, cotangents.astype(dtype)])

    def transferred_rows(self, dtype: Any) -> Float[Array, "*stack rows d_out"]:
        """The cotangents of `rows` after the transfer function.

        Raises:
          ValueError: they were not captured.
        """
        own = ascent(join_rows(self.transferred_cotangents)).astype(dtype)
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

    def by_batch(self) -> dict[int, tuple[Array, Array]]:
        """Inputs and curvature cotangents by the number of examples: those of several batches.

        Their shapes are those of `inputs` and `curvature`.
        """
        if self.deferred is not None:
            return self.with_curvature(self.deferred.pull()).by_batch()
        found: dict[int, list[Use | Transposed]] = {}
        for use in self.uses:
            found.setdefault(use.read_outputs().shape[-3], []).append(use)
        return {
            size: (
                _joined([use.read_inputs() for use in uses]),
                _joined([use.read_curvature() for use in uses]),
            )
            for size, uses in found.items()
        }

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
