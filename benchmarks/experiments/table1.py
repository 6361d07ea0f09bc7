"""The paper's Table 1, measured: what Adam and LocoProp cost beyond the bare gradient.

    python -m benchmarks table1

Nothing is run: the compiled training steps are asked for their memory (`memory_analysis`) and flops
(`cost_analysis`). XLA counts the body of a loop once, whatever the number of rounds, so the local
iterations beyond that are added: their matrix products by their shapes, their local optimizer by
XLA's count of it alone. (What is left out is a few flops for each of the batch's outputs.)
"""

import argparse
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from benchmarks.shared import autoencoder, cli
from benchmarks.shared.data import Dataset
from benchmarks.shared.methods import ALL_METHODS, METHODS, Hyperparameters, tensorflow_rmsprop
from benchmarks.shared.report import aligned, machine
from benchmarks.shared.results import write_measurement
from benchmarks.shared.steps import Batch, Params, compile_step
from benchmarks.shared.timing import bytes_of
from benchmarks.shared.training import Problem
from locoprop_jax._local_losses.coordinates import cheapest_path, path_flops

RMSPROP = {"one_minus_beta1": 0.1, "one_minus_beta2": 0.1, "eps": 1e-8}
VALUES: Mapping[str, Hyperparameters] = {
    "sgd": {},
    "adam": RMSPROP,
    "locoprop_s": {"gamma": 10.0, **RMSPROP},
    "locoprop_m": {"gamma": 10.0, **RMSPROP},
}
PATHS = {"locoprop_s": ("direct", "gram"), "locoprop_m": ("direct",)}  # with a tanh layer
FLOAT = 4  # bytes


def layer_problem(rows: int, d_in: int, d_out: int) -> Problem:
    """One dense tanh layer, whose outputs a fixed vector reads: a hidden layer, and no bias."""
    reader = jnp.ones((d_out, 1), jnp.float32)

    def loss_fn(params: Params, inputs: Float[Array, "batch d_in"]) -> Float[Array, ""]:
        return jnp.square(jnp.tanh(inputs @ params["kernel"]) @ reader).mean()

    def init(key: Array) -> Params:
        return {"kernel": jax.random.normal(key, (d_in, d_out), jnp.float32)}

    return Problem("layer", init, loss_fn, np.ones((rows, d_in), np.float32), None)


def compile_method(problem: Problem, name: str, options: Mapping[str, int]) -> dict[str, int]:
    """The compiled step's memory in bytes, and its flops by XLA's count."""
    method = ALL_METHODS[name]
    examples: Batch = jax.device_put(problem.train)
    params = jax.jit(problem.init)(jax.random.key(0))
    values = {**VALUES[name], **options}
    schedule = optax.constant_schedule(1e-5)
    state, step = compile_step(
        problem.loss_fn, method, schedule, values, params, examples, len(examples)
    )
    compiled: Any = step
    memory = compiled.memory_analysis()
    assert memory is not None, "this backend does not say how much memory a program takes"
    return {
        "state_bytes": bytes_of(state.opt_state),
        "temporary_bytes": memory.temp_size_in_bytes,
        "xla_flops": int(compiled.cost_analysis()["flops"]),
    }


def optimizer_flops(d_in: int, d_out: int) -> int:
    """What XLA counts for one step of the local optimizer."""
    tx = tensorflow_rmsprop(1e-5, **RMSPROP)
    kernel = jnp.ones((d_in, d_out), jnp.float32)
    compiled: Any = jax.jit(tx.update).lower(kernel, tx.init(kernel), kernel).compile()
    return int(compiled.cost_analysis()["flops"])


def measure_layer(rows: int, d_in: int, d_out: int, iterations: int) -> dict[str, dict[str, Any]]:
    """Each method's extra memory and flops over the bare gradient (SGD), and what formulas say."""
    problem = layer_problem(rows, d_in, d_out)
    weights = d_in * d_out
    compile_with = functools.partial(compile_method, problem)
    bare, adam = compile_with("sgd", {}), compile_with("adam", {})
    table: dict[str, dict[str, Any]] = {"gradient (SGD)": dict(bare)}
    table["Adam"] = {
        **_beyond(adam, bare),
        "flops": adam["xla_flops"] - bare["xla_flops"],
        "paper_bytes": FLOAT * weights,
        "formula": "memory 2 d1 d2 (two moments); some flops for each weight",
        "formula_bytes": FLOAT * 2 * weights,
        "paper_flops": weights,
    }
    for name, usable in PATHS.items():
        linear = "gram" in usable
        path = cheapest_path(rows, d_in, d_out, iterations, usable, linear=linear)
        step = compile_with(name, {"iterations": iterations})
        once, all_ = (
            path_flops(rows, d_in, d_out, t, linear=linear)[path] for t in (2, max(2, iterations))
        )
        repeated = all_ - once + (iterations - 1) * optimizer_flops(d_in, d_out)
        by_gram = path == "gram"
        gram = " + d1^2 (X'X)" if by_gram else ""
        flops = "2 b d1^2 + (T - 1) 2 d1^2 d2" if by_gram else "(T - 1) 4 b d1 d2"
        table[METHODS[name].label] = {
            **_beyond(step, bare),
            "flops": step["xla_flops"] - bare["xla_flops"] + repeated,
            "path": path,
            "paper_bytes": FLOAT * (weights + rows * (d_in + d_out)),
            "formula": f"memory 2 d1 d2 (RMSProp) + d1 d2 (displacement){gram} + b (d1 + 2 d2) "
            f"(inputs, outputs, cotangents: in part the gradient's too); flops {flops} ({path})",
            "formula_bytes": FLOAT * (3 * weights + d_in**2 * by_gram + rows * (d_in + 2 * d_out)),
            "paper_flops": rows * iterations * weights,
            "formula_flops": path_flops(rows, d_in, d_out, iterations, linear=linear)[path],
        }
    return table


def _beyond(step: Mapping[str, int], bare: Mapping[str, int]) -> dict[str, int]:
    return {
        "state_bytes": step["state_bytes"] - bare["state_bytes"],
        "temporary_bytes": step["temporary_bytes"] - bare["temporary_bytes"],
        "xla_flops": step["xla_flops"],
    }


def measure_autoencoder(
    rows: int, iterations: Sequence[int], shrink: int
) -> dict[str, dict[str, int]]:
    """The temporary memory of a whole training step, by method and T."""
    images = np.ones((rows, 784), np.float32)
    network = autoencoder.make_network(shrink=shrink)
    problem = autoencoder.make_problem(Dataset("ones", "constant", images, images), network)
    steps = {"Adam": compile_method(problem, "adam", {})}
    for name in PATHS:
        for t in iterations:
            steps[f"{METHODS[name].label}, T = {t}"] = compile_method(
                problem, name, {"iterations": t}
            )
    return {
        label: {key: step[key] for key in ("state_bytes", "temporary_bytes")}
        for label, step in steps.items()
    }


def layer_table(table: Mapping[str, Mapping[str, Any]]) -> str:
    columns = {
        "state MB": ("state_bytes", 1e6),
        "temporary MB": ("temporary_bytes", 1e6),
        "formula MB": ("formula_bytes", 1e6),
        "paper MB": ("paper_bytes", 1e6),
        "MFLOP": ("flops", 1e6),
        "formula MFLOP": ("formula_flops", 1e6),
        "paper MFLOP": ("paper_flops", 1e6),
    }
    rows = [
        [
            label,
            *(f"{row[key] / unit:,.1f}" if key in row else "-" for key, unit in columns.values()),
        ]
        for label, row in table.items()
        if "flops" in row
    ]
    return aligned(["beyond the gradient", *columns], rows)


def memory_table(steps: Mapping[str, Mapping[str, int]]) -> str:
    adam = steps["Adam"]["temporary_bytes"]
    rows = [
        [
            label,
            f"{step['state_bytes'] / 1e6:.1f}",
            f"{step['temporary_bytes'] / 1e6:.1f}",
            f"{step['temporary_bytes'] / adam:.2f}",
        ]
        for label, step in steps.items()
    ]
    return aligned(["autoencoder, whole step", "state MB", "temporary MB", "/ Adam's"], rows)


def parse_arguments(argv: cli.Argv) -> argparse.Namespace:
    parser = cli.make_parser(
        "table1",
        "The extra memory and flops of Adam, LocoProp-S and LocoProp-M for one dense "
        "layer, measured beside the formulas of the paper's Table 1; and the memory of the "
        "autoencoder's step as T grows. Compiles, but runs nothing.",
    )
    cli.add_numbers(
        parser,
        {
            "d-in": (1000, "d1, the layer's inputs"),
            "d-out": (500, "d2, its outputs"),
            "batch-size": (1000, "b, for the layer and for the autoencoder"),
            "iterations": (10, "T, local iterations of the layer"),
            "shrink": (1, "divide the autoencoder's widths by this"),
            "autoencoder-iterations": ([1, 10, 50], "T, of the autoencoder"),
        },
    )
    cli.add_output_argument(parser, "table1.json")
    return parser.parse_args(argv)


def main(argv: cli.Argv = None) -> int:
    args = parse_arguments(argv)
    b, d1, d2, t = args.batch_size, args.d_in, args.d_out, args.iterations
    print(f"One dense layer: d1 = {d1}, d2 = {d2}, b = {b}, T = {t}, float32, {machine()}\n")
    layer = measure_layer(b, d1, d2, t)
    print(f"{layer_table(layer)}\n")
    for label, row in layer.items():
        if "formula" in row:
            print(f"{label}: {row['formula']}")
    print(
        "Paper, without constants: Adam d1 d2 and d1 d2; LocoProp d1 d2 + b (d1 + d2) and b T d1 d2"
        ".\nXLA counts the local loop's body once; its other rounds are added from the shapes.\n"
    )
    steps = measure_autoencoder(b, args.autoencoder_iterations, args.shrink)
    print(memory_table(steps))
    print("T = 1 needs no local gradient beyond the given one; from T = 2 on nothing is added.")
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    write_measurement(
        args.output,
        {"machine": machine(), "settings": settings, "layer": layer, "autoencoder": steps},
    )
    return 0
