"""One pass over a program: what each value is made of, and the sites met on the way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from locoprop_jax._tracing import chains, flow, primitives
from locoprop_jax._tracing.biases import attach_bias
from locoprop_jax._tracing.jaxpr import scan_of
from locoprop_jax._tracing.kinds.convolution import convolution
from locoprop_jax._tracing.kinds.dense import dense
from locoprop_jax._tracing.kinds.embedding import embedding
from locoprop_jax._tracing.kinds.entries import bias, scale, scaled
from locoprop_jax._tracing.known import Known, Scope, kernel_key
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
from locoprop_jax._tracing.one_row import is_one_row, note_networks
from locoprop_jax._tracing.operands import AsItIs, Patches, Times
from locoprop_jax._tracing.program import END, Equation, Program
from locoprop_jax._tracing.reasons import (
    LOOP_START,
    Reason,
    no_layer,
    own_derivative,
)
from locoprop_jax._tracing.sites import Site
from locoprop_jax._tracing.virtual import as_parameters, in_order, virtual


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
        self.scope = Scope(known, program, labels, self.consumers)

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
        refused = leaves & self.known.excluded.keys()
        if leaves - refused and self.live[position] and position in self.program.bodies:
            is_choice = equation.primitive in primitives.COND
            return (self._choice if is_choice else self._loop)(position, kinds)
        is_alive = self.live[position] and not refused
        if not leaves:
            moved = _rearranged(self.program, equation, kinds)
            return moved or (self._factor(position, kinds) if is_alive else None) or plain
        found: Label | Reason | None = None
        met_data = any(isinstance(k, Derived) and k.met_data for k in kinds)
        if meets_data and is_one_row(self.scope, position, kinds):
            self.known.one_row.update(leaves if is_alive else ())
            meets_data, met_data = False, True
        if is_alive and met_data:
            note_networks(self.scope, equation, kinds)
        is_term = equation.primitive in primitives.SUMS and equation.outputs[0] in self.known.terms
        if self.live[position] and refused and meets_data and not is_term:
            self._refuse(leaves, self.known.follows(refused))
        is_regularizer = is_term and not self.program.shape(equation.outputs[0])
        if is_alive and not is_regularizer:
            reader = self._site if meets_data else self._before_data
            found = reader(position, kinds)
        if isinstance(found, Scaled | Output):
            return found
        if not meets_data:
            return _rearranged(self.program, equation, kinds) or (
                self._parts(position, kinds) or self._derived(equation, kinds, met_data)
            )
        if isinstance(found, Reason) and not is_term:
            # A sum inside the loss adds a regularizer.
            self._refuse(leaves, found)
        return plain

    def _refuse(self, leaves: Iterable[int], why: Reason) -> None:
        """Say why parameters are in no layer; the first reason that was found counts."""
        for leaf in set(leaves) - self.known.excluded.keys():
            self.reasons.setdefault(leaf, why)

    def _derived(self, equation: Equation, kinds: Sequence[Label], met_data: bool) -> list[Label]:
        leaves = frozenset().union(*map(leaves_of, kinds))
        hows = [k.how for k in kinds if isinstance(k, Derived)] or [str(equation.primitive)]
        return [Derived(leaves, hows[0], v, met_data=met_data) for v in equation.outputs]

    def _parts(self, position: int, kinds: Sequence[Label]) -> list[Label] | None:
        """The parts that an equation cuts out of a parameter, or of what is made of some."""
        return parts(self.program, position, [virtual(self.scope, kinds[0]), *kinds[1:]])

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
        for after, _ in self.scope.sole_uses(value):
            if after.primitive in primitives.ADD:
                return after.outputs[0] in self.known.of_data
        return False

    def _site(self, position: int, kinds: Sequence[Label]) -> Label | Reason:
        """The label of a layer's output, or in words why this equation gives none."""
        program, equation = self.program, self.program.equations[position]
        primitive = equation.primitive
        found: Site | Reason | None = None
        kinds = as_parameters(self.scope, equation, kinds)
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
            attached: Output | None = None
            is_added = primitive in primitives.ADD or isinstance(kinds[1], Weight)
            if is_added and self.known.unattached.isdisjoint(
                frozenset().union(*map(leaves_of, kinds))
            ):
                attached = attach_bias(program, position, kinds, self.sites, self.consumers)
            own = attached or self._bias(position, 0, kinds)
            return own or self._unsupported(position, kinds)
        return self._entering(equation, kinds) or self._unsupported(position, kinds)

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
        equation, (body,) = self.program.equations[position], self.program.bodies[position]
        scan = scan_of(equation.eqn)
        loop = Loop(equation.path, equation.params["length"], position)
        end = scan.consts + scan.carry
        labels: list[Label] = []
        meets_data = any(map(is_data, kinds))
        for i, (value, label) in enumerate(zip(equation.inputs, kinds, strict=True)):
            shape = self.program.shape(value)
            label = virtual(self.scope, label)
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
                elif not passed and meets_data:
                    label = self._started(position, i, label)
                elif not passed:
                    label = Derived(leaves_of(label), "scan")
            labels.append(label)
        # What is carried becomes data where the loop meets data at all.
        for i in range(scan.consts, end):
            if labels[i] is CONSTANT and meets_data:
                labels[i] = DATA
        same = [
            i < scan.consts or body.outputs[i - scan.consts] == v
            for i, v in enumerate(body.inputs[:end])
        ]
        self._enter(body.inputs[:end], equation.inputs, same)
        returned = self._inside(body, labels, loop, equation.outputs)
        meets_data = meets_data or any(map(is_data, returned))
        leaves = frozenset().union(*map(leaves_of, labels))
        result: list[Label] = [
            DATA if meets_data else Derived(leaves, "scan", v) for v in equation.outputs
        ]
        for i in range(scan.carry):
            if isinstance(labels[scan.consts + i], Weight):
                result[i] = kinds[scan.consts + i]
        return result

    def _enter(self, inside: Sequence[int], outside: Sequence[int], same: Sequence[bool]) -> None:
        """Note what values of a body are in the whole program, where these are the same."""
        known, is_body = self.known.outer, self.program.is_body
        for value, before, is_same in zip(inside, outside, same, strict=False):
            if is_same and (before in known or not is_body):
                known[value] = known.get(before, before)

    def _inside(
        self, body: Program, given: Sequence[Label], loop: Loop, outputs: tuple[int, ...]
    ) -> list[Label]:
        """Go through the body of a loop or a branch; the labels of what it returns."""
        labels = {v: self.labels[v] for v in body.constants}
        labels |= zip(body.inputs, given, strict=True)
        live = flow.live_equations(body, *body.outputs)
        returned = self.returned or outputs
        Labelling(self.known, body, labels, live, (*self.loops, loop), returned).run()
        return [labels[v] for v in body.outputs]

    def _choice(self, position: int, kinds: Sequence[Label]) -> list[Label]:
        """The labels of what a `cond` returns: a loop that runs once, through one of its branches.

        A layer in a branch has rows when that ran, and zeros when not.
        """
        equation, programs = self.program.equations[position], self.program.bodies[position]
        given = [virtual(self.scope, label) for label in kinds[1:]]
        given = [DATA if isinstance(label, Output) else label for label in given]
        for body in programs:
            self._enter(body.inputs, equation.inputs[1:], [True] * len(given))
        found = [
            self._inside(body, given, Loop((*equation.path, k), 1, position), equation.outputs)
            for k, body in enumerate(programs)
        ]
        result: list[Label] = []
        for value, *labels in zip(equation.outputs, *found, strict=True):
            leaves = frozenset().union(*map(leaves_of, labels))
            if all(label == labels[0] for label in labels) and not isinstance(labels[0], Output):
                result.append(labels[0])
            elif any(map(is_data, labels)) or not leaves:
                result.append(DATA)
            else:  # a parameter that one branch passes on and another stops
                result.append(Derived(leaves, "cond", value, met_data=True))
        return result

    def _started(self, position: int, operand: int, label: Weight) -> Label:
        """A parameter that a loop starts from: a layer at its own value, one for each example."""
        if leaves_of(label) & self.known.excluded.keys():
            return DATA
        value = self.program.equations[position].inputs[operand]
        found = self._at_value(value, [label])
        if isinstance(found, Output):
            return DATA
        self._refuse(leaves_of(label), LOOP_START)
        return DATA

    def _scale(self, position: int, kinds: Sequence[Label]) -> Label | Reason:
        inputs = self.program.equations[position].inputs
        met = list(zip(inputs, kinds, strict=True)) if len(kinds) == len(inputs) else []
        for own in (kinds, in_order(self.scope, met)):
            product = scaled(self.program, position, own, self.sites)
            if isinstance(product, Reason):
                return product
            if (found := scale(self.program, position, product)) is not None:
                return self._append(found)
        raise AssertionError("an array of its own has its entries in order")

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
        if found is None:
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

    def _bias(self, position: int, result: int, kinds: Sequence[Label]) -> Label | None:
        """A parameter that is added to data as a layer of its own, None where it is no such."""
        if sum(bool(leaves_of(k)) for k in kinds) != 1:
            return None
        inputs = self.program.equations[position].inputs
        met = list(zip(inputs, kinds, strict=True)) if len(kinds) == len(inputs) else []
        for own in (kinds, in_order(self.scope, met)):
            for weight in (k for k in own if isinstance(k, Weight)):
                if (found := bias(self.program, position, result, weight)) is not None:
                    return self._append(found)
        return None

    def _entering(self, equation: Equation, kinds: Sequence[Label]) -> Label | None:
        """A parameter that is put beside data, once for each example: a layer at its own value."""
        entering = [v for v, k in zip(equation.inputs, kinds, strict=True) if leaves_of(k)]
        if len(entering) != 1:
            return None
        own = [k for k in kinds if leaves_of(k)]
        is_joined = equation.primitive in primitives.CONCATENATE | primitives.SELECT
        if not is_joined and not any(
            isinstance(k, Weight) and chains.is_spread(k.chain) for k in own
        ):
            return None
        found = self._at_value(entering[0], own)
        return DATA if isinstance(found, Output) else found

    def _at_value(self, value: int, kinds: Sequence[Label]) -> Label | None:
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
