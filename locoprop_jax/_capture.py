"""Capture: `find_layers` and `value_grad_and_capture`.

The loss is traced, its layers are detected in the trace, and the trace is run again with each
layer's input recorded and a zero perturbation tapped into its output. One `jax.value_and_grad`
over (parameters, perturbations) then gives the gradients and the cotangents in the same backward
pass, at the cost of the gradients alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from locoprop_jax import (
    _chains,
    _curvature,
    _detect,
    _flow,
    _jaxpr,
    _layers,
    _output_hessian,
    _targets,
    _transfer,
)
from locoprop_jax._chains import Chain, Shape
from locoprop_jax._curvature import Point
from locoprop_jax._detect import Site
from locoprop_jax._flow import Piece
from locoprop_jax._heads import Cut, addresses, as_struct, cut
from locoprop_jax._jaxpr import Address, Path
from locoprop_jax._layers import (
    Captured,
    Deferred,
    Head,
    Layer,
    LayerArrays,
    Layers,
    Layout,
    Parameter,
    StaticJaxpr,
)
from locoprop_jax._output_hessian import OutputPlan
from locoprop_jax._targets import Target
from locoprop_jax._trace import Traced, layer_names, trace
from locoprop_jax._transfer import Transfer

# --- standardise ---------------------------------------------------------------------------------


def _weights(traced: Traced, site: Site) -> dict[str, Any]:
    """The static facts that a layer and its captured arrays have in common."""

    def parameter(leaf: int, chain: Chain) -> Parameter:
        shape = traced.program.shape(traced.program.inputs[leaf])
        return Parameter(traced.names[leaf], shape, chain)

    return {
        "kind": "dense",
        "d_in": site.d_in,
        "d_out": site.d_out,
        "kernel": parameter(site.leaf, site.kernel),
        "bias": None if site.bias is None else parameter(site.bias, site.bias_chain),
    }


def _layout(traced: Traced, site: Site, piece: Piece | None) -> Layout:
    """How to read a site's arrays as (batch, shared, d)."""
    program = traced.program
    equation = program.equations[site.position]
    inputs, _ = _detect.axes_of_rows(program, site, traced.batch_axes)
    data_shape = program.shape(equation.inputs[site.operand])
    to_rows = _outputs(traced, site)
    return Layout(
        inputs=_chains.group((), data_shape, inputs),
        outputs=to_rows,
        outputs_back=_chains.inverse(to_rows, program.shape(site.output)),
        transferred=None if piece is None else _transferred(traced, site, piece),
    )


def _outputs(traced: Traced, site: Site) -> Chain:
    """How to read a site's outputs as (batch, shared, d_out)."""
    program = traced.program
    _, outputs = _detect.axes_of_rows(program, site, traced.batch_axes)
    raw_shape = program.shape(program.equations[site.position].outputs[0])
    to_raw = _chains.inverse(site.output_chain, raw_shape)
    return _chains.group(to_raw, raw_shape, outputs)


def _rows_per_example(traced: Traced, site: Site) -> int | None:
    if traced.batch_axes is None:
        return None
    (_, shared, _), _ = _detect.axes_of_rows(traced.program, site, traced.batch_axes)
    data = traced.program.equations[site.position].inputs[site.operand]
    return math.prod(traced.program.shape(data)[i] for i in shared)


def _piece(traced: Traced, site: Site) -> Piece:
    """What the network applies to a layer's outputs."""
    return _flow.transfer_piece(traced.program, traced.detection.live, site.output)


def _transferred(traced: Traced, site: Site, piece: Piece) -> Chain:
    """How to read what a piece ends in as (batch, shared, d_out)."""
    back = _chains.inverse(piece.chain, traced.program.shape(site.output))
    return (*back, *_outputs(traced, site))


def _sources(traced: Traced, names: Sequence[str], pieces: Sequence[Piece]) -> list[str | None]:
    """For each layer the one that feeds it, with nothing but the transfer function in between.

    Both have to see the same rows and features in the same order.
    """
    program, sites = traced.program, traced.detection.sites
    ends = {
        piece.end: (name, _transferred(traced, site, piece))
        for site, name, piece in zip(sites, names, pieces, strict=True)
    }
    result: list[str | None] = []
    for site in sites:
        equation = program.equations[site.position]
        data, _ = _detect.axes_of_rows(program, site, traced.batch_axes)
        name, value = None, equation.inputs[site.operand]
        if value in ends:
            name, chain = ends[value]
            shape = program.shape(value)
            if not _same_order(_chains.group((), shape, data), chain, shape):
                name = None
        result.append(name)
    return result


def _same_order(one: Chain, other: Chain, shape: Shape) -> bool:
    """Whether two chains do the same to an array of this shape."""
    if one == other:
        return True
    order = np.arange(math.prod(shape)).reshape(shape)
    return np.array_equal(_chains.apply(one, order), _chains.apply(other, order))


def _transfer_of(traced: Traced, piece: Piece) -> Transfer:
    """Find what the network applies to a layer's outputs."""
    program = traced.program
    if not piece.equations:
        return _transfer.identity(piece.note)

    def function(a: Any) -> Any:
        return program.call(piece.equations, {piece.begin: a}, piece.end)

    aval = program.avals[piece.begin]
    closed = jax.make_jaxpr(function)(as_struct(aval))
    traced_piece = _transfer.TracedPiece(closed, tuple(aval.shape), aval.dtype)
    return _transfer.recognise(traced_piece, aval.dtype, piece.note)


# --- public --------------------------------------------------------------------------------------


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
        layer; "pass" lists it in the result, and methods leave its gradient as it is.
      **kwargs: keyword arguments of the loss.

    Returns:
      The layers by name: static, hashable, independent of the batch size.

    Raises:
      ValueError: no layer was found, a parameter with a gradient is in none, `transfer` names no
        layer, or `on_uncaptured` is unknown.
      TypeError: the loss is not a scalar, or a parameter is not an array.

    Example:
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
    traced = trace(loss_fn, params, args, kwargs, has_aux)
    names = layer_names(traced)
    overrides = dict(transfer or {})
    if unknown := set(overrides) - set(names):
        raise ValueError(
            f"`transfer` names {', '.join(sorted(unknown))}, but the layers found are "
            f"{', '.join(names) or 'none'}."
        )
    ends = _detect.output_sites(traced.program, traced.detection)
    pieces = [_piece(traced, site) for site in traced.detection.sites]
    sources = _sources(traced, names, pieces)
    layers = [
        Layer(
            name=name,
            **_weights(traced, site),
            rows=_rows_per_example(traced, site),
            transfer=(
                _transfer.given(overrides[name])
                if name in overrides
                else _transfer_of(traced, pieces[i])
            ),
            is_output=i in ends,
            source=sources[i],
            bypasses=_detect.bypasses(traced.program, traced.detection, i),
        )
        for i, (site, name) in enumerate(zip(traced.detection.sites, names, strict=True))
    ]
    result = Layers(layers, _uncaptured(traced))
    _check_found(result, on_uncaptured)
    return result


def _uncaptured(traced: Traced) -> list[_layers.Uncaptured]:
    return [
        _layers.Uncaptured(
            traced.names[leaf],
            traced.program.shape(traced.program.inputs[leaf]),
            reason,
            leaf not in traced.detection.without_gradient,
        )
        for leaf, reason in sorted(traced.detection.reasons.items())
    ]


def _check_found(layers: Layers, on_uncaptured: str) -> None:
    missing = [other for other in layers.uncaptured if other.has_gradient]
    lines = "\n".join(f"  {o.path} {list(o.shape)}: {o.reason}" for o in layers.uncaptured)
    if not layers:
        raise ValueError(
            "`find_layers` found no layer in this loss function. Its parameters:\n"
            + (lines or "  (none)")
        )
    if missing and on_uncaptured == "error":
        raise ValueError(
            f"`find_layers` found {len(layers)} layers, but these parameters are in none:\n"
            + "\n".join(f"  {o.path} {list(o.shape)}: {o.reason}" for o in missing)
            + '\nPass `on_uncaptured="pass"` to leave their gradients as they are.'
        )


def value_grad_and_capture(
    loss_fn: Callable[..., Any],
    has_aux: bool = False,
    *,
    transferred: bool = False,
    curvature: str | None = None,
    samples: int = 1,
    defer_curvature: bool = False,
) -> Callable[..., Any]:
    """`jax.value_and_grad` that also returns what each layer saw.

    With `curvature`, each layer also gets cotangents C whose products C'C, summed over samples and
    rows, have the expectation of its pre-activation Fisher or Gauss-Newton block, that of the loss
    as written (practical Gauss-Newton, sections 2 and 3). They come from the same forward pass, by
    one more backward pass for each sample or column, batched by `jax.vmap`:

    * "fisher_mc": the gradients of terms with labels that the model predicts. The loss has to be
      written with `locoprop_jax.losses`.
    * "fisher_empirical": the cotangents times sqrt(c), where c is the number of terms that the
      loss averages over: the gradients for the labels given. No further pass.
    * "ggn_mc": random signs times a square root of the loss Hessian.
    * "ggn_exact": the columns of that root: as many as outputs per example, times the positions
      of an example that meet in the network. No example may meet another.

    "ggn_output" gives no cotangents but the Gauss-Newton factor of the output layer alone, from
    which `scale_by_kfra` computes those of all others: `output_hessian`, the sum over rows of the
    Hessian of the loss as written by the outputs of the row, (d_out, d_out), or its diagonal
    (d_out,) where the loss takes each output by itself. No further pass. The loss has one output
    layer, and no row of it meets another in the loss.

    Losses of `locoprop_jax.losses` have square roots in closed form, and there may be several of
    them; any other loss works for "ggn_mc" and "ggn_exact" if a single layer feeds it and its
    Hessian is seen to be one block per example. A negative part of an example's Hessian counts as
    zero, as does a term with a negative weight.

    Args:
      loss_fn: `loss_fn(params, *args, **kwargs)` with a scalar loss, or a pair (loss, aux).
      has_aux: whether it returns a pair.
      transferred: whether to capture the cotangents after the transfer functions too, which the
        post-activation methods (`pocoprop_s`, `pocoprop_m`) need.
      curvature: which curvature cotangents to capture, None for none.
      samples: how many, for those that are sampled.
      defer_curvature: whether the further backward passes wait until a method reads what they make.
        An amortised method reads it inside a conditional, so that steps that gather no statistics
        do not pay for them. For an update in the same `jax.jit`: such a `captured` holds the
        backward pass itself, and cannot be sliced, stacked or carried through a loop.

    Returns:
      A function of the same arguments that returns `(loss, gradients, captured)`, or
      `((loss, aux), gradients, captured)`. The gradients are those of `jax.value_and_grad`, under
      `jax.jit` bit for bit unless arrays that leave the jit change what XLA fuses; `captured` is a
      `Captured`, the arrays of each layer by name: inputs (batch, shared, d_in), outputs and
      cotangents (batch, shared, d_out), curvature (samples, batch, shared, d_out). It costs what
      `jax.value_and_grad` costs, and the passes that `curvature` asks for; what is not used of it
      is not kept. With "fisher_mc" or "ggn_mc" the function needs a key as the keyword `rng`,
      which the loss does not get.

    Raises:
      TypeError: the loss is not a scalar, a parameter is not an array, or `rng` is missing.
      ValueError: `curvature` or `samples` is out of range, or the curvature of this loss cannot be
        told; the message says why and what to do.

    Example:
      >>> import jax, jax.numpy as jnp, locoprop_jax as lp
      >>> def loss_fn(w, x):
      ...     return jnp.mean((x @ w["kernel"]) ** 2)
      >>> w, x = {"kernel": jnp.ones((3, 2))}, jnp.ones((4, 3))
      >>> loss, grads, captured = jax.jit(lp.value_grad_and_capture(loss_fn))(w, x)
      >>> captured["kernel"].cotangents.shape
      (4, 1, 2)
    """
    _curvature.check_arguments(curvature, samples)

    @functools.wraps(loss_fn)
    def wrapped(params: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any, Captured]:
        rng = None
        if curvature in _curvature.SAMPLED:
            rng = kwargs.pop("rng", None)
            _curvature.check_rng(curvature, rng)
        traced = trace(loss_fn, params, args, kwargs, has_aux)
        program, sites, names = traced.program, traced.detection.sites, layer_names(traced)
        ends = sorted(_detect.output_sites(program, traced.detection))
        heads = {i: cut(traced, sites[i].output, program.outputs[0]) for i in ends}
        found = [
            _piece(traced, site) if transferred and i not in ends else None
            for i, site in enumerate(sites)
        ]
        pieces = [piece if piece and piece.equations else None for piece in found]
        layouts = [_layout(traced, site, piece) for site, piece in zip(sites, pieces, strict=True)]
        targets: tuple[Target, ...] = ()
        to_rows = [layout.outputs for layout in layouts]
        if curvature in _curvature.PULLED:
            targets = _targets.plan(traced, curvature, names, to_rows)
        output: OutputPlan | None = None
        between: dict[int, Cut] = {}
        if curvature == "ggn_output":
            output = _output_hessian.plan(traced, names, to_rows)
            targets = output.targets
            values = {target.value for target in targets}
            between = {value: cut(traced, output.output, value) for value in values}
        inputs = [_detect.input_address(program, site) for site in sites]
        outputs = [_detect.output_address(program, site) for site in sites]
        piece_ends = addresses(program, [piece.end for piece in pieces if piece])
        fixed = addresses(
            program,
            [v for plan in (*heads.values(), *between.values()) for v in plan.free]
            + [v for target in targets for v in target.operands],
        )
        injected = addresses(program, [target.value for target in targets])
        terms = addresses(program, [target.terms for target in targets if target.call])
        record = frozenset([*inputs, *outputs, *fixed.values(), *injected.values()])

        def forward(params: Any, perturbations: dict) -> tuple[Any, Any]:
            flat = [*jax.tree.leaves(params), *traced.arguments]
            results, recorded = _jaxpr.evaluate(traced.closed, flat, record, perturbations)
            at_targets = [recorded[injected[target.value]] for target in targets]
            return (results[0], at_targets), (results[1:], recorded)

        tapped = {a.path: s.output for s, a in zip(sites, outputs, strict=True)}
        tapped |= {address.path: value for value, address in piece_ends.items()}
        tapped |= {address.path: value for value, address in terms.items()}
        zeros = {path: jnp.zeros_like(program.avals[value]) for path, value in tapped.items()}
        if curvature in _curvature.PULLED:
            (loss, at_targets), pull, (rest, recorded) = jax.vjp(
                forward, params, zeros, has_aux=True
            )
            nothing = jax.tree.map(jnp.zeros_like, at_targets)
            grads, cotangents = pull((jnp.ones_like(loss), nothing))
        else:
            pull = None
            (loss, (rest, recorded)), (grads, cotangents) = jax.value_and_grad(
                lambda *args: _first_of_pair(forward(*args)), argnums=(0, 1), has_aux=True
            )(params, zeros)

        given = [*jax.tree.leaves(params), *traced.arguments]
        known = dict(zip(program.inputs, given, strict=True))
        known |= {v: recorded[address] for v, address in fixed.items()}
        known |= program.constants
        layouts = [_layout(traced, site, piece) for site, piece in zip(sites, pieces, strict=True)]
        of_heads = {i: _head(traced, sites[i], heads[i], layouts[i], known) for i in ends}

        curved: Mapping[Path, jax.Array] = {}
        deferred: Deferred | None = None
        if curvature == "fisher_empirical":
            root = math.sqrt(_averaged_terms(of_heads, names))
            curved = {path: (root * e)[None] for path, e in cotangents.items()}
        points = [
            _point(target, recorded[injected[target.value]], cotangents, terms, known, heads)
            for target in targets
        ]
        hessian = None
        if output is not None:
            functions = [between[target.value].function(known) for target in targets]
            hessian = _output_hessian.total(
                output, points, functions, recorded[outputs[output.site]], layouts[output.site]
            )
        if pull is not None and curvature is not None:
            columns = _curvature.cotangents(targets, points, curvature, samples, rng)
            deferred = Deferred(jax.tree_util.Partial(_pull_perturbations, pull, loss), columns)

        arrays = tuple(
            LayerArrays(
                raw_inputs=recorded[inputs[i]],
                raw_outputs=recorded[outputs[i]],
                raw_cotangents=cotangents[outputs[i].path],
                raw_transferred_cotangents=(
                    None if piece is None else cotangents[piece_ends[piece.end].path]
                ),
                head=of_heads.get(i),
                signature=tuple(_weights(traced, site).values()),
                layout=layouts[i],
                has_transferred=transferred,
                output_hessian=hessian if output is not None and i == output.site else None,
                paths=(outputs[i].path, None if piece is None else piece_ends[piece.end].path),
            ).with_curvature(curved)
            for i, (site, piece) in enumerate(zip(sites, pieces, strict=True))
        )
        joint = curvature == "ggn_exact" and _targets.joins_positions(traced, targets)
        captured = Captured(tuple(names), arrays, joint, deferred)
        captured = captured if defer_curvature else captured.pulled()
        return traced.rebuild_output([loss, *rest]), grads, captured

    return wrapped


def _pull_perturbations(pull: Callable, loss: jax.Array, at_targets: Any) -> Any:
    """The cotangents by path of what is injected at the targets alone."""
    return pull((jnp.zeros_like(loss), at_targets))[1]


def _first_of_pair(results: tuple[tuple[Any, Any], Any]) -> tuple[Any, Any]:
    (loss, _), others = results
    return loss, others


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


def _point(
    target: Target,
    value: jax.Array,
    cotangents: Mapping[Path, jax.Array],
    terms: Mapping[int, Address],
    known: Mapping[int, Any],
    heads: Mapping[int, Cut],
) -> Point:
    """The arrays of a target of curvature cotangents."""
    if target.call is not None:
        weights = cotangents[terms[target.terms].path]
        return Point(value, tuple(known[v] for v in target.operands), weights)
    (plan,) = heads.values()
    return Point(value, head=plan.function(known))


def _head(traced: Traced, site: Site, plan: Cut, layout: Layout, known: Mapping[int, Any]) -> Head:
    program = traced.program
    terms = _flow.averaged_terms(program, traced.detection.terms, site.output)
    rows = math.prod(program.shape(site.output)) // site.d_out
    return Head(
        free=tuple(known[v] for v in plan.free),
        function=StaticJaxpr(plan.closed),
        layout=layout,
        dtype=program.avals[site.output].dtype,
        terms=float(rows) if math.isnan(terms) else terms,
    )
