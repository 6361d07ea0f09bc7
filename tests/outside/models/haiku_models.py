"""Haiku's networks and modules."""

import haiku as hk
import jax
import jax.numpy as jnp

from tests.outside.registry import (
    Problem,
    cross_entropy,
    floats,
    integers,
    model,
    normal,
    squared_error,
)

BATCH, CLASSES = 6, 5


def problem(function, x, y, loss=cross_entropy) -> Problem:
    """New state (running averages, power iterations) is dropped."""
    transformed = hk.transform_with_state(function)
    params, state = floats(transformed.init(jax.random.key(0), x))

    def loss_fn(params, x, y):
        outputs, _ = transformed.apply(params, state, jax.random.key(1), x)
        return loss(outputs, y)

    return Problem(loss_fn, params, (x, y))


@model("haiku: MLP")
def mlp():
    return problem(
        lambda x: hk.nets.MLP([8, 6, CLASSES])(x), normal(BATCH, 7), integers(CLASSES, BATCH)
    )


def resnet(**options) -> Problem:
    def network(x):
        sizes = {"blocks_per_group": (1, 1, 1, 1), "channels_per_group": (4, 8, 8, 8)}
        net = hk.nets.ResNet(
            num_classes=CLASSES,
            strides=(1, 2, 1, 1),
            initial_conv_config={"output_channels": 4},
            **sizes,
            **options,
        )
        return net(x, is_training=True)

    return problem(network, normal(BATCH, 16, 16, 3), integers(CLASSES, BATCH))


@model("haiku: ResNet")
def resnet_v1():
    return resnet(bottleneck=False)


@model("haiku: ResNet v2, bottlenecks")
def resnet_v2():
    return resnet(bottleneck=True, resnet_v2=True)


@model("haiku: MobileNetV1")
def mobile_net():
    def network(x):
        strides, channels = (1, 2, 1), (4, 8, 8)
        return hk.nets.MobileNetV1(strides, channels, num_classes=CLASSES)(x, is_training=True)

    return problem(network, normal(BATCH, 16, 16, 3), integers(CLASSES, BATCH))


@model("haiku: VQ-VAE")
def vqvae():
    """Its codes learn by their own loss; gradients pass them straight through."""

    def network(x):
        code = hk.nets.VectorQuantizer(4, 6, commitment_cost=0.25)
        found = code(hk.nets.MLP([8, 4])(x), is_training=True)
        return hk.nets.MLP([8, 7])(found["quantize"]), found["loss"]

    def loss(outputs, y):
        return squared_error(outputs[0], y) + outputs[1]

    x = normal(BATCH, 7)
    return problem(network, x, x, loss)


@model("haiku: LSTM")
def lstm():
    def network(x):
        core = hk.LSTM(5)
        outputs, _ = hk.dynamic_unroll(core, x, core.initial_state(x.shape[0]), time_major=False)
        return hk.Linear(CLASSES)(outputs[:, -1])

    return problem(network, normal(BATCH, 4, 3), integers(CLASSES, BATCH))


@model("haiku: attention")
def attention():
    def network(words):
        x = hk.Embed(11, 8)(words) + hk.get_parameter(
            "positions", [6, 8], init=hk.initializers.TruncatedNormal(0.02)
        )
        norm = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
        w_init = hk.initializers.VarianceScaling(1.0)
        x = x + hk.MultiHeadAttention(2, 4, w_init=w_init)(norm, norm, norm)
        norm = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
        return hk.Linear(CLASSES)(jnp.mean(x + hk.nets.MLP([16, 8])(norm), 1))

    return problem(network, integers(11, BATCH, 6), integers(CLASSES, BATCH))


@model("haiku: spectral normalisation")
def spectral_normalisation():
    """Weights divided by their norm inside the loss, by the package's own tree of norms."""

    def network(x):
        return hk.nets.MLP([8, CLASSES])(x)

    x, y = normal(BATCH, 7), integers(CLASSES, BATCH)
    transformed = hk.without_apply_rng(hk.transform(network))
    params = floats(transformed.init(jax.random.key(0), x))
    norms = hk.transform_with_state(lambda tree: hk.SNParamsTree(ignore_regex=".*b$")(tree))
    _, state = norms.init(jax.random.key(1), params)

    def loss_fn(params, x, y):
        divided, _ = norms.apply(None, floats(state), None, params)
        return cross_entropy(transformed.apply(divided, x), y)

    return Problem(loss_fn, params, (x, y))
