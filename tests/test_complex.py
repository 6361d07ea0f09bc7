"""Which methods take complex layers, and how the others refuse them.

That those which take them are right is in `neurons/test_complex.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import locoprop_jax as lp
from tests.test_contract import CAPTURE, METHODS

TAKE_COMPLEX = {"foof", "lnb", "lnb of joint length"}
REFUSE = [name for name in METHODS if name not in TAKE_COMPLEX]


def loss_fn(params, x):
    """Real parameters meet complex data as complex numbers."""
    encoder, decoder = jax.tree.map(lambda p: p.astype(x.dtype), (params["encoder"], params["out"]))
    code = jnp.tanh(x @ encoder["kernel"] + encoder["bias"][None])
    return jnp.square(jnp.abs(code @ decoder["kernel"] - x)).sum(-1).mean()


def init_params(dtype=complex):
    return {
        "encoder": {"kernel": jnp.ones((3, 2), dtype) / 5, "bias": jnp.zeros(2, dtype)},
        "out": {"kernel": jnp.ones((2, 3), dtype)},
    }


def batch():
    parts = np.random.default_rng(0).normal(size=(2, 6, 3))
    return jnp.asarray(parts[0] + 1j * parts[1])


@functools.cache
def layers(dtype=complex):
    return lp.find_layers(loss_fn, init_params(dtype), batch())


def build(name, dtype=complex):
    method = METHODS[name]
    return method.build(layers(dtype), method.learning_rate, **method.options)


def step(tx, params, state, x):
    loss, grads, captured = CAPTURE(loss_fn)(params, x)
    line = {"value": loss, "grad": grads, "value_fn": lambda p: loss_fn(p, x)}
    updates, state = tx.update(grads, state, params, captured=captured, **line)
    return optax.apply_updates(params, updates), state


def shapes(tree):
    return jax.eval_shape(lambda: tree)


def test_the_transfer_function_is_known():
    assert layers()["encoder"].transfer.name == layers(float)["encoder"].transfer.name == "tanh"


# --- methods -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [complex, float])
@pytest.mark.parametrize("name", sorted(TAKE_COMPLEX))
def test_a_method_takes_complex_layers_and_keeps_all_dtypes(name, dtype):
    tx, params = build(name, dtype), init_params(dtype)
    state = jax.eval_shape(tx.init, params)
    assert jax.eval_shape(functools.partial(step, tx), params, state, batch()) == (
        shapes(params),
        state,
    )


@pytest.mark.parametrize("name", REFUSE)
def test_a_method_refuses_complex_parameters_by_name(name):
    tx = build(name)
    with pytest.raises(ValueError, match=r"takes real parameters, but 'encoder/bias' is complex"):
        tx.init(init_params())


@pytest.mark.parametrize("name", REFUSE)
def test_a_method_refuses_real_layers_with_complex_outputs_by_name(name):
    tx, params = build(name, float), init_params(float)
    reason = "real layers, but the outputs of 'encoder' are complex|needs real outputs of the netw"
    with pytest.raises(ValueError, match=reason):
        jax.eval_shape(functools.partial(step, tx), params, tx.init(params), batch())


# --- curvature -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "curvature", ["fisher_mc", "fisher_empirical", "ggn_mc", "ggn_exact", "ggn_output"]
)
def test_the_curvature_of_complex_layers_is_refused_by_name(curvature):
    capture = lp.value_grad_and_capture(loss_fn, curvature=curvature)
    rng = {"rng": jax.random.key(0)} if curvature.endswith("_mc") else {}
    with pytest.raises(ValueError, match=r"that of real layers, but the outputs of 'encoder' are"):
        capture(init_params(), batch(), **rng)


FUNCTIONS = {
    "fisher_product": lambda *args: lp.fisher_product(*args, curvature="empirical"),
    "fisher_norm": lambda *args: lp.fisher_norm(*args, curvature="empirical"),
    "inverse_fisher_product": lambda *args: lp.inverse_fisher_product(
        *args, 1.0, curvature="empirical"
    ),
    "sample_laplace": lambda *args: lp.sample_laplace(
        jax.random.key(0), *args, 1.0, 10, curvature="empirical"
    ),
    "hessian_blocks": lambda layers, captured, params: lp.hessian_blocks(layers, params, captured),
}


@pytest.mark.parametrize("dtype", [complex, float])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_captured_arrays_refuse_complex_layers_by_name(name, dtype):
    def call(params, x):
        _, _, captured = lp.value_grad_and_capture(loss_fn)(params, x)
        return FUNCTIONS[name](layers(dtype), captured, params)

    with pytest.raises(ValueError, match=rf"`{name}` takes real .*'encoder.*complex"):
        jax.eval_shape(call, init_params(dtype), batch())


def test_products_refuse_complex_parameters_and_outputs_by_name():
    x, key = batch(), jax.random.key(0)
    with pytest.raises(ValueError, match=r"`gauss_newton_vector_product` takes real.*'encoder/bi"):
        lp.gauss_newton_vector_product(loss_fn, init_params(), x)
    with pytest.raises(ValueError, match=r"`fisher_vector_product` takes real.*'encoder/bias'"):
        lp.fisher_vector_product(loss_fn, init_params(), x, rng=key)
    with pytest.raises(ValueError, match=r"`gauss_newton_vector_product` needs real outputs"):
        lp.gauss_newton_vector_product(loss_fn, init_params(float), x)


def test_with_real_outputs_as_the_error_says_a_product_is_that_of_the_gauss_newton_matrix():
    def outputs(params):
        z = jnp.tanh(batch() @ params["w"].astype(complex))
        return jnp.concatenate([z.real, z.imag], -1)

    def loss(params):
        return lp.losses.squared_error(outputs(params), jnp.zeros((6, 4))).sum(-1).mean()

    params = {"w": jnp.arange(6.0).reshape(3, 2) / 10}
    product = lp.gauss_newton_vector_product(loss, params)
    jacobian = jax.jacobian(outputs)(params)["w"].reshape(-1, 6)
    found = jnp.ravel(product({"w": jnp.ones((3, 2))})["w"])
    np.testing.assert_allclose(found, jacobian.T @ jacobian @ np.ones(6) * 2 / 6, rtol=1e-9)


# --- what the errors say to do -------------------------------------------------------------------


def split_loss(params, re, im):
    """The first layer of `loss_fn`, with a real parameter each for real and imaginary parts."""
    outputs = jax.lax.complex(
        re @ params["re"] - im @ params["im"], re @ params["im"] + im @ params["re"]
    )
    return jnp.square(jnp.abs(jnp.tanh(outputs) - 1)).sum(-1).mean()


@pytest.mark.parametrize("name", ["locoprop_s", "kfac"])
def test_a_layer_written_with_real_parameters_is_taken_by_all(name):
    x, kernel = batch(), np.random.default_rng(1).normal(size=(2, 3, 2))
    params = {"re": jnp.asarray(kernel[0]), "im": jnp.asarray(kernel[1])}
    found = lp.find_layers(split_loss, params, x.real, x.imag)
    assert [(layer.kind, layer.uses) for layer in found.values()] == [("dense", 2), ("dense", 2)]
    tx = METHODS[name].build(found, METHODS[name].learning_rate, **METHODS[name].options)

    @jax.jit
    def update(params):
        _, grads, captured = lp.value_grad_and_capture(split_loss)(params, x.real, x.imag)
        return grads, tx.update(grads, tx.init(params), params, captured=captured)[0]

    grads, updates = update(params)
    # It descends, along the gradient of the complex kernel.
    assert sum(jnp.vdot(grads[part], updates[part]) for part in params) < 0
    whole = jax.grad(
        lambda w: jnp.square(jnp.abs(jnp.tanh(x @ w) - 1)).sum(-1).mean(),
    )(jax.lax.complex(params["re"], params["im"]))
    np.testing.assert_allclose(jax.lax.complex(grads["re"], -grads["im"]), whole, rtol=1e-9)
