"""Curvature cotangents against dense Jacobians and Hessians, exact expectations by enumeration."""

import dataclasses
import functools
import itertools
import math
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings

import locoprop_jax as lp
from locoprop_jax._tracing import separable
from locoprop_jax._tracing.program import flatten
from tests.helpers import (
    FRONT_ENDS,
    HEADS,
    TRANSFERS,
    WRAPPERS,
    Network,
    normal,
    problems,
    quick_jit,
    spread,
)

MARKED = {
    "squared": lambda a, y: 0.5 * lp.losses.squared_error(a, y).sum(-1),
    "sigmoid": lambda a, y: lp.losses.sigmoid_binary_cross_entropy(a, y).sum(-1),
    "softmax": lp.losses.softmax_cross_entropy,
}


def marked(network):
    """The network's loss with a marked loss in place of Optax's."""

    def loss(params, x, y):
        value = MARKED[network.head](network.apply(params, x), y).mean()
        if not network.decay:
            return value
        return value + network.decay / 2 * sum(jnp.sum(p**2) for p in jax.tree.leaves(params))

    return loss


def assert_close(tree, expected, tolerance=1e-9):
    chex.assert_trees_all_close(tree, expected, rtol=tolerance, atol=tolerance)


def second_moment(c):
    """Sum of C'C over samples and rows of (samples, batch, shared, d_out)."""
    return jnp.einsum("sbro,sbrp->op", c, c)


def rows(x):
    return x.reshape(-1, x.shape[-1])


def positive_part(hessian):
    values, bases = jnp.linalg.eigh(hessian)
    return (bases * jnp.maximum(values, 0)[None]) @ bases.T


class Dense:
    """A small network whose pre-activations can be perturbed, written for dense Jacobians.

    params: [(kernel, bias), ...]; `body` maps the rows of the last layer's outputs to what the
    loss takes, `loss` that to a scalar.
    """

    def __init__(self, params, x, loss, transfer=jnp.tanh, between=lambda h: h):
        self.params, self.x, self.loss = params, x, loss
        self.transfer, self.between = transfer, between

    def outputs(self, perturbations=None, params=None):
        h = self.x
        params = self.params if params is None else params
        for i, (kernel, bias) in enumerate(params):
            a = h @ kernel
            a = a + spread(bias, a)
            if perturbations is not None:
                a = a + perturbations[i]
            last = i == len(params) - 1
            h = a if last else self.between(self.transfer(a))
        return h

    def loss_fn(self, params, x):
        network = Dense(params, x, self.loss, self.transfer, self.between)
        return self.loss(network.outputs())

    def zeros(self):
        h, shapes = self.x, []
        for kernel, _ in self.params:
            shapes.append(jnp.zeros((*h.shape[:-1], kernel.shape[1])))
            h = shapes[-1]
        return shapes

    def gauss_newton(self, project=True):
        """Sum over rows of each layer's pre-activation Gauss-Newton block J'HJ."""
        return quick_jit(lambda: self._gauss_newton(project))()

    def _gauss_newton(self, project):
        z = self.outputs()
        hessian = jax.hessian(lambda z: self.loss(z.reshape(self.outputs().shape)))(z.ravel())
        hessian = positive_part(hessian) if project else hessian
        jacobians = jax.jacobian(self.outputs)(self.zeros())
        blocks = []
        for jacobian, zero in zip(jacobians, self.zeros(), strict=True):
            d = zero.shape[-1]
            j = jacobian.reshape(z.size, zero.size // d, d)
            blocks.append(jnp.einsum("zro,zy,yrp->op", j, hessian, j))
        return blocks


def layers_of(*sizes, seed=0):
    return [
        (normal(seed + i, a, b), normal(seed + 50 + i, b))
        for i, (a, b) in enumerate(itertools.pairwise(sizes))
    ]


def captured_blocks(loss_fn, params, *args, curvature="ggn_exact", **kwargs):
    def blocks(params, *args):
        capture = lp.value_grad_and_capture(loss_fn, curvature=curvature, **kwargs)
        captured = capture(params, *args)[2]
        return [second_moment(arrays.curvature) for arrays in captured.values()]

    return quick_jit(blocks)(params, *args)


def of_network(problem):
    """The dense network of a problem of helpers.py, and the order of its layers."""
    network = problem.network
    layers = lp.find_layers(network.loss, problem.params, *problem.batch)
    x, y = problem.batch
    blocks = [layers.block(problem.params, name) for name in layers]
    parts = [(b[:-1], b[-1]) if network.bias else (b, jnp.zeros(b.shape[1])) for b in blocks]

    def loss(z):
        return HEADS[network.head].jax(z, y).mean()

    return Dense(parts, x, loss, TRANSFERS[network.transfer].jax)


# --- exact columns -------------------------------------------------------------------------------


@settings(max_examples=10)
@given(problems())
def test_the_exact_columns_of_a_marked_loss_give_the_gauss_newton_blocks(problem):
    found = captured_blocks(marked(problem.network), problem.params, *problem.batch)
    assert_close(found, of_network(problem).gauss_newton())


@settings(max_examples=8)
@given(problems())
def test_the_exact_columns_of_any_other_loss_give_the_gauss_newton_blocks(problem):
    found = captured_blocks(problem.loss_fn, problem.params, *problem.batch)
    assert_close(found, of_network(problem).gauss_newton())


@pytest.mark.parametrize("head", sorted(HEADS))
@pytest.mark.parametrize("is_marked", [True, False])
def test_columns_are_as_many_as_the_outputs_of_an_example(head, is_marked):
    network = Network(head=head, widths=(3, 4, 2), tokens=3)
    loss = marked(network) if is_marked else network.loss
    capture = lp.value_grad_and_capture(loss, curvature="ggn_exact")
    captured = jax.eval_shape(capture, network.params(), *network.data())[2]
    shapes = [arrays.uses[0].curvature.shape for arrays in captured.values()]
    assert shapes == [(2, 5, 3, 4), (2, 5, 3, 2)]


def weighted(a, y, weights):
    """The terms of a batch weighed in every way that stays linear."""
    terms = lp.losses.softmax_cross_entropy(a, jax.nn.softmax(y))
    terms = jnp.where(weights > 0.5, terms, 0.0)
    return jnp.dot(weights, terms) / jnp.sum(weights) + 0.3 * terms[1:3].sum() + terms[0] / 7


X, Y, WEIGHTS = normal(0, 5, 3), normal(1, 5, 2), jnp.abs(normal(2, 5))
TOKENS = normal(3, 5, 4, 3), normal(4, 5, 4, 2)
PARAMS = layers_of(3, 4, 2)


@pytest.mark.parametrize(
    "x, loss",
    [
        (X, lambda z: MARKED["softmax"](z, jax.nn.softmax(Y)).sum()),
        (X, lambda z: MARKED["sigmoid"](z, jax.nn.sigmoid(Y)).mean()),
        (X, lambda z: lp.losses.sigmoid_binary_cross_entropy(z, jax.nn.sigmoid(Y)).mean()),
        (X, lambda z: weighted(z, Y, WEIGHTS)),
        (X, lambda z: 0.3 * MARKED["squared"](z, Y).mean() + weighted(z, Y, WEIGHTS)),
        (X, lambda z: jax.vmap(lp.losses.softmax_cross_entropy, (1, 0))(z.T, jnp.abs(Y)).sum()),
        (X, lambda z: jax.vmap(lp.losses.softmax_cross_entropy, (0, 1))(z, jnp.abs(Y).T).sum()),
        (X, lambda z: lp.losses.softmax_cross_entropy(2 * jnp.tanh(z), jax.nn.softmax(Y)).mean()),
        (TOKENS[0], lambda z: MARKED["softmax"](z, jax.nn.softmax(TOKENS[1])).mean()),
        (TOKENS[0], lambda z: MARKED["softmax"](z.mean(1), jax.nn.softmax(Y)).mean()),
        (TOKENS[0], lambda z: MARKED["softmax"](rows(z), jax.nn.softmax(rows(TOKENS[1]))).sum()),
        (
            TOKENS[0],
            lambda z: jax.vmap(lp.losses.softmax_cross_entropy, (1, 1))(
                z, jax.nn.softmax(TOKENS[1])
            ).mean(),
        ),
        (X, lambda z: jax.checkpoint(jax.jit(MARKED["softmax"]))(z, jax.nn.softmax(Y)).mean()),
        (
            X,
            lambda z: lp.losses.softmax_cross_entropy_with_integer_labels(z, Y.argmax(-1)).mean(),
        ),
        # Not marked.
        (X, lambda z: optax.softmax_cross_entropy_with_integer_labels(z, Y.argmax(-1)).mean()),
        (X, lambda z: optax.huber_loss(z, Y).mean()),
        (X, lambda z: (WEIGHTS * optax.softmax_cross_entropy(z, jax.nn.softmax(Y))).sum()),
        (X, lambda z: jax.vmap(lambda z, y: jnp.sum((z - y) ** 2))(z, Y).mean()),
        (TOKENS[0], lambda z: optax.softmax_cross_entropy(z.mean(1), jax.nn.softmax(Y)).mean()),
        (TOKENS[0], lambda z: optax.softmax_cross_entropy(rows(z), jnp.abs(rows(TOKENS[1]))).sum()),
        (X, lambda z: jax.nn.logsumexp(z.reshape(5, 1, 2), axis=(1, 2)).sum()),
        (X, lambda z: sum(jnp.sum(part**2) for part in jnp.split(z, 2, axis=1))),
        (X[:1], lambda z: MARKED["softmax"](z, jax.nn.softmax(Y[:1])).mean()),
    ],
)
def test_exact_blocks_under_every_reduction(x, loss):
    dense = Dense(PARAMS, x, loss)
    # What the loss does before the marked loss belongs to the network: its own Hessian is J'HJ.
    found = captured_blocks(dense.loss_fn, PARAMS, x)
    if loss.__code__.co_names.count("tanh"):
        # The Gauss-Newton matrix splits at the marked loss: after 2 tanh.
        z = dense.outputs()
        inner = jax.hessian(lambda u: MARKED["softmax"](u, jax.nn.softmax(Y)).mean())(
            2 * jnp.tanh(z)
        )
        slopes = 2 * (1 - jnp.tanh(z) ** 2)
        expected = jnp.einsum("bk,bkbl,bl->kl", slopes, inner, slopes)
        assert_close(found[-1], expected)
        return
    assert_close(found, dense.gauss_newton())


def test_positions_that_meet_in_the_network_have_columns_of_their_own():
    mix = normal(9, 4, 4)

    def between(h):  # attention without the softmax
        return jnp.einsum("ts,bsd->btd", mix, h)

    y = jax.nn.softmax(TOKENS[1])
    dense = Dense(PARAMS, TOKENS[0], lambda z: MARKED["softmax"](z, y).mean(), between=between)
    assert_close(captured_blocks(dense.loss_fn, PARAMS, TOKENS[0]), dense.gauss_newton())
    capture = lp.value_grad_and_capture(dense.loss_fn, curvature="ggn_exact")
    captured = jax.eval_shape(capture, PARAMS, TOKENS[0])[2]
    assert [a.uses[0].curvature.shape[0] for a in captured.values()] == [4 * 2] * 2


def test_positions_may_meet_in_a_loop_and_have_columns_of_their_own():
    """A recurrent network that is read in its cell: no later turn is in an earlier one's column."""

    def loss(p, x, y):
        def cell(h, x):
            h = jnp.tanh(x @ p["in"] + h @ p["state"])
            return h, h @ p["out"]

        outputs = jax.lax.scan(cell, jnp.zeros((len(x), 2)), jnp.moveaxis(x, 1, 0))[1]
        return MARKED["softmax"](jnp.moveaxis(outputs, 0, 1), jax.nn.softmax(y)).mean()

    params = {"in": normal(0, 3, 2), "state": normal(1, 2, 2), "out": normal(2, 2, 2)}
    capture = lp.value_grad_and_capture(loss, curvature="ggn_exact")
    captured = jax.eval_shape(capture, params, *TOKENS)[2]
    assert {a.uses[0].curvature.shape[0] for a in captured.values()} == {4 * 2}
    assert not captured.has_joint_columns


def words(p, x, y, is_mixed):
    """Each word's loss by itself, words joined with the examples as language models have it."""
    h = jnp.tanh(x @ p["kernel"])
    h = jnp.cumsum(h, 1) if is_mixed else h
    return MARKED["softmax"](rows(h @ p["out"]), jax.nn.softmax(rows(y))).mean()


WORDS = {"kernel": normal(0, 3, 4), "out": normal(1, 4, 2)}


def test_positions_joined_with_the_examples_share_columns_where_they_do_not_meet():
    loss = functools.partial(words, is_mixed=False)
    capture = lp.value_grad_and_capture(loss, curvature="ggn_exact")
    captured = jax.eval_shape(capture, WORDS, *TOKENS)[2]
    assert [a.uses[0].curvature.shape[0] for a in captured.values()] == [2, 2]
    assert captured.has_joint_columns
    params = [(kernel, jnp.zeros(kernel.shape[1])) for kernel in WORDS.values()]
    y = jax.nn.softmax(rows(TOKENS[1]))
    dense = Dense(params, TOKENS[0], lambda z: MARKED["softmax"](rows(z), y).mean())
    assert_close(captured_blocks(loss, WORDS, *TOKENS), dense.gauss_newton())


def test_a_use_in_a_loop_that_is_the_same_for_all_examples_is_refused():
    """Found by random programs: one pull mixed the examples at rows of a table."""
    order = np.array([2, 0, 1])

    def loss(p, x, y):
        h = jax.lax.map(lambda x: jnp.tanh(x @ p["in"][order]), jnp.moveaxis(x, 1, 0))
        return MARKED["squared"](jnp.moveaxis(h, 0, 1) @ p["out"], y).mean()

    params = {"in": normal(0, 3, 2), "out": normal(1, 2, 2)}
    capture = lp.value_grad_and_capture(loss, curvature="ggn_exact")
    with pytest.raises(ValueError, match=r"needs rows of each example, but in.*ggn_mc"):
        jax.eval_shape(capture, params, *TOKENS)


def test_positions_joined_with_the_examples_that_meet_are_an_error_with_the_remedy():
    loss = functools.partial(words, is_mixed=True)
    with pytest.raises(ValueError, match="positions that meet, if they are joined with the exam"):
        lp.value_grad_and_capture(loss, curvature="ggn_exact")(WORDS, *TOKENS)


def two_heads(p, x, y, labels):
    h = jnp.tanh(x @ p["trunk"])
    policy = lp.losses.softmax_cross_entropy(h @ p["policy"], jax.nn.softmax(y)).mean()
    value = lp.losses.squared_error((h @ p["value"])[:, 0], labels)
    return policy + 0.3 * value.mean()


TWO_HEADS = {"trunk": normal(0, 3, 4), "policy": normal(1, 4, 2), "value": normal(2, 4, 1)}


def test_several_heads_with_marked_losses():
    args = X, Y, WEIGHTS
    blocks = dict(
        zip(
            lp.find_layers(two_heads, TWO_HEADS, *args),
            captured_blocks(two_heads, TWO_HEADS, *args),
            strict=True,
        )
    )

    def loss(z):
        policy = MARKED["softmax"](z[:, :2], jax.nn.softmax(Y)).mean()
        return policy + 0.3 * jnp.mean((z[:, 2] - WEIGHTS) ** 2)

    joined = jnp.concatenate([TWO_HEADS["policy"], TWO_HEADS["value"]], 1)
    params = [(TWO_HEADS["trunk"], jnp.zeros(4)), (joined, jnp.zeros(3))]
    trunk, heads = Dense(params, X, loss).gauss_newton()
    assert_close(blocks["trunk"], trunk)
    assert_close(blocks["policy"], heads[:2, :2])
    assert_close(blocks["value"], heads[2:, 2:])


def test_two_losses_of_the_same_outputs_add_up():
    def loss(z):
        return MARKED["softmax"](z, jax.nn.softmax(Y)).mean() + MARKED["squared"](z, Y).sum()

    dense = Dense(PARAMS, X, loss)
    assert_close(captured_blocks(dense.loss_fn, PARAMS, X), dense.gauss_newton())


# --- the output layer alone ----------------------------------------------------------------------


def output_hessian(loss_fn, params, *args):
    """The output layer's factor as a matrix, and whether it came as one."""
    capture = quick_jit(lp.value_grad_and_capture(loss_fn, curvature="ggn_output"))
    *others, last = capture(params, *args)[2].values()
    assert all(arrays.output_hessian is None for arrays in others)
    found = last.output_hessian
    return (jnp.diag(found), False) if found.ndim == 1 else (found, True)


PARAMS3, LABELS = layers_of(3, 4, 3), jax.nn.softmax(normal(6, 5, 3))
TOKEN_LABELS = jax.nn.softmax(normal(7, 5, 4, 3))


def twice(z):
    return jnp.broadcast_to(z[None], (2, *z.shape))


MASK = (WEIGHTS > 0.5).astype(float)
CLASSES = LABELS.argmax(-1)
INTEGERS = lp.losses.softmax_cross_entropy_with_integer_labels
own = lp.losses.output_loss()(lambda z, y: jnp.sum(jnp.logaddexp(z, 0) ** 2 - y * z, -1))


@pytest.mark.parametrize(
    "x, loss, is_matrix",
    [
        (X, lambda z: MARKED["squared"](z, LABELS).mean(), False),
        (X, lambda z: MARKED["sigmoid"](z, LABELS).sum(), False),
        (X, lambda z: (WEIGHTS[:, None] * lp.losses.squared_error(z, LABELS)).mean(), False),
        (X, lambda z: MARKED["sigmoid"](2 * z + 1, LABELS).sum(), False),
        (X, lambda z: lp.losses.squared_error(twice(z), twice(LABELS)).sum(), False),
        (X, lambda z: MARKED["softmax"](z, LABELS).mean(), True),
        (X, lambda z: weighted(z, LABELS, WEIGHTS), True),
        (X, lambda z: MARKED["softmax"](z, LABELS * MASK[:, None]).sum(), True),
        (X, lambda z: MARKED["softmax"](0.5 * z + 1, LABELS).sum(), True),
        (X, lambda z: MARKED["softmax"](z, LABELS).sum() + MARKED["squared"](z, X).sum(), True),
        (X, lambda z: MARKED["softmax"](z.reshape(5, 1, 3), LABELS[:, None]).sum(), True),
        (
            X,
            lambda z: lp.losses.softmax_cross_entropy_with_integer_labels(
                z, LABELS.argmax(-1)
            ).sum(),
            True,
        ),
        (X, lambda z: jax.vmap(lp.losses.softmax_cross_entropy, (1, 0))(z.T, LABELS).sum(), True),
        (TOKENS[0], lambda z: MARKED["softmax"](z, TOKEN_LABELS).mean(), True),
        (TOKENS[0], lambda z: MARKED["sigmoid"](z, TOKEN_LABELS).mean(), False),
        (X, lambda z: mixture(z, jnp.asarray([0.0, 1, 1, 0, 1])).mean(), True),
        (X, lambda z: own(z, LABELS).mean(), True),
        # Not marked.
        (X, lambda z: optax.l2_loss(z, LABELS).sum(), False),
        (X, lambda z: optax.sigmoid_binary_cross_entropy(z, LABELS).mean(), False),
        (X, lambda z: jnp.cos(z).sum(), False),
        (X, lambda z: (WEIGHTS * optax.softmax_cross_entropy(z, LABELS)).sum(), True),
        (
            X,
            lambda z: optax.softmax_cross_entropy_with_integer_labels(z, LABELS.argmax(-1)).sum(),
            1,
        ),
        (X, lambda z: jnp.cos(z).prod(-1).sum(), True),
        (
            TOKENS[0],
            lambda z: optax.softmax_cross_entropy(rows(z), rows(TOKEN_LABELS)).mean(),
            True,
        ),
        (TOKENS[0], lambda z: MARKED["softmax"](rows(z), rows(TOKEN_LABELS)).mean(), True),
        (TOKENS[0], lambda z: optax.softmax_cross_entropy(z, TOKEN_LABELS).mean(), True),
    ],
)
def test_the_output_layers_factor_is_the_sum_of_the_rows_hessians(x, loss, is_matrix):
    dense = Dense(PARAMS3, x, loss)
    found, was_matrix = output_hessian(dense.loss_fn, PARAMS3, x)
    assert was_matrix == is_matrix
    assert_close(found, dense.gauss_newton()[-1])


def test_the_output_layers_factor_is_split_where_the_loss_is_marked():
    """As that of all columns: what lies between the layer and the loss belongs to the network."""
    for loss in (
        lambda z: MARKED["softmax"](2 * jnp.tanh(z), LABELS).mean(),
        lambda z: MARKED["sigmoid"](jnp.sin(z), LABELS).mean(),
        lambda z: mixture(jnp.tanh(z @ jnp.ones((3, 3))), jnp.ones(5)).mean(),
    ):
        dense = Dense(PARAMS3, X, loss)
        found, _ = output_hessian(dense.loss_fn, PARAMS3, X)
        assert_close(found, captured_blocks(dense.loss_fn, PARAMS3, X)[-1])


def test_a_row_of_several_softmaxes_has_a_block_for_each():
    y = jax.nn.softmax(normal(8, 5, 2, 3))
    params = layers_of(3, 4, 6)
    dense = Dense(params, X, lambda z: MARKED["softmax"](z.reshape(5, 2, 3), y).mean())
    found, _ = output_hessian(dense.loss_fn, params, X)
    assert_close(found, dense.gauss_newton()[-1])
    assert_close(found[:3, 3:], jnp.zeros((3, 3)))


@settings(max_examples=4)
@given(problems())
def test_the_output_layers_factor_in_every_front_end(problem):
    for loss in (marked(problem.network), problem.loss_fn):
        found, _ = output_hessian(loss, problem.params, *problem.batch)
        assert_close(found, of_network(problem).gauss_newton()[-1])


def test_the_output_layers_factor_of_an_elementwise_loss_takes_no_matrix_per_example():
    network = Network(widths=(3, 4, 11), batch=7, head="sigmoid")
    for loss in (marked(network), network.loss):
        capture = lp.value_grad_and_capture(loss, curvature="ggn_output")
        jaxpr = jax.make_jaxpr(capture)(network.params(), *network.data())
        sizes = [math.prod(a.shape) for a in flatten(jaxpr).avals if hasattr(a, "shape")]
        assert max(sizes) < 11 * 11


def test_the_output_layers_factor_of_a_convex_loss_takes_no_matrix_per_example():
    network = Network(widths=(3, 4, 11), batch=20, head="softmax")
    for scale in (1, 2):

        def loss(params, x, y, scale=scale):
            return lp.losses.softmax_cross_entropy(scale * network.apply(params, x), y).mean()

        capture = lp.value_grad_and_capture(loss, curvature="ggn_output")
        jaxpr = jax.make_jaxpr(capture)(network.params(), *network.data())
        sizes = [math.prod(a.shape) for a in flatten(jaxpr).avals if hasattr(a, "shape")]
        assert max(sizes) < 20 * 11 * 11


# --- expectations --------------------------------------------------------------------------------


def every_draw(monkeypatch, signs):
    """Let the noise be these signs, for an expectation by enumeration."""
    monkeypatch.setattr(
        jax.random, "rademacher", lambda key, shape, dtype: signs.reshape(shape).astype(dtype)
    )


@pytest.mark.parametrize("is_marked", [True, False])
@pytest.mark.parametrize("head", sorted(HEADS))
def test_noise_has_the_gauss_newton_blocks_as_its_exact_expectation(head, is_marked, monkeypatch):
    """The mean over all sign patterns of two examples with three outputs, 2^6."""
    network = Network(head=head, widths=(3, 4, 3), batch=2)
    params, (x, y) = network.params(), network.data()
    loss = marked(network) if is_marked else network.loss

    @quick_jit
    @functools.partial(jax.vmap, in_axes=0)
    def blocks(signs):
        every_draw(monkeypatch, signs)
        capture = lp.value_grad_and_capture(loss, curvature="ggn_mc")
        captured = capture(params, x, y, rng=jax.random.key(0))[2]
        return [second_moment(arrays.curvature) for arrays in captured.values()]

    patterns = jnp.asarray(list(itertools.product([-1.0, 1.0], repeat=6)))
    mean = jax.tree.map(lambda b: b.mean(0), blocks(patterns))
    assert_close(mean, captured_blocks(loss, params, x, y))


def fisher_blocks(loss_fn, params, x, key):
    capture = lp.value_grad_and_capture(loss_fn, curvature="fisher_mc")
    captured = capture(params, x, rng=key)[2]
    return [second_moment(arrays.curvature) for arrays in captured.values()]


def expected_fisher(monkeypatch, loss, dense, labels, probability):
    """The exact expectation over all labels of all examples, each block in its last two axes."""

    @quick_jit
    @jax.vmap
    def blocks(label):
        monkeypatch.setattr(loss, "sampler", lambda rng, outputs: label)
        found = fisher_blocks(dense.loss_fn, dense.params, dense.x, jax.random.key(0))
        return [probability(label) * block for block in found]

    return [block.sum(0) for block in blocks(labels)]


def test_sampled_softmax_labels_have_the_gauss_newton_blocks_as_their_expectation(monkeypatch):
    loss = lp.losses.softmax_cross_entropy_with_integer_labels
    dense = Dense(PARAMS, X[:3], lambda z: loss(z, jnp.asarray([0, 1, 1])).mean())
    log_p = jax.nn.log_softmax(dense.outputs())
    labels = jnp.asarray(list(itertools.product([0, 1], repeat=3)))
    found = expected_fisher(
        monkeypatch, loss, dense, labels, lambda y: jnp.exp(log_p[jnp.arange(3), y].sum())
    )
    assert_close(found, dense.gauss_newton())


def test_sampled_bits_have_the_gauss_newton_blocks_as_their_expectation(monkeypatch):
    loss = lp.losses.sigmoid_binary_cross_entropy
    dense = Dense(PARAMS, X[:2], lambda z: loss(z, jax.nn.sigmoid(Y[:2])).sum(-1).mean())
    p = jax.nn.sigmoid(dense.outputs())
    labels = jnp.asarray(list(itertools.product([0.0, 1.0], repeat=4))).reshape(-1, 2, 2)
    found = expected_fisher(
        monkeypatch, loss, dense, labels, lambda y: jnp.prod(jnp.where(y > 0, p, 1 - p))
    )
    assert_close(found, dense.gauss_newton())


def test_sampled_targets_have_the_gauss_newton_blocks_as_their_expectation(monkeypatch):
    """The labels' noise enters linearly: +-1 standard deviation has the normal's second moments."""
    loss = lp.losses.squared_error
    dense = Dense(PARAMS, X[:2], lambda z: loss(z, Y[:2]).mean())
    signs = jnp.asarray(list(itertools.product([-1.0, 1.0], repeat=4))).reshape(-1, 2, 2)
    labels = dense.outputs()[None] + math.sqrt(0.5) * signs
    found = expected_fisher(monkeypatch, loss, dense, labels, lambda y: 1 / 16)
    assert_close(found, dense.gauss_newton())


# The mixture of two binary classifiers, practical Gauss-Newton eq. 27, on three outputs.
def log_mixture(outputs, bits):
    sign = 2 * bits - 1
    log_p = jax.nn.log_sigmoid(outputs[..., 0]) + jax.nn.log_sigmoid(sign * outputs[..., 1])
    log_q = jax.nn.log_sigmoid(-outputs[..., 0]) + jax.nn.log_sigmoid(sign * outputs[..., 2])
    return jnp.logaddexp(log_p, log_q)


def sample_bits(rng, outputs):
    p = jnp.exp(log_mixture(outputs, jnp.ones(outputs.shape[:-1], outputs.dtype)))
    return jax.random.bernoulli(rng, p).astype(outputs.dtype)


mixture = lp.losses.output_loss(sample=sample_bits)(lambda a, y: -log_mixture(a, y))


def test_for_the_mixture_of_classifiers_gauss_newton_is_not_the_fisher(monkeypatch):
    params, x, bits = layers_of(3, 4, 3), X[:3], jnp.asarray([0.0, 1.0, 1.0])
    dense = Dense(params, x, lambda z: mixture(z, bits).mean())
    hessians = jax.vmap(jax.hessian(mixture))(dense.outputs(), bits)
    assert jnp.all(jnp.linalg.eigvalsh(hessians)[:, 0] < -1e-3)  # indefinite
    exact = captured_blocks(dense.loss_fn, params, x)
    assert_close(exact, dense.gauss_newton(project=True))
    labels = jnp.asarray(list(itertools.product([0.0, 1.0], repeat=3)))
    outputs = dense.outputs()
    fisher = expected_fisher(
        monkeypatch, mixture, dense, labels, lambda y: jnp.exp(log_mixture(outputs, y).sum())
    )
    p = jnp.exp(log_mixture(outputs, jnp.ones(3)))
    scores = jax.jacobian(lambda z: jax.vmap(mixture)(z, jnp.ones(3)).sum())(outputs)
    rank_one = jnp.einsum("b,bi,bj->ij", p / (1 - p) / 3, scores, scores)  # E[e e'], two labels
    assert_close(fisher[-1], rank_one)
    assert jnp.linalg.norm(exact[-1] - fisher[-1]) > 0.1 * jnp.linalg.norm(fisher[-1])


@settings(max_examples=6)
@given(problems())
def test_empirical_cotangents_are_those_of_each_example(problem):
    """sqrt(1/c) times the gradient of each term: c E'E = 1/c sum over terms of e e'."""
    network, params, (x, y) = problem.network, problem.params, problem.batch

    @quick_jit
    def both(params, x, y):
        capture = lp.value_grad_and_capture(network.loss, curvature="fisher_empirical")
        captured = capture(params, x, y)[2]
        found = [second_moment(arrays.curvature) for arrays in captured.values()]

        def of_row(x, y):
            one = dataclasses.replace(network, batch=1, tokens=None, decay=0.0)
            capture = lp.value_grad_and_capture(one.loss)
            return [arrays.cotangents[0, 0] for arrays in capture(params, x, y)[2].values()]

        each = jax.vmap(of_row)(rows(x)[:, None], rows(y)[:, None])
        return found, [jnp.einsum("no,np->op", e, e) / network.terms for e in each]

    assert_close(*both(params, x, y))


def test_empirical_cotangents_of_a_sum_are_the_cotangents():
    dense = Dense(PARAMS, X, lambda z: MARKED["softmax"](z, jax.nn.softmax(Y)).sum())
    capture = lp.value_grad_and_capture(dense.loss_fn, curvature="fisher_empirical")
    for arrays in quick_jit(capture)(PARAMS, X)[2].values():
        assert_close(arrays.curvature, arrays.cotangents[None])


@pytest.mark.parametrize("curvature", ["fisher_mc", "ggn_mc"])
def test_many_samples_are_averaged(curvature):
    dense = Dense(PARAMS, X, lambda z: MARKED["softmax"](z, jax.nn.softmax(Y)).mean())
    capture = lp.value_grad_and_capture(dense.loss_fn, curvature=curvature, samples=4000)
    captured = quick_jit(capture)(PARAMS, X, rng=jax.random.key(0))[2]
    for arrays, exact in zip(captured.values(), dense.gauss_newton(), strict=True):
        assert arrays.curvature.shape[0] == 4000
        assert_close(second_moment(arrays.curvature), exact, 0.1)
    first = [arrays.curvature[:2] for arrays in captured.values()]
    assert not np.allclose(first[0][0], first[0][1])


def test_noise_is_unbiased_where_examples_meet():
    def normalised(h):
        return (h - h.mean(0, keepdims=True)) / (h.std(0, keepdims=True) + 0.1)

    def loss(z):
        return MARKED["softmax"](z, jax.nn.softmax(Y)).mean()

    dense = Dense(PARAMS, X, loss, between=normalised)
    capture = lp.value_grad_and_capture(dense.loss_fn, curvature="ggn_mc", samples=4000)
    captured = quick_jit(capture)(PARAMS, X, rng=jax.random.key(0))[2]
    found = [second_moment(arrays.curvature) for arrays in captured.values()]
    assert_close(found, dense.gauss_newton(), 0.1)


# --- transferred ---------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", ["fisher_mc", "fisher_empirical", "ggn_mc", "ggn_exact"])
def test_curvature_after_the_transfer_functions(curvature):
    network = Network(head="softmax", transfer="tanh", tokens=3)
    capture = lp.value_grad_and_capture(marked(network), transferred=True, curvature=curvature)
    rng = {"rng": jax.random.key(0)} if curvature in ("fisher_mc", "ggn_mc") else {}
    captured = quick_jit(capture)(network.params(), *network.data(), **rng)[2]
    first, last = captured.values()
    slopes = 1 - jnp.tanh(first.outputs) ** 2
    assert_close(first.transferred_curvature * slopes[None], first.curvature)
    assert_close(last.transferred_curvature, last.curvature)


# --- compositions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "curvature", ["fisher_mc", "fisher_empirical", "ggn_mc", "ggn_exact", "ggn_output"]
)
@pytest.mark.parametrize("wrapper", ["nothing", "jit", "checkpoint"])
def test_gradients_are_bit_for_bit_the_same_with_curvature(curvature, wrapper):
    network = Network(head="softmax", wrapper=wrapper, tokens=3, decay=0.1)
    loss, args = marked(network), (network.params(), *network.data())
    rng = {"rng": jax.random.key(0)} if curvature in ("fisher_mc", "ggn_mc") else {}
    capture = lp.value_grad_and_capture(loss, curvature=curvature)
    found = jax.jit(lambda *args: capture(*args, **rng)[:2])(*args)
    expected = jax.jit(jax.value_and_grad(loss))(*args)
    chex.assert_trees_all_equal(found, expected)


@pytest.mark.parametrize(
    "front_end, wrapper",
    [(front_end, "nothing") for front_end in sorted(FRONT_ENDS)]
    + [
        (front_end, w)
        for w in sorted(WRAPPERS.keys() - {"nothing"})
        for front_end in ("plain", "linen")
    ],
)
def test_curvature_in_every_front_end_and_wrapper(front_end, wrapper):
    network = Network(front_end=front_end, wrapper=wrapper, head="softmax", tokens=2)
    plain = Network(head="softmax", tokens=2)
    x, y = network.data()
    params = network.params()
    layers = lp.find_layers(network.loss, params, x, y)
    blocks = [layers.block(params, name) for name in layers]
    same = {f"layer{i}": {"kernel": b[:-1], "bias": b[-1]} for i, b in enumerate(blocks)}
    found = captured_blocks(marked(network), params, x, y)
    assert_close(found, captured_blocks(marked(plain), same, x, y))


def mlp_loss(params, x, y):
    h = jnp.tanh(x @ params["first"])
    return lp.losses.softmax_cross_entropy(h @ params["second"], jax.nn.softmax(y)).mean()


MLP = {"first": normal(0, 3, 4), "second": normal(1, 4, 2)}


def test_seeds_under_vmap_equal_seeds_in_a_loop():
    capture = lp.value_grad_and_capture(mlp_loss, curvature="fisher_mc", samples=2)

    def step(params, key):
        return capture(params, X, Y, rng=key)[2]["first"].curvature

    seeds = [jax.tree.map(lambda p, s=s: s * p, MLP) for s in (1.0, 0.5)]
    keys = jax.random.split(jax.random.key(0), 2)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds)
    looped = [quick_jit(step)(params, key) for params, key in zip(seeds, keys, strict=True)]
    assert_close(quick_jit(jax.vmap(step))(stacked, keys), jnp.stack(looped))


def test_captured_curvature_crosses_jit_and_scan():
    capture = lp.value_grad_and_capture(mlp_loss, transferred=True, curvature="ggn_mc")

    def body(params, key):
        captured = capture(params, X, Y, rng=key)[2]
        return params, captured

    keys = jax.random.split(jax.random.key(0), 3)
    stacked = jax.jit(lambda p: jax.lax.scan(body, p, keys)[1])(MLP)
    each = jax.jit(capture)(MLP, X, Y, rng=keys[1])[2]
    second = jax.tree.map(lambda leaf: leaf[1], stacked)
    assert_close(second["first"].curvature, each["first"].curvature)
    assert_close(second["first"].transferred_curvature, each["first"].transferred_curvature)


@pytest.mark.parametrize("curvature", ["fisher_mc", "fisher_empirical", "ggn_exact"])
def test_deferred_curvature_is_what_it_would_have_been(curvature):
    keys = {"rng": jax.random.key(0)} if curvature == "fisher_mc" else {}
    options = {"transferred": True, "curvature": curvature}
    capture = lp.value_grad_and_capture(mlp_loss, defer_curvature=True, **options)
    _, _, now = quick_jit(lp.value_grad_and_capture(mlp_loss, **options))(MLP, X, Y, **keys)

    def read(captured):
        return {n: (a.curvature, a.transferred_curvature) for n, a in captured.items()}

    def inside(key):
        captured = capture(MLP, X, Y, **key)[2]
        return read(captured), read(captured.pulled())

    expected = read(now)
    for found in (*quick_jit(inside)(keys), read(quick_jit(capture)(MLP, X, Y, **keys)[2])):
        assert_close(found, expected)


def test_without_jit_and_with_auxiliary_results():
    def loss(params, x, y):
        return mlp_loss(params, x, y), {"n": len(x), "x": x}

    capture = lp.value_grad_and_capture(loss, has_aux=True, curvature="ggn_exact")
    (value, aux), grads, captured = capture(MLP, X, Y)
    assert aux["n"] == 5 and aux["x"] is not None
    assert_close((value, grads), jax.value_and_grad(mlp_loss)(MLP, X, Y))
    found = [second_moment(arrays.curvature) for arrays in captured.values()]
    assert_close(found, captured_blocks(mlp_loss, MLP, X, Y))


def test_old_style_keys():
    capture = lp.value_grad_and_capture(mlp_loss, curvature="fisher_mc", samples=3)
    captured = capture(MLP, X, Y, rng=jax.random.PRNGKey(0))[2]
    assert captured["first"].curvature.shape == (3, 5, 1, 4)


def test_the_loss_gets_a_keyword_of_that_name_where_nothing_is_sampled():
    def loss(params, x, y, rng):
        return mlp_loss(params, x + jax.random.normal(rng, x.shape), y)

    capture = lp.value_grad_and_capture(loss, curvature="ggn_exact")
    value = capture(MLP, X, Y, rng=jax.random.key(0))[0]
    assert_close(value, loss(MLP, X, Y, jax.random.key(0)))


@pytest.mark.parametrize("curvature", ["fisher_mc", "ggn_mc", "ggn_exact", "fisher_empirical"])
def test_a_model_in_bfloat16(curvature):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jnp.tanh(nn.Dense(4, dtype=jnp.bfloat16)(x))
            return nn.Dense(2, dtype=jnp.bfloat16)(x)

    model, x = Model(), X.astype(jnp.float32)
    y = jax.nn.softmax(Y.astype(jnp.bfloat16))
    params: Any = model.init(jax.random.key(0), x)
    rng = {"rng": jax.random.key(1)} if curvature.endswith("mc") else {}

    def loss(params, x):
        return lp.losses.softmax_cross_entropy(model.apply(params, x), y).mean()

    capture = lp.value_grad_and_capture(
        loss, curvature=curvature, **({"samples": 500} if rng else {})
    )
    captured = quick_jit(capture)(params, x, **rng)[2]
    kernel = params["params"]["Dense_1"]
    z = jnp.tanh(x @ params["params"]["Dense_0"]["kernel"]) @ kernel["kernel"]
    p = jax.nn.softmax(z)
    last = captured["params/Dense_1"].curvature
    assert last.dtype == jnp.bfloat16
    if curvature != "fisher_empirical":
        expected = (jnp.einsum("bk,kl->kl", p, jnp.eye(2, dtype=p.dtype)) - p.T @ p) / 5
        assert_close(second_moment(last.astype(jnp.float32)), expected, 0.06)


def test_a_second_call_traces_nothing():
    capture = lp.value_grad_and_capture(mlp_loss, curvature="fisher_mc")
    step = jax.jit(chex.assert_max_traces(capture, n=1))
    step(MLP, X, Y, rng=jax.random.key(0))
    step(MLP, X + 1, Y, rng=jax.random.key(1))


def test_the_hessian_of_an_elementwise_loss_is_never_a_matrix_per_example():
    """No array of B x K x K for "ggn_mc", marked or not."""
    network = Network(widths=(3, 4, 11), batch=7, head="sigmoid")
    for loss in (marked(network), network.loss):
        capture = lp.value_grad_and_capture(loss, curvature="ggn_mc")
        jaxpr = jax.make_jaxpr(lambda *args, f=capture: f(*args, rng=jax.random.key(0)))(
            network.params(), *network.data()
        )
        assert (
            max(math.prod(a.shape) for a in flatten(jaxpr).avals if hasattr(a, "shape"))
            < 7 * 11 * 11
        )


def test_a_marked_loss_inside_value_and_grad_is_still_the_loss():
    def loss(params, x, y):
        value, _ = jax.value_and_grad(mlp_loss)(params, x, y)
        return value

    assert_close(jax.grad(loss)(MLP, X, Y), jax.grad(mlp_loss)(MLP, X, Y))


# --- what meets what -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function, labels",
    [
        (lambda x: jnp.exp(x) * 2, {0, 1, 2}),
        (lambda x: x.sum(1), {0, 1}),
        (lambda x: x.transpose(2, 0, 1), {0, 1, 2}),
        (lambda x: x.reshape(6, 4).reshape(2, 3, 4) + 1, {0, 1, 2}),
        (lambda x: x - x.mean(0, keepdims=True), {1, 2}),
        (lambda x: jnp.einsum("abc,cd->abd", x, jnp.ones((4, 5))), {0, 1}),
        (lambda x: jnp.einsum("abc,abd->acd", x, x), {0}),
        (lambda x: jax.nn.softmax(x), {0, 1}),
        (lambda x: jax.nn.relu(x), {0, 1, 2}),
        (lambda x: x + x[::-1], {1, 2}),
        (lambda x: jnp.concatenate([x, x], 2), {0, 1}),
        (lambda x: jnp.stack([x, 2 * x], 1), {0, 2, 3}),
        (lambda x: jnp.pad(x, [(0, 0), (1, 0), (0, 0)]), {0, 2}),
        (lambda x: jnp.cumsum(x, 1), {0, 2}),
        (lambda x: x[:, 1:], {0, 2}),
        (lambda x: x[:, :, jnp.asarray([1, 0])], {0, 1}),
        (lambda x: jnp.split(x, 2, axis=2)[0], {0, 1}),
        (lambda x: jnp.take_along_axis(x, jnp.zeros((2, 3, 1), int), 2), {0, 1, 2}),
        (lambda x: jax.lax.scan(lambda c, x: (c + x, c), jnp.zeros((3, 4)), x)[1], set()),
        (lambda x: x.reshape(4, 6), set()),
        (lambda x: x.reshape(6, 4), {0, 1}),
        (lambda x: x.reshape(2, 12).reshape(6, 4), {0, 1}),
        (lambda x: jnp.cumsum(x, 1).reshape(6, 4), {1}),
        (lambda x: x.transpose(1, 0, 2).reshape(6, 4), {0, 1}),
        (lambda x: x.transpose(1, 0, 2).reshape(2, 12), set()),
        (lambda x: jnp.broadcast_to(x[:, None], (2, 5, 3, 4)), {0, 2, 3}),
        (lambda x: jax.lax.conv_general_dilated(x, jnp.ones((3, 3, 1)), (1,), "VALID"), {0}),
    ],
)
def test_an_axis_is_followed_while_its_entries_do_not_meet(function, labels):
    x = jnp.ones((2, 3, 4))
    program = flatten(jax.make_jaxpr(function)(x))
    followed, _ = separable.follow(program, program.outputs[0])
    found = separable.labels(followed[program.inputs[0]])
    # The labels are axes of the result: an axis of length one is nobody's.
    result = program.shape(program.outputs[0])
    assert found == {i for i in labels if result[i] > 1}
    # And it is true: moving one entry moves only entries of the same number.
    jacobian = np.abs(np.asarray(jax.jacobian(function)(x))).reshape(*result, -1) > 0
    for label in found:
        for entry in range(x.size):
            moved = np.nonzero(jacobian[..., entry])[label]
            assert len(set(moved)) <= 1


# --- errors --------------------------------------------------------------------------------------


def test_what_was_not_captured_is_an_error_with_the_remedy():
    captured = lp.value_grad_and_capture(mlp_loss)(MLP, X, Y)[2]
    with pytest.raises(ValueError, match=r'not captured.*curvature="ggn_mc"'):
        _ = captured["first"].curvature
    with pytest.raises(ValueError, match=r"after the transfer.*not captured.*transferred=True"):
        _ = captured["first"].transferred_curvature
    capture = lp.value_grad_and_capture(mlp_loss, curvature="ggn_exact")
    with pytest.raises(ValueError, match=r"after the transfer.*not captured.*transferred=True"):
        _ = capture(MLP, X, Y)[2]["first"].transferred_curvature


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"curvature": "hessian"}, "`curvature` is None or one of 'fisher_mc'.*got 'hessian'"),
        ({"curvature": "ggn_mc", "samples": 0}, "`samples` is at least 1, got 0"),
        ({"curvature": "ggn_exact", "samples": 2}, "`samples=2` needs .* sampled.*'ggn_exact'"),
        ({"samples": 2}, "`samples=2` needs .*got None"),
    ],
)
def test_arguments_out_of_range_are_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        lp.value_grad_and_capture(mlp_loss, **kwargs)


@pytest.mark.parametrize("curvature", ["fisher_mc", "ggn_mc"])
def test_a_missing_key_is_an_error(curvature):
    with pytest.raises(TypeError, match=rf"'{curvature}'.*keyword `rng`"):
        lp.value_grad_and_capture(mlp_loss, curvature=curvature)(MLP, X, Y)


def loss_of_outputs(head):
    def loss(params, x, y):
        return head(jnp.tanh(x @ params["first"]) @ params["second"], y)

    return loss


def contrastive(z, y):
    return (
        optax.softmax_cross_entropy(z @ y.T, jnp.eye(len(z))).sum()
        + optax.softmax_cross_entropy(z @ z.T, jnp.eye(len(z))).sum()
    )


CE = lp.losses.softmax_cross_entropy
unsampled = lp.losses.output_loss()(lambda z, y: jnp.sum((z - y) ** 2, -1))
of_all = lp.losses.output_loss()(lambda z, y: jnp.sum((z - y) ** 2))


def skips(params, x, y):
    h = jnp.tanh(x @ params["first"])
    return optax.l2_loss(h @ params["second"], y).mean() + jnp.mean(h**2)


def marked_and_skips(params, x, y):
    h = jnp.tanh(x @ params["first"])
    return CE(h @ params["second"], jax.nn.softmax(y)).mean() + jnp.mean(h**2)


def labels_from_params(params, x, y):
    z = jnp.tanh(x @ params["first"]) @ params["second"]
    return CE(z, jax.nn.softmax(-z)).mean()


def learned_weight(params, x, y):
    z = jnp.tanh(x @ params["first"]) @ params["second"]
    return (CE(z, jax.nn.softmax(y)) * jax.nn.sigmoid(z[:, 0])).mean()


def normalised(params, x, y):
    h = jnp.tanh(x @ params["first"])
    h = h - h.mean(0, keepdims=True)
    return CE(h @ params["second"], jax.nn.softmax(y)).mean()


def batch_normalised_head(params, x, y):
    z = jnp.tanh(x @ params["first"]) @ params["second"]
    return CE(z - z.mean(0, keepdims=True), jax.nn.softmax(y)).mean()


def residual(params, x, y):
    h = jnp.tanh(x @ params["first"])
    return CE(h @ params["second"] + h[:, :2], jax.nn.softmax(y)).mean()


def plain_heads(p, x, y):
    h = jnp.tanh(x @ p["trunk"])
    return optax.l2_loss(h @ p["policy"], y).mean() + optax.l2_loss(h @ p["value"]).mean()


def one_network_for_all_labels(params, x, y):
    z = (jnp.tanh(x @ params["first"]) @ params["second"]).sum(0)
    return jax.vmap(CE, (None, 0))(z, jax.nn.softmax(y)).mean()


@pytest.mark.parametrize(
    "curvature, loss, params, message",
    [
        (
            "fisher_mc",
            loss_of_outputs(lambda z, y: optax.huber_loss(z, y).mean()),
            MLP,
            r"samples labels.*through `integer_pow` outside of a marked.*output_loss\(sample",
        ),
        ("fisher_mc", loss_of_outputs(lambda z, y: unsampled(z, y).mean()), MLP, "without a sampl"),
        (
            "fisher_mc",
            marked_and_skips,
            MLP,
            "samples labels.*through `integer_pow` outside of a m",
        ),
        ("ggn_mc", labels_from_params, MLP, "labels of .* depend on the param.*stop_gradient"),
        ("fisher_mc", learned_weight, MLP, r"samples labels.*through `mul` outside"),
        ("ggn_mc", loss_of_outputs(contrastive), MLP, "cannot tell that the examples do not meet"),
        (
            "ggn_exact",
            loss_of_outputs(lambda z, y: jnp.sqrt(optax.l2_loss(z, y).mean())),
            MLP,
            "cannot tell that the examples do not meet",
        ),
        (
            "ggn_exact",
            normalised,
            MLP,
            r"do not meet in the network.*of first.*`sub`.*ggn_mc",
        ),
        ("ggn_mc", loss_of_outputs(lambda z, y: of_all(z, y)), MLP, "one loss of several examples"),
        ("ggn_mc", one_network_for_all_labels, MLP, "cannot tell the examples of .* apart"),
        ("ggn_output", plain_heads, TWO_HEADS, "several are: .*policy.*value.*`scale_by_kfac`"),
        ("ggn_output", skips, MLP, "all layers through second, the last.*`scale_by_kfac`"),
        ("ggn_output", residual, MLP, "all layers through second, the last.*`scale_by_kfac`"),
        ("ggn_output", loss_of_outputs(contrastive), MLP, "layer second and the loss"),
        ("ggn_output", batch_normalised_head, MLP, "rows of second.*do not meet.*`scale_by_kfac`"),
        (
            "ggn_exact",
            lambda p, x, y: jnp.sum(p["scale"] ** 2),
            {"scale": jnp.ones(2)},
            "found no layer",
        ),
        (
            "fisher_empirical",
            lambda p, x, y: (
                optax.l2_loss(jnp.tanh(x @ p["trunk"]) @ p["policy"], y).mean()
                + optax.l2_loss(jnp.tanh(x @ p["trunk"]) @ p["value"]).sum()
            ),
            TWO_HEADS,
            "one number of terms.*10 at|one number of terms",
        ),
    ],
)
def test_a_loss_whose_curvature_cannot_be_told_is_an_error(curvature, loss, params, message):
    rng = {"rng": jax.random.key(0)} if curvature.endswith("mc") else {}
    with pytest.raises(ValueError, match=message):
        lp.value_grad_and_capture(loss, curvature=curvature)(params, X, Y, **rng)


@pytest.mark.parametrize("is_marked", [True, False])
def test_rows_that_are_pooled_have_no_factor_of_the_output_layer_alone(is_marked):
    head = MARKED["softmax"] if is_marked else optax.softmax_cross_entropy
    dense = Dense(PARAMS, TOKENS[0], lambda z: head(z.mean(1), jax.nn.softmax(Y)).mean())
    with pytest.raises(ValueError, match=r"rows of 1, .*pooling over positions.*`scale_by_kfac`"):
        lp.value_grad_and_capture(dense.loss_fn, curvature="ggn_output")(PARAMS, TOKENS[0])
