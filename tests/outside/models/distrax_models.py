"""Distrax's distributions on top of Haiku's networks, after the package's own examples."""

import distrax
import haiku as hk
import jax
import jax.numpy as jnp

from tests.outside.registry import Problem, floats, integers, model, normal

BATCH, SIZE = 8, 4


def problem(function, *batch) -> Problem:
    """`function(*batch)` is the loss, written with Haiku's modules."""
    transformed = hk.transform(function)
    params = floats(transformed.init(jax.random.key(0), *batch))
    return Problem(lambda p, *batch: transformed.apply(p, jax.random.key(1), *batch), params, batch)


@model("distrax: coupling flow of splines")
def coupling_flow():
    """examples/flow.py: rational quadratic splines, alternating masks."""
    bins = 4
    numbers = 3 * bins + 1

    def conditioner():
        return hk.Sequential(
            [
                hk.nets.MLP([8], activate_final=True),
                hk.Linear(SIZE * numbers, w_init=jnp.zeros, b_init=jnp.zeros),
                hk.Reshape((SIZE, numbers)),
            ]
        )

    def bijector(params):
        return distrax.RationalQuadraticSpline(params, range_min=-4.0, range_max=4.0)

    def base(dtype):
        normal = distrax.Normal(jnp.zeros(SIZE, dtype), jnp.ones(SIZE, dtype))
        return distrax.Independent(normal, 1)

    def loss(x):
        mask = jnp.arange(SIZE) % 2 == 0
        layers = []
        for _ in range(2):
            layers.append(distrax.MaskedCoupling(mask, conditioner(), bijector))
            mask = ~mask
        flow = distrax.Transformed(base(x.dtype), distrax.Inverse(distrax.Chain(layers)))
        return -flow.log_prob(x).mean()

    return problem(loss, 1 + normal(BATCH, SIZE))


@model("distrax: variational autoencoder")
def vae():
    """examples/vae.py: a Gaussian code, pixels that are there or not."""

    def loss(x):
        hidden = hk.nets.MLP([8], activate_final=True)(x)
        mean, log_deviation = hk.Linear(3)(hidden), hk.Linear(3)(hidden)
        posterior = distrax.MultivariateNormalDiag(mean, jnp.exp(log_deviation))
        prior = distrax.MultivariateNormalDiag(jnp.zeros(3, x.dtype), jnp.ones(3, x.dtype))
        code = posterior.sample(seed=jax.random.key(2))
        likelihood = distrax.Independent(
            distrax.Bernoulli(logits=hk.nets.MLP([8, SIZE])(code), dtype=x.dtype), 1
        )
        return -(likelihood.log_prob(x) - posterior.kl_divergence(prior)).mean()

    return problem(loss, integers(2, BATCH, SIZE).astype(jnp.result_type(float)))


@model("distrax: mixture density network")
def mixture_density():
    parts = 3

    def loss(x, y):
        hidden = hk.nets.MLP([8], activate_final=True)(x)
        mixture = distrax.MixtureSameFamily(
            distrax.Categorical(logits=hk.Linear(parts)(hidden)),
            distrax.Normal(hk.Linear(parts)(hidden), jax.nn.softplus(hk.Linear(parts)(hidden))),
        )
        return -mixture.log_prob(y).mean()

    return problem(loss, normal(BATCH, SIZE), normal(BATCH, seed=1))


@model("distrax: actor and critic")
def actor_critic():
    """A policy gradient with a baseline, an entropy bonus and a deviation of its own."""

    def loss(x, action, gain):
        hidden = hk.nets.MLP([8, 8], activation=jnp.tanh, activate_final=True)(x)
        spread = hk.get_parameter("log_deviation", [2], init=jnp.zeros)
        policy = distrax.MultivariateNormalDiag(
            hk.Linear(2)(hidden), jnp.broadcast_to(jnp.exp(spread), (len(x), 2))
        )
        value = hk.Linear(1)(hidden)[:, 0]
        advantage = jax.lax.stop_gradient(gain - value)
        actor = -policy.log_prob(action) * advantage - 0.01 * policy.entropy()
        return jnp.mean(actor + 0.5 * (value - gain) ** 2)

    return problem(loss, normal(BATCH, SIZE), normal(BATCH, 2, seed=1), normal(BATCH, seed=2))


@model("distrax: hidden Markov model")
def hidden_markov():
    """Its likelihood by the forward algorithm; emissions come from a network."""
    states, length = 3, 5

    def loss(x, y):
        start = hk.get_parameter("start", [states], init=jnp.zeros)
        turn = hk.get_parameter("turn", [states, states], init=hk.initializers.RandomNormal())
        means = hk.get_parameter("means", [states], init=hk.initializers.RandomNormal())
        shift = hk.nets.MLP([6, 1])(x)[..., 0]
        model = distrax.HMM(
            distrax.Categorical(logits=start),
            distrax.Categorical(logits=turn),
            distrax.Normal(means, jnp.ones(states, x.dtype)),
        )
        return -jax.vmap(lambda seen: model.forward(seen)[1])(y - shift).mean()

    return problem(loss, normal(BATCH, length, 2), normal(BATCH, length, seed=1))
