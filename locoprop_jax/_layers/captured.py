"""`Captured`: the activations and cotangents of one batch, by layer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from locoprop_jax._checks import REAL_REMEDY
from locoprop_jax._layers.arrays import Deferred, LayerArrays
from locoprop_jax._layers.layers import Layers


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["_arrays", "_deferred"],
    meta_fields=["_names", "has_joint_columns", "_terms", "are_apart"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Captured(Mapping[str, LayerArrays]):
    """The arrays of every layer by its name: a pytree, so it crosses `jit`, `scan` and `vmap`.

    Attributes:
      has_joint_columns: whether an exact column was injected at several positions of an example at
        once, because they do not meet in the network. Its rows then belong to the curvature each
        on their own; products between them do not.
      are_apart: whether each output that curvature was asked for is of one example, and all rows
        that reach it are this example's. Then rows of batches of different sizes are of different
        examples.
    """

    _names: tuple[str, ...]  # in the order the data meets the layers, which a dict would lose
    _arrays: tuple[LayerArrays, ...]
    has_joint_columns: bool = False
    _deferred: Deferred | None = None
    _terms: float | None = None  # None where output layers disagree on it
    are_apart: bool = False

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
    def points(self) -> dict[tuple[str, str], tuple[jax.Array, ...]]:
        """Where parts that are made of parameters are linearised, by layer and part."""
        return {
            (name, part): point
            for name, own in zip(self._names, self._arrays, strict=True)
            for part, point in own.points.items()
        }

    @property
    def terms(self) -> float:
        """How many terms the loss averages over; the batch where output layers disagree on it."""
        return float(self._arrays[0].outputs.shape[-3]) if self._terms is None else self._terms


def check_real_captured(captured: Mapping[str, LayerArrays], method: str) -> None:
    """Refuse layers with complex arrays.

    Raises:
      ValueError: there is one.
    """
    for name, arrays in captured.items():
        if arrays.is_complex:
            raise ValueError(
                f"`{method}` takes real layers, but the outputs of {name!r} are complex. "
                f"{REAL_REMEDY}"
            )


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
