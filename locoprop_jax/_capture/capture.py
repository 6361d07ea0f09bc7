"""`value_grad_and_capture`: the gradients of a loss, and what each layer saw.

The loss is traced, its layers are detected in the trace, and the trace is run again with each
layer's input recorded and a zero perturbation tapped into its output. One `jax.value_and_grad`
over (parameters, perturbations) then gives the gradients and the cotangents in the same backward
pass, at the cost of the gradients alone.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from locoprop_jax._capture import curvature as _curvature
from locoprop_jax._capture import output_hessian
from locoprop_jax._capture import targets as _targets
from locoprop_jax._capture.curvature import Point
from locoprop_jax._capture.layouts import layout_of, piece_of, weights_of
from locoprop_jax._capture.output_hessian import OutputPlan
from locoprop_jax._capture.targets import Target
from locoprop_jax._layers.arrays import Deferred, LayerArrays
from locoprop_jax._layers.captured import Captured
from locoprop_jax._layers.head import Head, StaticJaxpr
from locoprop_jax._layers.transposed import Transposed
from locoprop_jax._layers.uses import Layout, Use
from locoprop_jax._tracing import flow
from locoprop_jax._tracing.chains import Shape
from locoprop_jax._tracing.evaluate import Address, evaluate
from locoprop_jax._tracing.flow import Piece
from locoprop_jax._tracing.heads import Cut, addresses, cut, output_sites
from locoprop_jax._tracing.jaxpr import Path
from locoprop_jax._tracing.program import Program
from locoprop_jax._tracing.sites import Site, input_addresses, output_address
from locoprop_jax._tracing.trace import Traced, layer_names, trace


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
        elif curvature is not None and "rng" in kwargs:
            _curvature.check_no_rng(curvature, loss_fn)
        traced = trace(loss_fn, params, args, kwargs, has_aux)
        program, sites, names = traced.program, traced.detection.sites, layer_names(traced)
        ends = output_sites(traced)
        heads = {i: cut(traced, sites[i].output, program.outputs[0]) for i in ends}
        alone = {group[0] for group in traced.detection.groups if len(group) == 1}
        found = [
            piece_of(traced, site) if transferred and i in alone.difference(ends) else None
            for i, site in enumerate(sites)
        ]
        pieces = [piece if piece and piece.equations else None for piece in found]
        layouts = [
            layout_of(traced, site, piece) for site, piece in zip(sites, pieces, strict=True)
        ]
        targets: tuple[Target, ...] = ()
        to_rows = [layout.outputs for layout in layouts]
        if curvature in _curvature.PULLED:
            targets = _targets.plan(traced, curvature, names, to_rows)
        output: OutputPlan | None = None
        between: dict[int, Cut] = {}
        if curvature == "ggn_output":
            output = output_hessian.plan(traced, names, to_rows)
            targets = output.targets
            values = {target.value for target in targets}
            between = {value: cut(traced, output.output, value) for value in values}
        inputs = [input_addresses(site) for site in sites]
        outputs = [output_address(site) for site in sites]
        piece_ends: dict[int, Address] = {}
        for site, piece in zip(sites, pieces, strict=True):
            if piece is not None:
                piece_ends |= addresses(site.program, [piece.end])
        fixed = addresses(
            program,
            [v for plan in (*heads.values(), *between.values()) for v in plan.free]
            + [v for target in targets for v in target.operands],
        )
        injected = addresses(program, [target.value for target in targets])
        terms = addresses(program, [target.terms for target in targets if target.call])
        record = frozenset(
            [*itertools.chain(*inputs), *outputs, *fixed.values(), *injected.values()]
        )

        def forward(params: Any, perturbations: dict) -> tuple[Any, Any]:
            flat = [*jax.tree.leaves(params), *traced.arguments]
            results, recorded = evaluate(traced.closed, flat, record, perturbations)
            at_targets = [recorded[injected[target.value]] for target in targets]
            return (results[0], at_targets), (results[1:], recorded)

        zeros = {}
        for site, address, piece in zip(sites, outputs, pieces, strict=True):
            zeros[address.path] = _zeros(program, site.output, site.lengths)
            if piece is not None:
                path = piece_ends[piece.end].path
                zeros[path] = _zeros(program, piece.end, site.lengths)
        for value, address in terms.items():
            zeros[address.path] = _zeros(program, value, ())
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
            hessian = output_hessian.total(
                output, points, functions, recorded[outputs[output.site]], layouts[output.site]
            )
        if pull is not None and curvature is not None:
            columns = _curvature.cotangents(targets, points, curvature, samples, rng)
            deferred = Deferred(jax.tree_util.Partial(_pull_perturbations, pull, loss), columns)

        def use(i: int, site: Site, piece: Piece | None) -> Use:
            after = None if piece is None else piece_ends[piece.end].path
            return Use(
                operands=tuple(recorded[address] for address in inputs[i]),
                outputs=recorded[outputs[i]],
                cotangents=cotangents[outputs[i].path],
                transferred_cotangents=None if after is None else cotangents[after],
                layout=layouts[i],
                paths=(outputs[i].path, after),
            )

        uses = [use(i, *both) for i, both in enumerate(zip(sites, pieces, strict=True))]

        def turned(i: int, group: Sequence[int]) -> Use | Transposed:
            if i not in traced.detection.transposed:
                return uses[i]
            kernel, leaf = weights_of(traced, group)["kernel"], sites[group[0]].leaf
            assert leaf is not None
            return Transposed(uses[i], kernel.read(jnp.asarray(given[leaf])))

        arrays = tuple(
            LayerArrays(
                uses=tuple(turned(i, group) for i in group),
                head=of_heads.get(group[0]) if len(group) == 1 else None,
                signature=tuple(weights_of(traced, group).values()),
                has_transferred=transferred,
                output_hessian=hessian if output is not None and output.site in group else None,
            ).with_curvature(curved)
            for group in traced.detection.groups
        )
        joint = any(target.joins_positions for target in targets)
        own_names = tuple(names[group[0]] for group in traced.detection.groups)
        counts = {head.terms for head in of_heads.values()}
        captured = Captured(
            own_names, arrays, joint, deferred, counts.pop() if len(counts) == 1 else None
        )
        captured = captured if defer_curvature else captured.pulled()
        return traced.rebuild_output([loss, *rest]), grads, captured

    return wrapped


def _zeros(program: Program, value: int, lengths: Shape) -> jax.Array:
    """A perturbation of a value, for each turn of the loops around it."""
    aval = program.avals[value]
    # Like the value itself where that is possible, because its sharding counts too.
    return jnp.zeros_like(aval) if not lengths else jnp.zeros((*lengths, *aval.shape), aval.dtype)


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
    terms = flow.averaged_terms(program, traced.detection.terms, site.output)
    rows = math.prod(program.shape(site.output)) // site.d_out
    return Head(
        free=tuple(known[v] for v in plan.free),
        function=StaticJaxpr(plan.closed),
        layout=layout,
        dtype=program.avals[site.output].dtype,
        terms=float(rows) if math.isnan(terms) else terms,
    )
