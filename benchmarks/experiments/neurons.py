"""The experiments of Linear Neuron Boosting and of gradient descent on neurons.

    python -m benchmarks neurons [NAME ...]

runs all of them, or those named: each method once with its default learning rate, and with others
a factor of sqrt(10) apart, the same number for each. Every experiment prints a table of both and
writes results.json, best.png and defaults.png to out/neurons/NAME/. The papers' sizes are

    python -m benchmarks neurons mlp autoencoder --train-images 60000 --epochs 10
    python -m benchmarks neurons vit wide_resnet vgg --dataset cifar-10 --train-images 50000
"""

import argparse
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

import locoprop_jax as lp
from benchmarks.experiments.factorisation import factorisation, gauss_newton
from benchmarks.shared import autoencoder, cli, images, paper, plots, report
from benchmarks.shared.classifier import benzing_mlp, boosting_mlp
from benchmarks.shared.comparison import Job, train_all
from benchmarks.shared.contestants import (
    ADAM,
    FOOF,
    LNB,
    MOMENTUM,
    MUON,
    TRIAL_STEP,
    Contestant,
)
from benchmarks.shared.data import Dataset, inverted
from benchmarks.shared.results import write_json
from benchmarks.shared.steps import count_examples
from benchmarks.shared.training import Problem, Run, Settings
from locoprop_jax._neurons.metric import descend

QUICK = {"epochs": 1, "train_images": 400, "trials": 1, "shrink": 16}


class Experiment(NamedTuple):
    """A problem, or several that are compared, and the methods that train it.

    Attributes:
      title: of the plots.
      problems: what sets a problem apart from the others -> how to make it from the images and a
        divisor of all widths.
      contestants: by their keys in the results, for a problem.
      epochs, batch_size: unless the command line has them. An epoch of the factorisation is a step.
      labels: whether the images need theirs.
      log: whether the plots' losses have a logarithmic axis.
      images: whether it trains on the images at all.
    """

    title: str
    problems: Mapping[str, Callable[[Dataset, int], Problem]]
    contestants: Callable[[Problem], Mapping[str, Contestant]]
    epochs: int
    batch_size: int
    labels: bool = False
    log: bool = False
    images: bool = True


def deep_autoencoder(dataset: Dataset, shrink: int) -> Problem:
    return autoencoder.make_problem(dataset, autoencoder.make_network(shrink=shrink))


EVERYONE = {"foof": FOOF, "lnb": LNB, "momentum": MOMENTUM, "adam": ADAM, "muon": MUON}
FEW = {"foof": FOOF, "lnb": LNB, "adam": ADAM}


def averaged_steps(
    direction: Callable[..., optax.GradientTransformationExtraArgs],
    layers: lp.Layers,
    learning_rate: optax.ScalarOrSchedule,
) -> optax.GradientTransformation:
    """A direction whose steps are averaged, not its gradients: shorter ones where they disagree."""
    root = paper.root(learning_rate)
    return optax.chain(direction(layers), optax.ema(0.9), descend(root, 0.0))


def foof_direction(layers: lp.Layers) -> optax.GradientTransformationExtraArgs:
    return lp.scale_by_metric_norm(lp.scale_by_foof(layers, inverse_period=20))


def _variations(
    method: Contestant,
    direction: Callable[..., optax.GradientTransformationExtraArgs],
    changes: Mapping[str, Mapping[str, Any]],
) -> Mapping[str, Contestant]:
    """A method as it is, with its steps averaged, and with one option changed at a time."""
    averaged = Contestant(
        "averaged steps",
        functools.partial(averaged_steps, direction),
        10 * method.learning_rate,
        needs_capture=True,
    )
    changed = {
        label: method._replace(label=label, build=functools.partial(method.build, **options))
        for label, options in changes.items()
    }
    return {"unchanged": method, "averaged steps": averaged, **changed}


FOOF_CHANGES: Mapping[str, Mapping[str, Any]] = {
    "T = 1": {"inverse_period": 1},
    "T = 100": {"inverse_period": 100},
    "T = 20, S = 5": {"statistics_steps": 5},
    "decay 0.99": {"decay": 0.99},
    "damping 1": {"damping": 1.0},
    "damping 0.1": {"damping": 0.1},
    "damped biases": {"damp_bias": True},
}
LNB_CHANGES: Mapping[str, Mapping[str, Any]] = {
    "1 iteration": {"iterations": 1},
    "8 iterations": {"iterations": 8},
    "from zero": {"online": False},
    "moments 0.9": {"moment_decay": 0.9},
    "moments 0.999": {"moment_decay": 0.999},
    "shrinkage 0.1": {"shrinkage": 0.1},
    "ridge 1": {"ridge": 1.0},
    "ridge 0.1, absolute": {"ridge": 0.1, "relative": False},
    "half the rows": {"fraction": 0.5},
    "a quarter": {"fraction": 0.25},
}


def _second_order(problem: Problem) -> Mapping[str, Contestant]:
    """Without noise in the gradient little damping is needed, and a short step."""
    little = {
        "lnb_little": ("LNB, ridge 0.01", functools.partial(paper.lnb, ridge=0.01)),
        "foof_little": ("FOOF, damping 0.01", functools.partial(paper.foof, damping=0.01)),
    }
    newton = Contestant("Gauss-Newton", functools.partial(gauss_newton, problem=problem), 1.0)
    return {
        "lnb": LNB,
        "foof": FOOF,
        **{key: Contestant(label, build, 0.4, True) for key, (label, build) in little.items()},
        "gauss_newton": newton,
        "adam": ADAM,
    }


def _on_images(
    title: str, make: Callable[[Dataset, int], Problem], rate: float = 1.26
) -> Experiment:
    """Convolutions or attention, with smaller steps of FOOF and LNB than their default."""
    slower = {key: FEW[key]._replace(learning_rate=rate) for key in ("foof", "lnb")}
    contestants = {**FEW, **slower}
    return Experiment(
        title, {"": make}, lambda problem: contestants, epochs=5, batch_size=100, labels=True
    )


EXPERIMENTS: Mapping[str, Experiment] = {
    "factorisation": Experiment(
        "Matrix factorisation, condition number 1e5",
        {"": factorisation},
        _second_order,
        epochs=300,
        batch_size=1000,
        log=True,
        images=False,
    ),
    "inverted": Experiment(
        "Two layers of 800 tanh units, on images and on 1 - images",
        {
            "images": boosting_mlp,
            "1 - images": lambda dataset, shrink: boosting_mlp(inverted(dataset), shrink),
        },
        lambda problem: FEW,
        epochs=10,
        batch_size=1000,
        labels=True,
        log=True,
    ),
    "mlp": Experiment(
        "Three layers of 1000 ReLU units, batches of 100",
        {"": benzing_mlp},
        lambda problem: EVERYONE,
        epochs=3,
        batch_size=100,
        labels=True,
    ),
    "foof": Experiment(
        "FOOF on the deep autoencoder, one thing changed at a time",
        {"": deep_autoencoder},
        lambda problem: _variations(FOOF, foof_direction, FOOF_CHANGES),
        epochs=5,
        batch_size=1000,
    ),
    "lnb": Experiment(
        "LNB on the deep autoencoder, one thing changed at a time",
        {"": deep_autoencoder},
        lambda problem: _variations(LNB, lp.scale_by_lnb, LNB_CHANGES),
        epochs=5,
        batch_size=1000,
    ),
    "autoencoder": Experiment(
        "Deep autoencoder",
        {"": deep_autoencoder},
        # Its loss is a sum over 784 pixels, and 0.1 diverges.
        lambda problem: {**EVERYONE, "momentum": MOMENTUM._replace(learning_rate=1e-2)},
        epochs=5,
        batch_size=1000,
    ),
    "vit": _on_images("Vision transformer, four layers of 64 units", images.vit),
    "wide_resnet": _on_images("ResNet18, an eighth as wide", images.wide_resnet),
    # Without normalisation larger steps diverge.
    "unet": _on_images("UNet on scenes of two images", images.unet, rate=0.0398),
    "vgg": _on_images("VGG11, an eighth as wide", images.vgg, rate=0.0398),
}


class Attempt(NamedTuple):
    """A method on a problem with one learning rate."""

    key: str
    problem: str
    contestant: Contestant
    learning_rate: float

    @property
    def title(self) -> str:
        return f"{self.contestant.label}, {self.problem}" if self.problem else self.contestant.label

    @property
    def name(self) -> str:
        return f"{self.title}, {self.learning_rate:.3g}"


def attempts(
    experiment: Experiment, dataset: Dataset, args: argparse.Namespace
) -> Iterator[tuple[Attempt, Job]]:
    """The default learning rate first, then the others from small to large."""
    settings = Settings(args.epochs or experiment.epochs, experiment.batch_size, args.seed)
    for name, make in experiment.problems.items():
        problem = make(dataset, args.shrink)
        batch_size = min(settings.batch_size, count_examples(problem.train))
        for key, contestant in experiment.contestants(problem).items():
            powers = [i - args.trials // 2 for i in range(args.trials)]
            for power in sorted(powers, key=lambda power: power != 0):
                rate = contestant.learning_rate * TRIAL_STEP**power
                attempt = Attempt(key, name, contestant, rate)
                method = contestant.method()._replace(label=attempt.name)
                yield (
                    attempt,
                    Job(
                        attempt.name,
                        method,
                        {"learning_rate": rate},
                        problem,
                        settings._replace(batch_size=batch_size),
                    ),
                )


def run_experiment(name: str, dataset: Dataset, args: argparse.Namespace) -> bool:
    """Train with all methods and learning rates, print both tables, write results and plots.

    Returns:
      Whether Ctrl-C cut it short; what was finished is written then too.
    """
    experiment, directory = EXPERIMENTS[name], args.output_dir / name
    directory.mkdir(parents=True, exist_ok=True)
    planned = list(attempts(experiment, dataset, args))
    by_name = {attempt.name: attempt for attempt, _ in planned}
    settings = {
        "experiment": f"neurons/{name}",
        "dataset": dataset.name,
        "train_images": args.train_images,
        "epochs": args.epochs or experiment.epochs,
        "batch_size": planned[0][1].settings.batch_size,
        "shrink": args.shrink,
        "trials": args.trials,
        "seed": args.seed,
    }
    print(f"\n{name}: {experiment.title}", flush=True)

    def keep(runs: Sequence[Run]) -> None:
        write_json(directory / "results.json", report.results(runs, settings))
        jax.clear_caches()  # each run compiles a step of its own

    runs, interrupted = train_all((job for _, job in planned), keep)
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(by_name[run.method].title, []).append(run)
    chosen = {
        "defaults": [group[0] for group in groups.values()],
        "best": [min(group, key=_final_loss) for group in groups.values()],
    }
    for kind, some in chosen.items():
        if some:
            title = {"defaults": "default learning rates", "best": f"best of {args.trials} each"}
            print(f"\n{title[kind]}:\n\n{report.table(some)}\n")
            _plot(experiment, dataset, some, by_name, title[kind], directory / f"{kind}.png")
    print(f"Wrote results.json, best.png and defaults.png to {directory}.", flush=True)
    return interrupted


def _final_loss(run: Run) -> float:
    return float("inf") if run.stopped else run.curve[-1].train_loss


def _plot(
    experiment: Experiment,
    dataset: Dataset,
    runs: Sequence[Run],
    by_name: Mapping[str, Attempt],
    kind: str,
    path: Path,
) -> None:
    keys = list(dict.fromkeys(attempt.key for attempt in by_name.values()))
    problems = list(experiment.problems)
    looks = {
        run.method: plots.look(
            keys.index(by_name[run.method].key), problems.index(by_name[run.method].problem)
        )
        for run in runs
    }
    of = f": {dataset.name}, {len(dataset.train):,} images" if experiment.images else ""
    plots.plot_losses(runs, f"{experiment.title}{of}; {kind}", path, looks, log=experiment.log)


def parse_arguments(argv: cli.Argv) -> cli.Parsed:
    parser = cli.make_parser(
        "neurons",
        "Run the experiments of LNB and FOOF. Each prints its tables, and writes its "
        "curves as JSON and PNG.",
    )
    cli.add_names_argument(parser, EXPERIMENTS, "experiment")
    cli.add_quick_argument(parser, QUICK, "a look at small sizes, seconds for each run")
    cli.add_numbers(
        parser,
        {
            "epochs": (None, "passes over the training images, steps of the factorisation"),
            "train-images": (10_000, "how many of them to use"),
            "trials": (3, "learning rates to try with each method, the default among them"),
            "shrink": (1, "divide the width of every layer by this"),
        },
    )
    cli.add_data_arguments(parser)
    cli.add_output_dir_argument(
        parser, "out/neurons", "where the results go, a folder for each experiment"
    )
    args = cli.parse(parser, QUICK, argv)
    return parser, args


def main(argv: cli.Argv = None) -> int:
    """Run the command line; 130 after Ctrl-C, as shells have it."""
    parser, args = parse_arguments(argv)
    dataset = cli.open_images(parser, args, any(EXPERIMENTS[name].labels for name in args.names))
    for name in args.names:
        if run_experiment(name, dataset, args):
            return 130
    return 0
