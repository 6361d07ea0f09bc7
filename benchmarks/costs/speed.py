"""What capture and the methods cost on the autoencoder, as ratios taken in one run.

    python -m benchmarks.speed

Machines are noisy, so every round times all the parts one after the other and the ratios are
taken within a round; the medians over the rounds are printed, and written with the smallest and
largest to `benchmarks/results/speed_<backend>.json`. Two floors are measured beside the steps:
`jax.value_and_grad` for the capture, and for the methods their matrix products, factorisations and
triangular solves alone (each shape timed bare, times how often the step needs it).
"""

import argparse
import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.linalg import cho_factor, cho_solve

import locoprop_jax as lp
from benchmarks.experiments.autoencoder import make_problem
from benchmarks.shared.cli import positive_int
from benchmarks.shared.data import Dataset
from benchmarks.shared.tuned import write_json
from locoprop_jax._local_losses.coordinates import cheapest_path

RESULTS = Path(__file__).parents[1] / "results"
PERIOD = 20  # of FOOF's inversions


class Product(NamedTuple):
    """A matrix product by its operands' shapes; the first one is transposed where it says so."""

    left: tuple[int, int]
    right: tuple[int, int]
    transposed: bool  # left.T @ right

    @property
    def flops(self) -> int:
        rows, inner = self.left[::-1] if self.transposed else self.left
        return 2 * rows * inner * self.right[1]


class Solve(NamedTuple):
    """A positive definite system with some right-hand sides: Cholesky and two triangular solves."""

    size: int
    columns: int

    @property
    def flops(self) -> int:
        return self.size**3 // 3 + 2 * self.size**2 * self.columns


Kernel = Product | Solve


class Compiled(NamedTuple):
    """A compiled function with its arguments.

    Attributes:
      call: calls it.
      repeats: how often in one `call`.
      seconds: to trace and compile.
      temporary, output: bytes.
    """

    call: Callable[[], Any]
    repeats: int
    seconds: float
    temporary: int
    output: int


def gradient_products(layers: lp.Layers, rows: int) -> Counter[Kernel]:
    """The matrix products of a gradient: forward, by the weights, by the inputs."""
    products: Counter[Kernel] = Counter()
    for i, layer in enumerate(layers.values()):
        products[Product((rows, layer.d_in), (layer.d_in, layer.d_out), False)] += 1
        products[Product((rows, layer.d_in), (rows, layer.d_out), True)] += 1
        if i:  # nobody asks for the gradient by the images
            products[Product((rows, layer.d_out), (layer.d_out, layer.d_in), False)] += 1
    return products


def inverse_products(layers: lp.Layers) -> Counter[Kernel]:
    """What applies FOOF's inverses; making them is not counted."""
    return Counter(
        Product((layer.d_in, layer.d_in), (layer.d_in, layer.d_out), False)
        for layer in layers.values()
    )


def foof_kernels(layers: lp.Layers, rows: int) -> Counter[Kernel]:
    """What FOOF needs with an inversion for each step: X'X and the solution of its system."""
    kernels: Counter[Kernel] = Counter()
    for layer in layers.values():
        d = layer.d_in  # the bias is eliminated
        kernels[Product((rows, d), (rows, d), True)] += 1
        kernels[Solve(d, layer.d_out)] += 1
    return kernels


def metric_products(layers: lp.Layers, rows: int, count: int) -> Counter[Kernel]:
    """Products with each layer's metric, forward and transposed: LNB's floor as the paper has it.

    Where X'X is cheaper LNB goes through that, and may take less than this.
    """
    kernels: Counter[Kernel] = Counter()
    for layer in layers.values():
        kernels[Product((rows, layer.d_in), (layer.d_in, layer.d_out), False)] += count
        kernels[Product((rows, layer.d_in), (rows, layer.d_out), True)] += count
    return kernels


def local_products(
    layers: lp.Layers, rows: int, iterations: int, matching: bool
) -> Counter[Kernel]:
    """The matrix products of LocoProp's local iterations, all but the first (which needs none)."""
    products: Counter[Kernel] = Counter()
    for layer in layers.values():
        d_in, d_out, more = layer.d_in, layer.d_out, iterations - 1
        linear = not matching or (layer.transfer.is_identity and not layer.uses_head)
        usable = ["direct", "gram"] if linear else ["direct"]
        if cheapest_path(rows, d_in, d_out, iterations, usable, linear=linear) == "gram":
            products[Product((rows, d_in), (rows, d_in), True)] += 1
            products[Product((d_in, d_in), (d_in, d_out), False)] += more
        else:
            products[Product((rows, d_in), (d_in, d_out), False)] += more
            products[Product((rows, d_in), (rows, d_out), True)] += more
    return products


def compile_call(function: Callable[..., Any], *args: Any) -> Compiled:
    compiled, seconds = _compile(jax.jit(function), *args)
    call = functools.partial(compiled, *args)
    return Compiled(call, 1, seconds, *_bytes(compiled))


def compile_steps(
    step: Callable[..., Any], params: Any, state: Any, batch: Any, repeats: int = 1
) -> Compiled:
    """Steps that go on from each other, their parameters and state donated as in training."""
    compiled, seconds = _compile(jax.jit(step, donate_argnums=(0, 1)), params, state, batch)
    held = jax.tree.map(jnp.copy, (params, state))

    def call() -> Any:
        nonlocal held
        for _ in range(repeats):
            held = compiled(*held, batch)
        return held

    return Compiled(call, repeats, seconds, *_bytes(compiled))


def _compile(jitted: Any, *args: Any) -> tuple[Any, float]:
    begin = time.perf_counter()
    compiled = jitted.lower(*args).compile()
    return compiled, time.perf_counter() - begin


def _bytes(compiled: Any) -> tuple[int, int]:
    memory = compiled.memory_analysis()
    assert memory is not None, "this backend does not say how much memory a program takes"
    return memory.temp_size_in_bytes, memory.output_size_in_bytes


def compile_kernel(kernel: Kernel, key: jax.Array) -> Compiled:
    if isinstance(kernel, Solve):
        root = jax.random.normal(key, (kernel.size, kernel.size))
        system = root @ root.T + kernel.size * jnp.eye(kernel.size)
        right = jax.random.normal(key, (kernel.size, kernel.columns))
        return compile_call(lambda a, b: cho_solve(cho_factor(a), b), system, right)
    left = jax.random.normal(key, kernel.left)
    right = jax.random.normal(key, kernel.right)

    def multiply(a: jax.Array, b: jax.Array) -> jax.Array:
        return (a.T if kernel.transposed else a) @ b

    return compile_call(multiply, left, right)


def clock(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begin


def measure(
    parts: Mapping[str, Compiled], products: Mapping[Kernel, Compiled], rounds: int
) -> list[tuple[dict[str, float], dict[Kernel, float]]]:
    """Seconds of each part and each product, round by round after one to warm up."""
    return [
        (
            {name: clock(part.call) / part.repeats for name, part in parts.items()},
            {product: clock(compiled.call) for product, compiled in products.items()},
        )
        for _ in range(rounds + 1)
    ][1:]


def bytes_of(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What capture and the methods cost, as ratios.")
    parser.add_argument("--rounds", type=positive_int, default=7, help="default: %(default)s")
    parser.add_argument("--batch-size", type=positive_int, default=1000, help="default: 1000")
    parser.add_argument(
        "--iterations", type=positive_int, default=10, help="T of LocoProp, default: 10"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    rows, iterations = args.batch_size, args.iterations
    images = np.random.default_rng(0).uniform(size=(rows, 784)).astype(np.float32)
    problem = make_problem(Dataset("random", "generated", images, images))
    params = problem.init(jax.random.key(0))
    batch = jnp.asarray(images)
    layers = lp.find_layers(problem.loss_fn, params, batch)
    capture = lp.value_grad_and_capture(problem.loss_fn)

    def step(tx: optax.GradientTransformationExtraArgs, params: Any, state: Any, batch: Any) -> Any:
        _, grads, captured = capture(params, batch)
        updates, state = tx.update(grads, state, params, captured=captured)
        return optax.apply_updates(params, updates), state

    methods = {
        "LocoProp-M": lp.locoprop_m(layers, 1e-5, iterations=iterations),
        "LocoProp-S": lp.locoprop_s(layers, 1e-5, iterations=iterations),
        "FOOF": lp.foof(layers),
        "FOOF, T=1": lp.foof(layers, inverse_period=1),
        "LNB": lp.lnb(layers),
        "LNB, half the rows": lp.lnb(layers, fraction=0.5),
        "LNB, a quarter": lp.lnb(layers, fraction=0.25),
        "Adam": optax.with_extra_args_support(optax.adam(1e-5)),
    }
    parts = {
        "value_and_grad": compile_call(jax.value_and_grad(problem.loss_fn), params, batch),
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
    gradient = gradient_products(layers, rows)
    needed = {
        "value_and_grad": gradient,
        "LocoProp-M": gradient + local_products(layers, rows, iterations, matching=True),
        "LocoProp-S": gradient + local_products(layers, rows, iterations, matching=False),
        "FOOF": gradient + inverse_products(layers),
        "FOOF, T=1": gradient + foof_kernels(layers, rows),
        "LNB": gradient + metric_products(layers, rows, 3),
    }
    distinct = set().union(*needed.values())
    products = {product: compile_kernel(product, jax.random.key(1)) for product in distinct}
    rounds = measure(parts, products, args.rounds)

    def spread(of: Callable[[dict, dict], float]) -> tuple[float, float, float]:
        values = sorted(of(seconds, bare) for seconds, bare in rounds)
        return median(values), values[0], values[-1]

    def ratio(name: str, floor: Callable[[dict, dict], float]) -> tuple[float, float, float]:
        return spread(lambda seconds, bare: seconds[name] / floor(seconds, bare))

    def matmuls(name: str) -> Callable[[dict, dict], float]:
        return lambda _, bare: sum(count * bare[p] for p, count in needed[name].items())

    plain = parts["value_and_grad"]
    arrays = bytes_of(capture(params, batch)[2])
    allowed = plain.temporary + plain.output + arrays
    kept = parts["capture"].temporary + parts["capture"].output
    ratios = {
        "time: capture / value_and_grad": ratio("capture", lambda s, _: s["value_and_grad"]),
        "time: capture, arrays unused / value_and_grad": ratio(
            "capture, unused", lambda s, _: s["value_and_grad"]
        ),
        "memory: capture / (value_and_grad + arrays returned)": (kept / allowed,) * 3,
        "time: value_and_grad / its matmuls": ratio("value_and_grad", matmuls("value_and_grad")),
        f"time: LocoProp-M step, T={iterations} / its matmuls": ratio(
            "LocoProp-M", matmuls("LocoProp-M")
        ),
        f"time: LocoProp-S step, T={iterations} / its matmuls": ratio(
            "LocoProp-S", matmuls("LocoProp-S")
        ),
        f"time: FOOF step, T={PERIOD} / Adam step": ratio("FOOF", lambda s, _: s["Adam"]),
        f"time: FOOF step, T={PERIOD} / matmuls of gradient and inverses": ratio(
            "FOOF", matmuls("FOOF")
        ),
        "time: FOOF step, T=1 / its matmuls and solves": ratio("FOOF, T=1", matmuls("FOOF, T=1")),
        "time: LNB step / nine matmuls": ratio("LNB", matmuls("LNB")),
        "time: LNB step, half the rows / LNB step": ratio(
            "LNB, half the rows", lambda s, _: s["LNB"]
        ),
        "time: LNB step, a quarter of the rows / LNB step": ratio(
            "LNB, a quarter", lambda s, _: s["LNB"]
        ),
        "time: LNB step / Adam step": ratio("LNB", lambda s, _: s["Adam"]),
        "time: LocoProp-M step / Adam step": ratio("LocoProp-M", lambda s, _: s["Adam"]),
        "time: LocoProp-S step / Adam step": ratio("LocoProp-S", lambda s, _: s["Adam"]),
    }
    report = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "batch_size": rows,
        "iterations": iterations,
        "rounds": args.rounds,
        "ratios": {
            name: dict(zip(("median", "min", "max"), values, strict=True))
            for name, values in ratios.items()
        },
        "median_seconds": {name: median(s[name] for s, _ in rounds) for name in parts},
        "compile_seconds": {name: part.seconds for name, part in parts.items()},
        "temporary_MB": {name: part.temporary / 1e6 for name, part in parts.items()},
        "captured_MB": arrays / 1e6,
        "gflop": {
            name: sum(p.flops * n for p, n in counts.items()) / 1e9
            for name, counts in needed.items()
        },
    }
    _print(report)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"speed_{jax.default_backend()}.json"
    write_json(path, report)
    print(f"\nWritten to {path}")


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


if __name__ == "__main__":
    main()
