"""How a site's parameters and arrays are laid out: what a layer and its captured arrays share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from locoprop_jax._layers.layers import Parameter
from locoprop_jax._layers.uses import Layout
from locoprop_jax._tracing import chains, flow, sites
from locoprop_jax._tracing.chains import Chain, Shape
from locoprop_jax._tracing.flow import Piece
from locoprop_jax._tracing.labels import Weight
from locoprop_jax._tracing.operands import OneHotReader
from locoprop_jax._tracing.sites import Site
from locoprop_jax._tracing.trace import Traced


def weights_of(traced: Traced, group: Sequence[int]) -> dict[str, Any]:
    """The static facts that a layer and its captured arrays have in common."""
    site = traced.detection.sites[group[0]]

    def parameter(weight: Weight | None, chain: Chain) -> Parameter | None:
        if weight is None:
            return None
        shape = traced.program.shape(traced.program.inputs[weight.leaf])
        return Parameter(traced.names[weight.leaf], shape, chain, weight.part)

    return {
        "kind": "tied" if traced.detection.transposed.intersection(group) else site.kind,
        "stack": site.stack,
        "d_in": site.d_in,
        "d_out": site.d_out,
        "uses": len(group),
        "kernel": parameter(site.weight, site.kernel),
        "bias": parameter(site.added, site.bias_chain),
    }


def layout_of(traced: Traced, site: Site, piece: Piece | None) -> Layout:
    """How to read a site's arrays as (batch, shared, d), with the stack in front."""
    program, lengths = traced.program, site.lengths
    inputs, _ = sites.grouped_axes(site, traced.batch_axes)
    shape: Shape = ()
    if site.operands:
        operands = [site.program.equations[o.position].inputs[o.index] for o in site.operands]
        shape = (*lengths, *site.reader.shape(*map(program.shape, operands)))
    to_rows = outputs_of(traced, site)
    return Layout(
        reader=site.reader,
        loops=len(lengths),
        by_example=_is_by_example(traced, site),
        inputs=chains.group((), shape, inputs) if shape else (),
        ids=(
            chains.group((), shape[:-1], (*inputs[:-1], ()))
            if isinstance(site.reader, OneHotReader)
            else ()
        ),
        outputs=to_rows,
        outputs_back=chains.inverse(to_rows, (*lengths, *program.shape(site.output))),
        transferred=None if piece is None else transferred_of(traced, site, piece),
    )


def _is_by_example(traced: Traced, site: Site) -> bool:
    """Whether this is a convolution whose batch is the examples, without loops and groups."""
    is_plain = site.kind == "conv" and not site.loops and site.stack is None
    growing = None if traced.batch_axes is None else traced.batch_axes[sites.raw_output(site)]
    return is_plain and growing == site.row_axes[:1]


def outputs_of(traced: Traced, site: Site) -> Chain:
    """How to read a site's outputs as (batch, shared, d_out), with the stack in front."""
    _, outputs = sites.grouped_axes(site, traced.batch_axes)
    raw_shape = traced.program.shape(sites.raw_output(site))
    to_raw = chains.inverse(site.output_chain, raw_shape)
    split = chains.lift((*to_raw, *site.split), site.lengths)
    shape = (*site.lengths, *chains.result_shape(site.split, raw_shape))
    return chains.group(split, shape, outputs)


def piece_of(traced: Traced, site: Site) -> Piece:
    """What the network applies to a layer's outputs."""
    live = traced.detection.live
    if site.loops:
        live = flow.live_equations(site.program, *site.program.outputs)
    return flow.transfer_piece(site.program, live, site.output)


def transferred_of(traced: Traced, site: Site, piece: Piece) -> Chain:
    """How to read what a piece ends in as (batch, shared, d_out)."""
    back = chains.inverse(piece.chain, traced.program.shape(site.output))
    return (*chains.lift(back, site.lengths), *outputs_of(traced, site))
