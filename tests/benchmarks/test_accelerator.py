"""The run for accelerators, on networks that compile at once, one of which fails."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.costs import accelerator, costs
from benchmarks.shared.classifier import Classifier
from benchmarks.shared.contestants import Contestant
from benchmarks.shared.training import Settings

pytestmark = pytest.mark.standard_promotion


def tiny():
    rng = np.random.default_rng(0)
    images, labels = rng.uniform(size=(8, 6)).astype(np.float32), rng.integers(0, 10, 8)
    return costs.of_model(Classifier((6, 6)), images, labels)


def too_large():
    raise MemoryError("16 GiB are wanted\nand more")


@pytest.fixture
def small(monkeypatch):
    networks = {
        "fails": accelerator.Network("does not fit", too_large, too_large),
        "small": accelerator.Network("three layers", too_large, tiny),
    }
    race = accelerator.Race(8, Settings(epochs=1, batch_size=4, seed=0), shrink=500)
    monkeypatch.setattr(accelerator, "NETWORKS", networks)
    monkeypatch.setattr(accelerator, "TINY_RACE", race)
    monkeypatch.setattr(accelerator, "CAPTURING", ["FOOF"])
    monkeypatch.setattr(
        accelerator, "METHODS", {name: costs.METHODS[name] for name in ("Adam", "FOOF")}
    )

    def refuse(rate):
        raise ValueError("not with these numbers")

    racers = {"Adam": accelerator.RACERS["Adam"][:1], "none": (Contestant("None", refuse, 0.1),)}
    monkeypatch.setattr(accelerator, "RACERS", racers)


def test_each_cell_is_written_and_a_failure_is_one_of_them(small, tmp_path, capsys):
    output = tmp_path / "new" / "accelerator.json"
    arguments = ["--tiny", "--steps", "1", "--output", str(output)]
    assert accelerator.main(arguments) == 0
    found = json.loads(output.read_text())
    assert found["device"] and found["tiny"]
    layers = {
        name: [(c["method"], c["layers"]) for c in own["cells"]]
        for name, own in found["networks"].items()
    }
    assert layers["small"] == [("Adam", "-"), ("FOOF", "apart"), ("FOOF", "stacked")]
    assert layers["fails"] == layers["small"]
    assert {cell["error"] for cell in found["networks"]["fails"]["cells"]} == {
        "MemoryError: 16 GiB are wanted"
    }
    for cell in found["networks"]["small"]["cells"]:
        assert cell["step_seconds"] > 0
        assert cell["peak_bytes"] > cell["state_bytes"] > 0
    # Other programs, equal states.
    _, apart, stacked = found["networks"]["small"]["cells"]
    assert apart["state_bytes"] == stacked["state_bytes"]
    adam, none = found["race"]
    assert len(adam["curve"]) == 2
    assert none == {"method": "none", "error": "ValueError: not with these numbers"}
    printed = capsys.readouterr().out
    assert "16 GiB are wanted" in printed and "stacked" in printed


def test_no_cell_begins_after_the_time_is_up(small, monkeypatch, tmp_path):
    clock = SimpleNamespace(perf_counter=iter(range(0, 10**6, 300)).__next__)
    monkeypatch.setattr(accelerator, "time", clock)
    output = tmp_path / "accelerator.json"
    assert accelerator.main(["fails", "--tiny", "--output", str(output)]) == 0
    cells = json.loads(output.read_text())["networks"]["fails"]["cells"]
    assert {cell["error"] for cell in cells} == {"not run: 270 s had passed"}


def test_the_time_to_a_loss_is_that_of_the_first_record_at_or_below_it():
    curve = [[0, 0.0, 9.0], [4, 1.5, 4.0], [8, 3.0, 2.0]]
    assert accelerator.seconds_to(curve, 4.0) == 1.5
    assert accelerator.seconds_to(curve, 3.0) == 3.0
    assert accelerator.seconds_to(curve, 1.0) is None
