"""The forward and the backward pass of a capture: what they are to leave, and their run."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from locoprop_jax._capture import output_hessian
from locoprop_jax._capture.output_hessian import OutputPlan
from locoprop_jax._capture.plan import LayerPlan
from locoprop_jax._capture.target import PULLED, Target
from locoprop_jax._capture.targets import find_targets
from locoprop_jax._checks import REAL_REMEDY
from locoprop_jax._layers.uses import Layout
from locoprop_jax._tracing.chains import Shape
from locoprop_jax._tracing.chunks import is_traced
from locoprop_jax._tracing.evaluate import Address, evaluate
from locoprop_jax._tracing.flow import Piece
from locoprop_jax._tracing.heads import Cut, addresses, cut
from locoprop_jax._tracing.jaxpr import Path
from locoprop_jax._tracing.program import Program
from locoprop_jax._tracing.sites import input_addresses, output_address
from locoprop_jax._trees import is_complex


class Places(NamedTuple):
    """Where a run of the loss computes what is recorded and perturbed.

    Attributes:
      inputs: of each site, what its inputs are read from.
      outputs: of each site.
      after: of each site, what the transfer function makes of its outputs; None where that gets no
        cotangents.
      fixed: by value, what heads, targets and kernels made of parameters need besides.
      injected: by value, where curvature cotangents enter.
      terms: by value, what weighs known losses.
    """

    inputs: list[tuple[Address, ...]]
    outputs: list[Address]
    after: list[Address | None]
    fixed: dict[int, Address]
    injected: dict[int, Address]
    terms: dict[int, Address]

    @property
    def recorded(self) -> frozenset[Address]:
        of_sites = (*itertools.chain(*self.inputs), *self.outputs)
        return frozenset((*of_sites, *self.fixed.values(), *self.injected.values()))


@dataclasses.dataclass(frozen=True)
class PassPlan:
    """What the passes are to leave.

    Attributes:
      layers: of the loss.
      transferred: whether cotangents after the transfer functions are asked for.
      curvature: which is asked for, None for none.
      pieces: of each site, the transfer function whose result gets cotangents of its own.
      layouts: how to read the arrays of each site.
      heads: of each output site, what lies between it and the loss.
      targets: where curvature cotangents enter.
      output: what "ggn_output" is made of.
      between: by the value of a target, what lies between the output layer and it.
      places: where the run computes what is needed.
    """

    layers: LayerPlan
    transferred: bool
    curvature: str | None
    pieces: Sequence[Piece | None]
    layouts: list[Layout]
    heads: dict[int, Cut]
    targets: tuple[Target, ...]
    output: OutputPlan | None
    between: dict[int, Cut]
    places: Places


def plan_passes(layers: LayerPlan, transferred: bool, curvature: str | None) -> PassPlan:
    """Plan what the passes are to leave.

    Raises:
      ValueError: the curvature of this loss cannot be told, or a layer is complex.
    """
    traced, sites = layers.traced, layers.sites
    if curvature is not None:
        _check_real(layers, curvature)
    heads = {i: cut(traced, sites[i].output, traced.program.outputs[0]) for i in layers.ends}
    pieces = _pieces(layers) if transferred else [None] * len(sites)
    layouts = [layers.layout(i, piece) for i, piece in enumerate(pieces)]
    to_rows = [layout.outputs for layout in layouts]
    targets: tuple[Target, ...] = ()
    output: OutputPlan | None = None
    between: dict[int, Cut] = {}
    if curvature in PULLED:
        targets = find_targets(traced, curvature, layers.names, to_rows)
    elif curvature == "ggn_output":
        output = output_hessian.plan(traced, layers.names, to_rows)
        targets = output.targets
        values = {target.value for target in targets}
        between = {value: cut(traced, output.output, value) for value in values}
    places = _places(layers, pieces, [*heads.values(), *between.values()], targets)
    return PassPlan(
        layers, transferred, curvature, pieces, layouts, heads, targets, output, between, places
    )


def _check_real(layers: LayerPlan, curvature: str) -> None:
    avals = layers.traced.program.avals
    for site, name in zip(layers.sites, layers.names, strict=True):
        if is_complex(avals[site.output].dtype):
            raise ValueError(
                f"`curvature={curvature!r}` is that of real layers, but the outputs of {name!r} "
                f"are complex. {REAL_REMEDY}"
            )


def _pieces(layers: LayerPlan) -> list[Piece | None]:
    """The transfer functions of hidden layers that are applied once."""
    once = {group[0] for group in layers.groups if len(group) == 1}.difference(layers.ends)
    found = [layers.piece(site) if i in once else None for i, site in enumerate(layers.sites)]
    return [piece if piece and piece.equations else None for piece in found]


def _places(
    layers: LayerPlan,
    pieces: Sequence[Piece | None],
    cuts: Sequence[Cut],
    targets: Sequence[Target],
) -> Places:
    program, sites = layers.traced.program, layers.sites
    needed = [v for each in cuts for v in each.free]
    needed += [v for target in targets for v in target.needed]
    needed += [v for made in layers.traced.detection.formulas for _, v in made.free]
    return Places(
        inputs=[input_addresses(site) for site in sites],
        outputs=[output_address(site) for site in sites],
        after=[
            None if piece is None else addresses(site.program, [piece.end])[piece.end]
            for site, piece in zip(sites, pieces, strict=True)
        ],
        fixed=addresses(program, needed),
        injected=addresses(program, [target.value for target in targets]),
        terms=addresses(program, [v for target in targets for v in target.weighing]),
    )


class Passes(NamedTuple):
    """What the passes left.

    Attributes:
      results: of the loss function, flat, the loss first.
      recorded: the values at the plan's places.
      grads: by the parameters.
      cotangents: by the path of what was perturbed.
      pull: the backward pass from the targets to the cotangents; None without further passes.
    """

    results: list[jax.Array]
    recorded: Mapping[Address, jax.Array]
    grads: Any
    cotangents: Mapping[Path, jax.Array]
    pull: Callable[[Any], Mapping[Path, jax.Array]] | None


def run(plan: PassPlan, params: Any) -> Passes:
    """Run the loss forward and backward."""
    traced, places = plan.layers.traced, plan.places
    in_chunks = is_traced((params, traced.arguments))

    def forward(params: Any, perturbations: dict) -> tuple[Any, Any]:
        flat = [*jax.tree.leaves(params), *traced.arguments]
        results, recorded = evaluate(
            traced.closed, flat, places.recorded, perturbations, in_chunks=in_chunks
        )
        at_targets = [recorded[places.injected[target.value]] for target in plan.targets]
        return (results[0], at_targets), (results[1:], recorded)

    def loss_alone(*args: Any) -> tuple[Any, Any]:
        (loss, _), others = forward(*args)
        return loss, others

    zeros = _zeros(plan)
    if plan.curvature not in PULLED:
        backward = jax.value_and_grad(loss_alone, argnums=(0, 1), has_aux=True)
        (loss, (rest, recorded)), (grads, cotangents) = backward(params, zeros)
        return Passes([loss, *rest], recorded, grads, cotangents, None)
    (loss, at_targets), pull, (rest, recorded) = jax.vjp(forward, params, zeros, has_aux=True)
    nothing = jax.tree.map(jnp.zeros_like, at_targets)
    grads, cotangents = pull((jnp.ones_like(loss), nothing))
    of_targets = jax.tree_util.Partial(_pull_perturbations, pull, loss)
    return Passes([loss, *rest], recorded, grads, cotangents, of_targets)


def _zeros(plan: PassPlan) -> dict[Path, jax.Array]:
    """The perturbations by path."""
    program, places, zeros = plan.layers.traced.program, plan.places, {}
    sites = zip(plan.layers.sites, plan.pieces, places.outputs, places.after, strict=True)
    for site, piece, output, after in sites:
        zeros[output.path] = _zero(program, site.output, site.lengths)
        if piece is not None and after is not None:
            zeros[after.path] = _zero(program, piece.end, site.lengths)
    for value, address in places.terms.items():
        zeros[address.path] = _zero(program, value, ())
    return zeros


def _zero(program: Program, value: int, lengths: Shape) -> jax.Array:
    """A perturbation of a value, for each turn of the loops around it."""
    aval = program.avals[value]
    # Like the value itself where that is possible, because its sharding counts too.
    return jnp.zeros_like(aval) if not lengths else jnp.zeros((*lengths, *aval.shape), aval.dtype)


def _pull_perturbations(pull: Callable, loss: jax.Array, at_targets: Any) -> Any:
    """The cotangents by path of what is injected at the targets alone."""
    return pull((jnp.zeros_like(loss), at_targets))[1]
