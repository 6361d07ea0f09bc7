"""Untuned Gauss-Newton methods against a tuned Adam (practical Gauss-Newton, section 5)."""

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

import locoprop_jax as lp
from benchmarks.shared import autoencoder, candidates, plots
from benchmarks.shared.autoencoder import narrower
from benchmarks.shared.candidates import Candidate, Claim, Experiment, Groups, race
from benchmarks.shared.classifier import Classifier
from benchmarks.shared.contestants import ADAM, FOOF, Contestant, constant
from benchmarks.shared.data import Dataset
from benchmarks.shared.steps import Batch, Params
from benchmarks.shared.training import Problem, Run, Settings

BATCH_SIZE = 1000
INVERSE_PERIOD = 20
AVERAGED = 0.9  # what is left of the average of the curvature after a step
ADAM_RATES = tuple(2.0**-power for power in (9, 10, 8, 11, 7, 12, 6, 13))  # from the middle
ADAM_PERIODS = (0.5, 0.25, 1.0, 0.125, 0.0625)  # in shares of all updates
TOP = 10


# --- methods -------------------------------------------------------------------------------------


def gauss_newton(
    label: str, optimizer: Any, curvature: str, *, is_averaged: bool = True, momentum: bool = False
) -> Contestant:
    """A method as it is, but for what the paper compares: where its curvature comes from."""
    options = {
        "decay": AVERAGED if is_averaged else 0.0,
        "statistics_steps": INVERSE_PERIOD if is_averaged else 1,
        "inverse_period": INVERSE_PERIOD,
        "momentum": momentum,
        "adapt_damping": True,
    }
    build = functools.partial(optimizer, **options)
    return Contestant(label, build, 1.0, True, curvature, constant)


def halving(period: float, peak: float, steps: int) -> optax.Schedule:
    """Half the learning rate after each `period` of the steps, a share of all."""
    length = max(1, round(period * steps))

    def schedule(count: Any) -> Float[Array, ""]:
        return peak * jnp.exp2(-jnp.asarray(count // length, jnp.float32))

    return schedule


def adam_grid(trials: int, problem: Problem, settings: Settings) -> Iterator[Candidate]:
    """As many of the paper's settings as there are trials, from the middle of the grid outward."""
    places = itertools.product(range(len(ADAM_RATES)), range(len(ADAM_PERIODS)))
    order = sorted(places, key=lambda at: at[0] / len(ADAM_RATES) + at[1] / len(ADAM_PERIODS))
    for i, j in order[:trials]:
        rate, period = ADAM_RATES[i], ADAM_PERIODS[j]
        method = ADAM._replace(label="Adam, tuned", schedule=functools.partial(halving, period))
        name = f"Adam, 2^{np.log2(rate):.0f}, halved every {period:.4g}"
        yield candidates.candidate(method, rate, problem, settings, name)


# --- experiments ---------------------------------------------------------------------------------


def run_autoencoder(
    experiment: Experiment, dataset: Dataset, args: argparse.Namespace, directory: Path
) -> bool:
    """Figure 2."""
    problem = autoencoder.make_problem(dataset, autoencoder.make_network(shrink=args.shrink))
    contestants = [
        gauss_newton("KFRA", lp.kfra, "ggn_output"),
        gauss_newton("KFRA, batch", lp.kfra, "ggn_output", is_averaged=False),
        gauss_newton("KFRA, momentum", lp.kfra, "ggn_output", momentum=True),
        gauss_newton("K-FAC", lp.kfac, "fisher_mc"),
        gauss_newton("K-FAC, batch", lp.kfac, "fisher_mc", is_averaged=False),
        gauss_newton("K-FAC, momentum", lp.kfac, "fisher_mc", momentum=True),
        FOOF,
    ]
    claims = [
        (
            "without tuning, KFRA and K-FAC outperform Adam with learning rate and decay tuned, "
            "per update and per second (section 5.1).",
            lambda runs: f"{candidates.ends(runs)}. " + _races(runs, "Adam, tuned"),
        ),
        (
            "KFRA is noticeably faster than K-FAC, per update and per second (section 5.1).",
            lambda runs: (
                race(runs, "KFRA", "K-FAC")
                + "; with the batch's curvature alone, "
                + race(runs, "KFRA, batch", "K-FAC, batch")
                + "."
            ),
        ),
    ]
    return _run("autoencoder", experiment, problem, contestants, claims, dataset, args, directory)


def run_mixture(
    experiment: Experiment, dataset: Dataset, args: argparse.Namespace, directory: Path
) -> bool:
    """Figure 3."""
    contestants = [
        gauss_newton("KFLR", lp.kflr, "ggn_exact"),
        gauss_newton("K-FAC", lp.kfac, "fisher_mc"),
    ]
    claims = [
        (
            "the second-order methods are faster than a tuned Adam per update and, on a CPU, per "
            "second; at the end Adam's loss is the lower one, all of around 1e-8 (section 5.2).",
            lambda runs: f"{candidates.ends(runs)}. " + _races(runs, "Adam, tuned"),
        ),
        (
            "K-FAC performs almost identically to KFLR, whose factors are exact (section 5.2).",
            lambda runs: race(runs, "KFLR", "K-FAC") + "; " + race(runs, "K-FAC", "KFLR") + ".",
        ),
    ]
    problem = mixture_problem(dataset, args.shrink)
    return _run("mixture", experiment, problem, contestants, claims, dataset, args, directory)


def _races(runs: Mapping[str, Run], rival: str) -> str:
    return "; ".join(race(runs, name, rival) for name in runs if "Adam" not in name) + "."


def _run(
    name: str,
    experiment: Experiment,
    problem: Problem,
    contestants: Sequence[Contestant],
    claims: Sequence[tuple[str, Callable[[Mapping[str, Run]], str]]],
    dataset: Dataset,
    args: argparse.Namespace,
    directory: Path,
) -> bool:
    settings = Settings(args.epochs, BATCH_SIZE, args.seed)
    described = candidates.describe(name, dataset, args, batch_size=BATCH_SIZE)
    default = ADAM._replace(label="Adam, 0.001", schedule=constant)
    fixed = [
        candidates.candidate(each, each.learning_rate, problem, settings, each.label)
        for each in (*contestants, default)
    ]
    planned = [*fixed, *adam_grid(args.trials, problem, settings)]
    groups, interrupted = candidates.train_candidates(planned, directory, described)
    runs = candidates.best(groups)
    if runs:
        lines = _lines(groups)
        title = f"{experiment.title}: {dataset.name}, {len(dataset.train):,} images"
        plots.plot_updates(lines, title, directory / "updates.png")
    found = [Claim(paper, text(runs)) for paper, text in claims]
    candidates.conclude(groups, found, directory, described)
    return interrupted


def _lines(groups: Groups) -> list[plots.Line]:
    """A line for each method; the area up to the mean of Adam's ten best is shaded."""
    tops = {
        name: [candidates.smoothed(run)[1] for run in runs[:TOP] if not run.stopped]
        for name, runs in groups.items()
    }
    return [
        line._replace(other=np.mean(tops[line.label], 0) if len(tops[line.label]) > 1 else None)
        for line in candidates.lines(candidates.best(groups))
    ]


# --- the mixture of two classifiers --------------------------------------------------------------


def mixture(
    outputs: Float[Array, "*examples 3"], labels: Float[Array, "*examples"]
) -> Float[Array, "*examples"]:
    """-log p(label), a mixture of two binary classifiers (eq. 27)."""
    gate, one, other = jnp.moveaxis(outputs, -1, 0)
    sign = 2 * labels - 1
    return -jnp.logaddexp(
        jax.nn.log_sigmoid(gate) + jax.nn.log_sigmoid(sign * one),
        jax.nn.log_sigmoid(-gate) + jax.nn.log_sigmoid(sign * other),
    )


def sample_mixture(rng: Array, outputs: Float[Array, "*examples 3"]) -> Float[Array, "*examples"]:
    p = jnp.exp(-mixture(outputs, jnp.ones_like(outputs[..., 0])))
    return jax.random.bernoulli(rng, p).astype(outputs.dtype)


mixture_loss = lp.losses.output_loss(sample=sample_mixture)(mixture)


def mixture_problem(dataset: Dataset, shrink: int) -> Problem:
    """Tell the odd classes from the even ones."""
    network = Classifier(narrower((1000, 500, 250, 30), shrink), nn.tanh, outputs=3)

    def loss_fn(params: Params, batch: Batch) -> Float[Array, ""]:
        outputs: Any = network.apply(params, batch["images"])
        return mixture_loss(outputs, batch["odd"]).mean()

    def examples(images: np.ndarray, labels: np.ndarray | None) -> Batch:
        assert labels is not None
        return {"images": images, "odd": (labels % 2).astype(np.float32)}

    return Problem(
        "mixture",
        init=lambda key: network.init(key, dataset.train[:1]),
        loss_fn=loss_fn,
        train=examples(dataset.train, dataset.train_labels),
        test=examples(dataset.test, dataset.test_labels),
    )
