"""What a user writes who has a type checker: `tests/project/test_types.py` runs mypy and pyright.

`assert_type` fails where a checker knows less than it says. Each `type: ignore` is a mistake that a
checker has to find, or it complains about the comment.
"""

from typing import Any, assert_type

import jax
import jax.numpy as jnp
import optax

import locoprop_jax as lp

Params = dict[str, dict[str, jax.Array]]


def loss_fn(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    code = jnp.tanh(x @ params["encoder"]["kernel"] + params["encoder"]["bias"])
    outputs = code @ params["decoder"]["kernel"] + params["decoder"]["bias"]
    return lp.losses.squared_error(outputs, y).mean()


def init(key: jax.Array) -> Params:
    first, second = jax.random.split(key)
    return {
        "encoder": {"kernel": jax.random.normal(first, (4, 3)), "bias": jnp.zeros(3)},
        "decoder": {"kernel": jax.random.normal(second, (3, 2)), "bias": jnp.zeros(2)},
    }


def train(tx: optax.GradientTransformationExtraArgs, params: Params, x: jax.Array) -> list[float]:
    y = x[:, :2]
    capture = lp.value_grad_and_capture(loss_fn)
    state = tx.init(params)

    @jax.jit
    def step(params: Params, state: optax.OptState) -> tuple[Any, optax.OptState, jax.Array]:
        loss, grads, captured = capture(params, x, y)
        assert_type(captured, lp.Captured)
        updates, state = tx.update(grads, state, params, captured=captured)
        return optax.apply_updates(params, updates), state, loss

    losses: list[float] = []
    for _ in range(3):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    return losses


def look(layers: lp.Layers) -> None:
    for name, layer in layers.items():
        assert_type(name, str)
        assert_type(layer, lp.Layer)
        assert_type(layer.rows, int | None)
        assert_type(layer.transfer, lp.Transfer)
    assert_type(layers.to_dict(), dict[str, Any])
    assert_type(layers.table(fold=True), str)
    assert_type(lp.__version__, str)
    print(lp.__version__, layers, sep="\n")


def mistakes(layers: lp.Layers) -> None:
    lp.foof(layers, dampin=1.0)  # type: ignore
    lp.lnb(layers, unit=3)  # type: ignore
    lp.find_layers(3)  # type: ignore
    layers.no_such_thing()  # type: ignore
    lp.no_such_thing  # type: ignore  # noqa: B018


def main() -> None:
    params = init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (16, 4))
    layers = lp.find_layers(loss_fn, params, x, x[:, :2])
    assert_type(layers, lp.Layers)
    look(layers)
    schedule = optax.cosine_decay_schedule(0.1, 10)
    foof = lp.foof(layers, schedule, damping=0.5)
    assert_type(foof, optax.GradientTransformationExtraArgs)
    with_adam = lp.with_fallback(lp.lnb(layers), layers, optax.adam(1e-3))
    assert_type(with_adam, optax.GradientTransformationExtraArgs)
    locoprop = lp.locoprop_s(layers, 0.1, iterations=3, regularizer=lp.l2())
    chained = optax.chain(lp.scale_by_foof(layers), optax.scale_by_learning_rate(0.01))
    for tx in (with_adam, locoprop, chained):
        losses = train(optax.with_extra_args_support(tx), params, x)
        assert losses[-1] < losses[0], losses
    loss, _, captured = lp.accumulate(lp.value_grad_and_capture(loss_fn))(
        params, x.reshape(2, 8, 4), x[:, :2].reshape(2, 8, 2)
    )
    assert_type(captured["encoder"], lp.LayerArrays)
    assert_type(captured["encoder"].inputs, jax.Array)
    assert captured["encoder"].inputs.shape == (16, 1, 4)
    product = lp.gauss_newton_vector_product(loss_fn, params, x, x[:, :2])
    print(float(loss), jax.tree.map(jnp.shape, product(params)))


if __name__ == "__main__":
    main()
