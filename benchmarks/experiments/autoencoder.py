"""The papers' deep autoencoder, trained with LocoProp and with first-order methods.

    python -m benchmarks.autoencoder

trains the four methods for a few minutes on two CPU cores. The paper's run (locoprop, section 3) is

    python -m benchmarks.autoencoder --epochs 100 --train-images 60000
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import locoprop_jax as lp
from benchmarks.shared import cli, plots, report
from benchmarks.shared.comparison import compare
from benchmarks.shared.data import Dataset
from benchmarks.shared.methods import Hyperparameters
from benchmarks.shared.steps import Params
from benchmarks.shared.training import Problem, Run, Settings
from benchmarks.shared.tuned import TunedError, load_hyperparameters, write_json

NAME = "autoencoder"
DEFAULTS = {"epochs": 5, "train_images": 20_000, "batch_size": 1000}
QUICK = {"epochs": 2, "train_images": 2000, "batch_size": 200}
RECONSTRUCTED = 12  # test images in the picture


SIZES = {  # locoprop, section 3: the encoder's hidden layers and the code
    "standard": ((1000, 500, 250), 30),
    "wide": ((4000, 2000, 1000), 120),
    "deep": ((1000, *(500,) * 8, 250), 30),
}


class Autoencoder(nn.Module):
    """The standard deep autoencoder: tanh everywhere but at the code and at the logits."""

    activation: Callable[[Array], Array] = nn.tanh
    encoder: tuple[int, ...] = (1000, 500, 250)
    code: int = 30
    decoder: tuple[int, ...] = (250, 500, 1000)
    pixels: int = 784

    @nn.compact
    def __call__(self, images: Float[Array, "batch pixels"]) -> Float[Array, "batch pixels"]:
        hidden = images
        for width in self.encoder:
            hidden = self.activation(nn.Dense(width)(hidden))
        hidden = nn.Dense(self.code)(hidden)
        for width in self.decoder:
            hidden = self.activation(nn.Dense(width)(hidden))
        return nn.Dense(self.pixels)(hidden)


def make_network(
    size: str = "standard", activation: Callable[[Array], Array] = nn.tanh, shrink: int = 1
) -> Autoencoder:
    """One of the paper's three autoencoders, every hidden layer `shrink` times narrower."""
    encoder, code = SIZES[size]
    narrow, (narrow_code,) = narrower(encoder, shrink), narrower((code,), shrink)
    return Autoencoder(
        activation=activation, encoder=narrow, code=narrow_code, decoder=narrow[::-1]
    )


def narrower(widths: Sequence[int], shrink: int) -> tuple[int, ...]:
    return tuple(max(1, width // shrink) for width in widths)


def make_problem(dataset: Dataset, network: nn.Module | None = None) -> Problem:
    """Reconstruct the images: cross-entropy summed over pixels, mean over the batch.

    `network` is an `Autoencoder`, the standard one if None.
    """
    network = network or Autoencoder()

    def loss_fn(params: Params, images: Float[Array, "batch 784"]) -> Float[Array, ""]:
        logits: Any = network.apply(params, images)
        return lp.losses.sigmoid_binary_cross_entropy(logits, images).sum(-1).mean()

    return Problem(
        NAME,
        init=lambda key: network.init(key, dataset.train[:1]),
        loss_fn=loss_fn,
        train=dataset.train,
        test=dataset.test,
    )


def reconstruct(
    params: Params, images: Float[np.ndarray, "images 784"]
) -> Float[np.ndarray, "images 784"]:
    return np.asarray(nn.sigmoid(Autoencoder().bind(params)(jnp.asarray(images))))


def parse_arguments(
    argv: Sequence[str] | None,
) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.autoencoder",
        description="Train the standard deep autoencoder (784-1000-500-250-30-250-500-1000-784, "
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


def main(argv: Sequence[str] | None = None) -> int:
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


if __name__ == "__main__":
    sys.exit(main())
