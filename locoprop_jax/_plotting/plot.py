"""Pictures of a model's layers and of the spectra of their inputs. They need Matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.core import Tracer

from locoprop_jax._checks import check_layers, check_not_negative
from locoprop_jax._layers import table
from locoprop_jax._layers.captured import Captured, check_captured
from locoprop_jax._layers.layers import Layers
from locoprop_jax._neurons.amortised import is_too_large, row_limit
from locoprop_jax._neurons.length import DAMPING
from locoprop_jax._neurons.second_moment import Damping
from locoprop_jax._plotting import spectrum as _spectrum
from locoprop_jax._plotting.spectrum import Spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {
    "dense": "#0072B2",
    "conv": "#56B4E9",
    "embedding": "#009E73",
    "tied": "#CC79A7",
    "scale": "#E69F00",
    "bias": "#D55E00",
}
INK, SOFT, FAINT = "#333333", "#7F7F7F", "#E4E4E4"
PANELS, COLUMNS, LETTERS = 12, 4, 34
DECADES = 9  # below the largest eigenvalue, where rounding begins


def layers(layers: Layers, *, fold: bool | None = None) -> Figure:
    """Draw each layer's parameters, in the order the data meets the layers.

    A bar is how many numbers a layer's kernel and bias hold, its colour the kind of layer. A
    diamond is how many the second moment of its inputs holds, which `foof` and `kfac` keep. Layers
    that share a line have one bar for all of them.

    Args:
      layers: from `find_layers`.
      fold: whether layers that differ in the numbers of their names alone share a line, as for
        `Layers.table`.

    Returns:
      A Matplotlib figure, made by `pyplot`.

    Raises:
      ValueError: `layers` are not from `find_layers`.
      ModuleNotFoundError: Matplotlib is missing.
    """
    check_layers(layers, "plot.layers")
    about = layers.to_dict()
    records = about["layers"]
    shapes = [(record["kind"], table.shape_text(record)) for record in records]
    folded = table.is_large(about) if fold is None else fold
    lines = table.folds([record["name"] for record in records], shapes, folded)

    figure, axes = _pyplot().subplots(
        figsize=(9, 1.2 + 0.24 * len(lines)), layout="constrained", squeeze=True
    )
    for y, line in enumerate(lines):
        kind, shape = shapes[line.members[0]]
        own = [records[index] for index in line.members]
        axes.barh(y, sum(o["size"] for o in own), color=COLOURS[kind], height=0.72, label=kind)
        kept = sum(map(_kept, own))
        if kept:
            axes.plot(kept, y, "D", color=INK, markersize=4, label="second moment of its inputs")
        times = f"{len(own)} times " if len(own) > 1 else ""
        axes.annotate(
            times + shape,
            (1.01, y),
            xycoords=axes.get_yaxis_transform(),
            va="center",
            color=SOFT,
            fontsize=8,
        )
    axes.set_yticks(range(len(lines)), [line.name for line in lines], fontsize=8)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.set_xlim(left=1)
    axes.set_xlabel("numbers")
    axes.set_title(f"{len(records)} layers, {about['size']:,} parameters", loc="left", fontsize=10)
    axes.grid(axis="x", color=FAINT)
    _plain(axes)
    _legend(figure, dict(_labelled(axes)))
    return figure


def spectra(
    layers: Layers,
    captured: Captured,
    *,
    names: Sequence[str] | None = None,
    damping: float = DAMPING,
    relative: bool = True,
) -> Figure:
    """Draw the eigenvalues of the second moment X'X / N of each layer's inputs, for one batch.

    They are those of the matrix that `foof` damps and inverts. A layer with a bias has a second,
    solid line: the bias takes up the mean of the inputs, so that the kernel's own eigenvalues are
    those about the mean. What lies in the shaded region is below the damping, and moves as under a
    gradient step. A panel's title has the effective rank, the exponential of the entropy of the
    eigenvalues' shares, and how many directions stand out of the damping lambda, the sum of
    s / (s + lambda). The layers of a stack have a line each; their numbers are means.

    Args:
      layers: from `find_layers`.
      captured: of the batch, from `value_grad_and_capture`.
      names: of the layers to draw, None for all with more than one input. Of more than 12 such
        layers, 12 are drawn, evenly spread.
      damping: lambda, as for `foof`.
      relative: whether it is in units of the inputs' mean variance, as for `foof`.

    Returns:
      A Matplotlib figure, made by `pyplot`, with a panel for each layer.

    Raises:
      ValueError: `layers` are not from `find_layers`, `captured` is of another model or traced by
        `jax.jit`, `names` has none or has a layer that has no spectrum, or the damping is negative.
      TypeError: `captured` is missing.
      ModuleNotFoundError: Matplotlib is missing.

    References:
      O. Roy, M. Vetterli: The effective rank: a measure of effective dimensionality, 2007.
    """
    check_layers(layers, "plot.spectra")
    check_not_negative(damping=damping)
    captured = check_captured(layers, captured, "plot.spectra")
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(captured)):
        raise ValueError(
            "`plot.spectra` draws numbers, but `captured` is traced: return it from the function "
            "that `jax.jit` compiles, and draw it outside."
        )
    chosen = _chosen(layers, names)
    pyplot = _pyplot()
    found = _spectrum.spectra(layers, captured, chosen, Damping(damping, relative, False))

    columns = min(COLUMNS, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    figure, panels = pyplot.subplots(
        rows,
        columns,
        figsize=(max(3.1 * columns, 4.6), 2.5 * rows + 0.5),
        layout="constrained",
        squeeze=False,
    )
    for axes, name in zip(panels.flat, chosen, strict=False):
        _draw(axes, name, found[name])
    for axes in panels.flat[len(chosen) :]:
        axes.set_axis_off()
    _legend(figure, {label: own for axes in panels.flat for label, own in _labelled(axes)})
    return figure


def _chosen(layers: Layers, names: Sequence[str] | None) -> list[str]:
    having = [name for name, layer in layers.items() if _spectrum.has_spectrum(layer)]
    if names is None:
        if len(having) <= PANELS:
            chosen = having
        else:
            places = np.linspace(0, len(having) - 1, PANELS).round().astype(int)
            chosen = [having[place] for place in places]
    else:
        chosen = [names] if isinstance(names, str) else list(names)
    without = [name for name in chosen if name not in having]
    if without or not chosen:
        raise ValueError(
            f"`plot.spectra` has no spectrum to draw{' of ' if without else ''}"
            f"{', '.join(map(repr, without))}. Layers with more than one input: "
            f"{', '.join(having) or 'none'}."
        )
    return chosen


def _draw(axes: Axes, name: str, own: Spectrum) -> None:
    """One panel."""
    d_in = own.second.shape[-1]
    index = np.arange(1, d_in + 1)
    has_bias = own.centred is not None
    lines = [("eigenvalues of X'X / N", own.second, "dense", ":" if has_bias else "-")]
    if own.centred is not None:
        lines.append(("about the mean, with a bias", own.centred, "bias", "-"))
    for label, eigenvalues, colour, dash in lines:
        each = eigenvalues.reshape(-1, d_in)
        axes.plot(
            index,
            _positive(each).T,
            dash,
            color=COLOURS[colour],
            alpha=1 if len(each) == 1 else 0.4,
            linewidth=1,
            marker="." if d_in < 100 else "",
            markersize=3,
            label=label,
        )
    damping = float(own.damping.mean())
    places = np.append(own.second, damping)
    places = places[places > 0] if places.any() else np.ones(1)
    top = places.max()
    bottom = max(top * 10.0**-DECADES, places.min() / 10)
    axes.set(yscale="log", ylim=(bottom, 3 * top))
    if d_in > 20:
        axes.set(xscale="log", xlim=(0.9, 1.1 * d_in))
    else:
        axes.set(xlim=(0.5, d_in + 0.5), xticks=index[:: max(1, d_in // 5)])
    if damping:
        axes.axhspan(bottom, damping, color=FAINT, zorder=0, linewidth=0, label="below the damping")
    rank = float(own.effective_rank.mean())
    axes.axvline(rank, color=INK, linewidth=0.8, linestyle="--", label="effective rank")
    axes.set_title(
        f"{_short(name)}\neffective rank {rank:.1f} of {d_in}, {own.undamped.mean():.1f} undamped",
        fontsize=8,
        loc="left",
    )
    axes.tick_params(labelsize=7)
    _plain(axes)


def _labelled(axes: Axes) -> list[tuple[str, Any]]:
    handles, labels = axes.get_legend_handles_labels()
    return list(zip(labels, handles, strict=True))


def _legend(figure: Figure, handles: dict[str, Any]) -> None:
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
        fontsize=8,
    )


def _short(name: str) -> str:
    """What fits over a panel: the end of a name is what tells it from the others."""
    return name if len(name) <= LETTERS else f"…{name[-LETTERS:]}"


def _positive(values: np.ndarray) -> np.ndarray:
    """Zeros are left out: a logarithm has no place for them."""
    return np.where(values > 0, values, np.nan)


def _kept(record: table.Record) -> int:
    """The numbers in a layer's second moment; none for what has a single input."""
    d_in = record["d_in"]
    is_diagonal = record["kind"] == "embedding" or is_too_large(d_in, row_limit(None))
    return (record["stack"] or 1) * (d_in if is_diagonal else d_in**2) if d_in > 1 else 0


def _plain(axes: Axes) -> None:
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "`locoprop_jax.plot` draws with Matplotlib: pip install matplotlib", name=error.name
        ) from error
    return pyplot
