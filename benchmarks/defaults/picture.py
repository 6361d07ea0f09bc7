"""Performance profiles: how often each method is within a factor of the best one.

They are the AlgoPerf benchmark's way to show many methods on many problems (Dahl et al., 2023), of
losses here and not of seconds. A method that refused a problem is within no factor there.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter

from benchmarks.defaults.choice import mean_loss
from benchmarks.defaults.contestants import Contestant
from benchmarks.defaults.goals import Rows, factor
from benchmarks.defaults.summary import LOSSES, shown
from benchmarks.shared.plots import COLOURS, FAINT, TEXT

WIDEST = 4.0  # the largest factor in the picture
TICKS = (1, 1.5, 2, 3, 4)


def plot_profiles(rows: Rows, path: Path) -> None:
    """Profiles of the training losses and of the test losses beside each other."""
    contestants = shown(rows)
    figure = Figure(figsize=(11.5, 4.6), layout="constrained")
    title = f"Our methods at their defaults (solid) and tuned rivals (dashed), {len(rows)} problems"
    figure.suptitle(title, color=TEXT, fontsize=11, x=0.01, ha="left")
    panels = figure.subplots(1, len(LOSSES), sharey=True)
    for axes, (loss, what) in zip(panels, LOSSES.items(), strict=True):
        _draw(axes, factors(rows, contestants, loss), _looks(contestants))
        axes.set_xlabel(f"factor of the best method's {what}", color=TEXT)
    panels[0].set_ylabel("share of problems within the factor", color=TEXT)
    panels[-1].legend(
        loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=9, labelcolor=TEXT
    )
    figure.savefig(path, dpi=150)


def factors(
    rows: Rows, contestants: Sequence[Contestant], loss: str
) -> dict[str, Float[np.ndarray, " problems"]]:
    """For each label the factors of the best, over the problems that have such losses, sorted."""
    found: dict[str, list[float]] = {contestant.label: [] for contestant in contestants}
    for of_problem in rows.values():
        losses = {each.label: mean_loss(of_problem, each, loss) for each in contestants}
        finite = [own for own in losses.values() if own is not None and math.isfinite(own)]
        if finite:
            for label, own in losses.items():
                found[label].append(math.inf if own is None else factor(own, min(finite)))
    return {label: np.sort(values) for label, values in found.items()}


def _draw(
    axes: Axes,
    profiles: Mapping[str, Float[np.ndarray, " problems"]],
    looks: Mapping[str, Mapping[str, Any]],
) -> None:
    for label, sorted_factors in profiles.items():
        within = sorted_factors[sorted_factors <= WIDEST]
        shares = np.arange(1, len(within) + 1) / max(1, len(sorted_factors))
        x = np.concatenate([[1.0], within, [WIDEST]])
        y = np.concatenate([[0.0], shares, shares[-1:] if len(shares) else [0.0]])
        axes.step(x, y, where="post", label=label, **looks[label])
    axes.set_xscale("log")
    axes.set_xlim(1, WIDEST)
    axes.set_ylim(0, 1.02)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(TEXT)
    axes.tick_params(colors=TEXT)
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)


def _looks(contestants: Sequence[Contestant]) -> dict[str, dict[str, Any]]:
    """Colours for our methods and, again, for the rivals, which dashes tell apart."""
    looks = {}
    for tuned, dashes, width in ((False, "-", 2.0), (True, "--", 1.4)):
        group = [each for each in contestants if bool(each.tuned_by) == tuned]
        for i, each in enumerate(group):
            looks[each.label] = {
                "color": COLOURS[i % len(COLOURS)],
                "linestyle": dashes,
                "linewidth": width,
            }
    return looks
