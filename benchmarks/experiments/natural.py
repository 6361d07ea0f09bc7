"""K-FAC against the exact natural gradient that it approximates (Benzing, Figures 1 and 2).

As in the paper steps are plain: a constant learning rate times the direction, and constant damping,
with the best of a few of both for each method; no metric and no Gauss-Newton model sizes the steps.
"""

import argparse
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import optax

import locoprop_jax as lp
from benchmarks.shared import candidates, classifier, plots
from benchmarks.shared.candidates import Candidate, Claim, Experiment
from benchmarks.shared.classifier import Classifier, benzing_mlp
from benchmarks.shared.contestants import Contestant, constant, rates
from benchmarks.shared.data import Dataset, standardised, subset
from benchmarks.shared.training import Problem, Run, Settings

BATCH_SIZE = 100
KFAC_DAMPINGS = (0.01, 0.1)  # of a loss that is a mean over the batch
NATURAL_DAMPINGS = (1.0, 10.0)
FOOF_DAMPINGS = (0.1, 1.0)  # in units of the inputs' mean square

MC, FULL = "fisher_mc", "ggn_exact"  # of one label per image, and of all


# --- methods -------------------------------------------------------------------------------------


def plain(
    direction: Callable[..., optax.GradientTransformation],
    layers: lp.Layers,
    learning_rate: optax.ScalarOrSchedule,
) -> optax.GradientTransformation:
    return optax.chain(direction(layers), optax.scale_by_learning_rate(learning_rate))


class Variant(NamedTuple):
    """A method with one damping, if it has any; the contestant's label is the method's."""

    name: str
    contestant: Contestant
    damping: float | None = None


def steps(
    label: str,
    direction: Any,
    rates: Mapping[float, float],
    curvature: str | None = None,
    **options: Any,
) -> list[Variant]:
    """Plain steps along a direction, for each damping with a middle learning rate of its own."""
    result = []
    for damping, rate in rates.items():
        build = functools.partial(plain, functools.partial(direction, damping=damping, **options))
        contestant = Contestant(label, build, rate, True, curvature, constant)
        result.append(Variant(f"{label}, damping {damping:g}", contestant, damping))
    return result


# The learning rates in the middle are the best of some a factor of three apart, with networks of 60
# and 125 units, 100 and 1000 images. Heuristic damping adds its square root to either factor.


def kfac(label: str, curvature: str = MC, **options: Any) -> list[Variant]:
    rates = {damping: 0.3 * damping**0.5 for damping in KFAC_DAMPINGS}
    return steps(label, lp.scale_by_kfac, rates, curvature, relative=False, **options)


def natural(label: str, curvature: str = MC, **options: Any) -> list[Variant]:
    rates = {damping: 0.3 * damping for damping in NATURAL_DAMPINGS}
    return steps(label, lp.scale_by_natural_gradient, rates, curvature, relative=False, **options)


def foof(**options: Any) -> list[Variant]:
    return steps("FOOF", lp.scale_by_foof, dict.fromkeys(FOOF_DAMPINGS, 3.0), **options)


def first_order(label: str, rate: float, **options: Any) -> Variant:
    build = functools.partial(optax.sgd, **options)
    return Variant(label, Contestant(label, build, rate, schedule=constant))


SGD = first_order("SGD", 0.1)
MOMENTUM = first_order("Momentum", 0.03, momentum=0.9)


def grid(
    variants: Sequence[Variant], problem: Problem, settings: Settings, trials: int
) -> Iterator[Candidate]:
    """Each method and damping with several learning rates."""
    for name, contestant, _ in variants:
        for rate in rates(contestant.learning_rate, trials):
            yield candidates.candidate(contestant, rate, problem, settings, f"{name}, {rate:.3g}")


# --- experiments ---------------------------------------------------------------------------------


def run_full_batch(
    experiment: Experiment, dataset: Dataset, args: argparse.Namespace, directory: Path
) -> bool:
    """Figures 1D and 2C: gradient and curvature of all data, exact but for K-FAC."""
    few = subset(dataset, min(args.full_batch, len(dataset.train)))
    variants = [
        SGD,
        MOMENTUM,
        *foof(decay=0.0),
        *kfac("K-FAC", decay=0.0),
        *kfac("K-FAC, full Fisher", FULL, decay=0.0),
        *natural("Natural"),
        *natural("Natural, full Fisher", FULL),
        *natural("Natural, blocks", block_diagonal=True),
        *natural("Natural, blocks, full Fisher", FULL, block_diagonal=True),
    ]
    claims = [
        (
            "K-FAC significantly outperforms exact natural gradients, even where the gradient, the "
            "Fisher and its inverse are exact (Figure 1D).",
            ("K-FAC", "Natural, full Fisher"),
        ),
        (
            "exact natural gradients do outperform SGD with momentum (Figure 1D).",
            ("Natural, full Fisher", "Momentum"),
        ),
        (
            "of sampled labels, natural gradients are little better than SGD with momentum "
            "(Figure 1D).",
            ("Natural", "Momentum"),
        ),
        (
            "K-FAC outperforms the exact natural gradient of the block-diagonal Fisher too, so its "
            "blocks do not explain it (Figure 2C).",
            ("K-FAC", "Natural, blocks, full Fisher"),
        ),
    ]
    problem = benzing_mlp(few, args.shrink)._replace(test=None)
    settings = Settings(args.epochs, len(few.train), args.seed)
    return _run("natural", experiment, problem, settings, variants, claims, few, args, directory)


def run_logistic(
    experiment: Experiment, dataset: Dataset, args: argparse.Namespace, directory: Path
) -> bool:
    """Figure 2A: one layer, whose block is the whole Fisher."""
    few = subset(dataset, min(args.full_batch, len(dataset.train)))
    variants = [
        SGD,
        MOMENTUM,
        *foof(decay=0.0),
        *kfac("K-FAC", decay=0.0),
        *kfac("K-FAC, full Fisher", FULL, decay=0.0),
        *natural("Natural"),
        *natural("Natural, full Fisher", FULL),
    ]
    claims = [
        (
            "K-FAC clearly outperforms natural gradients where the Fisher has but one block "
            "(Figure 2A).",
            ("K-FAC", "Natural"),
        ),
        (
            "the same with the full Fisher.",
            ("K-FAC, full Fisher", "Natural, full Fisher"),
        ),
    ]
    network = Classifier((), nn.relu, False, nn.initializers.he_normal())
    problem = classifier.make_problem(standardised(few), network)._replace(test=None)
    settings = Settings(args.epochs, len(few.train), args.seed)
    return _run("logistic", experiment, problem, settings, variants, claims, few, args, directory)


def run_minibatches(
    experiment: Experiment, dataset: Dataset, args: argparse.Namespace, directory: Path
) -> bool:
    """Figures 1A, 1B, 2B and I.6: curvature of mini-batches."""
    size = min(BATCH_SIZE, len(dataset.train))
    often: Mapping[str, Any] = {"inverse_period": 10, "statistics_steps": 10}
    variants = [
        SGD,
        MOMENTUM,
        *foof(**often),
        *kfac("K-FAC", **often),
        *kfac("K-FAC, batch", decay=0.0),
        *natural("Natural"),
        *natural("Natural, last batch", batch_size=size),
        *natural("Natural, blocks", block_diagonal=True),
    ]
    claims = [
        (
            "K-FAC's loss is far below that of subsampled natural gradients (Figure 1A: 10 to 20 "
            "times, after 10 epochs of all images).",
            ("K-FAC", "Natural, last batch"),
        ),
        (
            "so is that of K-FAC with the curvature of one batch, as natural gradients have it "
            "(Figure 1B).",
            ("K-FAC, batch", "Natural"),
        ),
        (
            "K-FAC outperforms natural gradients of blocks as well (Figure 2B).",
            ("K-FAC", "Natural, blocks"),
        ),
        (
            "gradient and Fisher had better come from different batches (Figure I.6).",
            ("Natural, last batch", "Natural"),
        ),
    ]
    problem = benzing_mlp(dataset, args.shrink)
    settings = Settings(args.epochs, size, args.seed)
    return _run(
        "minibatches", experiment, problem, settings, variants, claims, dataset, args, directory
    )


def _run(
    name: str,
    experiment: Experiment,
    problem: Problem,
    settings: Settings,
    variants: Sequence[Variant],
    claims: Sequence[tuple[str, tuple[str, str]]],
    dataset: Dataset,
    args: argparse.Namespace,
    directory: Path,
) -> bool:
    described = candidates.describe(name, dataset, args, batch_size=settings.batch_size)
    planned = grid(variants, problem, settings, args.trials)
    groups, interrupted = candidates.train_candidates(planned, directory, described)
    runs = candidates.best(groups)
    if runs:
        title = f"{experiment.title}: {dataset.name}, {len(dataset.train):,} images"
        plots.plot_updates(candidates.lines(runs), title, directory / "updates.png")
    found = [Claim(paper, compared(runs, *pair)) for paper, pair in claims]
    candidates.conclude(groups, found, directory, described)
    return interrupted


def compared(runs: Mapping[str, Run], one: str, other: str) -> str:
    """Two methods' final training losses, in words."""
    if one not in runs or other not in runs:
        return f"{one} or {other} did not finish."
    losses = [candidates.final_loss(runs[name]) for name in (one, other)]
    return (
        f"{one} ends at {losses[0]:.4g}, {other} at {losses[1]:.4g}: "
        f"{losses[1] / losses[0]:.3g} times that."
    )
