"""The papers' ablations, each a small comparison on the deep autoencoder or a classifier.

    python -m benchmarks ablations [NAME ...]

runs all of them, or those named: half an hour on two CPU cores. Every one prints a table and
writes results.json and loss.png to out/ablations/NAME/. The paper's settings are

    python -m benchmarks ablations --epochs 100 --train-images 60000
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from benchmarks.shared import autoencoder, classifier, cli, plots, report
from benchmarks.shared.classifier import Classifier
from benchmarks.shared.comparison import Job, train_all, train_with_progress
from benchmarks.shared.contestants import TRIAL_STEP
from benchmarks.shared.data import Dataset
from benchmarks.shared.methods import ALL_METHODS, METHODS, Hyperparameters
from benchmarks.shared.results import write_json
from benchmarks.shared.training import INTERRUPTED, Problem, Run, Settings
from benchmarks.shared.tuned import TUNED, TunedError, load_hyperparameters

DEFAULTS = {"epochs": 3, "train_images": 10_000, "batch_size": 1000}
QUICK = {"epochs": 1, "train_images": 400, "batch_size": 50, "shrink": 16}
ITERATIONS = 10
REFERENCE_BATCH = 1000  # the paper's; other batch sizes are stated beside it

ACTIVATIONS = {"tanh": nn.tanh, "ReLU": nn.relu}

# The values of what no search has tuned (tuned.json has the others), at batches of
# 1000. Sensible guesses, the learning rates the best of three a factor of sqrt(10) apart in about
# ten steps of narrower networks; --trials improves them by the same number of trials for each run.
LIKE_TUNED = {
    "gamma": 100.0,
    "learning_rate": 4e-5,
    "one_minus_beta1": 0.0015,
    "one_minus_beta2": 0.1,
    "eps": 1e-7,
}
CAREFUL = {
    "gamma": 100.0,
    "learning_rate": 3e-4,
    "one_minus_beta1": 0.1,
    "one_minus_beta2": 0.1,
    "eps": 1e-8,
}
GUESSES: Mapping[str, Mapping[str, Hyperparameters]] = {
    autoencoder.NAME: {
        # LocoProp's tuned values: the local problems have the same scales.
        "pocoprop_m": LIKE_TUNED,
        "pocoprop_s": LIKE_TUNED,
        # Plain steps have to stay below 2 / lambda_max(X'X), which is large.
        "locoprop_m_sgd": {"gamma": 1000.0, "learning_rate": 6e-6},
        "locoprop_m_momentum": {"gamma": 1000.0, "learning_rate": 2e-6, "one_minus_beta1": 0.1},
        "locoprop_m_adam": {
            "gamma": 100.0,
            "learning_rate": 3e-4,
            "one_minus_beta1": 0.1,
            "one_minus_beta2": 0.01,
            "eps": 1e-8,
        },
        "sgd": {"learning_rate": 3e-2},
        "momentum": {"learning_rate": 5e-3, "one_minus_beta1": 0.1},
        "nesterov": {"learning_rate": 5e-3, "one_minus_beta1": 0.1},
        "adagrad": {"learning_rate": 2e-2, "eps": 1e-8},
    },
    classifier.NAME: {
        "locoprop_m": CAREFUL,
        "locoprop_s": CAREFUL,
        "locoprop_s_exact": {"gamma": 500.0, "learning_rate": 3e-2},
        "adam": {
            "learning_rate": 2e-3,
            "one_minus_beta1": 0.1,
            "one_minus_beta2": 0.01,
            "eps": 1e-8,
        },
        "momentum": {"learning_rate": 1e-1, "one_minus_beta1": 0.1},
    },
}


class Variant(NamedTuple):
    """One run of an ablation.

    Attributes:
      method: a key of `ALL_METHODS`.
      detail: what sets it apart from the ablation's other runs with this method.
      changes: of the method's values.
      size, activation: of the autoencoder.
      batch_size: where the paper's usual one is 1000.
    """

    method: str
    detail: str = ""
    changes: tuple[tuple[str, float], ...] = ()
    size: str = "standard"
    activation: str = "tanh"
    batch_size: int = REFERENCE_BATCH

    @property
    def name(self) -> str:
        return f"{self.method}, {self.detail}" if self.detail else self.method

    @property
    def title(self) -> str:
        label = ALL_METHODS[self.method].label
        return f"{label}, {self.detail}" if self.detail else label


class Ablation(NamedTuple):
    title: str
    variants: tuple[Variant, ...]
    experiment: str = autoencoder.NAME


# The tuned value is that of T = 10. More local steps build up more momentum, which persists.
ITERATION_RATES = {1: 4e-4, 5: 8e-5, 10: 4e-5, 50: 2.5e-6}

COMPARED = ("locoprop_m", "locoprop_s", "rmsprop", "adam")

ABLATIONS: Mapping[str, Ablation] = {
    "variants": Ablation(
        "LocoProp and PocoProp",
        tuple(map(Variant, ("locoprop_m", "locoprop_s", "pocoprop_m", "pocoprop_s"))),
    ),
    "iterations": Ablation(
        "LocoProp-M: local iterations",
        tuple(
            Variant("locoprop_m", f"T = {t}", changes=(("iterations", t), ("learning_rate", rate)))
            for t, rate in ITERATION_RATES.items()
        ),
    ),
    "inner": Ablation(
        "LocoProp-M: the local optimizer",
        (
            Variant("locoprop_m_sgd", "SGD"),
            Variant("locoprop_m_momentum", "momentum"),
            Variant("locoprop_m_adam", "Adam"),
            Variant("locoprop_m", "RMSProp"),
        ),
    ),
    "transfer": Ablation(
        "Transfer functions",
        tuple(Variant(m, name, activation=name) for name in ACTIVATIONS for m in COMPARED),
    ),
    "batch": Ablation(
        "Batch sizes",
        tuple(Variant(m, f"batch {n}", batch_size=n) for n in (1000, 100) for m in COMPARED),
    ),
    "size": Ablation(
        "Standard, wide and deep autoencoders",
        tuple(
            Variant(m, size, size=size)
            for size in autoencoder.SIZES
            for m in ("locoprop_m", "rmsprop")
        ),
    ),
    "first_order": Ablation(
        "First-order methods",
        tuple(map(Variant, ("sgd", "momentum", "nesterov", "adagrad", "adam", "rmsprop"))),
    ),
    "classifier": Ablation(
        "Classifier",
        tuple(
            Variant(m, batch_size=1028)
            for m in ("locoprop_m", "locoprop_s", "locoprop_s_exact", "adam", "momentum")
        ),
        classifier.NAME,
    ),
}


def hyperparameters(
    ablation: Ablation, variant: Variant, batch_size: int, tuned: Path = TUNED
) -> Hyperparameters:
    """The tuned or guessed values, with the variant's changes.

    Gamma multiplies cotangents that carry 1 / batch size, so it is scaled with the batch.
    """
    if ablation.experiment == autoencoder.NAME and variant.method in METHODS:
        values = dict(load_hyperparameters(ablation.experiment, variant.method, tuned))
    else:
        values = dict(GUESSES[ablation.experiment][variant.method])
    if "iterations" in ALL_METHODS[variant.method].options:
        values["iterations"] = ITERATIONS
    values |= dict(variant.changes)
    if "gamma" in values:
        values["gamma"] *= batch_size / REFERENCE_BATCH
    return values


def make_network(ablation: Ablation, variant: Variant, shrink: int) -> Any:
    """The variant's network, every hidden layer `shrink` times narrower."""
    if ablation.experiment == classifier.NAME:
        return Classifier(autoencoder.narrower(classifier.HIDDEN, shrink))
    return autoencoder.make_network(variant.size, ACTIVATIONS[variant.activation], shrink)


def make_problem(ablation: Ablation, variant: Variant, dataset: Dataset, shrink: int) -> Problem:
    network = make_network(ablation, variant, shrink)
    experiment = classifier if ablation.experiment == classifier.NAME else autoencoder
    return experiment.make_problem(dataset, network)


def scaled_batch(variant: Variant, batch_size: int) -> int:
    """The variant's batch size, where `batch_size` stands for the paper's 1000."""
    return max(1, variant.batch_size * batch_size // REFERENCE_BATCH)


def make_jobs(
    ablation: Ablation, dataset: Dataset, args: argparse.Namespace
) -> Iterator[tuple[Variant, Job]]:
    for variant in ablation.variants:
        batch_size = scaled_batch(variant, args.batch_size)
        yield (
            variant,
            Job(
                variant.name,
                ALL_METHODS[variant.method]._replace(label=variant.title),
                hyperparameters(ablation, variant, batch_size, args.hyperparameters),
                make_problem(ablation, variant, dataset, args.shrink),
                Settings(args.epochs, batch_size, args.seed),
            ),
        )


def search_learning_rate(job: Job, trials: int) -> tuple[Job, list[dict[str, float | None]]]:
    """Train an epoch with each of some learning rates around the job's; keep the best.

    Returns:
      The job with that learning rate, and what was tried: none for one trial. A run that diverged
      has no loss; if all did, the job stays as it was.

    Raises:
      KeyboardInterrupt: Ctrl-C.
    """
    middle = job.hyperparameters["learning_rate"]
    attempts = {middle * TRIAL_STEP ** (i - (trials - 1) / 2): i for i in range(trials)}
    tried: list[dict[str, float | None]] = []
    for rate, i in attempts.items() if trials > 1 else ():
        attempt = _with_rate(job, rate)._replace(
            problem=job.problem._replace(test=None), settings=job.settings._replace(epochs=1)
        )
        run = train_with_progress(attempt, f"{job.method.label} {i + 1}/{trials}")
        if run.stopped == INTERRUPTED:
            raise KeyboardInterrupt
        loss = None if run.stopped else run.curve[-1].train_loss
        tried.append({"learning_rate": rate, "train_loss": loss})
    losses = {t["learning_rate"]: t["train_loss"] for t in tried if t["train_loss"] is not None}
    best = min(losses, key=lambda rate: losses[rate]) if losses else middle
    return _with_rate(job, best), tried


def _with_rate(job: Job, rate: float | None) -> Job:
    return job._replace(hyperparameters={**job.hyperparameters, "learning_rate": rate})


def looks(ablation: Ablation) -> dict[str, plots.Look]:
    """A colour for each method and a marker for each detail, where both differ."""
    variants = ablation.variants
    methods = list(dict.fromkeys(variant.method for variant in variants))
    details = list(dict.fromkeys(variant.detail for variant in variants))
    both_differ = len(methods) > 1 and len(details) > 1
    if not both_differ or len(methods) * len(details) != len(variants):
        return {variant.name: plots.look(i, i) for i, variant in enumerate(variants)}
    return {
        variant.name: plots.look(methods.index(variant.method), details.index(variant.detail))
        for variant in variants
    }


def run_ablation(name: str, dataset: Dataset, args: argparse.Namespace) -> tuple[list[Run], bool]:
    """Train the ablation's variants, print its table, write its results and its plot.

    Returns:
      The runs, and whether Ctrl-C cut them short; what was finished is written then too.
    """
    ablation, directory = ABLATIONS[name], args.output_dir / name
    directory.mkdir(parents=True, exist_ok=True)
    options = ("epochs", "batch_size", "shrink", "trials", "seed")
    settings = report.settings(f"ablations/{name}", dataset, args, options)
    more: dict[str, dict[str, Any]] = {variant.name: {} for variant in ablation.variants}
    print(f"\n{name}: {ablation.title}", flush=True)

    def jobs() -> Iterator[Job]:
        for variant, planned in make_jobs(ablation, dataset, args):
            job, tried = search_learning_rate(planned, args.trials)
            more[variant.name] = {"batch_size": job.settings.batch_size, "trials": tried}
            yield job

    def keep(runs: Sequence[Run]) -> None:
        run = runs[-1]
        if ablation.experiment == classifier.NAME:
            network = make_network(ablation, ablation.variants[0], args.shrink)
            accuracy = classifier.test_accuracy(network, run.params, dataset)
            more[run.method]["test_accuracy"] = accuracy
        write_json(directory / "results.json", report.results(runs, settings, more))

    runs, interrupted = train_all(jobs(), keep)
    if runs:
        accuracies = [more[run.method].get("test_accuracy") for run in runs]
        columns = {"test accuracy": [f"{value:.4f}" for value in accuracies if value is not None]}
        print(f"\n{report.table(runs, columns if accuracies[0] is not None else None)}\n")
        title = f"{ablation.title}: {dataset.name}, {len(dataset.train):,} images"
        plots.plot_losses(runs, title, directory / "loss.png", looks(ablation), test=True)
        print(f"Wrote results.json and loss.png to {directory}.", flush=True)
    jax.clear_caches()  # no later ablation compiles the same again
    if interrupted:
        print(
            f"Interrupted; {len(runs)} of {len(ablation.variants)} runs of {name} have results.",
            file=sys.stderr,
        )
    return runs, interrupted


def parse_arguments(argv: cli.Argv) -> cli.Parsed:
    parser = cli.make_parser(
        "ablations",
        "Run the papers' ablations. Each prints a table, and writes its curves as JSON and PNG.",
        epilog="The paper's settings: --epochs 100 --train-images 60000.",
    )
    cli.add_names_argument(parser, ABLATIONS, "ablation")
    cli.add_quick_argument(parser, QUICK, "a look at small sizes, seconds for each run")
    cli.add_run_arguments(parser, DEFAULTS)
    trials = (
        "before each run, train one epoch with each of N learning rates around its own, a factor "
        "of sqrt(10) apart, and go on with the best; 1 is no search"
    )
    cli.add_numbers(
        parser,
        {"shrink": (1, "divide the width of every hidden layer by this"), "trials": (1, trials)},
    )
    cli.add_result_arguments(
        parser, "out/ablations", "where the results go, a folder for each ablation"
    )
    args = cli.parse(parser, QUICK, argv)
    cli.check_training_arguments(parser, args)
    largest = max(
        scaled_batch(variant, args.batch_size)
        for name in args.names
        for variant in ABLATIONS[name].variants
    )
    if largest > args.train_images:
        parser.error(
            f"argument --train-images: {args.train_images} leaves no complete batch of {largest}"
        )
    return parser, args


def main(argv: cli.Argv = None) -> int:
    """Run the command line; 130 after Ctrl-C, as shells have it."""
    parser, args = parse_arguments(argv)
    needs_labels = any(ABLATIONS[name].experiment == classifier.NAME for name in args.names)
    try:
        for name in args.names:  # before hours of training, not within
            for variant in ABLATIONS[name].variants:
                hyperparameters(ABLATIONS[name], variant, args.batch_size, args.hyperparameters)
    except TunedError as error:
        parser.error(str(error))
    others = [name for name, at in ABLATIONS.items() if at.experiment != classifier.NAME]
    hint = f" Those that need no labels: {' '.join(others)}." if needs_labels else ""
    dataset = cli.open_images(parser, args, needs_labels, f"{args.epochs} epochs, ", hint)
    for name in args.names:
        _, interrupted = run_ablation(name, dataset, args)
        if interrupted:
            return 130
    return 0
