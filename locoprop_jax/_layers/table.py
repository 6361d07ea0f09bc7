"""What `print(layers)` shows, from what `Layers.to_dict` says: repeated layers may be folded."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from locoprop_jax._layers.folding import NUMBER, Fold, fold, unfolded

Record = Mapping[str, Any]  # of a layer or an uncaptured parameter

SCREEN = 40  # lines: a model with more layers is folded
HEADER = ("layer", "kind", "shape", "bias", "rows", "transfer", "parameters")
FOLDED = (
    "{0..2} in a name stands for 0, 1 and 2; such a line counts the parameters of all its layers.\n"
    "`print(layers.table(fold=False))` shows each layer."
)


def table(about: Record, folded: bool | None = None) -> str:
    """The layers with their total, then the parameters in none.

    Args:
      about: from `Layers.to_dict`.
      folded: whether layers that differ in the numbers of their names alone are one line; None for
        where it would not fit a screen otherwise.
    """
    layers = about["layers"]
    folded = is_large(about) if folded is None else folded
    cells = [_cells(layer) for layer in layers]
    lines = folds([layer["name"] for layer in layers], cells, folded)
    rows = [
        (line.name, *cells[line.members[0]], f"{_total(layers, line.members):,}") for line in lines
    ]
    header, right = HEADER, (4, 6)
    if is_shorter := len(lines) < len(layers):
        counts = ["times", *(str(len(line.members)) for line in lines)]
        header, *rows = [
            (row[0], count, *row[1:]) for row, count in zip([HEADER, *rows], counts, strict=True)
        ]
        right = (1, 5, 7)
    total = f"{len(layers)} layers, {about['size']:,} parameters"
    text = [_align([header, *rows], right), total, *([FOLDED] if is_shorter else [])]
    for title, flag in (
        ("Not in a layer (their gradient passes unchanged):", True),
        ("Without a gradient:", False),
    ):
        own = [other for other in about["uncaptured"] if other["has_gradient"] is flag]
        text += ["", title, *left_out(own, folded)] if own else []
    return "\n".join(text)


def left_out(uncaptured: Sequence[Record], folded: bool, remedies: bool = False) -> list[str]:
    """A line for each parameter in no layer: its shape, the reason, and the remedy if asked for."""
    contents = [
        (tuple(o["shape"]), _linked(o["reason"], o["path"]), _linked(o["remedy"], o["path"]))
        for o in uncaptured
    ]
    lines = []
    for line in folds([other["path"] for other in uncaptured], contents, folded):
        shape, *texts = contents[line.members[0]]
        reason, remedy = (text.format(*line.numbers) for text in texts)
        times = f" ({len(line.members)} times)" if len(line.members) > 1 else ""
        text = f"  {line.name} {list(shape)}{times}: {reason}"
        lines.append(f"{text}. {remedy}" if remedies else text)
    return lines


def is_large(about: Record) -> bool:
    """Whether a line for each layer and each other parameter is more than a screen."""
    return len(about["layers"]) + len(about["uncaptured"]) > SCREEN


def folds(names: Sequence[str], contents: Sequence[Any], folded: bool) -> list[Fold]:
    """The lines of a table: names of the same content together, or each by itself."""
    return fold(names, contents) if folded else unfolded(names)


def shape_text(layer: Record) -> str:
    """A layer's sizes as a reader has them: "3x3x16 -> 32"."""
    if layer["kind"] in ("scale", "bias"):
        return str(layer["stack"])
    is_row = layer["has_bias"] and not layer["parameters"]["bias"]  # the last one of the kernel
    d_in = str(layer["d_in"] - is_row)
    if layer["kind"] == "conv":
        channels = layer["d_in"] // math.prod(layer["window"])
        d_in = "x".join(map(str, (*layer["window"], channels)))
    sizes = f"{d_in} -> {layer['d_out']}"
    return f"{layer['stack']} x ({sizes})" if layer["stack"] else sizes


def _cells(layer: Record) -> tuple[str, ...]:
    transfer = f"{layer['transfer']}: {layer['note']}" if layer["note"] else layer["transfer"]
    return (
        layer["kind"],
        shape_text(layer),
        "yes" if layer["has_bias"] else "no",
        "?" if layer["rows"] is None else str(layer["rows"]),
        "(loss)" if layer["uses_head"] else transfer,
    )


def _total(layers: Sequence[Record], members: Sequence[int]) -> int:
    return sum(layers[index]["size"] for index in members)


def _linked(text: str, path: str) -> str:
    """A format string, where a name in quotes has the numbers that it shares with the path open."""
    own = NUMBER.split(_escaped(path))

    def link(match: re.Match[str]) -> str:
        parts = NUMBER.split(match[1])
        pairs = zip(parts, own, strict=False)
        shared = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
        opened = [f"{{{i // 2}}}" if i % 2 and i < shared else p for i, p in enumerate(parts)]
        return f"'{''.join(opened)}'"

    return re.sub(r"'([^']*)'", link, _escaped(text))


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _align(rows: Sequence[Sequence[str]], right: Sequence[int]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
