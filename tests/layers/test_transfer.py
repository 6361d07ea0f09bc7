"""Transfer functions as capture finds them, and LocoProp's Table 2."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st

import locoprop_jax as lp
from locoprop_jax._layers.transfer import TABLE_2, elu, leaky_relu
from tests.helpers import quick_jit

# --- found in a model ----------------------------------------------------------------------------

GRID = np.concatenate([np.linspace(-4, 4, 41), [-50.0, -10.0, 10.0, 50.0]])


def find(after_first_layer, dtype=float, **options):
    """The transfer function found for the first of two layers with `after_first_layer` between."""

    def loss(params, x):
        a = x @ params["first"]["w"] + params["first"]["b"][None]
        return optax.l2_loss(after_first_layer(a) @ params["second"]["w"]).sum(-1).mean()

    params = {
        "first": {"w": jax.ShapeDtypeStruct((3, 4), dtype), "b": jax.ShapeDtypeStruct((4,), dtype)},
        "second": {"w": jax.ShapeDtypeStruct((4, 2), dtype)},
    }
    layers = lp.find_layers(loss, params, jax.ShapeDtypeStruct((5, 3), dtype), **options)
    return layers["first"].transfer


SPELLINGS = {
    "relu": [
        jax.nn.relu,
        lambda a: jnp.maximum(a, 0),
        lambda a: jnp.where(a > 0, a, 0),
        lambda a: jnp.where(a > 0, a, jnp.zeros_like(a)),
        lambda a: jnp.clip(a, min=0),
        lambda a: a * (a > 0).astype(a.dtype),
    ],
    "tanh": [
        jnp.tanh,
        nn.tanh,
        jax.jit(jnp.tanh),
        jax.checkpoint(jnp.tanh),
        jax.vmap(jax.vmap(jnp.tanh)),
    ],
    "sigmoid": [
        jax.nn.sigmoid,
        jax.lax.logistic,
        lambda a: 1 / (1 + jnp.exp(-a)),
        lambda a: (1 + jnp.tanh(a / 2)) / 2,
    ],
    "leaky_relu": [jax.nn.leaky_relu],
    "selu": [jax.nn.selu],
    "gelu": [jax.nn.gelu],
    "gelu (exact)": [lambda a: jax.nn.gelu(a, approximate=False)],
    "silu": [jax.nn.silu, lambda a: a * jax.nn.sigmoid(a)],
    "softplus": [jax.nn.softplus, lambda a: jnp.logaddexp(a, 0.0)],
    "arctan": [jnp.arctan],
    "relu6": [jax.nn.relu6],
    "hard_tanh": [jax.nn.hard_tanh, lambda a: jnp.clip(a, -1, 1)],
    "identity": [lambda a: a],
}


@pytest.mark.parametrize(
    "name, f", [(name, f) for name, fs in SPELLINGS.items() for f in fs], ids=lambda v: ""
)
def test_a_known_transfer_function_is_found_however_it_is_spelled(name, f):
    transfer = find(f)
    assert (transfer.name, transfer.given) == (name, False)
    assert transfer.is_identity == (name == "identity")
    found, expected = quick_jit(lambda a: (transfer(a), f(a[None])[0]))(GRID)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_elu_of_table_2_is_found():
    assert find(jax.nn.elu).name == "elu"


@jax.custom_jvp
def with_own_derivative(a):
    return jnp.where(a > 0, jnp.log1p(jnp.abs(a)), a)


with_own_derivative.defjvps(lambda t, ans, a: t / (1 + jnp.maximum(a, 0)))


def piecewise(a):
    return jnp.where(a < -1, -1.0, jnp.where(a < 0, a, jnp.where(a < 2, a**2, 4 * a - 4)))


@pytest.mark.parametrize(
    "f, is_monotone",
    [
        (with_own_derivative, True),
        (piecewise, True),
        (lambda a: jax.nn.leaky_relu(a, 0.2), True),
        (lambda a: 1.7 * jnp.tanh(0.7 * a), True),
        (lambda a: jnp.tanh(a) + jax.nn.relu(a), True),
        (lambda a: a * jnp.tanh(a), False),
        (lambda a: -a, False),
    ],
    ids=["custom_jvp", "piecewise", "leaky", "scaled", "sum", "even", "negative"],
)
def test_any_other_elementwise_function_is_kept_as_it_is(f, is_monotone):
    transfer = find(f)
    assert transfer.name == "custom" and transfer.is_monotone() == is_monotone

    @quick_jit
    def values_and_slopes(a):
        shapes = a, a[:3], a.reshape(3, 15), a[0]  # the model's shape was (5, 4)
        found = [transfer(x).ravel() for x in shapes]
        slopes = [jax.vmap(jax.grad(g))(a) for g in (transfer, f)]
        return (*found, slopes[0]), (f(a), f(a)[:3], f(a), f(a)[:1], slopes[1])

    for found, expected in zip(*values_and_slopes(GRID), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["tanh", "relu", "leaky_relu", "sigmoid", "softplus", "gelu", "silu", "selu"]
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_low_precision_does_not_hide_a_transfer_function(name, dtype):
    transfer = find(getattr(jax.nn, name), dtype)
    assert transfer.name == name
    # It computes in its argument's precision, not in the model's.
    found, expected = quick_jit(lambda a: (transfer(a), getattr(jax.nn, name)(a)))(GRID)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("name", TABLE_2)
def test_functions_of_table_2_are_non_decreasing(name):
    f = TABLE_2[name].function
    assert lp.Transfer(name, f, is_elementwise=name != "softmax").is_monotone()


@pytest.mark.parametrize("f", [jax.nn.gelu, jax.nn.silu, jnp.sin])
def test_functions_that_decrease_somewhere_are_not_monotone(f):
    assert not find(f).is_monotone()


@pytest.mark.parametrize(
    "f", [lambda a: jnp.exp(a) / (1 + jnp.exp(a)), lambda a: jnp.log1p(jnp.exp(a))]
)
def test_overflow_far_out_does_not_make_a_function_decrease(f):
    assert find(f).is_monotone()


# --- of complex numbers --------------------------------------------------------------------------


def find_complex(function, dtype):
    """The transfer function after a layer of this dtype, under |output|^2."""

    def loss(params, x):
        h = function(x @ params["first"])
        return jnp.square(jnp.abs(h @ params["second"])).sum(-1).mean()

    after = jax.eval_shape(function, jax.ShapeDtypeStruct((), dtype))
    params = {
        "first": jax.ShapeDtypeStruct((3, 4), dtype),
        "second": jax.ShapeDtypeStruct((4, 2), after.dtype),
    }
    return lp.find_layers(loss, params, jax.ShapeDtypeStruct((5, 3), dtype))["first"].transfer


@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
@pytest.mark.parametrize(
    "name, f",
    [
        ("tanh", jnp.tanh),
        ("sin", jnp.sin),
        ("sigmoid", lambda a: 1 / (1 + jnp.exp(-a))),
        ("identity", lambda a: a),
        ("custom", lambda a: a + jnp.log1p(jnp.exp(-2 * a))),  # log cosh, of restricted machines
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_transfer_functions_of_complex_numbers_are_named(name, f, dtype):
    transfer = find_complex(f, dtype)
    assert transfer.name == name
    a = jnp.asarray([0.3 - 0.7j, -2.0 + 0.1j], dtype)
    np.testing.assert_allclose(transfer(a), f(a), rtol=1e-5)


@pytest.mark.parametrize(
    "f, dtype",
    [
        (jnp.abs, complex),
        (lambda a: jnp.exp(1j * a.astype(complex)), float),
        (lambda a: jnp.tanh(a.astype(complex)), float),
    ],
    ids=["modulus", "phase", "tanh"],
)
def test_what_goes_from_real_to_complex_numbers_or_back_has_no_name(f, dtype):
    transfer = find_complex(f, dtype)
    assert transfer.name == "custom"
    a = jnp.asarray([0.3, -2.0], dtype)
    assert transfer(a).dtype == f(a).dtype
    np.testing.assert_allclose(transfer(a), f(a), rtol=1e-12)


def test_functions_with_complex_values_are_not_monotone():
    assert not lp.Transfer("phase", lambda a: jnp.exp(1j * a.astype(complex))).is_monotone()
    assert not find_complex(lambda a: a * jnp.exp(1j * a), complex).is_monotone()


# --- found in a model, again ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "after_first_layer",
    [
        lambda a: a + jnp.sin(a.sum(-1, keepdims=True)),
        lambda a: jnp.tanh(a) + a[:, ::-1],
        lambda a: jnp.tanh(a) * jnp.mean(jnp.exp(a)),
    ],
    ids=["residual", "shuffled", "scaled"],
)
def test_outputs_with_several_uses_pass_through_the_identity_and_the_table_says_so(
    after_first_layer,
):
    transfer = find(after_first_layer)
    assert transfer.is_identity and transfer.note == "used by 2 operations"


def test_what_follows_the_elementwise_piece_is_not_part_of_it():
    key = jax.random.key(0)

    def dropped(a):
        return jnp.where(jax.random.bernoulli(key, 0.5, a.shape), jnp.tanh(a), 0)

    assert find(dropped).name == "tanh"
    assert find(lambda a: jnp.tanh(a) * jnp.arange(4.0)[None]).name == "tanh"
    assert find(lambda a: (lambda h: h + h[:, ::-1])(jnp.tanh(a))).name == "tanh"


@pytest.mark.parametrize(
    "rearranged",
    [
        lambda a: jnp.tanh(a.T).T,
        lambda a: jnp.tanh(a.reshape(5, 2, 2)).reshape(5, 4),
    ],
    ids=["transposed", "reshaped"],
)
def test_a_transfer_function_of_rearranged_outputs_is_found(rearranged):
    assert find(rearranged).name == "tanh"


@pytest.mark.parametrize(
    "after_first_layer",
    [jax.nn.softmax, lambda a: a[:, ::-1], lambda a: a + jnp.arange(20.0).reshape(5, 4)],
    ids=["softmax", "shuffled", "residual"],
)
def test_an_identity_says_why(after_first_layer):
    transfer = find(after_first_layer)
    assert transfer.is_identity and transfer.note


def test_a_transfer_function_that_is_given_replaces_the_one_found():
    def smooth_relu(a):
        return jax.nn.softplus(10 * a) / 10

    transfer = find(jax.nn.gelu, transfer={"first": smooth_relu})
    assert transfer.given and transfer.function is smooth_relu and transfer.is_monotone()
    assert find(jax.nn.gelu, transfer={"first": jnp.tanh}).name == "tanh"
    assert find(jax.nn.gelu, transfer={"second": jnp.tanh}).name == "gelu"


@pytest.mark.parametrize(
    "f, name, is_monotone",
    [
        (jax.nn.softmax, "softmax", True),
        (lambda a: 3 * jax.nn.softmax(2 * a, -1), "custom", True),
        (lambda a: a - a.mean(-1, keepdims=True), "custom", True),
        (lambda a: a[..., ::-1], "custom", False),
        (lambda a: a - 2 * a.mean(-1, keepdims=True), "custom", False),
    ],
)
def test_a_function_of_rows_can_be_given(f, name, is_monotone):
    transfer = find(jax.nn.gelu, transfer={"first": f})
    assert (transfer.name, transfer.is_elementwise) == (name, False)
    assert transfer.is_monotone() == is_monotone
    assert find(jax.nn.gelu, transfer={"first": jnp.tanh}).is_elementwise


# --- Table 2 -------------------------------------------------------------------------------------

by_entries = pytest.mark.parametrize("name", [name for name in TABLE_2 if name != "softmax"])
numbers = st.floats(-50, 50)


def test_table_2_is_complete():
    paper = {"step", "identity", "relu", "leaky_relu", "sigmoid", "softmax", "tanh", "arctan"}
    assert set(TABLE_2) == paper | {"softplus", "elu"}


@by_entries
def test_integrals_differentiate_to_their_transfer_functions(name):
    f, integral = TABLE_2[name].function, TABLE_2[name].integral
    a = jnp.linspace(-50, 50, 401)[1::2]  # without the kink at 0
    gradient, expected = quick_jit(lambda a: (jax.vmap(jax.grad(integral))(a), f(a)))(a)
    np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-12)


@by_entries
def test_integrals_and_functions_differentiate_numerically(name):
    f, integral = TABLE_2[name].function, TABLE_2[name].integral
    a, h = np.linspace(-8, 8, 64), 1e-5  # an even number: without the kink at 0
    above, below, slope = quick_jit(lambda a: (integral(a + h), integral(a - h), f(a)))(a)
    np.testing.assert_allclose((above - below) / (2 * h), slope, rtol=1e-7, atol=1e-7)
    if name != "step":
        above, below, slope = quick_jit(
            lambda a: (f(a + h), f(a - h), TABLE_2[name].derivative(a))
        )(a)
        np.testing.assert_allclose((above - below) / (2 * h), slope, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["step", "softmax"])
def test_a_derivative_that_does_not_exist_is_an_error(name):
    with pytest.raises(ValueError, match=f"'{name}' has no derivative"):
        TABLE_2[name].derivative(jnp.zeros(3))


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 2.5])
@pytest.mark.parametrize("row", [leaky_relu, elu])
def test_parameters_of_table_2_enter_function_and_integral(row, scale):
    row, a = row(scale), np.linspace(-8, 8, 64)
    below = scale * (a if row.name == "leaky_relu" else np.expm1(a))
    np.testing.assert_allclose(row.function(a), np.where(a > 0, a, below), rtol=1e-12)
    found = jax.vmap(jax.grad(row.integral))(a)
    np.testing.assert_allclose(found, row.function(a), rtol=1e-12)
    loss = lp.matching_loss(row, a, a[::-1])
    assert np.all(loss >= -1e-12)


def test_the_integral_of_softmax_differentiates_to_it():
    rows = np.random.default_rng(0).normal(size=(5, 4)) * 20
    found = jax.vmap(jax.grad(TABLE_2["softmax"].integral))(rows)
    np.testing.assert_allclose(found, jax.nn.softmax(rows, -1), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_matching_loss_of_softmax_is_the_relative_entropy(dtype):
    rng = np.random.default_rng(0)
    a, target = rng.uniform(-50, 50, size=(2, 20, 4))
    p, q = (np.exp(x - x.max(1, keepdims=True)) for x in (target, a))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    expected = (p * (np.log(p) - np.log(q))).sum(1)
    found = lp.matching_loss("softmax", a.astype(dtype), target.astype(dtype))
    assert found.dtype == dtype and np.all(found >= -8 * np.finfo(dtype).eps * 100)
    tolerance = 1e-5 if dtype == np.float32 else 1e-12
    np.testing.assert_allclose(found.sum(1), expected, rtol=tolerance, atol=tolerance)

    def of_row(a, target):
        return lp.matching_loss("softmax", a, target).sum()

    gradient = jax.vmap(jax.grad(of_row))(a, target)
    np.testing.assert_allclose(gradient, q - p, atol=1e-12)


@by_entries
def test_the_gradient_of_a_matching_loss_is_the_difference_of_the_transfer_functions(name):
    f = TABLE_2[name].function
    a, target = np.linspace(-50, 50, 300), np.linspace(30, -40, 300)
    gradient = jax.vmap(jax.grad(lambda a, t: lp.matching_loss(name, a, t)))
    found, expected = quick_jit(lambda a, t: (gradient(a, t), f(a) - f(t)))(a, target)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def assert_not_negative(x, scale, dtype=np.float64):
    assert np.all(np.asarray(x) >= -8 * np.finfo(dtype).eps * np.asarray(scale))


@by_entries
@given(
    a=st.tuples(numbers, numbers, numbers).map(np.asarray), share=st.floats(0, 1), target=numbers
)
def test_matching_losses_are_convex_not_negative_and_zero_at_the_target(name, a, share, target):
    a[2] = target
    middle = share * a[0] + (1 - share) * a[1]
    first, second, at_target, between = lp.matching_loss(
        name, np.append(a, middle), np.full(4, target)
    )
    size = 1 + 100 * 50
    assert abs(at_target) <= 1e-12
    assert_not_negative([first, second, between], size)
    assert_not_negative(share * first + (1 - share) * second - between, size)


def test_the_matching_loss_of_the_identity_is_the_squared_loss():
    a, target = np.linspace(-3, 4, 15), np.linspace(2, -5, 15)
    found = lp.matching_loss("identity", a, target)
    np.testing.assert_allclose(found, (a - target) ** 2 / 2, atol=1e-12)


def test_the_matching_loss_of_the_sigmoid_is_the_excess_cross_entropy():
    a, target = np.linspace(-3, 4, 15), np.linspace(2, -5, 15)
    y = jax.nn.sigmoid(target)
    excess = optax.sigmoid_binary_cross_entropy(a, y) - optax.sigmoid_binary_cross_entropy(
        target, y
    )
    np.testing.assert_allclose(lp.matching_loss("sigmoid", a, target), excess, atol=1e-12)


@by_entries
def test_integrals_are_accurate_in_float32_from_minus_to_plus_50(name):
    integral = TABLE_2[name].integral
    a = np.concatenate([np.linspace(-50, 50, 101), np.linspace(-1, 1, 21)])
    single, exact = quick_jit(lambda a: (integral(a.astype(jnp.float32)), integral(a)))(a)
    assert single.dtype == np.float32
    small = name in ("elu", "tanh", "arctan")  # differences of numbers of order one
    np.testing.assert_allclose(single, exact, rtol=1e-5, atol=1e-6 if small else 0)


@by_entries
def test_matching_losses_are_finite_and_accurate_in_float32(name):
    f, integral = TABLE_2[name].function, TABLE_2[name].integral
    a, target = (g.ravel() for g in np.meshgrid(*2 * [np.linspace(-50, 50, 41)]))

    @quick_jit
    def losses(a, target):
        single = lp.matching_loss(name, a.astype(jnp.float32), target.astype(jnp.float32))
        size = jnp.abs(integral(a)) + jnp.abs(integral(target)) + jnp.abs(f(target) * (a - target))
        return single, lp.matching_loss(name, a, target), size

    # The losses are differences: their error is relative to what they are differences of.
    single, exact, size = map(np.asarray, losses(a, target))
    assert np.all(np.isfinite(single))
    assert np.all(np.abs(single - exact) <= 4 * np.finfo(np.float32).eps * (1 + size))
    assert_not_negative(single, 1 + size, np.float32)


def test_a_matching_loss_of_an_unknown_function_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match=r"knows the transfer functions step, .*; got 'gelu'"):
        lp.matching_loss("gelu", jnp.zeros(3), jnp.zeros(3))
