"""What a step of each method costs beside Adam's: to compile, to take, and in memory.

    python -m benchmarks costs                      all networks
    python -m benchmarks costs mlp autoencoder      some of them

Every method is at its defaults. Machines are noisy: each round compiles everything anew and takes
the steps of everything, one after the other, and ratios are taken within a round. The time of a
step is the mean over a period of inversions. Written to costs_<backend>.json.
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
from optax import contrib
from tqdm import tqdm

import locoprop_jax as lp
from benchmarks.costs.capture_cost import Task, images, spread, task
from benchmarks.shared import cli
from benchmarks.shared.autoencoder import make_network, make_problem
from benchmarks.shared.classifier import Classifier
from benchmarks.shared.data import Dataset
from benchmarks.shared.methods import Method
from benchmarks.shared.models import LanguageModel, UNet, ViT
from benchmarks.shared.report import aligned
from benchmarks.shared.results import write_measurement
from benchmarks.shared.steps import State, make_step
from benchmarks.shared.timing import bytes_of, program_bytes

PERIOD = 20  # of inversions


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Marked, because K-FAC's steps are bounded by what such a loss says of its outputs."""
    return lp.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def of_model(model: Any, inputs: Any, labels: Any) -> Task:
    return task(model, jnp.asarray(inputs), jnp.asarray(labels), cross_entropy)


def language_model(depth: int) -> Task:
    tokens = np.random.default_rng(0).integers(0, 64, (16, 32))
    return of_model(LanguageModel(64, depth, 64, 4), tokens, tokens)


def autoencoder() -> Task:
    """Ten layers of 500 x 500 and their like: the deep autoencoder of the review."""
    pixels = np.random.default_rng(0).uniform(size=(1000, 784)).astype(np.float32)
    problem = make_problem(Dataset("random", "generated", pixels, pixels), make_network("deep"))
    return Task(problem.loss_fn, problem.init(jax.random.key(0)), jnp.asarray(pixels))


def mlp() -> Task:
    rng = np.random.default_rng(0)
    pixels = rng.uniform(size=(32, 784)).astype(np.float32)
    return of_model(Classifier((256,) * 3), pixels, rng.integers(0, 10, 32))


def of_images(model: Any, size: int, channels: int, pixelwise: bool = False) -> Task:
    return images(model, 32, size, channels, pixelwise, cross_entropy)


TASKS: Mapping[str, tuple[str, Callable[[], Task]]] = {
    "lm12": ("language model, 12 layers of width 64", lambda: language_model(12)),
    "lm48": ("language model, 48 layers of width 64", lambda: language_model(48)),
    "autoencoder": ("deep autoencoder, batch 1000", autoencoder),
    "mlp": ("three layers of 256, batch 32", mlp),
    "vit": ("vision transformer, batch 32", lambda: of_images(ViT(10), 28, 1)),
    "unet": ("UNet, batch 32", lambda: of_images(UNet(10, (16, 32, 64)), 32, 3, True)),
}


def method(make: Callable[[Any], Any], **options: Any) -> Method:
    return Method("", lambda layers, schedule: make(layers), {}, **options)


METHODS: Mapping[str, Method] = {
    "Adam": method(lambda layers: optax.adam(1e-3), needs_capture=False),
    "Muon": method(lambda layers: contrib.muon(1e-3), needs_capture=False),
    "FOOF": method(lp.foof),
    "LNB": method(lp.lnb),
    "K-FAC": method(lp.kfac, curvature="fisher_mc"),
}


class Cost(NamedTuple):
    """Of one method in one round: seconds to trace, to compile, and a step takes; bytes."""

    trace: float
    compile: float
    step: float
    temporary: int
    state: int

    @property
    def build(self) -> float:
        return self.trace + self.compile


def cost(task: Task, method: Method, steps: int) -> Cost:
    """Of a step that is traced and compiled anew, timed after as many others.

    At first inversions are more frequent than they are later.
    """

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        return task.loss_fn(params, batch)  # anew, or what JAX remembers of it would be free

    layers = lp.find_layers(loss_fn, task.params, task.batch) if method.needs_capture else None
    tx = optax.with_extra_args_support(method.build(layers, None))
    step = make_step(loss_fn, tx, method)
    params = jax.tree.map(jnp.copy, task.params)
    state = jax.jit(lambda p: State(p, tx.init(p), jax.random.key(0)))(params)
    everything = jnp.arange(len(jax.tree.leaves(task.batch)[0]))
    started = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=0).lower(state, task.batch, everything)
    traced = time.perf_counter()
    compiled = lowered.compile()
    built = time.perf_counter()

    size = bytes_of(state.opt_state)
    for _ in range(steps):
        state, _ = compiled(state, task.batch, everything)
    jax.block_until_ready(state)
    first = time.perf_counter()
    for _ in range(steps):
        state, _ = compiled(state, task.batch, everything)
    jax.block_until_ready(state)
    seconds = (time.perf_counter() - first) / steps
    temporary, _ = program_bytes(compiled)
    return Cost(traced - started, built - traced, seconds, temporary, size)


def measure(task: Task, rounds: int, steps: int, label: str) -> list[dict[str, Cost]]:
    """By method, round by round."""
    bar = tqdm(total=rounds * len(METHODS), desc=label, mininterval=1)
    found = []
    with bar:
        for _ in range(rounds):
            one = {}
            for name, each in METHODS.items():
                one[name] = cost(task, each, steps)
                bar.update()
            found.append(one)
    return found


def to_adam(rounds: Sequence[Mapping[str, Cost]], name: str, what: str) -> dict[str, float]:
    """Of a method's cost over Adam's."""
    return spread([getattr(r[name], what) / getattr(r["Adam"], what) for r in rounds])


def summary(task: Task, rounds: Sequence[Mapping[str, Cost]]) -> dict[str, Any]:
    """What is written: ratios to Adam, its seconds, and memory."""
    size, last = bytes_of(task.params), rounds[-1]
    return {
        "adam_seconds": {
            what: median(getattr(r["Adam"], what) for r in rounds)
            for what in ("trace", "compile", "step")
        },
        "ratios": {
            name: {what: to_adam(rounds, name, what) for what in ("trace", "build", "step")}
            for name in METHODS
            if name != "Adam"
        },
        "state_by_parameters": {name: own.state / size for name, own in last.items()},
        "temporary_by_adam": {
            name: own.temporary / last["Adam"].temporary for name, own in last.items()
        },
    }


def table(report: Mapping[str, Mapping[str, Any]]) -> str:
    """Each network's ratios to Adam: least, median and most; memory by the last round."""
    header = ("network", "method", "trace + compile", "step", "state", "temporary")
    rows = []
    for name, found in report.items():
        for other, ratios in found["ratios"].items():
            cells = [_shown(ratios["build"]), _shown(ratios["step"])]
            memory = found["state_by_parameters"][other], found["temporary_by_adam"][other]
            rows.append((name, other, *cells, *(f"{value:.1f}" for value in memory)))
    return aligned(header, rows)


def _shown(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"


def parse_arguments(argv: cli.Argv) -> argparse.Namespace:
    parser = cli.make_parser("costs", "What a step costs beside Adam's.")
    cli.add_names_argument(parser, TASKS, "network")
    cli.add_numbers(
        parser,
        {
            "rounds": (3, "of everything in turn"),
            "steps": (PERIOD, "that are timed, best a period of inversions"),
        },
    )
    cli.add_output_argument(parser, f"costs_{jax.default_backend()}.json")
    return parser.parse_args(argv)


def main(argv: cli.Argv = None) -> int:
    args = parse_arguments(argv)
    report = {}
    for name in dict.fromkeys(args.names):
        task = TASKS[name][1]()
        report[name] = summary(task, measure(task, args.rounds, args.steps, name))
        print(table({name: report[name]}), flush=True)
    print("\nRatios to Adam's; the state by the parameters' size.\n" + table(report))
    device, version = jax.devices()[0].device_kind, jax.__version__
    networks = {name: {"what": TASKS[name][0], **found} for name, found in report.items()}
    content = {"device": device, "jax": version, "rounds": args.rounds, "networks": networks}
    write_measurement(args.output, content)
    return 0
