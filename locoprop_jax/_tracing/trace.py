"""Trace a loss function and find its batch axes."""

from __future__ import annotations

import collections
import types
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from locoprop_jax._tracing import chains, detect
from locoprop_jax._tracing.chains import Part, Shape
from locoprop_jax._tracing.detect import Detection
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
    batch_axes: list[Shape] | None  # for each value, the axes that grow with the batch
    detection: Detection


def layer_names(traced: Traced) -> list[str]:
    """Each site's layer: its kernel's parent, or the kernel itself if the parent is no name.

    The bias stands for the kernel where there is none.
    """
    weights = [site.weight or site.added for site in traced.detection.sites]
    keys = [(w.leaf, w.part) for w in weights if w is not None]
    parents = {leaf: traced.names[leaf].rpartition("/")[0] for leaf, _ in keys}
    taken = collections.Counter(parents.values())
    names: dict[tuple[int, Part | None], str] = {}
    for leaf, part in keys:
        is_alone = parents[leaf] and taken[parents[leaf]] == 1
        name = parents[leaf] if is_alone else traced.names[leaf]
        shape = traced.program.shape(traced.program.inputs[leaf])
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
    """Trace a loss, at its own batch size and once more at twice that to find the batch axes."""
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

    program = flatten(closed)
    kinds = tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in (*leaves, *dynamic))
    fixed = tuple(leaf for leaf, is_traced in zip(others, is_traced, strict=True) if not is_traced)
    batch_axes = _once(
        loss_fn,
        (params_tree, others_tree, kinds, fixed),
        program,
        lambda: _batch_axes(flat, program, leaves, dynamic),
    )
    return Traced(
        closed,
        program,
        len(leaves),
        tuple(names),
        dynamic,
        rebuild_output,
        batch_axes,
        detect.detect(program, len(leaves), batch_axes),
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


# For each loss function, by its arguments: the shapes of its values, and their batch axes.
_known: weakref.WeakKeyDictionary[Callable, dict[Hashable, tuple[list[Shape], Any]]]
_known = weakref.WeakKeyDictionary()


def _once(
    loss_fn: Callable, key: Hashable, program: Program, find: Callable[[], list[Shape] | None]
) -> list[Shape] | None:
    """The batch axes as found before for this loss and arguments like these, else found now.

    The second trace is a fifth of the time that tracing a deep network takes, and a loss is traced
    by `find_layers` and by each `jax.jit` of a step.
    """
    try:
        hash(key)
    except TypeError:
        return find()
    if not isinstance(loss_fn, types.FunctionType):  # others may be equal and yet differ
        return find()
    shapes = [program.shape(v) for v in range(len(program.avals))]
    known = _known.setdefault(loss_fn, {})
    if key not in known or known[key][0] != shapes:
        known[key] = (shapes, find())
    return known[key][1]


def _batch_axes(
    flat: Callable, program: Program, leaves: Sequence[Any], dynamic: Sequence[Any]
) -> list[Shape] | None:
    """Which axes of each value grow with the batch, from a second trace at twice the batch.

    The batch is the first axis that some arguments have in common. Arguments that cannot be
    doubled (a random key, running statistics) make the trace fail; of several sizes that can, the
    one that most values grow with is the batch. None if there is no such size.
    """
    abstract = jax.eval_shape(lambda *xs: xs, *leaves, *dynamic)
    best: list[Shape] | None = None
    for size in sorted({leaf.shape[0] for leaf in abstract[len(leaves) :] if _may_grow(leaf)}):
        grow = [
            i >= len(leaves) and _may_grow(leaf) and leaf.shape[0] == size
            for i, leaf in enumerate(abstract)
        ]
        # Running statistics may have as many features as the batch has examples.
        without = [g and not _is_vector(leaf) for g, leaf in zip(grow, abstract, strict=True)]
        for chosen in (grow, without):
            grown = _grown(flat, program, abstract, chosen) if any(chosen) else None
            if grown is None:
                continue
            if best is None or sum(map(bool, grown)) > sum(map(bool, best)):
                best = grown
            break
    return best


def _grown(
    flat: Callable, program: Program, abstract: Sequence[Any], chosen: Sequence[bool]
) -> list[Shape] | None:
    """By value the axes that grow as the chosen inputs' first axes do; None if they cannot."""
    doubled = [
        jax.ShapeDtypeStruct((2 * leaf.shape[0], *leaf.shape[1:]), leaf.dtype) if grows else leaf
        for leaf, grows in zip(abstract, chosen, strict=True)
    ]
    try:
        other = flatten(jax.make_jaxpr(flat)(*doubled))
    except Exception:
        return None
    same = [e.path for e in other.all_equations()] == [e.path for e in program.all_equations()]
    if not same or len(other.avals) != len(program.avals):
        return None
    return [_growing(program.shape(v), other.shape(v)) for v in range(len(other.avals))]


def _may_grow(leaf: jax.ShapeDtypeStruct) -> bool:
    return bool(leaf.shape) and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _is_vector(leaf: jax.ShapeDtypeStruct) -> bool:
    return len(leaf.shape) == 1 and jnp.issubdtype(leaf.dtype, jnp.floating)


def _growing(shape: Shape, doubled: Shape) -> Shape:
    return tuple(i for i, (a, b) in enumerate(zip(shape, doubled, strict=True)) if a != b)
