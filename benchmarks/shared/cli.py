"""What the command lines of the experiments have in common."""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.shared.data import DATASETS, DataError, Dataset, load_dataset, subset
from benchmarks.shared.methods import METHODS
from benchmarks.shared.results import RESULTS, shown
from benchmarks.shared.tuned import TUNED

Argv = Sequence[str] | None  # None: what the program was called with
Parsed = tuple[argparse.ArgumentParser, argparse.Namespace]


def make_parser(name: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """The parser of `python -m benchmarks NAME`."""
    program = f"python -m benchmarks {name}"
    return argparse.ArgumentParser(prog=program, description=description, epilog=epilog)


def positive_int(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return value


def seed(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(
            f"must be a whole number from 0 to 2**32 - 1, got {text!r}"
        )
    return value


def add_numbers(
    parser: argparse.ArgumentParser, options: Mapping[str, tuple[int | Sequence[int] | None, str]]
) -> None:
    """Options that are positive whole numbers: name -> default (several for a list), and what.

    Without a default each experiment has its own.
    """
    for option, (default, what) in options.items():
        several = isinstance(default, Sequence)
        value = "the experiment's own" if default is None else default
        parser.add_argument(
            f"--{option}",
            type=positive_int,
            nargs="+" if several else None,
            default=default,
            metavar="N",
            help=f"{what} (default: {' '.join(map(str, default)) if several else value})",
        )


def add_output_argument(parser: argparse.ArgumentParser, name: str) -> None:
    """--output, the JSON file of a measurement, which has this name among the results."""
    parser.add_argument(
        "--output",
        type=Path,
        default=RESULTS / name,
        metavar="FILE",
        help=f"where the numbers go (default: {shown(RESULTS / name)})",
    )


def add_result_arguments(parser: argparse.ArgumentParser, directory: str, what: str) -> None:
    """--hyperparameters and --output-dir."""
    parser.add_argument(
        "--hyperparameters",
        type=Path,
        default=TUNED,
        metavar="FILE",
        help=f"JSON file of tuned values (default: the committed {shown(TUNED)})",
    )
    add_output_dir_argument(parser, directory, what)


def add_output_dir_argument(parser: argparse.ArgumentParser, directory: str, what: str) -> None:
    """--output-dir, the folder of plots and numbers."""
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path(directory),
        metavar="DIR",
        help=f"{what} (default: %(default)s)",
    )


def add_names_argument(parser: argparse.ArgumentParser, known: Iterable[str], what: str) -> None:
    """The names of what to run: `parse` has each once, all if there are none."""
    known = list(known)

    def name(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"no {what} {text!r}; there are {', '.join(known)}")
        return text

    parser.add_argument(
        "names",
        nargs="*",
        type=name,
        default=known,
        metavar="NAME",
        help=f"which to run, in this order: {', '.join(known)} (default: all)",
    )


def add_training_arguments(parser: argparse.ArgumentParser, defaults: Mapping[str, int]) -> None:
    """--methods, --iterations, and what `add_run_arguments` adds."""
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        metavar="METHOD",
        help=f"which to train, in this order: {', '.join(METHODS)} (default: all)",
    )
    iterations = "local iterations per step of LocoProp, the paper's T"
    add_numbers(parser, {"iterations": (10, iterations)})
    add_run_arguments(parser, defaults)


def add_run_arguments(parser: argparse.ArgumentParser, defaults: Mapping[str, int]) -> None:
    """--epochs, --train-images, --batch-size, --dataset, --data-dir, --seed."""
    images = "how many of them to use: the first ones, and no more test images than these"
    add_numbers(
        parser,
        {
            "epochs": (defaults["epochs"], "passes over the training images"),
            "train-images": (defaults["train_images"], images),
            "batch-size": (defaults["batch_size"], "images per step"),
        },
    )
    add_data_arguments(parser)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """--dataset, --data-dir, --seed."""
    parser.add_argument(
        "--dataset",
        choices=DATASETS,
        default="auto",
        help="auto is fashion-mnist, or generated curves where that cannot be had (default: auto)",
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="where the IDX files are, or CIFAR-10's binary ones (default: the environment "
        "variable LOCOPROP_DATA, Debian's package dataset-fashion-mnist, or a download)",
    )
    parser.add_argument(
        "--seed",
        type=seed,
        default=0,
        metavar="N",
        help="of the parameters, the order of the batches and CURVES (default: %(default)s)",
    )


def add_quick_argument(
    parser: argparse.ArgumentParser,
    quick: Mapping[str, int],
    what: str = "a look in under a minute",
) -> None:
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{what}: "
        + ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in quick.items())
        + " unless given",
    )


def parse(
    parser: argparse.ArgumentParser, quick: Mapping[str, Any], argv: Argv
) -> argparse.Namespace:
    """The arguments; with --quick its values take the place of the defaults."""
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(**quick)
        args = parser.parse_args(argv)
    if "names" in args:
        args.names = list(dict.fromkeys(args.names))
    return args


def make_output_dir(parser: argparse.ArgumentParser, directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --output-dir: cannot make {directory}: {error.strerror}")


def check_training_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.batch_size > args.train_images:
        parser.error(
            f"argument --batch-size: {args.batch_size} is more than --train-images "
            f"{args.train_images}, which leaves no complete batch"
        )
    if args.dataset == "curves" and args.data_dir is not None:
        parser.error("argument --data-dir: --dataset curves is generated and reads no files")


def load_images(args: argparse.Namespace, labels: bool = False) -> Dataset:
    dataset = load_dataset(args.dataset, args.data_dir, args.seed, labels=labels)
    return subset(dataset, args.train_images)


def open_images(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    labels: bool = False,
    how: str = "",
    hint: str = "",
) -> Dataset:
    """The images, once there is a folder for the results; says what is trained on, how and where.

    Ends the program where that fails, with a hint if the images cannot be had.
    """
    make_output_dir(parser, args.output_dir)
    try:
        dataset = load_images(args, labels)
    except DataError as error:
        parser.error(f"{error}{hint}")
    print(
        f"{dataset.name} ({dataset.source}): {len(dataset.train):,} training images, "
        f"{how}on {jax.devices()[0].device_kind}."
    )
    return dataset


def in_batches(args: argparse.Namespace) -> str:
    """How long is trained, for `open_images`."""
    return f"{args.epochs} epochs of batches of {args.batch_size}, "


def method_options(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The command line's options that this method's `build` takes beside its hyperparameters."""
    return {option: getattr(args, option) for option in METHODS[name].options}
