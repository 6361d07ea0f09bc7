"""Models of other packages: which layers are found, and thirty steps at defaults beside Adam.

    python -m benchmarks outside
    python -m benchmarks outside --quick --only haiku

The models are those of tests/outside, with the packages of its requirements.txt
(`python3 make.py test --outside` makes an environment). Each is trained on its one small batch:
this says whether a method trains the model at all, not which trains it best. FOOF and LNB have
their defaults, and Adam at 1e-3 for the parameters in no layer; Adam has the better of two learning
rates. Losses alone are measured, of code compiled without optimizations. Written to outside.json,
after each model.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import optax

import locoprop_jax as lp
from benchmarks.shared import cli
from benchmarks.shared.report import aligned, machine
from benchmarks.shared.results import RESULTS, write_json

METHODS = {"FOOF": lp.foof, "LNB": lp.lnb}
RATES = (1e-3, 1e-2)  # of Adam
FALLBACK = 1e-3
STEPS, QUICK_STEPS = 30, 3
PATH = RESULTS / "outside.json"


def train(step: Callable, params: Any, state: Any, batch: tuple, steps: int) -> float | None:
    """The loss after so many steps; None if it is not finite."""
    for _ in range(steps):
        params, state, _ = step(params, state, batch)
    loss = float(step(params, state, batch)[2])
    return loss if math.isfinite(loss) else None


def captured_loss(problem: Any, layers: lp.Layers, method: Callable, steps: int) -> float | None:
    """After steps of a method of ours."""
    tx = lp.with_fallback(method(layers), layers, optax.adam(FALLBACK))

    @jax.jit
    def step(params: Any, state: Any, batch: tuple) -> tuple:
        loss, grads, captured = lp.value_grad_and_capture(problem.loss_fn)(params, *batch)
        updates, state = tx.update(grads, state, params, captured=captured)
        return optax.apply_updates(params, updates), state, loss

    return train(step, problem.params, tx.init(problem.params), problem.batch, steps)


def adam_loss(problem: Any, steps: int) -> float | None:
    """After steps of Adam, at its better learning rate."""
    tx = optax.scale_by_adam()

    @jax.jit
    def step(rate: float, params: Any, state: Any, batch: tuple) -> tuple:
        loss, grads = jax.value_and_grad(problem.loss_fn)(params, *batch)
        updates, state = tx.update(grads, state, params)
        updates = jax.tree.map(lambda update: -rate * update, updates)
        return optax.apply_updates(params, updates), state, loss

    start, batch = tx.init(problem.params), problem.batch
    losses = [train(partial(step, rate), problem.params, start, batch, steps) for rate in RATES]
    return min((loss for loss in losses if loss is not None), default=None)


def measure(problem: Any, steps: int) -> dict[str, Any]:
    """What is found, and the losses before and after; without a layer only Adam trains."""
    loss_fn, params, batch = problem
    leaves = jax.tree.leaves(params)
    try:
        layers = lp.find_layers(loss_fn, params, *batch, on_uncaptured="pass")
        uncaptured = sum(other.has_gradient for other in layers.uncaptured)
    except ValueError:  # no layer at all
        layers, uncaptured = lp.Layers([]), len(leaves)
    return {
        "parameters": sum(leaf.size for leaf in leaves),
        "arrays": len(leaves),
        "layers": len(layers),
        "uncaptured": uncaptured,
        "before": float(jax.jit(loss_fn)(params, *batch)),
        **{
            name: captured_loss(problem, layers, method, steps) if layers else None
            for name, method in METHODS.items()
        },
        "Adam": adam_loss(problem, steps),
    }


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """One line for each model; "-" where a method has no layer or its loss is no number."""
    losses = ("before", *METHODS, "Adam")
    header = ("model", "parameters", "layers", "uncaptured", *losses)
    rows = []
    for name, line in found.items():
        sizes = (f"{line['parameters']:,}", str(line["layers"]))
        refused = f"{line['uncaptured']} of {line['arrays']}" if line["uncaptured"] else "-"
        numbers = ("-" if line[loss] is None else f"{line[loss]:#.4g}" for loss in losses)
        rows.append((name, *sizes, refused, *numbers))
    return aligned(header, rows)


def main(argv: cli.Argv = None) -> int:
    description = "Layers of models of other packages, and thirty steps at defaults beside Adam."
    parser = cli.make_parser("outside", description)
    parser.add_argument("--only", nargs="+", default=[""], help="models with one of these in them")
    parser.add_argument("--steps", type=cli.positive_int, help=f"default: {STEPS}")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_STEPS} steps and the first model of each package; nothing is written",
    )
    args = parser.parse_args(argv)
    return run(args)


def chosen(names: list[str], args: argparse.Namespace) -> list[str]:
    """The models to train: of those asked for, all or the first of each package."""
    names = [name for name in names if any(part in name for part in args.only)]
    if not args.quick:
        return names
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(name.partition(":")[0], name)
    return list(first.values())


def run(args: argparse.Namespace) -> int:
    """Measure model after model, keeping those of earlier runs that this one does not repeat."""
    from tests.outside.models import load, not_installed  # their packages are nobody's dependency

    if missing := not_installed():
        print(
            f"python -m benchmarks outside: needs {', '.join(missing)}: "
            "pip install -r tests/outside/requirements.txt",
            file=sys.stderr,
        )
        return 1
    os.environ.setdefault("NETKET_ENABLE_X64", "0")
    jax.config.update("jax_disable_most_optimizations", True)
    models = load()
    steps = args.steps or (QUICK_STEPS if args.quick else STEPS)
    earlier = json.loads(PATH.read_text())["models"] if PATH.exists() and not args.quick else {}
    measured: dict[str, Any] = {}
    for name in chosen(list(models), args):
        print(name, file=sys.stderr, flush=True)
        measured[name] = measure(models[name](), steps)
        if not args.quick:
            kept = {**earlier, **measured}
            ordered = {name: kept[name] for name in models if name in kept}
            write_json(PATH, {"steps": steps, "machine": machine(), "models": ordered})
    print(table(measured))
    return 0
