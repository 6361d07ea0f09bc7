"""The benchmarks' data, runner, search and command lines, on problems of a second or less."""

import csv
import functools
import gzip
import json
import signal
import struct
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.experiments import autoencoder as experiment
from benchmarks.experiments import tune
from benchmarks.shared import autoencoder, data
from benchmarks.shared.comparison import compare
from benchmarks.shared.curves import generate_curves
from benchmarks.shared.data import DataError, load_dataset, subset
from benchmarks.shared.idx import read_idx_images
from benchmarks.shared.methods import FIRST_ORDER_SPACE, METHODS, Method
from benchmarks.shared.report import table
from benchmarks.shared.steps import interrupt_deferred, warmup_linear_decay
from benchmarks.shared.training import (
    INTERRUPTED,
    EpochRecord,
    Problem,
    Run,
    Settings,
    epoch_batches,
    train,
)
from benchmarks.shared.trials import COMPLETE, PRUNED, Trial, TrialsError, append_trial, read_trials
from benchmarks.shared.tuned import TunedError, in_search_space, load_hyperparameters, save_tuned

RMSPROP = {"learning_rate": 1e-2, "one_minus_beta1": 0.1, "one_minus_beta2": 0.1, "eps": 1e-6}
LOCOPROP = {**RMSPROP, "gamma": 10.0, "iterations": 2}
HYPERPARAMETERS: Mapping[str, Mapping[str, float]] = {
    "locoprop_m": LOCOPROP,
    "locoprop_s": LOCOPROP,
    "foof": {"learning_rate": 1.0, "damping": 0.1},
    "kfac": {"learning_rate": 1.0, "damping": 1.0},
    "lnb": {"learning_rate": 1.0, "ridge": 0.1},
    "rmsprop": RMSPROP,
    "adam": RMSPROP,
}
SETTINGS = Settings(epochs=2, batch_size=10, seed=0)


# Optax's Adam raises a float to an integer power.
pytestmark = pytest.mark.standard_promotion


# Data


def idx_bytes(images: np.ndarray, magic: int = 0x0803) -> bytes:
    return struct.pack(">iiii", magic, *images.shape) + images.tobytes()


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, size=(40, 28, 28), dtype=np.uint8)


@pytest.fixture
def data_dir(tmp_path: Path, pixels: np.ndarray) -> Path:
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(pixels)))
    (tmp_path / "t10k-images.idx3-ubyte").write_bytes(idx_bytes(pixels[:20]))
    return tmp_path


@pytest.fixture
def nothing_local(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No data on this machine and no network."""

    def offline(*args: Any, **kwargs: Any) -> str:
        raise ConnectionError("Name or service not known")

    monkeypatch.delenv(data.DATA_VARIABLE, raising=False)
    monkeypatch.setattr(data, "DEBIAN_FASHION_MNIST", tmp_path / "absent")
    monkeypatch.setattr(data.pooch, "retrieve", offline)
    monkeypatch.setattr(
        data, "generate_curves", functools.partial(generate_curves, train_images=5, test_images=4)
    )


def test_idx_images_are_read_plain_and_gzip(data_dir: Path, pixels: np.ndarray) -> None:
    dataset = load_dataset("mnist", data_dir)
    assert dataset.train.dtype == np.float32 and dataset.train.shape == (40, 784)
    np.testing.assert_array_equal(dataset.train * 255, pixels.reshape(40, 784))
    np.testing.assert_array_equal(dataset.test, dataset.train[:20])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:7], r"is truncated: its header needs 16 bytes and the file holds 7"),
        (lambda raw: raw[:-5], r"is truncated: its header says 40 images of 28x28"),
        (lambda raw: raw + b"\0", r"has sizes that do not match: .* 31360 bytes, and 31361"),
        (lambda raw: gzip.compress(raw)[:-20], r"is truncated: its gzip stream ends early"),
        (lambda raw: gzip.compress(raw)[:-8] + bytes(8), r"is corrupt gzip: .*Fetch it again"),
        (lambda raw: gzip.compress(raw)[:10] + b"\xff" * 99, r"is corrupt gzip: .*Fetch it again"),
        (lambda raw: b"\0\0\x08\x01" + raw[4:], r"expected 2051 .* got 2049 \(.* of labels\)"),
        (lambda raw: b"<htm" + raw[4:], r"wrong magic number: expected 2051 .* got \d+\.$"),
        (lambda raw: raw[:4] + bytes(4) + raw[8:16], r"holds no images: .* 0 of 28x28"),
    ],
)
def test_damaged_idx_files_are_explained(
    tmp_path: Path, pixels: np.ndarray, damage: Any, message: str
) -> None:
    path = tmp_path / "images"
    path.write_bytes(damage(idx_bytes(pixels)))
    with pytest.raises(DataError, match=message) as raised:
        read_idx_images(path)
    assert str(path) in str(raised.value)


def test_images_of_another_size_are_refused(data_dir: Path) -> None:
    (data_dir / "t10k-images.idx3-ubyte").write_bytes(idx_bytes(np.ones((3, 5, 5), np.uint8)))
    with pytest.raises(DataError, match="images of 25 pixels; the network needs 784"):
        load_dataset("mnist", data_dir)


def test_a_directory_without_images_is_an_error_that_says_what_was_looked_for(
    data_dir: Path,
) -> None:
    with pytest.raises(DataError, match="is no directory") as raised:
        load_dataset("auto", data_dir / "absent")
    message = str(raised.value)
    assert "train-images-idx3-ubyte or train-images.idx3-ubyte" in message
    assert "--dataset curves" in message and "--data-dir" in message
    (data_dir / "t10k-images.idx3-ubyte").unlink()
    with pytest.raises(DataError, match=r"holds no test images of mnist.*for t10k-images"):
        load_dataset("mnist", data_dir)


def test_the_environment_variable_names_the_directory(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(data.DATA_VARIABLE, str(data_dir))
    assert load_dataset("fashion-mnist").source == str(data_dir)
    monkeypatch.setenv(data.DATA_VARIABLE, str(data_dir / "absent"))
    assert load_dataset("fashion-mnist", data_dir).source == str(data_dir)
    with pytest.raises(DataError, match=f"from the environment variable {data.DATA_VARIABLE}"):
        load_dataset("auto")


@pytest.mark.usefixtures("nothing_local")
def test_only_auto_falls_back_to_curves_and_says_so() -> None:
    notices: list[str] = []
    dataset = load_dataset("auto", seed=3, notify=notices.append)
    assert dataset.name == "curves" and len(dataset.train) == 5
    assert "CURVES, generated from seed 3, stands in for Fashion-MNIST" in "\n".join(notices)
    for name in ("fashion-mnist", "mnist"):
        with pytest.raises(DataError, match=f"{name} could not be downloaded .*ConnectionError"):
            load_dataset(name, notify=notices.append)


def test_more_images_than_there_are_is_an_error(data_dir: Path) -> None:
    dataset = load_dataset("mnist", data_dir)
    assert len(subset(dataset, 30).train) == 30
    with pytest.raises(DataError, match=r"41 training .* mnist has 40.*--train-images 40"):
        subset(dataset, 41)


def test_curves_are_deterministic_and_look_like_strokes() -> None:
    train_images, test_images = generate_curves(0, 300, 50)
    assert train_images.shape == (300, 784) and train_images.dtype == np.float32
    assert train_images.min() >= 0 and train_images.max() <= 1
    np.testing.assert_array_equal(train_images, generate_curves(0, 300, 50)[0])
    np.testing.assert_array_equal(test_images, generate_curves(0, 7, 50)[1])
    assert not np.array_equal(train_images, generate_curves(1, 300, 50)[0])
    ink = (train_images > 0.5).mean(1)  # a thin stroke: some of the image, not much of it
    assert ink.min() > 0 and 0.02 < ink.mean() < 0.15 and ink.max() < 0.3
    border = train_images.reshape(-1, 28, 28)[:, [0, -1]]
    assert border.max() < 0.2  # no stroke is cut off
    assert len(np.unique(train_images.round(3), axis=0)) == 300


# The runner


def tiny_problem(scale: float = 1.0) -> Problem:
    """Reconstruct four features through two tanh units."""
    random = np.random.default_rng(0)
    examples = (random.normal(size=(40, 2)) @ random.normal(size=(2, 4))).astype(np.float32)

    def init(key: jax.Array) -> dict[str, jax.Array]:
        first, second = jax.random.split(key)
        return {
            "encoder": jax.random.normal(first, (4, 2), jnp.float32),
            "decoder": jax.random.normal(second, (2, 4), jnp.float32),
        }

    def loss_fn(params: dict[str, jax.Array], batch: jax.Array) -> jax.Array:
        output = jnp.tanh(batch @ params["encoder"]) @ params["decoder"]
        return scale * jnp.square(output - batch).sum(-1).mean()

    return Problem("tiny", init, loss_fn, examples, examples[:20])


def diverging(layers: None, learning_rate: Any, **rest: float) -> Any:
    del layers, learning_rate, rest
    return optax.with_extra_args_support(optax.scale(-1e30))


@pytest.fixture(scope="module")
def all_runs() -> Mapping[str, Run]:
    with jax.numpy_dtype_promotion("standard"):
        settings = SETTINGS._replace(epochs=8)
        runs, interrupted = compare(tiny_problem(), HYPERPARAMETERS, settings)
    assert not interrupted
    return {run.method: run for run in runs}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains(all_runs: Mapping[str, Run], name: str) -> None:
    run = all_runs[name]
    assert run.stopped is None
    assert run.curve[-1].train_loss < 0.8 * run.curve[0].train_loss
    assert [record.step for record in run.curve] == [4 * epoch for epoch in range(9)]
    assert len(run.step_losses) == 32
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(run.params))


def test_methods_share_their_start_and_their_batches(all_runs: Mapping[str, Run]) -> None:
    assert list(all_runs) == list(HYPERPARAMETERS)
    assert len({run.curve[0] for run in all_runs.values()}) == 1
    first_losses = [run.step_losses[0] for run in all_runs.values()]
    np.testing.assert_allclose(first_losses, first_losses[0], rtol=1e-6)


def test_epochs_are_permutations_without_the_incomplete_batch() -> None:
    batches = list(epoch_batches(25, 10, epoch=1, seed=0))
    assert [len(batch) for batch in batches] == [10, 10]
    assert len(set(np.concatenate(batches).tolist())) == 20
    again = list(epoch_batches(25, 10, epoch=1, seed=0))
    np.testing.assert_array_equal(batches, again)
    assert not np.array_equal(batches, list(epoch_batches(25, 10, epoch=2, seed=0)))


def test_the_schedule_warms_up_and_decays_to_zero() -> None:
    schedule = warmup_linear_decay(2.0, 100)
    rates = np.array([schedule(count) for count in range(101)])
    np.testing.assert_allclose(rates[:5], [0.4, 0.8, 1.2, 1.6, 2.0], rtol=1e-6)
    np.testing.assert_allclose(np.diff(rates[4:]), -2 / 96, rtol=1e-3)
    assert rates[99] > 0 and rates[100] == 0
    assert warmup_linear_decay(2.0, 1)(0) == 2.0


def test_a_diverging_method_is_stopped_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method = Method("Diverging", diverging, FIRST_ORDER_SPACE, needs_capture=False)
    monkeypatch.setitem(METHODS, "diverging", method)  # pyright: ignore[reportArgumentType]
    runs, interrupted = compare(tiny_problem(), {"diverging": RMSPROP, "adam": RMSPROP}, SETTINGS)
    assert not interrupted and [run.stopped is None for run in runs] == [False, True]
    assert "non-finite loss after step" in str(runs[0].stopped)
    assert len(runs[0].curve) == 1 and len(runs[1].curve) == 3
    assert "non-finite loss" in table(runs)


def test_an_interrupted_run_keeps_the_epochs_it_finished() -> None:
    def interrupt(record: EpochRecord) -> None:
        if record.epoch == 1:
            raise KeyboardInterrupt

    run = train(tiny_problem(), "adam", METHODS["adam"], RMSPROP, SETTINGS, on_epoch=interrupt)
    assert run.stopped == INTERRUPTED and [record.epoch for record in run.curve] == [0, 1]


def test_ctrl_c_ends_the_comparison_with_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(runs: Sequence[Run]) -> None:
        raise KeyboardInterrupt

    both = {"adam": RMSPROP, "rmsprop": RMSPROP}
    runs, interrupted = compare(tiny_problem(), both, SETTINGS, on_run=stop)
    assert interrupted and [run.method for run in runs] == ["adam"]


def test_ctrl_c_waits_for_the_compilation() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
    done = False
    try:
        with pytest.raises(KeyboardInterrupt), interrupt_deferred():
            signal.raise_signal(signal.SIGINT)
            done = True
        assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


# Tuned values and the search


@pytest.mark.parametrize("name", METHODS)
def test_the_committed_values_are_in_the_search_space(name: str) -> None:
    assert in_search_space(name, load_hyperparameters(autoencoder.NAME, name))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[1]", "is not a JSON object"),
        ("{}", "no hyperparameters for adam on tiny.*--methods adam"),
        ('{"tiny": {"adam": {"hyperparameters": {"lr": 1}}}}', "hyperparameters lr; it takes lea"),
        (json.dumps({"tiny": {"adam": {"hyperparameters": {**RMSPROP, "eps": -1}}}}), "eps = -1"),
    ],
)
def test_unusable_tuned_values_are_explained(
    tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "tuned.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(TunedError, match=message):
        load_hyperparameters("tiny", "adam", path)


def test_saving_one_methods_values_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    for name in ("adam", "rmsprop"):
        save_tuned("tiny", name, {"hyperparameters": RMSPROP}, path)
    assert load_hyperparameters("tiny", "adam", path) == RMSPROP
    assert load_hyperparameters("tiny", "rmsprop", path) == RMSPROP


def test_trials_survive_a_torn_row_and_are_told_apart_by_their_settings(tmp_path: Path) -> None:
    path = tmp_path / "results" / "tuning_adam.csv"
    first = Trial(RMSPROP, [3.0, 2.5], COMPLETE, 1.0)
    second = Trial(RMSPROP, [4.0], PRUNED, 0.5)
    append_trial(path, first, {"epochs": 2})
    with path.open("a") as file:
        file.write("complete,1.0,0.0")  # killed while writing
    append_trial(path, second, {"epochs": 2})
    append_trial(path, first, {"epochs": 3})
    assert read_trials(path, RMSPROP, {"epochs": 2}) == [first, second]
    with pytest.raises(TrialsError, match=r"of another search.*--results-dir"):
        read_trials(path, RMSPROP, {"dataset": "mnist"})


def test_the_search_begins_at_the_tuned_values_and_resumes(tmp_path: Path) -> None:
    path = tmp_path / "tuning_adam.csv"
    described = {"dataset": "tiny", **SETTINGS._asdict()}

    def search(trials: int) -> list[Trial]:
        tune.tune(tiny_problem(), "adam", trials, {}, SETTINGS, described, path, [RMSPROP])
        return read_trials(path, RMSPROP, described)

    begun = search(1)
    assert [trial.hyperparameters for trial in begun] == [RMSPROP]
    resumed = search(3)
    assert resumed[:1] == begun and len(resumed) == 3
    assert len({trial.hyperparameters["eps"] for trial in resumed}) == 3
    assert search(3) == resumed
    tune.save_best("tiny", "adam", described, path, tmp_path / "tuned.json")
    best = min(resumed, key=lambda trial: trial.loss)
    assert load_hyperparameters("tiny", "adam", tmp_path / "tuned.json") == best.hyperparameters


def test_a_hopeless_trial_is_pruned() -> None:
    settings = Settings(epochs=4, batch_size=10, seed=0)
    good = [Trial(RMSPROP, [0.0] * 4, COMPLETE, 1.0)] * tune.STARTUP_TRIALS
    study = tune.make_study(FIRST_ORDER_SPACE, good, [], seed=0)
    trial = tune.run_trial(study, tiny_problem(), "adam", {}, settings, "Adam")
    assert trial.state == PRUNED and len(trial.losses) == tune.PRUNED_FROM_EPOCH


# The command lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--epochs 0", "argument --epochs: must be a positive whole number, got '0'"),
        ("--batch-size -5", "argument --batch-size: must be a positive whole number, got '-5'"),
        ("--train-images many", "argument --train-images: must be a positive whole number"),
        ("--iterations 1.5", "argument --iterations: must be a positive whole number"),
        ("--seed -1", "argument --seed: must be a whole number from 0"),
        ("--methods sgd", "invalid choice: 'sgd' (choose from "),
        ("--dataset cifar", "invalid choice: 'cifar'"),
        ("--frobnicate", "unrecognized arguments: --frobnicate"),
        ("--train-images 10 --batch-size 20", "20 is more than --train-images 10"),
        ("--dataset curves --data-dir .", "generated and reads no files"),
        ("--data-dir /nonexistent", "is no directory"),
    ],
)
@pytest.mark.parametrize("main", [experiment.main, tune.main])
def test_command_line_mistakes_are_explained(
    main: Any,
    arguments: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        main(arguments.split())
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_the_autoencoder_is_the_papers() -> None:
    shapes = jax.eval_shape(
        autoencoder.Autoencoder().init, jax.random.key(0), jnp.ones((1, 784), jnp.float32)
    )
    kernels = sorted(leaf.shape for leaf in jax.tree.leaves(shapes) if leaf.ndim == 2)
    widths = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    assert kernels == sorted(pairwise(widths))


def test_the_comparison_end_to_end(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = functools.partial(autoencoder.Autoencoder, encoder=(), code=4, decoder=())
    monkeypatch.setattr(autoencoder, "Autoencoder", small)
    output = data_dir / "out"
    names = ["locoprop_m", "adam"]
    arguments = (
        "--train-images 40 --batch-size 10 --epochs 2 --iterations 2 --dataset mnist "
        f"--methods {' '.join(names)} --data-dir {data_dir} --output-dir {output}"
    )
    code = experiment.main(arguments.split())
    printed = capsys.readouterr().out
    assert code == 0 and "compile s" in printed
    assert all(METHODS[name].label in printed for name in names)
    assert f"{METHODS['locoprop_m'].label}: local_loss/count 8, local_loss/refused 0" in printed
    assert f"{METHODS['adam'].label}: " not in printed
    results = json.loads((output / "results.json").read_text())
    assert list(results["runs"]) == names
    assert results["settings"]["dataset"] == "mnist"
    assert [at["epoch"] for at in results["runs"]["adam"]["curve"]] == [0, 1, 2]
    for picture in ("loss.png", "reconstructions.png"):
        assert (output / picture).read_bytes().startswith(b"\x89PNG")


def test_ctrl_c_writes_what_was_finished(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Run:
        raise KeyboardInterrupt

    small = functools.partial(autoencoder.Autoencoder, encoder=(), code=4, decoder=())
    monkeypatch.setattr(autoencoder, "Autoencoder", small)
    broken = METHODS["rmsprop"]._replace(build=interrupted)
    monkeypatch.setitem(METHODS, "rmsprop", broken)  # pyright: ignore[reportArgumentType]
    output = data_dir / "out"
    arguments = (
        "--train-images 40 --batch-size 10 --epochs 1 --methods adam rmsprop "
        f"--data-dir {data_dir} --output-dir {output}"
    )
    code = experiment.main(arguments.split())
    assert code == 130
    assert "1 of 2 methods have results" in capsys.readouterr().err
    assert list(json.loads((output / "results.json").read_text())["runs"]) == ["adam"]


def test_the_search_from_the_command_line(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = functools.partial(autoencoder.Autoencoder, encoder=(), code=4, decoder=())
    monkeypatch.setattr(autoencoder, "Autoencoder", small)
    tuned, output = data_dir / "tuned.json", data_dir / "out"
    arguments = (
        "--train-images 40 --batch-size 10 --epochs 1 --methods adam --trials 1 "
        f"--data-dir {data_dir} --results-dir {output} --tuned {tuned}"
    )
    assert tune.main(arguments.split()) == 0
    with (output / "tuning_adam.csv").open() as file:
        (row,) = csv.DictReader(file)
    best = load_hyperparameters(autoencoder.NAME, "adam", tuned)
    assert float(row["eps"]) == best["eps"]
