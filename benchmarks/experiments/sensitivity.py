"""How much the two numbers of each method that matter most do matter.

    python -m benchmarks sensitivity [METHOD ...]

trains a narrow deep autoencoder with each method, or with those named, for every cell of a grid
around the method's defaults, a factor of sqrt(10) from one cell to the next: minutes on two CPU
cores. It prints two tables, and writes results.json and sensitivity.png to out/sensitivity/.
"""

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from benchmarks.shared import autoencoder, cli, plots, report
from benchmarks.shared.contestants import rates
from benchmarks.shared.data import Dataset
from benchmarks.shared.methods import METHODS, Hyperparameters, Method
from benchmarks.shared.results import write_json
from benchmarks.shared.steps import (
    Numbers,
    compile_family,
    count_examples,
    interrupt_deferred,
    slice_examples,
    split_learning_rate,
    warmup_linear_decay,
)
from benchmarks.shared.training import (
    EVALUATION_EXAMPLES,
    NonFiniteLoss,
    Problem,
    Settings,
    epoch_batches,
    make_evaluation,
    run_epoch,
)

NAME = "sensitivity"
DEFAULTS = {"epochs": 3, "train_images": 5000, "batch_size": 500}
QUICK = {"epochs": 1, "train_images": 400, "batch_size": 50, "shrink": 16, "side": 3}
PER_TEN = 2  # cells that make a factor of ten
TOLERANCE = 0.1  # what counts as near the best


class Setup(NamedTuple):
    """What is varied of a method, and what is not.

    Attributes:
      defaults: of the two numbers that matter most.
      fixed: the others that its `build` takes.
    """

    defaults: Mapping[str, float]
    fixed: Hyperparameters


# The papers' own parameters, as `benchmarks.shared.paper` has them; the local learning rate is one
# of those that `tune` starts with.
LOCAL = {"one_minus_beta1": 0.1, "one_minus_beta2": 0.1, "eps": 1e-6, "iterations": 10}
LOCAL_RATE = 1e-4

SETUPS: Mapping[str, Setup] = {
    "foof": Setup({"learning_rate": 4.0, "damping": 10.0}, {}),
    "lnb": Setup({"learning_rate": 4.0, "ridge": 10.0}, {}),
    "kfac": Setup({"step_damping": 0.1, "damping": 0.3}, {"learning_rate": 1.0}),
    "locoprop_s": Setup({"learning_rate": LOCAL_RATE, "gamma": 100.0}, LOCAL),
    "locoprop_m": Setup({"learning_rate": LOCAL_RATE, "gamma": 100.0}, LOCAL),
    "adam": Setup(
        {"learning_rate": 1e-3, "eps": 1e-8}, {"one_minus_beta1": 0.1, "one_minus_beta2": 0.001}
    ),
}


class Surface(NamedTuple):
    """What came of a method's grid.

    Attributes:
      method: its key.
      values: of both numbers, by their names, from small to large; the default is in the middle.
      losses: the training loss at the end, by the first number and the second; infinite where
        training diverged, not a number where it was not done. Filled cell by cell.
      compile_seconds: of the one step that all cells share.
      seconds: of training and evaluation.
    """

    method: str
    values: Mapping[str, Sequence[float]]
    losses: Float[np.ndarray, "side side"]
    compile_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def label(self) -> str:
        return METHODS[self.method].label

    @property
    def middle(self) -> int:
        return len(self.losses) // 2

    @property
    def best(self) -> float:
        """The lowest loss; infinite if there is none."""
        return float(np.nanmin(self.losses))

    def at(self, first: int = 0, second: int = 0) -> float:
        """The loss so many cells off the default; not a number outside of the grid."""
        place = self.middle + first, self.middle + second
        inside = all(0 <= i < len(self.losses) for i in place)
        return float(self.losses[place]) if inside else math.nan


Train = Callable[[Numbers, Callable[[float], None]], float]


def explore(problem: Problem, name: str, side: int, settings: Settings) -> tuple[Surface, bool]:
    """Train with a method in each cell of its grid, under a progress bar.

    Returns:
      The losses so far, and whether Ctrl-C cut it short.
    """
    method, setup = METHODS[name], SETUPS[name]
    values = {number: rates(default, side) for number, default in setup.defaults.items()}
    surface = Surface(name, values, np.full((side, side), np.nan))
    steps = settings.epochs * (count_examples(problem.train) // settings.batch_size)
    started = time.perf_counter()
    try:
        with interrupt_deferred():
            train = compile_training(problem, method, setup, steps, settings)
        surface = surface._replace(compile_seconds=time.perf_counter() - started)
        with report.progress(method.label, steps * side**2) as on_loss:
            for place in np.ndindex(side, side):
                numbers = {
                    number: np.float32(row[i])
                    for (number, row), i in zip(values.items(), place, strict=True)
                }
                surface.losses[place] = train(numbers, on_loss)
    except KeyboardInterrupt:
        return surface, True
    seconds = time.perf_counter() - started - surface.compile_seconds
    return surface._replace(seconds=seconds), False


def compile_training(
    problem: Problem, method: Method, setup: Setup, steps: int, settings: Settings
) -> Train:
    """Compile once what trains in every cell: (numbers, on_loss) -> the training loss at the end.

    All cells have the same start and the same batches. The loss is infinite where one was not
    finite on the way, or the last is above the first.
    """
    size = count_examples(problem.train)
    examples = jax.device_put(problem.train)
    evaluated = slice_examples(examples, 0, EVALUATION_EXAMPLES)
    evaluate = make_evaluation(problem.loss_fn)
    key = jax.random.key(settings.seed)
    init = jax.jit(problem.init)
    params = init(key)
    first = evaluate(params, evaluated)

    def build(layers: Any, numbers: Numbers) -> Any:
        hyperparameters: Any = {**setup.fixed, **numbers}
        peak, rest = split_learning_rate(hyperparameters)
        make_schedule = method.schedule or warmup_linear_decay
        return method.build(layers, make_schedule(peak, steps), **rest)

    numbers = {name: np.float32(value) for name, value in setup.defaults.items()}
    family = compile_family(
        problem.loss_fn, method, build, numbers, params, examples, settings.batch_size
    )

    def train(numbers: Numbers, on_loss: Callable[[float], None]) -> float:
        taken = 0

        def count(loss: float) -> None:
            nonlocal taken
            taken += 1
            on_loss(loss)

        state = family.start(numbers, init(key), key)
        step = functools.partial(family.step, numbers)
        try:
            for epoch in range(1, settings.epochs + 1):
                batches = epoch_batches(size, settings.batch_size, epoch, settings.seed)
                state = run_epoch(step, state, examples, batches, count)
        except NonFiniteLoss:
            for _ in range(steps - taken):  # the bar goes on to the next cell
                on_loss(math.nan)
            return math.inf
        last = evaluate(state.params, evaluated)
        return last if last <= first else math.inf

    return train


def explore_all(
    problem: Problem,
    names: Sequence[str],
    side: int,
    settings: Settings,
    keep: Callable[[Sequence[Surface]], None],
) -> tuple[list[Surface], bool]:
    """All methods one after the other; `keep` is called with the surfaces so far after each."""
    surfaces: list[Surface] = []
    for name in names:
        surface, interrupted = explore(problem, name, side, settings)
        if not np.isnan(surface.losses).all():
            surfaces.append(surface)
            keep(surfaces)
        if interrupted:
            return surfaces, True
        jax.clear_caches()  # each method compiles a step of its own
    return surfaces, False


# --- what is printed and written -----------------------------------------------------------------


def summary(surfaces: Sequence[Surface]) -> str:
    """A line for each method: its best and its default, and how much of the grid is near them."""
    adam = [surface.best for surface in surfaces if surface.method == "adam"]
    header = ("method", "best", "there", "default", f"within {TOLERANCE:.0%}", "diverged")
    header += ("below Adam's best",) if adam else ()
    rows = []
    for surface in surfaces:
        losses = surface.losses[~np.isnan(surface.losses)]

        def share(chosen: Any, of: int = losses.size) -> str:
            return f"{np.count_nonzero(chosen)} of {of}"

        near = np.isfinite(losses) & (losses <= (1 + TOLERANCE) * surface.best)
        row = (surface.label, shown(surface.best), where(surface), shown(surface.at()))
        row += (share(near), share(np.isinf(losses)))
        rows.append(row + tuple(share(losses < best) for best in adam))
    return report.aligned(header, rows)


def where(surface: Surface) -> str:
    """The numbers of the best cell, in words."""
    if not math.isfinite(surface.best):
        return "-"
    place = np.unravel_index(np.nanargmin(surface.losses), surface.losses.shape)
    return ", ".join(
        f"{name} {row[int(i)]:.3g}"
        for (name, row), i in zip(surface.values.items(), place, strict=True)
    )


def mistakes(surfaces: Sequence[Surface]) -> str:
    """A line for each number: the loss where it alone is off by a factor of ten."""
    rows = []
    for surface in surfaces:
        for axis, (name, values) in enumerate(surface.values.items()):
            step = PER_TEN * np.eye(2, dtype=int)[axis]
            losses = (surface.at(*sign * step) for sign in (-1, 0, 1))
            label = f"{surface.label}, {name} = {values[surface.middle]:.3g}"
            rows.append((label, *map(shown, losses)))
    return report.aligned(("number", "a tenth", "default", "ten times"), rows)


def shown(loss: float) -> str:
    return "-" if math.isnan(loss) else "diverged" if math.isinf(loss) else f"{loss:#.5g}"


def results(surfaces: Sequence[Surface], settings: Mapping[str, Any]) -> dict[str, Any]:
    """All numbers, for `write_json`; a cell that diverged has no loss."""
    return {
        "settings": dict(settings),
        "machine": report.machine(),
        "grids": {
            surface.method: {
                "label": surface.label,
                "defaults": dict(SETUPS[surface.method].defaults),
                "fixed": dict(SETUPS[surface.method].fixed),
                "compile_seconds": surface.compile_seconds,
                "seconds": surface.seconds,
                "cells": [
                    {
                        **{
                            n: row[i]
                            for (n, row), i in zip(surface.values.items(), at, strict=True)
                        },
                        "train_loss": float(loss) if math.isfinite(loss) else None,
                    }
                    for at, loss in np.ndenumerate(surface.losses)
                    if not math.isnan(loss)
                ],
            }
            for surface in surfaces
        },
    }


def show(surfaces: Sequence[Surface], dataset: Dataset, args: argparse.Namespace) -> None:
    """Print the tables and draw the picture."""
    print(f"\n{summary(surfaces)}\n\n{mistakes(surfaces)}\n")
    print(f"Losses at the end, on {report.evaluated_on(dataset.train)} training images.")
    grids = [
        plots.Grid(
            surface.label,
            tuple(surface.values),
            tuple(surface.values.values()),
            surface.losses,
            (surface.middle, surface.middle),
        )
        for surface in surfaces
    ]
    title = (
        f"Training loss of a deep autoencoder after {args.epochs} epochs on {dataset.name}, "
        f"{len(dataset.train):,} images in batches of {args.batch_size}; framed: the defaults, "
        "×: diverged"
    )
    plots.plot_grids(grids, title, args.output_dir / "sensitivity.png")
    print(f"Wrote results.json and sensitivity.png to {args.output_dir}.")


# --- command line --------------------------------------------------------------------------------


def parse_arguments(argv: cli.Argv) -> cli.Parsed:
    parser = cli.make_parser(
        "sensitivity",
        "Train the deep autoencoder with each method over a grid of the two numbers "
        "that matter most for it, around their defaults. Prints how good the best and the default "
        "are and how far a number may be off; writes the losses as JSON and PNG.",
    )
    cli.add_names_argument(parser, SETUPS, "method")
    cli.add_quick_argument(parser, QUICK)
    cli.add_run_arguments(parser, DEFAULTS)
    cli.add_numbers(
        parser,
        {
            "shrink": (4, "divide the width of every hidden layer by this"),
            "side": (5, "values of each number, a factor of sqrt(10) apart"),
        },
    )
    cli.add_output_dir_argument(parser, f"out/{NAME}", "where the results go")
    args = cli.parse(parser, QUICK, argv)
    cli.check_training_arguments(parser, args)
    return parser, args


def main(argv: cli.Argv = None) -> int:
    """Run the command line; 130 after Ctrl-C, as shells have it."""
    parser, args = parse_arguments(argv)
    dataset = cli.open_images(parser, args, how=cli.in_batches(args))
    options = ("epochs", "batch_size", "shrink", "side", "seed")
    described = report.settings(NAME, dataset, args, options, ["train"])

    def keep(surfaces: Sequence[Surface]) -> None:
        write_json(args.output_dir / "results.json", results(surfaces, described))

    network = autoencoder.make_network(shrink=args.shrink)
    surfaces, interrupted = explore_all(
        autoencoder.make_problem(dataset, network)._replace(test=None),
        args.names,
        args.side,
        Settings(args.epochs, args.batch_size, args.seed),
        keep,
    )
    if surfaces:
        show(surfaces, dataset, args)
    if interrupted:
        done = sum(not np.isnan(surface.losses).any() for surface in surfaces)
        print(f"Interrupted; {done} of {len(args.names)} methods are complete.", file=sys.stderr)
    return 130 if interrupted else 0
