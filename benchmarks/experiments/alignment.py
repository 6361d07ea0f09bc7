"""How far approximate updates point where the Gauss-Newton matrix would (practical GN, F.2)."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.sparse.linalg import cg
from jaxtyping import Array, Float

import locoprop_jax as lp
from benchmarks.experiments import untuned
from benchmarks.shared import autoencoder, candidates, plots, report
from benchmarks.shared.autoencoder import Autoencoder
from benchmarks.shared.candidates import Claim, Experiment
from benchmarks.shared.data import Dataset
from benchmarks.shared.results import write_json
from benchmarks.shared.steps import SAMPLED, Batch, LossFn, Params, State, slice_examples
from benchmarks.shared.training import Problem, Settings
from benchmarks.shared.trajectories import follow
from locoprop_jax import _linalg
from locoprop_jax._layers.blocks import blocks, matrix

BATCH_SIZE = 500
ITERATIONS = 100  # of conjugate gradient, for each of the two systems
EXACT_OUTPUTS = 256  # a network with more has too many columns for KFLR
BLOCKS = "Gauss-Newton, blocks"


class Approximation(NamedTuple):
    """A direction at a point, from one batch.

    Attributes:
      build: (layers, damping) -> what makes it of the gradient.
      curvature: what it captures.
    """

    build: Callable[[lp.Layers, Any], optax.GradientTransformation]
    curvature: str | None = None


class Alignment(NamedTuple):
    """Cosines of updates with those of the Gauss-Newton matrix, at one point.

    Attributes:
      by_layer: by method, with the layers' blocks: one for each layer.
      full: by method, with the full matrix.
      damping: of all matrices.
      residuals: of the systems of the blocks and of the full matrix, relative to the gradient.
    """

    by_layer: Mapping[str, Float[Array, " layers"]]
    full: Mapping[str, Float[Array, ""]]
    damping: Float[Array, ""]
    residuals: Float[Array, "2"]


def approximations(outputs: int) -> dict[str, Approximation]:
    """The methods, with factored damping (the paper's stars) and exact."""

    def of(direction: Any, exact: bool) -> Callable[..., optax.GradientTransformation]:
        options = {"relative": False, "exact_damping": exact, "decay": 0.0}
        return lambda layers, damping: direction(layers, damping=damping, **options)

    kinds = {
        "KFRA": (lp.scale_by_kfra, "ggn_output"),
        "KFLR": (lp.scale_by_kfac, "ggn_exact"),
        "K-FAC": (lp.scale_by_kfac, "fisher_mc"),
    }
    if outputs > EXACT_OUTPUTS:
        del kinds["KFLR"]
    found = {
        label: Approximation(of(direction, exact), curvature)
        for name, (direction, curvature) in kinds.items()
        for label, exact in ((name, False), (f"{name}, exact damping", True))
    }
    foof = Approximation(lambda layers, damping: lp.scale_by_foof(layers, decay=0.0))
    gradient = Approximation(lambda layers, damping: optax.identity())
    return {**found, "FOOF": foof, "gradient": gradient}


def make_measurement(
    loss_fn: LossFn,
    layers: lp.Layers,
    methods: Mapping[str, Approximation],
    iterations: int = ITERATIONS,
) -> Callable[[Params, Batch, Array, Array], Alignment]:
    """The alignment of all methods at some parameters, from a batch, a key and the damping."""

    def direction(
        method: Approximation, params: Params, batch: Batch, key: Array, tau: Array
    ) -> Any:
        sampled = {"rng": key} if method.curvature in SAMPLED else {}
        capture = lp.value_grad_and_capture(loss_fn, curvature=method.curvature)
        _, grads, captured = capture(params, batch, **sampled)
        tx = optax.with_extra_args_support(method.build(layers, tau))
        return tx.update(grads, tx.init(params), params, captured=captured)[0]

    def measure(params: Params, batch: Batch, key: Array, tau: Array) -> Alignment:
        grads = jax.grad(loss_fn)(params, batch)
        by_blocks, of_blocks = solve(
            lp.gauss_newton_vector_product(loss_fn, params, batch, layers=layers), grads, tau
        )
        in_full, of_full = solve(lp.gauss_newton_vector_product(loss_fn, params, batch), grads, tau)
        found = {
            name: direction(method, params, batch, key, tau) for name, method in methods.items()
        }
        flat = {name: columns(layers, update) for name, update in found.items()}
        exact, whole = columns(layers, by_blocks), columns(layers, in_full)
        by_layer = {
            name: jnp.stack([cosine([own[i]], [exact[i]]) for i in range(len(exact))])
            for name, own in flat.items()
        }
        full = {name: cosine(own, whole) for name, own in flat.items()}
        full[BLOCKS] = cosine(exact, whole)
        return Alignment(by_layer, full, tau, jnp.stack([of_blocks, of_full]))

    def solve(product: Callable[[Any], Any], grads: Any, tau: Array) -> tuple[Any, Array]:
        def damped(v: Any) -> Any:
            return jax.tree.map(lambda a, b: a + tau.astype(b.dtype) * b, product(v), v)

        solution = cg(damped, grads, maxiter=iterations)[0]
        rest = jax.tree.map(jnp.subtract, grads, damped(solution))
        return solution, jnp.sqrt(_linalg.dot(rest, rest) / _linalg.dot(grads, grads))

    return jax.jit(measure)


def columns(layers: lp.Layers, tree: Any) -> list[Float[Array, " parameters"]]:
    """The layers' blocks, each as one vector."""
    return [matrix(block).ravel() for block in blocks(layers, tree).values()]


def cosine(one: list[Array], other: list[Array]) -> Float[Array, ""]:
    a, b = jnp.concatenate(one), jnp.concatenate(other)
    return a @ b / jnp.maximum(jnp.linalg.norm(a) * jnp.linalg.norm(b), jnp.finfo(a.dtype).tiny)


# --- the experiment ------------------------------------------------------------------------------


def pooled(dataset: Dataset, pool: int) -> Dataset:
    """Images of means over pool x pool pixels; what does not fill a square is left out."""

    def smaller(images: np.ndarray) -> np.ndarray:
        side = 28 // pool
        cut = images.reshape(-1, 28, 28)[:, : side * pool, : side * pool]
        return cut.reshape(-1, side, pool, side, pool).mean((2, 4)).reshape(-1, side * side)

    return dataset._replace(train=smaller(dataset.train), test=smaller(dataset.test))


def make_problem(dataset: Dataset, shrink: int) -> Problem:
    """The deep autoencoder of these images."""
    sizes = autoencoder.make_network(shrink=shrink)
    network = Autoencoder(
        encoder=sizes.encoder,
        code=sizes.code,
        decoder=sizes.decoder,
        pixels=dataset.train.shape[1],
    )
    return autoencoder.make_problem(dataset, network)


def run(
    experiment: Experiment, dataset: Dataset, args: argparse.Namespace, directory: Path
) -> bool:
    """Figures 5 to 7, for KFRA's own trajectory, and tau of its steps as all matrices' damping."""
    small = pooled(dataset, args.pool)
    problem = make_problem(small, args.shrink)
    settings = Settings(args.epochs, min(BATCH_SIZE, len(small.train)), args.seed)
    kfra = untuned.gauss_newton("KFRA", lp.kfra, "ggn_output")
    job = candidates.candidate(kfra, kfra.learning_rate, problem, settings).job
    some = slice_examples(small.train, 0, settings.batch_size)
    layers = lp.find_layers(problem.loss_fn, problem.init(jax.random.key(0)), some)
    methods = approximations(small.train.shape[1])
    measurement = make_measurement(problem.loss_fn, layers, methods)

    def measure(state: State, batch: Batch) -> Alignment:
        chained: Any = state.opt_state
        step = next(part for part in chained if isinstance(part, lp.GaussNewtonStepState))
        return measurement(state.params, batch, state.rng, step.damping)

    found, interrupted = follow(job, args.every, measure, "KFRA")
    described = candidates.describe(
        "alignment",
        dataset,
        args,
        pool=args.pool,
        every=args.every,
        batch_size=settings.batch_size,
        iterations=ITERATIONS,
        layers=list(layers),
    )
    if found:
        conclude(experiment, found, list(methods), described, directory)
    return interrupted


def conclude(
    experiment: Experiment,
    found: Mapping[int, Alignment],
    methods: list[str],
    described: Mapping[str, Any],
    directory: Path,
) -> None:
    """Print the table and the claims, write results.json and the plots."""
    points = list(found.values())
    by_layer = {name: np.stack([point.by_layer[name] for point in points]) for name in methods}
    full = {name: np.stack([point.full[name] for point in points]) for name in [*methods, BLOCKS]}
    rows = [
        (
            name,
            f"{by_layer[name].mean():.3f}" if name in by_layer else "1",
            f"{values.mean():.3f}",
            f"{values[0]:.3f}",
            f"{values[-1]:.3f}",
        )
        for name, values in full.items()
    ]
    header = ("update", "with blocks", "with the full matrix", "first", "last")
    residuals = np.stack([point.residuals for point in points]).max(0)
    print(f"\nCosines, means over {len(points)} points:\n\n{report.aligned(header, rows)}\n")
    print(
        f"Conjugate gradient left at most {residuals[0]:.2g} of the gradient with blocks, "
        f"{residuals[1]:.2g} with the full matrix."
    )
    claims = [
        Claim(
            "throughout the optimisation KFRA's update is better aligned with the block-diagonal "
            "Gauss-Newton update than K-FAC's (F.2).",
            _better(by_layer["KFRA"], by_layer["K-FAC"], "layers and points"),
        ),
        Claim(
            "so it is with the full Gauss-Newton update (F.2).",
            _better(full["KFRA"], full["K-FAC"], "points"),
        ),
    ]
    candidates.print_claims(claims)
    content = {
        "settings": dict(described),
        "machine": report.machine(),
        "updates": list(found),
        "damping": [float(point.damping) for point in points],
        "residuals": [point.residuals.tolist() for point in points],
        "by_layer": {name: values.tolist() for name, values in by_layer.items()},
        "full": {name: values.tolist() for name, values in full.items()},
        "claims": [claim._asdict() for claim in claims],
    }
    write_json(directory / "results.json", content)
    x = np.array(list(found), float)
    panels = [
        plots.Panel(
            "cosine with the blocks' updates, mean over layers",
            {name: (x, values.mean(1)) for name, values in by_layer.items()},
        ),
        plots.Panel(
            "cosine with the full matrix's update",
            {name: (x, values) for name, values in full.items()},
        ),
    ]
    title = f"{experiment.title}; {described['dataset']}"
    plots.plot_panels(panels, "updates", title, directory / "updates.png")
    plots.plot_heat(
        {name: values.mean(0) for name, values in by_layer.items()},
        [name.rsplit("/")[-1] for name in described["layers"]],
        "Cosine with the update of each layer's block, mean over the trajectory",
        directory / "layers.png",
    )
    print(f"\nWrote the numbers and plots to {directory}.", flush=True)


def _better(one: np.ndarray, other: np.ndarray, of: str) -> str:
    share = np.mean(one > other)
    return (
        f"KFRA's cosine is {one.mean():.3f} on average, K-FAC's {other.mean():.3f}; it is the "
        f"larger one at {100 * share:.0f}% of {of}."
    )
