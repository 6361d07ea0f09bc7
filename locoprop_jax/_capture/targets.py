"""Where curvature cotangents are injected into a traced loss: at its targets.

With a loss of `locoprop_jax.losses` the target is what it takes, and each call of one is a target;
else the target is the output of the one output layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from locoprop_jax import losses
from locoprop_jax._tracing import primitives, separable
from locoprop_jax._tracing.chains import Chain, Shape
from locoprop_jax._tracing.flow import reached_live
from locoprop_jax._tracing.heads import other_params, output_sites, reached_past
from locoprop_jax._tracing.program import Equation, Program
from locoprop_jax._tracing.trace import Traced
from locoprop_jax._trees import is_complex

KINDS = ("fisher_mc", "fisher_empirical", "ggn_mc", "ggn_exact", "ggn_output")

REMEDY = (
    "Write the loss with `locoprop_jax.losses` (such as `losses.softmax_cross_entropy`), or mark "
    "your own loss of each example by `@losses.output_loss(sample=...)`, and only weight, sum and "
    "average its terms"
)


class Target(NamedTuple):
    """Where cotangents are injected.

    Attributes:
      value: the outputs of the network.
      examples: the axes of the outputs along which the Hessian is block-diagonal, in the order of
        the loss terms' axes if the loss is marked.
      outputs: the other axes: those of one block.
      alone: the axes along which exact columns differ: those of one block, and those whose entries
        meet in the network.
      joins_positions: whether an exact column has entries at several positions of one example.
      call: of the marked loss; None for the output of a layer.
      loss: the marked loss; None for the output of a layer.
      mass_axes: of the labels, the axes in the order of `examples` (None where it has no such
        axis) and then all others; None unless the loss needs the mass of its labels.
    """

    value: int
    examples: Shape
    outputs: Shape
    alone: Shape
    joins_positions: bool = False
    call: Equation | None = None
    loss: losses.OutputLoss | None = None
    mass_axes: tuple[tuple[int | None, ...], Shape] | None = None

    @property
    def terms(self) -> int:
        """The marked loss's terms."""
        assert self.call is not None
        return self.call.outputs[0]

    @property
    def operands(self) -> tuple[int, ...]:
        """What the marked loss takes; nothing for the output of a layer."""
        return () if self.call is None else self.call.inputs


def find_targets(
    traced: Traced, curvature: str, names: Sequence[str], to_rows: Sequence[Chain]
) -> tuple[Target, ...]:
    """Find the targets of a traced loss.

    Args:
      traced: the loss.
      curvature: which; one that needs targets, or the name of a method that takes products with
        the Hessian, for which examples may meet in the head.
      names: of the layers, for errors.
      to_rows: of the layers, what brings their outputs to (batch, shared, d_out).

    Raises:
      ValueError: the curvature of this loss cannot be told.
    """
    program, live = traced.program, traced.detection.live
    sites = traced.detection.sites
    of_params = reached_live(program, live, program.inputs[: traced.n_leaves])
    # Products need no layers where the loss says what the outputs are.
    outputs = [v for site in sites for v in site.outside]
    of_layers = reached_live(program, live, outputs) if sites else of_params
    marked: dict[int, tuple[Equation, losses.OutputLoss]] = {}
    for call in program.calls:
        loss = losses.find(str(call.params.get("name", "")))
        if loss is not None and program.is_inexact(call.outputs[0]):
            marked.setdefault(call.outputs[0], (call, loss))
    ends = [v for v in linear_ends(program, of_params, set(marked)) if v in of_layers]
    plain = [v for v in ends if v not in marked]
    found = [marked[v] for v in ends if v in marked]
    if not sites and (plain or curvature in KINDS):
        why = "`find_layers` says why"
        if traced.batch_axes is None:
            why += ", given the batch as an argument. Scales are layers only where it is known"
        raise ValueError(f"{_asker(curvature)} found no layer in this loss function: {why}.")
    if not plain:
        targets = [_marked_target(traced, *each, of_params) for each in found]
    elif curvature == "fisher_mc" or found:
        why = f"the loss reaches the layers' outputs through `{_producer(program, plain[0])}`"
        wish = "samples labels from the distribution that the model predicts"
        wish = wish if curvature == "fisher_mc" else "takes a loss whose terms are all marked"
        raise ValueError(
            f"{_asker(curvature)} {wish}, but {why} outside of a marked loss. {REMEDY}."
        )
    else:
        targets = [_layer_target(traced, curvature, plain, names)]
    if any(is_complex(program.avals[target.value].dtype) for target in targets):
        raise ValueError(
            f"{_asker(curvature)} needs real outputs of the network, but the loss takes complex "
            f"ones. Hand a loss of `locoprop_jax.losses`, or one marked by `@losses.output_loss`, "
            f"their real and imaginary parts: `jnp.concatenate([z.real, z.imag], -1)`."
        )
    if curvature == "ggn_exact":
        targets = [_with_columns(traced, target, names, to_rows) for target in targets]
    return tuple(targets)


def _asker(curvature: str) -> str:
    return f"`curvature={curvature!r}`" if curvature in KINDS else f"`{curvature}`"


def _producer(program: Program, value: int) -> str:
    position = program.producers.get(value)
    return "a parameter" if position is None else str(program.equations[position].primitive)


def linear_ends(program: Program, of_params: set[int], stop: set[int]) -> list[int]:
    """The values that the loss is a weighted sum of, the weights free of parameters.

    The loss is followed back through linear equations, up to marked losses and to what is computed
    in another way.
    """
    producers, ends = program.producers, dict[int, None]()
    seen, pending = set(), [program.outputs[0]]
    while pending:
        value = pending.pop()
        if value in seen or value not in of_params:
            continue
        seen.add(value)
        if value in stop or value not in producers:
            ends[value] = None
            continue
        equation = program.equations[producers[value]]
        moving = [v for v in equation.inputs if v in of_params]
        if equation.primitive in _LINEAR:
            pending.extend(moving)
        elif equation.primitive in primitives.MUL | primitives.DOT_GENERAL and len(moving) == 1:
            pending.extend(moving)
        elif equation.primitive in primitives.DIV and equation.inputs[1] not in of_params:
            pending.extend(moving)
        else:
            ends[value] = None
    return list(ends)


_LINEAR = (
    primitives.SUMS
    | primitives.TRANSPOSE
    | primitives.SELECT
    | primitives.SLICE
    | primitives.PAD
    | primitives.CONCATENATE
    | primitives.GATHER
    | primitives.SPLIT
)


def _marked_target(
    traced: Traced, call: Equation, loss: losses.OutputLoss, of_params: set[int]
) -> Target:
    """The target of one call of a marked loss."""
    program = traced.program
    value, terms = call.inputs[0], call.outputs[0]
    if of_params.intersection(call.inputs[1:]):
        raise ValueError(
            f"The labels of {loss!r} depend on the parameters, so its Hessian by the outputs is "
            f"not all of its curvature. Put `jax.lax.stop_gradient` around the labels."
        )
    producer = program.producers.get(terms)
    if producer is not None and program.equations[producer].outputs[0] != terms:
        raise ValueError(
            f"{loss!r} returns a later result of a `{_producer(program, terms)}`, whose weights "
            f"in the loss capture cannot read. Add zero to it."
        )
    followed, _ = separable.follow(program, terms, traced.detection.live)
    shape, of_terms = program.shape(value), program.shape(terms)
    axes = _axes_of(followed.get(value), shape, of_terms)
    if axes is None or None in axes[0] or loss.output_axes not in (None, len(axes[1])):
        raise ValueError(
            f"Capture cannot tell the examples of {loss!r} apart: its outputs have the shape "
            f"{shape}, its losses {of_terms}, and each of these has to depend on outputs of its "
            f"own. With `jax.vmap`, map over the outputs along their first axis."
        )
    examples, outputs = tuple(i for i in axes[0] if i is not None), axes[1]
    if _batch(traced, value) & set(outputs):
        raise ValueError(
            f"{loss!r} makes one loss of several examples. It has to return the loss of each, of "
            f"the leading shape of its outputs; take sums and means outside."
        )
    mass_axes = None
    if loss.mass is not None:
        labels = call.inputs[1]
        mass_axes = _axes_of(followed.get(labels), program.shape(labels), of_terms)
        if mass_axes is None:
            raise ValueError(f"Capture cannot tell the examples of the labels of {loss!r} apart.")
    return Target(value, examples, outputs, outputs, call=call, loss=loss, mass_axes=mass_axes)


def _axes_of(
    axes: separable.Axes | None, shape: Shape, terms: Shape
) -> tuple[tuple[int | None, ...], Shape] | None:
    """The axes of a marked loss's operand that belong to its terms' axes, and all others.

    None stands for an axis of the terms that the operand does not have. Where the loss contains
    what is not understood, its contract decides (the examples come first), unless `jax.vmap` may
    have moved the axes.
    """
    if axes is None:
        return None
    if separable.is_unknown(axes):
        n = len(terms)
        moved = set(shape[n:]) & {size for size in shape[:n] if size > 1}
        if shape[:n] != terms or moved:
            return None
        return tuple(range(n)), tuple(range(n, len(shape)))
    found: list[int | None] = []
    single = [i for i, axis in enumerate(axes) if not axis]  # of length one
    for place, size in enumerate(terms):
        if size == 1:
            found.append(single.pop(0) if single else None)
            continue
        at = [i for i, axis in enumerate(axes) if [f.label for f in axis] == [place]]
        found.append(at[0] if len(at) == 1 and shape[at[0]] == size else None)
    return tuple(found), tuple(i for i in range(len(shape)) if i not in found)


def _layer_target(
    traced: Traced, curvature: str, ends: Sequence[int], names: Sequence[str]
) -> Target:
    """The output of the one output layer, whose head is not marked."""
    program, detection = traced.program, traced.detection
    heads = output_sites(traced)
    needs = f"{_asker(curvature)} needs the Hessian of the loss by the network's outputs, but"
    if len(heads) != 1:
        listed = ", ".join(names[i] for i in heads)
        raise ValueError(f"{needs} several layers are outputs: {listed}. {REMEDY}.")
    (head,) = heads
    site = detection.sites[head]
    past = reached_past(traced, site.output)
    if program.outputs[0] in past:
        raise ValueError(
            f"{needs} the loss also depends on a layer in a way that does not pass through "
            f"{names[head]}, its last. {REMEDY}."
        )
    if traced.batch_axes is None and any(other_params(traced, site.output, v) for v in ends):
        raise ValueError(
            f"{needs} parameters are used between {names[head]}, the last layer found, and the "
            f"loss, which closes over its batch. {REMEDY}. Or, where they scale the outputs, pass "
            f"the batch as an argument of the loss: then they are a layer."
        )
    followed = [separable.follow(program, end, detection.live)[0] for end in ends]
    found = [env[site.output] for env in followed if site.output in env]
    examples = tuple(
        i
        for i in range(len(program.shape(site.output)))
        if all(is_separate(axes[i]) for axes in found)
    )
    outputs = tuple(i for i in range(len(program.shape(site.output))) if i not in examples)
    mixed = _batch(traced, site.output) & set(outputs)
    if mixed and curvature in KINDS:
        raise ValueError(
            f"{needs} capture cannot tell that the examples do not meet between the layer "
            f"{names[head]} and the loss, so the Hessian may not be one block per example. "
            f"{REMEDY}."
        )
    return Target(site.output, examples, outputs, outputs)


def is_separate(axis: separable.Axis) -> bool:
    return all(factor.axis is not None for factor in axis)


def _batch(traced: Traced, value: int) -> set[int]:
    """The batch axes of a value that are longer than one."""
    if traced.batch_axes is None:
        return set()
    return {i for i in traced.batch_axes[value] if traced.program.shape(value)[i] > 1}


def _with_columns(
    traced: Traced, target: Target, names: Sequence[str], to_rows: Sequence[Chain]
) -> Target:
    """Along which axes of a target exact columns have to stand alone.

    One pull serves all the examples at once where no row of a layer reaches two of them.
    """
    program, sites = traced.program, traced.detection.sites
    followed, lost = separable.follow(program, target.value, traced.detection.live)
    meeting: dict[int, str] = {}
    of_positions: set[int | None] = set()
    growing = _batch(traced, target.value)
    for i, (site, name, chain) in enumerate(zip(sites, names, to_rows, strict=True)):
        if site.loops:  # which are not looked into: positions may meet there
            meeting.update((axis, name) for axis in target.examples if axis not in growing)
        if site.output in followed:
            *_, batch, shared, _ = separable.rearranged(chain, followed[site.output])
            # What a transposed use makes of a column is a sum over positions.
            is_turned = i in traced.detection.transposed
            labels = separable.labels((batch,) if is_turned else (batch, shared))
            of_positions.update(factor.axis for factor in shared)
            for axis in target.examples:
                if program.shape(target.value)[axis] > 1 and axis not in labels:
                    meeting.setdefault(axis, name)
    mixed = sorted(growing & set(meeting))
    if mixed:
        axis = mixed[0]
        outputs = [v for site in sites for v in site.outside]
        of_layers = reached_live(program, traced.detection.live, outputs)
        through = [primitive for value, primitive in lost.get(axis, []) if value in of_layers]
        by = f" (at a `{through[0]}`)" if through else ""
        raise ValueError(
            f"`curvature='ggn_exact'` needs examples that do not meet in the network, but the "
            f"outputs of {meeting[axis]} reach the losses of other examples{by}: batch "
            f"normalisation in training mode does this, and so do positions that meet, if they "
            f"are joined with the examples before the loss. Use `curvature='ggn_mc'`, which stays "
            f"unbiased, or keep them on an axis of their own."
        )
    alone = tuple(sorted({*target.outputs, *meeting}))
    joins = not of_positions.isdisjoint(set(target.examples).difference(alone))
    return target._replace(alone=alone, joins_positions=joins)
