"""Which way to LocoProp's plain gradient steps is the fastest, and which one is taken.

    python -m benchmarks paths

The same T steps on a layer's local loss can be taken on its weights (direct), with X'X (gram,
squared losses only), or in the space of the batch's rows (dual). All are timed over batch sizes
and widths beside the one that "auto" chooses by flops, in interleaved rounds; a path that would not
fit into a cell's time limit by its flops is left out. Then the same for a whole update of the
autoencoder at a small batch.
"""

import argparse
import functools
import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from statistics import geometric_mean, median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import locoprop_jax as lp
from benchmarks.costs.kernels import Product, compile_kernel
from benchmarks.shared import autoencoder, cli
from benchmarks.shared.data import Dataset
from benchmarks.shared.report import aligned, machine
from benchmarks.shared.results import write_measurement
from benchmarks.shared.steps import interrupt_deferred
from benchmarks.shared.timing import Compiled, clock, compile_call
from locoprop_jax._layers.rows import pull
from locoprop_jax._local_losses.coordinates import cheapest_path, path_flops
from locoprop_jax._local_losses.local_problem import LocalProblem
from locoprop_jax._local_losses.regularizers import Penalty

USABLE = {"squared": ("direct", "gram", "dual"), "tanh": ("direct", "dual")}  # by local loss
PROBE = 1024  # the side of the product that tells the machine's flops per second
LEAST_CALLS = 3  # of each path: one to warm up and two to measure
NEVER = "-"


class Cell(NamedTuple):
    """One layer's shapes, with a squared or a matching (tanh) local loss."""

    loss: str
    rows: int
    d_in: int
    d_out: int


def flops_per_second() -> float:
    product = Product((PROBE, PROBE), (PROBE, PROBE), False)
    compiled = compile_kernel(product, jax.random.key(0))
    return product.flops / min(clock(compiled.call) for _ in range(4))


def make_arrays(cell: Cell) -> dict[str, jax.Array]:
    random = np.random.default_rng(0)
    shapes = {
        "inputs": (cell.rows, cell.d_in),
        "outputs": (cell.rows, cell.d_out),
        "cotangents": (cell.rows, cell.d_out),
        "kernel": (cell.d_in, cell.d_out),
    }
    return {
        name: jnp.asarray(random.standard_normal(shape, np.float32))
        for name, shape in shapes.items()
    }


def solve(cell: Cell, iterations: int, path: str, arrays: Mapping[str, jax.Array]) -> Any:
    """The displacement of one layer with kernel and bias, as `scale_by_local_loss` asks for it."""
    x, a, e = (arrays[name] for name in ("inputs", "outputs", "cotangents"))
    weights = {"kernel": arrays["kernel"], "bias": jnp.zeros(cell.d_out, x.dtype)}
    problem = LocalProblem(
        slope=pull(x, e, weights),
        inputs=x,
        cotangents=e,
        gain=(lambda moved: jnp.tanh(a + moved) - jnp.tanh(a)) if cell.loss == "tanh" else None,
        outputs_apart=True,
        penalty=Penalty(),
        weights=weights,
        learning_rate=jnp.asarray(0.1 / (cell.rows + cell.d_in), x.dtype),  # stable
        ok=jnp.isfinite(x.sum()),  # not known when compiling, as in an update
    )
    return lp.inner(optax.sgd, iterations, path=path).solve(problem, ())[0]


def affordable(cell: Cell, iterations: int, speed: float, limit: float) -> list[str]:
    """The paths that fit into the limit together, the cheapest first."""
    linear = cell.loss == "squared"
    costs = path_flops(cell.rows, cell.d_in, cell.d_out, iterations, linear=linear)
    fitting, seconds = [], 0.0
    for path in sorted(USABLE[cell.loss], key=lambda path: costs[path]):
        seconds += LEAST_CALLS * costs[path] / speed
        if seconds <= limit:
            fitting.append(path)
    return fitting


def time_calls(
    calls: Mapping[str, Callable[[], Any]], rounds: int, limit: float
) -> dict[str, float]:
    """The median seconds of each call: rounds of all of them, fewer where they take long."""
    warm = sum(clock(call) for call in calls.values())
    fitting = max(LEAST_CALLS - 1, min(rounds, int(limit / max(warm, 1e-9))))
    seconds = [{name: clock(call) for name, call in calls.items()} for _ in range(fitting)]
    return {name: median(times[name] for times in seconds) for name in calls}


def compiled_calls(functions: Mapping[str, Callable[..., Any]], *args: Any) -> dict[str, Any]:
    with interrupt_deferred():
        compiled: dict[str, Compiled] = {
            name: compile_call(function, *args) for name, function in functions.items()
        }
    return {name: part.call for name, part in compiled.items()}


def measure_cell(
    cell: Cell, iterations: int, speed: float, rounds: int, limit: float
) -> dict[str, Any]:
    """Seconds by path, the path that "auto" takes, and its seconds relative to the best."""
    usable = USABLE[cell.loss]
    linear = cell.loss == "squared"
    auto = cheapest_path(cell.rows, cell.d_in, cell.d_out, iterations, usable, linear=linear)
    paths = affordable(cell, iterations, speed, limit)
    seconds: dict[str, float] = {}
    if paths:
        solves = {path: functools.partial(solve, cell, iterations, path) for path in paths}
        seconds = time_calls(compiled_calls(solves, make_arrays(cell)), rounds, limit)
    return {
        **cell._asdict(),
        "auto": auto,
        "seconds": seconds,
        "skipped": [path for path in usable if path not in paths],
        "auto_to_best": seconds[auto] / min(seconds.values()) if auto in seconds else None,
    }


def measure_update(
    rows: int, iterations: int, rounds: int, limit: float, shrink: int
) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    """Seconds of the autoencoder's `tx.update`, direct and auto, and its wide layers' shapes."""
    images = np.random.default_rng(0).uniform(size=(rows, 784)).astype(np.float32)
    network = autoencoder.make_network(shrink=shrink)
    problem = autoencoder.make_problem(Dataset("random", "generated", images, images), network)
    params = jax.jit(problem.init)(jax.random.key(0))
    layers = lp.find_layers(problem.loss_fn, params, images)
    capture = jax.jit(lp.value_grad_and_capture(problem.loss_fn))
    _, grads, captured = capture(params, images)

    def update(divergence: str, path: str, *args: Any) -> Any:
        solver = lp.inner(optax.sgd, iterations, path=path)
        tx = lp.scale_by_local_loss(layers, 1e-6, gamma=10.0, divergence=divergence, solver=solver)
        grads, params, captured = args
        return tx.update(grads, tx.init(params), params, captured=captured)[0]

    seconds = {}
    for divergence in ("squared", "matching"):
        updates = {path: functools.partial(update, divergence, path) for path in ("direct", "auto")}
        calls = compiled_calls(updates, grads, params, captured)
        seconds[divergence] = time_calls(calls, rounds, limit)
    shapes = dict.fromkeys((layer.d_in, layer.d_out) for layer in layers.values())
    return seconds, [shape for shape in shapes if min(shape) > rows]


def cells_table(cells: Sequence[Mapping[str, Any]]) -> str:
    """Times as ratios to the best of the cell."""
    header = ["local loss", "batch", "d_in", "d_out", "best ms", "direct", "gram", "dual"]
    rows = []
    for cell in cells:
        best = min(cell["seconds"].values(), default=math.nan)
        ratios = [
            "skipped"
            if path in cell["skipped"]
            else f"{cell['seconds'][path] / best:.2f}"
            if path in cell["seconds"]
            else NEVER
            for path in USABLE["squared"]
        ]
        to_best = NEVER if cell["auto_to_best"] is None else f"{cell['auto_to_best']:.2f}"
        sizes = [str(cell[key]) for key in ("rows", "d_in", "d_out")]
        rows.append([cell["loss"], *sizes, f"{1000 * best:.2f}", *ratios, cell["auto"], to_best])
    return aligned([*header, "auto", "auto/best"], rows)


def summary(cells: Sequence[Mapping[str, Any]]) -> str:
    ratios = [cell["auto_to_best"] for cell in cells if cell["auto_to_best"] is not None]
    left_out = sum(len(cell["skipped"]) for cell in cells)
    said = f"{left_out} paths skipped, which would not fit into their cell's limit by their flops."
    if not ratios:
        return said
    right = sum(ratio == 1 for ratio in ratios)
    return (
        f"auto is the best in {right} of {len(ratios)} cells; its time relative to the best: "
        f"geometric mean {geometric_mean(ratios):.2f}, worst {max(ratios):.2f}. {said}"
    )


def update_table(updates: Mapping[str, Mapping[str, float]]) -> str:
    rows = [
        [
            loss,
            f"{1000 * at['direct']:.1f}",
            f"{1000 * at['auto']:.1f}",
            f"{at['direct'] / at['auto']:.2f}",
        ]
        for loss, at in updates.items()
    ]
    return aligned(["autoencoder, tx.update", "direct ms", "auto ms", "direct / auto"], rows)


def parse_arguments(argv: cli.Argv) -> argparse.Namespace:
    parser = cli.make_parser(
        "paths",
        "Time the paths of LocoProp's plain gradient steps, and the choice between them.",
    )
    cli.add_numbers(
        parser,
        {
            "batch-sizes": ([32, 128, 512, 2048, 8192], "rows of the layers"),
            "widths": ([64, 256, 1024, 4096], "their inputs, and as many outputs"),
            "iterations": (10, "local steps T"),
            "rounds": (9, "of all paths in turn, at most"),
            "limit": (30, "seconds for each batch size, width and local loss"),
            "autoencoder-batch": (100, "rows of the autoencoder's update"),
            "shrink": (1, "divide the autoencoder's widths by this"),
        },
    )
    cli.add_output_argument(parser, "paths.json")
    return parser.parse_args(argv)


def main(argv: cli.Argv = None) -> int:
    """Run the command line; 130 after Ctrl-C, with what was measured until then."""
    args = parse_arguments(argv)
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    cells: list[dict[str, Any]] = []
    layers: list[dict[str, Any]] = []
    updates: dict[str, Any] = {}
    interrupted = False
    try:
        speed = flops_per_second()
        settings["gflops_per_second"] = speed / 1e9
        print(f"{machine()}, T = {args.iterations}, {speed / 1e9:.0f} GFLOP/s", flush=True)
        measure = functools.partial(
            measure_cell,
            iterations=args.iterations,
            speed=speed,
            rounds=args.rounds,
            limit=args.limit,
        )
        for loss, rows, width in itertools.product(USABLE, args.batch_sizes, args.widths):
            print(f"  {loss}, batch {rows}, width {width}", file=sys.stderr, flush=True)
            cells.append(measure(Cell(loss, rows, width, width)))
        print("  autoencoder", file=sys.stderr, flush=True)
        updates, wide = measure_update(
            args.autoencoder_batch, args.iterations, args.rounds, args.limit, args.shrink
        )
        for loss, shape in itertools.product(USABLE, wide):
            layers.append(measure(Cell(loss, args.autoencoder_batch, *shape)))
    except KeyboardInterrupt:
        interrupted = True
        print("Interrupted; what follows is what was measured.", file=sys.stderr)
    print(f"\nTimes relative to the best of the row:\n\n{cells_table(cells)}\n\n{summary(cells)}")
    if updates:
        print(f"\nAt batch {args.autoencoder_batch}:\n\n{update_table(updates)}")
    if layers:
        print(f"\nIts wide layers alone:\n\n{cells_table(layers)}\n\n{summary(layers)}")
    content = {"cells": cells, "autoencoder": {"update_seconds": updates, "layers": layers}}
    write_measurement(args.output, {"machine": machine(), "settings": settings, **content})
    return 130 if interrupted else 0
