"""Methods with several settings each: train all, and hold the best against what a paper says."""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from benchmarks.shared import plots, report
from benchmarks.shared.comparison import Job, train_all
from benchmarks.shared.contestants import Contestant
from benchmarks.shared.data import Dataset
from benchmarks.shared.results import write_json
from benchmarks.shared.steps import count_examples
from benchmarks.shared.training import Problem, Run, Settings

WINDOW = 10  # updates that a loss is averaged over (practical GN, Figure 2)

Groups = Mapping[str, Sequence[Run]]  # by method, its runs from the best to the worst


class Candidate(NamedTuple):
    """A run to be done; of those of one group the best is shown."""

    group: str
    job: Job


class Claim(NamedTuple):
    """What a paper says, and what was found here."""

    paper: str
    found: str


class Experiment(NamedTuple):
    """What the command line runs.

    Attributes:
      title: of its plots.
      run: (this, images, arguments, folder) -> whether Ctrl-C cut it short.
      epochs, shrink, trials: unless the command line has them: passes over the images, what all
        widths are divided by, and settings to try with each method.
      labels: whether the images need theirs.
    """

    title: str
    run: Callable[["Experiment", Dataset, argparse.Namespace, Path], bool]
    epochs: int
    shrink: int = 1
    trials: int = 3
    labels: bool = False


def candidate(
    contestant: Contestant,
    rate: float,
    problem: Problem,
    settings: Settings,
    name: str | None = None,
) -> Candidate:
    """A method with one learning rate. A batch is no larger than the training set."""
    name = name or f"{contestant.label}, {rate:.3g}"
    batch_size = min(settings.batch_size, count_examples(problem.train))
    method = contestant.method()._replace(label=name)
    settings = settings._replace(batch_size=batch_size)
    return Candidate(
        contestant.label, Job(name, method, {"learning_rate": rate}, problem, settings)
    )


def train_candidates(
    candidates: Iterable[Candidate], directory: Path, settings: Mapping[str, Any]
) -> tuple[Groups, bool]:
    """Train all and keep results.json up to date; the runs, and whether Ctrl-C cut them short."""
    planned = list(candidates)
    group_of = {candidate.job.name: candidate.group for candidate in planned}

    def keep(runs: Sequence[Run]) -> None:
        write_json(directory / "results.json", report.results(runs, settings))
        jax.clear_caches()  # each run compiles a step of its own

    runs, interrupted = train_all((candidate.job for candidate in planned), keep)
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=final_loss):
        groups.setdefault(group_of[run.method], []).append(run)
    order = [group for group in dict.fromkeys(group_of.values()) if group in groups]
    return {group: groups[group] for group in order}, interrupted


def final_loss(run: Run) -> float:
    """The training loss at the end; infinite for a run that did not get there."""
    return float("inf") if run.stopped else run.curve[-1].train_loss


def best(groups: Groups) -> dict[str, Run]:
    """The best run of each method that finished one."""
    return {name: runs[0] for name, runs in groups.items() if not runs[0].stopped}


def smoothed(run: Run) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """The updates taken and the batches' losses, averaged over the last ten of them."""
    window = max(1, min(WINDOW, len(run.step_losses)))
    losses = np.convolve(run.step_losses, np.full(window, 1 / window), "valid")
    return np.arange(window, len(run.step_losses) + 1, dtype=float), losses


def seconds_at(run: Run, updates: Float[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
    """When these updates were done, from the times at the ends of the epochs."""
    return np.interp(
        updates, [record.step for record in run.curve], [record.seconds for record in run.curve]
    )


def lines(runs: Mapping[str, Run]) -> list[plots.Line]:
    """The smoothed losses, for a plot."""
    smooth = {name: smoothed(run) for name, run in runs.items()}
    return [
        plots.Line(name, (updates, seconds_at(runs[name], updates)), losses)
        for name, (updates, losses) in smooth.items()
    ]


def reached(run: Run, loss: float) -> tuple[int, float] | None:
    """The updates and seconds until the smoothed loss is this low; None if it never is."""
    updates, losses = smoothed(run)
    below = np.flatnonzero(losses <= loss)
    if not len(below):
        return None
    at = updates[below[:1]]
    return int(at[0]), float(seconds_at(run, at)[0])


def race(runs: Mapping[str, Run], runner: str, rival: str) -> str:
    """How soon one method is where another ends, in words."""
    if runner not in runs or rival not in runs:
        return f"{runner} or {rival} did not finish"
    target = smoothed(runs[rival])[1][-1]
    own, other = reached(runs[runner], target), runs[rival].curve[-1]
    if own is None:
        return f"{runner} does not get to where {rival} ends ({target:.4g})"
    return (
        f"{runner} is where {rival} ends ({target:.4g}) after {own[0]} of {other.step} updates and "
        f"{own[1]:.3g} of {other.seconds:.3g} s"
    )


def ends(runs: Mapping[str, Run]) -> str:
    """The methods' final training losses, the best first, in words."""
    ordered = sorted(runs.items(), key=lambda item: final_loss(item[1]))
    return ", ".join(f"{name} {final_loss(run):.4g}" for name, run in ordered)


def conclude(
    groups: Groups,
    claims: Sequence[Claim],
    directory: Path,
    settings: Mapping[str, Any],
    more: Mapping[str, Any] | None = None,
) -> None:
    """Print the best runs' table and the claims, and write everything to results.json."""
    runs = [run for group in groups.values() for run in group]
    shown = [group[0] for group in groups.values()]
    if shown:
        print(f"\nThe best of each method:\n\n{report.table(shown)}\n")
    print_claims(claims)
    content = report.results(runs, settings) | (dict(more) if more else {})
    content["claims"] = [claim._asdict() for claim in claims]
    write_json(directory / "results.json", content)
    print(f"\nWrote the numbers and plots to {directory}.", flush=True)


def print_claims(claims: Sequence[Claim]) -> None:
    for claim in claims:
        print(f"Paper: {claim.paper}\nHere:  {claim.found}")


def describe(
    name: str, dataset: Dataset, args: argparse.Namespace, **others: Any
) -> dict[str, Any]:
    """The settings of an experiment, for the record."""
    return {
        "experiment": f"gauss_newton/{name}",
        "dataset": dataset.name,
        "train_images": len(dataset.train),
        "epochs": args.epochs,
        "shrink": args.shrink,
        "trials": args.trials,
        "seed": args.seed,
        **others,
    }
