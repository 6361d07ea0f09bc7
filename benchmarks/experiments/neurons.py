"""The experiments of Linear Neuron Boosting and of gradient descent on neurons.

    python -m benchmarks.neurons [NAME ...]

runs all of them, or those named: each method once with its default learning rate, and with others
a factor of sqrt(10) apart, the same number for each. Every experiment prints a table of both and
writes results.json, best.png and defaults.png to out/neurons/NAME/. The papers' sizes are

    python -m benchmarks.neurons mlp autoencoder --train-images 60000 --epochs 10
    python -m benchmarks.neurons vit wide_resnet vgg --dataset cifar-10 --train-images 50000
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.sparse.linalg import cg
from jaxtyping import Array, Float

import locoprop_jax as lp
from benchmarks.experiments import autoencoder
from benchmarks.experiments.ablations import TRIAL_STEP
from benchmarks.shared import classifier, cli, images, plots, report
from benchmarks.shared.classifier import Classifier
from benchmarks.shared.comparison import Job, train_all
from benchmarks.shared.data import Dataset
from benchmarks.shared.methods import Method
from benchmarks.shared.steps import Params, count_examples
from benchmarks.shared.training import Problem, Run, Settings
from benchmarks.shared.tuned import write_json
from locoprop_jax._neurons.metric import descend

QUICK = {"epochs": 1, "train_images": 400, "trials": 1, "shrink": 16}
MNIST_MEAN, MNIST_DEVIATION = 0.1307, 0.3081  # what Benzing standardised Fashion-MNIST with


class Contestant(NamedTuple):
    """A method with what its users would try first.

    Attributes:
      label: its name in tables and plots.
      build: (layers, learning rate) -> optimizer.
      learning_rate: the default.
      needs_capture: whether its step captures activations and cotangents.
      curvature: which curvature it captures.
      schedule: (learning rate, steps) -> its schedule; None for a warm-up and a linear decay.
    """

    label: str
    build: Callable[..., optax.GradientTransformation]
    learning_rate: float
    needs_capture: bool = False
    curvature: str | None = None
    schedule: Callable[[float, int], optax.Schedule] | None = None

    def method(self) -> Method:
        def build(layers: Any, schedule: optax.Schedule) -> Any:
            arguments = (layers,) if self.needs_capture else ()
            return optax.with_extra_args_support(self.build(*arguments, schedule))

        return Method(
            self.label,
            build,
            {},
            needs_capture=self.needs_capture,
            curvature=self.curvature,
            schedule=self.schedule,
        )


FOOF = Contestant("FOOF", lp.foof, 4.0, needs_capture=True)
LNB = Contestant("LNB", lp.lnb, 4.0, needs_capture=True)
ADAM = Contestant("Adam", optax.adam, 1e-3)
MOMENTUM = Contestant("Momentum", functools.partial(optax.sgd, momentum=0.9), 1e-1)
MUON = Contestant("Muon", optax.contrib.muon, 2e-2)


class Experiment(NamedTuple):
    """A problem, or several that are compared, and the methods that train it.

    Attributes:
      title: of the plots.
      problems: what sets a problem apart from the others -> how to make it from the images and a
        divisor of all widths.
      contestants: by their keys in the results, for a problem.
      epochs, batch_size: unless the command line has them. An epoch of the factorisation is a step.
      labels: whether the images need theirs.
      log: whether the plots' losses have a logarithmic axis.
      images: whether it trains on the images at all.
    """

    title: str
    problems: Mapping[str, Callable[[Dataset, int], Problem]]
    contestants: Callable[[Problem], Mapping[str, Contestant]]
    epochs: int
    batch_size: int
    labels: bool = False
    log: bool = False
    images: bool = True


# --- problems ------------------------------------------------------------------------------------


def inverted(dataset: Dataset) -> Dataset:
    """Every pixel as one minus itself."""
    return dataset._replace(train=1 - dataset.train, test=1 - dataset.test)


def standardised(dataset: Dataset) -> Dataset:
    scaled = {
        name: ((getattr(dataset, name) - MNIST_MEAN) / MNIST_DEVIATION).astype(np.float32)
        for name in ("train", "test")
    }
    return dataset._replace(**scaled)


def boosting_mlp(dataset: Dataset, shrink: int) -> Problem:
    """Two layers of 800 tanh units, Glorot's initial weights (LNB, section 5.2)."""
    hidden = autoencoder.narrower((800, 800), shrink)
    network = Classifier(hidden, kernel_init=nn.initializers.glorot_normal())
    return classifier.make_problem(dataset, network)


def benzing_mlp(dataset: Dataset, shrink: int) -> Problem:
    """Three layers of 1000 units without biases, He's initial weights (Benzing, appendix D)."""
    hidden = autoencoder.narrower((1000,) * 3, shrink)
    network = Classifier(hidden, nn.relu, False, nn.initializers.he_normal())
    return classifier.make_problem(standardised(dataset), network)


def deep_autoencoder(dataset: Dataset, shrink: int) -> Problem:
    return autoencoder.make_problem(dataset, autoencoder.make_network(shrink=shrink))


def factorisation(
    dataset: Dataset, shrink: int, *, condition: float = 1e5, samples: int = 1000
) -> Problem:
    """Fit y = A x with two linear layers (Recht, 2017; LNB, section 5.1); the images play no part.

    The rows of A grow from 1 to its condition number. The loss is in units of the mean squared
    length of y.
    """
    del dataset
    width, outputs = autoencoder.narrower((60, 100), shrink)
    rng = np.random.default_rng(0)
    a = np.linspace(1, condition, outputs)[:, None] * rng.normal(size=(outputs, width)) / condition
    x = rng.normal(size=(samples, width)).astype(np.float32)
    y = (x @ a.T).astype(np.float32)
    unit = float(np.mean(np.sum(y**2, 1)))

    def init(key: Array) -> Params:
        first, second = jax.random.split(key)
        scale = width**-0.5
        return {
            "first": {"kernel": scale * jax.random.normal(first, (width, width))},
            "second": {"kernel": scale * jax.random.normal(second, (width, outputs))},
        }

    def loss_fn(params: Params, batch: Mapping[str, Array]) -> Float[Array, ""]:
        return squared_error(factors(params, batch["x"]), batch["y"]) / unit

    return Problem("factorisation", init, loss_fn, {"x": x, "y": y}, None)


def factors(params: Params, x: Float[Array, "rows d_in"]) -> Float[Array, "rows d_out"]:
    return x @ params["first"]["kernel"] @ params["second"]["kernel"]


def squared_error(
    outputs: Float[Array, "rows d_out"], y: Float[Array, "rows d_out"]
) -> Float[Array, ""]:
    return jnp.square(outputs - y).sum(-1).mean()


def gauss_newton(
    learning_rate: optax.ScalarOrSchedule, *, problem: Problem, iterations: int = 100
) -> optax.GradientTransformation:
    """The Gauss-Newton direction of the factorisation, by conjugate gradient on all its data."""
    x, y = (jnp.asarray(problem.train[name]) for name in "xy")
    unit = squared_error(jnp.zeros_like(y), y)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        outputs, forward = jax.linearize(lambda p: factors(p, x), params)
        backward = jax.linear_transpose(forward, params)
        curvature = jax.grad(lambda outputs: squared_error(outputs, y) / unit)

        def product(v: Any) -> Any:
            image = jax.jvp(curvature, (outputs,), (forward(v),))[1]
            return jax.tree.map(lambda a, b: a + 1e-8 * b, backward(image)[0], v)

        return cg(product, updates, maxiter=iterations)[0], state

    direction = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    return optax.chain(direction, optax.scale_by_learning_rate(learning_rate))


# --- experiments ---------------------------------------------------------------------------------


EVERYONE = {"foof": FOOF, "lnb": LNB, "momentum": MOMENTUM, "adam": ADAM, "muon": MUON}
FEW = {"foof": FOOF, "lnb": LNB, "adam": ADAM}


def averaged_steps(
    direction: Callable[..., optax.GradientTransformationExtraArgs],
    layers: lp.Layers,
    learning_rate: optax.ScalarOrSchedule,
) -> optax.GradientTransformation:
    """A direction whose steps are averaged, not its gradients: shorter ones where they disagree."""
    return optax.chain(direction(layers), optax.ema(0.9), descend(learning_rate, 0.0))


def foof_direction(layers: lp.Layers) -> optax.GradientTransformationExtraArgs:
    return lp.scale_by_metric_norm(lp.scale_by_foof(layers, inverse_period=20))


def _variations(
    method: Contestant,
    direction: Callable[..., optax.GradientTransformationExtraArgs],
    changes: Mapping[str, Mapping[str, Any]],
) -> Mapping[str, Contestant]:
    """A method as it is, with its steps averaged, and with one option changed at a time."""
    averaged = Contestant(
        "averaged steps",
        functools.partial(averaged_steps, direction),
        10 * method.learning_rate,
        needs_capture=True,
    )
    changed = {
        label: method._replace(label=label, build=functools.partial(method.build, **options))
        for label, options in changes.items()
    }
    return {"unchanged": method, "averaged steps": averaged, **changed}


FOOF_CHANGES: Mapping[str, Mapping[str, Any]] = {
    "T = 1": {"inverse_period": 1},
    "T = 100": {"inverse_period": 100},
    "T = 20, S = 5": {"statistics_steps": 5},
    "decay 0.99": {"decay": 0.99},
    "damping 1": {"damping": 1.0},
    "damping 0.1": {"damping": 0.1},
    "damped biases": {"damp_bias": True},
}
LNB_CHANGES: Mapping[str, Mapping[str, Any]] = {
    "1 iteration": {"iterations": 1},
    "8 iterations": {"iterations": 8},
    "from zero": {"online": False},
    "moments 0.9": {"moment_decay": 0.9},
    "moments 0.999": {"moment_decay": 0.999},
    "shrinkage 0.1": {"shrinkage": 0.1},
    "ridge 1": {"ridge": 1.0},
    "ridge 0.1, absolute": {"ridge": 0.1, "relative": False},
    "half the rows": {"fraction": 0.5},
    "a quarter": {"fraction": 0.25},
}


def _second_order(problem: Problem) -> Mapping[str, Contestant]:
    """Without noise in the gradient little damping is needed, and a short step."""
    little = {
        "lnb_little": ("LNB, ridge 0.01", functools.partial(lp.lnb, ridge=0.01)),
        "foof_little": ("FOOF, damping 0.01", functools.partial(lp.foof, damping=0.01)),
    }
    newton = Contestant("Gauss-Newton", functools.partial(gauss_newton, problem=problem), 1.0)
    return {
        "lnb": LNB,
        "foof": FOOF,
        **{key: Contestant(label, build, 0.4, True) for key, (label, build) in little.items()},
        "gauss_newton": newton,
        "adam": ADAM,
    }


def _on_images(
    title: str, make: Callable[[Dataset, int], Problem], rate: float = 1.26
) -> Experiment:
    """Convolutions or attention, with smaller steps of FOOF and LNB than their default."""
    slower = {key: FEW[key]._replace(learning_rate=rate) for key in ("foof", "lnb")}
    contestants = {**FEW, **slower}
    return Experiment(
        title, {"": make}, lambda problem: contestants, epochs=5, batch_size=100, labels=True
    )


EXPERIMENTS: Mapping[str, Experiment] = {
    "factorisation": Experiment(
        "Matrix factorisation, condition number 1e5",
        {"": factorisation},
        _second_order,
        epochs=300,
        batch_size=1000,
        log=True,
        images=False,
    ),
    "inverted": Experiment(
        "Two layers of 800 tanh units, on images and on 1 - images",
        {
            "images": boosting_mlp,
            "1 - images": lambda dataset, shrink: boosting_mlp(inverted(dataset), shrink),
        },
        lambda problem: FEW,
        epochs=10,
        batch_size=1000,
        labels=True,
        log=True,
    ),
    "mlp": Experiment(
        "Three layers of 1000 ReLU units, batches of 100",
        {"": benzing_mlp},
        lambda problem: EVERYONE,
        epochs=3,
        batch_size=100,
        labels=True,
    ),
    "foof": Experiment(
        "FOOF on the deep autoencoder, one thing changed at a time",
        {"": deep_autoencoder},
        lambda problem: _variations(FOOF, foof_direction, FOOF_CHANGES),
        epochs=5,
        batch_size=1000,
    ),
    "lnb": Experiment(
        "LNB on the deep autoencoder, one thing changed at a time",
        {"": deep_autoencoder},
        lambda problem: _variations(LNB, lp.scale_by_lnb, LNB_CHANGES),
        epochs=5,
        batch_size=1000,
    ),
    "autoencoder": Experiment(
        "Deep autoencoder",
        {"": deep_autoencoder},
        # Its loss is a sum over 784 pixels, and 0.1 diverges.
        lambda problem: {**EVERYONE, "momentum": MOMENTUM._replace(learning_rate=1e-2)},
        epochs=5,
        batch_size=1000,
    ),
    "vit": _on_images("Vision transformer, four layers of 64 units", images.vit),
    "wide_resnet": _on_images("ResNet18, an eighth as wide", images.wide_resnet),
    # Without normalisation larger steps diverge.
    "unet": _on_images("UNet on scenes of two images", images.unet, rate=0.0398),
    "vgg": _on_images("VGG11, an eighth as wide", images.vgg, rate=0.0398),
}


class Attempt(NamedTuple):
    """A method on a problem with one learning rate."""

    key: str
    problem: str
    contestant: Contestant
    learning_rate: float

    @property
    def title(self) -> str:
        return f"{self.contestant.label}, {self.problem}" if self.problem else self.contestant.label

    @property
    def name(self) -> str:
        return f"{self.title}, {self.learning_rate:.3g}"


def attempts(
    experiment: Experiment, dataset: Dataset, args: argparse.Namespace
) -> Iterator[tuple[Attempt, Job]]:
    """The default learning rate first, then the others from small to large."""
    settings = Settings(args.epochs or experiment.epochs, experiment.batch_size, args.seed)
    for name, make in experiment.problems.items():
        problem = make(dataset, args.shrink)
        batch_size = min(settings.batch_size, count_examples(problem.train))
        for key, contestant in experiment.contestants(problem).items():
            powers = [i - args.trials // 2 for i in range(args.trials)]
            for power in sorted(powers, key=lambda power: power != 0):
                rate = contestant.learning_rate * TRIAL_STEP**power
                attempt = Attempt(key, name, contestant, rate)
                method = contestant.method()._replace(label=attempt.name)
                yield (
                    attempt,
                    Job(
                        attempt.name,
                        method,
                        {"learning_rate": rate},
                        problem,
                        settings._replace(batch_size=batch_size),
                    ),
                )


def run_experiment(name: str, dataset: Dataset, args: argparse.Namespace) -> bool:
    """Train with all methods and learning rates, print both tables, write results and plots.

    Returns:
      Whether Ctrl-C cut it short; what was finished is written then too.
    """
    experiment, directory = EXPERIMENTS[name], args.output_dir / name
    directory.mkdir(parents=True, exist_ok=True)
    planned = list(attempts(experiment, dataset, args))
    by_name = {attempt.name: attempt for attempt, _ in planned}
    settings = {
        "experiment": f"neurons/{name}",
        "dataset": dataset.name,
        "train_images": args.train_images,
        "epochs": args.epochs or experiment.epochs,
        "batch_size": planned[0][1].settings.batch_size,
        "shrink": args.shrink,
        "trials": args.trials,
        "seed": args.seed,
    }
    print(f"\n{name}: {experiment.title}", flush=True)

    def keep(runs: Sequence[Run]) -> None:
        write_json(directory / "results.json", report.results(runs, settings))
        jax.clear_caches()  # each run compiles a step of its own

    runs, interrupted = train_all((job for _, job in planned), keep)
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(by_name[run.method].title, []).append(run)
    chosen = {
        "defaults": [group[0] for group in groups.values()],
        "best": [min(group, key=_final_loss) for group in groups.values()],
    }
    for kind, some in chosen.items():
        if some:
            title = {"defaults": "default learning rates", "best": f"best of {args.trials} each"}
            print(f"\n{title[kind]}:\n\n{report.table(some)}\n")
            _plot(experiment, dataset, some, by_name, title[kind], directory / f"{kind}.png")
    print(f"Wrote results.json, best.png and defaults.png to {directory}.", flush=True)
    return interrupted


def _final_loss(run: Run) -> float:
    return float("inf") if run.stopped else run.curve[-1].train_loss


def _plot(
    experiment: Experiment,
    dataset: Dataset,
    runs: Sequence[Run],
    by_name: Mapping[str, Attempt],
    kind: str,
    path: Path,
) -> None:
    keys = list(dict.fromkeys(attempt.key for attempt in by_name.values()))
    problems = list(experiment.problems)
    looks = {
        run.method: plots.look(
            keys.index(by_name[run.method].key), problems.index(by_name[run.method].problem)
        )
        for run in runs
    }
    of = f": {dataset.name}, {len(dataset.train):,} images" if experiment.images else ""
    plots.plot_losses(runs, f"{experiment.title}{of}; {kind}", path, looks, log=experiment.log)


def parse_arguments(
    argv: Sequence[str] | None,
) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.neurons",
        description="Run the experiments of LNB and FOOF. Each prints its tables, and writes its "
        "curves as JSON and PNG.",
    )
    cli.add_names_argument(parser, EXPERIMENTS)
    cli.add_quick_argument(parser, QUICK, "a look at small sizes, seconds for each run")
    parser.add_argument(
        "--epochs",
        type=cli.positive_int,
        metavar="N",
        help="passes over the training images, steps of the factorisation (default: the "
        "experiment's own)",
    )
    cli.add_numbers(
        parser,
        {
            "train-images": (10_000, "how many of them to use"),
            "trials": (3, "learning rates to try with each method, the default among them"),
            "shrink": (1, "divide the width of every layer by this"),
        },
    )
    cli.add_data_arguments(parser)
    cli.add_output_dir_argument(
        parser, "out/neurons", "where the results go, a folder for each experiment"
    )
    args = cli.parse(parser, QUICK, argv)
    args.names = cli.chosen_names(parser, args, EXPERIMENTS, "experiment")
    return parser, args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 130 after Ctrl-C, as shells have it."""
    parser, args = parse_arguments(argv)
    dataset = cli.open_images(parser, args, any(EXPERIMENTS[name].labels for name in args.names))
    for name in args.names:
        if run_experiment(name, dataset, args):
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
