"""Find the layers of a model in its trace.

Detection reads the flat `Program` of a loss. Each value gets a label that says what it is made of;
an equation that is linear in one parameter and meets data is a *site*: a place where a layer's
weights are applied. Then every use of every parameter is accounted for: a parameter with a use
that is not understood is excluded everywhere, with the reason, and detection runs again. Sites
that apply the same weights in the same way are one layer.
"""

from __future__ import annotations

import dataclasses

from locoprop_jax._tracing import flow
from locoprop_jax._tracing.grouping import groups_of, misused
from locoprop_jax._tracing.labelling import Known, Labelling
from locoprop_jax._tracing.labels import CONSTANT, DATA, Label, Weight
from locoprop_jax._tracing.program import Program
from locoprop_jax._tracing.reasons import NEVER_MEETS_DATA, NO_GRADIENT, Reason
from locoprop_jax._tracing.sites import Site


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


def detect(program: Program, n_leaves: int) -> Detection:
    """Find the layers.

    Args:
      program: the loss, its parameter leaves the first inputs, the loss the first output.
      n_leaves: how many inputs are parameters.
    """
    loss = program.outputs[0]
    live = flow.live_equations(program, loss)
    others = (*program.inputs[n_leaves:], *program.constants)
    data = {v for v in others if program.is_data(v)}
    of_params = flow.reached_from(program, program.inputs[:n_leaves])
    of_data = flow.reached_from(program, data)
    constants = set(range(len(program.avals))) - of_params - of_data
    terms = flow.loss_terms(program, loss, constants, of_params)
    reasons: dict[int, Reason] = {}
    unattached: set[int] = set()
    at_once: set[int] = set()
    while True:
        leaves = (frozenset(reasons), frozenset(unattached), frozenset(at_once))
        known = Known(of_data, of_params, terms, *leaves, [], {}, set())
        labels: dict[int, Label] = {
            v: DATA if v in data else CONSTANT for v in (*program.inputs, *program.constants)
        }
        for i, v in enumerate(program.inputs[:n_leaves]):
            labels[v] = Weight(i, program.shape(v), ())
        Labelling(known, program, labels, live).run()
        groups, transposed = groups_of(known.sites)
        found = known.reasons | misused(known.sites, groups)
        reasons.update(found)
        # No bias belongs to weights that are used both ways.
        tied = [i for group in groups if not transposed.isdisjoint(group) for i in group]
        own = {leaf for i in tied if (leaf := known.sites[i].bias) is not None}
        unattached.update(own)
        layered = {leaf for site in known.sites for leaf in (site.leaf, site.bias)}
        alone = known.one_row - layered - set(reasons)
        at_once.update(alone)
        if not (found or own or alone):
            break
    sites = known.sites
    read = {v for i, eq in enumerate(program.equations) if live[i] for v in eq.inputs}
    without = frozenset(i for i in range(n_leaves) if program.inputs[i] not in read)
    for leaf in range(n_leaves):
        if leaf in without:
            reasons[leaf] = NO_GRADIENT
        elif leaf not in layered and leaf not in reasons:
            reasons[leaf] = NEVER_MEETS_DATA
    return Detection(tuple(sites), groups, transposed, reasons, without, live, terms)
