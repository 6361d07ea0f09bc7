"""Keras on its JAX backend: trained by `stateless_call`, as its guide for JAX loops says."""

import jax
import jax.numpy as jnp
import keras
from keras import layers

from tests.outside.registry import Problem, cross_entropy, integers, model, normal, squared_error

CLASSES, BATCH = 5, 6


def problem(network: keras.Model, x: jax.Array, y: jax.Array, loss=cross_entropy) -> Problem:
    """Training mode: batches are normalised by their own statistics; new ones are dropped."""
    params = {v.path: jnp.asarray(v.value) for v in network.trainable_variables}
    state = [jnp.asarray(v.value) for v in network.non_trainable_variables]
    names = [v.path for v in network.trainable_variables]

    def loss_fn(params, x, y):
        values = [params[name] for name in names]
        outputs, _ = network.stateless_call(values, state, x, training=True)
        return loss(outputs, y)

    return Problem(loss_fn, params, (x, y))


def sequential(shape: tuple, *parts) -> keras.Model:
    """A new network, with names and precision that do not depend on those made before it."""
    keras.utils.clear_session()
    keras.config.set_floatx(jnp.dtype(jnp.result_type(float)).name)
    keras.utils.set_random_seed(0)
    dtype = "int32" if shape and shape[-1] == "words" else None
    shape = tuple(n for n in shape if n != "words")
    return keras.Sequential([keras.Input(shape, dtype=dtype), *(part() for part in parts)])


def classifier(shape: tuple, *parts) -> Problem:
    network = sequential(shape, *parts, lambda: layers.Dense(CLASSES))
    words = shape[-1] == "words"
    x = integers(11, BATCH, *shape[:-1]) if words else normal(BATCH, *shape)
    return problem(network, x, integers(CLASSES, BATCH))


@model("keras: dense")
def dense():
    return classifier(
        (7,),
        lambda: layers.Dense(8, activation="relu"),
        lambda: layers.Dense(6, activation="gelu"),
    )


@model("keras: convolutions, batch normalisation")
def convolutions():
    return classifier(
        (8, 8, 2),
        lambda: layers.Conv2D(4, 3, padding="same", use_bias=False),
        layers.BatchNormalization,
        layers.ReLU,
        layers.MaxPooling2D,
        lambda: layers.SeparableConv2D(6, 3, activation="relu"),
        layers.Flatten,
    )


@model("keras: transposed convolutions")
def transposed_convolutions():
    network = sequential(
        (8, 8, 2),
        lambda: layers.Conv2D(4, 3, strides=2, padding="same", activation="relu"),
        lambda: layers.Conv2DTranspose(4, 3, strides=2, padding="same", activation="relu"),
        lambda: layers.Conv2D(2, 1),
    )
    x = normal(BATCH, 8, 8, 2)
    return problem(network, x, x, squared_error)


@model("keras: group normalisation")
def group_normalisation():
    return classifier(
        (6, 6, 2),
        lambda: layers.Conv2D(4, 3),
        lambda: layers.GroupNormalization(2),
        lambda: layers.Activation("silu"),
        layers.GlobalAveragePooling2D,
    )


@model("keras: spectral normalisation")
def spectral_normalisation():
    return classifier(
        (6, 6, 2),
        lambda: layers.SpectralNormalization(layers.Conv2D(4, 3, activation="relu")),
        layers.Flatten,
    )


@model("keras: bidirectional LSTM")
def bidirectional_lstm():
    return classifier(
        (6, "words"),
        lambda: layers.Embedding(11, 4),
        lambda: layers.Bidirectional(layers.LSTM(5)),
    )


@model("keras: GRU")
def gru():
    return classifier((6, "words"), lambda: layers.Embedding(11, 4), lambda: layers.GRU(5))


@model("keras: attention")
def attention():
    sequential((3,))
    words = keras.Input((6,), dtype="int32")
    x = layers.Embedding(11, 8)(words)
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 4)(x, x))
    x = layers.LayerNormalization()(x + layers.Dense(8)(layers.Dense(16, activation="gelu")(x)))
    outputs = layers.Dense(CLASSES)(layers.GlobalAveragePooling1D()(x))
    return problem(keras.Model(words, outputs), integers(11, BATCH, 6), integers(CLASSES, BATCH))


def application(make, **options) -> Problem:
    sequential((3,))
    network = make(
        input_shape=(32, 32, 3),
        classes=CLASSES,
        weights=None,
        classifier_activation=None,
        **options,
    )
    return problem(network, normal(BATCH, 32, 32, 3), integers(CLASSES, BATCH))


@model("keras: MobileNetV2")
def mobile_net_v2():
    return application(keras.applications.MobileNetV2, alpha=0.35)
