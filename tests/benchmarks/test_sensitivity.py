"""The grids of the two numbers that matter most for each method."""

import inspect
import json
import math

import numpy as np
import pytest

import locoprop_jax as lp
from benchmarks.experiments import sensitivity
from benchmarks.experiments.sensitivity import Setup, Surface, mistakes, summary
from benchmarks.shared import autoencoder, paper
from benchmarks.shared.data import Dataset
from benchmarks.shared.methods import METHODS
from benchmarks.shared.training import Settings, train

IMAGES = np.random.default_rng(0).uniform(0, 0.2, (40, 784)).astype(np.float32)
DATASET = Dataset("random", "generated", IMAGES, IMAGES)
SETTINGS = Settings(epochs=1, batch_size=10, seed=0)

pytestmark = pytest.mark.standard_promotion


@pytest.fixture
def problem():
    network = autoencoder.make_network(shrink=100)
    return autoencoder.make_problem(DATASET, network)._replace(test=None)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The command line on few images: its status, what is in results.json and is a picture there.

    A learning rate of 1e30 stands beside two that are harmless.
    """
    rates = {"learning_rate": 1e-3, "eps": 1e-8}
    fixed = sensitivity.SETUPS["adam"].fixed
    monkeypatch.setitem(sensitivity.SETUPS, "adam", Setup(rates, fixed))
    row = np.array([1 / 3, 1, 1e33])
    monkeypatch.setattr(sensitivity, "rates", lambda middle, side: (row * middle).tolist())
    monkeypatch.setattr(sensitivity.cli, "load_images", lambda args, labels: DATASET)

    def main(*arguments):
        sizes = "--train-images 40 --batch-size 10 --epochs 1 --shrink 100 --side 3"
        status = sensitivity.main([*arguments, *sizes.split(), "--output-dir", str(tmp_path)])
        assert (tmp_path / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
        return status, json.loads((tmp_path / "results.json").read_text())["grids"]

    return main


@pytest.mark.parametrize(
    "name",
    [
        name if name == "adam" else pytest.param(name, marks=pytest.mark.slow)
        for name in sensitivity.SETUPS
    ],
)
def test_a_cell_is_what_training_with_its_numbers_makes(problem, name):
    """One step is compiled for all cells, with the numbers as its arguments."""
    surface, interrupted = sensitivity.explore(problem, name, 2, SETTINGS)
    assert not interrupted and np.isfinite(surface.losses).all()
    numbers = {number: row[0] for number, row in surface.values.items()}
    hyperparameters = {**sensitivity.SETUPS[name].fixed, **numbers}
    alone = train(problem, name, METHODS[name], hyperparameters, SETTINGS)
    np.testing.assert_allclose(surface.losses[0, 0], alone.curve[-1].train_loss, rtol=1e-4)
    assert len(np.unique(surface.losses)) > 1


@pytest.mark.parametrize("name", [name for name in sensitivity.SETUPS if name != "adam"])
def test_the_defaults_are_those_of_the_methods_as_the_papers_have_them(name):
    parameters = inspect.signature(getattr(paper, name, None) or getattr(lp, name)).parameters
    for number, default in sensitivity.SETUPS[name].defaults.items():
        if (name[:-1], number) != ("locoprop_", "learning_rate"):  # for which there is none
            assert parameters[number].default == default


def test_the_command_line_writes_and_prints_what_diverged(run, capsys):
    status, grids = run("adam")
    assert status == 0 and list(grids) == ["adam"]
    cells = grids["adam"]["cells"]
    np.testing.assert_allclose([at["learning_rate"] for at in cells[::3]], [1e-3 / 3, 1e-3, 1e30])
    assert [cell["train_loss"] is None for cell in cells] == 6 * [False] + 3 * [True]
    printed = capsys.readouterr().out
    assert "3 of 9" in printed and "6 of 9" in printed


def test_ctrl_c_writes_the_cells_that_were_finished(run, capsys, monkeypatch):
    run_epoch, epochs = sensitivity.run_epoch, []

    def interrupted(*arguments):
        epochs.append(arguments)
        if len(epochs) == 3:
            raise KeyboardInterrupt
        return run_epoch(*arguments)

    monkeypatch.setattr(sensitivity, "run_epoch", interrupted)
    status, grids = run("adam", "foof")
    assert status == 130 and len(grids["adam"]["cells"]) == 2
    assert "0 of 2 methods are complete" in capsys.readouterr().err


def test_the_tables_say_what_is_near_the_best_and_what_a_factor_of_ten_costs():
    rates = [1.0, 10**0.5, 10.0, 10**1.5, 100.0]
    losses = np.full((5, 5), 200.0)
    losses[2, 2], losses[0, 2], losses[2, 4] = 105.0, math.inf, 110.0
    losses[1, 1] = 100.0
    adam = Surface("adam", {"learning_rate": rates, "eps": rates}, losses)
    foof = Surface("foof", {"learning_rate": rates, "damping": rates}, losses - 10)
    first, second = summary([adam, foof]).splitlines()[2:]
    assert "learning_rate 3.16, eps 3.16" in first
    assert first.split()[-9:] == "3 of 25 1 of 25 0 of 25".split()
    assert second.split()[-9:] == "2 of 25 1 of 25 2 of 25".split()
    table = mistakes([adam]).splitlines()[2:]
    assert [line.split()[-3:] for line in table] == [
        ["diverged", "105.00", "200.00"],
        ["200.00", "105.00", "110.00"],
    ]
    small = Surface("adam", {"learning_rate": [1.0], "eps": [1.0]}, np.full((1, 1), math.inf))
    assert summary([small]).splitlines()[-1].split()[:4] == ["Adam", "diverged", "-", "diverged"]
    assert mistakes([small]).splitlines()[-1].split()[-3:] == ["-", "diverged", "-"]


def test_an_unknown_method_is_refused(capsys):
    with pytest.raises(SystemExit):
        sensitivity.main(["fooof"])
    assert "no method 'fooof'; there are foof" in capsys.readouterr().err
