"""What a comparison prints and writes: the progress bar, the final table, the curves as JSON."""

import argparse
import contextlib
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import jax
from tqdm import tqdm

from benchmarks.shared.data import Dataset
from benchmarks.shared.steps import Batch, count_examples
from benchmarks.shared.training import EVALUATION_EXAMPLES, Run


@contextlib.contextmanager
def progress(label: str, steps: int) -> Iterator[Callable[[float], None]]:
    """A bar over a method's steps, with the last loss and the median time of recent steps.

    Yields what to call with each step's loss. Where nobody watches (a log file), the bar speaks up
    every half minute only.
    """
    times: deque[float] = deque(maxlen=12)
    with tqdm(
        total=steps,
        desc=label,
        mininterval=0.2 if sys.stderr.isatty() else 30.0,
        bar_format="{desc:<16} {percentage:3.0f}%|{bar:24}|{n_fmt}/{total_fmt} steps"
        " [{elapsed}<{remaining}]{postfix}",
    ) as bar:

        def on_loss(loss: float) -> None:
            times.append(time.perf_counter())
            shown = f"loss {loss:#.4g}"
            if len(times) > 1:
                # The median passes over the gaps in which the loss was evaluated.
                spent = statistics.median(later - at for at, later in pairwise(times))
                shown += f", {1000 * spent:.0f} ms/step"
            bar.set_postfix_str(shown, refresh=False)
            bar.update()

        yield on_loss


def evaluated_on(examples: Batch) -> str:
    """How many examples a loss is measured on, in words."""
    count = count_examples(examples)
    limited = count > EVALUATION_EXAMPLES
    return f"the first {EVALUATION_EXAMPLES:,} of {count:,}" if limited else f"all {count:,}"


def settings(
    experiment: str,
    dataset: Dataset,
    args: argparse.Namespace,
    options: Sequence[str],
    splits: Sequence[str] = ("train", "test"),
) -> dict[str, Any]:
    """What an experiment was run with, for the record: the data, these options, its losses."""
    return {
        "experiment": experiment,
        "dataset": dataset.name,
        "source": dataset.source,
        "train_images": args.train_images,
        **{option: getattr(args, option) for option in options},
        **{f"{split}_loss_on": evaluated_on(getattr(dataset, split)) for split in splits},
    }


def table(runs: Sequence[Run], more: Mapping[str, Sequence[str]] | None = None) -> str:
    """One line per method; a run that ended early shows its last finished epoch, and why.

    Args:
      runs: the methods' runs.
      more: title -> cells, one for each run: further columns after the losses.
    """
    more = more or {}
    header = ("method", "training loss", "test loss", *more, "seconds", "s/step", "compile s")
    extra = zip(*more.values(), strict=True) if more else [()] * len(runs)
    rows = [_row(run, cells) for run, cells in zip(runs, extra, strict=True)]
    return aligned(header, rows, [_note(run) for run in runs])


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """A text table: the first column is flush left, the others right, notes stand after them."""
    notes = notes or [""] * len(rows)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(row: Sequence[str], note: str = "") -> str:
        first, *rest = zip(row, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
        return "  ".join([*cells, note]).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    lines = [line(row, note) for row, note in zip(rows, notes, strict=True)]
    return "\n".join([line(header), rule, *lines])


def _note(run: Run) -> str:
    return f"{run.stopped}; shown: epoch {run.curve[-1].epoch}" if run.stopped else ""


def _row(run: Run, more: Sequence[str]) -> tuple[str, ...]:
    last = run.curve[-1]
    return (
        run.label,
        f"{last.train_loss:#.5g}",
        "-" if last.test_loss is None else f"{last.test_loss:#.5g}",
        *more,
        f"{last.seconds:.1f}",
        f"{last.seconds / last.step:.3f}" if last.step else "-",
        f"{run.compile_seconds:.1f}",
    )


def machine() -> dict[str, str]:
    return {"jax": jax.__version__, "device": jax.devices()[0].device_kind}


def results(
    runs: Sequence[Run],
    settings: Mapping[str, Any],
    more: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """All that a plot or a later comparison needs, for `write_json`; `more` by the runs' names."""
    more = more or {}
    return {
        "settings": dict(settings),
        "machine": machine(),
        "runs": {
            run.method: {
                "label": run.label,
                "hyperparameters": dict(run.hyperparameters),
                "stopped": run.stopped,
                "compile_seconds": run.compile_seconds,
                "curve": [record._asdict() for record in run.curve],
                "step_losses": run.step_losses,
                **more.get(run.method, {}),
            }
            for run in runs
        },
    }
