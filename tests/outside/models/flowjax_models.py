"""Flowjax's normalizing flows, trained by maximum likelihood as its `fit_to_data` does."""

import equinox as eqx
import jax
import jax.numpy as jnp
import paramax
from flowjax import bijections, flows
from flowjax.distributions import Normal

from tests.outside.registry import Problem, model, normal

BATCH, SIZE = 8, 3
SIZES = {"flow_layers": 2, "nn_width": 8}


def base():
    return Normal(jnp.zeros(SIZE))


def problem(flow, condition=None) -> Problem:
    params, static = eqx.partition(
        flow,
        eqx.is_inexact_array,
        is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable),
    )

    def loss_fn(params, *batch):
        return -paramax.unwrap(eqx.combine(params, static)).log_prob(*batch).mean()

    batch = (1 + 2 * normal(BATCH, SIZE),)
    return Problem(loss_fn, params, batch if condition is None else (*batch, condition))


@model("flowjax: masked autoregressive flow")
def masked_autoregressive():
    flow = flows.masked_autoregressive_flow(jax.random.key(0), base_dist=base(), **SIZES)
    return problem(flow)


@model("flowjax: conditional masked autoregressive flow of splines")
def masked_autoregressive_conditional():
    flow = flows.masked_autoregressive_flow(
        jax.random.key(0),
        base_dist=base(),
        transformer=bijections.RationalQuadraticSpline(knots=4, interval=4),
        cond_dim=2,
        **SIZES,
    )
    return problem(flow, normal(BATCH, 2, seed=1))


@model("flowjax: coupling flow")
def coupling():
    return problem(flows.coupling_flow(jax.random.key(0), base_dist=base(), **SIZES))


@model("flowjax: block neural autoregressive flow")
def block_neural_autoregressive():
    flow = flows.block_neural_autoregressive_flow(
        jax.random.key(0), base_dist=base(), nn_block_dim=4
    )
    return problem(flow)


@model("flowjax: planar flow")
def planar():
    return problem(flows.planar_flow(jax.random.key(0), base_dist=base(), flow_layers=3))


@model("flowjax: triangular spline flow")
def triangular_spline():
    flow = flows.triangular_spline_flow(jax.random.key(0), base_dist=base(), flow_layers=2, knots=4)
    return problem(flow)
