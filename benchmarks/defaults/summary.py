"""From stored runs to tables: losses by problem and method, and how many problems meet each goal.

The same as Markdown and as JSON.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.defaults.choice import adam_in_time, chosen, mean_loss
from benchmarks.defaults.contestants import ADAM, CONTESTANTS, Contestant
from benchmarks.defaults.goals import GOALS, Comparison, Rows, compare_all, comparison_of, factor
from benchmarks.defaults.problems import PROBLEMS
from benchmarks.defaults.runs import Row, read

LOSSES = {"train_loss": "training loss", "test_loss": "test loss"}


def load_rows(directory: Path) -> Rows:
    """The stored runs of each problem, without those from when it had another number of steps."""
    stored = {name: read(directory / f"{name}.csv") for name in PROBLEMS}
    return {
        name: [row for row in rows if row.steps == rows[-1].steps]
        for name, rows in stored.items()
        if rows
    }


def tables(rows: Rows) -> str:
    """All tables, as Markdown."""
    methods = shown(rows)
    parts = []
    for loss, what in LOSSES.items():
        header = ["problem", *(contestant.label for contestant in methods)]
        cells = [_losses_line(name, of_problem, methods, loss) for name, of_problem in rows.items()]
        title = f"## {what.capitalize()}\n\nAt equal steps. Bold: at or below tuned Adam."
        parts.append(f"{title}\n\n{_markdown(header, cells)}")
    ours = [contestant for contestant in methods if not contestant.tuned_by]
    header = ["problem", *(contestant.label for contestant in ours)]
    cells = [
        [name, *(_in_time_cell(of_problem, contestant) for contestant in ours)]
        for name, of_problem in rows.items()
    ]
    parts.append(
        "## Equal seconds\n\nHow many times the method's steps Adam takes in its time, and Adam's "
        f"training and test loss then. Bold: the method is ahead.\n\n{_markdown(header, cells)}"
    )
    parts.append(_goals(rows, ours))
    return "\n\n".join(parts)


def shown(rows: Rows) -> list[Contestant]:
    """The contestants that have run anywhere."""
    ran = {row.method for of_problem in rows.values() for row in of_problem}
    return [contestant for name, contestant in CONTESTANTS.items() if name in ran]


def refusal(rows: Sequence[Row], contestant: Contestant) -> str | None:
    """Why a method did not run; None where it did."""
    return next((r.refused for r in rows if r.method == contestant.name and r.refused), None)


def _losses_line(
    name: str, rows: Sequence[Row], methods: Sequence[Contestant], loss: str
) -> list[str]:
    adam = mean_loss(rows, CONTESTANTS[ADAM], loss)
    cells = []
    for contestant in methods:
        own = mean_loss(rows, contestant, loss)
        comparison = comparison_of(own, adam)
        bold = contestant.name != ADAM and comparison is not None and comparison.met
        refused = own is None and refusal(rows, contestant)
        cells.append("refused" if refused else _bold(_number(own), bold))
    return [name, *cells]


def _in_time_cell(rows: Sequence[Row], contestant: Contestant) -> str:
    adam = adam_in_time(rows, contestant.name)
    if adam is None:
        return "-"
    losses = []
    for loss in LOSSES:
        comparison = GOALS[f"{loss}_in_time"].compare(rows, contestant)
        met = comparison is not None and comparison.met
        losses.append(_bold(_number(getattr(adam, loss)), met))
    return f"{adam.ratio:g}: {' / '.join(losses)}"


def _goals(rows: Rows, ours: Sequence[Contestant]) -> str:
    """How many problems meet each goal, and which do not, by how much."""
    compared = compare_all(rows)
    counts = [
        [contestant.label, *(_count(compared[contestant.name][key]) for key in GOALS)]
        for contestant in ours
    ]
    header = ["problems with", *(goal.what for goal in GOALS.values())]
    missed = [
        f"- {contestant.label}, {goal.what}: {misses}"
        for contestant in ours
        for key, goal in GOALS.items()
        if (misses := _misses(compared[contestant.name][key]))
    ]
    lines = "\n".join(missed) or "none"
    return f"## Goals\n\n{_markdown(header, counts)}\n\n## Missed, and by how much\n\n{lines}"


def _count(comparisons: Mapping[str, Comparison]) -> str:
    met = sum(comparison.met for comparison in comparisons.values())
    return f"{met} of {len(comparisons)}" if comparisons else "-"


def _misses(comparisons: Mapping[str, Comparison]) -> str:
    return ", ".join(
        f"{problem} ({_excess(comparison)})"
        for problem, comparison in comparisons.items()
        if not comparison.met
    )


def _excess(comparison: Comparison) -> str:
    above = factor(comparison.loss, comparison.other) - 1
    if above < 1:
        return f"+{100 * above:.2g}%"
    return f"{1 + above:.3g} times" if math.isfinite(above) else "diverged"


def _number(loss: float | None) -> str:
    if loss is None:
        return "-"
    return f"{loss:.3g}" if math.isfinite(loss) else "diverged"


def _bold(text: str, bold: bool) -> str:
    return f"**{text}**" if bold else text


def _markdown(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- the same as JSON ----------------------------------------------------------------------------


def results(rows: Rows) -> dict[str, Any]:
    """All that the tables say, for `write_json`."""
    return {
        "problems": {
            name: {
                "steps": of_problem[0].steps,
                "methods": {
                    contestant.name: _results_of(of_problem, contestant)
                    for contestant in shown(rows)
                },
            }
            for name, of_problem in rows.items()
        },
        "goals": {
            method: {
                key: {
                    "met": sum(comparison.met for comparison in comparisons.values()),
                    "of": len(comparisons),
                    "missed": {
                        problem: {"loss": _plain(each.loss), "other": _plain(each.other)}
                        for problem, each in comparisons.items()
                        if not each.met
                    },
                }
                for key, comparisons in goals.items()
            }
            for method, goals in compare_all(rows).items()
        },
    }


def _results_of(rows: Sequence[Row], contestant: Contestant) -> dict[str, Any]:
    result: dict[str, Any] = {
        loss: {
            "setting": chosen(rows, contestant, loss),
            "mean": _plain(mean_loss(rows, contestant, loss)),
        }
        for loss in LOSSES
    }
    adam = None if contestant.tuned_by else adam_in_time(rows, contestant.name)
    if adam is not None:
        result["adam_in_time"] = {name: _plain(value) for name, value in adam._asdict().items()}
    return result | {"refused": refusal(rows, contestant)}


def _plain(value: float | None) -> float | str | None:
    """JSON has no infinity."""
    return value if value is None or math.isfinite(value) else "diverged"
