"""The comparison with kfac-jax: its protocol, with a stand-in for the peer where that is not there.

The environment variable LOCOPROP_KFAC_PYTHON names a Python that has the real one.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks.peers import kfac_peer
from benchmarks.peers import kfac_peer_sides as sides
from benchmarks.shared.autoencoder import make_network, make_problem
from benchmarks.shared.data import Dataset
from benchmarks.shared.methods import LogUniform
from benchmarks.shared.training import epoch_batches

REAL = os.environ.get("LOCOPROP_KFAC_PYTHON")
QUICK = ["--quick", "--dataset", "curves", "--train-images", "200", "--batch-size", "50"]
FIXED = {"adaptive": 0.0, "damping": 2.0, "learning_rate": 0.1, "momentum": 0.9}

# Takes no steps: its losses count them, its weights stay those of the problem.
STAND_IN = """
import json, shutil, sys
for line in sys.stdin:
    request = json.loads(line)
    do = request.pop("do")
    if do == "load":
        arrays, answer = request["arrays"], {"jax": "stand-in"}
    elif do == "start":
        taken, answer = 0, {"seconds": 0.5}
    elif do == "steps":
        losses = [float(taken + i) for i in range(request["count"])]
        taken += request["count"]
        answer = {"seconds": 0.25 * request["count"], "losses": losses}
    elif do == "save":
        shutil.copy(arrays, request["path"])
        answer = {}
    elif do == "fail":
        answer = {"error": "Traceback: no such layer"}
    elif do == "chat":
        print("hello", flush=True)
        continue
    else:
        sys.exit(3)
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def stand_in(tmp_path):
    path = tmp_path / "stand_in.py"
    path.write_text(STAND_IN)
    return [sys.executable, "-I", str(path)]


class Scripted:
    """A side whose first run is slow, as if it compiled, and whose loss is its learning rate."""

    def __init__(self, name="", log=None):
        self.name, self.log, self.starts = name, [] if log is None else log, 0

    def start(self, values):
        self.values, self.starts = values, self.starts + 1
        return 7.0 if self.starts == 1 else 1.0

    def steps(self, count):
        self.log.append((self.name, count))
        loss = self.values["learning_rate"]
        return count * (2.0 if self.starts == 1 else 1.0), [loss] * count

    def weights(self):
        return {"kernel0": np.asarray(self.values["learning_rate"])}


def loss_of(weights):
    return float(weights["kernel0"])


# --- the protocol --------------------------------------------------------------------------------


def test_child_answers_in_turn(stand_in, tmp_path):
    with sides.Child(stand_in) as child:
        assert child.ask("load", arrays="x.npz") == {"jax": "stand-in"}
        child.ask("start", options={}, arguments={})
        assert child.ask("steps", count=2) == {"seconds": 0.5, "losses": [0.0, 1.0]}
        assert child.ask("steps", count=1) == {"seconds": 0.25, "losses": [2.0]}
    assert child._process.returncode == 0


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("fail", "failed when asked to fail:\nTraceback: no such layer"),
        ("chat", "answered 'hello\\\\n' when asked to chat"),
        ("leave", "ended with status 3 when asked to leave"),
    ],
)
def test_child_that_fails(stand_in, request_, message):
    with sides.Child(stand_in) as child, pytest.raises(sides.PeerError, match=message):
        child.ask(request_)


def test_child_that_has_ended(stand_in):
    with sides.Child(stand_in) as child:
        with pytest.raises(sides.PeerError, match="status 3"):
            child.ask("leave")
        with pytest.raises(sides.PeerError, match="status 3 when asked to load"):
            child.ask("load", arrays="x.npz")


def test_child_that_does_not_start(tmp_path):
    with pytest.raises(sides.PeerError, match="nowhere cannot be started: No such file"):
        sides.Child([str(tmp_path / "nowhere")])


def test_their_settings_adapt_or_are_fixed():
    adapting = sides.their_settings(sides.THEIR_DEFAULTS, 20)
    assert adapting["arguments"] == {}
    assert adapting["options"]["initial_damping"] == 150.0
    assert adapting["options"]["use_adaptive_learning_rate"]
    fixed = sides.their_settings(FIXED, 7)
    assert fixed["arguments"] == {"damping": 2.0, "learning_rate": 0.1, "momentum": 0.9}
    assert not any(name.startswith("use_adaptive") for name in fixed["options"])
    for settings, period in ((adapting, 20), (fixed, 7)):
        assert settings["options"]["inverse_update_period"] == period
        json.dumps(settings)


def test_used_values():
    drawn = {**FIXED, "adaptive": 1.0}
    assert sides.used(drawn) == {"adaptive": 1.0, "damping": 2.0}
    assert sides.used(FIXED) == FIXED
    assert sides.used(sides.OUR_DEFAULTS) == sides.OUR_DEFAULTS


# --- the environment -----------------------------------------------------------------------------


def test_environment_is_made_once(monkeypatch, tmp_path):
    calls = []

    def call(command):
        calls.append(command)
        Path(command[-1]).mkdir(parents=True, exist_ok=True) if "venv" in command else None
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(sides.subprocess, "run", call)
    python = sides.make_environment(tmp_path)
    assert [command[2] for command in calls] == ["venv", "pip"]
    assert calls[1][0] == str(python)
    assert calls[1][-1] == str(sides.REQUIREMENTS)
    assert sides.make_environment(tmp_path) == python
    assert len(calls) == 2


def test_environment_that_cannot_be_made(monkeypatch, tmp_path):
    monkeypatch.setattr(
        sides.subprocess, "run", lambda command: subprocess.CompletedProcess(command, 1)
    )
    for _ in range(2):  # half an environment does not count as one
        with pytest.raises(sides.PeerError, match=r"could not be installed.*--peer-python"):
            sides.make_environment(tmp_path)


def test_requirements_are_pinned():
    lines = [line.split("#")[0].strip() for line in sides.REQUIREMENTS.read_text().splitlines()]
    assert "kfac-jax==0.0.8" in lines
    assert all("==" in line for line in lines if line)


# --- side by side --------------------------------------------------------------------------------


def test_compile_time_is_what_only_the_first_run_has():
    seconds = kfac_peer.compile_seconds(Scripted(), {"learning_rate": 1.0})
    assert seconds == (7.0 + 2.0 * kfac_peer.FIRST_STEPS) - (1.0 + kfac_peer.FIRST_STEPS)


def test_turns_alternate_and_the_first_is_not_timed():
    log = []
    both = {name: Scripted(name, log) for name in ("ours", "theirs")}
    for side in both.values():
        side.start({"learning_rate": 1.0})
    seconds = kfac_peer.alternate(both, 2, 5)
    assert log == [("ours", 5), ("theirs", 5)] * 3
    assert seconds == {"ours": [2.0, 2.0], "theirs": [2.0, 2.0]}


def test_run_ends_where_the_loss_is_not_finite():
    side = Scripted()
    trial = kfac_peer.run(side, {"learning_rate": math.nan}, 100, loss_of)
    assert trial.train_loss == math.inf
    assert len(side.log) == 1
    trial = kfac_peer.run(side, {"learning_rate": 0.5}, 13, loss_of)
    assert trial.train_loss == 0.5
    assert trial.step_losses == [0.5] * 13


def test_search_begins_with_the_defaults():
    side = Scripted()

    def attempt(values):
        return kfac_peer.run(side, values, 1, loss_of)

    space, defaults = {"learning_rate": LogUniform(0.1, 10.0)}, {"learning_rate": 3.0}
    trials = kfac_peer.search(attempt, space, defaults, 6, 0)
    assert len(trials) == 6
    assert trials[0].values == defaults
    rates = [trial.values["learning_rate"] for trial in trials]
    assert kfac_peer.best(trials).train_loss == min(rates) < 3.0


def test_weights_travel_there_and_back():
    images = np.zeros((2, 784), np.float32)
    problem = make_problem(Dataset("none", "none", images, images), make_network(shrink=100))
    params = problem.init(jax.random.key(0))
    weights = sides.as_weights(params)
    assert set(weights) == {f"{kind}{i}" for kind in ("kernel", "bias") for i in range(8)}
    assert weights["kernel3"].shape == (2, 1)  # into the code
    jax.tree.map(np.testing.assert_array_equal, sides.as_params(weights), params)


def test_batches_are_those_of_the_other_experiments():
    _, args = kfac_peer.parse_arguments([*QUICK, "--steps", "9", "--rounds", "1"])
    order = kfac_peer.batch_order(200, args)
    assert len(order) >= max(9, 2 * args.inverse_period, kfac_peer.FIRST_STEPS)
    np.testing.assert_array_equal(order[4:8], list(epoch_batches(200, 50, 2, 0)))


# --- the command line ----------------------------------------------------------------------------


@pytest.mark.standard_promotion  # Optax's learning rate
@pytest.mark.slow
def test_comparison_with_a_stand_in(monkeypatch, stand_in, tmp_path, capsys):
    monkeypatch.setattr(kfac_peer, "child_command", lambda python: stand_in)
    output = tmp_path / "kfac_peer.json"
    arguments = ["--trials", "2", "--peer-python", "any", "--output", str(output)]
    assert kfac_peer.main([*QUICK, *arguments]) == 0
    table = capsys.readouterr().out
    assert "seconds of a step" in table
    written = json.loads(output.read_text())
    assert written["step_seconds"]["theirs"] == [0.25]
    assert written["ratios"]["step"]["median"] == 0.25 / written["step_seconds"]["ours"][0]
    assert written["machine"]["theirs"] == {"jax": "stand-in"}
    assert written["defaults"]["theirs"]["step_losses"] == [0.0, 1.0, 2.0]
    assert written["defaults"]["theirs"]["values"] == sides.THEIR_DEFAULTS
    ours = written["defaults"]["ours"]
    assert ours["values"] == sides.OUR_DEFAULTS
    assert ours["train_loss"] < ours["step_losses"][0]
    # Their weights never moved, so their loss is that before our first step, on all images.
    assert ours["step_losses"][0] == pytest.approx(written["defaults"]["theirs"]["train_loss"], 0.2)
    assert len(written["trials"]["ours"]) == len(written["trials"]["theirs"]) == 2
    again = written["tuned"]["ours"]["step_losses"][0]
    assert again == pytest.approx(ours["step_losses"][0], rel=1e-6)  # each run from the same start


@pytest.mark.skipif(
    importlib.util.find_spec("kfac_jax") is not None, reason="kfac-jax is installed here"
)
def test_python_without_the_peer(tmp_path, capfd):
    output = tmp_path / "kfac_peer.json"
    arguments = ["--peer-python", sys.executable, "--output", str(output)]
    assert kfac_peer.main([*QUICK, *arguments]) == 1
    errors = capfd.readouterr().err
    assert "No module named 'kfac_jax'" in errors
    assert "ended with status 1 when asked to load" in errors
    assert not output.exists()


@pytest.mark.skipif(REAL is None, reason="LOCOPROP_KFAC_PYTHON does not name the peer's Python")
def test_the_peer_itself(tmp_path):
    assert REAL is not None
    images = np.random.default_rng(0).uniform(size=(60, 784)).astype(np.float32)
    problem = make_problem(Dataset("random", "generated", images, images), make_network(shrink=50))
    params = jax.tree.map(lambda leaf: leaf.astype(np.float32), problem.init(jax.random.key(0)))
    order = np.arange(60, dtype=np.int32).reshape(6, 10)
    with sides.Child(sides.child_command(Path(REAL))) as child:
        theirs = sides.Theirs(child, images, order, sides.as_weights(params), 2, tmp_path)
        runs = []
        for _ in range(2):
            theirs.start(FIXED)
            runs.append(theirs.steps(2)[1])
        weights = theirs.weights()
    assert runs[0] == runs[1]  # the second starts where the first did
    first = float(problem.loss_fn(params, images[order[0]]))
    assert runs[0][0] == pytest.approx(first, rel=1e-3)  # theirs has a little weight decay
    assert not np.array_equal(weights["kernel0"], sides.as_weights(params)["kernel0"])
