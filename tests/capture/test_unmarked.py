"""The curvature of losses that nobody marked: known ones, several outputs, outputs that meet."""

import math

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import locoprop_jax as lp
from locoprop_jax._capture.targets import find_targets
from locoprop_jax._tracing.program import flatten
from locoprop_jax._tracing.trace import layer_names, trace
from tests.helpers import normal

X, TOKENS = normal(0, 5, 3), normal(1, 5, 4, 3)
PARAMS = {"first": normal(2, 3, 4), "second": normal(3, 4, 3)}
PROBABILITIES = jax.nn.softmax(normal(4, 5, 3))
CLASSES = PROBABILITIES.argmax(-1)
BITS = jax.nn.sigmoid(normal(5, 5, 3))
TOKEN_PROBABILITIES = jax.nn.softmax(normal(6, 5, 4, 3))
TOKEN_CLASSES = TOKEN_PROBABILITIES.argmax(-1)
MASK = (normal(7, 5, 4) > 0).astype(float)
WEIGHTS = jnp.abs(normal(8, 5))

SOFTMAX = lp.losses.softmax_cross_entropy
INTEGERS = lp.losses.softmax_cross_entropy_with_integer_labels
SIGMOID = lp.losses.sigmoid_binary_cross_entropy
SQUARED = lp.losses.squared_error


def close(found, expected, tolerance=1e-9):
    chex.assert_trees_all_close(found, expected, rtol=tolerance, atol=tolerance)


def of_outputs(head):
    def loss(params, x):
        return head(jnp.tanh(x @ params["first"]) @ params["second"])

    return loss


def captured(loss, params, *args, curvature, **options):
    """The curvature cotangents of each layer."""

    key = {"rng": jax.random.key(3)} if curvature.endswith("mc") else {}
    capture = lp.value_grad_and_capture(loss, curvature=curvature, **options)
    return {name: a.curvature for name, a in capture(params, *args, **key)[2].items()}


def blocks(cotangents):
    """Sum of C'C over samples and rows."""
    return {name: jnp.einsum("sbro,sbrp->op", c, c) for name, c in cotangents.items()}


def targets_of(loss, params, *args):
    traced = trace(loss, params, args, {}, False)
    return find_targets(traced, "ggn_mc", layer_names(traced), ())


# --- known losses --------------------------------------------------------------------------------


def picked(log_p, classes):
    return jnp.take_along_axis(log_p, classes[..., None], -1)[..., 0]


def masked_mean(terms):
    return (MASK * terms).sum() / MASK.sum()


KNOWN = {
    "integers": (
        X,
        lambda z: optax.softmax_cross_entropy_with_integer_labels(z, CLASSES).mean(),
        lambda z: INTEGERS(z, CLASSES).mean(),
    ),
    "probabilities": (
        X,
        lambda z: optax.softmax_cross_entropy(z, PROBABILITIES).mean(),
        lambda z: SOFTMAX(z, PROBABILITIES).mean(),
    ),
    "smoothed labels": (
        X,
        lambda z: optax.softmax_cross_entropy(
            z, optax.smooth_labels(jax.nn.one_hot(CLASSES, 3), 0.1)
        ).sum(),
        lambda z: INTEGERS(z, CLASSES).sum(),
    ),
    "labels that are masked": (
        X,
        lambda z: optax.softmax_cross_entropy(z, WEIGHTS[:, None] * PROBABILITIES).sum(),
        lambda z: SOFTMAX(z, WEIGHTS[:, None] * PROBABILITIES).sum(),
    ),
    "a mask of tokens": (
        TOKENS,
        lambda z: masked_mean(optax.softmax_cross_entropy_with_integer_labels(z, TOKEN_CLASSES)),
        lambda z: masked_mean(INTEGERS(z, TOKEN_CLASSES)),
    ),
    "a mask by a condition": (
        TOKENS,
        lambda z: jnp.where(MASK > 0, -picked(jax.nn.log_softmax(z), TOKEN_CLASSES), 0.0).sum(),
        lambda z: jnp.where(MASK > 0, INTEGERS(z, TOKEN_CLASSES), 0.0).sum(),
    ),
    "joined tokens": (
        TOKENS,
        lambda z: optax.softmax_cross_entropy(
            z.reshape(-1, 3), TOKEN_PROBABILITIES.reshape(-1, 3)
        ).mean(),
        lambda z: SOFTMAX(z.reshape(-1, 3), TOKEN_PROBABILITIES.reshape(-1, 3)).mean(),
    ),
    "log_softmax by hand": (
        X,
        lambda z: -(WEIGHTS * picked(jax.nn.log_softmax(z), CLASSES)).sum(),
        lambda z: (WEIGHTS * INTEGERS(z, CLASSES)).sum(),
    ),
    "logsumexp by hand": (
        X,
        lambda z: (jax.nn.logsumexp(z, axis=-1) - picked(z, CLASSES)).mean(),
        lambda z: INTEGERS(z, CLASSES).mean(),
    ),
    "exp and log by hand": (
        X,
        lambda z: (jnp.log(jnp.exp(z).sum(-1)) - jnp.einsum("bk,bk->b", z, PROBABILITIES)).mean(),
        lambda z: SOFTMAX(z, PROBABILITIES).mean(),
    ),
    "the logarithm of a softmax": (
        X,
        lambda z: -jnp.mean(jnp.sum(PROBABILITIES * jnp.log(jax.nn.softmax(z)), -1)),
        lambda z: SOFTMAX(z, PROBABILITIES).mean(),
    ),
    "the logarithm of one probability": (
        TOKENS,
        lambda z: -masked_mean(jnp.log(picked(jax.nn.softmax(z), TOKEN_CLASSES))),
        lambda z: masked_mean(INTEGERS(z, TOKEN_CLASSES)),
    ),
    "each example under vmap": (
        X,
        lambda z: jax.vmap(lambda z, y: -jax.nn.log_softmax(z)[y])(z, CLASSES).mean(),
        lambda z: INTEGERS(z, CLASSES).mean(),
    ),
    "classes in front": (
        TOKENS,
        lambda z: -(jax.nn.log_softmax(z.T, 0) * TOKEN_PROBABILITIES.T).sum(),
        lambda z: SOFTMAX(z, TOKEN_PROBABILITIES).sum(),
    ),
    "capped logits": (
        X,
        lambda z: optax.softmax_cross_entropy(2 * jnp.tanh(z), PROBABILITIES).mean(),
        lambda z: SOFTMAX(2 * jnp.tanh(z), PROBABILITIES).mean(),
    ),
    "bits": (
        X,
        lambda z: optax.sigmoid_binary_cross_entropy(z, BITS).sum(-1).mean(),
        lambda z: SIGMOID(z, BITS).sum(-1).mean(),
    ),
    "softplus by hand": (
        X,
        lambda z: jnp.mean(jax.nn.softplus(z) - BITS * z),
        lambda z: SIGMOID(z, BITS).mean(),
    ),
    "stable bits by hand": (
        X,
        lambda z: jnp.mean(jnp.maximum(z, 0) - z * BITS + jnp.log1p(jnp.exp(-jnp.abs(z)))),
        lambda z: SIGMOID(z, BITS).mean(),
    ),
    "probabilities of bits": (
        X,
        lambda z: (
            -jnp.mean(
                BITS * jnp.log(jax.nn.sigmoid(z)) + (1 - BITS) * jnp.log(1 - jax.nn.sigmoid(z))
            )
        ),
        lambda z: SIGMOID(z, BITS).mean(),
    ),
    "halves of squares": (
        X,
        lambda z: optax.l2_loss(z, BITS).sum(-1).mean(),
        lambda z: 0.5 * SQUARED(z, BITS).sum(-1).mean(),
    ),
    "squares": (
        TOKENS,
        lambda z: masked_mean(optax.squared_error(z[..., 0], MASK)),
        lambda z: masked_mean(SQUARED(z[..., 0], MASK)),
    ),
    "squares by vectors": (
        X,
        lambda z: jax.vmap(lambda z, y: (z - y) @ (z - y))(z, BITS).mean(),
        lambda z: SQUARED(z, BITS).sum(-1).mean(),
    ),
    "squares by a product of arrays": (
        TOKENS,
        lambda z: jnp.vdot(r := z - TOKENS, r) / 7,
        lambda z: SQUARED(z, TOKENS).sum() / 7,
    ),
    "squares by hand": (
        X,
        lambda z: jnp.mean(WEIGHTS[:, None] * jnp.square(BITS - z)),
        lambda z: jnp.mean(WEIGHTS[:, None] * SQUARED(z, BITS)),
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_loss_is_recognised(name):
    x, unmarked, marked = KNOWN[name]
    (found,) = targets_of(of_outputs(unmarked), PARAMS, x)
    (expected,) = targets_of(of_outputs(marked), PARAMS, x)
    assert found.loss is not None and found.head is None
    assert found.loss.root is expected.loss.root
    program = trace(of_outputs(unmarked), PARAMS, (x,), {}, False).program
    assert [program.shape(found.value)[i] for i in found.outputs] == [3] * len(expected.outputs)


@pytest.mark.parametrize("name", [name for name in KNOWN if name != "capped logits"])
def test_a_known_loss_has_the_hessian_of_its_trace(name):
    """Of the output layer alone: the sum over rows of the diagonal blocks."""
    x, loss, _ = KNOWN[name]
    kernel = PARAMS["first"][:, :3]
    found = captured(
        lambda p, x: loss(x @ p["kernel"]), {"kernel": kernel}, x, curvature="ggn_exact"
    )
    z = x @ kernel
    hessian = jax.hessian(loss)(z).reshape(z.size // 3, 3, z.size // 3, 3)
    close(blocks(found)["kernel"], jnp.einsum("npnq->pq", hessian))


@pytest.mark.parametrize("curvature", ["ggn_mc", "fisher_mc"])
@pytest.mark.parametrize(
    "name", ["a mask of tokens", "the logarithm of a softmax", "capped logits", "bits", "squares"]
)
def test_a_known_loss_has_the_samples_of_the_marked_one(name, curvature):
    x, *both = KNOWN[name]
    found = [captured(of_outputs(loss), PARAMS, x, curvature=curvature) for loss in both]
    close(*map(blocks, found))  # residuals may have the other sign


# --- several outputs -----------------------------------------------------------------------------


def positive_part(hessian):
    values, bases = jnp.linalg.eigh(hessian)
    return (bases * jnp.maximum(values, 0)[None]) @ bases.T


def dense(outputs, terms, moved):
    """Each layer's J'HJ, H the positive part of the Hessian of each term by its own output.

    Args:
      outputs: of what is added to each layer's outputs, the output that each term takes.
      terms: of the loss.
      moved: what is added: zeros.
    """
    total = {name: 0.0 for name in moved}
    values, jacobians = outputs(moved), jax.jacobian(outputs)(moved)
    for value, jacobian, term in zip(values, jacobians, terms, strict=True):
        hessian = jax.hessian(term)(value).reshape(value.size, value.size)
        for name, j in jacobian.items():
            rows = j.reshape(value.size, -1, j.shape[-1])
            total[name] += jnp.einsum("nro,nm,mrp->op", rows, positive_part(hessian), rows)
    return total


def plus(moved, name, a):
    return a if moved is None else a + moved[name]


def zeros(**sizes):
    return {name: jnp.zeros((5, size)) for name, size in sizes.items()}


def two_heads(p, x, moved=None):
    h = jnp.tanh(plus(moved, "trunk", x @ p["trunk"]))
    return [plus(moved, "policy", h @ p["policy"]), plus(moved, "value", h @ p["value"])]


def skip(p, x, moved=None):
    """The outputs of two layers added up."""
    h = jnp.tanh(plus(moved, "trunk", x @ p["trunk"]))
    z = plus(moved, "policy", h @ p["policy"]) + plus(moved, "across", x @ p["across"])
    return [z]


def hidden(p, x, moved=None):
    """The pre-activations of a middle layer beside the outputs."""
    a = plus(moved, "trunk", x @ p["trunk"])
    return [plus(moved, "policy", jnp.tanh(a) @ p["policy"]), a]


def autoencoder(p, x, moved=None):
    """A variational one: the code is drawn around a mean, which its prior takes as it is."""
    h = jnp.tanh(plus(moved, "trunk", x @ p["trunk"]))
    mean, log_variance = (plus(moved, n, h @ p[n]) for n in ("mean", "log_variance"))
    code = mean + jnp.exp(0.5 * log_variance) * normal(11, 5, 2)
    return [plus(moved, "decoder", code @ p["decoder"]), mean, log_variance]


def joint_autoencoder(p, x, moved=None):
    """The same with mean and variance from one layer."""
    both = plus(moved, "both", x @ p["both"])
    mean, log_variance = jnp.split(both, 2, axis=1)
    code = mean + jnp.exp(0.5 * log_variance) * normal(11, 5, 2)
    return [plus(moved, "decoder", code @ p["decoder"]), mean, log_variance]


def policy(z):
    return optax.softmax_cross_entropy(z, PROBABILITIES).mean()


def marked_policy(z):
    return SOFTMAX(z, PROBABILITIES).mean()


def reconstruction(z):
    return optax.sigmoid_binary_cross_entropy(z, BITS).sum(-1).mean()


def prior_mean(mean):
    return 0.5 * jnp.mean(jnp.sum(mean**2, -1))


def prior_variance(log_variance):
    return 0.5 * jnp.mean(jnp.sum(jnp.exp(log_variance) - 1 - log_variance, -1))


def value(z):
    return 0.3 * optax.huber_loss(z[:, 0], WEIGHTS).sum()


def activity(a):
    return 0.1 * jnp.mean(jnp.tanh(a) ** 2)


def margin(a):
    return jnp.mean(jnp.exp(a - a[:, :1]).sum(-1) ** 0.5)  # a matrix for each row


P = {
    name: normal(20 + i, *shape)
    for i, (name, shape) in enumerate(
        {
            "trunk": (3, 4),
            "policy": (4, 3),
            "value": (4, 1),
            "across": (3, 3),
            "mean": (4, 2),
            "log_variance": (4, 2),
            "decoder": (2, 3),
            "both": (3, 4),
        }.items()
    )
}
SEVERAL = {
    "two heads": (two_heads, [policy, value], {"trunk": 4, "policy": 3, "value": 1}),
    "one of them marked": (
        two_heads,
        [marked_policy, value],
        {"trunk": 4, "policy": 3, "value": 1},
    ),
    "a sum of two layers": (skip, [policy], {"trunk": 4, "policy": 3, "across": 3}),
    "a sum of two layers whose loss is unknown": (
        skip,
        [margin],
        {"trunk": 4, "policy": 3, "across": 3},
    ),
    "an activity of a middle layer": (hidden, [policy, activity], {"trunk": 4, "policy": 3}),
    "a matrix at a middle layer": (hidden, [marked_policy, margin], {"trunk": 4, "policy": 3}),
    "an autoencoder": (
        autoencoder,
        [reconstruction, prior_mean, prior_variance],
        {"trunk": 4, "mean": 2, "log_variance": 2, "decoder": 3},
    ),
    "an autoencoder whose codes are one layer": (
        joint_autoencoder,
        [reconstruction, prior_mean, prior_variance],
        {"both": 4, "decoder": 3},
    ),
}


def several(name):
    model, terms, sizes = SEVERAL[name]
    params = {n: P[n] for n in sizes}

    def loss(params, x):
        return sum(term(z) for term, z in zip(terms, model(params, x), strict=True))

    def expected():
        return dense(lambda moved: model(params, X, moved), terms, zeros(**sizes))

    return loss, params, expected


@pytest.mark.parametrize("name", SEVERAL)
def test_outputs_that_do_not_meet_have_hessians_of_their_own(name):
    loss, params, expected = several(name)
    close(blocks(captured(loss, params, X, curvature="ggn_exact")), expected())


@pytest.mark.parametrize("name", ["two heads", "an autoencoder"])
def test_samples_of_several_outputs_have_the_gauss_newton_blocks_as_their_expectation(name):
    loss, params, expected = several(name)
    found = blocks(captured(loss, params, X, curvature="ggn_mc", samples=20000))
    for layer, block in expected().items():
        assert jnp.linalg.norm(found[layer] - block) < 0.03 * jnp.linalg.norm(block)


@pytest.mark.parametrize("name", ["one of them marked", "an autoencoder whose codes are one layer"])
def test_products_of_several_outputs_are_those_of_the_dense_matrix(name):
    model, terms, _ = SEVERAL[name]
    loss, params, _ = several(name)
    vector = {n: normal(40 + i, *p.shape) for i, (n, p) in enumerate(params.items())}
    found = lp.gauss_newton_vector_product(loss, params, X)(vector)
    outputs, pushed = jax.jvp(lambda p: model(p, X), (params,), (vector,))
    pull = jax.vjp(lambda p: model(p, X), params)[1]
    products = [
        jax.jvp(jax.grad(term), (z,), (v,))[1]
        for term, z, v in zip(terms, outputs, pushed, strict=True)
    ]
    close(found, pull(products)[0])


def test_gradients_are_bit_for_bit_the_same_with_the_curvature_of_an_unmarked_loss():
    loss, params, _ = several("an autoencoder")
    capture = lp.value_grad_and_capture(loss, curvature="ggn_mc")
    found = jax.jit(lambda p: capture(p, X, rng=jax.random.key(0))[:2])(params)
    chex.assert_trees_all_equal(found, jax.jit(jax.value_and_grad(loss))(params, X))


# --- what is not recognised ----------------------------------------------------------------------


def heads_of(head):
    return [t.head is not None for t in targets_of(of_outputs(head), PARAMS, X)]


def test_a_function_of_a_known_term_is_no_known_loss():
    """The square of a log sum exp beside it, as a language model's loss may have it."""

    def head(z):
        normaliser = jax.nn.logsumexp(z, axis=-1)
        return jnp.mean(normaliser - picked(z, CLASSES) + 0.1 * normaliser**2)

    assert heads_of(head) == [True]
    kernel = PARAMS["first"][:, :3]
    found = captured(lambda p, x: head(x @ p["k"]), {"k": kernel}, X, curvature="ggn_exact")
    hessian = jax.hessian(head)(X @ kernel)
    close(blocks(found)["k"], jnp.einsum("bpbq->pq", hessian))


def test_marked_terms_that_are_squared_are_no_weighted_terms():
    def head(z):
        terms = INTEGERS(z, CLASSES)
        return jnp.mean(terms + terms**2)

    kernel = PARAMS["first"][:, :3]
    found = captured(lambda p, x: head(x @ p["k"]), {"k": kernel}, X, curvature="ggn_exact")
    hessian = jax.hessian(head)(X @ kernel)
    expected = sum(positive_part(hessian[b, :, b]) for b in range(5))
    close(blocks(found)["k"], expected)


@pytest.mark.parametrize(
    "head",
    [
        lambda z: -jax.nn.logsumexp(-((z - BITS) ** 2), axis=-1).mean(),  # a mixture
        lambda z: jax.nn.logsumexp((z - BITS) ** 2, axis=-1).mean(),  # a smooth maximum
        lambda z: optax.huber_loss(z, BITS).mean(),
        lambda z: jnp.mean(jnp.exp(z) - BITS * z),
        lambda z: jnp.mean(jnp.log1p(jnp.exp(2 * z) / 3)),
        lambda z: jnp.mean(jnp.square(jnp.tanh(z))),
        lambda z: jnp.log(jnp.sum(jnp.exp(z + z[:, ::-1] ** 2), -1)).mean(),
        lambda z: jnp.log(jnp.sum(jnp.exp(z), (-1,)) + 1).mean(),
        lambda z: jnp.log(jnp.exp(z) / jnp.sum(jnp.exp(2 * z), -1, keepdims=True)).mean(),
    ],
)
def test_what_is_like_a_known_loss_is_not_taken_for_one(head):
    assert any(heads_of(head))


def test_a_logit_and_its_negative_are_one_output():
    assert heads_of(lambda z: jnp.mean(jax.nn.softplus(z) + jax.nn.softplus(-z))) == [False]


def test_a_weight_that_is_learned_is_held_fixed():
    """One that is a layer by itself, a scale of the losses, and one that is none."""

    def loss(p, x, y, ce):
        z = jnp.tanh(x @ p["first"]) @ p["second"]
        return (p["weight"] * ce(z, y)).mean() + jnp.exp(-p["log"]) * ce(z, y).sum() + p["log"]

    params = PARAMS | {"weight": jnp.asarray(0.5), "log": jnp.asarray(0.3)}

    def expected(p, x, y):
        z = jnp.tanh(x @ p["first"]) @ p["second"]
        return SOFTMAX(z, y).sum() * (0.5 / 5 + jnp.exp(-0.3))

    args = X, PROBABILITIES
    wanted = blocks(captured(expected, PARAMS, *args, curvature="ggn_exact"))
    for ce in (SOFTMAX, optax.softmax_cross_entropy):
        found = captured(
            lambda p, x, y, ce=ce: loss(p, x, y, ce), params, *args, curvature="ggn_exact"
        )
        close(blocks({name: found[name] for name in wanted}), wanted)


def test_what_leaves_a_loop_of_layers_may_be_the_outputs():
    params = {"stack": normal(0, 4, 3, 3), "in": normal(1, 3, 3)}
    vector = {"stack": normal(2, 4, 3, 3), "in": normal(3, 3, 3)}

    def loss(p, x, ce):
        h = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x @ p["in"], p["stack"])[0]
        return ce(h, PROBABILITIES).mean()

    plain, marked = (
        lp.gauss_newton_vector_product(lambda p, x, ce=ce: loss(p, x, ce), params, X)(vector)
        for ce in (optax.softmax_cross_entropy, SOFTMAX)
    )
    close(plain, marked)


# --- size ----------------------------------------------------------------------------------------


def largest(loss, params, *args, curvature):
    def run(*args):
        return lp.value_grad_and_capture(loss, curvature=curvature)(*args, rng=jax.random.key(0))

    avals = flatten(jax.make_jaxpr(run)(params, *args)).avals
    return max(math.prod(a.shape) for a in avals if hasattr(a, "shape"))


@pytest.mark.parametrize("curvature", ["ggn_mc", "fisher_mc"])
@pytest.mark.parametrize("is_joined", [False, True])
def test_a_known_loss_makes_no_matrix_of_a_row(curvature, is_joined):
    tokens, words = 7, 31
    x, kernel = normal(0, 5, tokens, 3), normal(1, 3, words)
    labels = jnp.zeros((5, tokens), int)

    def loss(p, x):
        z, y = x @ p["kernel"], labels
        z, y = (z.reshape(-1, words), y.ravel()) if is_joined else (z, y)
        return optax.softmax_cross_entropy_with_integer_labels(z, y).mean()

    assert largest(loss, {"kernel": kernel}, x, curvature=curvature) == 5 * tokens * words


def test_an_unknown_loss_makes_matrices_of_rows_and_none_of_examples():
    tokens, words = 7, 11

    def loss(p, x):
        return jnp.sqrt(1 + jnp.sum((x @ p["kernel"]) ** 2, -1)).mean()

    params = {"kernel": normal(1, 3, words)}
    size = largest(loss, params, normal(0, 5, tokens, 3), curvature="ggn_mc")
    assert size == 5 * tokens * words * words


# --- errors --------------------------------------------------------------------------------------


def test_outputs_that_meet_are_an_error_that_names_them():
    def loss(p, x):
        _, mean, log_variance = autoencoder(p, x)
        return jnp.mean((mean - X[:, :2]) ** 2 * jnp.exp(-log_variance) + log_variance)

    params = {n: P[n] for n in ("trunk", "mean", "log_variance", "decoder")}
    with pytest.raises(
        ValueError, match=r"meet in a term .* `mul`.*: .*mean.*log_var.*concatenated"
    ):
        captured(loss, params, X, curvature="ggn_mc")


def test_the_remedy_for_outputs_that_meet_works():
    @lp.losses.output_loss()
    def likelihood(outputs, y):
        mean, log_variance = jnp.split(outputs, 2, -1)
        return jnp.sum((mean - y) ** 2 * jnp.exp(-log_variance) + log_variance, -1)

    def loss(p, x):
        _, mean, log_variance = autoencoder(p, x)
        return likelihood(jnp.concatenate([mean, log_variance], -1), X[:, :2]).mean()

    params = {n: P[n] for n in ("trunk", "mean", "log_variance", "decoder")}
    found = captured(loss, params, X, curvature="ggn_exact")
    assert all(jnp.all(jnp.isfinite(c)) for c in found.values())
