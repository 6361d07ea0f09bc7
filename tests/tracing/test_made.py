"""Kernels that are made of parameters before they meet the data, against dense Jacobians."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import locoprop_jax as lp
from tests.helpers import assert_captured, normal

X, Y = normal(0, 7, 4), normal(1, 7, 2)
LAST = {"kernel": normal(2, 4, 2), "bias": normal(3, 2)}
MASK = jnp.asarray(np.tril(np.ones((4, 4))))
TABLE = jnp.array([[0, 1, 2, 3], [1, 0, 3, 2], [2, 3, 0, 1], [3, 2, 1, 0]])  # a group's products
DRIFT = normal(20, 4)


def weight_norm(p):
    return p["g"][None] * p["v"] / jnp.linalg.norm(p["v"], axis=0, keepdims=True)


def spectral_norm(p):
    """By one step of power iteration, as running statistics would have it."""
    u = jax.lax.stop_gradient(DRIFT / jnp.linalg.norm(DRIFT))
    v = jax.lax.stop_gradient(u @ p["w"] / jnp.linalg.norm(u @ p["w"]))
    return p["w"] / (u @ p["w"] @ v)


# name: (the kernel, of parameters of these shapes)
KERNELS = {
    "masked": (lambda p: p["w"] * MASK, {"w": (4, 4)}),
    "masked by select": (lambda p: jnp.where(MASK > 0, p["w"], 0), {"w": (4, 4)}),
    "gathered by symmetry": (lambda p: p["w"][TABLE], {"w": (4,)}),
    "flipped": (lambda p: p["w"][::-1, ::-1], {"w": (4, 4)}),
    "padded": (lambda p: jnp.pad(p["w"], ((1, 1), (0, 1))), {"w": (2, 3)}),
    "concatenated": (lambda p: jnp.concatenate([p["a"], p["b"]], 1), {"a": (4, 1), "b": (4, 3)}),
    "stacked": (lambda p: jnp.stack([p["a"], p["b"]], 1), {"a": (4,), "b": (4,)}),
    "symmetric": (lambda p: (p["w"] + p["w"].T) / 2, {"w": (4, 4)}),
    "sum": (lambda p: p["a"] + p["b"][None], {"a": (4, 4), "b": (4,)}),
    "broadcast": (lambda p: jnp.broadcast_to(p["w"][:, None], (4, 4)), {"w": (4,)}),
    "weight norm": (weight_norm, {"g": (4,), "v": (4, 4)}),
    "low rank": (lambda p: p["a"] @ p["b"], {"a": (4, 2), "b": (2, 4)}),
    "spectral norm": (spectral_norm, {"w": (4, 4)}),
    "standardised": (
        lambda p: (p["w"] - p["w"].mean(0)[None]) / p["w"].std(0)[None],
        {"w": (4, 4)},
    ),
    "positive": (lambda p: jax.nn.softplus(p["w"]), {"w": (4, 4)}),
}


def model(kernel):
    def loss_fn(p, x, y):
        h = jnp.tanh(x @ kernel(p["own"]))
        return jnp.mean((h @ p["last"]["kernel"] + p["last"]["bias"][None] - y) ** 2)

    return loss_fn


def parameters(shapes):
    own = {name: 0.5 + normal(10 + i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    return {"own": own, "last": LAST}


@pytest.mark.parametrize("case", KERNELS)
def test_a_step_is_the_kernels_brought_back_by_the_dense_jacobian(case):
    """FOOF's direction of the kernel, by the pseudoinverse J+ = (J'J)+ J' and its transpose."""
    kernel, shapes = KERNELS[case]
    if case == "stacked":
        kernel, shapes = (lambda p: jnp.stack([p["a"], p["b"]] * 2, 1)), shapes
    loss_fn, params = model(kernel), parameters(shapes)
    layers, captured = assert_captured(loss_fn, params, X, Y)
    assert not any(other.has_gradient for other in layers.uncaptured)
    layer = next(iter(layers.values()))
    assert (layer.kind, layer.d_in, layer.d_out) == ("dense", 4, 4)

    grads = jax.grad(loss_fn)(params, X, Y)
    tx = lp.scale_by_foof(layers, damping=0.3, relative=False)
    direction, _ = tx.update(grads, tx.init(params), params, captured=captured)

    flat, back = jax.flatten_util.ravel_pytree(params["own"])
    jacobian = np.asarray(jax.jacobian(lambda f: kernel(back(f)).ravel())(flat))
    inverse = np.linalg.pinv(jacobian, rcond=1e-9)
    x = np.asarray(X)
    second = x.T @ x / len(x) + 0.3 * np.eye(4)
    gradient = inverse.T @ np.asarray(jax.flatten_util.ravel_pytree(grads["own"])[0])
    step = np.linalg.solve(second, gradient.reshape(4, 4))
    expected = inverse @ step.ravel()
    found = jax.flatten_util.ravel_pytree(direction["own"])[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


# --- other kinds of layers -----------------------------------------------------------------------


def dense_after(h, p):
    return h @ p["last"]["kernel"] + p["last"]["bias"][None]


OTHERS = {
    "1 + scale": (lambda p, x: x * (1 + p["s"])[None], {"s": (4,)}, {"scale"}),
    "exponential scale": (lambda p, x: x * jnp.exp(p["s"])[None], {"s": (4,)}, {"scale"}),
    "quotient": (lambda p, x: x / p["s"][None], {"s": (4,)}, {"scale"}),
    "subtracted bias": (lambda p, x: x - p["b"][None], {"b": (4,)}, {"bias"}),
    "subtracted data": (lambda p, x: p["b"][None] - x, {"b": (4,)}, {"bias"}),
    "positive bias": (lambda p, x: x + jax.nn.softplus(p["b"])[None], {"b": (4,)}, {"bias"}),
    "bias of a layer by subtraction": (
        lambda p, x: x @ p["w"] - p["b"][None],
        {"w": (4, 4), "b": (4,)},
        {"dense"},
    ),
    "scaled table": (
        lambda p, x: (p["t"] * jnp.linspace(1, 2, 5)[:, None])[jnp.argmax(x, 1)],
        {"t": (5, 4)},
        {"embedding"},
    ),
    "batch normalisation as Keras writes it, in inference": (
        lambda p, x: (
            x * (p["gamma"] * jax.lax.rsqrt(DRIFT**2 + 1e-3))[None]
            + (p["beta"] - DRIFT * (p["gamma"] * jax.lax.rsqrt(DRIFT**2 + 1e-3)))[None]
        ),
        {"gamma": (4,), "beta": (4,)},
        {"scale"},
    ),
    "batch normalisation as Keras writes it, in training": (
        lambda p, x: (
            x * (inv := p["gamma"] * jax.lax.rsqrt(x.var(0) + 1e-3))[None]
            + (p["beta"] - x.mean(0) * inv)[None]
        ),
        {"gamma": (4,), "beta": (4,)},
        None,
    ),
    "masked convolution": (
        lambda p, x: jax.lax.conv_general_dilated(
            x[..., None],
            p["w"] * jnp.array([1.0, 1.0, 0.0])[:, None, None],
            (1,),
            "SAME",
            dimension_numbers=("NWC", "WIO", "NWC"),
        )[..., 0],
        {"w": (3, 1, 1)},
        {"conv"},
    ),
    "transposed convolution with a flipped kernel": (
        lambda p, x: jax.lax.conv_transpose(
            x[..., None],
            p["w"],
            (1,),
            "SAME",
            dimension_numbers=("NWC", "WIO", "NWC"),
            transpose_kernel=True,
        )[..., 0],
        {"w": (3, 1, 1)},
        {"conv"},
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_kinds_are_made_of_parameters_too(case):
    own, shapes, kinds = OTHERS[case]

    def loss_fn(p, x, y):
        return jnp.mean((dense_after(jnp.tanh(own(p["own"], x)), p) - y) ** 2)

    layers, _ = assert_captured(loss_fn, parameters(shapes), X, Y)
    assert not any(other.has_gradient for other in layers.uncaptured)
    found = {layer.kind for name, layer in layers.items() if name != "last"}
    assert kinds is None or found == kinds


# --- in loops, and from the batch ----------------------------------------------------------------


def test_masks_and_norms_inside_of_a_loop():
    params = {"w": normal(2, 4, 4), "v": normal(3, 4, 4), "out": normal(4, 4, 2)}

    def loss_fn(p, x, y):
        def step(h, x):
            norm = p["v"] / jnp.linalg.norm(p["v"], axis=0, keepdims=True)
            return jnp.tanh(x @ (p["w"] * jnp.tril(jnp.ones((4, 4)))) + h @ norm), None

        h, _ = jax.lax.scan(step, jnp.zeros((7, 4)), jnp.stack([x, -x, 2 * x]))
        return jnp.mean((h @ p["out"] - y) ** 2)

    layers, _ = assert_captured(loss_fn, params, X, Y)
    assert {name: layer.rows for name, layer in layers.items()} == {"w": 3, "v": 3, "out": 1}


def test_layers_that_a_loop_stacks_have_masks_of_their_own():
    params = {"w": normal(2, 3, 4, 4), "out": normal(4, 4, 2)}

    def loss_fn(p, x, y):
        def step(h, w):
            return jnp.tanh(h @ (w / jnp.linalg.norm(w, axis=0, keepdims=True))), None

        return jnp.mean((jax.lax.scan(step, x, p["w"])[0] @ p["out"] - y) ** 2)

    layers, _ = assert_captured(loss_fn, params, X, Y)
    assert layers["w"].stack == 3


def test_a_mask_that_is_an_argument():
    def loss_fn(p, x, y, mask):
        return model(lambda own: own["w"] * mask)(p, x, y)

    layers, _ = assert_captured(loss_fn, parameters({"w": (4, 4)}), X, Y, MASK)
    assert not layers.uncaptured


def test_parts_of_a_fused_kernel_with_weight_norm():
    def loss_fn(p, x, y):
        q, k = jnp.split(weight_norm(p["own"]), 2, 1)
        return jnp.mean((jnp.tanh(x @ q) * (x @ k) @ p["out"] - y) ** 2)

    params = {"own": {"g": normal(2, 6), "v": normal(3, 4, 6)}, "out": normal(4, 3, 2)}
    with pytest.raises(ValueError, match="used 2 times"):
        lp.find_layers(loss_fn, params, X, Y)


def test_a_regularizer_toward_other_weights_is_no_layer():
    """Elastic weight consolidation: arrays that parameters meet entry by entry, without rows."""

    def loss_fn(p, x, y, importance, before):
        fit = model(lambda own: own["w"])(p, x, y)
        return fit + jnp.sum(importance * (p["own"]["w"] - before) ** 2)

    params = parameters({"w": (4, 4)})
    layers = lp.find_layers(loss_fn, params, X, Y, jnp.ones((4, 4)), jnp.zeros((4, 4)))
    assert {layer.kind for layer in layers.values()} == {"dense"}


def test_a_deviation_that_divides_and_whose_logarithm_is_added_is_a_layer_at_its_own_value():
    def loss_fn(p, x, y):
        error = (x @ p["w"] - y) / jnp.exp(p["log_sigma"])[None]
        return jnp.mean(0.5 * error**2 + p["log_sigma"][None])

    params = {"w": normal(2, 4, 2), "log_sigma": normal(3, 2)}
    layers, captured = assert_captured(loss_fn, params, X, Y)
    assert layers["log_sigma"].kind == "bias"
    assert captured["log_sigma"].cotangents.shape == (2, 1, 1, 1)


def test_entries_gathered_one_by_one_into_a_triangular_kernel():
    rows, columns = np.tril_indices(4)

    def loss_fn(p, x, y):
        kernel = (
            jnp.zeros((4, 4)).at[rows, columns].set(jax.nn.softplus(p["w"])[jnp.arange(10) % 4])
        )
        return model(lambda own: kernel)(p, x, y)

    assert_captured(loss_fn, {"w": normal(2, 4), "own": {}, "last": LAST}, X, Y)


def test_in_low_precision_no_step_goes_into_directions_that_leave_the_kernel_as_it_is():
    """Found by random programs: rounding errors of the Jacobian were inverted, and large."""

    def loss_fn(p, x):
        return jnp.mean(jnp.tanh(x @ (p["scale"][:, None] * p["kernel"])) ** 2)

    rng = np.random.default_rng(0)
    shapes = {"scale": (3,), "kernel": (3, 4)}
    params = {name: rng.normal(size=shape).astype(jnp.bfloat16) for name, shape in shapes.items()}
    x = rng.normal(size=(8, 3)).astype(jnp.bfloat16)
    found = []
    for dtype in (jnp.float64, jnp.bfloat16):
        own, data = jax.tree.map(lambda leaf, dtype=dtype: jnp.asarray(leaf, dtype), (params, x))
        layers = lp.find_layers(loss_fn, own, data)
        tx = lp.scale_by_foof(layers)
        _, grads, captured = lp.value_grad_and_capture(loss_fn)(own, data)
        step, _ = tx.update(grads, tx.init(own), own, captured=captured)
        slope, size = optax.tree.vdot(grads, step), optax.tree.norm(step)
        found.append((float(slope), float(size)))
    (slope, size), (slope_low, size_low) = found
    assert size_low < 1.1 * size
    assert slope_low > 0.8 * slope
