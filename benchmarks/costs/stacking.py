"""Compile time and step time of the deep autoencoder, its equal layers solved apart or stacked.

    python -m benchmarks stacking

The deep autoencoder has fourteen layers of 500 x 500. Compile times include tracing and are the
medians of a few compilations in turn; so are the times of a step.
"""

import functools
from collections.abc import Sequence
from statistics import median
from typing import Any

import jax
import numpy as np
import optax

import locoprop_jax as lp
from benchmarks.shared import cli, report
from benchmarks.shared.autoencoder import make_network, make_problem
from benchmarks.shared.data import Dataset
from benchmarks.shared.results import write_measurement
from benchmarks.shared.timing import Compiled, clock, compile_call
from locoprop_jax._local_losses.locoprop import RMSPROP

# label -> the network, and whether to stack (None: what the library does by itself)
CASES: dict[str, tuple[str, bool | None]] = {
    "standard": ("standard", None),
    "deep": ("deep", None),
    "deep, apart": ("deep", False),
    "deep, stacked": ("deep", True),
}


def compile_step(size: str, stack: bool | None, images: np.ndarray, iterations: int) -> Compiled:
    """A step of LocoProp-M, compiled anew."""
    problem = make_problem(Dataset("random", "generated", images, images), make_network(size))
    params = problem.init(jax.random.key(0))
    layers = lp.find_layers(problem.loss_fn, params, images)
    tx = lp.scale_by_local_loss(
        layers,
        1e-5,
        gamma=100.0,
        divergence="matching",
        solver=lp.inner(RMSPROP, iterations),
        stack=stack,
    )

    def step(params: Any, state: Any, batch: Any) -> Any:
        _, grads, captured = lp.value_grad_and_capture(problem.loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, captured=captured)
        return optax.apply_updates(params, jax.tree.map(lambda u: -u, updates)), state

    return compile_call(step, params, tx.init(params), images)


def main(argv: cli.Argv = None) -> int:
    parser = cli.make_parser(
        "stacking",
        "What stacking equal layers costs and saves, on the deep autoencoder.",
    )
    cli.add_numbers(
        parser,
        {
            "rounds": (5, "of compilations and of steps"),
            "batch-size": (1000, "rows"),
            "iterations": (10, "T, local iterations"),
        },
    )
    cli.add_output_argument(parser, f"stacking_{jax.default_backend()}.json")
    args = parser.parse_args(argv)
    images = np.random.default_rng(0).uniform(size=(args.batch_size, 784)).astype(np.float32)
    make = functools.partial(compile_step, images=images, iterations=args.iterations)
    steps: dict[str, Compiled] = {}
    compiling: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(args.rounds):
        for name, case in CASES.items():
            steps[name] = make(*case)
            compiling[name].append(steps[name].seconds)
    for step in steps.values():
        clock(step.call)
    running = [{name: clock(step.call) for name, step in steps.items()} for _ in range(args.rounds)]

    def ratio(rounds: Sequence[float], others: Sequence[float]) -> float:
        return median(a / b for a, b in zip(rounds, others, strict=True))

    results = {
        name: {
            "compile_s": median(compiling[name]),
            "compile / standard": ratio(compiling[name], compiling["standard"]),
            "step_s": median(seconds[name] for seconds in running),
            "step / apart": ratio([s[name] for s in running], [s["deep, apart"] for s in running]),
            "temporary_MB": step.temporary / 1e6,
        }
        for name, step in steps.items()
    }
    print(f"LocoProp-M, T = {args.iterations}, batch {args.batch_size}, {report.machine()}\n")
    header = list(next(iter(results.values())))
    print(f"{'':14}" + "".join(f"{column:>20}" for column in header))
    for name, row in results.items():
        print(f"{name:14}" + "".join(f"{row[column]:20.2f}" for column in header))
    write_measurement(args.output, {"settings": report.machine(), "results": results})
    return 0
