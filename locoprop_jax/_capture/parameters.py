"""From the labels of a layer's kernel and bias to where they lie in the parameter tree."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from locoprop_jax._layers.made import Made, Part
from locoprop_jax._layers.parameter import Parameter
from locoprop_jax._tracing import chains
from locoprop_jax._tracing.chains import Chain
from locoprop_jax._tracing.heads import as_struct
from locoprop_jax._tracing.jaxpr import StaticJaxpr
from locoprop_jax._tracing.labels import Weight, leaves_of
from locoprop_jax._tracing.trace import Traced, leaf_shape

Place = tuple[Weight, Chain]  # a label, and what brings its leaf to what a block has


def part_of(traced: Traced, place: Place) -> Part:
    """A kernel or a bias: an array of the tree, or what is made of some."""
    weight, chain = place
    if not weight.made:
        return Parameter(
            traced.names[weight.leaf], leaf_shape(traced, weight.leaf), chain, weight.part
        )
    return _made(traced, [place], lambda kernel: kernel)


def joined(traced: Traced, kernel: Place, bias: Place) -> Made:
    """A kernel whose last row is the bias."""

    def rows(kernel: jax.Array, bias: jax.Array) -> jax.Array:
        return jnp.concatenate([kernel, bias[..., None, :].astype(kernel.dtype)], -2)

    return _made(traced, [kernel, bias], rows, has_bias=True)


def point(traced: Traced, places: Sequence[Place], known: Mapping[int, Any]) -> tuple[Any, ...]:
    """The values that a function of `_made` is linearised at, and those that it takes besides."""
    leaves, free = _inputs(traced, places)
    return tuple(known[v] for v in (*(traced.program.inputs[leaf] for leaf in leaves), *free))


def _made(
    traced: Traced, places: Sequence[Place], combine: Callable[..., Any], has_bias: bool = False
) -> Made:
    program = traced.program
    leaves, free = _inputs(traced, places)

    def function(*values: Any) -> Any:
        own = dict(zip(leaves, values, strict=False))
        others = dict(zip(free, values[len(leaves) :], strict=True))

        def read(leaf: int) -> Any:
            return own[leaf] if leaf < traced.n_leaves else virtual(leaf).evaluate(read, others)

        def virtual(leaf: int) -> Any:
            return traced.detection.formulas[leaf - traced.n_leaves]

        arrays = []
        for weight, chain in places:
            array = read(weight.leaf)
            arrays.append(chains.apply(chain, weight.part.take(array) if weight.part else array))
        return combine(*arrays)

    values = [*(program.inputs[leaf] for leaf in leaves), *free]
    closed = jax.make_jaxpr(function)(*(as_struct(program.avals[v]) for v in values))
    sources = tuple(Parameter(traced.names[leaf], leaf_shape(traced, leaf)) for leaf in leaves)
    is_isometry = not any(weight.made or weight.part for weight, _ in places)
    return Made(sources, StaticJaxpr(closed), is_isometry, has_bias)


def _inputs(traced: Traced, places: Sequence[Place]) -> tuple[list[int], list[int]]:
    """The parameters that these are made of, and the other values from outside."""
    leaves = sorted(frozenset().union(*(leaves_of(weight) for weight, _ in places)))
    free: dict[int, None] = {}
    pending = [weight.leaf for weight, _ in places]
    while pending:
        leaf = pending.pop()
        if leaf >= traced.n_leaves:
            formula = traced.detection.formulas[leaf - traced.n_leaves]
            free.update(dict.fromkeys(outer for _, outer in formula.free))
            pending.extend(weight.leaf for _, weight in formula.roots)
    return leaves, list(free)
