"""What `find_layers` and `value_grad_and_capture` both read in a traced loss: its layers.

How a layer's parameters and arrays are laid out is static: it is known before there are any arrays.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from locoprop_jax._capture import parameters
from locoprop_jax._capture.parameters import Place
from locoprop_jax._layers.made import Part
from locoprop_jax._layers.uses import Layout
from locoprop_jax._tracing import chains
from locoprop_jax._tracing.chains import Chain, Shape
from locoprop_jax._tracing.flow import Piece, live_equations, transfer_piece
from locoprop_jax._tracing.heads import output_sites
from locoprop_jax._tracing.operands import OneHotReader
from locoprop_jax._tracing.sites import Site, grouped_axes, raw_output
from locoprop_jax._tracing.trace import Traced, layer_names, trace


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """The layers of a traced loss, each a group of sites: the places where it is applied.

    Attributes:
      traced: the loss.
      names: of the layer that each site belongs to.
      ends: the sites whose outputs reach the loss without passing another.
    """

    traced: Traced
    names: list[str]
    ends: list[int]

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.traced.detection.sites

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The sites of each layer, transposed ones last."""
        return self.traced.detection.groups

    def is_transposed(self, site: int) -> bool:
        """Whether a site applies the weights of its layer transposed."""
        return site in self.traced.detection.transposed

    def weights(self, group: Sequence[int]) -> dict[str, Any]:
        """The static facts that a layer and its captured arrays have in common."""
        site, places = self.sites[group[0]], self.places(group)
        is_joined = group[0] in self._joined
        parts: dict[str, Part | None] = {"kernel": None, "bias": None}
        if is_joined:
            parts["kernel"] = parameters.joined(self.traced, *places["kernel"])
        else:
            own = {part: parameters.part_of(self.traced, *place) for part, place in places.items()}
            parts |= own
        return {
            "kind": "tied" if any(map(self.is_transposed, group)) else site.kind,
            "stack": site.stack,
            "d_in": site.d_in + is_joined,
            "d_out": site.d_out,
            "uses": len(group),
            **parts,
        }

    def places(self, group: Sequence[int]) -> dict[str, list[Place]]:
        """What a layer's kernel and bias are read from; a bias that is a row of it with it."""
        own = self.sites[group[0]]
        added = next((site for i in group if (site := self.sites[i]).added is not None), own)
        kernel = [(own.weight, own.kernel)] if own.weight else []
        bias = [(added.added, added.bias_chain)] if added.added else []
        if group[0] in self._joined:
            return {"kernel": [*kernel, *bias]}
        both = {"kernel": kernel, "bias": bias}
        return {part: place for part, place in both.items() if place}

    @functools.cached_property
    def _joined(self) -> frozenset[int]:
        """The sites of layers whose bias is a row of the kernel."""
        return frozenset(i for number in self.traced.detection.joined for i in self.groups[number])

    def _constant_input(self, i: int) -> float | None:
        """One more input of a site: one or zero where the bias is a row of the kernel."""
        if i not in self._joined:
            return None
        return 1.0 if self.sites[i].added is not None else 0.0

    def piece(self, site: Site) -> Piece:
        """What the network applies to a site's outputs."""
        live = self.traced.detection.live
        if site.loops:
            live = live_equations(site.program, *site.program.outputs)
        return transfer_piece(site.program, live, site.output)

    def layout(self, i: int, piece: Piece | None) -> Layout:
        """How to read a site's arrays as (batch, shared, d), with the stack in front."""
        site = self.sites[i]
        program, lengths = self.traced.program, site.lengths
        inputs, _ = grouped_axes(site, self.traced.batch_axes)
        shape: Shape = ()
        if site.operands:
            operands = [site.program.equations[o.position].inputs[o.index] for o in site.operands]
            shape = (*lengths, *site.reader.shape(*map(program.shape, operands)))
        is_lookup = isinstance(site.reader, OneHotReader)
        to_rows = self.to_rows(site)
        return Layout(
            reader=site.reader,
            loops=len(lengths),
            by_example=self._is_by_example(site) and i not in self._joined,
            inputs=chains.group((), shape, inputs) if shape else (),
            ids=chains.group((), shape[:-1], (*inputs[:-1], ())) if is_lookup else (),
            outputs=to_rows,
            outputs_back=chains.inverse(to_rows, (*lengths, *program.shape(site.output))),
            transferred=None if piece is None else self.transferred_to_rows(site, piece),
            constant=self._constant_input(i),
        )

    def _is_by_example(self, site: Site) -> bool:
        """Whether this is a convolution whose batch is the examples, without loops and groups."""
        is_plain = site.kind == "conv" and not site.loops and site.stack is None
        batch_axes = self.traced.batch_axes
        growing = None if batch_axes is None else batch_axes[raw_output(site)]
        return is_plain and growing == site.row_axes[:1]

    def to_rows(self, site: Site) -> Chain:
        """How to read a site's outputs as (batch, shared, d_out), with the stack in front."""
        _, outputs = grouped_axes(site, self.traced.batch_axes)
        raw_shape = self.traced.program.shape(raw_output(site))
        to_raw = chains.inverse(site.output_chain, raw_shape)
        split = chains.lift((*to_raw, *site.split), site.lengths)
        shape = (*site.lengths, *chains.result_shape(site.split, raw_shape))
        return chains.group(split, shape, outputs)

    def transferred_to_rows(self, site: Site, piece: Piece) -> Chain:
        """How to read what a piece ends in as (batch, shared, d_out)."""
        back = chains.inverse(piece.chain, self.traced.program.shape(site.output))
        return (*chains.lift(back, site.lengths), *self.to_rows(site))


def plan_layers(
    loss_fn: Callable[..., Any], params: Any, args: tuple, kwargs: dict, has_aux: bool
) -> LayerPlan:
    """Trace a loss and find its layers."""
    traced = trace(loss_fn, params, args, kwargs, has_aux)
    return LayerPlan(traced, layer_names(traced), output_sites(traced))
