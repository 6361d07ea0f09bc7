"""Find the layers of a model in its trace.

Detection reads the flat `Program` of a loss. Each value gets a label that says what it is made of;
an equation that is linear in one parameter and meets data is a *site*: a place where a layer's
weights are applied. Then every use of every parameter is accounted for: a parameter with a use
that is not understood is excluded everywhere, with the reason, and detection runs again. Sites
that apply the same weights in the same way are one layer.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from locoprop_jax._tracing import chains, flow, jaxpr, primitives
from locoprop_jax._tracing.chains import Part, Shape
from locoprop_jax._tracing.labels import (
    CONSTANT,
    DATA,
    Derived,
    Label,
    Loop,
    Output,
    Scaled,
    Weight,
    changed,
    is_data,
    leaves_of,
    parts,
    without_number,
)
from locoprop_jax._tracing.program import END, Equation, Program
from locoprop_jax._tracing.reasons import (
    ADDED_AFTER_BROADCAST,
    ADDED_TO_NO_OUTPUT,
    ADDED_TO_ROWS,
    BATCH_NOT_KNOWN,
    LOOP_START,
    NEVER_MEETS_DATA,
    NO_GRADIENT,
    NOT_THE_OUTPUTS,
    SECOND_BIAS,
    SHARED_BY_THE_BATCH,
    USED_WITHOUT_IT,
    Reason,
    no_layer,
    own_derivative,
    used_differently,
)
from locoprop_jax._tracing.sites import (
    BatchAxes,
    Site,
    bias,
    bias_chain,
    convolution,
    dense,
    embedding,
    is_transposed,
    scale,
    scaled,
    times_number,
)


@dataclasses.dataclass(frozen=True)
class Detection:
    """The outcome.

    Attributes:
      sites: in program order.
      groups: the sites of each layer, in the order of the first, transposed ones last.
      transposed: the sites that apply their layer's weights transposed.
      reasons: why each other parameter is in no layer.
      without_gradient: the parameters that the loss does not depend on.
      live: by equation, whether a gradient flows through it.
      terms: see `flow.loss_terms`.
    """

    sites: tuple[Site, ...]
    groups: tuple[tuple[int, ...], ...]
    transposed: frozenset[int]
    reasons: dict[int, Reason]
    without_gradient: frozenset[int]
    live: tuple[bool, ...]
    terms: dict[int, float]


def detect(program: Program, n_leaves: int, batch_axes: Sequence[Shape] | None) -> Detection:
    """Find the layers.

    Args:
      program: the loss, its parameter leaves the first inputs, the loss the first output.
      n_leaves: how many inputs are parameters.
      batch_axes: for each value, the axes that grow with the batch; None where it is not known.
    """
    loss = program.outputs[0]
    live = flow.live_equations(program, loss)
    data = _data(program, n_leaves, batch_axes)
    of_params = flow.reached_from(program, program.inputs[:n_leaves])
    constants = set(range(len(program.avals))) - of_params - flow.reached_from(program, data)
    terms = flow.loss_terms(program, loss, constants, of_params)
    reasons: dict[int, Reason] = {}
    unattached: set[int] = set()
    while True:
        known = _Known(batch_axes, terms, frozenset(reasons), frozenset(unattached), [], {}, {})
        labels: dict[int, Label] = {
            v: DATA if v in data else CONSTANT for v in (*program.inputs, *program.constants)
        }
        for i, v in enumerate(program.inputs[:n_leaves]):
            labels[v] = Weight(i, program.shape(v), ())
        _Labels(known, program, labels, live).run()
        groups, transposed = _groups(known.sites)
        found = known.reasons | _misused(known.sites, groups)
        reasons.update(found)
        # No bias belongs to weights that are used both ways.
        tied = [i for group in groups if not transposed.isdisjoint(group) for i in group]
        own = {leaf for i in tied if (leaf := known.sites[i].bias) is not None}
        unattached.update(own)
        if not found and not own:
            break
    sites = known.sites
    read = {v for i, eq in enumerate(program.equations) if live[i] for v in eq.inputs}
    layered = {leaf for site in sites for leaf in (site.leaf, site.bias)}
    without = frozenset(i for i in range(n_leaves) if program.inputs[i] not in read)
    for leaf in range(n_leaves):
        if leaf in without:
            reasons[leaf] = NO_GRADIENT
        elif leaf not in layered and leaf not in reasons:
            reasons[leaf] = known.pending.get(leaf, NEVER_MEETS_DATA)
    return Detection(tuple(sites), groups, transposed, reasons, without, live, terms)


def _data(program: Program, n_leaves: int, batch_axes: Sequence[Shape] | None) -> set[int]:
    """The values from outside that are data: what grows with the batch.

    Where that is not known, any array that is no parameter may be data.
    """
    others = [*program.inputs[n_leaves:], *program.constants]
    if batch_axes is None:
        return {v for v in others if program.shape(v)}
    return {v for v in others if batch_axes[v]}


class _Known(NamedTuple):
    """What the passes over the program and over the bodies of its loops share.

    Attributes:
      batch_axes: for each value, the axes that grow with the batch.
      terms: see `flow.loss_terms`.
      excluded: the parameters that were not understood in an earlier pass.
      unattached: biases that are layers of their own wherever they are added.
      sites: those found so far.
      reasons: those found so far.
      pending: why a parameter is in no layer if its product with data meets no more of it.
    """

    batch_axes: BatchAxes
    terms: Mapping[int, float]
    excluded: frozenset[int]
    unattached: frozenset[int]
    sites: list[Site]
    reasons: dict[int, Reason]
    pending: dict[int, Reason]


class _Labels:
    """One pass of labels over a program, and the parameters it cannot account for."""

    def __init__(
        self,
        known: _Known,
        program: Program,
        labels: dict[int, Label],
        live: Sequence[bool],
        loops: tuple[Loop, ...] = (),
        returned: tuple[int, ...] = (),
    ):
        self.known, self.program, self.labels, self.live = known, program, labels, live
        self.loops, self.returned = loops, returned
        self.sites, self.reasons, self.batch_axes = known.sites, known.reasons, known.batch_axes
        self.consumers = flow.live_consumers(program, live)

    def run(self) -> None:
        for position, equation in enumerate(self.program.equations):
            label = self._label(position, equation)
            labels = label if isinstance(label, list) else [label] * len(equation.outputs)
            self.labels.update(zip(equation.outputs, labels, strict=True))

    def _label(self, position: int, equation: Equation) -> Label | list[Label]:
        """The label of an equation's results; a parameter used beyond it gets its reason."""
        kinds = [self.labels[v] for v in equation.inputs]
        leaves = frozenset().union(*map(leaves_of, kinds))
        meets_data = any(map(is_data, kinds))
        plain = DATA if meets_data else CONSTANT
        is_alive = self.live[position] and not leaves & self.known.excluded
        if leaves and is_alive and position in self.program.bodies:
            return self._loop(position, kinds)
        if not leaves:
            moved = _rearranged(self.program, equation, kinds)
            return moved or (self._factor(position, kinds) if is_alive else None) or plain
        found: Label | Reason | None = None
        if is_alive:
            reader = self._site if meets_data else self._before_data
            found = reader(position, kinds)
        if isinstance(found, Scaled | Output):
            return found
        if not meets_data:
            hows = [k.how for k in kinds if isinstance(k, Derived)] or [str(equation.primitive)]
            moved = _rearranged(self.program, equation, kinds)
            return moved or parts(self.program, position, kinds) or Derived(leaves, hows[0])
        is_term = equation.primitive in primitives.SUMS and equation.outputs[0] in self.known.terms
        if isinstance(found, Reason) and not is_term:
            # A sum inside the loss adds a regularizer.
            self.reasons.update((leaf, found) for leaf in leaves if leaf not in self.reasons)
        return plain

    def _before_data(self, position: int, kinds: Sequence[Label]) -> Label | None:
        """A parameter times a constant; rows of a table that are added to data."""
        primitive = self.program.equations[position].primitive
        if primitive in primitives.MUL and CONSTANT in kinds:
            product = scaled(self.program, position, kinds, self.sites)
            return None if isinstance(product, Reason) else product
        if primitive in primitives.GATHER and self._is_added_to_data(position):
            if not changed(self.program, position, kinds):
                found = embedding(self.program, position, kinds)
                return None if isinstance(found, Reason) else self._append(found)
        return None

    def _is_added_to_data(self, position: int) -> bool:
        """Whether an equation's result, perhaps rearranged, is added to what grows."""
        value = self.program.equations[position].outputs[0]
        while len(uses := self.consumers.get(value, [])) == 1 and uses != [END]:
            after = self.program.equations[uses[0]]
            if after.primitive in primitives.ADD:
                return self._grows(after.outputs[0])
            if flow.rearranged(self.program, after, ()) is None:
                return False
            value = after.outputs[0]
        return False

    def _site(self, position: int, kinds: Sequence[Label]) -> Label | Reason:
        """The label of a layer's output, or in words why this equation gives none."""
        program, equation = self.program, self.program.equations[position]
        primitive = equation.primitive
        found: Site | Reason | None = None
        if primitive in primitives.GATHER:
            why = changed(program, position, kinds)
            found = why or embedding(program, position, kinds)
        elif primitive in primitives.DOT_GENERAL | primitives.CONVOLUTION:
            read = dense if primitive in primitives.DOT_GENERAL else convolution
            plain = [without_number(program, kind) for kind in kinds]
            why = changed(program, position, plain)
            found = why or read(program, position, plain, self.batch_axes)
            found = times_number(found, kinds)
        if found is not None:
            return found if isinstance(found, Reason) else self._append(found)
        if primitive in primitives.MUL:
            return self._scale(position, kinds)
        if primitive in primitives.ADD:
            attached: Output | Reason = ADDED_TO_NO_OUTPUT
            if self.known.unattached.isdisjoint(frozenset().union(*map(leaves_of, kinds))):
                attached = _attach_bias(program, position, kinds, self.sites, self.consumers)
            if isinstance(attached, Output):
                return attached
            return self._bias(position, 0, kinds) or attached
        if primitive in primitives.CONCATENATE | primitives.SELECT:
            return self._entering(equation, kinds) or self._unsupported(position, kinds)
        return self._unsupported(position, kinds)

    def _append(self, site: Site) -> Output:
        self.sites.append(self._placed(site))
        return Output(len(self.sites) - 1, ())

    def _placed(self, site: Site) -> Site:
        """The site in the loops that are around this program."""
        site.loops, site.returned = self.loops, self.returned
        return site

    def _loop(self, position: int, kinds: Sequence[Label]) -> list[Label]:
        """The labels of what a `scan` returns, its body gone through as a program of its own."""
        equation, body = self.program.equations[position], self.program.bodies[position]
        scan = jaxpr.scan_of(equation.eqn)
        loop = Loop(equation.path, equation.params["length"], position)
        end = scan.consts + scan.carry
        labels: list[Label] = []
        for i, (value, label) in enumerate(zip(equation.inputs, kinds, strict=True)):
            shape = self.program.shape(value)
            if isinstance(label, Scaled):
                label = Derived(leaves_of(label), "mul")
            elif isinstance(label, Output):
                label = DATA
            if isinstance(label, Weight) and scan.consts <= i:
                passed = i < end and body.outputs[i - scan.consts] == body.inputs[i]
                if i >= end:
                    is_stack = chains.is_invertible(label.chain)
                    label = (
                        label.slices(shape, loop) if is_stack else Derived(leaves_of(label), "scan")
                    )
                elif not passed:
                    label = self._started(position, i, label)
            labels.append(label)
        # What is carried becomes data where the loop meets data at all.
        meets_data = any(map(is_data, labels))
        for i in range(scan.consts, end):
            if labels[i] is CONSTANT and meets_data:
                labels[i] = DATA
        inner = {v: self.labels[v] for v in body.constants}
        inner |= zip(body.inputs, labels, strict=True)
        live = flow.live_equations(body, *body.outputs)
        returned = self.returned or equation.outputs
        _Labels(self.known, body, inner, live, (*self.loops, loop), returned).run()
        leaves = frozenset().union(*map(leaves_of, labels))
        result: list[Label] = [DATA if meets_data else Derived(leaves, "scan")]
        result *= len(equation.outputs)
        for i in range(scan.carry):
            if isinstance(labels[scan.consts + i], Weight):
                result[i] = kinds[scan.consts + i]
        return result

    def _started(self, position: int, operand: int, label: Weight) -> Label:
        """A parameter that a loop starts from: a layer at its own value, one for each example."""
        value = self.program.equations[position].inputs[operand]
        found = self._at_value(value, [label])
        if isinstance(found, Output):
            return DATA
        why = found if isinstance(found, Reason) else LOOP_START
        self.reasons.setdefault(label.leaf, why)
        return DATA

    def _grows(self, value: int) -> bool:
        return self.batch_axes is not None and bool(self.batch_axes[value])

    def _scale(self, position: int, kinds: Sequence[Label]) -> Label | Reason:
        if self.batch_axes is None:
            return BATCH_NOT_KNOWN
        product = scaled(self.program, position, kinds, self.sites)
        if isinstance(product, Reason):
            return product
        if not self._grows(self.program.equations[position].outputs[0]):
            # Statistics of the batch, whose product is yet to meet the data.
            self.known.pending[product.weight.leaf] = SHARED_BY_THE_BATCH
            return product
        found = scale(self.program, position, product)
        return found if isinstance(found, Reason) else self._append(found)

    def _factor(self, position: int, kinds: Sequence[Label]) -> Label | None:
        """One more factor of data for a scale whose product goes nowhere else."""
        equation = self.program.equations[position]
        outputs = [k for k in kinds if isinstance(k, Output)]
        if equation.primitive not in primitives.MUL or len(outputs) != 1:
            return None
        (output,), site = outputs, self.sites[outputs[0].site]
        if site.kind != "scale" or site.added is not None or not self._only_use(site, position):
            return None
        product = scaled(self.program, position, kinds, self.sites)
        if isinstance(product, Reason):
            return None
        found = scale(self.program, position, product)
        if isinstance(found, Reason):
            return None
        self.sites[output.site] = self._placed(found)
        return Output(output.site, ())

    def _only_use(self, site: Site, position: int) -> bool:
        """Whether a site's output goes, perhaps rearranged, to this equation and nowhere else."""
        value = site.output
        while len(uses := self.consumers.get(value, [])) == 1 and uses != [END]:
            if uses[0] == position:
                return True
            value = self.program.equations[uses[0]].outputs[0]
        return False

    def _bias(self, position: int, result: int, kinds: Sequence[Label]) -> Label | Reason | None:
        """A parameter that is added to data as a layer of its own, None where it is no such."""
        weights = [k for k in kinds if isinstance(k, Weight)]
        specials = [k for k in kinds if leaves_of(k)]
        value = self.program.equations[position].outputs[result]
        if len(weights) != 1 or len(specials) != 1 or not self._grows(value):
            return None
        found = bias(self.program, position, result, weights[0])
        return found if isinstance(found, Reason) else self._append(found)

    def _entering(self, equation: Equation, kinds: Sequence[Label]) -> Label | Reason | None:
        """A parameter that is put beside data, once for each example: a layer at its own value."""
        entering = [v for v, k in zip(equation.inputs, kinds, strict=True) if leaves_of(k)]
        if len(entering) != 1:
            return None
        found = self._at_value(entering[0], [k for k in kinds if leaves_of(k)])
        return DATA if isinstance(found, Output) else found

    def _at_value(self, value: int, kinds: Sequence[Label]) -> Label | Reason | None:
        """A parameter that is data itself, spread over the examples before it is used once."""
        position = self.program.producers.get(value)
        if position is None or len(self.consumers.get(value, [])) != 1 or not self._grows(value):
            return None
        result = self.program.equations[position].outputs.index(value)
        return self._bias(position, result, kinds)

    def _unsupported(self, position: int, kinds: Sequence[Label]) -> Reason:
        equation = self.program.equations[position]
        if equation.primitive in primitives.CUSTOM:
            return own_derivative(str(equation.primitive))
        why = changed(self.program, position, kinds)
        return why or no_layer(str(equation.primitive))


def _groups(sites: Sequence[Site]) -> tuple[tuple[tuple[int, ...], ...], frozenset[int]]:
    """The sites of each layer, and which of them apply its weights transposed.

    Those with fewer inputs are the layer's own, and a lookup is none of them.
    """
    by_key: dict[tuple, list[int]] = {}
    for i, site in enumerate(sites):
        by_key.setdefault(site.key(), []).append(i)
    groups, transposed = list(by_key.values()), set()
    same: dict[int | None, list[list[int]]] = {}
    for group in groups:
        same.setdefault(sites[group[0]].leaf, []).append(group)
    for alike in same.values():
        alike.sort(key=lambda group: (sites[group[0]].kind == "embedding", sites[group[0]].d_in))
        for group, other in itertools.combinations(alike, 2):
            both = group in groups and other in groups
            if both and is_transposed(sites[group[0]], sites[other[0]]):
                transposed.update(other)
                groups.remove(other)
                group += other
    return tuple(map(tuple, groups)), frozenset(transposed)


def _misused(sites: Sequence[Site], groups: Sequence[Sequence[int]]) -> dict[int, Reason]:
    """The parameters whose uses do not agree."""
    uses: dict[int, set[tuple[Part | None, int, str]]] = {}
    roles: dict[int, list[str]] = {}
    for number, i in ((number, i) for number, group in enumerate(groups) for i in sorted(group)):
        site = sites[i]
        for weight, part in ((site.weight, "kernel"), (site.added, "bias")):
            if weight is not None:
                uses.setdefault(weight.leaf, set()).add((weight.part, number, part))
                roles.setdefault(weight.leaf, []).append(site.kind if part == "kernel" else part)
    reasons = {}
    for leaf, found in uses.items():
        pairs = itertools.combinations(found, 2)
        if any(a is None or b is None or a.overlaps(b) for (a, *_), (b, *_) in pairs):
            reasons[leaf] = used_differently(roles[leaf])
    return reasons


def _rearranged(program: Program, equation: Equation, kinds: Sequence[Label]) -> Label | None:
    """The label of a rearranged parameter or layer output; None for any other equation."""
    if len(kinds) != 1 or not isinstance(kinds[0], Weight | Scaled | Output):
        return None
    chain = flow.rearranged(program, equation, kinds[0].chain)
    return None if chain is None else kinds[0]._replace(chain=chain)


def _attach_bias(
    program: Program,
    position: int,
    kinds: Sequence[Label],
    sites: Sequence[Site],
    consumers: dict[int, list[int]],
) -> Output | Reason:
    """Give a site the parameter that is added to its output; the reason where it is no bias."""
    equation = program.equations[position]
    outputs = [k for k in kinds if isinstance(k, Output)]
    weights = [k for k in kinds if isinstance(k, Weight)]
    if len(outputs) != 1 or len(weights) != 1:
        why = changed(program, position, kinds)
        return why or ADDED_TO_NO_OUTPUT
    (output,), (weight,) = outputs, weights
    site = sites[output.site]
    if site.added is not None:
        return SECOND_BIAS
    if site.kind == "embedding":
        return ADDED_TO_ROWS
    # The raw output must go nowhere else, or the layer would have two outputs.
    value = site.output
    target = next(v for v, k in zip(equation.inputs, kinds, strict=True) if k is output)
    while len(consumers[value]) == 1 and value != target and consumers[value] != [END]:
        value = program.equations[consumers[value][0]].outputs[0]
    if consumers[value] != [position]:
        return USED_WITHOUT_IT
    grown = program.shape(target) != program.shape(equation.outputs[0])
    if grown or not chains.is_invertible(output.chain):
        return ADDED_AFTER_BROADCAST
    chain = bias_chain(program, position, site, output, weight)
    if chain is None:
        return NOT_THE_OUTPUTS
    site.added, site.bias_chain = weight, chain
    site.output, site.output_chain, site.tapped = (
        equation.outputs[0],
        output.chain,
        position,
    )
    return output


# --- what feeds what -----------------------------------------------------------------------------


def _positions(detection: Detection) -> set[int]:
    """Where sites are in the whole program: those in a loop at the loop."""
    return {site.loops[0].position if site.loops else site.position for site in detection.sites}


def output_sites(program: Program, detection: Detection) -> set[int]:
    """The sites whose outputs reach the loss without passing another site; none in a loop."""
    positions, feeding = _positions(detection), set[int]()  # the values that reach a site
    for i in reversed(range(len(program.equations))):
        equation = program.equations[i]
        if detection.live[i] and (i in positions or not feeding.isdisjoint(equation.outputs)):
            feeding.update(equation.inputs)
    return {
        i for i, site in enumerate(detection.sites) if not site.loops and site.output not in feeding
    }


def bypasses(program: Program, detection: Detection, site: int) -> bool:
    """Whether a site's outputs reach the loss past all sites, beside those that they feed."""
    positions = _positions(detection)
    reached, feeds = set(detection.sites[site].outside), False
    for i, equation in enumerate(program.equations):
        if detection.live[i] and reached.intersection(equation.inputs):
            feeds |= i in positions
            if i not in positions:
                reached.update(v for v in equation.outputs if program.is_inexact(v))
    return feeds and program.outputs[0] in reached
