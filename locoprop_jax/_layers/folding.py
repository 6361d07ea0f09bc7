"""Names that differ in their numbers alone, as one: "h/0/attn" to "h/11/attn" are "h/{0..11}/attn".

Braces hold numbers and ranges of numbers ("{0,2,4..9}", or "{0..8..2}" for every second one). Of
several braces all combinations are meant, as in a shell. Nothing is lost: each name is in one
pattern, and a pattern has no other names.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

NUMBER = re.compile(r"([0-9]+)")
Numbers = tuple[str, ...]
Box = tuple[Numbers, ...]  # the numbers at each place, of which all combinations are meant


class Fold(NamedTuple):
    """Names that are written as one.

    Attributes:
      name: the pattern.
      numbers: what it has at each place of a number, "3" or "{0..11}".
      members: the indices of the names, in their order.
    """

    name: str
    numbers: Numbers
    members: tuple[int, ...]


def fold(names: Sequence[str], contents: Sequence[Hashable]) -> list[Fold]:
    """Join the names whose contents are the same, in the order of each pattern's first name.

    Args:
      names: all different.
      contents: what else is known of each.
    """
    groups: dict[Hashable, dict[Numbers, int]] = {}
    for index, (name, content) in enumerate(zip(names, contents, strict=True)):
        texts, numbers = _split(name)
        groups.setdefault((texts, content), {})[numbers] = index
    folds = [
        _fold(names[next(iter(indices.values()))], box, indices)
        for indices in groups.values()
        for box in _boxes(list(indices))
    ]
    return sorted(folds, key=lambda one: one.members)


def unfolded(names: Sequence[str]) -> list[Fold]:
    """Each name by itself."""
    return [Fold(name, _split(name)[1], (index,)) for index, name in enumerate(names)]


def _split(name: str) -> tuple[Numbers, Numbers]:
    """A name's texts and the numbers between them."""
    parts = NUMBER.split(name)
    return tuple(parts[::2]), tuple(parts[1::2])


def _fold(name: str, box: Box, indices: dict[Numbers, int]) -> Fold:
    written = tuple(own[0] if len(own) == 1 else f"{{{_ranges(own)}}}" for own in box)
    texts, _ = _split(name)
    pieces = itertools.chain.from_iterable(zip(texts, (*written, ""), strict=True))
    members = sorted(indices[numbers] for numbers in itertools.product(*box))
    return Fold("".join(pieces), written, tuple(members))


def _boxes(found: Sequence[Numbers]) -> list[Box]:
    """The fewest sets of combinations that make up what was found; of as few, by outer places."""
    places = [place for place, own in enumerate(zip(*found, strict=True)) if len(set(own)) > 1]
    inner = places[::-1]  # joined first, so that stages of different lengths stay apart
    orders = itertools.permutations(inner) if len(places) <= 4 else [inner, places]
    return min((_joined(found, order) for order in orders), key=len)


def _joined(found: Sequence[Numbers], order: Iterable[int]) -> list[Box]:
    """Sets of combinations that agree but at one place are joined there, place by place."""
    boxes: list[Box] = [tuple((number,) for number in numbers) for numbers in found]
    for place in order:
        alike: dict[tuple[Box, Box], list[str]] = {}
        for box in boxes:
            alike.setdefault((box[:place], box[place + 1 :]), []).extend(box[place])
        boxes = [
            (*before, tuple(sorted(own, key=lambda number: (int(number), number))), *after)
            for (before, after), own in alike.items()
        ]
    return boxes


def _ranges(numbers: Sequence[str]) -> str:
    """Sorted numbers, of which three or more at equal distances are a range: "0,4..9,12..20..4"."""
    result, start = [], 0
    while start < len(numbers):
        first, end = numbers[start], start + 1
        step = int(numbers[end]) - int(first) if end < len(numbers) else 0
        while end < len(numbers) and numbers[end] == _later(first, (end - start) * step):
            end += 1
        if end - start > 2:
            result.append(f"{first}..{numbers[end - 1]}" + (f"..{step}" if step > 1 else ""))
        else:
            result.append(first)
            end = start + 1
        start = end
    return ",".join(result)


def _later(first: str, distance: int) -> str:
    """The number at this distance, with as many digits at least: "07" is followed by "08"."""
    return str(int(first) + distance).zfill(len(first))
