"""The picture: the error of each method against seconds and against steps, problem by problem."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks.physics.training import Curve
from benchmarks.shared.plots import COLOURS, DASHES


def plot_errors(curves: Mapping[str, Mapping[str, Curve]], path: Path) -> None:
    """A row of two panels for each problem.

    Args:
      curves: by problem and label.
      path: where the picture goes.
    """
    labels = list(dict.fromkeys(label for of in curves.values() for label in of))
    figure, panels = plt.subplots(
        len(curves), 2, figsize=(10, 2.9 * len(curves) + 0.6), squeeze=False, layout="constrained"
    )
    for (problem, of), (by_seconds, by_steps) in zip(curves.items(), panels, strict=True):
        for label, curve in of.items():
            number = labels.index(label)
            look = {
                "color": COLOURS[number % len(COLOURS)],
                "linestyle": DASHES[number // len(COLOURS)],
                "label": label,
                "linewidth": 1.5,
            }
            by_seconds.plot(curve.seconds[1:], curve.errors[1:], **look)
            by_steps.plot(curve.steps[1:], curve.errors[1:], **look)
        for panel, unit in ((by_seconds, "seconds"), (by_steps, "steps")):
            panel.set(xscale="log", yscale="log", xlabel=unit, title=problem)
            panel.grid(color="#EEEEEE")
        by_seconds.set_ylabel("relative L2 error")
        top = max(curve.errors[0] for curve in of.values())
        for panel in (by_seconds, by_steps):
            panel.set_ylim(top=3 * top)
    handles, names = [], []
    for panel in panels[:, 0]:
        for handle, name in zip(*panel.get_legend_handles_labels(), strict=True):
            if name not in names:
                handles.append(handle)
                names.append(name)
    figure.legend(handles, names, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
