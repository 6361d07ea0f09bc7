"""The experiments of Linear Neuron Boosting and of gradient descent on neurons."""

import json

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.experiments import factorisation, neurons
from benchmarks.shared import classifier
from benchmarks.shared.data import Dataset, inverted, standardised

IMAGES = np.random.default_rng(0).uniform(size=(20, 784)).astype(np.float32)
LABELS = (np.arange(20) % 10).astype(np.int32)
DATASET = Dataset("random", "generated", IMAGES, IMAGES, LABELS, LABELS)

pytestmark = pytest.mark.standard_promotion


def test_the_factorisation_is_as_badly_conditioned_as_it_says():
    problem = factorisation.factorisation(DATASET, 6, condition=1e4, samples=200)
    x, y = problem.train["x"], problem.train["y"]
    a = np.linalg.lstsq(x, y, rcond=None)[0]
    lengths = np.linalg.norm(a, axis=0)
    assert 1e3 < lengths.max() / lengths.min() < 1e5
    exact = {"first": {"kernel": jnp.eye(10)}, "second": {"kernel": jnp.asarray(a)}}
    assert problem.loss_fn(exact, problem.train) < 1e-10
    np.testing.assert_allclose(
        problem.loss_fn(jax.tree.map(jnp.zeros_like, exact), problem.train), 1, rtol=1e-5
    )


def test_the_gauss_newton_direction_is_that_of_the_dense_matrix():
    problem = factorisation.factorisation(DATASET, 20, condition=10.0, samples=40)
    params = jax.tree.map(lambda p: p.astype(float), problem.init(jax.random.key(0)))
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    x, y = (jnp.asarray(problem.train[name], float) for name in "xy")
    unit = jnp.square(y).sum(-1).mean()

    def residual(flat):
        return ((factorisation.factors(unravel(flat), x) - y) / jnp.sqrt(unit * len(x))).ravel()

    jacobian = np.asarray(jax.jacobian(residual)(flat))
    matrix = 2 * jacobian.T @ jacobian + 1e-8 * np.eye(len(flat))
    gradient = jax.grad(lambda flat: jnp.sum(residual(flat) ** 2))(flat)
    tx = factorisation.gauss_newton(1.0, problem=problem, iterations=500)
    updates, _ = tx.update(unravel(gradient), tx.init(params), params)
    # Many directions change nothing: compare what the steps do to the outputs.
    expected = jacobian @ np.linalg.solve(matrix, gradient)
    np.testing.assert_allclose(
        -jacobian @ jax.flatten_util.ravel_pytree(updates)[0], expected, rtol=1e-3, atol=1e-5
    )


def test_images_may_be_inverted_and_standardised():
    np.testing.assert_array_equal(inverted(DATASET).train, 1 - IMAGES)
    scaled = standardised(DATASET)
    np.testing.assert_allclose(scaled.test * 0.3081 + 0.1307, IMAGES, atol=1e-6)
    assert scaled.train.dtype == np.float32


def test_the_networks_are_those_of_the_papers():
    shapes = [
        (classifier.boosting_mlp, [(784, 800), (800, 800), (800, 10)], True),
        (classifier.benzing_mlp, [(784, 1000), (1000, 1000), (1000, 1000), (1000, 10)], False),
    ]
    for make, kernels, has_bias in shapes:
        params = jax.eval_shape(make(DATASET, 1).init, jax.random.key(0))["params"]
        assert [layer["kernel"].shape for layer in params.values()] == kernels
        assert all(("bias" in layer) is has_bias for layer in params.values())


def test_each_method_is_trained_with_its_default_rate_and_with_others(
    tmp_path, capsys, monkeypatch
):
    experiment = neurons.EXPERIMENTS["factorisation"]
    few = experiment._replace(contestants=lambda problem: {"foof": neurons.FOOF})
    monkeypatch.setitem(neurons.EXPERIMENTS, "factorisation", few)
    arguments = "factorisation --quick --epochs 2 --trials 3 --dataset curves --output-dir"
    assert neurons.main([*arguments.split(), str(tmp_path)]) == 0
    results = json.loads((tmp_path / "factorisation" / "results.json").read_text())
    rates = [run["hyperparameters"]["learning_rate"] for run in results["runs"].values()]
    default = neurons.FOOF.learning_rate
    np.testing.assert_allclose(rates, [default, default / 10**0.5, default * 10**0.5])
    losses = [run["curve"][-1]["train_loss"] for run in results["runs"].values()]
    best = list(results["runs"])[int(np.argmin(losses))]
    defaults, rest = capsys.readouterr().out.split("best of 3 each:")
    assert "default learning rates:" in defaults and f"FOOF, {default:.3g} " in defaults
    assert best in rest
    for name in ("best.png", "defaults.png"):
        assert (tmp_path / "factorisation" / name).stat().st_size > 10_000


def test_an_unknown_experiment_is_refused(capsys):
    with pytest.raises(SystemExit):
        neurons.main(["factorization"])
    assert "no experiment 'factorization'; there are factorisation" in capsys.readouterr().err
