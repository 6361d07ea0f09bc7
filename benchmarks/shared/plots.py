"""The pictures of a comparison: training loss against epochs and seconds, and reconstructions."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, NullLocator

from benchmarks.shared.methods import METHODS
from benchmarks.shared.steps import WARMUP
from benchmarks.shared.training import Run

# Okabe and Ito's palette, which colour-blind readers can tell apart; grey for black, no yellow.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#7F7F7F")
MARKERS = ("o", "s", "^", "D")
DASHES = ("-", "--", ":", "-.")
TEXT, FAINT = "#333333", "#DDDDDD"
GAP = 1  # pixels around each image
LETTER_WIDTH, LABEL_GAP = 0.024, 0.055  # what a label takes up, as shares of the axes


class Look(NamedTuple):
    colour: str
    marker: str


class Line(NamedTuple):
    """A curve of `plot_updates`.

    Attributes:
      label: beside its end.
      x: for each panel.
      y: the loss.
      other: another loss; the area up to it is shaded.
    """

    label: str
    x: tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]
    y: Float[np.ndarray, " k"]
    other: Float[np.ndarray, " k"] | None = None


def look(colour: int, marker: int) -> Look:
    """The look of this number, whichever the number is."""
    return Look(COLOURS[colour % len(COLOURS)], MARKERS[marker % len(MARKERS)])


def plot_losses(
    runs: Sequence[Run],
    title: str,
    path: Path,
    looks: Mapping[str, Look] | None = None,
    test: bool = False,
    log: bool = False,
) -> None:
    """Training loss at the end of each epoch, against epochs and against seconds of training.

    Epoch 0, where all methods are the same, and the warm-up are left out so that the differences
    fill the picture.

    Args:
      runs: one curve each.
      title: of the picture.
      path: where it goes.
      looks: by the runs' names; otherwise a method has its colour whichever others are there.
      test: whether to plot the test losses as well, dashed.
      log: whether the losses have a logarithmic axis.
    """
    if looks is None:
        looks = {name: look(position, position) for position, name in enumerate(METHODS)}
    first = max([1.0, *(WARMUP * run.curve[-1].epoch for run in runs)])
    figure, (by_epoch, by_seconds) = _panels(title)
    for axes, field, label in (
        (by_epoch, "epoch", "epoch"),
        (by_seconds, "seconds", "seconds of training, without compilation and evaluation"),
    ):
        axes.set_yscale("log" if log else "linear")
        axes.set_xlabel(label, color=TEXT)
        ends = {}
        for run in runs:
            records = [record for record in run.curve if record.epoch >= first]
            if not records:
                continue
            x = [getattr(record, field) for record in records]
            y = [record.train_loss for record in records]
            colour, marker = looks[run.method]
            style: dict[str, Any] = {
                "color": colour,
                "marker": marker,
                "markersize": 4,
                "linewidth": 1.8,
            }
            style["markevery"] = max(1, len(x) // 10)
            axes.plot(x, y, **style)
            if test:
                losses = np.array([record.test_loss for record in records], float)
                axes.plot(x, losses, linestyle="--", **style)
            ends[run.label] = (x[-1], y[-1], colour)
        _label_ends(axes, ends)
    by_seconds.set_xlim(left=0)
    by_epoch.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_epoch.set_ylabel(
        "loss (training: solid, test: dashed)" if test else "training loss", color=TEXT
    )
    figure.savefig(path, dpi=150)


def plot_updates(lines: Sequence[Line], title: str, path: Path, log: bool = True) -> None:
    """Loss against updates and against seconds, without the first of both (`WARMUP`)."""
    styles = _styles([line.label for line in lines])
    figure, panels = _panels(title)
    for i, (axes, label) in enumerate(
        zip(
            panels,
            ("updates", "seconds of training, without compilation and evaluation"),
            strict=True,
        )
    ):
        axes.set_yscale("log" if log else "linear")
        axes.set_xlabel(label, color=TEXT)
        ends = {}
        for line in lines:
            first = min(int(WARMUP * len(line.y)) + 1, len(line.y) - 1)
            style, colour = styles[line.label], styles[line.label]["color"]
            x, y = line.x[i][first:], line.y[first:]
            axes.plot(x, y, linewidth=1.8, **style)
            if line.other is not None:
                axes.fill_between(x, y, line.other[first:], color=colour, alpha=0.2, linewidth=0)
            ends[line.label] = (x[-1], y[-1], colour)
        _label_ends(axes, ends)
    panels[0].set_ylabel("loss of the batch, mean of ten", color=TEXT)
    figure.savefig(path, dpi=150)


class Panel(NamedTuple):
    """Curves over one axis, by their labels: places and values."""

    label: str
    curves: Mapping[str, tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]]
    log: bool = False


def plot_panels(
    panels: Sequence[Panel], xlabel: str, title: str, path: Path, log: bool = False
) -> None:
    """Panels beside each other; a label has one look in all of them.

    Args:
      panels: what is in them.
      xlabel: of their axis.
      title: of the picture.
      path: where it goes.
      log: whether the axis is logarithmic.
    """
    figure, all_axes = _panels(title, len(panels), sharey=False)
    styles = _styles(list(dict.fromkeys(label for panel in panels for label in panel.curves)))
    for axes, panel in zip(all_axes, panels, strict=True):
        axes.set_xscale("log" if log else "linear")
        axes.set_yscale("log" if panel.log else "linear")
        axes.set_xlabel(xlabel, color=TEXT)
        axes.set_ylabel(panel.label, color=TEXT)
        for label, (x, y) in panel.curves.items():
            axes.plot(x, y, marker="o", markersize=3, label=label, **styles[label])
        axes.legend(fontsize=8, frameon=False, labelcolor=TEXT)
    figure.savefig(path, dpi=150)


def plot_heat(
    rows: Mapping[str, Float[np.ndarray, " columns"]],
    columns: Sequence[str],
    title: str,
    path: Path,
) -> None:
    """Cosines as colours, with their numbers."""
    values = np.stack(list(rows.values()))
    figure = Figure(figsize=(2.4 + 0.9 * len(columns), 1.2 + 0.4 * len(rows)), layout="constrained")
    figure.suptitle(_wrapped(title, 110), color=TEXT, fontsize=11, x=0.01, ha="left")
    axes = figure.subplots()
    axes.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set(xticks=range(len(columns)), yticks=range(len(rows)))
    axes.set_xticklabels(columns, color=TEXT, fontsize=9)
    axes.set_yticklabels(rows, color=TEXT, fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for (i, j), value in np.ndenumerate(values):
        colour = "white" if value > 0.6 else TEXT
        axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=9)
    figure.savefig(path, dpi=150)


class Grid(NamedTuple):
    """A panel of `plot_grids`.

    Attributes:
      label: above it.
      names: of the numbers along its rows and its columns.
      values: of both, from small to large.
      losses: infinite where training diverged, not a number where there was none.
      marked: the row and the column of the cell that is framed.
    """

    label: str
    names: Sequence[str]
    values: Sequence[Sequence[float]]
    losses: Float[np.ndarray, "rows columns"]
    marked: tuple[int, int]


def plot_grids(grids: Sequence[Grid], title: str, path: Path) -> None:
    """Losses as colours, with their numbers, on one scale: the darker the lower.

    The scale ends half above the lowest loss, because what is beyond is of no use to anybody.
    """
    columns = min(3, len(grids))
    rows = -(-len(grids) // columns)
    figure = Figure(figsize=(4.6 * columns + 0.8, 4.2 * rows + 0.7), layout="constrained")
    figure.suptitle(_wrapped(title, 45 * columns), color=TEXT, fontsize=11, x=0.01, ha="left")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    finite = [grid.losses[np.isfinite(grid.losses)] for grid in grids]
    low = min((losses.min() for losses in finite if losses.size), default=1.0)
    colours = matplotlib.colormaps["Blues_r"].with_extremes(bad=FAINT)
    norm = LogNorm(low, 1.5 * low)
    for axes in panels[len(grids) :]:
        axes.set_visible(False)
    for axes, grid in zip(panels, grids, strict=False):
        _draw_grid(axes, grid, norm, colours)
    bar = figure.colorbar(
        ScalarMappable(norm, colours),
        ax=list(panels),
        extend="max",
        shrink=0.6,
        label="training loss",
    )
    bar.ax.yaxis.set_major_locator(MaxNLocator(5))
    bar.ax.yaxis.set_major_formatter("{x:.0f}")
    bar.ax.yaxis.set_minor_locator(NullLocator())
    figure.savefig(path, dpi=150)


def _draw_grid(axes: Axes, grid: Grid, norm: LogNorm, colours: Colormap) -> None:
    shown = np.where(np.isfinite(grid.losses), grid.losses, np.nan)
    axes.imshow(shown, cmap=colours, norm=norm, aspect="auto", origin="lower")
    for (i, j), loss in np.ndenumerate(grid.losses):
        if np.isnan(loss):
            continue
        dark = np.isfinite(loss) and float(np.asarray(norm(loss))) < 0.5
        axes.text(
            j,
            i,
            f"{loss:.3g}" if np.isfinite(loss) else "×",
            ha="center",
            va="center",
            color="white" if dark else TEXT,
            fontsize=8,
        )
    row, column = grid.marked
    frame = {"fill": False, "edgecolor": COLOURS[4], "linewidth": 2.5}
    axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **frame))
    axes.set_title(grid.label, color=TEXT, fontsize=11)
    for axis, name, values in zip((axes.yaxis, axes.xaxis), grid.names, grid.values, strict=True):
        axis.set_ticks(range(len(values)), [f"{float(f'{value:.3g}'):g}" for value in values])
        axis.set_label_text(name, color=TEXT)
    axes.tick_params(length=0, colors=TEXT, labelsize=8)
    axes.spines[:].set_visible(False)


def _styles(labels: Sequence[str]) -> dict[str, Any]:
    """A colour for all labels that are the same up to a comma, and dashes to tell them apart."""
    families: dict[str, list[str]] = {}
    for label in labels:
        families.setdefault(label.split(",")[0], []).append(label)
    return {
        label: {
            "color": COLOURS[colour % len(COLOURS)],
            "linestyle": DASHES[dashes % len(DASHES)],
        }
        for colour, family in enumerate(families.values())
        for dashes, label in enumerate(family)
    }


def _panels(title: str, count: int = 2, sharey: bool = True) -> tuple[Figure, Sequence[Axes]]:
    """A figure with panels beside each other."""
    figure = Figure(figsize=(5 * count, 4.4), layout="constrained")
    figure.suptitle(_wrapped(title, 55 * count), color=TEXT, fontsize=11, x=0.01, ha="left")
    panels = list(figure.subplots(1, count, sharey=sharey, squeeze=False)[0])
    for axes in panels:
        _style(axes)
    return figure, panels


def plot_images(rows: Mapping[str, Float[np.ndarray, "images 784"]], path: Path) -> None:
    """Rows of images, each row with its name on the left."""
    # One picture of all, since an axes for each image takes seconds to lay out.
    tiles = np.stack([images.reshape(-1, 28, 28) for images in rows.values()])
    padded = np.pad(tiles, ((0, 0), (0, 0), (GAP, GAP), (GAP, GAP)), constant_values=np.nan)
    count, columns, side, _ = padded.shape
    mosaic = padded.transpose(0, 2, 1, 3).reshape(count * side, columns * side)

    figure = Figure(figsize=(0.8 * columns + 1.4, 0.8 * count), layout="constrained")
    axes = figure.subplots()
    axes.imshow(
        mosaic, cmap=matplotlib.colormaps["gray_r"].with_extremes(bad=FAINT), vmin=0, vmax=1
    )
    axes.set(xticks=[], yticks=[(row + 0.5) * side - 0.5 for row in range(count)])
    axes.set_yticklabels(rows, color=TEXT, fontsize=11)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.savefig(path, dpi=150)


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(TEXT)
    axes.tick_params(colors=TEXT)
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)


def _label_ends(axes: Axes, ends: Mapping[str, tuple[float, float, str]]) -> None:
    """Write each curve's name beside its end, pushed upwards where two would overlap."""
    axes.margins(x=0.02)
    left, right = axes.get_xlim()
    scale = axes.yaxis.get_transform().transform
    low, high = scale(axes.get_ylim())
    placed: list[tuple[float, float, float]] = []
    for label, (x, y, colour) in sorted(ends.items(), key=lambda item: item[1][1]):
        end = x + LETTER_WIDTH * len(label) * (right - left)
        floors = [at + LABEL_GAP for start, stop, at in placed if x < stop and start < end]
        height = max([(float(scale(y)) - low) / (high - low), *floors])
        placed.append((x, end, height))
        axes.annotate(
            label,
            (x, height),
            xycoords=("data", "axes fraction"),
            xytext=(7, 0),
            textcoords="offset points",
            color=colour,
            fontsize=10,
            fontweight="bold",
            va="center",
            annotation_clip=False,
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )


def _wrapped(title: str, width: int) -> str:
    return "\n".join(textwrap.wrap(title, width))
