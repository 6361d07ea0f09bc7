"""The experiments of practical Gauss-Newton, and of gradient descent on neurons about K-FAC.

    python -m benchmarks gauss_newton [NAME ...]

runs all of them, or those named, each for minutes on two CPU cores. Every experiment prints what
the paper says beside what was found, and writes results.json and plots to out/gauss_newton/NAME/.
The papers' sizes are

    python -m benchmarks gauss_newton autoencoder mixture --train-images 50000 --epochs 100 \\
        --trials 40
    python -m benchmarks gauss_newton alignment --train-images 50000 --shrink 1 --pool 1
    python -m benchmarks gauss_newton natural minibatches logistic damping second_factor \\
        --train-images 60000 --full-batch 1000 --epochs 10 --shrink 1
"""

import argparse
import sys
from collections.abc import Mapping

from benchmarks.experiments import alignment, natural, second_factor, untuned
from benchmarks.shared import cli
from benchmarks.shared.candidates import Experiment

QUICK = {
    "epochs": 2,
    "train_images": 200,
    "full_batch": 20,
    "trials": 1,
    "shrink": 32,
    "pool": 4,
    "every": 2,
}

EXPERIMENTS: Mapping[str, Experiment] = {
    "autoencoder": Experiment(
        "Deep autoencoder, batches of 1000", untuned.run_autoencoder, epochs=10, trials=6
    ),
    "mixture": Experiment(
        "Odd or even, by a mixture of two classifiers",
        untuned.run_mixture,
        epochs=10,
        trials=8,
        labels=True,
    ),
    "alignment": Experiment(
        "Along KFRA's trajectory: updates and those of the Gauss-Newton matrix",
        alignment.run,
        epochs=5,
        shrink=4,
    ),
    "natural": Experiment(
        "Three hidden layers, all images in a batch",
        natural.run_full_batch,
        epochs=50,
        shrink=4,
        labels=True,
    ),
    "minibatches": Experiment(
        "Three hidden layers, batches of 100",
        natural.run_minibatches,
        epochs=2,
        shrink=4,
        labels=True,
    ),
    "logistic": Experiment(
        "Logistic regression, all images in a batch",
        natural.run_logistic,
        epochs=50,
        labels=True,
    ),
    "damping": Experiment(
        "K-FAC's damping, batches of 100",
        second_factor.run_damping,
        epochs=1,
        shrink=4,
        labels=True,
    ),
    "second_factor": Experiment(
        "K-FAC with and without its second factor, batches of 100",
        second_factor.run_second_factor,
        epochs=2,
        shrink=4,
        labels=True,
    ),
}


def parse_arguments(argv: cli.Argv) -> cli.Parsed:
    parser = cli.make_parser(
        "gauss_newton",
        "Run the experiments of practical Gauss-Newton, and of gradient descent on "
        "neurons about K-FAC. Each prints what the paper says and what was found, and writes its "
        "numbers as JSON and plots.",
    )
    cli.add_names_argument(parser, EXPERIMENTS, "experiment")
    cli.add_quick_argument(parser, QUICK, "a look at tiny sizes, seconds for each run")
    trials = (
        "learning rates to try with each method; of Adam's learning rates and decay periods for "
        "`autoencoder` and `mixture`"
    )
    cli.add_numbers(
        parser,
        {
            "epochs": (None, "passes over the training images"),
            "shrink": (None, "divide the width of every layer by this"),
            "trials": (None, trials),
            "train-images": (10_000, "how many of them to use"),
            "full-batch": (300, "how many of these where all are in a batch"),
            "pool": (2, "make images smaller by means of N x N pixels, for `alignment`"),
            "every": (
                10,
                "updates from one measurement to the next, for `alignment`, `damping` "
                "and `second_factor`",
            ),
        },
    )
    cli.add_data_arguments(parser)
    cli.add_output_dir_argument(
        parser, "out/gauss_newton", "where the results go, a folder for each experiment"
    )
    args = cli.parse(parser, QUICK, argv)
    return parser, args


def main(argv: cli.Argv = None) -> int:
    """Run the command line; 130 after Ctrl-C, as shells have it."""
    parser, args = parse_arguments(argv)
    dataset = cli.open_images(parser, args, any(EXPERIMENTS[name].labels for name in args.names))
    for name in args.names:
        experiment, directory = EXPERIMENTS[name], args.output_dir / name
        directory.mkdir(parents=True, exist_ok=True)
        own = argparse.Namespace(**vars(args))
        for option in ("epochs", "shrink", "trials"):
            setattr(own, option, getattr(args, option) or getattr(experiment, option))
        print(f"\n{name}: {experiment.title}", flush=True)
        if experiment.run(experiment, dataset, own, directory):
            print("Interrupted; what was finished is written.", file=sys.stderr)
            return 130
    return 0
