"""`find_layers`: the layers of a model, static, from a trace of its loss."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from locoprop_jax._capture.plan import LayerPlan, plan_layers
from locoprop_jax._layers.layers import Layer, Layers, Uncaptured
from locoprop_jax._layers.table import is_large, left_out
from locoprop_jax._layers.transfer import TracedPiece, Transfer, given, identity, recognise
from locoprop_jax._tracing import chains
from locoprop_jax._tracing.flow import Piece
from locoprop_jax._tracing.heads import as_struct, bypasses
from locoprop_jax._tracing.operands import AsItIs
from locoprop_jax._tracing.sites import grouped_axes, raw_output
from locoprop_jax._tracing.trace import Traced


def find_layers(
    loss_fn: Callable[..., Any],
    params: Any,
    *args: Any,
    has_aux: bool = False,
    transfer: Mapping[str, Callable] | None = None,
    on_uncaptured: str = "error",
    **kwargs: Any,
) -> Layers:
    """Find the layers of a model from its loss function.

    Nothing is computed: the loss is traced, as by `jax.jit`. `print(layers)` shows what was
    understood: each layer with its shape, bias, rows per example and transfer function, then
    each parameter in no layer with the reason.

    Args:
      loss_fn: `loss_fn(params, *args, **kwargs)`, as for `jax.value_and_grad`.
      params: the parameters, arrays or `jax.ShapeDtypeStruct`s.
      *args: a batch and whatever else the loss takes; its arrays may be abstract too.
      has_aux: whether the loss function returns a pair (loss, aux).
      transfer: transfer functions by layer name, elementwise, that replace the ones found.
      on_uncaptured: "error" refuses a model with a parameter that has a gradient but is in no
        layer; "pass" lists it in the result, and methods leave its gradient as it is. If all are
        in none it warns.
      **kwargs: keyword arguments of the loss.

    Returns:
      The layers by name: static, hashable, independent of the batch size.

    Raises:
      ValueError: a parameter with a gradient is in no layer, none has a gradient, `transfer` names
        no layer, or `on_uncaptured` is unknown.
      TypeError: the loss is not a scalar, or a parameter is not an array.

    Examples:
      >>> import jax.numpy as jnp, locoprop_jax as lp
      >>> params = {"code": jnp.ones((3, 2)), "bias": jnp.zeros(2), "out": jnp.ones((2, 3))}
      >>> def loss_fn(params, x):
      ...     code = jnp.tanh(x @ params["code"] + params["bias"])
      ...     return jnp.mean((code @ params["out"] - x) ** 2)
      >>> print(lp.find_layers(loss_fn, params, jnp.ones((4, 3))))
      layer  kind   shape   bias  rows  transfer  parameters
      ------------------------------------------------------
      code   dense  3 -> 2  yes      1  tanh               8
      out    dense  2 -> 3  no       1  (loss)             6
      2 layers, 14 parameters
    """
    if on_uncaptured not in ("error", "pass"):
        raise ValueError(f"`on_uncaptured` is 'error' or 'pass', got {on_uncaptured!r}.")
    plan = plan_layers(loss_fn, params, args, kwargs, has_aux)
    overrides = dict(transfer or {})
    if unknown := set(overrides) - set(plan.names):
        raise ValueError(
            f"`transfer` names {', '.join(sorted(unknown))}, but the layers found are "
            f"{', '.join(plan.names) or 'none'}."
        )
    pieces = [plan.piece(site) for site in plan.sites]
    sources = _sources(plan, pieces)
    layers = [
        _layer(plan, group, sources[group[0]], _transfer_of(plan, group, pieces, overrides))
        for group in plan.groups
    ]
    result = Layers(layers, _uncaptured(plan.traced))
    _check_found(result, on_uncaptured)
    return result


def _uncaptured(traced: Traced) -> list[Uncaptured]:
    return [
        Uncaptured(
            traced.names[leaf],
            traced.program.shape(traced.program.inputs[leaf]),
            reason,
            leaf not in traced.detection.without_gradient,
        )
        for leaf, reason in sorted(traced.detection.reasons.items())
    ]


def _check_found(layers: Layers, on_uncaptured: str) -> None:
    """Refuse what methods would leave as it is, or say so where they would leave everything."""
    if layers and not any(other.has_gradient for other in layers.uncaptured):
        return
    about = layers.to_dict()
    folded = is_large(about)
    missing = [other for other in about["uncaptured"] if other["has_gradient"]]
    if not missing:
        lines = left_out(about["uncaptured"], folded)
        raise ValueError(
            "`find_layers` found no layer in this loss function. Its parameters:\n"
            + ("\n".join(lines) or "  (none)")
        )
    lines = "\n".join(left_out(missing, folded, remedies=True))
    if missing and on_uncaptured == "error":
        found = f"{len(layers)} layers, but these parameters are in none"
        raise ValueError(
            f"`find_layers` found {found if layers else 'no layer in this loss function'}:\n{lines}"
            '\nOr pass `on_uncaptured="pass"`, and give them an optimizer of their own by '
            "`with_fallback`."
        )
    if not layers:
        warnings.warn(
            "`find_layers` found no layer in this loss function, so that `with_fallback` leaves "
            f"all parameters to the fallback:\n{lines}",
            stacklevel=3,
        )


# --- one layer -----------------------------------------------------------------------------------


def _layer(plan: LayerPlan, group: Sequence[int], source: str | None, transfer: Transfer) -> Layer:
    return Layer(
        name=plan.names[group[0]],
        **plan.weights(group),
        rows=_rows_per_example(plan, group),
        transfer=transfer,
        is_output=any(i in plan.ends for i in group),
        source=source,
        bypasses=any(bypasses(plan.traced, i) for i in group),
        window=plan.sites[group[0]].window,
    )


def _rows_per_example(plan: LayerPlan, group: Sequence[int]) -> int | None:
    batch_axes = plan.traced.batch_axes
    if batch_axes is None:
        return None
    total = 0
    for i in group:
        site = plan.sites[i]
        if plan.is_transposed(i):
            total += plan.sites[group[0]].d_in  # see `Transposed`
            continue
        raw = raw_output(site)
        shared = set(site.row_axes) - set(batch_axes[raw])
        pairs = zip(site.lengths, site.sliced, strict=True)
        times = math.prod(length for length, is_sliced in pairs if not is_sliced)
        shape = plan.traced.program.shape(raw)
        total += times * math.prod(shape[axis] for axis in shared)
    return total


def _is_plain(plan: LayerPlan, group: Sequence[int]) -> bool:
    """Whether a layer is one dense layer, applied once."""
    site = plan.sites[group[0]]
    is_one = len(group) == 1 and site.stack is None and not site.loops
    return is_one and site.kind == "dense" and site.reader == AsItIs()


def _sources(plan: LayerPlan, pieces: Sequence[Piece]) -> list[str | None]:
    """For each site the layer that feeds it, with nothing but the transfer function in between.

    Both have to see the same rows and features in the same order.
    """
    program, sites = plan.traced.program, plan.sites
    plain = sorted({group[0] for group in plan.groups if _is_plain(plan, group)})
    ends = {
        pieces[i].end: (plan.names[i], plan.transferred_to_rows(sites[i], pieces[i])) for i in plain
    }
    result: list[str | None] = [None] * len(sites)
    for i in plain:
        (operand,) = sites[i].operands
        value = program.equations[operand.position].inputs[operand.index]
        if value in ends:
            name, chain = ends[value]
            shape = program.shape(value)
            data, _ = grouped_axes(sites[i], plan.traced.batch_axes)
            if chains.are_same(chains.group((), shape, data), chain, shape):
                result[i] = name
    return result


def _transfer_of(
    plan: LayerPlan,
    group: Sequence[int],
    pieces: Sequence[Piece],
    overrides: Mapping[str, Callable],
) -> Transfer:
    """What the network applies to a layer's outputs, or what the user says instead."""
    if (name := plan.names[group[0]]) in overrides:
        return given(overrides[name])
    if len(group) > 1:
        return identity(f"it is used {len(group)} times")
    program, piece = plan.traced.program, pieces[group[0]]
    if not piece.equations:
        return identity(piece.note)

    def function(a: Any) -> Any:
        return program.call(piece.equations, {piece.begin: a}, piece.end)

    aval = program.avals[piece.begin]
    closed = jax.make_jaxpr(function)(as_struct(aval))
    traced_piece = TracedPiece(closed, tuple(aval.shape), aval.dtype)
    return recognise(traced_piece, aval.dtype, piece.note)
