"""What passes of labels share, and what they tell one another from one pass to the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import NamedTuple

from locoprop_jax._tracing import flow, reasons
from locoprop_jax._tracing.formulas import Formula
from locoprop_jax._tracing.labels import Label, Weight, leaves_of
from locoprop_jax._tracing.program import END, Equation, Program
from locoprop_jax._tracing.reasons import Reason
from locoprop_jax._tracing.sites import Site


@dataclasses.dataclass(frozen=True)
class Known:
    """What the passes over the program and over the bodies of its loops share.

    Attributes:
      of_data: the values that data reach.
      of_arguments: those that arguments of the loss reach, and not only what it closes over.
      of_params: the values that parameters reach.
      terms: see `flow.loss_terms`.
      names: of the parameters.
      excluded: the parameters that were not understood in an earlier pass, and why.
      unattached: biases that are layers of their own wherever they are added.
      at_once: the parameters that data from outside meet in a layer even in one row.
      with_constants: the kernels that constants, and data in one row, are rows of, because other
        data are: `kernel_key`s.
      sites: those found so far.
      reasons: those found so far.
      one_row: the parameters that data from outside met in one row, in no layer.
      networks: those of them that another layer came after.
      met_constants: the kernels whose product with a constant, or with one row, was formed.
      outer: of what enters the body of a loop or a branch as it is outside, by its number inside.
      formulas: by key, what is made of parameters, with its number as a virtual leaf.
    """

    of_data: Set[int]
    of_arguments: Set[int]
    of_params: Set[int]
    terms: Mapping[int, float]
    names: Sequence[str]
    excluded: Mapping[int, Reason]
    unattached: frozenset[int]
    at_once: frozenset[int]
    with_constants: frozenset[tuple[frozenset[int], bool]]
    sites: list[Site] = dataclasses.field(default_factory=list)
    reasons: dict[int, Reason] = dataclasses.field(default_factory=dict)
    one_row: set[int] = dataclasses.field(default_factory=set)
    networks: set[int] = dataclasses.field(default_factory=set)
    met_constants: set[tuple[frozenset[int], bool]] = dataclasses.field(default_factory=set)
    outer: dict[int, int] = dataclasses.field(default_factory=dict)
    formulas: dict[tuple, tuple[int, Formula]] = dataclasses.field(default_factory=dict)

    def follows(self, refused: Iterable[int]) -> Reason:
        """Why what belongs to a refused parameter is in no layer."""
        leaf = min(refused)
        return reasons.follows(self.names[leaf], self.excluded[leaf])

    def number(self, formula: Formula) -> int:
        """Of a formula as a virtual leaf."""
        number = len(self.names) + len(self.formulas)
        return self.formulas.setdefault(formula.key(), (number, formula))[0]


class Scope(NamedTuple):
    """A pass over one program.

    Attributes:
      known: what all passes share.
      program: the loss, or the body of a loop.
      labels: of its values so far.
      consumers: of each value, the live equations.
    """

    known: Known
    program: Program
    labels: dict[int, Label]
    consumers: Mapping[int, Sequence[int]]

    def sole_uses(self, value: int) -> Iterator[tuple[Equation, int]]:
        """The equations that a value goes through, each with what it takes.

        As long as it goes into one only, up to the first that does more than rearrange it.
        """
        while len(uses := self.consumers.get(value, [])) == 1 and uses != [END]:
            after = self.program.equations[uses[0]]
            yield after, value
            if flow.rearranged(self.program, after, ()) is None:
                return
            value = after.outputs[0]


def kernel_key(label: Label) -> tuple[frozenset[int], bool]:
    """Which parameters a kernel is, or whether it is made of them."""
    return leaves_of(label), not isinstance(label, Weight) or bool(label.made)
