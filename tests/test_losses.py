"""Output losses against Optax's, their Hessians and samplers against autodiff and enumeration."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import locoprop_jax as lp
from locoprop_jax._tracing.program import flatten
from tests.helpers import normal, quick_jit

LOSSES = {
    "softmax_cross_entropy": optax.softmax_cross_entropy,
    "softmax_cross_entropy_with_integer_labels": (optax.softmax_cross_entropy_with_integer_labels),
    "sigmoid_binary_cross_entropy": optax.sigmoid_binary_cross_entropy,
    "squared_error": optax.squared_error,
}
each_loss = pytest.mark.parametrize("name", LOSSES)
ELEMENTWISE = ("sigmoid_binary_cross_entropy", "squared_error")


def loss_of(name):
    return getattr(lp.losses, name)


def labels_for(name, outputs, seed=1):
    noise = normal(seed, *outputs.shape, dtype=outputs.dtype)
    if name == "softmax_cross_entropy":
        return jax.nn.softmax(noise)
    if name == "softmax_cross_entropy_with_integer_labels":
        return jnp.argmax(noise, -1)
    return jax.nn.sigmoid(noise)


def dense_hessian(name, outputs, labels):
    """Of one example: (K, K)."""
    return jax.hessian(lambda z: jnp.sum(loss_of(name)(z, labels)))(outputs)


@each_loss
@pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 4, 3)])
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16])
def test_values_and_gradients_are_those_of_optax(name, shape, dtype):
    outputs = normal(0, *shape, dtype=dtype)
    labels = labels_for(name, outputs)

    def value_and_grad(loss):
        return jax.jit(jax.value_and_grad(lambda z: loss(z, labels).mean()))(outputs)

    ours, theirs = value_and_grad(loss_of(name)), value_and_grad(LOSSES[name])
    chex.assert_trees_all_equal(ours, theirs)
    assert loss_of(name)(outputs, labels).dtype == dtype


@each_loss
def test_without_curvature_a_marked_loss_compiles_to_optaxs_program(name):
    outputs = normal(0, 5, 3)
    labels = labels_for(name, outputs)

    def program(loss):
        def mean(z, y):
            return loss(z, y).mean()

        inlined = flatten(jax.make_jaxpr(mean)(outputs, labels))
        compiled = jax.jit(jax.value_and_grad(mean)).lower(outputs, labels).compile()
        memory = compiled.memory_analysis()
        # Not the flops: XLA folds a constant into one or the other product.
        return (
            [str(equation.primitive) for equation in inlined.equations],
            dict(compiled.cost_analysis() or {})["bytes accessed"],
            memory and memory.temp_size_in_bytes,
        )

    assert program(loss_of(name)) == program(LOSSES[name])


@each_loss
def test_the_root_is_a_square_root_of_the_hessian_by_columns(name):
    outputs = normal(0, 4)
    labels = labels_for(name, outputs)
    loss, hessian = loss_of(name), dense_hessian(name, outputs, labels)
    root = jax.vmap(lambda v: loss.root_product(outputs, labels, v), out_axes=1)(jnp.eye(4))
    np.testing.assert_allclose(root @ root.T, hessian, atol=1e-12)
    product = jax.vmap(lambda v: loss.hessian_product(outputs, labels, v), out_axes=1)(jnp.eye(4))
    np.testing.assert_allclose(product, hessian, atol=1e-12)
    if name in ELEMENTWISE:
        np.testing.assert_array_equal(root, jnp.diag(jnp.diag(root)))


@each_loss
def test_products_of_a_batch_are_those_of_each_example(name):
    loss, outputs, v = loss_of(name), normal(0, 2, 5, 3), normal(2, 2, 5, 3)
    labels = labels_for(name, outputs)
    for product in (loss.root_product, loss.hessian_product):
        each = jax.vmap(jax.vmap(product))(outputs, labels, v)
        np.testing.assert_allclose(product(outputs, labels, v), each, atol=1e-12)


def test_the_root_of_the_softmax_at_extreme_logits_is_finite():
    logits = jnp.asarray([0.0, 1e4, -1e4])
    for v in jnp.eye(3):
        root = lp.losses.softmax_cross_entropy.root_product(logits, jnp.eye(3)[0], v)
        assert np.all(np.isfinite(root))


def test_labels_that_sum_to_less_than_one_weigh_the_hessian():
    logits, labels = normal(0, 3), jnp.asarray([0.2, 0.1, 0.0])
    loss = lp.losses.softmax_cross_entropy
    root = jax.vmap(lambda v: loss.root_product(logits, labels, v), out_axes=1)(jnp.eye(3))
    hessian = dense_hessian("softmax_cross_entropy", logits, labels)
    np.testing.assert_allclose(root @ root.T, hessian, atol=1e-12)


@each_loss
def test_the_sampler_draws_from_the_predictive_distribution(name):
    """The gradients for its labels have mean zero and the Hessian as their covariance."""
    loss, outputs, n = loss_of(name), jnp.asarray([0.3, -0.8, 1.1]), 40_000

    @quick_jit
    def moments(key):
        many = jnp.broadcast_to(outputs, (n, 3))
        labels = loss.sample(key, many)
        e = jax.grad(lambda z: jnp.sum(loss(z, labels)))(many)
        return labels, e.mean(0), e.T @ e / n

    labels, mean, covariance = moments(jax.random.key(0))
    hessian = dense_hessian(name, outputs, jax.tree.map(lambda y: y[0], labels))
    np.testing.assert_allclose(mean, 0, atol=0.03)
    np.testing.assert_allclose(covariance, hessian, atol=0.05)


# --- a user's own --------------------------------------------------------------------------------


@lp.losses.output_loss(sample=lambda rng, a: jax.random.poisson(rng, jnp.exp(a)).astype(a.dtype))
def poisson(log_rates, counts):
    """Negative log likelihood of counts, but for a constant."""
    return jnp.exp(log_rates) - counts * log_rates


@lp.losses.output_loss()
def pairs(outputs, labels):
    """Couples the two outputs of an example; its Hessian is indefinite."""
    return outputs[..., 0] ** 2 * outputs[..., 1] + labels * outputs[..., 0]


def test_a_marked_function_keeps_its_name_and_its_documentation():
    assert poisson.__name__ == "poisson" and "Negative log" in str(poisson.__doc__)
    assert repr(poisson) == "<OutputLoss: poisson>"
    assert repr(lp.losses.squared_error) == "<OutputLoss: squared_error>"
    np.testing.assert_allclose(poisson(jnp.zeros(3), jnp.ones(3)), 1.0)


def test_the_root_of_ones_own_loss_is_that_of_its_hessians_positive_part():
    outputs, labels, eye = normal(0, 6, 2), normal(1, 6), jnp.eye(2)
    hessians = jax.vmap(jax.hessian(lambda z, y: pairs(z, y)))(outputs, labels)
    values, bases = np.linalg.eigh(hessians)
    assert (values[:, 0] < 0).any() and (values[:, 1] > 0).any()
    positive = np.einsum("nij,nj,nkj->nik", bases, np.maximum(values, 0), bases)
    columns = jnp.stack(
        [pairs.root_product(outputs, labels, jnp.broadcast_to(v, (6, 2))) for v in eye], -1
    )
    found = jnp.einsum("nik,njk->nij", columns, columns)
    np.testing.assert_allclose(found, positive, atol=1e-10)
    for v, column in itertools.product(range(2), range(2)):
        product = pairs.hessian_product(outputs, labels, jnp.broadcast_to(eye[v], (6, 2)))
        np.testing.assert_allclose(product[:, column], hessians[:, v, column], atol=1e-10)


def test_a_loss_with_its_own_derivative_has_a_hessian():
    @jax.custom_vjp
    def square(z):
        return jnp.sum(z**2, -1)

    square.defvjp(lambda z: (square(z), z), lambda z, ct: (2 * z * ct.reshape((*ct.shape, 1)),))
    loss = lp.losses.output_loss()(lambda z, y: square(z))
    v = normal(1, 4, 3)
    np.testing.assert_allclose(loss.hessian_product(normal(0, 4, 3), None, v), 2 * v)
    np.testing.assert_allclose(
        jnp.sum(loss.root_product(normal(0, 4, 3), None, v) ** 2), 2 * jnp.sum(v**2)
    )


# --- errors --------------------------------------------------------------------------------------


def test_sampling_without_a_sampler_is_an_error():
    with pytest.raises(ValueError, match=r"<OutputLoss: pairs> was marked without a sampler"):
        pairs.sample(jax.random.key(0), jnp.ones(2))


def test_losses_that_are_not_one_per_example_are_an_error():
    loss = lp.losses.output_loss()(lambda z, y: jnp.sum((z - y) ** 2, 0))
    with pytest.raises(ValueError, match=r"one loss per example.*\(5, 3\).*\(3,\)"):
        loss(jnp.ones((5, 3)), jnp.ones((5, 3)))
