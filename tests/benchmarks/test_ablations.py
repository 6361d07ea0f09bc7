"""The ablations, Table 1 and the paths' benchmark, at toy sizes: their shape, and no times."""

import gzip
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.costs import paths
from benchmarks.experiments import ablations, table1
from benchmarks.experiments.ablations import ABLATIONS, Variant, search_learning_rate
from benchmarks.shared import autoencoder, classifier
from benchmarks.shared.comparison import Job
from benchmarks.shared.data import DataError, load_dataset, subset
from benchmarks.shared.methods import ALL_METHODS, METHODS, MORE_METHODS
from benchmarks.shared.training import Problem, Run, Settings, train
from locoprop_jax._local_losses.coordinates import path_flops

# Optax's Adam raises a float to an integer power.
pytestmark = pytest.mark.standard_promotion

TOY = "--train-images 40 --batch-size 20 --epochs 1 --shrink 100 --dataset mnist"
# Compiling takes the time, so the networks are shallow here.
SHALLOW = {"standard": ((), 400), "wide": ((), 800), "deep": ((500,), 400)}


def write_idx(path: Path, values: np.ndarray) -> None:
    magic = 0x0800 + values.ndim
    header = struct.pack(f">{1 + values.ndim}i", magic, *values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for split, count in (("train", 40), ("t10k", 20)):
        images = random.integers(0, 256, size=(count, 28, 28))
        write_idx(tmp_path / f"{split}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte.gz", np.arange(count) % 10)
    return tmp_path


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoencoder, "SIZES", SHALLOW)
    monkeypatch.setattr(classifier, "HIDDEN", (500,))


def run(names: str, data_dir: Path, more: str = "") -> int:
    where = f"--data-dir {data_dir} --output-dir {data_dir / 'out'}"
    return ablations.main(f"{names} {TOY} {where} {more}".split())


# The ablations


# One for each kind of variant; that all of them can be made and trained is tested further down.
@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize(
    "name",
    [
        "variants",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("classifier", "iterations", "transfer", "size")
        ),
    ],
)
def test_ablations_end_to_end(
    name: str,
    data_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its first and its last run: each takes seconds to compile."""
    ablation = ABLATIONS[name]
    variants = ablation.variants[0], ablation.variants[-1]
    monkeypatch.setitem(ABLATIONS, name, ablation._replace(variants=variants))
    assert run(name, data_dir) == 0
    printed = capsys.readouterr().out
    assert all(variant.title in printed for variant in variants)
    assert (data_dir / "out" / name / "loss.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((data_dir / "out" / name / "results.json").read_text())
    assert results["settings"]["experiment"] == f"ablations/{name}"
    assert list(results["runs"]) == [variant.name for variant in variants]
    for variant, result in zip(variants, results["runs"].values(), strict=True):
        assert result["stopped"] is None and result["trials"] == []
        assert [at["epoch"] for at in result["curve"]] == [0, 1]
        assert result["batch_size"] == variant.batch_size * 20 // 1000
    is_classifier = name == "classifier"
    assert ("test accuracy" in printed) == is_classifier
    if is_classifier:
        assert all(0 <= result["test_accuracy"] <= 1 for result in results["runs"].values())


def test_runs_have_names_and_looks_of_their_own() -> None:
    for ablation in ABLATIONS.values():
        count = len(ablation.variants)
        assert len({variant.name for variant in ablation.variants}) == count
        assert len({variant.title for variant in ablation.variants}) == count
        assert len(set(ablations.looks(ablation).values())) == count


def test_every_runs_values_are_its_methods() -> None:
    for ablation in ABLATIONS.values():
        for variant in ablation.variants:
            values = ablations.hyperparameters(ablation, variant, 1000)
            method = ALL_METHODS[variant.method]
            assert set(values) == {*method.space, *method.options}
            assert all(value > 0 for value in values.values())


def test_gamma_and_the_batch_size_scale_together() -> None:
    (variant,) = [
        variant
        for variant in ABLATIONS["batch"].variants
        if variant.method == "locoprop_m" and variant.batch_size == 100
    ]
    values = ablations.hyperparameters(ABLATIONS["batch"], variant, 100)
    usual = ablations.hyperparameters(ABLATIONS["batch"], Variant("locoprop_m"), 1000)
    assert values["gamma"] == pytest.approx(usual["gamma"] / 10)
    assert ablations.scaled_batch(variant, 500) == 50


@pytest.mark.parametrize(
    ("size", "hidden"),
    [
        ("standard", [1000, 500, 250, 30, 250, 500, 1000]),
        ("wide", [4000, 2000, 1000, 120, 1000, 2000, 4000]),
        ("deep", [1000, *[500] * 8, 250, 30, 250, *[500] * 8, 1000]),
    ],
)
def test_the_sizes_are_the_papers(size: str, hidden: Sequence[int]) -> None:
    network = autoencoder.make_network(size)
    assert [*network.encoder, network.code, *network.decoder] == hidden
    tenth = autoencoder.make_network(size, shrink=10)
    assert [*tenth.encoder, tenth.code, *tenth.decoder] == [width // 10 for width in hidden]


def test_the_classifier_is_the_reviews() -> None:
    image = jnp.ones((1, 784), jnp.float32)
    shapes = jax.eval_shape(classifier.Classifier().init, jax.random.key(0), image)
    kernels = sorted(leaf.shape for leaf in jax.tree.leaves(shapes) if leaf.ndim == 2)
    assert kernels == sorted([(784, 512), *[(512, 512)] * 4, (512, 10)])


def test_the_test_accuracy_is_the_share_of_hits(data_dir: Path) -> None:
    class AlwaysThree(classifier.Classifier):
        def apply(self, variables: Any, images: Any, **kwargs: Any) -> Any:
            return jnp.zeros((len(images), 10)).at[:, 3].set(1.0)

    dataset = load_dataset("mnist", data_dir, labels=True)
    assert classifier.test_accuracy(AlwaysThree(), {}, dataset) == pytest.approx(0.1)


# The search for a learning rate


def quadratic_job(rate: float, method: str = "sgd") -> Job:
    """Half the squared distance to one: SGD diverges above rate 2, and is best near 1."""
    examples = np.ones((4, 1), np.float32)
    problem = Problem(
        "quadratic",
        lambda key: {"w": jnp.zeros((), jnp.float32)},
        lambda params, batch: 0.5 * jnp.square(params["w"] * batch - 1).mean(),
        examples,
        examples,
    )
    settings = Settings(epochs=2, batch_size=1, seed=0)
    return Job("name", ALL_METHODS[method], {"learning_rate": rate}, problem, settings)


def test_one_trial_is_no_search() -> None:
    job = quadratic_job(0.01)
    assert search_learning_rate(job, 1) == (job, [])


def test_the_search_takes_the_best_of_rates_around_the_runs_own() -> None:
    job, tried = search_learning_rate(quadratic_job(0.1), 3)
    rates: Any = [trial["learning_rate"] for trial in tried]
    losses: Any = [trial["train_loss"] for trial in tried]
    np.testing.assert_allclose(rates, [0.1 / 10**0.5, 0.1, 0.1 * 10**0.5])
    assert losses == sorted(losses, reverse=True)
    assert job.hyperparameters["learning_rate"] == rates[-1]
    assert job.settings.epochs == 2 and job.problem.test is not None


def test_the_search_passes_over_what_diverges() -> None:
    job, tried = search_learning_rate(quadratic_job(1e20), 2)
    assert [trial["train_loss"] for trial in tried] == [None, None]
    assert job.hyperparameters == {"learning_rate": 1e20}


@pytest.mark.usefixtures("shallow")
def test_the_search_from_the_command_line(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = ABLATIONS["first_order"]._replace(variants=(Variant("sgd"), Variant("locoprop_m")))
    monkeypatch.setitem(ABLATIONS, "first_order", short)  # pyright: ignore[reportArgumentType]
    assert run("first_order", data_dir, "--trials 2") == 0
    results = json.loads((data_dir / "out" / "first_order" / "results.json").read_text())
    for result in results["runs"].values():
        assert len(result["trials"]) == 2
        rates = [trial["learning_rate"] for trial in result["trials"]]
        assert result["hyperparameters"]["learning_rate"] in rates


# What can go wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("depth", f"no ablation 'depth'; there are {', '.join(ABLATIONS)}"),
        ("--shrink 0", "argument --shrink: must be a positive whole number"),
        ("--trials none", "argument --trials: must be a positive whole number"),
        ("--batch-size 30 --train-images 20", "30 is more than --train-images 20"),
        ("classifier --train-images 1000", "1000 leaves no complete batch of 1028"),
        ("classifier --dataset curves", "CURVES has no labels"),
        ("--dataset curves", "Those that need no labels: variants iterations"),
        ("size --data-dir /nonexistent", "is no directory"),
    ],
)
def test_mistakes_are_explained(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        ablations.main([*arguments.split(), "--output-dir", str(tmp_path)])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_tuned_values_are_explained(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data_dir / "tuned.json").write_text("{}")
    with pytest.raises(SystemExit):
        run("first_order", data_dir, f"--hyperparameters {data_dir / 'tuned.json'}")
    assert "no hyperparameters for adam" in capsys.readouterr().err
    assert not (data_dir / "out").exists()  # not after the runs before that one


@pytest.mark.usefixtures("shallow")
def test_ctrl_c_keeps_what_is_there_and_ends_everything(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Run:
        raise KeyboardInterrupt

    broken = MORE_METHODS["momentum"]._replace(build=interrupted)
    monkeypatch.setitem(ALL_METHODS, "momentum", broken)  # pyright: ignore[reportArgumentType]
    assert run("first_order iterations", data_dir) == 130
    assert "1 of 6 runs of first_order have results" in capsys.readouterr().err
    results = json.loads((data_dir / "out" / "first_order" / "results.json").read_text())
    assert list(results["runs"]) == ["sgd"]
    assert not (data_dir / "out" / "iterations").exists()


# Labels


def test_labels_are_loaded_on_request_and_cut_with_their_images(data_dir: Path) -> None:
    assert load_dataset("mnist", data_dir).train_labels is None
    dataset = subset(load_dataset("mnist", data_dir, labels=True), 12)
    np.testing.assert_array_equal(dataset.train_labels, np.arange(12) % 10)
    assert dataset.train_labels.dtype == np.int32 and len(dataset.test_labels) == 12


def test_missing_labels_are_explained(data_dir: Path) -> None:
    (data_dir / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="holds no training labels of mnist") as raised:
        load_dataset("mnist", data_dir, labels=True)
    assert "train-labels-idx1-ubyte" in str(raised.value) and "curves" not in str(raised.value)
    load_dataset("mnist", data_dir)


def test_labels_that_do_not_belong_to_the_images_are_refused(data_dir: Path) -> None:
    write_idx(data_dir / "train-labels-idx1-ubyte.gz", np.arange(39))
    with pytest.raises(DataError, match="holds 39 labels for 40 images"):
        load_dataset("mnist", data_dir, labels=True)
    write_idx(data_dir / "train-labels-idx1-ubyte.gz", np.zeros((40, 28, 28)))
    with pytest.raises(DataError, match=r"expected 2049 .* got 2051 \(.* of images\)"):
        load_dataset("mnist", data_dir, labels=True)


def test_only_methods_that_need_it_capture_after_the_transfer_functions() -> None:
    transferred = {name for name, method in ALL_METHODS.items() if method.transferred}
    assert transferred == {"pocoprop_m", "pocoprop_s"}
    assert set(METHODS).isdisjoint(MORE_METHODS)


def test_pocoprop_trains_on_the_arrays_after_the_transfer_functions(data_dir: Path) -> None:
    network = autoencoder.Autoencoder(encoder=(6,), code=3, decoder=(6,))
    problem = autoencoder.make_problem(load_dataset("mnist", data_dir), network)
    values = {**ablations.CAREFUL, "learning_rate": 1e-2, "gamma": 10.0, "iterations": 2}
    pocoprop, locoprop = (
        train(problem, name, ALL_METHODS[name], values, Settings(2, 20, 0))
        for name in ("pocoprop_m", "locoprop_m")
    )
    losses = [record.train_loss for record in pocoprop.curve]
    assert pocoprop.stopped is None and losses[-1] < losses[0]
    assert losses[-1] != locoprop.curve[-1].train_loss


# Table 1 and the paths


@pytest.mark.usefixtures("shallow")
def test_table1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "table1.json"
    rows, d_in, d_out, iterations = 64, 32, 16, 5
    arguments = (
        f"--d-in {d_in} --d-out {d_out} --batch-size {rows} --iterations {iterations} "
        f"--shrink 50 --autoencoder-iterations 2 9 --output {path}"
    )
    table1.main(arguments.split())
    printed = capsys.readouterr().out
    results = json.loads(path.read_text())
    layer, steps = results["layer"], results["autoencoder"]
    labels = ["Adam", "LocoProp-S", "LocoProp-M"]
    assert list(layer) == ["gradient (SGD)", *labels]
    assert all(label in printed for label in labels)
    two_moments = 2 * 4 * d_in * d_out
    for label in labels:
        assert two_moments <= layer[label]["state_bytes"] <= two_moments + 64
    # The counted loops are those of the shapes, and the rest is small beside them.
    for label in labels[1:]:
        costs = path_flops(rows, d_in, d_out, iterations, linear=label == "LocoProp-S")
        formula = costs[layer[label]["path"]]
        assert layer[label]["formula_flops"] == formula
        per_weight = layer[label]["flops"] - formula
        assert 0 < per_weight < 40 * iterations * (d_in * d_out + rows * d_out)
    for method in ("LocoProp-S", "LocoProp-M"):
        few, many = (steps[f"{method}, T = {t}"]["temporary_bytes"] for t in (2, 9))
        assert many <= 1.2 * few


@pytest.mark.usefixtures("shallow")
def test_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "paths.json"
    arguments = (
        "--batch-sizes 4 40 --widths 16 --iterations 3 --rounds 2 --limit 1 --shrink 50 "
        f"--autoencoder-batch 4 --output {path}"
    )
    assert paths.main(arguments.split()) == 0
    printed = capsys.readouterr().out
    assert "skipped" in printed and "auto/best" in printed and "tx.update" in printed
    results = json.loads(path.read_text())
    cells = results["cells"]
    assert [(cell["loss"], cell["rows"]) for cell in cells] == [
        (loss, rows) for loss in ("squared", "tanh") for rows in (4, 40)
    ]
    for cell in cells:
        assert set(cell["seconds"]) == set(paths.USABLE[cell["loss"]])
        assert cell["auto"] in cell["seconds"] and cell["auto_to_best"] >= 1
    assert set(results["autoencoder"]["update_seconds"]) == {"squared", "matching"}
    assert all(min(layer["d_in"], layer["d_out"]) > 4 for layer in results["autoencoder"]["layers"])


@pytest.mark.parametrize("loss", paths.USABLE)
def test_all_paths_lead_to_the_same_displacement(loss: str) -> None:
    cell = paths.Cell(loss, 12, 7, 5)
    arrays = paths.make_arrays(cell)
    direct, *others = (paths.solve(cell, 4, path, arrays) for path in paths.USABLE[loss])
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), direct, other)


def test_paths_too_long_for_the_limit_are_skipped_and_the_cheapest_stays() -> None:
    cell = paths.Cell("squared", 1000, 10, 10)
    flops = path_flops(1000, 10, 10, 10, linear=True)
    cheapest = min(flops, key=lambda path: flops[path])
    limit = paths.LEAST_CALLS * flops[cheapest] / 1e9
    assert paths.affordable(cell, 10, speed=1e9, limit=limit) == [cheapest]
    measured = paths.measure_cell(cell, 10, speed=1.0, rounds=1, limit=1.0)
    assert measured["seconds"] == {} and measured["auto_to_best"] is None
    assert "skipped" in paths.cells_table([measured])
