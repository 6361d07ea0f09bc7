"""The problems of the comparison at defaults: they load, and capture understands them."""

import jax
import numpy as np
import pytest

import locoprop_jax as lp
from benchmarks.defaults import problems_images
from benchmarks.defaults.problems import APART, CHOSEN, PROBLEMS, load
from benchmarks.shared.data import DATA_VARIABLE

pytestmark = pytest.mark.standard_promotion  # Flax's normalisation layers


@pytest.fixture(autouse=True)
def without_fashion_mnist(monkeypatch, tmp_path):
    """What stands in for it, so that the tests need neither files nor the network."""
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))


@pytest.fixture(scope="module", autouse=True)
def forget_images():
    problems_images.fashion_mnist.cache_clear()
    yield
    problems_images.fashion_mnist.cache_clear()


def test_the_two_groups_are_all_problems():
    assert set(CHOSEN).isdisjoint(APART)
    assert {*CHOSEN, *APART} == set(PROBLEMS)
    assert len(CHOSEN) == 11 and len(APART) >= 7


def test_unknown_problem():
    with pytest.raises(ValueError, match="no problem 'vgg16'"):
        load("vgg16")


@pytest.mark.parametrize("name", PROBLEMS)
def test_problem(name):
    problem = load(name)
    for split in (problem.train, problem.test):
        assert split is not None
        (examples,) = {len(array) for array in split.values()}
        assert examples >= 100
        assert all(np.isfinite(array).all() for array in split.values())
        assert {array.dtype for array in split.values()} <= {np.dtype("f4"), np.dtype("i4")}
    assert set(problem.evaluation()) == {"train", "test"}

    batch = next(problem.batches(seed=0))
    assert {len(array) for array in batch.values()} == {problem.batch_size}
    key = jax.random.key(0)
    params = jax.eval_shape(problem.init, key)
    layers = lp.find_layers(problem.loss_fn, params, batch)
    assert not layers.uncaptured
    # The loss is marked: without that there would be no Gauss-Newton cotangents.
    capture = lp.value_grad_and_capture(problem.loss_fn, curvature="ggn_mc")
    jax.eval_shape(lambda params, batch: capture(params, batch, rng=key)[1], params, batch)


@pytest.mark.parametrize("name", ["autoencoder", "vit", "character_gru", "recommender"])
def test_gradient_is_finite(name):
    problem = load(name)
    few = {key: array[:2] for key, array in problem.train.items()}
    params = problem.init(jax.random.key(0))
    loss, grads = jax.jit(jax.value_and_grad(problem.loss_fn))(params, few)
    assert np.isfinite(loss)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_batches_are_those_of_a_seed():
    problem = load("vit")
    first, again, other = (list(problem.batches(seed, 12)) for seed in (0, 0, 1))
    assert len(first) == 12  # an epoch has ten
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a["images"], b["images"])
    assert not np.array_equal(first[0]["labels"], other[0]["labels"])
    epoch = np.concatenate([batch["images"] for batch in first[:10]]).reshape(1280, -1)
    assert len(np.unique(epoch, axis=0)) == 1280  # no image twice
    assert not np.array_equal(first[0]["images"], first[10]["images"])
    assert len(list(problem.batches(0))) == problem.steps
