"""Draw the picture of one layer and of what each method makes of its arrays.

python docs/picture.py            # writes docs/picture.svg
"""

import io
import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

INK, SOFT, LINE = "#1f2933", "#616e7c", "#cbd2d9"
BLUE, GREEN, ORANGE, PURPLE = "#2f6fb5", "#2f8f6b", "#d9772b", "#7d55b0"
COLORS = {"X": BLUE, "A": GREEN, "E": ORANGE, "C": PURPLE}
WIDTH, HEIGHT = 100, 57
DASHES = (0, (4, 2.5))

CARDS = (
    ("Gradient step", r"$G = X^\top E$", "XE", ("what SGD and Adam see:", "one number per weight")),
    (
        "FOOF, LNB",
        r"$(\frac{1}{N}X^\top X + \lambda I)^{-1}\, G$",
        "XE",
        ("least squares: outputs move", "along the cotangents"),
    ),
    (
        "LocoProp",
        r"$\min_{\tilde{W}}\; D(X\tilde{W},\; A - \gamma E)$",
        "XAE",
        ("a target for the outputs,", "approached by local steps"),
    ),
    (
        "K-FAC, KFLR",
        r"$(S + \cdot)^{-1}\; G\; (\Gamma + \cdot)^{-1}$",
        "XEC",
        ("curvature of inputs and", "outputs, layer by layer"),
    ),
    (
        "Natural gradient",
        r"$(F + \lambda I)^{-1}\, g$",
        "XEC",
        ("the batch's exact Fisher,", "all layers together"),
    ),
)


def write(ax: Axes, x: float, y: float, text: str, size: float = 9, **options: Any) -> None:
    """Text, centred unless told otherwise."""
    options = {"ha": "center", "va": "center", "color": INK} | options
    ax.text(x, y, text, fontsize=size, **options)


def box(ax: Axes, x: float, y: float, w: float, h: float, face: str, edge: str) -> None:
    """A rounded rectangle."""
    style = "round,pad=0,rounding_size=1"
    ax.add_patch(FancyBboxPatch((x, y), w, h, style, facecolor=face, edgecolor=edge, lw=1.1))


def arrow(ax: Axes, start: tuple, end: tuple, color: str) -> None:
    """A straight arrow."""
    ax.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=11,
            color=color,
            lw=1.5,
            shrinkA=0,
            shrinkB=0,
        )
    )


def bend(ax: Axes, x: float, top: float, low: float, color: str, dashed: bool = False) -> None:
    """The upright part of an arrow that starts at the loss."""
    style = DASHES if dashed else "-"
    ax.plot([x, x], [top, low], color=color, lw=1.5, solid_capstyle="projecting", linestyle=style)


def array(ax: Axes, x: float, y: float, name: str, columns: int, shape: str) -> float:
    """A matrix of rows and columns with its name and shape; returns the x of its right side."""
    rows, cell, color = 5, 2.0, COLORS[name]
    for i in range(rows):
        for j in range(columns):
            shade = 0.14 + 0.16 * ((3 * i + 5 * j + len(shape)) % 4)
            at = (x + j * cell, y + i * cell)
            ax.add_patch(Rectangle(at, cell, cell, facecolor=color, alpha=shade, lw=0))
    w, h = columns * cell, rows * cell
    ax.add_patch(Rectangle((x, y), w, h, facecolor="none", edgecolor=color, lw=1.4))
    halo = FancyBboxPatch(
        (x + w / 2 - 1.5, y + h / 2 - 1.5),
        3,
        3,
        "round,pad=0,rounding_size=1.5",
        facecolor="white",
        edgecolor=color,
        lw=1.2,
    )
    ax.add_patch(halo)
    write(ax, x + w / 2, y + h / 2 - 0.1, f"${name}$", 12.5, color=color)
    write(ax, x + w / 2, y - 1.5, shape, 7.2, color=SOFT)
    return x + w


def layer(ax: Axes) -> None:
    """The upper half: forward along the top, backward below it."""
    top, low = 43, 27
    write(ax, 9, top + 11.8, "inputs", 9, color=BLUE)
    right = array(ax, 5, top, "X", 4, r"rows $\times$ d_in")
    arrow(ax, (right + 1, top + 5), (23.4, top + 5), INK)
    box(ax, 24, top + 1.5, 10, 7, "#f5f7fa", SOFT)
    write(ax, 29, top + 5, r"$A = XW$", 11)
    write(ax, 29, top - 0.4, "the layer's weights", 7.2, color=SOFT)
    arrow(ax, (34.6, top + 5), (42.4, top + 5), INK)
    write(ax, 46.5, top + 11.8, "outputs", 9, color=GREEN)
    right = array(ax, 43.5, top, "A", 3, r"rows $\times$ d_out")
    arrow(ax, (right + 1, top + 5), (57.4, top + 5), INK)
    box(ax, 58, top + 1.5, 17, 7, "#f5f7fa", SOFT)
    write(ax, 66.5, top + 5, "transfer function,\nthe layers above", 8.2, linespacing=1.25)
    arrow(ax, (75.6, top + 5), (82.4, top + 5), INK)
    box(ax, 83, top + 1.5, 12, 7, "#f5f7fa", SOFT)
    write(ax, 89, top + 5, "loss $L$", 10)

    array(ax, 43.5, low, "E", 3, r"$\partial L / \partial A$")
    write(ax, 46.5, low + 11.7, "cotangents", 9, color=ORANGE)
    bend(ax, 88, top + 1.1, low + 5, ORANGE)
    arrow(ax, (88, low + 5), (51, low + 5), ORANGE)
    write(ax, 69.5, low + 6.5, "backward pass of the gradient", 7.6, color=ORANGE)

    array(ax, 19, low, "C", 3, "")
    write(ax, 22, low + 11.7, "curvature cotangents", 9, color=PURPLE)
    write(ax, 26.3, low + 5, "$C^\\top C$\naverages\nto $\\Gamma$", 7.2, color=SOFT, ha="left")
    below = low - 3.6
    bend(ax, 91, top + 1.1, below, PURPLE, dashed=True)
    ax.plot([91, 22], [below, below], color=PURPLE, lw=1.5, linestyle=DASHES)
    arrow(ax, (22, below), (22, low - 0.6), PURPLE)
    text = "one more backward pass, of sampled labels or noise"
    write(ax, 69.5, below + 1.5, text, 7.6, color=PURPLE)


def cards(ax: Axes) -> None:
    """The lower half: the methods, and which arrays each reads."""
    w, gap, low, h = 18, 1.25, 2.2, 18.8
    for i, (title, formula, used, caption) in enumerate(CARDS):
        x = 2.5 + i * (w + gap)
        box(ax, x, low, w, h, "#ffffff", LINE)
        middle = x + w / 2
        write(ax, middle, low + 16.6, title, 9.6, weight="bold")
        write(ax, middle, low + 12.2, formula, 10.2)
        for j, name in enumerate("XAEC"):
            at = middle + (j - 1.5) * 3.4
            is_used = name in used
            chip = FancyBboxPatch(
                (at - 1.3, low + 6.6),
                2.6,
                2.6,
                "round,pad=0,rounding_size=0.7",
                facecolor=COLORS[name] if is_used else "#f0f2f5",
                edgecolor="none",
            )
            ax.add_patch(chip)
            color = "white" if is_used else "#b8c0ca"
            write(ax, at, low + 7.85, f"${name}$", 8.6, color=color)
        write(ax, middle, low + 4.2, caption[0], 7.4, color=SOFT)
        write(ax, middle, low + 2.2, caption[1], 7.4, color=SOFT)


def draw() -> Figure:
    """The whole picture, on a white card, so that dark pages can show it too."""
    plt.rcParams |= {
        "svg.fonttype": "path",
        "svg.hashsalt": "picture",
        "mathtext.fontset": "dejavusans",
        "font.family": "DejaVu Sans",
    }
    figure = plt.figure(figsize=(10.6, 10.6 * HEIGHT / WIDTH))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, WIDTH), ylim=(0, HEIGHT), aspect="equal")
    ax.axis("off")
    card = FancyBboxPatch(
        (0.3, 0.3),
        WIDTH - 0.6,
        HEIGHT - 0.6,
        "round,pad=0,rounding_size=1.6",
        facecolor="white",
        edgecolor=LINE,
        lw=1,
    )
    ax.add_patch(card)
    layer(ax)
    cards(ax)
    return figure


def smaller(svg: str) -> str:
    """Without comments, indentation and digits that nobody sees."""
    svg = re.sub(r'([\d.]+)pt"', r'\1"', svg, count=2)  # of the whole: not all viewers know points
    svg = re.sub(r"<!--.*?-->\n?", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (clip-path|id)="(url\(#|text_|patch_|line2d_|axes_|figure_)[^"]*"', "", svg)
    for i, glyph in enumerate(dict.fromkeys(re.findall(r'<path id="(DejaVu[^"]*)"', svg))):
        svg = svg.replace(f'"{glyph}"', f'"{i}"').replace(f'"#{glyph}"', f'"#{i}"')
    svg = re.sub(r"(?<![\d.])([1-9]\d*\.\d\d)\d+", r"\1", svg)
    svg = re.sub(r'transform="translate\((\d+)[.\d]* 0\)"', r'x="\1"', svg)  # of a letter in a text
    svg = re.sub(r"\s*\n([MLQCz]) ?", r"\1", svg)
    return re.sub(r"\s*\n\s*", "\n", svg)


if __name__ == "__main__":
    text = io.StringIO()
    draw().savefig(text, transparent=True, metadata={"Date": None, "Creator": None})
    Path(__file__).with_name("picture.svg").write_text(smaller(text.getvalue()))
