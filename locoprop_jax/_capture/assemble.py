"""From what the passes left to `Captured`: arrays, heads and curvature of each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from locoprop_jax._capture import curvature, output_hessian, parameters
from locoprop_jax._capture.curvature import Point
from locoprop_jax._capture.passes import Passes, PassPlan
from locoprop_jax._capture.plan import LayerPlan
from locoprop_jax._capture.target import Target
from locoprop_jax._layers import made
from locoprop_jax._layers.arrays import Deferred, LayerArrays
from locoprop_jax._layers.captured import Captured
from locoprop_jax._layers.head import Head
from locoprop_jax._layers.transposed import Transposed
from locoprop_jax._layers.uses import Use
from locoprop_jax._tracing.flow import averaged_terms
from locoprop_jax._tracing.jaxpr import Path, StaticJaxpr

Known = Mapping[int, Any]  # values of the program


def assemble(
    plan: PassPlan, params: Any, passes: Passes, samples: int, rng: jax.Array | None
) -> Captured:
    """The arrays of each layer, with curvature cotangents that are yet to be pulled.

    Args:
      plan: what the passes were to leave.
      params: that they ran at.
      passes: what they left.
      samples: how many of a sampled curvature.
      rng: a key for that.

    Raises:
      ValueError: the empirical curvature of this loss cannot be told.
    """
    layers, known = plan.layers, _known(plan, params, passes)
    heads = {i: _head(plan, i, known) for i in layers.ends}
    curved = _empirical(plan, heads, passes)
    points = [_point(plan, target, passes, known) for target in plan.targets]
    hessian = _output_hessian(plan, points, passes, known)
    deferred = _deferred(plan, points, passes, samples, rng)
    uses = [_use(plan, i, passes) for i in range(len(layers.sites))]

    def of_layer(group: Sequence[int]) -> LayerArrays:
        weights = layers.weights(group)
        points = _points(layers, group, weights, known)
        return LayerArrays(
            uses=tuple(
                _turned(layers, i, uses[i], weights["kernel"], points, known) for i in group
            ),
            head=heads.get(group[0]) if len(group) == 1 else None,
            signature=tuple(weights.values()),
            has_transferred=plan.transferred,
            output_hessian=hessian if plan.output and plan.output.site in group else None,
            points=points,
        )

    arrays = tuple(of_layer(group).with_curvature(curved) for group in layers.groups)
    counts = {head.terms for head in heads.values()}
    return Captured(
        tuple(layers.names[group[0]] for group in layers.groups),
        arrays,
        any(target.joins_positions for target in plan.targets),
        deferred,
        counts.pop() if len(counts) == 1 else None,
        bool(plan.targets) and all(target.batch is not None for target in plan.targets),
    )


def _known(plan: PassPlan, params: Any, passes: Passes) -> dict[int, Any]:
    """The values that heads and targets are functions of besides."""
    traced = plan.layers.traced
    given = [*jax.tree.leaves(params), *traced.arguments]
    known = dict(zip(traced.program.inputs, given, strict=True))
    known |= {v: passes.recorded[address] for v, address in plan.places.fixed.items()}
    return known | dict(traced.program.constants)


# --- by site -------------------------------------------------------------------------------------


def _use(plan: PassPlan, i: int, passes: Passes) -> Use:
    places, recorded, cotangents = plan.places, passes.recorded, passes.cotangents
    own, after = places.outputs[i], places.after[i]
    return Use(
        operands=tuple(recorded[address] for address in places.inputs[i]),
        outputs=recorded[own],
        cotangents=cotangents[own.path],
        transferred_cotangents=None if after is None else cotangents[after.path],
        layout=plan.layouts[i],
        paths=(own.path, None if after is None else after.path),
    )


def _turned(
    layers: LayerPlan, i: int, use: Use, kernel: Any, points: Mapping[str, Any], known: Known
) -> Use | Transposed:
    """A use as rows of the layer, where it applies the layer's weights transposed."""
    if not layers.is_transposed(i):
        return use
    values = dict(zip(layers.traced.names, layers.traced.program.inputs, strict=False))
    leaves = {path: jnp.asarray(known[values[path]]) for path in made.paths(kernel)}
    return Transposed(use, made.read(kernel, leaves, "values", points.get("kernel")))


def _points(
    layers: LayerPlan, group: Sequence[int], parts: Mapping[str, Any], known: Known
) -> dict[str, tuple[Any, ...]]:
    """What a kernel or bias is made of that is no array of the tree, nor such arrays in order."""
    return {
        part: parameters.point(layers.traced, place, known)
        for part, place in layers.places(group).items()
        if isinstance(own := parts[part], made.Made) and not own.is_isometry
    }


def _head(plan: PassPlan, i: int, known: Known) -> Head:
    site, head, traced = plan.layers.sites[i], plan.heads[i], plan.layers.traced
    program = traced.program
    terms = averaged_terms(program, traced.detection.terms, site.output)
    rows = math.prod(program.shape(site.output)) // site.d_out
    return Head(
        free=tuple(known[v] for v in head.free),
        function=StaticJaxpr(head.closed),
        layout=plan.layouts[i],
        dtype=program.avals[site.output].dtype,
        terms=float(rows) if math.isnan(terms) else terms,
    )


# --- curvature -----------------------------------------------------------------------------------


def _empirical(plan: PassPlan, heads: Mapping[int, Head], passes: Passes) -> dict[Path, jax.Array]:
    """The curvature cotangents that are the loss's own, by path; none unless asked for."""
    if plan.curvature != "fisher_empirical":
        return {}
    root = math.sqrt(_averaged_terms(heads, plan.layers.names))
    return {path: (root * e)[None] for path, e in passes.cotangents.items()}


def _averaged_terms(heads: Mapping[int, Head], names: Sequence[str]) -> float:
    """Over how many terms the loss averages (mathematics: c), if it is one number.

    Raises:
      ValueError: the output layers differ in it.
    """
    counts = {names[i]: head.terms for i, head in heads.items()}
    if len(set(counts.values())) != 1:
        listed = ", ".join(f"{count:g} at {name}" for name, count in counts.items())
        raise ValueError(
            "`curvature='fisher_empirical'` needs one number of terms that the loss averages "
            f"over, but there are {listed or 'none'}. Use `curvature='fisher_mc'`, with the losses "
            f"of `locoprop_jax.losses`."
        )
    return next(iter(counts.values()))


def _point(plan: PassPlan, target: Target, passes: Passes, known: Known) -> Point:
    """The arrays of a target of curvature cotangents."""
    places = plan.places
    value = passes.recorded[places.injected[target.value]]
    derivatives = {v: passes.cotangents[places.terms[v].path] for v in target.weighing}
    return curvature.point(target, known, value, derivatives)


def _output_hessian(
    plan: PassPlan, points: Sequence[Point], passes: Passes, known: Known
) -> jax.Array | None:
    """The factor of the output layer, if asked for."""
    if plan.output is None:
        return None
    site = plan.output.site
    between = [plan.between[target.value].function(known) for target in plan.targets]
    outputs = passes.recorded[plan.places.outputs[site]]
    return output_hessian.total(plan.output, points, between, outputs, plan.layouts[site])


def _deferred(
    plan: PassPlan,
    points: Sequence[Point],
    passes: Passes,
    samples: int,
    rng: jax.Array | None,
) -> Deferred | None:
    """The curvature cotangents that take passes of their own, if asked for."""
    if passes.pull is None or plan.curvature is None:
        return None
    columns = curvature.cotangents(plan.targets, points, plan.curvature, samples, rng)
    return Deferred(passes.pull, columns)
