"""LocoProp-M here and in PyTorch, side by side: the PyPI package `locoprop` 0.1.0.

    pip install ".[peers]"
    python -m benchmarks torch_peer

Both train the autoencoder of that package's README from the same parameters on the same batches,
with the same local optimizer and number of iterations. The package writes the same algorithm with
each local gradient divided by the batch size, and by default moves the input of each layer after
the layer before it has moved (`correction`). Steps are timed alternately in one process.
"""

import functools
import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

import locoprop_jax as lp
from benchmarks.shared import cli
from benchmarks.shared.data import load_dataset, subset
from benchmarks.shared.results import write_measurement

WIDTHS = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
GAMMA = 10.0  # the package's default `learning_rate`

Params = list[dict[str, np.ndarray]]


class Setting(NamedTuple):
    """What both sides run.

    Attributes:
      optimizer: "rmsprop" (the package's default) or "sgd".
      learning_rate: of the local iterations.
      batch_size, iterations, correction: as they say.
    """

    optimizer: str
    learning_rate: float
    batch_size: int
    iterations: int
    correction: float

    @property
    def label(self) -> str:
        return (
            f"{self.optimizer}, batch {self.batch_size}, T = {self.iterations}, "
            f"correction {self.correction:g}"
        )


# The package's defaults, its plain algorithm, and the inner optimizer that has a cheaper way here.
SETTINGS = (
    Setting("rmsprop", 2e-5, 100, 5, 0.1),
    Setting("rmsprop", 2e-5, 100, 5, 0.0),
    Setting("rmsprop", 2e-5, 1000, 5, 0.0),
    Setting("rmsprop", 2e-5, 1000, 5, 0.1),
    Setting("sgd", 0.01, 100, 10, 0.0),
    Setting("sgd", 0.01, 100, 10, 0.1),
)

Step = Callable[[Float[np.ndarray, "batch 784"]], float]


def initial_parameters(seed: int) -> Params:
    """The same for both sides, as (d_in, d_out) kernels."""
    init = nn.initializers.lecun_normal()
    keys = jax.random.split(jax.random.key(seed), len(WIDTHS) - 1)
    shapes = zip(keys, WIDTHS, WIDTHS[1:], strict=False)
    return [
        {"kernel": np.asarray(init(key, (d_in, d_out))), "bias": np.zeros(d_out, np.float32)}
        for key, d_in, d_out in shapes
    ]


# --- here ----------------------------------------------------------------------------------------


def loss_fn(params: list[dict[str, Array]], images: Float[Array, "batch 784"]) -> Array:
    hidden = images
    for i, layer in enumerate(params):
        hidden = hidden @ layer["kernel"] + layer["bias"]
        hidden = hidden if i == len(params) - 1 else jnp.tanh(hidden)
    return optax.sigmoid_binary_cross_entropy(hidden, images).sum(-1).mean()


def local_optimizer(
    learning_rate: optax.ScalarOrSchedule, *, batch_size: int
) -> optax.GradientTransformation:
    """PyTorch's RMSprop with the package's settings, of gradients divided by the batch size."""
    return optax.chain(
        optax.scale(1 / batch_size),
        optax.scale_by_rms(decay=0.9, eps=1e-6, eps_in_sqrt=False),
        optax.trace(decay=0.999),
        optax.scale_by_learning_rate(learning_rate),
    )


def our_step(setting: Setting, params: Params) -> Step:
    abstract = jax.ShapeDtypeStruct((setting.batch_size, WIDTHS[0]), jnp.float32)
    layers = lp.find_layers(loss_fn, params, abstract)
    optimizer, learning_rate = optax.sgd, setting.learning_rate / setting.batch_size
    if setting.optimizer == "rmsprop":
        optimizer = functools.partial(local_optimizer, batch_size=setting.batch_size)
        learning_rate = setting.learning_rate
    tx = lp.locoprop_m(
        layers,
        learning_rate,
        gamma=GAMMA,
        relative=False,
        iterations=setting.iterations,
        optimizer=optimizer,
        correction=setting.correction or None,
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, images: Array) -> tuple[Any, Any, Array]:
        loss, grads, captured = lp.value_grad_and_capture(loss_fn)(params, images)
        updates, state = tx.update(grads, state, params, captured=captured)
        return optax.apply_updates(params, updates), state, loss

    at = jax.tree.map(jnp.asarray, params)
    held = [at, tx.init(at)]
    compiled = step.lower(held[0], held[1], abstract).compile()

    def take(images: Float[np.ndarray, "batch 784"]) -> float:
        held[0], held[1], loss = compiled(held[0], held[1], jnp.asarray(images))
        return float(jax.block_until_ready((held[0], loss))[1])

    return take


# --- there ---------------------------------------------------------------------------------------


def import_peer() -> tuple[Any, Any]:
    """PyTorch and the package, neither of which anything else here depends on."""
    return importlib.import_module("torch"), importlib.import_module("locoprop")


def their_step(setting: Setting, params: Params) -> Step:
    torch, peer = import_peer()
    last = len(params) - 1
    modules = []
    for i, layer in enumerate(params):
        linear = torch.nn.Linear(*layer["kernel"].shape)
        with torch.no_grad():
            linear.weight.copy_(torch.tensor(layer["kernel"].T.copy()))
            linear.bias.copy_(torch.tensor(layer["bias"]))
        activation = torch.nn.Sigmoid() if i == last else torch.nn.Tanh()
        modules.append(peer.LocoLayer(linear, activation, implicit=i == last))
    optimizers: Mapping[str, tuple[Any, dict[str, float]]] = {
        "rmsprop": (torch.optim.RMSprop, {"eps": 1e-6, "momentum": 0.999, "alpha": 0.9}),
        "sgd": (torch.optim.SGD, {}),
    }
    optimizer, options = optimizers[setting.optimizer]

    def loss(logits: Any, images: Any) -> Any:
        entropy = torch.nn.functional.binary_cross_entropy_with_logits
        return entropy(logits, images, reduction="sum") / len(images)

    trainer = peer.LocopropTrainer(
        torch.nn.Sequential(*modules),
        loss,
        optimizer_class=optimizer,
        optimizer_hparams={"lr": setting.learning_rate, **options},
        learning_rate=GAMMA,
        local_iterations=setting.iterations,
        correction=setting.correction,
    )

    def take(images: Float[np.ndarray, "batch 784"]) -> float:
        batch = torch.from_numpy(images)
        return float(trainer.step(batch, batch.clone()).detach())

    return take


def set_fastest_threads(setting: Setting, images: np.ndarray, seed: int) -> int:
    """Give PyTorch the number of threads with which its step is fastest: more is not always."""
    torch, _ = import_peer()
    batch, seconds = images[: setting.batch_size], {}
    for threads in {1, os.cpu_count() or 1}:
        torch.set_num_threads(threads)
        take = their_step(setting, initial_parameters(seed))
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            take(batch)
            times.append(time.perf_counter() - begin)
        seconds[threads] = min(times)
    fastest = min(seconds, key=lambda threads: seconds[threads])
    torch.set_num_threads(fastest)
    return fastest


# --- side by side --------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """Medians and losses of one setting; `difference` is the largest relative one."""

    setting: Setting
    threads: int  # of PyTorch, the faster choice
    ours: float
    theirs: float
    ratio: float
    our_losses: list[float]
    their_losses: list[float]
    difference: float


def side_by_side(setting: Setting, images: np.ndarray, steps: int, seed: int) -> Outcome:
    """The same steps on both sides, timed in turns; the first of each is not timed."""
    threads = set_fastest_threads(setting, images, seed)
    sides = [make(setting, initial_parameters(seed)) for make in (our_step, their_step)]
    order = np.random.default_rng(seed)
    seconds: list[list[float]] = [[], []]
    losses: list[list[float]] = [[], []]
    for _ in range(steps + 1):
        batch = images[order.choice(len(images), setting.batch_size, replace=False)]
        for i, take in enumerate(sides):
            begin = time.perf_counter()
            losses[i].append(take(batch))
            seconds[i].append(time.perf_counter() - begin)
    ratios = [theirs / ours for ours, theirs in zip(*(s[1:] for s in seconds), strict=True)]
    ours, theirs = (statistics.median(s[1:]) for s in seconds)
    difference = max(abs(a - b) / b for a, b in zip(*losses, strict=True))
    ratio = statistics.median(ratios)
    return Outcome(setting, threads, ours, theirs, ratio, losses[0], losses[1], difference)


def table(outcomes: Sequence[Outcome]) -> str:
    lines = [
        f"{'setting':42}  {'ours ms':>8}  {'theirs ms':>9}  {'ratio':>6}  {'loss':>7}  differs"
    ]
    lines.append("-" * len(lines[0]))
    lines += [
        f"{o.setting.label:42}  {1e3 * o.ours:8.1f}  {1e3 * o.theirs:9.1f}  {o.ratio:6.2f}  "
        f"{o.our_losses[-1]:7.2f}  {o.difference:.0e}"
        for o in outcomes
    ]
    return "\n".join(lines)


def main(argv: cli.Argv = None) -> int:
    parser = cli.make_parser(
        "torch_peer",
        "Time LocoProp-M here against the PyPI package `locoprop` (PyTorch).",
    )
    steps = {"steps": (30, "timed steps of each setting"), "train-images": (10_000, "to draw from")}
    cli.add_numbers(parser, steps)
    parser.add_argument("--seed", type=cli.seed, default=0, metavar="N")
    cli.add_output_argument(parser, "torch_peer.json")
    args = parser.parse_args(argv)
    try:
        import_peer()
    except ImportError:
        parser.error('the peer is not installed: pip install ".[peers]"')
    images = subset(load_dataset("auto", None, args.seed), args.train_images).train
    outcomes = []
    for setting in SETTINGS:
        outcomes.append(side_by_side(setting, images, args.steps, args.seed))
        print(f"{outcomes[-1].setting.label}: {outcomes[-1].ratio:.2f}", file=sys.stderr)
    print(table(outcomes))
    write_measurement(
        args.output,
        [
            o._asdict() | {"setting": o.setting._asdict(), "label": o.setting.label}
            for o in outcomes
        ],
    )
    return 0
