"""The targets of a loss that is not marked.

Each end of the loss (`_tracing.ends`) has a target: the logits or residuals of a known loss, where
one is recognised, else the outputs of the layers that it is made of. Ends of the same outputs have
one target, whose Hessian is taken by derivatives. Between targets there is no second derivative
but by ends of their own, so the Hessian of the loss is the sum over targets.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from locoprop_jax import losses
from locoprop_jax._capture.recognise import Reader, Recognised
from locoprop_jax._capture.target import KINDS, REMEDY, Target, Weight, asker, batch_of
from locoprop_jax._tracing import chains, primitives, separable
from locoprop_jax._tracing import ends as loss_ends
from locoprop_jax._tracing.chains import Chain, Shape
from locoprop_jax._tracing.flow import reached_live, rearranged
from locoprop_jax._tracing.heads import other_params
from locoprop_jax._tracing.trace import Traced


def known(traced: Traced, ends: Sequence[int], reader: Reader) -> dict[int, Recognised]:
    """The ends that are known losses, of which no other end is made."""
    found = {}
    for end in ends:
        recognised = None if end in reader.outputs else reader.recognise(end)
        if recognised is None or is_read(traced, end, ends):
            continue
        mixed = batch_of(traced, recognised.value) & set(recognised.outputs)
        if not mixed:
            found[end] = recognised
    return found


def is_read(traced: Traced, end: int, ends: Collection[int]) -> bool:
    """Whether another end is made of this one, so that its derivative is no weight."""
    after = reached_live(traced.program, traced.detection.live, [end]) - {end}
    return not after.isdisjoint(ends)


def known_targets(traced: Traced, found: Mapping[int, Recognised]) -> list[Target]:
    """The targets of known losses, one for each known loss of the same outputs."""
    groups: dict[tuple[int, Shape, losses.OutputLoss], list[Weight]] = {}
    for end, each in found.items():
        key = each.value, each.outputs, each.loss
        groups.setdefault(key, []).append(Weight(end, each.sign, each.axes))
    targets = []
    for (value, outputs, loss), weights in groups.items():
        shape = traced.program.shape(value)
        order = (*chains.others(shape, outputs), *outputs)
        value, outputs, chain = _as_put_out(traced, value, outputs)
        to_terms = chains.extend(chain, shape, "transpose", order)
        examples = chains.others(traced.program.shape(value), outputs)
        target = Target(value, examples, outputs, outputs, loss=loss, to_terms=to_terms)
        targets.append(target._replace(weights=tuple(weights)))
    return targets


def _as_put_out(traced: Traced, value: int, outputs: Shape) -> tuple[int, Shape, Chain]:
    """A value before it was rearranged, where that keeps examples and outputs apart.

    There its axes still say what belongs to one example: exact columns need to know.

    Args:
      traced: the loss.
      value: what a known loss takes.
      outputs: its axes that are the outputs of one term.

    Returns:
      The value before, its axes that are outputs, and what was done to it.
    """
    program, end = traced.program, value
    layers = {v for site in traced.detection.sites for v in site.outside}
    equations = []
    while value not in layers and value in program.producers:
        equation = program.equations[program.producers[value]]
        if equation.primitive not in primitives.TRANSPOSE | primitives.RESHAPE:
            break
        equations.append(equation)
        value = equation.inputs[0]
    chain: Chain = ()
    for equation in reversed(equations):
        chain = rearranged(program, equation, chain) or ()  # never None for these
    axes = separable.rearranged(chain, separable.own_axes(program.shape(value)))
    of_outputs = {factor.axis for i in outputs for factor in axes[i]}
    of_terms = {f.axis for i, axis in enumerate(axes) if i not in outputs for f in axis}
    if None in of_outputs | of_terms or of_outputs & of_terms:
        return end, outputs, ()
    return value, tuple(sorted(axis for axis in of_outputs if axis is not None)), chain


def head_targets(
    traced: Traced,
    curvature: str,
    ends: Sequence[int],
    others: Sequence[int],
    moving: Collection[int],
    names: Sequence[str],
) -> list[Target]:
    """The targets of all other ends, one for each value where the network becomes the loss.

    Args:
      traced: the loss.
      curvature: which, or the name of a method that takes products with the Hessian, for which
        examples may meet.
      ends: of the loss, those that no known loss was recognised in.
      others: all other ends.
      moving: the values that depend on layers' outputs.
      names: of the layers, for errors.

    Raises:
      ValueError: outputs or examples meet.
    """
    program, sites = traced.program, traced.detection.sites
    layer_of = {v: name for site, name in zip(sites, names, strict=True) for v in site.outside}
    groups: dict[int, list[int]] = {}
    outputs_of: dict[int, str] = {}
    needs = f"{asker(curvature)} needs the Hessian of the loss by the network's outputs, but"
    for end in ends:
        value, outputs = loss_ends.network_output(program, end, moving, layer_of)
        listed = ", ".join(dict.fromkeys(layer_of[v] for v in sorted(outputs) if v in layer_of))
        if value is None:
            primitive = program.equations[program.producers[end]].primitive
            raise ValueError(
                f"{needs} outputs of several layers meet in a term of the loss, at a "
                f"`{primitive}`, so it may have second derivatives between them: {listed}. "
                f"{REMEDY}. It takes these outputs concatenated."
            )
        groups.setdefault(value, []).append(end)
        outputs_of[value] = listed
    targets = []
    for value, own in groups.items():
        rest = [*others, *(end for end in ends if end not in own)]
        targets.append(_head_target(traced, curvature, value, own, rest, outputs_of[value], needs))
    return targets


def _head_target(
    traced: Traced,
    curvature: str,
    value: int,
    own: Sequence[int],
    rest: Sequence[int],
    name: str,
    needs: str,
) -> Target:
    program = traced.program
    if traced.batch_axes is None and any(other_params(traced, [value], end) for end in own):
        raise ValueError(
            f"{needs} parameters are used between {name}, the last layer found, and the loss, "
            f"which closes over its batch. {REMEDY}. Or, where they scale the outputs, pass the "
            f"batch as an argument of the loss: then they are a layer."
        )
    live = traced.detection.live
    found = [loss_ends.axes_between(program, live, value, end) for end in own]
    axes = range(len(program.shape(value)))
    examples = tuple(i for i in axes if all(separable.is_separate(each[i]) for each in found))
    outputs = tuple(i for i in axes if i not in examples)
    if batch_of(traced, value) & set(outputs) and curvature in KINDS:
        raise ValueError(
            f"{needs} capture cannot tell that the examples do not meet between the layer {name} "
            f"and the loss, so the Hessian may not be one block per example. {REMEDY}."
        )
    head = loss_ends.head(traced, value, own, rest)
    return Target(value, examples, outputs, outputs, head=head)
