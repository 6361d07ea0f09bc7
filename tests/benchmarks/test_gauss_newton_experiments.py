"""The experiments of practical Gauss-Newton, and of K-FAC against the natural gradient."""

import argparse
import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import locoprop_jax as lp
from benchmarks.experiments import alignment, gauss_newton, natural, second_factor, untuned
from benchmarks.shared import autoencoder, candidates, classifier
from benchmarks.shared.classifier import Classifier
from benchmarks.shared.contestants import Contestant, constant
from benchmarks.shared.data import Dataset
from benchmarks.shared.methods import Method
from benchmarks.shared.steps import compile_step
from benchmarks.shared.training import EpochRecord, Problem, Run, Settings, train
from benchmarks.shared.trajectories import follow

IMAGES = np.random.default_rng(0).uniform(size=(20, 784)).astype(np.float32)
LABELS = (np.arange(20) % 10).astype(np.int32)
DATASET = Dataset("random", "generated", IMAGES, IMAGES, LABELS, LABELS)
SMALL = alignment.pooled(DATASET, 4)
SETTINGS = Settings(epochs=1, batch_size=10, seed=0)

pytestmark = pytest.mark.standard_promotion


def linear_problem(rows=20):
    """Three classes of vectors of four numbers, with one dense layer."""
    rng = np.random.default_rng(0)
    examples = {"x": rng.normal(size=(rows, 4)), "y": (np.arange(rows) % 3).astype(np.int32)}

    def loss_fn(params, batch):
        logits = batch["x"] @ params["kernel"]
        losses = lp.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        return losses.mean()

    def init(key):
        return {"kernel": jax.random.normal(key, (4, 3))}

    return Problem("linear", init, loss_fn, examples, None)


def finished(losses, seconds=2.0):
    """A run with these batches' losses."""
    curve = [EpochRecord(0, 0, 0.0, 9.0), EpochRecord(1, len(losses), seconds, losses[-1])]
    return Run("name", "label", {}, curve, list(losses), 0.0, None)


# --- the step ------------------------------------------------------------------------------------


def test_a_step_samples_curvature_anew_and_can_evaluate_its_own_loss():
    problem = linear_problem()

    def build(layers, schedule):
        del layers, schedule

        def update(updates, state, params, *, captured, value, grad, value_fn, **others):
            assert not others
            (arrays,) = captured.values()
            error = jnp.abs(value_fn(params) - value)
            error += jnp.abs(grad["kernel"] - updates["kernel"]).max()
            return jax.tree.map(jnp.zeros_like, updates), (arrays.curvature, state[1] + error)

        return optax.GradientTransformationExtraArgs(
            lambda params: (jnp.zeros((1, 5, 1, 3)), jnp.zeros([])), update
        )

    drawn: dict[int, list[np.ndarray]] = {}
    for seed in (0, 1):
        method = Method("probe", build, {}, curvature="fisher_mc")
        params = problem.init(jax.random.key(0))
        state, step = compile_step(
            problem.loss_fn, method, lambda count: 1.0, {}, params, problem.train, 5, seed
        )
        drawn[seed] = []
        for _ in range(3):  # the same batch, and the parameters stay as they are
            state, _ = step(state, problem.train, np.arange(5, dtype=np.int32))
            opt_state: Any = state.opt_state
            sample, error = opt_state
            drawn[seed].append(np.asarray(sample))
            assert error < 1e-12
    assert not np.array_equal(drawn[0][0], drawn[0][1])
    assert not np.array_equal(drawn[0][1], drawn[0][2])
    assert not np.array_equal(drawn[0], drawn[1])


def test_following_a_run_trains_as_training_does():
    problem = linear_problem()
    contestant = Contestant("SGD", optax.sgd, 0.5, schedule=constant)
    job = candidates.candidate(contestant, 0.5, problem, SETTINGS).job
    expected = train(problem, "sgd", job.method, {"learning_rate": 0.5}, SETTINGS)
    longer = job._replace(settings=SETTINGS._replace(epochs=3))
    found, interrupted = follow(longer, 1, lambda state, batch: (state.params, batch), "test")
    assert list(found) == [1, 2, 3, 4, 5] and not interrupted
    np.testing.assert_allclose(found[2][0]["kernel"], expected.params["kernel"], rtol=1e-12)
    assert all(batch["x"].shape == (10, 4) for _, batch in found.values())
    some, _ = follow(longer, 2, lambda state, batch: 0, "test")
    assert list(some) == [1, 3, 5]


# --- what is trained -----------------------------------------------------------------------------


def test_adam_is_searched_on_the_papers_grid_from_its_middle():
    jobs = [each.job for each in untuned.adam_grid(40, linear_problem(), SETTINGS)]
    assert len({job.name for job in jobs}) == 40
    rates = {job.hyperparameters["learning_rate"] for job in jobs}
    assert rates == {2.0**-power for power in range(6, 14)}
    first = [job.hyperparameters["learning_rate"] for job in jobs[:8]]
    assert max(first) <= 2**-8 and min(first) >= 2**-11
    schedule = untuned.halving(0.5, 1.0, 100)
    halved = np.array([schedule(count) for count in (0, 49, 50, 99)])
    np.testing.assert_allclose(halved, [1, 1, 0.5, 0.5])


def test_the_mixture_is_a_distribution_and_is_sampled_from():
    rng = np.random.default_rng(0)
    outputs = jnp.asarray(rng.normal(size=(4, 3)))
    gate, one, other = 1 / (1 + np.exp(-np.asarray(outputs.T)))
    odd = gate * one + (1 - gate) * other
    np.testing.assert_allclose(jnp.exp(-untuned.mixture(outputs, jnp.ones(4))), odd, rtol=1e-6)
    np.testing.assert_allclose(jnp.exp(-untuned.mixture(outputs, jnp.zeros(4))), 1 - odd, rtol=1e-6)
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.vmap(lambda key: untuned.sample_mixture(key, outputs))(keys)
    np.testing.assert_allclose(drawn.mean(0), odd, atol=0.04)


def test_the_mixture_tells_odd_classes_from_even_ones():
    problem = untuned.mixture_problem(DATASET, 1)
    np.testing.assert_array_equal(problem.train["odd"], LABELS % 2)
    params = jax.eval_shape(problem.init, jax.random.key(0))["params"]
    kernels = [layer["kernel"].shape for layer in params.values()]
    assert kernels == [(784, 1000), (1000, 500), (500, 250), (250, 30), (30, 3)]


def test_each_damping_has_learning_rates_of_its_own():
    variants = natural.natural("Natural", block_diagonal=True)
    jobs = [each.job for each in natural.grid(variants, linear_problem(), SETTINGS, 3)]
    rates = [job.hyperparameters["learning_rate"] for job in jobs]
    np.testing.assert_allclose(rates[3:], 10 * np.array(rates[:3]))
    np.testing.assert_allclose(rates[1:3], np.array(rates[:2]) * 10**0.5)
    assert {each.label for _, each, _ in variants} == {"Natural"}
    assert len({job.name for job in jobs}) == 6


# --- what is measured ----------------------------------------------------------------------------


def measured(rows, tau, methods):
    problem = linear_problem(rows)
    params, batch = problem.init(jax.random.key(0)), jax.tree.map(jnp.asarray, problem.train)
    layers = lp.find_layers(problem.loss_fn, params, batch)
    measure = alignment.make_measurement(problem.loss_fn, layers, methods)
    point = measure(params, batch, jax.random.key(1), jnp.asarray(tau))
    return problem, params, batch, point


def test_alignment_is_with_the_solution_of_the_damped_system():
    problem, params, batch, point = measured(6, 0.01, alignment.approximations(3))
    product = lp.gauss_newton_vector_product(problem.loss_fn, params, batch)
    unit = jnp.eye(12).reshape(12, 4, 3)
    matrix = np.stack([product({"kernel": v})["kernel"].ravel() for v in unit])
    gradient = np.asarray(jax.grad(problem.loss_fn)(params, batch)["kernel"]).ravel()
    exact = np.linalg.solve(matrix + 0.01 * np.eye(12), gradient)
    cosine = gradient @ exact / np.linalg.norm(gradient) / np.linalg.norm(exact)
    np.testing.assert_allclose(point.full["gradient"], cosine, rtol=1e-4)
    np.testing.assert_allclose(point.by_layer["gradient"], [cosine], rtol=1e-4)
    np.testing.assert_allclose(point.full[alignment.BLOCKS], 1, atol=1e-6)
    assert cosine < 0.99 and max(point.residuals) < 1e-3
    assert set(point.by_layer) == {
        *("KFRA", "KFRA, exact damping", "KFLR", "KFLR, exact damping"),
        *("K-FAC", "K-FAC, exact damping", "FOOF", "gradient"),
    }


def test_for_one_example_the_factors_are_the_block():
    methods = alignment.approximations(3)
    exact = {name: methods[name] for name in ("KFRA, exact damping", "KFLR, exact damping")}
    *_, point = measured(1, 1e-3, exact)
    for name in exact:
        np.testing.assert_allclose(point.by_layer[name], 1, atol=1e-5)
    assert "KFLR" not in alignment.approximations(784)


def test_pooled_images_are_means():
    small = alignment.pooled(DATASET, 3)  # the last row and column are left out
    assert small.train.shape == (20, 81)
    corner = IMAGES.reshape(-1, 28, 28)[:, 3:6, :3].mean((1, 2))
    np.testing.assert_allclose(small.test[:, 9], corner, rtol=1e-5)


def test_updates_are_compared_by_how_they_move_the_neurons():
    problem, key, damping = linear_problem(), jax.random.key(0), 0.01
    params, batch = problem.init(key), jax.tree.map(jnp.asarray, problem.train)
    layers = lp.find_layers(problem.loss_fn, params, batch)
    measure = second_factor.make_similarity(problem.loss_fn, layers)
    found = measure(params, batch, key, jnp.asarray(damping))

    capture = lp.value_grad_and_capture(problem.loss_fn, curvature="fisher_mc")
    _, grads, captured = capture(params, batch, rng=key)
    x, g = problem.train["x"], np.asarray(grads["kernel"])
    rows = np.asarray(captured["kernel"].curvature).reshape(-1, 3)
    s, gamma = x.T @ x / len(x), rows.T @ rows
    pi = np.sqrt(np.trace(s) / 4 / (np.trace(gamma) / 3))
    foof = np.linalg.solve(s + damping**0.5 * pi * np.eye(4), g)
    heuristic = foof @ np.linalg.inv(gamma + damping**0.5 / pi * np.eye(3))
    exact = np.linalg.solve(np.kron(s, gamma) + damping * np.eye(12), g.ravel()).reshape(4, 3)
    for label, update in ((second_factor.HEURISTIC, heuristic), (second_factor.EXACT, exact)):
        expected = np.sum(update * (s @ foof))
        expected /= np.sqrt(np.sum(update * (s @ update)) * np.sum(foof * (s @ foof)))
        np.testing.assert_allclose(found[label], expected, rtol=1e-6)
        assert expected < 0.999


def test_a_race_is_over_where_the_rival_ends():
    slow = finished(np.linspace(10, 1, 40), seconds=8.0)
    fast = finished(np.linspace(10, -8, 40), seconds=4.0)
    updates, losses = candidates.smoothed(slow)
    assert updates[0] == 10 and updates[-1] == 40
    np.testing.assert_allclose(losses[0], np.linspace(10, 1, 40)[:10].mean())
    at = candidates.reached(fast, losses[-1])
    assert at is not None and at[0] == 23
    np.testing.assert_allclose(at[1], 4.0 * 23 / 40)
    assert candidates.reached(slow, 0.0) is None
    text = candidates.race({"fast": fast, "slow": slow}, "fast", "slow")
    assert "after 23 of 40 updates and 2.3 of 8 s" in text
    assert "does not get" in candidates.race({"fast": fast, "slow": slow}, "slow", "fast")


# --- all of it -----------------------------------------------------------------------------------


@pytest.fixture
def shallow(monkeypatch):
    """One or two layers, and few methods: what compiles is shorter."""
    approximations = alignment.approximations

    def few(outputs):
        return {name: approximations(outputs)[name] for name in ("KFRA", "KFLR", "K-FAC", "FOOF")}

    def make_problem(dataset, shrink):
        network = Classifier((), nn.relu, False, nn.initializers.he_normal())
        return classifier.make_problem(dataset, network)

    monkeypatch.setattr(natural, "benzing_mlp", make_problem)
    monkeypatch.setattr(second_factor, "benzing_mlp", make_problem)
    monkeypatch.setattr(untuned, "narrower", lambda widths, shrink: ())
    monkeypatch.setitem(autoencoder.SIZES, "standard", ((), 3))
    monkeypatch.setattr(alignment, "approximations", few)
    monkeypatch.setattr(natural, "KFAC_DAMPINGS", (0.1,))
    monkeypatch.setattr(natural, "NATURAL_DAMPINGS", (1.0,))
    monkeypatch.setattr(natural, "FOOF_DAMPINGS", (1.0,))
    monkeypatch.setattr(second_factor, "DAMPINGS", (0.1,))


def run(name, directory, dataset=SMALL, **options):
    experiment = gauss_newton.EXPERIMENTS[name]
    args = {**gauss_newton.QUICK, "seed": 0, "shrink": 100, "epochs": 2, **options}
    assert not experiment.run(experiment, dataset, argparse.Namespace(**args), directory)
    return json.loads((directory / "results.json").read_text())


def check_pictures(directory, *names):
    for name in names:
        assert (directory / f"{name}.png").stat().st_size > 10_000


@pytest.mark.usefixtures("shallow")
@pytest.mark.slow
def test_adam_is_tuned_and_the_others_are_not(tmp_path, capsys):
    results = run("mixture", tmp_path, trials=2, epochs=12)
    assert [*results["runs"]][:2] == ["KFLR", "K-FAC"] and len(results["runs"]) == 5
    assert all(len(each["step_losses"]) == 12 for each in results["runs"].values())
    assert results["runs"]["KFLR"]["hyperparameters"] == {"learning_rate": 1.0}
    assert len(results["claims"]) == 2
    assert "Paper: K-FAC performs almost identically to KFLR" in capsys.readouterr().out
    check_pictures(tmp_path, "updates")


@pytest.mark.usefixtures("shallow")
@pytest.mark.slow
def test_alignment_is_measured_along_the_trajectory(tmp_path, capsys):
    results = run("alignment", tmp_path, DATASET, every=1, epochs=3, shrink=1, pool=14)
    assert results["updates"] == [1, 2] and len(results["settings"]["layers"]) == 2
    assert np.shape(results["by_layer"]["KFRA"]) == (2, 2)
    assert all(-1 <= value <= 1.0001 for value in results["full"]["K-FAC"])
    assert "KFRA's cosine is" in capsys.readouterr().out
    check_pictures(tmp_path, "updates", "layers")


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize(
    "name",
    ["logistic", *(pytest.param(n, marks=pytest.mark.slow) for n in ("natural", "minibatches"))],
)
def test_natural_gradients_are_compared(tmp_path, capsys, name):
    results = run(name, tmp_path, full_batch=10)
    assert "Natural, damping 1, 0.3" in results["runs"]
    expected = 20 if name == "minibatches" else 10
    assert results["settings"]["batch_size"] == expected
    assert "K-FAC ends at" in capsys.readouterr().out
    check_pictures(tmp_path, "updates")


@pytest.mark.usefixtures("shallow")
@pytest.mark.slow
def test_damping_is_compared(tmp_path, capsys):
    results = run("damping", tmp_path, every=1)
    assert set(results["similarity"]) == {second_factor.HEURISTIC, second_factor.EXACT}
    assert all(len(values) == 1 for values in results["similarity"].values())
    assert len(results["runs"]) == 4
    assert "heuristic damping significantly increases" in capsys.readouterr().out
    check_pictures(tmp_path, "updates", "dampings")


@pytest.mark.usefixtures("shallow")
@pytest.mark.slow
def test_single_steps_are_compared_along_k_facs_trajectory(tmp_path, capsys):
    results = run("second_factor", tmp_path, every=1)
    progress = results["progress"]
    assert progress["updates"] == [1]
    # The step that was measured is the one that was taken.
    losses = results["runs"]["K-FAC, damping 0.1, 0.0949"]["curve"]
    fall = 1 - losses[2]["train_loss"] / losses[1]["train_loss"]
    np.testing.assert_allclose(progress["with"], [fall], rtol=1e-3)
    assert progress["with"] != progress["without"]
    assert "improves the loss of its mini-batch more" in capsys.readouterr().out
    check_pictures(tmp_path, "updates", "progress")


def test_an_unknown_experiment_is_refused(capsys):
    with pytest.raises(SystemExit):
        gauss_newton.main(["kfac"])
    assert "no experiment 'kfac'; there are autoencoder" in capsys.readouterr().err
