"""What a newcomer writes, in an environment that holds nothing but the package: no Flax either.

Run by `python3 make.py package`, from outside of the repository.
"""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import optax

import locoprop_jax as lp


def loss_fn(params: dict[str, dict[str, jax.Array]], batch: jax.Array) -> jax.Array:
    code = jnp.tanh(batch @ params["encoder"]["kernel"] + params["encoder"]["bias"])
    logits = code @ params["decoder"]["kernel"] + params["decoder"]["bias"]
    return optax.sigmoid_binary_cross_entropy(logits, batch).sum(-1).mean()


def main() -> None:
    assert importlib.util.find_spec("flax") is None, "this environment is not empty"
    keys = jax.random.split(jax.random.key(0), 3)
    batch = jax.random.bernoulli(keys[0], 0.3, (32, 16)).astype(float)
    params: Any = {
        "encoder": {"kernel": 0.1 * jax.random.normal(keys[1], (16, 8)), "bias": jnp.zeros(8)},
        "decoder": {"kernel": 0.1 * jax.random.normal(keys[2], (8, 16)), "bias": jnp.zeros(16)},
    }
    layers = lp.find_layers(loss_fn, params, batch)
    print(layers)
    for name, tx in (
        ("foof", lp.foof(layers)),
        ("lnb", lp.lnb(layers)),
        ("locoprop_m", lp.locoprop_m(layers)),
    ):

        @jax.jit
        def step(params: Any, state: Any, tx: Any = tx) -> Any:
            loss, grads, captured = lp.value_grad_and_capture(loss_fn)(params, batch)
            updates, state = tx.update(grads, state, params, captured=captured)
            return optax.apply_updates(params, updates), state, loss

        trained, state = params, tx.init(params)
        losses = []
        for _ in range(10):
            trained, state, loss = step(trained, state)
            losses.append(float(loss))
        print(f"locoprop_jax {lp.__version__}, {name}: {losses[0]:.3f} -> {losses[-1]:.3f}")
        assert losses[-1] < losses[0]


if __name__ == "__main__":
    main()
