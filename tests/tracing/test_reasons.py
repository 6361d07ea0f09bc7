"""Each reason why a parameter is in no layer, and that its remedy works."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import locoprop_jax as lp
from locoprop_jax._tracing import reasons
from locoprop_jax._tracing.reasons import Reason
from tests.helpers import assert_captured, block_gradient, normal

X, Y = normal(0, 6, 3), normal(1, 6, 4)
FIRST, LAST = normal(2, 3, 4), normal(3, 4, 4)


def with_middle(middle):
    """A network whose middle is `middle(parameters, inputs)`."""

    def loss_fn(p, x, y):
        return jnp.mean((jnp.tanh(middle(p["own"], x @ p["first"])) @ p["last"] - y) ** 2)

    return loss_fn


def parameters(shapes):
    own = {name: normal(4 + i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    return {"first": FIRST, "own": own, "last": LAST}


def broadcast(p, h):
    return jnp.broadcast_to(p[None], (len(h), *p.shape))


def started(state, h):
    return jax.lax.scan(lambda s, row: (jnp.tanh(s + row), None), state, h)[0]


def started_once(p, h):
    return h + started(p["s"], h)[None]


def started_by_example(p, h):
    states = broadcast(p["s"], h)
    return h + jax.vmap(started, (0, None))(states, h)


def loop_with_masks(before):
    masks = jnp.stack([jnp.tril(jnp.ones((4, 4))), jnp.triu(jnp.ones((4, 4)))])

    def middle(p, h):
        if before:
            return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["w"] * masks)[0]
        return jax.lax.scan(
            lambda h, given: (jnp.tanh(h @ (given[0] * given[1])), None), h, (p["w"], masks)
        )[0]

    return middle


@jax.custom_vjp
def clipped(w, h):
    """A product whose gradients are clipped."""
    return h @ w


clipped.defvjp(
    lambda w, h: (h @ w, (w, h)),
    lambda saved, g: (jnp.clip(saved[1].T @ g, -0.1, 0.1), g @ saved[0].T),
)


@jax.custom_vjp
def clip(h):
    return h


clip.defvjp(lambda h: (h, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))


def repeated(p, h):
    return jax.lax.while_loop(
        lambda state: state[0] < 2,
        lambda state: (state[0] + 1, jnp.tanh(state[1] @ p["w"])),
        (0, h),
    )[1]


def positive(p):
    return p["w"] @ p["w"].T + jnp.eye(4)


def conjugate_gradients(p, h):
    return jax.scipy.sparse.linalg.cg(lambda z: z @ positive(p), h)[0]


def steps(p, h):
    return jax.lax.fori_loop(0, 3, lambda _, z: z - 0.1 * (z @ positive(p) - h), h)


def fixed_point(p, h):
    def solve(f, z):
        return jax.lax.fori_loop(0, 5, lambda _, z: z - f(z), z)

    def tangent(g, y):
        return jnp.linalg.solve(jax.jacobian(g)(y).reshape(y.size, -1), y.ravel()).reshape(y.shape)

    return jax.lax.custom_root(lambda z: z - jnp.tanh(0.1 * z @ p["w"] + h), h, solve, tangent)


def fixed_point_by_steps(p, h):
    return jax.lax.fori_loop(0, 5, lambda _, z: jnp.tanh(0.1 * z @ p["w"] + h), h)


def convolved(data, kernel):
    return jax.lax.conv_general_dilated(
        data, kernel, (1,), "SAME", dimension_numbers=("NCH", "OIH", "NCH")
    )


def moved_over(p, h):
    """The parameter is what a kernel of data moves over."""
    return h + convolved(p["w"][None, None], h.reshape(1, 1, -1)[:, :, :3])[0]


def moving(p, h):
    return h + convolved(h[:, None], p["w"][None, None])[:, 0]


def in_groups(by_batch):
    def middle(p, h):
        """Each half of the examples has a kernel of its own."""
        n = len(h) // 2
        numbers = ("NCH", "OIH", "NCH")
        if by_batch:
            options = {"batch_group_count": 2}
            data = h[:, None]  # (batch, 1, pixels)
        else:
            options = {"feature_group_count": 2}
            data = jnp.stack([h[:n], h[n:]], 1)
        result = jax.lax.conv_general_dilated(
            data, p["w"][:, None], (1,), "SAME", dimension_numbers=numbers, **options
        )
        return jnp.concatenate([result[:, 0], result[:, 1]])

    return middle


def two_rows(p, h):
    def take(i):
        return jax.lax.dynamic_slice(p["t"], (i, 0), (2, 4)).sum(0)

    return h + jax.vmap(take)(jnp.argmax(h, 1))


def two_rows_by_ids(p, h):
    ids = jnp.argmax(h, 1)
    return h + p["t"][jnp.stack([ids, ids + 1])].sum(0)


def half_rows(p, h):
    def take(i):
        return jax.lax.dynamic_slice(p["t"], (i, 0), (1, 4))[0]

    return h + jax.vmap(take)(jnp.argmax(h, 1))


def overlapping(p, h):
    return jnp.tanh(h @ p["w"][:4]) @ p["w"][1:]


def apart(p, h):
    return jnp.tanh(h @ p["w"]) @ p["v"]


# reason: (the middle, its parameters' shapes, the reason in words, a word of the remedy,
#          the same as the remedy says, its parameters' shapes)
SQUARE = {"w": (4, 4)}
VECTOR = {"s": (4,)}
REASONS = {
    "LOOP_START": (
        started_once,
        VECTOR,
        "a loop starts from it",
        "Broadcast it over the examples",
        started_by_example,
        VECTOR,
    ),
    "changed": (
        loop_with_masks(before=False),
        {"w": (2, 4, 4)},
        "`mul` changes it, anew at each turn of a loop, before it meets the data in `dot_general`",
        "before the loop",
        loop_with_masks(before=True),
        {"w": (2, 4, 4)},
    ),
    "own_derivative": (
        lambda p, h: clipped(p["w"], h),
        SQUARE,
        "inside a function with its own derivative (`custom_vjp_call`)",
        "outside of that function",
        lambda p, h: clip(h @ p["w"]),
        SQUARE,
    ),
    "no_layer": (
        lambda p, h: jnp.maximum(h, p["s"][None]),
        VECTOR,
        "no layer that is a `max` of data and a parameter",
        "`jnp.broadcast_to`",
        lambda p, h: jnp.maximum(h, broadcast(p["s"], h)),
        VECTOR,
    ),
    "no_layer: div": (
        lambda p, h: p["s"][None] / h,
        VECTOR,
        "a `div` of data and a parameter",
        "reciprocal of the data",
        lambda p, h: p["s"][None] * (1 / h),
        VECTOR,
    ),
    "no_layer: while": (
        repeated,
        SQUARE,
        "a `while` of data and a parameter",
        "a fixed number of times",
        lambda p, h: jax.lax.fori_loop(0, 2, lambda _, h: jnp.tanh(h @ p["w"]), h),
        SQUARE,
    ),
    "no_layer: solve": (
        lambda p, h: jnp.linalg.solve(positive(p), h.T).T,
        SQUARE,
        "a `custom_linear_solve` of data and a parameter",
        "`jnp.linalg.inv`",
        lambda p, h: h @ jnp.linalg.inv(positive(p)),
        SQUARE,
    ),
    "no_layer: solve by steps": (
        conjugate_gradients,
        SQUARE,
        "a `custom_linear_solve` of data and a parameter",
        "steps as a `scan`",
        steps,
        SQUARE,
    ),
    "no_layer: root": (
        fixed_point,
        SQUARE,
        # Until JAX 0.11 a root is found inside of a function with a derivative of its own.
        " of data and a parameter" if jax.__version_info__ >= (0, 11) else "its own derivative",
        "steps as a `scan`" if jax.__version_info__ >= (0, 11) else "Apply the layer outside",
        fixed_point_by_steps,
        SQUARE,
    ),
    "MOVED_OVER": (
        moved_over,
        {"w": (4,)},
        "moves a kernel of data over",
        "second operand",
        moving,
        {"w": (3,)},
    ),
    "BATCH_IN_GROUPS": (
        in_groups(by_batch=True),
        {"w": (2, 3)},
        "takes its batch in groups",
        "feature_group_count",
        in_groups(by_batch=False),
        {"w": (2, 3)},
    ),
    "NOT_ROWS": (
        two_rows,
        {"t": (6, 4)},
        "more or less than rows of a table",
        "whole rows by one index each",
        two_rows_by_ids,
        {"t": (6, 4)},
    ),
    "PARTS_OF_ROWS": (
        half_rows,
        {"t": (6, 8)},
        "parts of the rows of a table",
        "then their parts",
        lambda p, h: h + p["t"][jnp.argmax(h, 1)][:, :4],
        {"t": (6, 8)},
    ),
    "used_differently": (
        overlapping,
        {"w": (5, 4)},
        "it is used 2 times (dense, dense)",
        "a parameter of its own at each",
        apart,
        {"w": (4, 4), "v": (4, 4)},
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_the_remedy_of_a_reason_works(case):
    middle, shapes, reason, remedy, cured, own = REASONS[case]
    (name,) = shapes
    match = rf"own/{name} \[.*\]: .*{re.escape(reason)}.*{re.escape(remedy)}"
    with pytest.raises(ValueError, match=match):
        lp.find_layers(with_middle(middle), parameters(shapes), X, Y)
    layers, _ = assert_captured(with_middle(cured), parameters(own), X, Y)
    assert not layers.uncaptured


def test_each_reason_is_tested():
    """But for those that say that there is nothing to capture, which test_layers has."""
    named = {name for name, value in vars(reasons).items() if isinstance(value, Reason)}
    made = {
        name
        for name, value in vars(reasons).items()
        if callable(value) and getattr(value, "__module__", "") == reasons.__name__
    }
    tested = {case.partition(":")[0] for case in REASONS}
    assert named | made == tested | {"NO_GRADIENT", "NEVER_MEETS_DATA", "Reason", "follows"}


# --- what follows a refused parameter ------------------------------------------------------------


def gradients_of_layers(loss_fn, params, layers):
    """X'E of each layer found, and the gradients of its block by JAX."""
    _, grads, captured = lp.value_grad_and_capture(loss_fn)(params, X, Y)
    chex.assert_trees_all_close(grads, jax.grad(loss_fn)(params, X, Y), rtol=1e-10)
    for name, layer in layers.items():
        found = block_gradient(captured[name], layer.bias is not None)
        np.testing.assert_allclose(found, layers.block(grads, name), rtol=1e-9, atol=1e-12)


FOLLOWING = {
    "its bias": (lambda p, h: clipped(p["w"], h) + p["b"][None], (4,), None),
    "its bias in a loop": (
        lambda p, h: jax.lax.fori_loop(
            0, 2, lambda _, h: jnp.tanh(clipped(p["w"], h) + p["b"][None]), h
        ),
        (4,),
        None,
    ),
    "a second use of a parameter that it makes a kernel with": (
        lambda p, h: clipped(p["w"], h) @ (p["w"] + p["b"]) @ p["b"],
        (4, 4),
        "it is used 2 times (dense, dense)",
    ),
    "the scale of its kernel": (
        lambda p, h: clipped(p["w"], h) @ (p["w"] * p["b"][None]),
        (4,),
        "it belongs to 'own/w', which is in no layer because it is used inside a function",
    ),
}


@pytest.mark.parametrize("case", FOLLOWING)
def test_what_follows_a_refused_parameter_says_so_or_is_in_a_layer(case):
    middle, shape, reason = FOLLOWING[case]
    loss_fn, params = with_middle(middle), parameters({"w": (4, 4), "b": shape})
    layers = lp.find_layers(loss_fn, params, X, Y, on_uncaptured="pass")
    found = {other.path: other.reason for other in layers.uncaptured}
    if reason is None:
        assert set(found) == {"own/w"} and set(layers) == {"first", "own", "last"}
    else:
        assert set(found) == {"own/w", "own/b"} and found["own/b"].startswith(reason)
    gradients_of_layers(loss_fn, params, layers)


# --- functions with their own derivative ---------------------------------------------------------


@jax.custom_vjp
def fused(w, h, y):
    """A layer and its cross entropy that keep no logits."""
    logits = h @ w
    return -jnp.mean(jnp.sum(y * jax.nn.log_softmax(logits), -1))


def _fused_backward(saved, g):
    w, h, y = saved
    errors = g * (jax.nn.softmax(h @ w) * y.sum(-1, keepdims=True) - y) / len(y)
    return h.T @ errors, errors @ w.T, -g * jax.nn.log_softmax(h @ w) / len(y)


fused.defvjp(lambda w, h, y: (fused(w, h, y), (w, h, y)), _fused_backward)


@jax.custom_jvp
def layer(w, b, h):
    return jnp.tanh(h @ w + b[None])


@layer.defjvp
def _layer_jvp(primals, tangents):
    (w, _, h), (dw, db, dh) = primals, tangents
    out = layer(*primals)
    return out, (1 - out**2) * (h @ dw + dh @ w + db[None])


RULED = {"w": normal(4, 3, 4), "b": normal(5, 4), "last": LAST}


def ruled(p, x, y):
    return fused(p["last"], layer(p["w"], p["b"], x), jax.nn.softmax(y))


def unruled(p, x, y):
    h = jnp.tanh(x @ p["w"] + p["b"][None])
    return -jnp.mean(jnp.sum(jax.nn.softmax(y) * jax.nn.log_softmax(h @ p["last"]), -1))


@pytest.mark.parametrize("curvature", [None, "ggn_exact"])
def test_a_function_whose_rule_is_its_own_derivative_is_looked_into(curvature):
    assert_captured(ruled, RULED, X, Y)
    with_rules, without = (
        lp.value_grad_and_capture(loss_fn, curvature=curvature)(RULED, X, Y)
        for loss_fn in (ruled, unruled)
    )
    chex.assert_trees_all_close(with_rules[:2], without[:2], rtol=1e-10)
    arrays = [jax.tree.leaves(captured) for captured in (with_rules[2], without[2])]
    chex.assert_trees_all_close(*arrays, rtol=1e-8, atol=1e-12)


def test_the_value_and_gradients_are_those_of_the_rule():
    """The rule's cotangents reach what is before it, and its residuals are what it says."""
    calls = []

    @jax.custom_vjp
    def counted(w, h):
        return h @ w

    def backward(saved, g):
        calls.append(1)
        return saved[1].T @ g, g @ saved[0].T

    counted.defvjp(lambda w, h: (h @ w, (w, h)), backward)
    loss_fn = with_middle(lambda p, h: counted(p["w"], h))
    params = parameters(SQUARE)
    lp.find_layers(loss_fn, params, X, Y)
    before = len(calls)
    lp.value_grad_and_capture(loss_fn)(params, X, Y)
    assert len(calls) > before
    assert_captured(loss_fn, params, X, Y)


@jax.custom_vjp
def saving(h):
    """Data alone: keeps nothing but its input."""
    return jnp.sin(jnp.cos(h))


saving.defvjp(lambda h: (saving(h), h), lambda h, g: (-g * jnp.cos(jnp.cos(h)) * jnp.sin(h),))


@pytest.mark.parametrize(
    "function",
    [
        saving,
        clip,
        jax.nn.silu,
        lambda h: h / jax.vmap(lambda row: optax.safe_norm(row, 1e-6))(h)[:, None],
    ],
    ids=["memory", "clip", "silu", "safe_norm"],
)
def test_a_function_of_data_alone_may_have_any_derivative(function):
    layers, _ = assert_captured(
        with_middle(lambda p, h: function(h @ p["w"])), parameters(SQUARE), X, Y
    )
    assert not layers.uncaptured


@jax.custom_vjp
def rounded(w):
    return jnp.round(w)


rounded.defvjp(lambda w: (jnp.round(w), None), lambda _, g: (g,))


def test_a_kernel_may_have_any_derivative():
    """Rounded, with a straight-through estimator."""
    params = parameters(SQUARE)
    loss_fn = with_middle(lambda p, h: h @ rounded(p["w"]))
    layers, captured = assert_captured(loss_fn, params, X, Y)
    assert not layers.uncaptured
    grads = jax.grad(loss_fn)(params, X, Y)
    tx = lp.scale_by_foof(layers, damping=0.3, relative=False)
    updates, _ = tx.update(grads, tx.init(params), params, captured=captured)
    x = np.asarray(X @ FIRST)
    second = x.T @ x / len(x) + 0.3 * np.eye(4)
    expected = np.linalg.solve(second, grads["own"]["w"])
    np.testing.assert_allclose(updates["own"]["w"], expected, rtol=1e-5)


@jax.custom_vjp
def solved(w, h):
    """What solvers do: steps that JAX cannot differentiate, and a rule of their own."""
    return repeated({"w": w}, h)


def _refuse(saved, g):
    raise NotImplementedError("this rule takes no numbers made up")


solved.defvjp(lambda w, h: (solved(w, h), None), _refuse)


def test_a_rule_that_cannot_be_compared_is_refused():
    loss_fn = with_middle(lambda p, h: solved(p["w"], h))
    with pytest.raises(ValueError, match=r"own/w .* its own derivative .*DirectAdjoint\(\)"):
        lp.find_layers(loss_fn, parameters(SQUARE), X, Y)


@pytest.mark.parametrize("place", ["at the top", "in a loop"])
def test_entries_put_in_their_places_in_a_kernel(place):
    i, j = np.triu_indices(4, 1)

    def middle(p, h):
        w = jnp.zeros((4, 4)).at[i, j].set(p["w"])
        return h @ (w + w.T)

    def repeatedly(p, h):
        return jax.lax.fori_loop(0, 2, lambda _, h: jnp.tanh(middle(p, h)), h)

    loss_fn = with_middle(middle if place == "at the top" else repeatedly)
    layers, _ = assert_captured(loss_fn, parameters({"w": (6,)}), X, Y)
    assert [layer.kind for layer in layers.values()] == ["dense"] * 3


IN_LOOPS = {
    "mask": lambda w: w * jnp.tril(jnp.ones((4, 4))),
    "computed mask": lambda w: jnp.where(MASK > 0, w, 0.0),
}
MASK = jnp.asarray(np.tril(np.ones((4, 4))))


@pytest.mark.parametrize("case", IN_LOOPS)
def test_kernels_in_a_loop_take_what_is_the_same_each_time(case):
    def middle(p, h):
        def step(h, own):
            return jnp.tanh(h @ IN_LOOPS[case](own["w"]) + own["b"][None]), None

        return jax.lax.scan(step, h, p)[0]

    params = parameters({"w": (2, 4, 4), "b": (2, 4)})
    layers, _ = assert_captured(with_middle(middle), params, X, Y)
    assert layers["own"].stack == 2 and layers["own"].bias is not None


MORE_KERNELS = {
    "made by a loop": (
        lambda p, h: h @ jax.lax.fori_loop(0, 2, lambda _, w: jnp.tanh(w) @ w, p["w"]),
        SQUARE,
    ),
    "repeated entries of a scale": (lambda p, h: h * jnp.tile(p["w"], 2)[None], {"w": (2,)}),
    "repeated entries of a bias": (lambda p, h: h + jnp.tile(p["w"], 2)[None], {"w": (2,)}),
    "transposed positions": (lambda p, h: h * p["w"].T, {"w": (4, 6)}),
    "a multiple, broadcast": (
        lambda p, h: h @ jnp.broadcast_to(2 * p["w"][:, None], (4, 4)),
        {"w": (4,)},
    ),
}


@pytest.mark.parametrize("case", MORE_KERNELS)
def test_more_arrays_made_of_parameters(case):
    middle, shapes = MORE_KERNELS[case]
    layers, _ = assert_captured(with_middle(middle), parameters(shapes), X, Y)
    assert not layers.uncaptured


# --- no layer at all -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", [lp.foof, lp.lnb, lp.scale_by_kfac])
def test_a_loss_without_layers_is_left_to_the_fallback(method):
    def loss_fn(p, x):
        return jnp.mean(clipped(p["w"], x) ** 2)

    params, x = {"w": LAST}, normal(5, 6, 4)
    with pytest.raises(
        ValueError, match=r"(?s)no layer in this loss function:\n  w .*with_fallback"
    ):
        lp.find_layers(loss_fn, params, x)
    with pytest.warns(UserWarning, match=r"leaves all parameters to the fallback:\n  w "):
        layers = lp.find_layers(loss_fn, params, x, on_uncaptured="pass")
    assert not layers and [other.path for other in layers.uncaptured] == ["w"]
    _, grads, captured = lp.value_grad_and_capture(loss_fn)(params, x)
    chex.assert_trees_all_close(grads, jax.grad(loss_fn)(params, x))
    tx = lp.with_fallback(method(layers), layers, optax.sgd(0.5))
    updates, _ = tx.update(grads, tx.init(params), params, captured=captured)
    chex.assert_trees_all_close(updates["w"], -0.5 * grads["w"])
