"""K-FAC here and in kfac-jax 0.0.8, side by side on the autoencoder.

    python -m benchmarks kfac_peer

That release needs an older JAX than this library, so it runs in a process of its own
(`kfac_peer_child.py`), in an environment that is made on first use or named with
--peer-python. Both sides start from the same parameters, see the same batches and invert their
factors at the same period, on the CPU. Turns of one period each alternate between them, and ratios
of time are taken within a pair of turns. Losses are measured here, for both, on the training
images, after as many steps: with each side's defaults, and tuned with as many trials.

What counts as kfac-jax's defaults is its own example of this network (examples/autoencoder_mnist):
learning rate, momentum and damping adapt. Its other way, all three fixed, is part of its search.
"""

import argparse
import itertools
import math
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import numpy as np
import optuna
import pooch
from jaxtyping import Int

from benchmarks.experiments.tune import distributions, make_study
from benchmarks.peers.kfac_peer_sides import (
    OUR_DEFAULTS,
    OUR_SPACE,
    REQUIREMENTS,
    THEIR_DEFAULTS,
    THEIR_SPACE,
    Child,
    Ours,
    PeerError,
    Side,
    Theirs,
    Weights,
    as_params,
    as_weights,
    child_command,
    make_environment,
    used,
)
from benchmarks.shared import cli, report
from benchmarks.shared.autoencoder import make_network, make_problem
from benchmarks.shared.data import DataError
from benchmarks.shared.methods import Hyperparameters, SearchSpace
from benchmarks.shared.results import write_measurement
from benchmarks.shared.training import epoch_batches, make_evaluation

QUICK = {
    "steps": 3,
    "rounds": 1,
    "trials": 1,
    "inverse_period": 3,
    "train_images": 1000,
    "batch_size": 100,
    "shrink": 20,
}
FIRST_STEPS = 5  # in which kfac-jax compiles all it has: the fifth adapts the damping

# --- side by side --------------------------------------------------------------------------------


class Trial(NamedTuple):
    """A run: what with, its batches' losses, and the loss on the training images after it.

    `train_loss` is infinite where the run diverged.
    """

    values: Hyperparameters
    step_losses: list[float]
    train_loss: float


def compile_seconds(side: Side, values: Hyperparameters) -> float:
    """The first start and steps of all, less the same again."""

    def begin() -> float:
        return side.start(values) + side.steps(FIRST_STEPS)[0]

    return begin() - begin()


def alternate(
    sides: Mapping[str, Side], rounds: int, inverse_period: int
) -> dict[str, list[float]]:
    """Seconds of a step, by side and round; each turn has one inversion, but the first has more."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, side in sides.items():
            seconds[name].append(side.steps(inverse_period)[0] / inverse_period)
    return {name: times[1:] for name, times in seconds.items()}


def run(
    side: Side, values: Hyperparameters, steps: int, evaluate: Callable[[Weights], float]
) -> Trial:
    side.start(values)
    losses: list[float] = []
    while len(losses) < steps and all(map(math.isfinite, losses)):
        losses += side.steps(min(10, steps - len(losses)))[1]
    loss = evaluate(side.weights()) if all(map(math.isfinite, losses)) else math.inf
    return Trial(values, losses, loss if math.isfinite(loss) else math.inf)


def search(
    attempt: Callable[[Hyperparameters], Trial],
    space: SearchSpace,
    defaults: Hyperparameters,
    trials: int,
    seed: int,
) -> list[Trial]:
    """Trials in the order in which Optuna asks for them; the first is with the defaults."""
    study = make_study(space, [], [defaults], seed)
    found = []
    for _ in range(trials):
        asked = study.ask(distributions(space))
        found.append(attempt(asked.params))
        study.tell(asked, found[-1].train_loss)
    return found


class Measured(NamedTuple):
    """What came of a comparison; times and trials by side."""

    compiling: dict[str, float]
    seconds: dict[str, list[float]]
    trials: dict[str, list[Trial]]


def compare(
    sides: Mapping[str, Side],
    starts: Mapping[str, tuple[Hyperparameters, SearchSpace]],
    args: argparse.Namespace,
    evaluate: Callable[[Weights], float],
) -> Measured:
    """Compile, time in turns, then train: both sides in the same process of measuring."""
    compiling = {name: compile_seconds(side, starts[name][0]) for name, side in sides.items()}
    tell(f"Compiled in {', '.join(f'{s:.1f} s ({name})' for name, s in compiling.items())}.")
    seconds = alternate(sides, args.rounds, args.inverse_period)
    tell(f"A step takes {', '.join(f'{median(s):.3f} s ({n})' for n, s in seconds.items())}.")
    found = {}
    for name, side in sides.items():

        def attempt(values: Hyperparameters, name: str = name, side: Side = side) -> Trial:
            values = used(values)
            trial = run(side, values, args.steps, evaluate)
            shown = ", ".join(f"{key} {value:.3g}" for key, value in values.items())
            tell(f"{name}: loss {trial.train_loss:.2f} ({shown})")
            return trial

        found[name] = search(attempt, starts[name][1], starts[name][0], args.trials, args.seed)
    return Measured(compiling, seconds, found)


def tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def best(trials: Sequence[Trial]) -> Trial:
    return min(trials, key=lambda trial: trial.train_loss)


def ratios(measured: Measured) -> dict[str, list[float]]:
    """Theirs over ours; the steps' has one for each round."""
    compiling, seconds = measured.compiling, measured.seconds
    rounds = zip(seconds["ours"], seconds["theirs"], strict=True)
    return {
        "step": [theirs / ours for ours, theirs in rounds],
        "compile": [compiling["theirs"] / compiling["ours"]],
    }


def table(measured: Measured) -> str:
    times = {name: median(values) for name, values in ratios(measured).items()}
    header = ("", "ours", "kfac-jax", "ratio")
    rows = [
        ("seconds of a step", *_cells(measured.seconds, median, 4), f"{times['step']:.2f}"),
        ("seconds to compile", *_cells(measured.compiling, float, 1), f"{times['compile']:.2f}"),
        ("loss, defaults", *_cells(measured.trials, lambda t: t[0].train_loss, 2), ""),
        ("loss, tuned", *_cells(measured.trials, lambda t: best(t).train_loss, 2), ""),
    ]
    return report.aligned(header, rows)


def _cells(by_side: Mapping[str, Any], number: Callable[[Any], float], digits: int) -> list[str]:
    return [f"{number(by_side[name]):.{digits}f}" for name in ("ours", "theirs")]


def results(measured: Measured) -> dict[str, Any]:
    def written(trial: Trial) -> dict[str, Any]:
        losses = [loss if math.isfinite(loss) else None for loss in trial.step_losses]
        last = trial.train_loss if math.isfinite(trial.train_loss) else None
        return {"values": dict(trial.values), "train_loss": last, "step_losses": losses}

    return {
        "ratios": {
            name: {"median": median(values), "min": min(values), "max": max(values)}
            for name, values in ratios(measured).items()
        },
        "compile_seconds": measured.compiling,
        "step_seconds": measured.seconds,
        "defaults": {name: written(trials[0]) for name, trials in measured.trials.items()},
        "tuned": {name: written(best(trials)) for name, trials in measured.trials.items()},
        "trials": {
            name: [
                {key: value for key, value in written(trial).items() if key != "step_losses"}
                for trial in trials
            ]
            for name, trials in measured.trials.items()
        },
    }


# --- the command line ----------------------------------------------------------------------------


def parse_arguments(argv: cli.Argv) -> cli.Parsed:
    parser = cli.make_parser(
        "kfac_peer",
        "Time K-FAC here against kfac-jax on the deep autoencoder, and compare losses.",
    )
    cli.add_quick_argument(parser, QUICK)
    cli.add_numbers(
        parser,
        {
            "steps": (100, "of each training run"),
            "rounds": (7, "of timed turns, one period each"),
            "trials": (8, "training runs of each side; the first has its defaults"),
            "inverse-period": (20, "steps from one inversion to the next, of both sides"),
            "train-images": (20_000, "to draw from, and to measure the final loss on"),
            "batch-size": (1000, "images per step"),
            "shrink": (1, "how many times narrower the hidden layers are"),
        },
    )
    cli.add_data_arguments(parser)
    parser.add_argument(
        "--peer-python",
        type=Path,
        metavar="FILE",
        help=f"a Python that has what {REQUIREMENTS.name} lists (default: of an environment made "
        "in the user's cache on first use)",
    )
    cli.add_output_argument(parser, "kfac_peer.json")
    args = cli.parse(parser, QUICK, argv)
    cli.check_training_arguments(parser, args)
    return parser, args


def main(argv: cli.Argv = None) -> int:
    parser, args = parse_arguments(argv)
    jax.config.update("jax_platforms", "cpu")  # as the peer's process
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        dataset = cli.load_images(args)
    except DataError as error:
        parser.error(str(error))
    problem = make_problem(dataset, make_network(shrink=args.shrink))
    params = jax.jit(problem.init)(jax.random.key(args.seed))
    order = batch_order(len(dataset.train), args)
    mean_loss = make_evaluation(problem.loss_fn)
    try:
        python = args.peer_python or make_environment(
            Path(pooch.os_cache("locoprop_jax")) / "kfac_peer"
        )
        with (
            tempfile.TemporaryDirectory() as directory,
            Child(child_command(python)) as child,
        ):
            theirs = Theirs(
                child,
                dataset.train,
                order,
                as_weights(params),
                args.inverse_period,
                Path(directory),
            )
            measured = compare(
                {"ours": Ours(problem, params, order, args.inverse_period), "theirs": theirs},
                {"ours": (OUR_DEFAULTS, OUR_SPACE), "theirs": (THEIR_DEFAULTS, THEIR_SPACE)},
                args,
                lambda weights: mean_loss(as_params(weights), dataset.train),
            )
    except PeerError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    settings = {
        "dataset": dataset.name,
        **{name: getattr(args, name) for name in (*QUICK, "seed")},
    }
    print(f"\n{table(measured)}\n")
    print(f"Losses after {args.steps} steps, on {len(dataset.train):,} training images.")
    write_measurement(
        args.output,
        {
            "settings": settings,
            "machine": {"ours": report.machine(), "theirs": theirs.machine},
            **results(measured),
        },
    )
    return 0


def batch_order(images: int, args: argparse.Namespace) -> Int[np.ndarray, "steps batch"]:
    """As many batches as any run takes, its burn-in included."""
    needed = max(args.steps, (args.rounds + 1) * args.inverse_period + FIRST_STEPS)
    epochs = (epoch_batches(images, args.batch_size, i, args.seed) for i in itertools.count(1))
    return np.stack(list(itertools.islice(itertools.chain.from_iterable(epochs), needed)))
