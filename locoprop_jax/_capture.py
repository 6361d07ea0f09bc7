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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from locoprop_jax import _chains, _detect, _jaxpr, _layers, _transfer
from locoprop_jax._chains import Shape
from locoprop_jax._detect import Detection, Site
from locoprop_jax._jaxpr import Address, Program
from locoprop_jax._layers import Captured, Head, Layer, LayerArrays, Layers, Layout, Parameter

# --- tracing -------------------------------------------------------------------------------------


class Traced(NamedTuple):
    """A loss function as a flat jaxpr, and how to go back and forth."""

    closed: Any
    program: Program
    n_leaves: int  # how many inputs are parameters
    names: tuple[str, ...]  # of the parameters
    arguments: list[Any]  # the flat inputs after the parameters
    rebuild_output: Callable[[Sequence[Any]], Any]
    batch_axes: list[Shape] | None  # for each value, the axes that grow with the batch

    @property
    def detection(self) -> Detection:
        return _detect.detect(self.program, self.n_leaves, self.batch_axes)


def _is_array(leaf: Any) -> bool:
    """Whether a leaf of the arguments is traced; flags, strings and functions pass through."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def trace(loss_fn: Callable, params: Any, args: tuple, kwargs: dict, has_aux: bool) -> Traced:
    """Trace a loss, at its own batch size and once more at twice that to find the batch axes."""
    names = list(_layers.leaves_by_path(params))
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
        static_output[:] = [tree, [None if a else x for x, a in zip(flat_output, arrays)], arrays]
        return [x for x, a in zip(flat_output, arrays, strict=True) if a]

    closed = jax.make_jaxpr(flat)(*leaves, *dynamic)
    tree, static, arrays = static_output

    def rebuild_output(values: Sequence[Any]) -> Any:
        rest = iter(values)
        merged = [next(rest) if a else x for x, a in zip(static, arrays, strict=True)]
        return jax.tree.unflatten(tree, merged)

    program = _jaxpr.flatten(closed)
    batch_axes = _batch_axes(flat, program, leaves, dynamic)
    return Traced(
        closed, program, len(leaves), tuple(names), dynamic, rebuild_output, batch_axes
    )


def _check_params(names: Sequence[str], leaves: Sequence[Any]) -> None:
    for name, leaf in zip(names, leaves, strict=True):
        if not _is_array(leaf) and not isinstance(leaf, int | float | complex):
            raise TypeError(
                f"The parameter {name!r} is a {type(leaf).__name__}, not an array. Pass only "
                f"arrays as parameters: with Equinox, `params, static = eqx.partition(model, "
                f"eqx.is_inexact_array)` and `eqx.combine(params, static)` inside the loss."
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


def _batch_axes(
    flat: Callable, program: Program, leaves: Sequence[Any], dynamic: Sequence[Any]
) -> list[Shape] | None:
    """Which axes of each value grow with the batch, from a second trace at twice the batch.

    The batch is the first axis that a group of arguments has in common. Groups that cannot be
    doubled (a random key, running statistics) fail to trace; None if all of them do.
    """
    abstract = jax.eval_shape(lambda *xs: xs, *leaves, *dynamic)
    sizes: dict[int, int] = {}
    for leaf in abstract[len(leaves) :]:
        if leaf.shape and not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            sizes[leaf.shape[0]] = sizes.get(leaf.shape[0], 0) + math.prod(leaf.shape)
    for size in sorted(sizes, key=lambda size: -sizes[size]):
        doubled = [
            jax.ShapeDtypeStruct((2 * size, *leaf.shape[1:]), leaf.dtype)
            if i >= len(leaves) and leaf.shape[:1] == (size,)
            else leaf
            for i, leaf in enumerate(abstract)
        ]
        try:
            other = _jaxpr.flatten(jax.make_jaxpr(flat)(*doubled))
        except Exception:  # whatever the user's model raises for shapes that do not fit
            continue
        same = [e.path for e in other.equations] == [e.path for e in program.equations]
        if same and len(other.avals) == len(program.avals):
            pairs = ((program.shape(v), other.shape(v)) for v in range(len(program.avals)))
            return [tuple(i for i, (a, b) in enumerate(zip(*p)) if a != b) for p in pairs]
    return None


# --- standardise ---------------------------------------------------------------------------------


def _parameter(traced: Traced, leaf: int, chain: _chains.Chain) -> Parameter:
    shape = traced.program.shape(traced.program.inputs[leaf])
    return Parameter(traced.names[leaf], shape, chain)


def _names(traced: Traced, sites: Sequence[Site]) -> list[str]:
    """Each layer's name: its kernel's parent, or the kernel itself if the parent is no name."""
    paths = [traced.names[site.leaf] for site in sites]
    parents = [path.rpartition("/")[0] for path in paths]
    return [
        parent if parent and parents.count(parent) == 1 else path
        for path, parent in zip(paths, parents, strict=True)
    ]


def _layout(traced: Traced, site: Site) -> tuple[Layout, int]:
    """How to read a site's arrays, and its rows per example."""
    program = traced.program
    equation = program.equations[site.position]
    inputs, outputs = _detect.axes_of_rows(program, site, traced.batch_axes)
    data_shape = program.shape(equation.inputs[site.operand])
    raw_shape = program.shape(equation.outputs[0])
    to_raw = _chains.inverse(site.output_chain, raw_shape)  # from the layer's output
    output_shape = program.shape(site.output)
    to_rows = _chains.group(to_raw, raw_shape, outputs)
    layout = Layout(
        inputs=_chains.group((), data_shape, inputs),
        outputs=to_rows,
        outputs_back=_chains.inverse(to_rows, output_shape),
    )
    return layout, math.prod(data_shape[i] for i in inputs[1])


def _head_layout_free(traced: Traced, detection: Detection, site: Site) -> tuple[Any, list[int]]:
    """The head of an output layer, traced, and the values besides its outputs that it needs.

    What depends on parameters (regularizers, other layers) is not recomputed but held fixed.
    """
    program = traced.program
    after = _detect.downstream(program, (True,) * len(program.equations), site.output)
    reached = {site.output} | {v for i in after for v in program.equations[i].outputs}
    of_params = _of_params(program, traced.n_leaves)
    equations, _ = program.slice([site.output], program.outputs[0])
    fixed = {
        v for e in equations for v in e.inputs if v in of_params and v not in reached
    }
    equations, free = program.slice([site.output, *fixed], program.outputs[0])
    free = [v for v in free if v != site.output]

    def head(output: Any, *values: Any) -> Any:
        env = {site.output: output, **dict(zip(free, values, strict=True))}
        return program.call(equations, env, program.outputs[0])

    avals = [program.avals[v] for v in (site.output, *free)]
    structs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]
    return jax.make_jaxpr(head)(*structs), free


def _of_params(program: Program, n_leaves: int) -> set[int]:
    return set(range(len(program.avals))) - _detect.constants_of(program, program.inputs[:n_leaves])


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
      >>> params = {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}
      >>> def loss_fn(params, x):
      ...     layer = params["dense"]
      ...     return jnp.mean(jnp.tanh(x @ layer["kernel"] + layer["bias"]) ** 2)
      >>> layers = lp.find_layers(loss_fn, params, jnp.ones((4, 3)))
      >>> layers["dense"].transfer.name
      'tanh'
    """
    if on_uncaptured not in ("error", "pass"):
        raise ValueError(f"`on_uncaptured` is 'error' or 'pass', got {on_uncaptured!r}.")
    traced = trace(loss_fn, params, args, kwargs, has_aux)
    detection, program = traced.detection, traced.program
    names = _names(traced, detection.sites)
    overrides = dict(transfer or {})
    if unknown := set(overrides) - set(names):
        raise ValueError(
            f"`transfer` names {', '.join(sorted(unknown))}, but the layers found are "
            f"{', '.join(names) or 'none'}."
        )
    ends = _detect.output_sites(program, detection)
    layers = []
    for i, (site, name) in enumerate(zip(detection.sites, names, strict=True)):
        found = (
            _transfer.given(overrides[name])
            if name in overrides
            else _transfer_of(traced, detection, site)
        )
        bias = None if site.bias is None else _parameter(traced, site.bias, site.bias_chain)
        layers.append(
            Layer(
                name=name,
                kind="dense",
                d_in=site.d_in,
                d_out=site.d_out,
                kernel=_parameter(traced, site.leaf, site.kernel),
                bias=bias,
                rows=None if traced.batch_axes is None else _layout(traced, site)[1],
                transfer=found,
                is_output=i in ends,
            )
        )
    result = Layers(layers, _uncaptured(traced, detection))
    _check_found(result, on_uncaptured)
    return result


def _transfer_of(traced: Traced, detection: Detection, site: Site) -> _transfer.Transfer:
    program = traced.program
    equations, end, note = _detect.transfer_piece(program, detection.live, site.output)
    aval = program.avals[site.output]
    if not equations:
        return _transfer.Transfer("identity", _transfer.TABLE_2["identity"][0], note)

    def piece(a: Any) -> Any:
        return program.call(equations, {site.output: a}, end)

    closed = jax.make_jaxpr(piece)(jax.ShapeDtypeStruct(aval.shape, aval.dtype))
    function = _transfer.TracedPiece(closed, tuple(aval.shape), aval.dtype)
    return _transfer.recognise(function, aval.dtype, note)


def _uncaptured(traced: Traced, detection: Detection) -> list[_layers.Uncaptured]:
    return [
        _layers.Uncaptured(
            traced.names[leaf],
            traced.program.shape(traced.program.inputs[leaf]),
            reason,
            leaf not in detection.without_gradient,
        )
        for leaf, reason in sorted(detection.reasons.items())
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


def value_grad_and_capture(loss_fn: Callable[..., Any], has_aux: bool = False) -> Callable[..., Any]:
    """`jax.value_and_grad` that also returns what each layer saw.

    Args:
      loss_fn: `loss_fn(params, *args, **kwargs)` with a scalar loss, or a pair (loss, aux).
      has_aux: whether it returns a pair.

    Returns:
      A function of the same arguments that returns `(loss, gradients, captured)`, or
      `((loss, aux), gradients, captured)`. The gradients are those of `jax.value_and_grad` (bit
      for bit under `jax.jit`); `captured` is a `Captured`, the arrays of each layer by name:
      inputs (batch, shared, d_in), outputs and cotangents (batch, shared, d_out). It costs what
      `jax.value_and_grad` costs; what is not used of it is not kept.

    Raises:
      TypeError: the loss is not a scalar, or a parameter is not an array.

    Example:
      >>> import jax, jax.numpy as jnp, locoprop_jax as lp
      >>> def loss_fn(w, x):
      ...     return jnp.mean((x @ w["kernel"]) ** 2)
      >>> w, x = {"kernel": jnp.ones((3, 2))}, jnp.ones((4, 3))
      >>> loss, grads, captured = jax.jit(lp.value_grad_and_capture(loss_fn))(w, x)
      >>> captured["kernel"].cotangents.shape
      (4, 1, 2)
    """

    @functools.wraps(loss_fn)
    def wrapped(params: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any, Captured]:
        traced = trace(loss_fn, params, args, kwargs, has_aux)
        detection, program = traced.detection, traced.program
        names = _names(traced, detection.sites)
        records = {}
        for i in sorted(_detect.output_sites(program, detection)):
            records[i] = _head_layout_free(traced, detection, detection.sites[i])
        inputs = [_detect.input_address(program, site) for site in detection.sites]
        outputs = [_detect.output_address(program, site) for site in detection.sites]
        fixed = _addresses(traced, [v for _, free in records.values() for v in free])
        record = frozenset([*inputs, *outputs, *fixed.values()])

        def forward(params: Any, perturbations: dict) -> tuple[Any, Any]:
            flat = [*jax.tree.leaves(params), *traced.arguments]
            results, recorded = _jaxpr.evaluate(traced.closed, flat, record, perturbations)
            return results[0], (results[1:], recorded)

        zeros = {
            output.path: jnp.zeros_like(program.avals[site.output])
            for site, output in zip(detection.sites, outputs, strict=True)
        }
        (loss, (rest, recorded)), (grads, cotangents) = jax.value_and_grad(
            forward, argnums=(0, 1), has_aux=True
        )(params, zeros)
        known = dict(zip(program.inputs, [*jax.tree.leaves(params), *traced.arguments]))
        known |= {v: recorded[address] for v, address in fixed.items()}
        arrays = {}
        for i, (site, name) in enumerate(zip(detection.sites, names, strict=True)):
            layout, _ = _layout(traced, site)
            head = None
            if i in records:
                closed, free = records[i]
                terms = _detect.averaged_terms(program, detection, site)
                rows = math.prod(program.shape(program.equations[site.position].outputs[0]))
                head = Head(
                    tuple(known[v] for v in free),
                    _layers.StaticJaxpr(closed),
                    layout,
                    program.avals[site.output].dtype,
                    rows / site.d_out if math.isnan(terms) else terms,
                )
            bias = None if site.bias is None else _parameter(traced, site.bias, site.bias_chain)
            arrays[name] = LayerArrays(
                raw_inputs=recorded[inputs[i]],
                raw_outputs=recorded[outputs[i]],
                raw_cotangents=cotangents[outputs[i].path],
                head=head,
                signature=(
                    "dense",
                    site.d_in,
                    site.d_out,
                    _parameter(traced, site.leaf, site.kernel),
                    bias,
                ),
                layout=layout,
            )
        return traced.rebuild_output([loss, *rest]), grads, Captured(arrays)

    return wrapped


def _addresses(traced: Traced, values: Sequence[int]) -> dict[int, Address]:
    """Where the running program computes these values; those that are inputs are known already."""
    producers = traced.program.producers()
    found = {}
    for value in values:
        if value in producers:
            equation = traced.program.equations[producers[value]]
            found[value] = Address(equation.path, "out", equation.outputs.index(value))
    return found
