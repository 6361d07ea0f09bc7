"""What capture costs on the networks people train, as ratios to `jax.value_and_grad` of one run.

    python -m benchmarks capture_cost            tracing and compiling, and steps
    python -m benchmarks capture_cost --zoo      compile times of all models of tests/zoo.py

Machines are noisy, so each round times everything once, one after the other, and ratios are taken
within a round. Written to capture_cost_<backend>.json or capture_cost_<backend>_zoo.json.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import locoprop_jax as lp
from benchmarks.shared import cli, paper
from benchmarks.shared.models import LanguageModel, ResNet, UNet, ViT
from benchmarks.shared.results import RESULTS, write_measurement

RATES = {"Adam": 1e-3, "FOOF": 1e-2, "LNB": 1e-2}


class Task(NamedTuple):
    """A loss with its parameters and one batch."""

    loss_fn: Callable[..., jax.Array]
    params: Any
    batch: Any


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def task(
    model: Any,
    inputs: jax.Array,
    labels: jax.Array,
    loss: Callable[[jax.Array, jax.Array], jax.Array] = cross_entropy,
) -> Task:
    """The mean cross-entropy, or another loss, of a linen model's logits."""

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        x, y = batch
        return loss(model.apply({"params": params}, x), y)

    params = model.init(jax.random.key(0), inputs)["params"]
    return Task(loss_fn, params, (inputs, labels))


def transformer(depth: int, scanned: bool) -> Task:
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (4, 16)))
    return task(LanguageModel(64, depth, 32, 4, scanned), tokens, tokens)


def images(
    model: Any,
    batch: int,
    size: int,
    channels: int,
    pixelwise: bool = False,
    loss: Any = cross_entropy,
) -> Task:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, size, size, channels))
    labels = rng.integers(0, 10, (batch, size, size) if pixelwise else batch)
    return task(model, jnp.asarray(x, jnp.float32), jnp.asarray(labels), loss)


class Built(NamedTuple):
    """How long a function took."""

    trace: float
    compile: float

    @property
    def total(self) -> float:
        return self.trace + self.compile


def build(function: Callable, *args: Any) -> tuple[Built, Callable]:
    """Trace and compile a function that JAX has not seen."""
    jax.clear_caches()
    begin = time.perf_counter()
    traced = jax.jit(function).trace(*args)
    middle = time.perf_counter()
    compiled = traced.lower().compile()
    return Built(middle - begin, time.perf_counter() - middle), compiled


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def tracing(task: Task, rounds: int) -> dict[str, Any]:
    """Ratios of tracing, and of tracing and compiling, with capture to without.

    The batch axes are known, as they are after `find_layers`. Arrays that nobody reads are not
    computed; those that leave the compiled function are, each by itself, which takes longer to
    compile.
    """
    lp.find_layers(task.loss_fn, task.params, task.batch)
    capture = lp.value_grad_and_capture(task.loss_fn)
    sides = {
        "plain": jax.value_and_grad(task.loss_fn),
        "unused": lambda params, batch: capture(params, batch)[:2],
        "returned": capture,
    }
    found = [
        {name: build(side, task.params, task.batch)[0] for name, side in sides.items()}
        for _ in range(rounds + 1)
    ][1:]
    return {
        "trace": spread([f["returned"].trace / f["plain"].trace for f in found]),
        **{
            f"trace and compile, arrays {name}": spread(
                [f[name].total / f["plain"].total for f in found]
            )
            for name in ("unused", "returned")
        },
        "seconds": {
            name: {"trace": median(f[name].trace for f in found)}
            | {"compile": median(f[name].compile for f in found)}
            for name in sides
        },
    }


def steps(task: Task, rounds: int, period: int) -> dict[str, Any]:
    """Ratios of capture to a gradient, and of a step of FOOF and LNB to one of Adam.

    FOOF gathers statistics in each step and inverts in one of `period`.
    """
    layers = lp.find_layers(task.loss_fn, task.params, task.batch, on_uncaptured="pass")
    capture = lp.value_grad_and_capture(task.loss_fn)
    methods: dict[str, Any] = {
        "Adam": optax.with_extra_args_support(optax.adam(RATES["Adam"])),
        "FOOF": paper.foof(layers, RATES["FOOF"], inverse_period=period),
        "FOOF, few statistics": paper.foof(
            layers, RATES["FOOF"], inverse_period=period, statistics_steps=max(1, period // 10)
        ),
        "LNB": paper.lnb(layers, RATES["LNB"]),
    }
    calls: dict[str, Callable[[], Any]] = {}
    compiled_in: dict[str, float] = {}

    def add(name: str, function: Callable, args: tuple, carry: bool) -> None:
        built, compiled = build(function, *args)
        compiled_in[name] = built.total
        held = [args]

        def call() -> None:
            result = jax.block_until_ready(compiled(*held[0]))
            if carry:
                held[0] = (*result, args[-1])

        calls[name] = call

    plain = (task.params, task.batch)
    add("value_and_grad", jax.value_and_grad(task.loss_fn), plain, False)
    add("capture", capture, plain, False)
    for name, tx in methods.items():

        def step(params: Any, state: Any, batch: Any, tx=tx, name=name) -> Any:
            if name == "Adam":
                grads, captured = jax.grad(task.loss_fn)(params, batch), None
            else:
                _, grads, captured = capture(params, batch)
            updates, state = tx.update(grads, state, params, captured=captured)
            return optax.apply_updates(params, updates), state

        add(name, step, (task.params, tx.init(task.params), task.batch), True)

    def seconds(call: Callable, repeats: int) -> float:
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - begin) / repeats

    found = [
        {n: seconds(call, period if "FOOF" in n else 1) for n, call in calls.items()}
        for _ in range(rounds + 1)
    ][1:]

    def ratio(one: str, other: str) -> dict[str, float]:
        return spread([f[one] / f[other] for f in found])

    return {
        "capture / value_and_grad": ratio("capture", "value_and_grad"),
        **{f"{name} / Adam": ratio(name, "Adam") for name in methods if name != "Adam"},
        "median_seconds": {name: median(f[name] for f in found) for name in calls},
        "compile_seconds": compiled_in,
    }


def zoo() -> dict[str, Any]:
    """Seconds to trace and compile each model of the tests, without and with capture."""
    from tests.zoo import ZOO  # needs Equinox and Haiku, of the tests' dependencies

    found = {}
    for name, model in ZOO.items():
        loss_fn, params, batch = model.build()
        plain, _ = build(jax.value_and_grad(loss_fn), params, batch)
        captured, _ = build(lp.value_grad_and_capture(loss_fn), params, batch)
        found[name] = {"jax.value_and_grad": plain.total, "with capture": captured.total}
        print(f"{name:40s} {plain.total:6.2f} s {captured.total:6.2f} s", flush=True)
    return found


def parse_arguments(argv: cli.Argv) -> argparse.Namespace:
    parser = cli.make_parser("capture_cost", "What capture costs, as ratios.")
    cli.add_numbers(
        parser,
        {
            "rounds": (5, "of everything in turn"),
            "depth": (24, "layers of the transformer"),
            "batch-size": (32, "images per step"),
            "period": (20, "of FOOF's inversions"),
        },
    )
    parser.add_argument("--zoo", action="store_true", help="compile times of the zoo instead")
    return parser.parse_args(argv)


def show(name: str, report: Mapping[str, Any]) -> None:
    for what, value in report.items():
        if "median" in value:
            print(f"{name}: {what} {value['median']:.2f} ({value['min']:.2f}-{value['max']:.2f})")
    print(flush=True, end="")


def main(argv: cli.Argv = None) -> int:
    args = parse_arguments(argv)
    path = RESULTS / f"capture_cost_{jax.default_backend()}{'_zoo' if args.zoo else ''}.json"
    report: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "rounds": args.rounds,
    }
    if args.zoo:
        report["compile_seconds"] = zoo()
        write_measurement(path, report)
        return 0
    for scanned in (False, True):
        name = f"transformer of {args.depth} layers, {'scanned' if scanned else 'unrolled'}"
        report[name] = tracing(transformer(args.depth, scanned), args.rounds)
        show(name, report[name])
    small = (16, 32, 64, 128)
    networks = {
        "ViT": images(ViT(10), args.batch_size, 28, 1),
        "ResNet18, widths 16 to 128": images(ResNet(10, small), args.batch_size, 32, 3),
        "UNet": images(UNet(10, (16, 32, 64)), args.batch_size, 32, 3, pixelwise=True),
    }
    for name, network in networks.items():
        report[name] = steps(network, args.rounds, args.period)
        show(name, report[name])
    write_measurement(path, report)
    return 0
