"""Trace a loss function once, and find in it what is a layer and what counts examples."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from locoprop_jax._tracing import chains, detect
from locoprop_jax._tracing.batch import batch_axes
from locoprop_jax._tracing.chains import Part, Shape
from locoprop_jax._tracing.detect import Detection
from locoprop_jax._tracing.labels import leaves_of
from locoprop_jax._tracing.program import Program, flatten
from locoprop_jax._trees import leaves_by_path


class Traced(NamedTuple):
    """A loss function as a flat jaxpr, and how to go back and forth."""

    closed: Any
    program: Program
    n_leaves: int  # how many inputs are parameters
    names: tuple[str, ...]  # of the parameters
    arguments: list[Any]  # the flat inputs after the parameters
    rebuild_output: Callable[[Sequence[Any]], Any]
    batch_axes: list[Shape] | None  # for each value, the axes that count examples
    detection: Detection


def leaf_shape(traced: Traced, leaf: int) -> Shape:
    """Of a parameter, or of what is made of some."""
    if leaf < traced.n_leaves:
        return traced.program.shape(traced.program.inputs[leaf])
    return traced.detection.formulas[leaf - traced.n_leaves].shape


def layer_names(traced: Traced) -> list[str]:
    """Each site's layer: its kernel's parent, or the kernel itself if the parent is no name.

    The bias stands for the kernel where there is none.
    """
    weights = [site.weight or site.added for site in traced.detection.sites]
    found = [w for w in weights if w is not None]
    keys = [(min(leaves_of(w)), w.part) for w in found]
    parents = {leaf: traced.names[leaf].rpartition("/")[0] for leaf, _ in keys}
    taken = collections.Counter(parents.values())
    names: dict[tuple[int, Part | None], str] = {}
    for (leaf, part), weight in zip(keys, found, strict=True):
        is_alone = parents[leaf] and taken[parents[leaf]] == 1
        name = parents[leaf] if is_alone else traced.names[leaf]
        shape = leaf_shape(traced, weight.leaf)
        names[leaf, part] = name if part is None else name + _index(part, shape)
    return [names[key] for key in keys]


def _index(part: Part, shape: Shape) -> str:
    """How a part is taken out of its array, for its name."""
    sizes = chains.result_shape(part.chain, shape)
    text = [
        ":" if (a, b) == (0, n) else str(a) if b == a + 1 else f"{a}:{b}"
        for a, b, n in zip(part.starts, part.limits, sizes, strict=True)
    ]
    while text[-1:] == [":"]:
        text.pop()
    return f"[{', '.join(text)}]"


def _is_array(leaf: Any) -> bool:
    """Whether a leaf of the arguments is traced; flags, strings and functions pass through."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def trace(loss_fn: Callable, params: Any, args: tuple, kwargs: dict, has_aux: bool) -> Traced:
    """Trace a loss, and find its layers and its batch."""
    names = list(leaves_by_path(params))
    leaves, params_tree = jax.tree.flatten(params)
    _check_params(names, leaves)
    others, others_tree = jax.tree.flatten((args, kwargs))
    is_traced = [_is_array(leaf) for leaf in others]
    dynamic = [leaf for leaf, traced in zip(others, is_traced, strict=True) if traced]
    static_output: list[Any] = []  # set by tracing: the output's tree and its non-array leaves

    def flat(*inputs: Any) -> list[Any]:
        rest = iter(inputs[len(leaves) :])
        merged = [next(rest) if t else leaf for leaf, t in zip(others, is_traced, strict=True)]
        args, kwargs = jax.tree.unflatten(others_tree, merged)
        output = loss_fn(jax.tree.unflatten(params_tree, inputs[: len(leaves)]), *args, **kwargs)
        _check_loss(output, has_aux)
        flat_output, tree = jax.tree.flatten(output)
        arrays = [_is_array(leaf) for leaf in flat_output]
        arrays[0] = True
        static = [None if a else x for x, a in zip(flat_output, arrays, strict=True)]
        static_output[:] = [tree, static, arrays]
        return [x for x, a in zip(flat_output, arrays, strict=True) if a]

    closed = jax.make_jaxpr(flat)(*leaves, *dynamic)
    tree, static, arrays = static_output

    def rebuild_output(values: Sequence[Any]) -> Any:
        rest = iter(values)
        merged = [next(rest) if a else x for x, a in zip(static, arrays, strict=True)]
        return jax.tree.unflatten(tree, merged)

    program = flatten(closed, len(leaves))
    detection = detect.detect(program, names)
    return Traced(
        closed,
        program,
        len(leaves),
        tuple(names),
        dynamic,
        rebuild_output,
        batch_axes(program, len(leaves), detection),
        detection,
    )


def _check_params(names: Sequence[str], leaves: Sequence[Any]) -> None:
    for name, leaf in zip(names, leaves, strict=True):
        if not _is_array(leaf) and not isinstance(leaf, int | float | complex):
            raise TypeError(
                f"The parameter {name!r} is a {type(leaf).__name__}, not an array. Pass only "
                f"arrays as parameters: with Equinox, `params, static = eqx.partition(model, "
                f"eqx.is_inexact_array)` and `eqx.combine(params, static)` inside the loss."
            )
        dtype = getattr(leaf, "dtype", None)
        if dtype is not None and not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"The parameter {name!r} has dtype {dtype}, and a loss has no gradient by it. Pass "
                f"counters, keys and flags beside the parameters, as arguments of the loss: with "
                f"NNX, `graph, params, rest = nnx.split(model, nnx.Param, ...)`."
            )


def _check_loss(output: Any, has_aux: bool) -> None:
    if has_aux and not (isinstance(output, tuple) and len(output) == 2):
        raise TypeError(
            f"With `has_aux=True` the loss function returns a pair (loss, aux), got {output!r}."
        )
    loss = output[0] if has_aux else output
    if isinstance(loss, tuple | list | dict):
        raise TypeError(
            f"The loss function returns a {type(loss).__name__} where a scalar is expected. If it "
            f"is a pair (loss, aux), say `has_aux=True`."
        )
    if jnp.shape(loss) != ():
        raise TypeError(
            f"The loss function returns an array of shape {jnp.shape(loss)}; it has to be a "
            f"scalar, as for `jax.value_and_grad`. Take the mean over the batch."
        )
