"""Weights used transposed besides: their rows stand for what the gradient and the metric are."""

import chex
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import locoprop_jax as lp
from tests.helpers import block_gradient, normal, quick_jit

EXAMPLES, LENGTH, WORDS, WIDTH = 6, 5, 7, 3


def close(actual, desired):
    chex.assert_trees_all_close(actual, desired, rtol=1e-8, atol=1e-12)


PARAMS = {"table": normal(0, WORDS, WIDTH), "mix": normal(1, WIDTH, WIDTH)}
BATCH = jnp.asarray(np.random.default_rng(2).integers(0, WORDS, (2, EXAMPLES, LENGTH)))


def hidden(params, words):
    return jnp.tanh(params["table"][words] @ params["mix"])


def loss_fn(params, words, labels):
    logits = hidden(params, words) @ params["table"].T
    return lp.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def captured_of(**options):
    capture = quick_jit(lp.value_grad_and_capture(loss_fn, **options))
    return capture(PARAMS, *BATCH)[1:]


@pytest.fixture(scope="module")
def layers():
    return lp.find_layers(loss_fn, PARAMS, *BATCH)


def test_a_table_looked_up_and_the_output_layer_is_one_layer(layers):
    assert not layers.uncaptured
    layer = layers["table"]
    assert (layer.kind, layer.d_in, layer.d_out, layer.uses) == ("tied", WIDTH, WORDS, 2)
    assert layer.rows == LENGTH + WIDTH and layer.is_output


def table_metric():
    """(H + (looked up / words) I) / N, with H of the output layer's inputs, N of both uses."""
    h = hidden(PARAMS, BATCH[0]).reshape(-1, WIDTH)
    looked_up = EXAMPLES * LENGTH
    return (h.T @ h + looked_up / WORDS * jnp.eye(WIDTH)) / (len(h) + looked_up)


def test_foof_divides_by_the_metric_of_both_uses(layers):
    grads, captured = captured_of()
    damping = 0.3
    tx = lp.scale_by_foof(layers, damping=damping, relative=False, decay=0.0)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS, captured=captured)
    expected = jnp.linalg.solve(table_metric() + damping * jnp.eye(WIDTH), grads["table"].T).T
    close(updates["table"], expected)


def test_boosting_to_the_end_is_foof(layers):
    grads, captured = captured_of()
    tx = lp.scale_by_lnb(layers, ridge=0.3, relative=False, online=False, iterations=20)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS, captured=captured)
    expected = jnp.linalg.solve(table_metric() + 0.3 * jnp.eye(WIDTH), grads["table"].T).T
    scale = jnp.sum(updates["table"] * expected) / jnp.sum(jnp.square(expected))
    close(updates["table"], scale * expected)


def test_with_all_words_alike_the_metric_is_that_of_all_changes_of_outputs(layers):
    """Each word is looked up as often: what look-ups count is then exact."""
    words = jnp.tile(jnp.arange(WORDS)[:, None], (1, LENGTH))
    batch = (words, words)
    _, _, captured = lp.value_grad_and_capture(loss_fn)(PARAMS, *batch)
    change = normal(3, WORDS, WIDTH)
    moved = hidden(PARAMS, words) @ change.T
    expected = jnp.sum(jnp.square(moved)) + jnp.sum(jnp.square(change[words]))
    image = captured["table"].rows(float).push(change.T)
    close(jnp.sum(jnp.square(image)), expected)


def test_its_fisher_is_that_of_all_examples_gradients(layers):
    """Exact, between both uses and all layers: not only the sum of theirs."""
    _, captured = captured_of(curvature="fisher_empirical")
    flat, restore = jax.flatten_util.ravel_pytree(PARAMS)

    def of_example(words, labels):
        grad = jax.grad(loss_fn)(PARAMS, words[None], labels[None])
        return jax.flatten_util.ravel_pytree(grad)[0] / EXAMPLES

    columns = jax.vmap(of_example)(*BATCH)
    vector = normal(4, len(flat))
    terms = EXAMPLES * LENGTH
    expected = terms * columns.T @ (columns @ vector)
    product = lp.fisher_product(layers, captured, restore(vector))
    close(jax.flatten_util.ravel_pytree(product)[0], expected)


def test_micro_batches_are_captured_as_the_batch_that_they_make(layers):
    parts = jax.tree.map(lambda x: x.reshape(3, 2, LENGTH), (BATCH[0], BATCH[1]))
    capture = lp.accumulate(lp.value_grad_and_capture(loss_fn, curvature="fisher_empirical"))
    arrays = capture(PARAMS, *parts)[2]["table"]
    whole = captured_of(curvature="fisher_empirical")[1]["table"]
    for name in ("inputs", "outputs", "cotangents", "curvature"):
        one, other = getattr(arrays, name), getattr(whole, name)
        close(one, other)
    for name in ("output_rows", "cotangent_rows"):
        one, other = getattr(arrays, name)(float), getattr(whole, name)(float)
        close(one, other)
    close(arrays.rows(float), whole.rows(float))
    assert arrays.rows(float).count == whole.rows(float).count == 2 * EXAMPLES * LENGTH


def test_a_share_of_the_examples_has_a_share_of_the_look_ups():
    arrays = captured_of()[1]["table"]
    whole, half = (arrays.rows(float, examples) for examples in (None, EXAMPLES // 2))
    assert whole.count == 2 * half.count
    close(jnp.square(whole.unit), 2 * jnp.square(half.unit))


@pytest.mark.parametrize("name", ["locoprop_s", "locoprop_m", "foof", "lnb", "kfac"])
def test_steps_lower_the_loss(name, layers):
    make = {
        "locoprop_s": lambda: lp.locoprop_s(layers),
        "locoprop_m": lambda: lp.locoprop_m(layers, gamma=0.1),
        "foof": lambda: lp.foof(layers, 0.1, inverse_period=2),
        "lnb": lambda: lp.lnb(layers, 0.1),
        "kfac": lambda: lp.kfac(layers),
    }
    tx = make[name]()
    options = {"curvature": "ggn_mc"} if name == "kfac" else {}
    capture = lp.value_grad_and_capture(loss_fn, **options)

    @quick_jit
    def run(params):
        def step(carry, key):
            params, state = carry
            rng = {"rng": key} if options else {}
            loss, grads, captured = capture(params, *BATCH, **rng)
            more = {"value": loss, "grad": grads, "value_fn": lambda p: loss_fn(p, *BATCH)}
            updates, state = tx.update(grads, state, params, captured=captured, **more)
            return (optax.apply_updates(params, updates), state), loss

        carry = (params, tx.init(params))
        return jax.lax.scan(step, carry, jax.random.split(jax.random.key(0), 20))[1]

    losses = run(PARAMS)
    assert losses[-1] < 0.9 * losses[0], losses


def test_of_several_uses_the_ones_with_fewer_inputs_are_the_layers_own():
    """A lookup, a mean of looked up rows and the output layer, in this order."""

    def loss_fn(params, words, labels):
        share = jax.nn.softmax(labels @ jnp.ones((LENGTH, WORDS)))
        h = params["table"][words].mean(1) + share @ params["table"]
        return jnp.mean(jnp.square(jnp.tanh(h) @ params["table"].T))

    params, batch = {"table": PARAMS["table"]}, (BATCH[0], BATCH[1].astype(float))
    layers = lp.find_layers(loss_fn, params, *batch)
    assert (layers["table"].d_in, layers["table"].uses) == (WIDTH, 3)
    _, grads, captured = lp.value_grad_and_capture(loss_fn)(params, *batch)
    arrays = captured["table"]
    close(block_gradient(arrays, False), grads["table"].T)
    close(arrays.rows(float).pull(arrays.cotangent_rows(float)), grads["table"].T)


@pytest.mark.filterwarnings("ignore::locoprop_jax.CostWarning")
def test_exact_columns_of_words_stand_alone():
    """K-FAC's factor adds up words, not what several of them make of one column."""
    arrays = captured_of(curvature="ggn_exact")[1]["table"]
    assert arrays.curvature.shape[0] == LENGTH * WORDS


def test_the_number_of_terms_is_that_of_the_words():
    assert captured_of()[1].terms == EXAMPLES * LENGTH


def test_averaged_inputs_are_refused(layers):
    with pytest.raises(ValueError, match="weights of table are used transposed"):
        lp.scale_by_foof(layers, shared="reduce")


def test_tables_are_tied_where_the_batch_is_not_known_too():
    layers = lp.find_layers(lambda params: loss_fn(params, *BATCH), PARAMS)
    assert layers["table"].kind == "tied" and layers["table"].rows is None


def test_biases_of_both_uses_are_layers_of_their_own():
    """As in an autoencoder whose decoder is its encoder transposed."""

    def loss_fn(params, x):
        code = jnp.tanh(x @ params["kernel"] + params["code"][None])
        return jnp.mean(jnp.square(code @ params["kernel"].T + params["bias"][None] - x))

    params = {"kernel": normal(0, 4, 2), "code": normal(1, 2), "bias": normal(2, 4)}
    layers = lp.find_layers(loss_fn, params, normal(3, 5, 4))
    kinds = {name: layer.kind for name, layer in layers.items()}
    assert kinds == {"code": "bias", "kernel": "tied", "bias": "bias"}
    _, grads, captured = lp.value_grad_and_capture(loss_fn)(params, normal(3, 5, 4))
    for name, layer in layers.items():
        gradient = block_gradient(captured[name], layer.bias is not None)
        close(gradient, layers.block(grads, name))
