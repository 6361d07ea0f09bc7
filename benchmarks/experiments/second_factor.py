"""What K-FAC owes to its damping and to its second factor (Benzing, Figures 3 and 4).

Steps are plain, as in the paper: a constant learning rate times the direction.
"""

import argparse
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import locoprop_jax as lp
from benchmarks.experiments import natural
from benchmarks.experiments.natural import BATCH_SIZE, MC, MOMENTUM, SGD, Variant
from benchmarks.shared import candidates, plots
from benchmarks.shared.candidates import Claim, Experiment, Groups, final_loss
from benchmarks.shared.classifier import benzing_mlp
from benchmarks.shared.comparison import Job
from benchmarks.shared.data import Dataset
from benchmarks.shared.steps import Batch, LossFn, Params, State, slice_examples
from benchmarks.shared.training import Problem, Run, Settings
from benchmarks.shared.trajectories import follow
from locoprop_jax._layers.blocks import blocks, dtype_of, matrix
from locoprop_jax._layers.rows import as_rows, extend

DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of a loss that is a mean over the batch
AMORTISED: Mapping[str, Any] = {"inverse_period": 10, "statistics_steps": 10}

HEURISTIC, EXACT, FOOF = "K-FAC, heuristic", "K-FAC, exact damping", "FOOF with K-FAC's damping"
CHANGES: Mapping[str, Mapping[str, Any]] = {
    HEURISTIC: {},
    EXACT: {"exact_damping": True},
    FOOF: {"output_factor": "constant"},
}


# --- damping -------------------------------------------------------------------------------------


def run_damping(
    experiment: Experiment, dataset: Dataset, args: argparse.Namespace, directory: Path
) -> bool:
    """Figure 3: training with each damping, and how alike K-FAC's and FOOF's updates are."""
    problem, settings = _problem(dataset, args)
    variants = [SGD] + [
        variant._replace(contestant=variant.contestant._replace(label=variant.name))
        for label, changes in CHANGES.items()
        for variant in _variants(label, changes)
    ]
    described = _described("damping", dataset, args, settings, dampings=DAMPINGS)
    planned = list(natural.grid(variants, problem, settings, args.trials))
    groups, interrupted = candidates.train_candidates(planned, directory, described)
    ends = {
        label: np.array([_end(groups, f"{label}, damping {d:g}") for d in DAMPINGS])
        for label in CHANGES
    }
    alike: dict[str, list[float]] = {}
    job = _best_job(groups, planned, HEURISTIC)
    if job is not None and not interrupted:
        alike, interrupted = similarities(job, args.every)
    sgd = _end(groups, SGD.name)
    claims = [
        Claim(
            "heuristic damping is strictly needed: with standard damping K-FAC performs like SGD "
            "(Figure 3A).",
            f"SGD ends at {sgd:.4g}; "
            + "; ".join(f"{label} at {_lowest(losses)}" for label, losses in ends.items())
            + ".",
        ),
        Claim(
            "FOOF already works well for lower damping than K-FAC (Figure 3C, D).",
            "; ".join(
                f"{label}: " + ", ".join(f"{loss:.3g}" for loss in ends[label])
                for label in (HEURISTIC, FOOF)
            )
            + f" for damping {', '.join(f'{d:g}' for d in DAMPINGS)}.",
        ),
    ]
    if alike:
        claims.append(
            Claim(
                "heuristic damping significantly increases K-FAC's similarity to FOOF (Figure 3B).",
                "; ".join(
                    f"{label}: " + ", ".join(f"{value:.2f}" for value in values)
                    for label, values in alike.items()
                )
                + " for the same dampings.",
            )
        )
    best = _best_runs(groups, (SGD.name, *CHANGES))
    title = f"{experiment.title}: {dataset.name}, {len(dataset.train):,} images"
    if best:
        plots.plot_updates(candidates.lines(best), title, directory / "updates.png")
    x = np.array(DAMPINGS)
    panels = [
        plots.Panel(
            "final training loss, best learning rate",
            {label: (x, losses) for label, losses in ends.items()},
            log=True,
        ),
        plots.Panel(
            "cosine of the update with FOOF's, in FOOF's metric",
            {label: (x, np.array(values)) for label, values in alike.items()},
        ),
    ]
    plots.plot_panels(panels, "damping", title, directory / "dampings.png", log=True)
    more = {"similarity": alike}
    candidates.conclude(groups, claims, directory, described, more)
    return interrupted


def _variants(label: str, changes: Mapping[str, Any]) -> list[Variant]:
    """A kind of K-FAC with each damping, its learning rates about those that are as good."""
    share = {HEURISTIC: 0.3, EXACT: 0.2, FOOF: 0.1}[label]
    power = 1.0 if label == EXACT else 0.5
    rates = {damping: share * damping**power for damping in DAMPINGS}
    options = {"relative": False, **AMORTISED, **changes}
    return natural.steps(label, lp.scale_by_kfac, rates, MC, **options)


def similarities(job: Job, every: int) -> tuple[dict[str, list[float]], bool]:
    """Mean cosines with FOOF's update along a run, for each damping, from single batches."""
    loss_fn, layers = job.problem.loss_fn, _layers(job)
    measure = make_similarity(loss_fn, layers)

    def at(state: State, batch: Batch) -> dict[str, Array]:
        found = [measure(state.params, batch, state.rng, jnp.asarray(d)) for d in DAMPINGS]
        return {label: jnp.stack([each[label] for each in found]) for label in found[0]}

    found, interrupted = follow(job, every, at, "similarity")
    if not found:
        return {}, interrupted
    means = {
        label: np.mean([point[label] for point in found.values()], 0).tolist()
        for label in (HEURISTIC, EXACT)
    }
    return means, interrupted


def make_similarity(
    loss_fn: LossFn, layers: lp.Layers
) -> Callable[[Params, Batch, Array, Array], dict[str, Float[Array, ""]]]:
    """Cosines of K-FAC's updates with FOOF's, of the same damping, in FOOF's metric.

    That is the second moment of the layers' inputs: how alike the updates move the neurons.
    """

    @jax.jit
    def measure(params: Params, batch: Batch, key: Array, damping: Array) -> dict[str, Array]:
        capture = lp.value_grad_and_capture(loss_fn, curvature=MC)
        _, grads, captured = capture(params, batch, rng=key)

        def moved(label: str) -> Array:
            options: Any = {"damping": damping, "relative": False, "decay": 0.0}
            tx = lp.scale_by_kfac(layers, **options, **CHANGES[label])
            update, _ = tx.update(grads, tx.init(params), params, captured=captured)
            return jnp.concatenate(
                [
                    (extend(as_rows(captured[name].inputs, dtype_of(w)), w) @ matrix(w)).ravel()
                    for name, w in blocks(layers, update).items()
                ]
            )

        reference = moved(FOOF)

        def cosine(own: Array) -> Array:
            lengths = jnp.linalg.norm(own) * jnp.linalg.norm(reference)
            return own @ reference / jnp.maximum(lengths, jnp.finfo(own.dtype).tiny)

        return {label: cosine(moved(label)) for label in (HEURISTIC, EXACT)}

    return measure


# --- the second factor ---------------------------------------------------------------------------


def run_second_factor(
    experiment: Experiment, dataset: Dataset, args: argparse.Namespace, directory: Path
) -> bool:
    """Figure 4B and C: training, and the progress of single steps along K-FAC's trajectory."""
    problem, settings = _problem(dataset, args)
    variants = [SGD, MOMENTUM, *natural.foof(**AMORTISED), *natural.kfac("K-FAC", **AMORTISED)]
    described = _described("second_factor", dataset, args, settings)
    planned = list(natural.grid(variants, problem, settings, args.trials))
    groups, interrupted = candidates.train_candidates(planned, directory, described)
    runs = candidates.best(groups)
    title = f"{experiment.title}: {dataset.name}, {len(dataset.train):,} images"
    if runs:
        plots.plot_updates(candidates.lines(runs), title, directory / "updates.png")
    claims = [
        Claim(
            "FOOF is more data efficient than K-FAC (Figure 4B).",
            natural.compared(runs, "FOOF", "K-FAC"),
        )
    ]
    more: dict[str, Any] = {}
    job = _best_job(groups, planned, "K-FAC")
    if job is not None and not interrupted:
        found, interrupted = progress_of_steps(job, variants, args.every)
        if found:
            claims.append(_second_factor_claim(found))
            more["progress"] = {
                "updates": list(found),
                **{
                    name: [float(at[name]) for at in found.values()] for name in ("with", "without")
                },
            }
            _plot_progress(found, title, directory)
    candidates.conclude(groups, claims, directory, described, more)
    return interrupted


def progress_of_steps(
    job: Job, variants: list[Variant], every: int
) -> tuple[dict[int, dict[str, Array]], bool]:
    """Along K-FAC's run, by how much a step lowers the loss of its own batch, as shares of it."""
    damping = next(each.damping for each in variants if job.name.startswith(f"{each.name}, "))
    direction = functools.partial(lp.scale_by_kfac, damping=damping, relative=False, **AMORTISED)
    rate = job.hyperparameters["learning_rate"]
    measure = make_progress(job.problem.loss_fn, _layers(job), direction, rate)
    return follow(job, every, measure, "progress of single steps")


def make_progress(
    loss_fn: LossFn, layers: lp.Layers, direction: Any, rate: float
) -> Callable[[State, Batch], dict[str, Float[Array, ""]]]:
    """The progress of K-FAC's step to come, with its second factor and without it.

    Both have the state, the sampled labels and, layer by layer, the length of K-FAC's own step.
    """

    @jax.jit
    def measure(state: State, batch: Batch) -> dict[str, Array]:
        key = jax.random.split(state.rng)[1]  # the step's own
        capture = lp.value_grad_and_capture(loss_fn, curvature=MC)
        loss, grads, captured = capture(state.params, batch, rng=key)
        opt_state: Any = state.opt_state

        def gain(**change: Any) -> Array:
            tx = direction(layers, **change)
            update, _ = tx.update(grads, opt_state[0], state.params, captured=captured)
            new = jax.tree.map(lambda p, u: p - rate * u, state.params, update)
            return (loss - loss_fn(new, batch)) / loss

        return {"with": gain(), "without": gain(output_factor="norm")}

    return measure


def _second_factor_claim(found: Mapping[int, Mapping[str, Array]]) -> Claim:
    kept = np.array([at["with"] for at in found.values()])
    dropped = np.array([at["without"] for at in found.values()])
    return Claim(
        "along K-FAC's trajectory a step without the second factor, as long in each layer, "
        "improves the loss of its mini-batch more (Figure 4C).",
        f"on average by {100 * dropped.mean():.3g}% without and {100 * kept.mean():.3g}% with it; "
        f"more without it at {100 * np.mean(dropped > kept):.0f}% of {len(kept)} steps.",
    )


def _plot_progress(found: Mapping[int, Mapping[str, Array]], title: str, directory: Path) -> None:
    x = np.array(list(found), float)
    curves = {
        label: (x, np.array([100 * at[name] for at in found.values()]))
        for label, name in (("K-FAC's step", "with"), ("without its second factor", "without"))
    }
    panel = plots.Panel("fall of the mini-batch's loss, %", curves)
    plots.plot_panels([panel], "updates", title, directory / "progress.png")


# --- both ----------------------------------------------------------------------------------------


def _problem(dataset: Dataset, args: argparse.Namespace) -> tuple[Problem, Settings]:
    size = min(BATCH_SIZE, len(dataset.train))
    return benzing_mlp(dataset, args.shrink), Settings(args.epochs, size, args.seed)


def _described(
    name: str, dataset: Dataset, args: argparse.Namespace, settings: Settings, **others: Any
) -> dict[str, Any]:
    return candidates.describe(
        name, dataset, args, batch_size=settings.batch_size, every=args.every, **others
    )


def _layers(job: Job) -> lp.Layers:
    params = job.problem.init(jax.random.key(0))
    some = slice_examples(job.problem.train, 0, job.settings.batch_size)
    return lp.find_layers(job.problem.loss_fn, params, some)


def _end(groups: Groups, name: str) -> float:
    """A method's final loss with its best learning rate; not a number if it did not get there."""
    runs = groups.get(name, ())
    return final_loss(runs[0]) if runs and not runs[0].stopped else float("nan")


def _lowest(losses: Float[np.ndarray, " dampings"]) -> str:
    if np.isnan(losses).all():
        return "no number"
    return f"{np.nanmin(losses):.4g} (damping {DAMPINGS[int(np.nanargmin(losses))]:g})"


def _best_runs(groups: Groups, labels: tuple[str, ...]) -> dict[str, Run]:
    """The best run of each method over all its dampings."""
    found = {}
    for label in labels:
        runs = [runs[0] for name, runs in groups.items() if name.split(", damping")[0] == label]
        best = min(runs, key=final_loss, default=None)
        if best is not None and not best.stopped:
            found[label] = best
    return found


def _best_job(groups: Groups, planned: list[candidates.Candidate], label: str) -> Job | None:
    """What trained a method best."""
    best = _best_runs(groups, (label,)).get(label)
    return next((each.job for each in planned if best and each.job.name == best.method), None)
