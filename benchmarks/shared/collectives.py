"""What the devices of a compiled program send each other, and what each of them factorises."""

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

# How often each device sends an array, by a ring of D devices, but for (D - 1) / D.
RING = {
    "all-reduce": 2,
    "all-gather": 1,
    "reduce-scatter": 1,
    "all-to-all": 1,
    "collective-permute": 1,
}

Shape = tuple[int, ...]


class Sent(NamedTuple):
    """One array that a collective operation makes of those of all devices.

    Attributes:
      operation: a key of `RING`.
      shape, itemsize: of the array; of a `reduce-scatter` that of all devices together.
      depth: how many conditionals it stands in.
      times: how often it is done, by the counts of the loops that it stands in.
    """

    operation: str
    shape: Shape
    itemsize: int
    depth: int
    times: int

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    def bytes(self, devices: int) -> float:
        """That each device sends."""
        share = (devices - 1) / devices
        return self.times * RING[self.operation] * share * self.size * self.itemsize


def sent(text: str, devices: int) -> list[Sent]:
    """All that is sent in a program, from the text of its HLO.

    Raises:
      ValueError: for a collective operation that is not in `RING`.
    """
    found = []
    for line, depth, times in _lines(text):
        match = re.match(r"\s*(?:ROOT )?%\S+ = (.*?) ([a-z-]+)\(", line)
        if match is None:
            continue
        operation = match[2]
        if operation not in RING:
            if re.match(r"all-|collective-|reduce-scatter|ragged-all", operation):
                raise ValueError(f"What {operation} sends is not counted: {line.strip()[:200]}")
            continue
        # Of one device for each other one: together they are the array.
        parts = devices if operation == "reduce-scatter" else 1
        for itemsize, shape in _arrays(match[1]):
            whole = shape if parts == 1 else (parts, *shape)
            found.append(Sent(operation, whole, itemsize, depth, times))
    return found


def factorised(text: str) -> list[Shape]:
    """The shapes that one device's Cholesky factorisations have."""
    found = []
    for line, _, _ in _lines(text):
        if "custom-call(" in line and "potrf" in line:
            shapes = [shape for _, shape in _arrays(line.split("custom-call(")[0])]
            found.append(next(shape for shape in shapes if len(shape) > 1))
    return found


def _arrays(text: str) -> Iterator[tuple[int, Shape]]:
    """The bytes of an entry, and the shape, of each array whose type is written there."""
    for bits, dims in re.findall(r"\b(?:pred|[a-z]+(\d+))\[([\d,]*)\]", text):
        yield int(bits or 8) // 8, tuple(int(n) for n in dims.split(",") if n)


def _lines(text: str) -> Iterator[tuple[str, int, int]]:
    """The lines of a program as they are reached, each with its depth and how often it runs."""
    computations: dict[str, list[str]] = {}
    entry = body = None
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?(\S+) .*\{$", line)
        if head and not line.startswith(" "):
            body = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif body is not None:
            body.append(line)
    if entry is None:
        raise ValueError("This is not the text of a compiled program.")
    todo = [(entry, 0, 1)]
    while todo:
        name, depth, times = todo.pop()
        for line in computations[name]:
            yield line, depth, times
            is_conditional, is_loop = " conditional(" in line, " while(" in line
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line) if is_loop else None
            repeats = int(trips[1]) if trips else 1
            for called in _called(line):
                todo.append((called, depth + is_conditional, times * repeats))


def _called(line: str) -> list[str]:
    attributes = re.findall(
        r"(?:to_apply|calls|body|condition|branch_computations|true_computation|false_computation)"
        r"=(\{[^}]*\}|%[\w.-]+)",
        line,
    )
    return [name for names in attributes for name in re.findall(r"%([\w.-]+)", names)]
