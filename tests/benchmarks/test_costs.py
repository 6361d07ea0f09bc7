"""The table of costs, on a network that compiles at once."""

import json

import numpy as np
import pytest

from benchmarks.costs import costs
from benchmarks.shared.classifier import Classifier

pytestmark = pytest.mark.standard_promotion


def test_each_method_stands_beside_adam(monkeypatch, tmp_path, capsys):
    def tiny():
        rng = np.random.default_rng(0)
        return costs.of_model(
            Classifier((4,)), rng.uniform(size=(8, 6)).astype(np.float32), rng.integers(0, 10, 8)
        )

    monkeypatch.setattr(costs, "TASKS", {"tiny": ("a tiny network", tiny)})
    output = tmp_path / "costs.json"
    assert costs.main(["tiny", "--rounds", "1", "--steps", "2", "--output", str(output)]) == 0
    found = json.loads(output.read_text())["networks"]["tiny"]
    assert set(found["ratios"]) == set(costs.METHODS) - {"Adam"}
    for ratios in found["ratios"].values():
        assert all(own["min"] == own["max"] > 0 for own in ratios.values())
    # Adam has two moments of each parameter, and a few counters.
    assert 2 <= found["state_by_parameters"]["Adam"] < 2.2
    printed = capsys.readouterr().out
    assert all(name in printed for name in found["ratios"])
