"""One run on an accelerator: what a step costs there beside Adam's, and the time to a loss.

    python -m benchmarks accelerator                   under five minutes on a GPU
    python -m benchmarks accelerator --tiny            everything in miniature, on any machine
    python -m benchmarks accelerator vit race          some of it

A cell is one method on one network. Where equal layers can be solved apart or stacked, both are
measured. A cell that fails, because memory runs out, is recorded with its error, and one that
`--seconds` leaves no time for as not run. After each cell accelerator_<backend>.json is written
anew, so that what there is survives.
"""

import argparse
import functools
import gc
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

import locoprop_jax as lp
from benchmarks.costs.capture_cost import Task
from benchmarks.costs.costs import METHODS, PERIOD, Cost, cost, of_images, of_model
from benchmarks.shared import cli, report
from benchmarks.shared.autoencoder import make_network, make_problem
from benchmarks.shared.contestants import Contestant, constant
from benchmarks.shared.data import Dataset, generate_curves
from benchmarks.shared.models import LanguageModel, ResNet50, ViT
from benchmarks.shared.results import write_json
from benchmarks.shared.timing import bytes_of
from benchmarks.shared.training import Problem, Settings, train
from locoprop_jax._layers import stacking

RACE = "race"


# --- the networks --------------------------------------------------------------------------------


def autoencoder(batch: int, shrink: int = 1) -> Task:
    pixels = np.random.default_rng(0).uniform(size=(batch, 784)).astype(np.float32)
    problem = autoencoder_problem(pixels, shrink)
    return Task(problem.loss_fn, problem.init(jax.random.key(0)), jnp.asarray(pixels))


def autoencoder_problem(pixels: np.ndarray, shrink: int) -> Problem:
    network = make_network("standard", shrink=shrink)
    return make_problem(Dataset("random", "generated", pixels, pixels), network)


def gpt2(
    batch: int = 8,
    tokens: int = 1024,
    vocabulary: int = 50257,
    depth: int = 12,
    width: int = 768,
    heads: int = 12,
) -> Task:
    """GPT-2 small, its embedding and its last layer apart, all of it in bfloat16."""
    text = np.random.default_rng(0).integers(0, vocabulary, (batch, tokens))
    task = of_model(LanguageModel(vocabulary, depth, width, heads), text, text)
    return task._replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), task.params))


class Network(NamedTuple):
    """A network in its real size and in miniature."""

    what: str
    real: Callable[[], Task]
    tiny: Callable[[], Task]


NETWORKS: Mapping[str, Network] = {
    "autoencoder": Network(
        "the papers' autoencoder, batch 1000",
        functools.partial(autoencoder, 1000),
        functools.partial(autoencoder, 16, 100),
    ),
    "autoencoder_large": Network(
        "the papers' autoencoder, batch 8192",
        functools.partial(autoencoder, 8192),
        functools.partial(autoencoder, 64, 100),
    ),
    "vit": Network(
        "ViT-S/16, 224 x 224 pixels, batch 32",
        lambda: of_images(ViT(1000, 16, 12, 384, 6), 224, 3),
        lambda: of_images(ViT(10, 4, 1, 8, 2), 8, 3),
    ),
    "gpt2": Network(
        "GPT-2 small in bfloat16, 8 x 1024 tokens",
        gpt2,
        functools.partial(gpt2, 2, 8, 16, 1, 8, 2),
    ),
    "resnet": Network(
        "ResNet-50, 224 x 224 pixels, batch 32",
        lambda: of_images(ResNet50(1000), 224, 3),
        lambda: of_images(ResNet50(10, (4,), (1,)), 8, 3),
    ),
}
CAPTURING = [name for name, method in METHODS.items() if method.needs_capture]


# --- the costs of a step -------------------------------------------------------------------------


def measured(
    make: Callable[[], Task], method: str, stack: bool | None, steps: int
) -> dict[str, Any]:
    """The numbers of one cell, or its error."""
    default = stacking.stacks_by_default()
    chosen = default if stack is None else stack
    try:
        task = make()
        with mock.patch.object(stacking, "stacks_by_default", lambda: chosen):
            # A period first: inversions are more frequent in the beginning.
            own: Cost = cost(task, METHODS[method], steps)
    except Exception as error:  # the other cells have to go on, whatever happened to this one
        return {"error": _words(error)}
    return {
        "trace_seconds": own.trace,
        "compile_seconds": own.compile,
        "step_seconds": own.step,
        "state_bytes": own.state,
        "peak_bytes": bytes_of(task.params) + own.state + own.temporary,
    }


def _words(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


# --- the time to a loss --------------------------------------------------------------------------

# Of those with several learning rates the best one stands in the table.
RACERS: Mapping[str, tuple[Contestant, ...]] = {
    "Adam": tuple(Contestant("Adam", optax.adam, rate) for rate in (1e-3, 3e-3)),
    "Muon": tuple(Contestant("Muon", contrib.muon, rate) for rate in (3e-3, 1e-2)),
    "FOOF": (Contestant("FOOF", lp.foof, 0.1, True),),
    "LNB": (Contestant("LNB", lp.lnb, 0.1, True),),
    "K-FAC": (
        Contestant(
            "K-FAC",
            lp.kfac,
            1.0,
            True,
            "fisher_mc",
            constant,
        ),
    ),
}


class Race(NamedTuple):
    """On how many images, how they are gone through, and what widths are divided by."""

    images: int
    settings: Settings
    shrink: int = 1


REAL_RACE = Race(20_000, Settings(epochs=20, batch_size=1000, seed=0))
TINY_RACE = Race(64, Settings(epochs=2, batch_size=16, seed=0), shrink=100)


def raced(race: Race, name: str) -> dict[str, Any]:
    """The losses of one method's best run on generated curves, epoch by epoch; or its error."""
    try:
        pixels, _ = generate_curves(0, race.images, 1)
        problem = autoencoder_problem(pixels[: race.images], race.shrink)._replace(test=None)
        runs = [
            train(problem, name, own.method(), {"learning_rate": own.learning_rate}, race.settings)
            for own in RACERS[name]
        ]
    except Exception as error:  # as above
        return {"error": _words(error)}
    best = min(runs, key=lambda run: run.curve[-1].train_loss)
    return {
        "compile_seconds": best.compile_seconds,
        "learning_rate": best.hyperparameters["learning_rate"],
        "stopped": best.stopped,
        "curve": [[record.step, record.seconds, record.train_loss] for record in best.curve],
    }


def seconds_to(curve: list[list[float]], goal: float) -> float | None:
    """Of the steps until the loss was at most the goal; None if it never was."""
    return next((seconds for _, seconds, loss in curve if loss <= goal), None)


# --- the report ----------------------------------------------------------------------------------


def tables(found: Mapping[str, Any]) -> str:
    """The cells of each network beside Adam, then the race."""
    header = ("network", "method", "layers", "trace + compile", "step", "state", "peak")
    rows, notes = [], []
    for name, network in found["networks"].items():
        own = network["cells"]
        adam = next((one for one in own if one["method"] == "Adam" and "error" not in one), None)
        for one in own:
            rows.append((name, one["method"], one["layers"], *_ratios(one, adam)))
            notes.append(one.get("error", ""))
    parts = [report.aligned(header, rows, notes)]
    if race := found.get(RACE):
        parts.append(_race_table(race))
    return "\n\n".join(parts)


def _ratios(one: Mapping[str, Any], adam: Mapping[str, Any] | None) -> list[str]:
    if "error" in one:
        return ["-"] * 4

    def build(cell: Mapping[str, Any]) -> float:
        return cell["trace_seconds"] + cell["compile_seconds"]

    values = [build(one), one["step_seconds"], one["state_bytes"], one["peak_bytes"]]
    if adam is None:
        seconds, (state, peak) = values[:2], values[2:]
        return [*(f"{x:.3g} s" for x in seconds), *(f"{x / 1e6:.0f} MB" for x in (state, peak))]
    beside = [build(adam), adam["step_seconds"], adam["state_bytes"], adam["peak_bytes"]]
    return [f"{x / y:.2f}" for x, y in zip(values, beside, strict=True)]


def _race_table(race: list[dict[str, Any]]) -> str:
    """The seconds until each has the loss that Adam ends with."""
    adam = next((one for one in race if one["method"] == "Adam" and "error" not in one), None)
    header = ("time to a loss", "last loss", "seconds", "seconds to Adam's last", "beside Adam's")
    rows, notes = [], []
    for one in race:
        notes.append(one.get("error") or one.get("stopped") or "")
        if "error" in one:
            rows.append((one["method"], *"-" * 4))
            continue
        _, seconds, loss = one["curve"][-1]
        reached = None if adam is None else seconds_to(one["curve"], adam["curve"][-1][2])
        shown, ratio = ("-", "-")
        if reached is not None and adam is not None:
            shown, ratio = f"{reached:.2f}", f"{reached / adam['curve'][-1][1]:.2f}"
        rows.append((one["method"], f"{loss:.2f}", f"{seconds:.2f}", shown, ratio))
    return report.aligned(header, rows, notes)


def parse_arguments(argv: cli.Argv) -> argparse.Namespace:
    parser = cli.make_parser("accelerator", "What a step costs on an accelerator, beside Adam's.")
    cli.add_names_argument(parser, [*NETWORKS, RACE], "network")
    parser.add_argument("--tiny", action="store_true", help="everything in miniature")
    cli.add_numbers(
        parser,
        {
            "steps": (PERIOD, "that are timed, best a period of inversions"),
            "seconds": (270, "after which no further cell begins"),
        },
    )
    cli.add_output_argument(parser, f"accelerator_{jax.default_backend()}.json")
    return parser.parse_args(argv)


def main(argv: cli.Argv = None) -> int:
    args = parse_arguments(argv)
    begun = time.perf_counter()
    found: dict[str, Any] = {**report.machine(), "tiny": args.tiny, "networks": {}}
    args.output.parent.mkdir(parents=True, exist_ok=True)

    def run(what: str, cell: dict[str, Any], to: list, job: Callable[[], dict[str, Any]]) -> None:
        late = time.perf_counter() - begun > args.seconds
        result = {"error": f"not run: {args.seconds} s had passed"} if late else job()
        to.append(cell | result)
        jax.clear_caches()  # with the programs of this cell goes their memory
        gc.collect()
        found["seconds"] = round(time.perf_counter() - begun, 1)
        write_json(args.output, found)
        print(f"{found['seconds']:6.1f} s  {what}: {result.get('error', 'done')}", flush=True)

    names = [name for name in dict.fromkeys(args.names) if name != RACE]
    tasks = {}
    for name in names:
        network = NETWORKS[name]
        tasks[name] = functools.cache(network.tiny if args.tiny else network.real)
        found["networks"][name] = {"what": network.what, "cells": []}

    def measure(name: str, method: str, stack: bool | None) -> None:
        is_stacked = stacking.stacks_by_default() if stack is None else stack
        layers = ("stacked" if is_stacked else "apart") if method in CAPTURING else "-"
        cell = {"method": method, "layers": layers}
        to = found["networks"][name]["cells"]
        what = f"{name}, {method}, {layers}"
        run(what, cell, to, lambda: measured(tasks[name], method, stack, args.steps))

    # What matters most comes first: what the library does by itself, the race, then the other way.
    for name in names:
        for method in METHODS:
            measure(name, method, None)
    if RACE in args.names:
        race = TINY_RACE if args.tiny else REAL_RACE
        found[RACE] = []
        for name in RACERS:
            job = functools.partial(raced, race, name)
            run(f"{RACE}, {name}", {"method": name}, found[RACE], job)
    for name in names:
        for method in CAPTURING:
            measure(name, method, not stacking.stacks_by_default())
    print("\nRatios to Adam's.\n" + tables(found))
    print(f"\nWritten to {args.output}")
    return 0
