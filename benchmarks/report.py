"""What a comparison prints and writes: the progress bar, the final table, the curves as JSON."""

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

from benchmarks.steps import Batch, count_examples
from benchmarks.training import EVALUATION_EXAMPLES, Run


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
        bar_format="{desc:<17}{percentage:3.0f}%|{bar:24}|{n_fmt}/{total_fmt} steps"
        " [{elapsed}<{remaining}]{postfix}",
    ) as bar:

        def on_loss(loss: float) -> None:
            times.append(time.perf_counter())
            shown = f"loss {loss:.1f}"
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


def table(runs: Sequence[Run]) -> str:
    """One line per method; a run that ended early shows its last finished epoch, and why."""
    header = ("method", "training loss", "test loss", "seconds", "s/step", "compile s", "")
    rows = [header, *(_row(run) for run in runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
            + [row[-1]]
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * (sum(widths[:-1]) + 2 * (len(header) - 2)), *lines[1:]])


def _row(run: Run) -> tuple[str, ...]:
    last = run.curve[-1]
    note = f"{run.stopped}; shown: epoch {last.epoch}" if run.stopped else ""
    return (
        run.label,
        f"{last.train_loss:.2f}",
        "-" if last.test_loss is None else f"{last.test_loss:.2f}",
        f"{last.seconds:.1f}",
        f"{last.seconds / last.step:.3f}" if last.step else "-",
        f"{run.compile_seconds:.1f}",
        note,
    )


def results(runs: Sequence[Run], settings: Mapping[str, Any]) -> dict[str, Any]:
    """All that a plot or a later comparison needs, for `write_json`."""
    device = jax.devices()[0]
    return {
        "settings": dict(settings),
        "machine": {"jax": jax.__version__, "device": device.device_kind},
        "runs": {
            run.method: {
                "label": run.label,
                "hyperparameters": dict(run.hyperparameters),
                "stopped": run.stopped,
                "compile_seconds": run.compile_seconds,
                "curve": [record._asdict() for record in run.curve],
                "step_losses": run.step_losses,
            }
            for run in runs
        },
    }
