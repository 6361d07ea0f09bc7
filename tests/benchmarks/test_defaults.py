"""The comparison at defaults: what it runs, what it stores, and how it counts the goals."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import locoprop_jax as lp
from benchmarks.defaults import contestants, defaults, goals, runs, summary
from benchmarks.defaults.choice import adam_in_time, chosen, mean_loss, seconds_ratio
from benchmarks.defaults.contestants import CONTESTANTS, describe
from benchmarks.defaults.picture import factors
from benchmarks.defaults.problem import Problem, split_off
from benchmarks.defaults.runs import Row

pytestmark = pytest.mark.standard_promotion  # `optax.adam`

ADAM = CONTESTANTS["adam"]
ADAMW = CONTESTANTS["adamw"]
FOOF = CONTESTANTS["foof"]
DEFAULT, THIRD, THREE = map(describe, FOOF.grid)


def row(method, setting, seed, train_loss, test_loss=None, *, ratio=1.0, seconds=1.0, refused=""):
    test_loss = train_loss if test_loss is None else test_loss
    losses = (1.0, train_loss, test_loss)
    return Row("smooth", method, setting, seed, 100, ratio, *losses, seconds, 5.0, refused)


# --- the schedule --------------------------------------------------------------------------------


def test_warmup_cosine():
    schedule = contestants.warmup_cosine(100)
    rates = np.array([schedule(count) for count in range(100)])
    np.testing.assert_allclose(rates[:5], [0.2, 0.4, 0.6, 0.8, 1.0])
    expected = (1 + np.cos(np.pi * np.arange(95) / 95)) / 2
    np.testing.assert_allclose(rates[5:], expected, atol=1e-6)


def test_schedules_of_few_steps_are_positive():
    for shape in (contestants.warmup_cosine, contestants.warmup_constant, contestants.constant):
        for steps in (1, 2, 3):
            schedule = shape(steps)
            rates = np.array([schedule(count) for count in range(steps)])
            assert np.all((rates > 0) & (rates <= 1))


def test_rivals_stop_rising_where_they_should():
    schedule = contestants.warmup_constant(100)
    assert schedule(4) == schedule(99) == 1


def test_settings_are_told_apart_by_their_descriptions():
    for contestant in CONTESTANTS.values():
        assert len(set(map(describe, contestant.grid))) == len(contestant.grid)


def test_a_method_is_built_with_its_default_times_the_schedule():
    def method(layers, learning_rate=0.5):
        return layers, learning_rate

    made = contestants._ours("Method", method)
    layers, rate = made.make("layers", {"multiplier": 3.0}, optax.constant_schedule(0.1))
    assert layers == "layers"
    assert rate(jnp.zeros(())) == pytest.approx(0.15)
    assert contestants.default_rate(lambda layers, learning_rate: None) is None


# --- a small comparison --------------------------------------------------------------------------


def tiny(name, steps=3):
    """A problem with that name, a network of two layers."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(48, 2)).astype("f4")
    train, test = split_off({"x": x, "targets": x**2}, 16)

    def init(key):
        return {
            name: {"kernel": jax.random.normal(key, shape), "bias": jnp.zeros(shape[1])}
            for name, shape in (("hidden", (2, 4)), ("last", (4, 2)))
        }

    def loss_fn(params, batch):
        hidden, last = params["hidden"], params["last"]
        h = jnp.tanh(batch["x"] @ hidden["kernel"] + hidden["bias"][None])
        outputs = h @ last["kernel"] + last["bias"][None]
        return lp.losses.squared_error(outputs, batch["targets"]).sum(-1).mean()

    return Problem(name, "two layers", init, loss_fn, train, test, 8, steps)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(defaults, "load", tiny)


def run(directory, *options):
    return defaults.main(["--output-dir", str(directory), "--seeds", "2", *options])


PROBLEMS = ("--problems", "smooth", "tabular")


def test_command(short, monkeypatch, tmp_path, capsys):
    methods = ("--methods", "adam", "foof")
    assert run(tmp_path, *PROBLEMS, *methods) == 0
    stored = {name: runs.read(tmp_path / "runs" / f"{name}.csv") for name in PROBLEMS[1:]}
    for rows in stored.values():
        equal_steps = [r for r in rows if r.ratio == 1]
        assert sum(r.method == "adam" for r in equal_steps) == len(ADAM.grid) + 1
        ours = [(r.setting, r.seed) for r in equal_steps if r.method == "foof"]
        assert ours == [(DEFAULT, 0), (DEFAULT, 1), (THIRD, 0), (THREE, 0)]
        ratio = seconds_ratio(rows, "foof")
        assert ratio is not None
        if ratio > 1:
            longer = [r.seed for r in rows if r.ratio == ratio]
            assert longer == [0, 0, 1]
        assert all(math.isfinite(r.train_loss) and r.seconds_per_step > 0 for r in rows)
        by_seed = {(r.seed, r.first_loss) for r in rows}
        assert len(by_seed) == 2  # the same parameters for all methods

    printed = capsys.readouterr().out
    assert "| tabular |" in printed
    assert (tmp_path / "profiles.png").stat().st_size > 10_000
    content = json.loads((tmp_path / "summary.json").read_text())
    assert set(content["problems"]) == {"smooth", "tabular"}
    assert content["goals"]["foof"]["train_loss"]["of"] == 2

    def fail(*args):
        raise AssertionError("what is stored is not run again")

    monkeypatch.setattr(runs, "compile_step", fail)
    assert run(tmp_path, *PROBLEMS, *methods) == 0
    assert stored["smooth"] == runs.read(tmp_path / "runs" / "smooth.csv")
    with pytest.raises(AssertionError, match="not run again"):
        run(tmp_path, *PROBLEMS, "--methods", "foof", "--again")
    capsys.readouterr()
    assert defaults.main(["--output-dir", str(tmp_path), "--show"]) == 0
    assert "| tabular |" in capsys.readouterr().out


def test_a_method_that_refuses_is_recorded(short, monkeypatch, tmp_path):
    def refuse(*args):
        raise ValueError("decreasing\ntransfer function, twice")

    monkeypatch.setattr(runs, "compile_step", refuse)
    run(tmp_path, "--problems", "smooth", "--methods", "foof", "--stage", "ours")
    rows = runs.read(tmp_path / "runs" / "smooth.csv")
    assert [r.refused for r in rows] == ["decreasing transfer function, twice"] * 4
    assert "| refused |" in (tmp_path / "summary.md").read_text()


def test_a_diverged_run_has_an_infinite_loss(tmp_path):
    problem = tiny("smooth")
    adam = ADAM._replace(grid=({"learning_rate": math.nan},))
    diverged = runs.Runs(problem, tmp_path / "smooth.csv").train(adam, adam.grid[0], 0)
    assert diverged.train_loss == diverged.test_loss == math.inf
    assert math.isfinite(diverged.first_loss)


def test_nothing_stored(tmp_path, capsys):
    assert defaults.main(["--output-dir", str(tmp_path), "--show"]) == 0
    assert "no runs" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["adamw", "muon", "prodigy", "schedule_free", "kfac"])
def test_contestants_train(name, tmp_path):
    problem = tiny("smooth")
    contestant = CONTESTANTS[name]
    trained = runs.Runs(problem, tmp_path / "x.csv").train(contestant, contestant.grid[0], 0)
    assert trained.train_loss != trained.first_loss
    assert math.isfinite(trained.train_loss)


# --- the stored runs -----------------------------------------------------------------------------


def test_rows_survive_a_torn_line(tmp_path):
    path = tmp_path / "runs" / "smooth.csv"
    first, second = row("adam", "a", 0, 0.5), row("adam", "a", 1, math.inf, math.nan)
    runs.append(path, first)
    with path.open("a") as file:
        file.write("smooth,adam,a,1")
    runs.append(path, second)
    assert runs.read(path)[0] == first
    assert str(runs.read(path)[1]) == str(second)  # not a number is not equal to itself


def test_the_later_of_two_runs_counts(tmp_path):
    path = tmp_path / "smooth.csv"
    for loss in (0.5, 0.4):
        runs.append(path, row("foof", DEFAULT, 0, loss))
    assert [r.train_loss for r in runs.read(path)] == [0.4]


def test_runs_of_another_length_are_passed_over(tmp_path):
    path = tmp_path / "smooth.csv"
    runs.append(path, row("adam", "a", 0, 0.5)._replace(steps=50))
    runs.append(path, row("adam", "a", 0, 0.4))
    ((name, rows),) = summary.load_rows(tmp_path).items()
    assert name == "smooth"
    assert [r.steps for r in rows] == [100]
    assert len(runs.Runs(tiny("smooth", 50), path).rows) == 1


# --- the goals -----------------------------------------------------------------------------------


def test_tuned_settings():
    fast, slow = describe(ADAMW.grid[0]), describe(ADAMW.grid[1])
    rows = [
        row("adamw", fast, 0, 0.1, 0.9),
        row("adamw", fast, 1, 0.3, 0.7),
        row("adamw", slow, 0, 0.2, 0.5),
        row("adamw", slow, 1, 0.0, 0.4),  # the second seed chooses nothing
    ]
    assert chosen(rows, ADAMW, "train_loss") == fast
    assert mean_loss(rows, ADAMW, "train_loss") == pytest.approx(0.2)
    assert chosen(rows, ADAMW, "test_loss") == slow
    assert mean_loss(rows, ADAMW, "test_loss") == pytest.approx(0.45)
    as_adam = [r._replace(method="adam") for r in rows]
    assert chosen(as_adam, ADAM, "test_loss") == fast  # only AdamW is tuned by it
    assert chosen([], FOOF, "train_loss") == DEFAULT
    assert mean_loss([], FOOF, "train_loss") is None


def test_equal_seconds():
    rate = describe(ADAM.grid[0])
    rows = [
        row("adam", rate, 0, 0.5, seconds=1.0),
        row("foof", DEFAULT, 0, 0.3, seconds=1.1),
        row("foof", DEFAULT, 1, 0.3, seconds=1.3),
        row("foof", THREE, 0, 0.3, seconds=9.0),
    ]
    assert seconds_ratio(rows, "foof") == 1.5  # 1.3, rounded up
    assert seconds_ratio(rows, "lnb") is None
    assert adam_in_time(rows, "foof") is None
    rows.append(row("adam", rate, 0, 0.1, ratio=1.75))
    assert adam_in_time(rows, "foof") == (1.75, 0.1, 0.1)
    rows += [row("adam", rate, seed, 0.2 + seed, 0.4, ratio=1.5) for seed in (0, 1)]
    assert adam_in_time(rows, "foof") == (1.5, pytest.approx(0.7), pytest.approx(0.4))
    fast = [r._replace(seconds_per_step=0.2) if r.method == "foof" else r for r in rows]
    assert seconds_ratio(fast, "foof") == 1


@pytest.mark.parametrize(
    ("loss", "best", "expected"),
    [
        (0.3, 0.2, 1.5),
        (-1.0, -2.0, 1.5),
        (1.0, -2.0, 2.5),
        (-2.0, -2.0, 1.0),
        (0.0, 0.0, 1.0),
        (0.1, 0.0, math.inf),
        (math.inf, 0.2, math.inf),
        (math.inf, math.inf, math.inf),
    ],
)
def test_factor(loss, best, expected):
    assert goals.factor(loss, best) == pytest.approx(expected)


def counts(rows):
    compared = goals.compare_all(rows)["foof"]
    return {key: [c.met for c in problems.values()] for key, problems in compared.items()}


def test_goals_are_counted():
    adam, adamw = describe(ADAM.grid[0]), describe(ADAMW.grid[0])
    rows = {
        "ahead": [
            row("adam", adam, 0, 0.5),
            row("adamw", adamw, 0, 0.5, 0.6),
            row("foof", DEFAULT, 0, 0.4, 0.7),
            row("foof", THIRD, 0, 0.385),
            row("foof", THREE, 0, math.inf),
        ],
        "negative": [
            row("adam", adam, 0, -1.0),
            row("adam", adam, 0, -1.5, -2.5, ratio=2.0),
            row("adamw", adamw, 0, -1.0, -2.0),
            row("foof", DEFAULT, 0, -2.0, -2.0, seconds=2.0),
            row("foof", THIRD, 0, -2.2, seconds=2.0),
            row("foof", THREE, 0, -1.0, seconds=2.0),
        ],
        "diverged": [row("adam", adam, 0, math.inf), row("foof", DEFAULT, 0, math.inf)],
        "refused": [
            row("adam", adam, 0, 1.0),
            row("foof", DEFAULT, 0, math.inf, refused="decreasing"),
        ],
        "no rival": [row("foof", DEFAULT, 0, 0.1)],
    }
    assert counts(rows) == {
        "train_loss": [True, True, False],
        "test_loss": [False, True],
        "near_own_best": [True, False],  # 3.9% above and 9.1% above
        "train_loss_in_time": [True, True, False],  # as fast as Adam: the same runs
        "test_loss_in_time": [False, False, False],
    }
    text = summary.tables(rows)
    assert "| ahead | 0.5 | **0.5** | **0.4** |" in text
    assert "| refused | 1 | - | refused |" in text
    assert "| FOOF | 2 of 3 | 1 of 2 | 1 of 2 | 2 of 3 | 0 of 3 |" in text
    assert "its own best: negative (+9.1%)" in text
    json.dumps(summary.results(rows), allow_nan=False)


def test_factors_of_the_best():
    rows = {
        "one": [
            row("adam", describe(ADAM.grid[0]), 0, 0.2),
            row("foof", DEFAULT, 0, 0.1),
        ],
        "two": [
            row("adam", describe(ADAM.grid[0]), 0, 0.1),
            row("foof", DEFAULT, 0, math.inf, refused="decreasing"),
        ],
    }
    found = factors(rows, [ADAM, FOOF], "train_loss")
    np.testing.assert_allclose(found["Adam"], [1, 2])
    np.testing.assert_allclose(found["FOOF"], [1, math.inf])
