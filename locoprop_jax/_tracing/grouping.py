"""Which sites are one layer, and which parameters are used in ways that do not agree."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

import numpy as np

from locoprop_jax._tracing import chains
from locoprop_jax._tracing.chains import Part
from locoprop_jax._tracing.labels import leaves_of
from locoprop_jax._tracing.reasons import Reason, used_differently
from locoprop_jax._tracing.sites import Site


def groups_of(sites: Sequence[Site]) -> tuple[tuple[tuple[int, ...], ...], frozenset[int]]:
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
            if both and _is_transposed(sites[group[0]], sites[other[0]]):
                transposed.update(other)
                groups.remove(other)
                group += other
    return tuple(map(tuple, groups)), frozenset(transposed)


def joined_groups(
    sites: Sequence[Site], groups: Sequence[Sequence[int]], transposed: frozenset[int]
) -> tuple[frozenset[int], set[int]]:
    """The numbers of the groups whose bias is a row of the kernel, and biases to be set apart.

    A use without the bias is a row of inputs whose last entry is zero instead of one. Weights that
    are used both ways have no bias, nor those that have another one at each use.
    """
    joined: set[int] = set()
    apart: set[int] = set()
    for number, group in enumerate(groups):
        kernel = sites[group[0]].weight
        added = {(w.leaf, w.part): w for i in group if (w := sites[i].added) is not None}
        if kernel is None or not added:
            continue
        is_everywhere = all(sites[i].added is not None for i in group)
        (first, *more), is_turned = added.values(), not transposed.isdisjoint(group)
        shares = not leaves_of(kernel).isdisjoint(leaves_of(first))
        if is_turned or more:
            apart.update(*map(leaves_of, added.values()))
        elif shares or not is_everywhere:
            if kernel.part is None and first.part is None:
                joined.add(number)
            else:
                apart.update(leaves_of(first))
    return frozenset(joined), apart


def misused(
    sites: Sequence[Site], groups: Sequence[Sequence[int]], joined: frozenset[int]
) -> dict[int, Reason]:
    """The parameters whose uses do not agree."""
    uses: dict[int, set[tuple[Part | None, int, str]]] = {}
    roles: dict[int, list[str]] = {}
    for number, i in ((number, i) for number, group in enumerate(groups) for i in sorted(group)):
        site = sites[i]
        for weight, part in ((site.weight, "kernel"), (site.added, "bias")):
            if weight is None:
                continue
            for leaf in leaves_of(weight):
                place = "block" if number in joined else part
                own = None if weight.made else weight.part  # parts of it may share parameters
                uses.setdefault(leaf, set()).add((own, number, place))
                roles.setdefault(leaf, []).append(site.kind if part == "kernel" else part)
    reasons = {}
    for leaf, found in uses.items():
        pairs = itertools.combinations(found, 2)
        if any(a is None or b is None or a.overlaps(b) for (a, *_), (b, *_) in pairs):
            reasons[leaf] = used_differently(roles[leaf])
    return reasons


def entry_by_entry(sites: Sequence[Site], leaves: Collection[int]) -> set[int]:
    """Those of some parameters that all sites take entry by entry."""
    others = {leaf for site in sites if site.kind not in ("scale", "bias") for leaf in site.leaves}
    within = {leaf for site in sites for leaf in site.leaves}
    return (within & set(leaves)) - others


def _is_transposed(site: Site, other: Site) -> bool:
    """Whether the other applies the same kernel transposed."""
    pair = (site, other)
    if any(s.kind not in ("dense", "embedding") or s.stack is not None for s in pair):
        return False
    weight = site.weight
    if site.kind == "embedding" or weight is None or other.weight is None:
        return False
    same = (weight.leaf, weight.part) == (other.weight.leaf, other.weight.part)
    if not same or (site.d_in, site.d_out) != (other.d_out, other.d_in):
        return False
    sizes = (site.d_in, site.d_out)
    if chains.extend(site.kernel, sizes, "transpose", (1, 0)) == other.kernel:
        return True
    numbers = chains.numbers(weight.own)
    kernels = (chains.apply(s.kernel, numbers) for s in pair)
    return np.array_equal(next(kernels), next(kernels).T)
