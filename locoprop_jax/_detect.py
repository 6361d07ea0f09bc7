"""Find the layers of a model in its trace.

Detection reads the flat `Program` of a loss. Each value gets a label that says what it is made of;
an equation that is linear in one parameter and meets data is a *site*: a place where a layer's
weights are applied. Then every use of every parameter is accounted for: a parameter with a use
that is not understood is excluded everywhere, with the reason, and detection runs again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from locoprop_jax import _chains, _flow, _jaxpr
from locoprop_jax._chains import Chain, Shape
from locoprop_jax._jaxpr import Address, Equation, Program

# --- labels --------------------------------------------------------------------------------------


class Weight(NamedTuple):
    """One parameter leaf, seen through rearrangements."""

    leaf: int
    chain: Chain


class Derived(NamedTuple):
    """Computed from parameters alone, in a way that is not a rearrangement."""

    leaves: frozenset[int]
    how: str


class Output(NamedTuple):
    """The raw output of a site, seen through rearrangements."""

    site: int
    chain: Chain


DATA = "data"  # depends on the batch
CONSTANT = "constant"
Label = Weight | Derived | Output | str


@dataclasses.dataclass
class Site:
    """A dense layer in the making: a `dot_general` of data and a kernel, later with its bias."""

    position: int  # of the dot_general
    leaf: int
    kernel: Chain  # leaf -> (d_in, d_out)
    d_in: int
    d_out: int
    operand: int  # which operand is the data
    row_axes: tuple[int, ...]  # of the raw output
    feature_axes: tuple[int, ...]
    output: int  # the value that is the layer's output
    output_chain: Chain = ()  # raw output -> `output`
    bias: int | None = None
    bias_chain: Chain = ()
    tapped: int = -1  # position of the equation that computes `output`


@dataclasses.dataclass(frozen=True)
class Detection:
    """The outcome: sites in program order, and why each other leaf is in none."""

    sites: tuple[Site, ...]
    reasons: dict[int, str]  # leaf -> reason
    without_gradient: frozenset[int]
    live: tuple[bool, ...]  # by equation
    terms: dict[int, float]  # see `_flow.loss_terms`


# --- detection -----------------------------------------------------------------------------------


def detect(program: Program, n_leaves: int, batch_axes: Sequence[Shape] | None) -> Detection:
    """Find the layers.

    Args:
      program: the loss, its parameter leaves the first inputs, the loss the first output.
      n_leaves: how many inputs are parameters.
      batch_axes: for each value, the axes that grow with the batch; None where it is not known.
    """
    loss = program.outputs[0]
    live = _flow.live_equations(program, loss)
    data = _data(program, n_leaves, batch_axes)
    of_params = _flow.reached_from(program, program.inputs[:n_leaves])
    constants = set(range(len(program.avals))) - of_params - _flow.reached_from(program, data)
    terms = _flow.loss_terms(program, loss, constants, of_params)
    reasons: dict[int, str] = {}
    while True:
        sites, found = _label(program, n_leaves, data, batch_axes, live, terms, frozenset(reasons))
        if not found:
            break
        reasons.update(found)
    read = {v for i, eq in enumerate(program.equations) if live[i] for v in eq.inputs}
    layered = {leaf for site in sites for leaf in (site.leaf, site.bias)}
    without = frozenset(i for i in range(n_leaves) if program.inputs[i] not in read)
    for leaf in range(n_leaves):
        if leaf in without:
            reasons[leaf] = "the loss does not depend on it (unused, or behind a stop_gradient)"
        elif leaf not in layered and leaf not in reasons:
            reasons[leaf] = "it never meets the data: only a regularizer uses it"
    return Detection(tuple(sites), reasons, without, live, terms)


def _data(program: Program, n_leaves: int, batch_axes: Sequence[Shape] | None) -> set[int]:
    """The values from outside that are data: what grows with the batch.

    Where that is not known, any array that is no parameter may be data.
    """
    others = [*program.inputs[n_leaves:], *program.constants]
    if batch_axes is None:
        return {v for v in others if program.shape(v)}
    return {v for v in others if batch_axes[v]}


def _label(
    program: Program,
    n_leaves: int,
    data: set[int],
    batch_axes: Sequence[Shape] | None,
    live: Sequence[bool],
    terms: Mapping[int, float],
    excluded: frozenset[int],
) -> tuple[list[Site], dict[int, str]]:
    """One pass of labels over the program, and the parameters it cannot account for."""
    labels: dict[int, Label] = {
        v: DATA if v in data else CONSTANT for v in (*program.inputs, *program.constants)
    }
    labels.update((v, Weight(i, ())) for i, v in enumerate(program.inputs[:n_leaves]))
    consumers = {v: [i for i in at if live[i]] for v, at in program.consumers.items()}
    sites: list[Site] = []
    reasons: dict[int, str] = {}

    def site_label(position: int, kinds: Sequence[Label]) -> Label | str:
        """The label of a layer's output, or in words why this equation gives none."""
        primitive = program.equations[position].primitive
        if primitive in _jaxpr.DOT_GENERAL:
            site = _dense_site(program, position, kinds, batch_axes)
            if isinstance(site, str):
                return site
            sites.append(site)
            return Output(len(sites) - 1, ())
        if primitive in _jaxpr.ADD:
            return _attach_bias(program, position, kinds, sites, consumers)
        return _unsupported(program.equations[position], kinds)

    for position, equation in enumerate(program.equations):
        kinds = [labels[v] for v in equation.inputs]
        special = [k for k in kinds if isinstance(k, Weight | Derived)]
        meets_data = any(k is DATA or isinstance(k, Output) for k in kinds)
        leaves = frozenset().union(*map(_leaves, special))
        label: Label = DATA if meets_data else CONSTANT
        if not (special and meets_data):
            how = [k.how for k in special if isinstance(k, Derived)] or [str(equation.primitive)]
            derived = Derived(leaves, how[0]) if special else label
            label = _rearranged(program, equation, kinds) or derived
        elif live[position] and not leaves & excluded:
            found = site_label(position, kinds)
            is_term = equation.primitive in _jaxpr.SUMS and equation.outputs[0] in terms
            if isinstance(found, Output):
                label = found
            elif not is_term:  # a sum inside the loss adds a regularizer
                reasons.update((leaf, str(found)) for leaf in leaves if leaf not in reasons)
        labels.update(dict.fromkeys(equation.outputs, label))

    uses: dict[int, list[str]] = {}
    for site in sites:
        uses.setdefault(site.leaf, []).append("kernel")
        if site.bias is not None:
            uses.setdefault(site.bias, []).append("bias")
    for leaf, roles in uses.items():
        if len(roles) > 1:
            reasons[leaf] = f"it is used {len(roles)} times ({', '.join(roles)})"
    return sites, reasons


def _leaves(label: Weight | Derived) -> frozenset[int]:
    return frozenset({label.leaf}) if isinstance(label, Weight) else label.leaves


def _rearranged(program: Program, equation: Equation, kinds: Sequence[Label]) -> Label | None:
    """The label of a rearranged parameter or layer output; None for any other equation."""
    seen = [k for k in kinds if isinstance(k, Weight | Output)]
    if len(seen) != 1 or len(kinds) != 1:
        return None
    chain = _flow.rearranged(program, equation, seen[0].chain)
    return None if chain is None else seen[0]._replace(chain=chain)


def _unsupported(equation: Equation, kinds: Sequence[Label]) -> str:
    if equation.primitive in _jaxpr.CUSTOM:
        return f"it is used inside a function with its own derivative (`{equation.primitive}`)"
    return _changed(equation, kinds) or (
        f"capture knows no layer that is a `{equation.primitive}` of data and a parameter"
    )


def _changed(equation: Equation, kinds: Sequence[Label]) -> str:
    """In words, if one of the operands is a parameter changed beyond rearrangement."""
    derived = [k for k in kinds if isinstance(k, Derived)]
    if not derived:
        return ""
    return f"`{derived[0].how}` changes it before it meets the data in `{equation.primitive}`"


def _dense_site(
    program: Program,
    position: int,
    kinds: Sequence[Label],
    batch_axes: Sequence[Shape] | None,
) -> Site | str:
    """Read a `dot_general` of data and a kernel; the reason where it is not a dense layer."""
    equation = program.equations[position]
    weights = [i for i, k in enumerate(kinds) if isinstance(k, Weight)]
    if changed := _changed(equation, kinds):
        return changed
    (kernel_at,) = weights
    label, data_at = kinds[kernel_at], 1 - kernel_at
    assert isinstance(label, Weight)
    contract, batch = equation.params["dimension_numbers"]
    if batch[kernel_at]:
        return "its kernel has batch dimensions (a stack of layers), which is not supported yet"
    if not _chains.is_invertible(label.chain):
        return "it is broadcast before it meets the data"
    data = equation.inputs[data_at]
    if batch_axes is not None and not batch_axes[data]:
        return "it meets data that does not grow with the batch"
    shape = program.shape(equation.inputs[kernel_at])
    contracted = tuple(contract[kernel_at])
    free = tuple(i for i in range(len(shape)) if i not in contracted)
    n_rows = len(program.shape(data)) - len(contracted)
    rows_first = data_at == 0
    rows = tuple(range(n_rows)) if rows_first else tuple(range(len(free), len(free) + n_rows))
    start = n_rows if rows_first else 0
    return Site(
        position=position,
        leaf=label.leaf,
        kernel=_chains.group(label.chain, shape, (contracted, free)),
        d_in=math.prod(shape[i] for i in contracted),
        d_out=math.prod(shape[i] for i in free),
        operand=data_at,
        row_axes=rows,
        feature_axes=tuple(range(start, start + len(free))),
        output=equation.outputs[0],
        tapped=position,
    )


def _attach_bias(
    program: Program,
    position: int,
    kinds: Sequence[Label],
    sites: Sequence[Site],
    consumers: dict[int, list[int]],
) -> Output | str:
    """Give a site the parameter that is added to its output; the reason where it is no bias."""
    equation = program.equations[position]
    outputs = [k for k in kinds if isinstance(k, Output)]
    weights = [k for k in kinds if isinstance(k, Weight)]
    if len(outputs) != 1 or len(weights) != 1:
        return _changed(equation, kinds) or "it is added to data that is not a layer's output"
    (output,), (weight,) = outputs, weights
    site = sites[output.site]
    if site.bias is not None:
        return "it is a second bias of the same layer"
    # The raw output must go nowhere else, or the layer would have two outputs.
    value = site.output
    target = next(v for v, k in zip(equation.inputs, kinds, strict=True) if k is output)
    while len(consumers[value]) == 1 and value != target:
        value = program.equations[consumers[value][0]].outputs[0]
    if consumers[value] != [position]:
        return "it is added to a layer's output that is used elsewhere without it"
    grown = program.shape(target) != program.shape(equation.outputs[0])
    if grown or not _chains.is_invertible(output.chain):
        return "it is added to a layer's output after that was broadcast"
    chain = _bias_chain(program, equation, site, output, weight)
    if chain is None:
        return "it varies along more than the outputs of the layer that it is added to"
    site.bias, site.bias_chain = weight.leaf, chain
    site.output, site.output_chain, site.tapped = (
        equation.outputs[0],
        output.chain,
        position,
    )
    return output


def _bias_chain(
    program: Program, equation: Equation, site: Site, output: Output, weight: Weight
) -> Chain | None:
    """Leaf -> (d_out,) if each row of the output gets each entry of the leaf once, in order.

    Found by following the entries' numbers through the same rearrangements.
    """
    leaf_shape = program.shape(program.inputs[weight.leaf])
    size = math.prod(leaf_shape)
    if size != site.d_out:
        return None
    numbers = _chains.apply(weight.chain, np.arange(size).reshape(leaf_shape))
    numbers = np.broadcast_to(numbers, program.shape(equation.outputs[0]))
    raw = program.equations[site.position].outputs[0]
    numbers = _chains.apply(_chains.inverse(output.chain, program.shape(raw)), numbers)
    numbers = numbers.transpose((*site.row_axes, *site.feature_axes))
    row = numbers[(0,) * len(site.row_axes)]
    if not np.array_equal(row.ravel(), np.arange(size)) or np.any(numbers != row):
        return None
    return _chains.extend((), leaf_shape, "reshape", (size,))


# --- from sites to what is recorded --------------------------------------------------------------


def input_address(program: Program, site: Site) -> Address:
    return Address(program.equations[site.position].path, "in", site.operand)


def output_address(program: Program, site: Site) -> Address:
    return Address(program.equations[site.tapped].path, "out", 0)


def output_sites(program: Program, detection: Detection) -> set[int]:
    """The sites whose outputs reach the loss without passing another site."""
    positions = {site.position for site in detection.sites}
    return {
        i
        for i, site in enumerate(detection.sites)
        if not _flow.downstream(program, detection.live, site.output) & positions
    }


def bypasses(program: Program, detection: Detection, site: int) -> bool:
    """Whether a site's outputs reach the loss past all sites, beside those that they feed."""
    positions = {site.position for site in detection.sites}
    own = detection.sites[site].output
    reached, feeds = {own}, False
    for i, equation in enumerate(program.equations):
        if detection.live[i] and reached.intersection(equation.inputs):
            feeds |= i in positions
            if i not in positions:
                reached.update(v for v in equation.outputs if program.is_inexact(v))
    return feeds and program.outputs[0] in reached


def axes_of_rows(
    program: Program, site: Site, batch_axes: Sequence[Shape] | None
) -> tuple[tuple[Shape, Shape, Shape], tuple[Shape, Shape, Shape]]:
    """The (batch, shared, feature) axes of a site's data operand and of its raw output.

    Where the batch is not known every row counts as batch.
    """
    equation = program.equations[site.position]
    contracted = tuple(equation.params["dimension_numbers"][0][site.operand])
    data = equation.inputs[site.operand]
    rows = [i for i in range(len(program.shape(data))) if i not in contracted]
    growing = rows if batch_axes is None else batch_axes[data]
    is_batch = [axis in growing for axis in rows]

    def split(axes: Sequence[int]) -> tuple[Shape, Shape]:
        pairs = list(zip(axes, is_batch, strict=True))
        return tuple(a for a, b in pairs if b), tuple(a for a, b in pairs if not b)

    return (*split(rows), contracted), (*split(site.row_axes), site.feature_axes)
