"""What capture and the methods cost on the autoencoder, as ratios taken in one run.

    python -m benchmarks speed

Machines are noisy, so every round times all the parts one after the other and the ratios are
taken within a round; the medians over the rounds are printed, and written with the smallest and
largest to speed_<backend>.json. Two floors are measured beside the steps:
`jax.value_and_grad` for the capture, and for the methods their matrix products, factorisations and
triangular solves alone (each shape timed bare, times how often the step needs it).
"""

import argparse
import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import locoprop_jax as lp
from benchmarks.costs.kernels import (
    Kernel,
    compile_kernel,
    foof_kernels,
    gradient_products,
    inverse_products,
    local_products,
    metric_products,
)
from benchmarks.shared import cli, paper
from benchmarks.shared.autoencoder import make_problem
from benchmarks.shared.data import Dataset
from benchmarks.shared.results import RESULTS, write_measurement
from benchmarks.shared.steps import Batch, LossFn, Params
from benchmarks.shared.timing import Compiled, bytes_of, clock, compile_call, compile_steps

PERIOD = 20  # of FOOF's inversions

# Of each round the seconds of all parts, and of all kernels.
Rounds = Sequence[tuple[Mapping[str, float], Mapping[Kernel, float]]]
Spread = tuple[float, float, float]  # median, least, most


def compile_parts(
    loss_fn: LossFn, layers: lp.Layers, params: Params, batch: Batch, iterations: int
) -> dict[str, Compiled]:
    """The gradient, capture, and a step of each method."""
    capture = lp.value_grad_and_capture(loss_fn)

    def step(tx: optax.GradientTransformationExtraArgs, params: Any, state: Any, batch: Any) -> Any:
        _, grads, captured = capture(params, batch)
        updates, state = tx.update(grads, state, params, captured=captured)
        return optax.apply_updates(params, updates), state

    methods = {
        "LocoProp-M": paper.locoprop_m(layers, 1e-5, iterations=iterations),
        "LocoProp-S": paper.locoprop_s(layers, 1e-5, iterations=iterations),
        "FOOF": lp.foof(layers),
        "FOOF, T=1": lp.foof(layers, inverse_period=1),
        "LNB": lp.lnb(layers),
        "LNB, half the rows": lp.lnb(layers, fraction=0.5),
        "LNB, a quarter": lp.lnb(layers, fraction=0.25),
        "Adam": optax.with_extra_args_support(optax.adam(1e-5)),
    }
    parts = {
        "value_and_grad": compile_call(jax.value_and_grad(loss_fn), params, batch),
        "capture": compile_call(capture, params, batch),
        "capture, unused": compile_call(lambda p, b: capture(p, b)[:2], params, batch),
    }
    for name, tx in methods.items():
        parts[name] = compile_steps(
            functools.partial(step, tx),
            params,
            tx.init(params),
            batch,
            repeats=PERIOD if name == "FOOF" else 1,  # one of them inverts
        )
    return parts


def needed_kernels(layers: lp.Layers, rows: int, iterations: int) -> dict[str, Counter[Kernel]]:
    """The floor of each part that has one."""
    gradient = gradient_products(layers, rows)
    return {
        "value_and_grad": gradient,
        "LocoProp-M": gradient + local_products(layers, rows, iterations, matching=True),
        "LocoProp-S": gradient + local_products(layers, rows, iterations, matching=False),
        "FOOF": gradient + inverse_products(layers),
        "FOOF, T=1": gradient + foof_kernels(layers, rows),
        "LNB": gradient + metric_products(layers, rows, 3),
    }


def measure(
    parts: Mapping[str, Compiled], products: Mapping[Kernel, Compiled], rounds: int
) -> Rounds:
    """Seconds of each part and each product, round by round after one to warm up."""
    return [
        (
            {name: clock(part.call) / part.repeats for name, part in parts.items()},
            {product: clock(compiled.call) for product, compiled in products.items()},
        )
        for _ in range(rounds + 1)
    ][1:]


def compare(
    rounds: Rounds, needed: Mapping[str, Counter[Kernel]], memory: float, iterations: int
) -> dict[str, Spread]:
    """All ratios; those of times are taken within each round."""

    def spread(of: Callable[[Mapping, Mapping], float]) -> Spread:
        values = sorted(of(seconds, bare) for seconds, bare in rounds)
        return median(values), values[0], values[-1]

    def to(name: str, other: str) -> Spread:
        return spread(lambda seconds, _: seconds[name] / seconds[other])

    def to_floor(name: str) -> Spread:
        def floor(bare: Mapping[Kernel, float]) -> float:
            return sum(count * bare[kernel] for kernel, count in needed[name].items())

        return spread(lambda seconds, bare: seconds[name] / floor(bare))

    return {
        "time: capture / value_and_grad": to("capture", "value_and_grad"),
        "time: capture, arrays unused / value_and_grad": to("capture, unused", "value_and_grad"),
        "memory: capture / (value_and_grad + arrays returned)": (memory, memory, memory),
        "time: value_and_grad / its matmuls": to_floor("value_and_grad"),
        f"time: LocoProp-M step, T={iterations} / its matmuls": to_floor("LocoProp-M"),
        f"time: LocoProp-S step, T={iterations} / its matmuls": to_floor("LocoProp-S"),
        f"time: FOOF step, T={PERIOD} / Adam step": to("FOOF", "Adam"),
        f"time: FOOF step, T={PERIOD} / matmuls of gradient and inverses": to_floor("FOOF"),
        "time: FOOF step, T=1 / its matmuls and solves": to_floor("FOOF, T=1"),
        "time: LNB step / nine matmuls": to_floor("LNB"),
        "time: LNB step, half the rows / LNB step": to("LNB, half the rows", "LNB"),
        "time: LNB step, a quarter of the rows / LNB step": to("LNB, a quarter", "LNB"),
        "time: LNB step / Adam step": to("LNB", "Adam"),
        "time: LocoProp-M step / Adam step": to("LocoProp-M", "Adam"),
        "time: LocoProp-S step / Adam step": to("LocoProp-S", "Adam"),
    }


def parse_arguments(argv: cli.Argv) -> argparse.Namespace:
    parser = cli.make_parser("speed", "What capture and the methods cost, as ratios.")
    cli.add_numbers(
        parser,
        {
            "rounds": (7, "of everything in turn"),
            "batch-size": (1000, "images per step"),
            "iterations": (10, "T of LocoProp"),
        },
    )
    return parser.parse_args(argv)


def main(argv: cli.Argv = None) -> int:
    args = parse_arguments(argv)
    rows, iterations = args.batch_size, args.iterations
    images = np.random.default_rng(0).uniform(size=(rows, 784)).astype(np.float32)
    problem = make_problem(Dataset("random", "generated", images, images))
    params = problem.init(jax.random.key(0))
    batch = jnp.asarray(images)
    layers = lp.find_layers(problem.loss_fn, params, batch)
    parts = compile_parts(problem.loss_fn, layers, params, batch, iterations)
    needed = needed_kernels(layers, rows, iterations)
    kernels = set().union(*needed.values())
    bare = {kernel: compile_kernel(kernel, jax.random.key(1)) for kernel in kernels}
    rounds = measure(parts, bare, args.rounds)

    arrays = bytes_of(lp.value_grad_and_capture(problem.loss_fn)(params, batch)[2])
    plain, capture = (parts[name] for name in ("value_and_grad", "capture"))
    allowed = plain.temporary + plain.output + arrays
    memory = (capture.temporary + capture.output) / allowed
    report = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "batch_size": rows,
        "iterations": iterations,
        "rounds": args.rounds,
        "ratios": {
            name: dict(zip(("median", "min", "max"), values, strict=True))
            for name, values in compare(rounds, needed, memory, iterations).items()
        },
        "median_seconds": {name: median(s[name] for s, _ in rounds) for name in parts},
        "compile_seconds": {name: part.seconds for name, part in parts.items()},
        "temporary_MB": {name: part.temporary / 1e6 for name, part in parts.items()},
        "captured_MB": arrays / 1e6,
        "gflop": {
            name: sum(kernel.flops * n for kernel, n in counts.items()) / 1e9
            for name, counts in needed.items()
        },
    }
    _print(report)
    write_measurement(RESULTS / f"speed_{jax.default_backend()}.json", report)
    return 0


def _print(report: Mapping[str, Any]) -> None:
    print(f"{report['device']}, JAX {report['jax']}, batch {report['batch_size']}\n")
    print(f"{'ratio':58} {'median':>7} {'min':>7} {'max':>7}")
    for name, values in report["ratios"].items():
        numbers = " ".join(f"{values[key]:7.3f}" for key in ("median", "min", "max"))
        print(f"{name:58} {numbers}")
    print(f"\n{'':20} {'s/step':>9} {'compile s':>10} {'temp MB':>9} {'matmul GFLOP':>13}")
    for name, seconds in report["median_seconds"].items():
        flops = report["gflop"].get(name, math.nan)
        print(
            f"{name:20} {seconds:9.4f} {report['compile_seconds'][name]:10.2f} "
            f"{report['temporary_MB'][name]:9.1f} {flops:13.1f}"
        )
