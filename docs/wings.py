"""Draw the wings of the package, floor by floor, and who imports whom: as the imports say it.

python docs/wings.py            # writes docs/wings.svg
"""

import ast
import functools
import graphlib
import html
import importlib.util
import itertools
import textwrap
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "locoprop_jax"

INK, SOFT, LINE, PALE = "#1f2933", "#616e7c", "#cbd2d9", "#f5f7fa"
COLORS = ("#2f6fb5", "#2f8f6b", "#d9772b", "#7d55b0", "#1b8a9a", "#b5446e", "#8a6d3b", "#5c7a29")
WIDTH, EDGE, PAD = 1060, 28, 16
ASIDE, BELOW = 20, 44  # between rooms
FIRST_CHIP, CHIP = PAD + 54, 22  # what a wing imports: beside "imports", so high each
LETTER = 0.6  # the width of a letter over its size: what a wide font needs

# --- the imports ---------------------------------------------------------------------------------


@functools.cache
def modules() -> dict[str, Path]:
    """The files of the package by the name that imports them."""
    files = sorted((ROOT / PACKAGE).rglob("*.py"))
    parts = {path: path.relative_to(ROOT).with_suffix("").parts for path in files}
    return {".".join(p[:-1] if p[-1] == "__init__" else p): path for path, p in parts.items()}


def is_package(module: str) -> bool:
    return modules()[module].name == "__init__.py"


def wing(module: str) -> str:
    """The folder that a module lies in, however deep: the package's own for the ground floor."""
    package, _, rest = module.partition(".")
    first = f"{package}.{rest.partition('.')[0]}"
    return first if rest and is_package(first) else package


def wings() -> list[str]:
    return [module for module in modules() if wing(module) == module != PACKAGE]


def rooms(of: str) -> list[str]:
    """The modules of a wing."""
    return [module for module in modules() if not is_package(module) and wing(module) == of]


@functools.cache
def imports(module: str) -> frozenset[str]:
    """The modules of the package that this one imports, be it inside a function."""
    tree = ast.parse(modules()[module].read_text())
    names = [name for node in ast.walk(tree) for name in _named(node, module)]
    ours = [name for name in names if name.partition(".")[0] == PACKAGE]
    return frozenset(name if name in modules() else name.rpartition(".")[0] for name in ours)


def _named(node: ast.AST, module: str) -> list[str]:
    """What a node imports, by full names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        source = "." * node.level + (node.module or "")
        parent = module if is_package(module) else module.rpartition(".")[0]
        source = importlib.util.resolve_name(source, parent)
        return [f"{source}.{alias.name}" for alias in node.names]
    return []


def doors(of: str) -> set[str]:
    """The folders that the modules of a wing import from."""
    return {wing(other) for module in rooms(of) for other in imports(module)} - {of}


def floors() -> list[list[str]]:
    """The wings from the lowest up: each stands on the highest of those that it imports."""
    sorter = graphlib.TopologicalSorter({of: doors(of) - {PACKAGE} for of in wings()})
    sorter.prepare()
    result = []
    while sorter.is_active():
        result.append(sorted(sorter.get_ready()))
        sorter.done(*result[-1])
    return result


# --- the picture ---------------------------------------------------------------------------------
# Written by hand rather than plotted, so that every machine writes the same file.


def write(x: float, y: float, text: str, size: float = 13, color: str = INK, more: str = "") -> str:
    """A line of text; `more` are further attributes."""
    text = html.escape(text)
    return f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{color}" {more}>{text}</text>'


BOLD, CENTRED, TO_THE_LEFT = 'font-weight="bold"', 'text-anchor="middle"', 'text-anchor="end"'


def box(x: float, y: float, w: float, h: float, fill: str, edge: str) -> str:
    place = f'x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}"'
    return f'<rect {place} rx="9" fill="{fill}" stroke="{edge}"/>'


def arrow(x: float, top: float, end: float, low: float, color: str) -> str:
    return (
        f'<path d="M{x:g} {top:g}L{end:g} {low - 9:g}" stroke="{color}" stroke-width="2"/>'
        f'<path d="M{end - 5:g} {low - 10:g}h10l-5 10z" fill="{color}"/>'
    )


def short(module: str) -> str:
    return module.rpartition(".")[2]


def listed(of: str) -> str:
    """The modules of a wing; a folder inside it stands for its own."""
    inside = [module.removeprefix(f"{of}.").split(".") for module in rooms(of)]
    return ", ".join(dict.fromkeys(name if not more else f"{name}/" for name, *more in inside))


class Room(NamedTuple):
    """Where a wing stands in the picture."""

    of: str
    x: float
    w: float
    color: str

    def wrapped(self, text: str, size: float) -> list[str]:
        letters = int((self.w - 2 * PAD) / (LETTER * size))
        return textwrap.wrap(text, letters, break_on_hyphens=False)

    @property
    def caption(self) -> list[str]:
        """The first line of the wing's own description."""
        text = ast.get_docstring(ast.parse(modules()[self.of].read_text())) or ""
        return self.wrapped(text.partition("\n")[0].rstrip("."), 12.5)

    @property
    def contents(self) -> list[str]:
        return self.wrapped(listed(self.of), 13)

    @property
    def needs(self) -> float:
        """Its height, if it stood alone on its floor."""
        lines = len(set(foot for _, foot, _ in self.chips))
        return 52 + 17 * len(self.caption) + 20 * len(self.contents) + CHIP * lines

    @property
    def chips(self) -> list[tuple[str, int, float]]:
        """What it imports, each with its line, counted from the lowest, and its place there."""
        places, line, left = [], 0, FIRST_CHIP
        for other in [PACKAGE, *wings()]:
            if other in doors(self.of):
                if left + chip_width(other) > self.w - PAD:
                    line, left = line + 1, FIRST_CHIP
                places.append((other, line, left))
                left += chip_width(other) + 6
        return places


def chip_name(of: str) -> str:
    return "ground floor" if of == PACKAGE else short(of)


def chip_width(of: str) -> float:
    return 11 * LETTER * len(chip_name(of)) + 12


def card(room: Room, y: float, height: float, colors: dict[str, str]) -> list[str]:
    """A wing's name, what it is, its modules, and at its foot what it imports."""
    left, foot = room.x + PAD, y + height - 13
    parts = [
        box(room.x, y, room.w, height, "#ffffff", room.color),
        write(left, y + 27, short(room.of), 16, room.color, BOLD),
        write(left, foot, "imports", 11, SOFT),
    ]
    y += 30
    for text in room.caption:
        parts.append(write(left, y := y + 17, text, 12.5, SOFT))
    y += 4
    for text in room.contents:
        parts.append(write(left, y := y + 20, text))
    for other, line, place in room.chips:
        x, w, low = room.x + place, chip_width(other), foot - CHIP * line
        parts.append(box(x, low - 13, w, 18, colors[other], "none"))
        parts.append(write(x + w / 2, low, chip_name(other), 11, "#ffffff", CENTRED))
    return parts


def roof(y: float) -> list[str]:
    low, middle = y + 62, WIDTH / 2
    outline = f"M{EDGE} {low:g}L{middle:g} {y:g}L{WIDTH - EDGE} {low:g}z"
    return [
        f'<path d="{outline}" fill="{PALE}" stroke="{LINE}"/>',
        write(middle, y + 37, f"{PACKAGE}/__init__.py", 14, INK, f"{BOLD} {CENTRED}"),
        write(middle, y + 54, "the one list of public names", 12.5, SOFT, CENTRED),
    ]


def base(y: float) -> list[str]:
    left, right = EDGE + PAD, WIDTH - EDGE - PAD
    return [
        box(EDGE, y, WIDTH - 2 * EDGE, 62, PALE, LINE),
        write(left, y + 27, "ground floor", 16, SOFT, BOLD),
        write(left, y + 48, listed(PACKAGE)),
        write(right, y + 48, "all wings may import it; it imports none", 12.5, SOFT, TO_THE_LEFT),
    ]


def on_one_floor(names: list[str], colors: dict[str, str]) -> list[Room]:
    w = (WIDTH - 2 * EDGE - ASIDE * (len(names) - 1)) / len(names)
    return [Room(name, EDGE + i * (w + ASIDE), w, colors[name]) for i, name in enumerate(names)]


def between(upper: Room, lower: Room) -> tuple[float, float]:
    """Where an arrow begins and ends: upright where one room stands over the other."""
    left, right = max(upper.x, lower.x), min(upper.x + upper.w, lower.x + lower.w)
    if left < right:
        return (left + right) / 2, (left + right) / 2
    return upper.x + upper.w / 2, lower.x + lower.w / 2


def draw() -> str:
    """The whole picture, on a white card, so that dark pages can show it too."""
    colors = {PACKAGE: SOFT} | dict(zip(itertools.chain(*floors()), COLORS, strict=False))
    y = 22.0
    parts = roof(y)
    y += 62 + 16
    above: list[Room] = []
    for names in reversed(floors()):
        here = on_one_floor(names, colors)
        for upper, lower in itertools.product(above, here):
            if lower.of in doors(upper.of):
                begin, end = between(upper, lower)
                parts.append(arrow(begin, y - BELOW, end, y, lower.color))
        height = max(room.needs for room in here)
        for room in here:
            parts += card(room, y, height, colors)
        y += height + BELOW
        above = here
    y += 16 - BELOW
    parts += base(y)
    y += 62 + 22
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y:g}" '
            'font-family="DejaVu Sans,Verdana,Arial,sans-serif">',
            box(3, 3, WIDTH - 6, y - 6, "#ffffff", LINE),
            *parts,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    Path(__file__).with_name("wings.svg").write_text(draw())
