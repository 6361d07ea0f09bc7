"""Jinns: physics-informed networks with the package's own equations and losses."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jinns

from tests.outside.registry import Problem, floats, model, normal

BATCH = 8


def network(eq_type: str, inputs: int):
    layers = (
        (eqx.nn.Linear, inputs, 8),
        (jnp.tanh,),
        (eqx.nn.Linear, 8, 8),
        (jnp.tanh,),
        (eqx.nn.Linear, 8, 1),
    )
    return jinns.nn.PINN_MLP.create(key=jax.random.key(0), eqx_list=layers, eq_type=eq_type)


def problem(loss, params, batch) -> Problem:
    """The network's parameters; those of the equation are known."""
    equation = params.eq_params

    def loss_fn(network, batch):
        params = jinns.parameters.Params(nn_params=network, eq_params=equation)
        return loss.evaluate(params, batch)[0]

    return Problem(loss_fn, floats(params.nn_params), (batch,))


@model("jinns: Burgers' equation")
def burgers():
    u, weights = network("PDENonStatio", 2)
    params = jinns.parameters.Params(nn_params=weights, eq_params={"nu": jnp.asarray(0.1)})
    loss = jinns.loss.LossPDENonStatio(
        u=u,
        dynamic_loss=jinns.loss.BurgersEquation(),
        initial_condition_fun=lambda x: -jnp.sin(jnp.pi * x),
        loss_weights=jinns.loss.LossWeightsPDENonStatio(dyn_loss=1.0, initial_condition=1.0),
        params=params,
    )
    batch = jinns.data.PDENonStatioBatch(
        domain_batch=jax.nn.sigmoid(normal(BATCH, 2)),
        border_batch=None,
        initial_batch=jnp.tanh(normal(BATCH, 1, seed=1)),
    )
    return problem(loss, params, batch)
