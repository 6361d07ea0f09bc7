"""Find the layers of a model in its trace.

Detection reads the flat `Program` of a loss. Each value gets a label that says what it is made of;
an equation that is linear in one parameter and meets data is a *site*: a place where a layer's
weights are applied. Then every use of every parameter is accounted for: a parameter with a use
that is not understood is excluded everywhere, with the reason, and detection runs again. Sites
that apply the same weights in the same way are one layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from locoprop_jax._tracing import flow
from locoprop_jax._tracing.formulas import Formula
from locoprop_jax._tracing.grouping import entry_by_entry, groups_of, joined_groups, misused
from locoprop_jax._tracing.kinds.entries import own_value
from locoprop_jax._tracing.known import Known, kernel_key
from locoprop_jax._tracing.labelling import Labelling
from locoprop_jax._tracing.labels import CONSTANT, DATA, Label, Weight
from locoprop_jax._tracing.program import Program
from locoprop_jax._tracing.reasons import NEVER_MEETS_DATA, NO_GRADIENT, Reason
from locoprop_jax._tracing.sites import Site, has_rows


@dataclasses.dataclass(frozen=True)
class Detection:
    """The outcome.

    Attributes:
      sites: in program order.
      groups: the sites of each layer, in the order of the first, transposed ones last.
      transposed: the sites that apply their layer's weights transposed.
      joined: the numbers of the groups whose bias is a row of the kernel.
      formulas: the virtual leaves, which follow the parameters.
      reasons: why each other parameter is in no layer.
      without_gradient: the parameters that the loss does not depend on.
      live: by equation, whether a gradient flows through it.
      terms: see `flow.loss_terms`.
    """

    sites: tuple[Site, ...]
    groups: tuple[tuple[int, ...], ...]
    transposed: frozenset[int]
    joined: frozenset[int]
    formulas: tuple[Formula, ...]
    reasons: dict[int, Reason]
    without_gradient: frozenset[int]
    live: tuple[bool, ...]
    terms: dict[int, float]


def detect(program: Program, names: Sequence[str]) -> Detection:
    """Find the layers.

    Args:
      program: the loss, its parameter leaves the first inputs, the loss the first output.
      names: of the parameters, which are the first inputs.
    """
    n_leaves = len(names)
    loss = program.outputs[0]
    live = flow.live_equations(program, loss)
    data = {v for v in program.others(n_leaves) if program.is_data(v)}
    of_params = flow.reached_from(program, program.inputs[:n_leaves])
    of_data = flow.reached_from(program, data)
    of_arguments = flow.reached_from(program, data.intersection(program.inputs))
    constants = set(range(len(program.avals))) - of_params - of_data
    terms = flow.loss_terms(program, loss, constants, of_params)
    reasons: dict[int, Reason] = {}
    unattached: set[int] = set()
    at_once: set[int] = set()
    at_value: set[int] = set()
    with_constants: set[tuple[frozenset[int], bool]] = set()
    while True:
        known = Known(
            of_data=of_data,
            of_arguments=of_arguments,
            of_params=of_params,
            terms=terms,
            names=names,
            excluded=dict(reasons),
            unattached=frozenset(unattached),
            at_once=frozenset(at_once),
            with_constants=frozenset(with_constants),
        )
        labels: dict[int, Label] = {
            v: DATA if v in data else CONSTANT for v in (*program.inputs, *program.constants)
        }
        for i, v in enumerate(program.inputs[:n_leaves]):
            labels[v] = DATA if i in at_value else Weight(i, program.shape(v), ())
        known.sites.extend(own_value(program, leaf) for leaf in sorted(at_value))
        Labelling(known, program, labels, live).run()
        groups, transposed = groups_of(known.sites)
        joined, apart = joined_groups(known.sites, groups, transposed)
        found = known.reasons | misused(known.sites, groups, joined)
        layered = {leaf for site in known.sites for leaf in site.leaves}
        kernels = {
            kernel_key(site.weight)
            for site in known.sites
            if site.weight is not None and has_rows(site)
        }
        alone = known.one_row - layered - found.keys() - reasons.keys()
        new = (
            apart - unattached,
            (known.networks | alone) - at_once,
            (known.met_constants & kernels) - with_constants,
        )
        unattached.update(new[0])
        at_once.update(new[1])
        with_constants.update(new[2])
        if any(new):  # a use may be understood now
            continue
        if not found:
            break
        own = entry_by_entry(known.sites, found)
        at_value.update(own)
        reasons.update((leaf, why) for leaf, why in found.items() if leaf not in own)
    sites = known.sites
    read = {v for i, eq in enumerate(program.equations) if live[i] for v in eq.inputs}
    without = frozenset(i for i in range(n_leaves) if program.inputs[i] not in read)
    for leaf in range(n_leaves):
        if leaf in without:
            reasons[leaf] = NO_GRADIENT
        elif leaf not in layered and leaf not in reasons:
            reasons[leaf] = NEVER_MEETS_DATA
    formulas = tuple(formula for _, formula in known.formulas.values())
    return Detection(
        tuple(sites), groups, transposed, joined, formulas, reasons, without, live, terms
    )
