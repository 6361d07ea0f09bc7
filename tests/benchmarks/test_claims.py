"""The ledger of the papers' claims is what the stored runs say."""

import json

import pytest

from benchmarks.experiments import claims


def test_the_page_is_the_ledger():
    assert claims.ledger() == claims.PAGE.read_text(), "python -m benchmarks claims --write"


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Stored runs: last training losses by name."""

    def store(losses):
        curves = {
            name: {"curve": [{"step": 1, "seconds": 2.0, "train_loss": loss}]}
            for name, loss in losses.items()
        }
        (tmp_path / "some.json").write_text(json.dumps({"runs": curves}))
        monkeypatch.setattr(claims, "RESULTS", tmp_path)
        claims.stored.cache_clear()

    yield store
    claims.stored.cache_clear()


def test_a_claim_is_about_the_best_setting_of_a_method_and_not_about_its_variants(runs):
    runs({"K-FAC, damping 0.1, 3": 3.0, "K-FAC, 1": 2.0, "K-FAC, batch, 1": 1.0, "K-FAC, 2": None})
    assert claims.loss_of("some", "K-FAC") == 2


def test_a_claim_that_does_not_hold_is_said_not_to(runs):
    runs({"ours": 1.05, "other": 1.0, "third": 0.9})
    assert not claims.below("some", ["ours"], ["other"])().holds
    assert claims.below("some", ["ours"], ["other"], 1.1)().holds
    assert not claims.below("some", ["ours"], ["other", "third"], 1.1)().holds
    assert claims.falling("some", ["ours", "other", "third"])().holds
    assert not claims.falling("some", ["third", "ours"])().holds


def test_who_is_there_first(runs):
    runs({"ours": 1.0, "Adam, 0.1": 1.5})
    assert not claims.reached_sooner("some", "ours", "Adam")().holds  # at the same time
    runs({"ours": 2.0, "Adam, 0.1": 1.5})
    found = claims.reached_sooner("some", "ours", "Adam")()
    assert not found.holds
    assert "inf" in found.text
