"""The papers' deep autoencoder, trained with LocoProp and with first-order methods.

    python -m benchmarks autoencoder

trains all methods for a few minutes on two CPU cores. The paper's run (locoprop, section 3) is

    python -m benchmarks autoencoder --epochs 100 --train-images 60000
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.shared import cli, plots, report
from benchmarks.shared.autoencoder import NAME, make_problem, reconstruct
from benchmarks.shared.comparison import compare
from benchmarks.shared.data import Dataset
from benchmarks.shared.methods import Hyperparameters
from benchmarks.shared.results import write_json
from benchmarks.shared.training import Run, Settings
from benchmarks.shared.tuned import TunedError, load_hyperparameters

DEFAULTS = {"epochs": 5, "train_images": 20_000, "batch_size": 1000}
QUICK = {"epochs": 2, "train_images": 2000, "batch_size": 200}
RECONSTRUCTED = 12  # test images in the picture


def parse_arguments(argv: cli.Argv) -> cli.Parsed:
    parser = cli.make_parser(
        "autoencoder",
        "Train the standard deep autoencoder (784-1000-500-250-30-250-500-1000-784, "
        "tanh) with LocoProp and with first-order methods, from the same start on the same "
        "batches. Prints a table; writes the curves as JSON and PNG, and reconstructions.",
        epilog="The paper's run: --epochs 100 --train-images 60000.",
    )
    cli.add_quick_argument(parser, QUICK)
    cli.add_training_arguments(parser, DEFAULTS)
    cli.add_result_arguments(parser, "out/autoencoder", "where the results go")
    args = cli.parse(parser, QUICK, argv)
    cli.check_training_arguments(parser, args)
    return parser, args


def main(argv: cli.Argv = None) -> int:
    """Run the command line; 130 after Ctrl-C, as shells have it."""
    parser, args = parse_arguments(argv)
    try:
        hyperparameters: dict[str, Hyperparameters] = {
            name: {
                **load_hyperparameters(NAME, name, args.hyperparameters),
                **cli.method_options(name, args),
            }
            for name in dict.fromkeys(args.methods)
        }
    except TunedError as error:
        parser.error(str(error))
    dataset = cli.open_images(parser, args, how=cli.in_batches(args))
    options = ("epochs", "batch_size", "iterations", "seed")
    settings = report.settings(NAME, dataset, args, options)

    def keep(runs: Sequence[Run]) -> None:
        write_json(args.output_dir / "results.json", report.results(runs, settings))

    runs, interrupted = compare(
        make_problem(dataset),
        hyperparameters,
        Settings(args.epochs, args.batch_size, args.seed),
        keep,
    )
    if runs:
        show(runs, dataset, args.output_dir)
    if interrupted:
        print(
            f"Interrupted; {len(runs)} of {len(hyperparameters)} methods have results.",
            file=sys.stderr,
        )
    return 130 if interrupted else 0


def show(runs: Sequence[Run], dataset: Dataset, directory: Path) -> None:
    """Print the table and draw the pictures."""
    print(f"\n{report.table(runs)}\n")
    for run in runs:
        if run.diagnostics:
            said = ", ".join(f"{name} {number:g}" for name, number in run.diagnostics.items())
            print(f"{run.label}: {said}")
    print(
        f"Losses after the last epoch, on {report.evaluated_on(dataset.train)} training images and "
        f"{report.evaluated_on(dataset.test)} test images."
    )
    title = f"Deep autoencoder on {dataset.name}, {len(dataset.train):,} images"
    plots.plot_losses(runs, title, directory / "loss.png")
    originals = dataset.test[:RECONSTRUCTED]
    plots.plot_images(
        {"original": originals} | {run.label: reconstruct(run.params, originals) for run in runs},
        directory / "reconstructions.png",
    )
    print(f"Wrote results.json, loss.png and reconstructions.png to {directory}.")
