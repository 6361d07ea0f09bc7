"""One pass over a program: what each value is made of, and the sites met on the way."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence, Set

from locoprop_jax._tracing import chains, flow, primitives
from locoprop_jax._tracing.biases import attach_bias
from locoprop_jax._tracing.formulas import Formula, formula
from locoprop_jax._tracing.jaxpr import is_elementwise, scan_of
from locoprop_jax._tracing.kinds.convolution import convolution
from locoprop_jax._tracing.kinds.dense import dense
from locoprop_jax._tracing.kinds.embedding import embedding
from locoprop_jax._tracing.kinds.entries import bias, scale, scaled
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
from locoprop_jax._tracing.operands import AsItIs, Patches, Times
from locoprop_jax._tracing.program import END, Equation, Program
from locoprop_jax._tracing.reasons import (
    ADDED_TO_NO_OUTPUT,
    LOOP_START,
    Reason,
    no_layer,
    own_derivative,
)
from locoprop_jax._tracing.sites import Site


@dataclasses.dataclass(frozen=True)
class Known:
    """What the passes over the program and over the bodies of its loops share.

    Attributes:
      of_data: the values that data reach.
      of_arguments: those that arguments of the loss reach, and not only what it closes over.
      of_params: the values that parameters reach.
      terms: see `flow.loss_terms`.
      n_leaves: how many parameters there are.
      excluded: the parameters that were not understood in an earlier pass.
      unattached: biases that are layers of their own wherever they are added.
      at_once: the parameters that data from outside meet in a layer even in one row.
      with_constants: the kernels that constants are rows of, because data are: `kernel_key`s.
      sites: those found so far.
      reasons: those found so far.
      one_row: the parameters that data from outside met in one row, in no layer.
      networks: those of them that another layer came after.
      met_constants: the kernels whose product with a constant was formed.
      formulas: by key, what is made of parameters, with its number as a virtual leaf.
    """

    of_data: Set[int]
    of_arguments: Set[int]
    of_params: Set[int]
    terms: Mapping[int, float]
    n_leaves: int
    excluded: frozenset[int]
    unattached: frozenset[int]
    at_once: frozenset[int]
    with_constants: frozenset[tuple[frozenset[int], bool]]
    sites: list[Site] = dataclasses.field(default_factory=list)
    reasons: dict[int, Reason] = dataclasses.field(default_factory=dict)
    one_row: set[int] = dataclasses.field(default_factory=set)
    networks: set[int] = dataclasses.field(default_factory=set)
    met_constants: set[tuple[frozenset[int], bool]] = dataclasses.field(default_factory=set)
    formulas: dict[tuple, tuple[int, Formula]] = dataclasses.field(default_factory=dict)

    def number(self, formula: Formula) -> int:
        """Of a formula as a virtual leaf."""
        number = self.n_leaves + len(self.formulas)
        return self.formulas.setdefault(formula.key(), (number, formula))[0]


class Labelling:
    """One pass of labels over a program, and the parameters it cannot account for."""

    def __init__(
        self,
        known: Known,
        program: Program,
        labels: dict[int, Label],
        live: Sequence[bool],
        loops: tuple[Loop, ...] = (),
        returned: tuple[int, ...] = (),
    ):
        self.known, self.program, self.labels, self.live = known, program, labels, live
        self.loops, self.returned = loops, returned
        self.sites, self.reasons = known.sites, known.reasons
        self.consumers = flow.live_consumers(program, live)

    def run(self) -> None:
        for position, equation in enumerate(self.program.equations):
            label = self._label(position, equation)
            labels = label if isinstance(label, list) else [label] * len(equation.outputs)
            self.labels.update(zip(equation.outputs, labels, strict=True))

    def _label(self, position: int, equation: Equation) -> Label | list[Label]:
        """The label of an equation's results; a parameter used beyond it gets its reason."""
        kinds = [self.labels[v] for v in equation.inputs]
        if (unchanged := flow.unchanged(self.program, equation)) is not None:
            return kinds[unchanged]
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
        met_data = any(isinstance(k, Derived) and k.met_data for k in kinds)
        if meets_data and self._is_one_row(position, kinds):
            self.known.one_row.update(leaves if is_alive else ())
            meets_data, met_data = False, True
        is_term = equation.primitive in primitives.SUMS and equation.outputs[0] in self.known.terms
        is_regularizer = is_term and not self.program.shape(equation.outputs[0])
        if is_alive and not is_regularizer:
            reader = self._site if meets_data else self._before_data
            found = reader(position, kinds)
        if isinstance(found, Scaled | Output):
            return found
        if not meets_data:
            if is_alive and met_data:
                self._note_networks(equation, kinds)
            return _rearranged(self.program, equation, kinds) or (
                self._parts(position, kinds) or self._derived(equation, kinds, met_data)
            )
        if isinstance(found, Reason) and not is_term:
            # A sum inside the loss adds a regularizer.
            self.reasons.update((leaf, found) for leaf in leaves if leaf not in self.reasons)
        return plain

    def _is_one_row(self, position: int, kinds: Sequence[Label]) -> bool:
        """Whether data from outside meet a parameter in one row.

        This may be a batch of one example; or a mask, the weights of a regularizer, or statistics,
        and what it makes is a kernel or only regularized. It is no layer unless the parameter is in
        none otherwise, or another layer comes after it.
        """
        equation = self.program.equations[position]
        leaves = frozenset().union(*map(leaves_of, kinds))
        pairs = list(zip(equation.inputs, kinds, strict=True))
        data = [v for v, k in pairs if not leaves_of(k)]
        moved = any(v in self.known.of_params for v in data)
        if moved or not leaves.isdisjoint(self.known.at_once):
            return False
        if equation.primitive in primitives.GATHER:
            of_arguments = not self.known.of_arguments.isdisjoint(data)
            return not of_arguments and self._is_kernel(equation.outputs[0])
        if equation.primitive in primitives.DOT_GENERAL:
            contract, batch = equation.params["dimension_numbers"]
            at = equation.inputs.index(data[0])
            shape = self.program.shape(data[0])
            rows = chains.others(shape, (*contract[at], *batch[at]))
            return math.prod(shape[i] for i in rows) == 1
        entries = max(math.prod(self.program.shape(v)) for v, k in pairs if leaves_of(k))
        result = math.prod(self.program.shape(equation.outputs[0]))
        return is_elementwise(equation.eqn) and result == entries

    def _is_kernel(self, value: int) -> bool:
        """Whether a value, perhaps rearranged, goes into a product with data and nowhere else."""
        while len(uses := self.consumers.get(value, [])) == 1 and uses != [END]:
            after = self.program.equations[uses[0]]
            if after.primitive in primitives.CONVOLUTION:
                return after.inputs[1] == value
            if after.primitive in primitives.DOT_GENERAL:
                other = after.inputs[1 - after.inputs.index(value)]
                _, (batch, _) = after.params["dimension_numbers"]
                return other in self.known.of_data and not batch
            if flow.rearranged(self.program, after, ()) is None:
                return False
            value = after.outputs[0]
        return False

    def _note_networks(self, equation: Equation, kinds: Sequence[Label]) -> None:
        """What data met in one row and what meets another kernel next was a layer."""
        if equation.primitive not in primitives.DOT_GENERAL | primitives.CONVOLUTION:
            return
        for one, other in (kinds[:2], kinds[1::-1]):
            of_data = isinstance(one, Derived) and one.met_data
            if of_data and not leaves_of(other) <= leaves_of(one):
                self.known.networks.update(leaves_of(one))

    def _derived(self, equation: Equation, kinds: Sequence[Label], met_data: bool) -> list[Label]:
        leaves = frozenset().union(*map(leaves_of, kinds))
        hows = [k.how for k in kinds if isinstance(k, Derived)] or [str(equation.primitive)]
        return [Derived(leaves, hows[0], v, met_data=met_data) for v in equation.outputs]

    def _parts(self, position: int, kinds: Sequence[Label]) -> list[Label] | None:
        """The parts that an equation cuts out of a parameter, or of what is made of some."""
        return parts(self.program, position, [self._made(kinds[0]), *kinds[1:]])

    def _made(self, label: Label, change: str = "", value: int | None = None) -> Label:
        """What is computed from parameters as an array like a parameter; else as it is.

        Args:
          label: of the value.
          change: what an equation does to it besides, a key of `formulas.CHANGES`.
          value: where the label is, if a change is asked for.
        """
        chain: chains.Chain = ()
        if isinstance(label, Derived) and label.value is not None:
            value, chain = label.value, label.chain
        elif isinstance(label, Scaled):
            value, chain = self._product(label), label.chain
        elif not (change and isinstance(label, Weight)):
            return label
        assert value is not None
        found = formula(self.program, value, self.labels, change)
        if found is None:
            return label
        leaf = self.known.number(found)
        return Weight(leaf, found.own, chain, found.loops, made=found.leaves)

    def _product(self, label: Scaled) -> int:
        """The value that is the product."""
        return self.program.equations[label.factors[-1].position].outputs[0]

    def _before_data(self, position: int, kinds: Sequence[Label]) -> Label | None:
        """A parameter times numbers; rows of a table that are added to data."""
        primitive = self.program.equations[position].primitive
        if primitive in primitives.MUL and any(not leaves_of(k) for k in kinds):
            product = scaled(self.program, position, kinds, self.sites)
            return None if isinstance(product, Reason) else product
        if primitive in primitives.DOT_GENERAL | primitives.CONVOLUTION and CONSTANT in kinds:
            kernel = kernel_key(next(k for k in kinds if leaves_of(k)))
            if kernel in self.known.with_constants:
                found = self._site(position, kinds)
                return None if isinstance(found, Reason) else found
            self.known.met_constants.add(kernel)
        if primitive in primitives.GATHER and self._is_added_to_data(position):
            if not changed(self.program, position, kinds):
                found = embedding(self.program, position, kinds)
                return None if isinstance(found, Reason) else self._append(found)
        return None

    def _is_added_to_data(self, position: int) -> bool:
        """Whether an equation's result, perhaps rearranged, is added to data."""
        value = self.program.equations[position].outputs[0]
        while len(uses := self.consumers.get(value, [])) == 1 and uses != [END]:
            after = self.program.equations[uses[0]]
            if after.primitive in primitives.ADD:
                return after.outputs[0] in self.known.of_data
            if flow.rearranged(self.program, after, ()) is None:
                return False
            value = after.outputs[0]
        return False

    def _site(self, position: int, kinds: Sequence[Label]) -> Label | Reason:
        """The label of a layer's output, or in words why this equation gives none."""
        program, equation = self.program, self.program.equations[position]
        primitive = equation.primitive
        found: Site | Reason | None = None
        kinds = self._as_parameters(equation, kinds)
        if primitive in primitives.GATHER:
            why = changed(program, position, kinds)
            found = why or embedding(program, position, kinds)
        elif primitive in primitives.DOT_GENERAL | primitives.CONVOLUTION:
            read = dense if primitive in primitives.DOT_GENERAL else convolution
            plain = [without_number(program, kind) for kind in kinds]
            why = changed(program, position, plain)
            found = why or read(program, position, plain)
            found = _times_number(found, kinds)
        if found is not None:
            return found if isinstance(found, Reason) else self._append(found)
        if primitive in primitives.MUL or self._is_divisor(equation, kinds):
            return self._scale(position, kinds)
        if primitive in primitives.ADD | primitives.SUB:
            attached: Output | Reason = ADDED_TO_NO_OUTPUT
            is_added = primitive in primitives.ADD or isinstance(kinds[1], Weight)
            if is_added and self.known.unattached.isdisjoint(
                frozenset().union(*map(leaves_of, kinds))
            ):
                attached = attach_bias(program, position, kinds, self.sites, self.consumers)
            if isinstance(attached, Output):
                return attached
            return self._bias(position, 0, kinds) or attached
        if primitive in primitives.CONCATENATE | primitives.SELECT:
            return self._entering(equation, kinds) or self._unsupported(position, kinds)
        return self._unsupported(position, kinds)

    def _as_parameters(self, equation: Equation, kinds: Sequence[Label]) -> list[Label]:
        """The labels of what data meet, what is made of parameters as arrays like them."""
        primitive, program = equation.primitive, self.program
        result: list[Label] = []
        for i, (value, label) in enumerate(zip(equation.inputs, kinds, strict=True)):
            change = ""
            if i == 1 and primitive in primitives.SUB | primitives.DIV:
                change = str(primitive)
            is_kernel = primitive in primitives.DOT_GENERAL | primitives.CONVOLUTION
            is_number = is_kernel and isinstance(without_number(program, label), Weight)
            stays = isinstance(label, Scaled) and primitive in primitives.MUL
            is_spread = isinstance(label, Weight) and not chains.is_invertible(label.chain)
            if is_spread and (is_kernel or primitive in primitives.GATHER):
                result.append(self._made(Derived(leaves_of(label), "broadcast_in_dim", value)))
            else:
                result.append(label if is_number or stays else self._made(label, change, value))
        return result

    def _is_divisor(self, equation: Equation, kinds: Sequence[Label]) -> bool:
        """Whether data are divided by what has become its reciprocal."""
        is_div = equation.primitive in primitives.DIV
        return is_div and isinstance(kinds[1], Weight) and not leaves_of(kinds[0])

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
        scan = scan_of(equation.eqn)
        loop = Loop(equation.path, equation.params["length"], position)
        end = scan.consts + scan.carry
        labels: list[Label] = []
        for i, (value, label) in enumerate(zip(equation.inputs, kinds, strict=True)):
            shape = self.program.shape(value)
            label = self._made(label)
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
        Labelling(self.known, body, inner, live, (*self.loops, loop), returned).run()
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

    def _scale(self, position: int, kinds: Sequence[Label]) -> Label | Reason:
        product = scaled(self.program, position, kinds, self.sites)
        if isinstance(product, Reason):
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
        if len(weights) != 1 or len(specials) != 1:
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
        if position is None or len(self.consumers.get(value, [])) != 1:
            return None
        result = self.program.equations[position].outputs.index(value)
        return self._bias(position, result, kinds)

    def _unsupported(self, position: int, kinds: Sequence[Label]) -> Reason:
        equation = self.program.equations[position]
        if equation.primitive in primitives.CUSTOM:
            return own_derivative(str(equation.primitive))
        why = changed(self.program, position, kinds)
        return why or no_layer(str(equation.primitive))


def kernel_key(label: Label) -> tuple[frozenset[int], bool]:
    """Which parameters a kernel is, or whether it is made of them."""
    return leaves_of(label), not isinstance(label, Weight) or bool(label.made)


def _rearranged(program: Program, equation: Equation, kinds: Sequence[Label]) -> Label | None:
    """The label of a rearranged parameter or layer output; None for any other equation."""
    if len(kinds) != 1 or not isinstance(kinds[0], Weight | Scaled | Output):
        return None
    chain = flow.rearranged(program, equation, kinds[0].chain)
    return None if chain is None else kinds[0]._replace(chain=chain)


def _times_number(site: Site | Reason, kinds: Sequence[Label]) -> Site | Reason:
    """The site with its inputs multiplied by the number that its kernel was, if there is one."""
    if isinstance(site, Reason):
        return site
    factors = [operand for k in kinds if isinstance(k, Scaled) for operand in k.factors]
    if factors:
        assert isinstance(site.reader, AsItIs | Patches)
        site.operands, site.reader = (*site.operands, *factors), Times(site.reader)
    return site
