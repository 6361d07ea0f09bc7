"""Train for some steps and save, or restore and go on; each part in a process of its own.

    python -m tests.training_in_parts FOLDER first|second

Prints the bytes of the parameters after the last step, as text.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import locoprop_jax as lp

STEPS = 3


def loss_fn(params: dict, x: jax.Array) -> jax.Array:
    h = jnp.tanh(x @ params["code"]["kernel"] + params["code"]["bias"])
    return jnp.mean((h @ params["out"]["kernel"] - x) ** 2)


def start() -> tuple[dict, list[jax.Array]]:
    """Initial parameters and the batches of both parts."""
    rng = np.random.default_rng(0)
    params = {
        "code": {"kernel": jnp.asarray(rng.normal(size=(4, 3))), "bias": jnp.zeros(3)},
        "out": {"kernel": jnp.asarray(rng.normal(size=(3, 4)))},
    }
    return params, [jnp.asarray(rng.normal(size=(8, 4))) for _ in range(2 * STEPS)]


def main(folder: Path, part: str) -> str:
    """Train one part, or both at once if it is neither."""
    params, batches = start()
    tx = lp.foof(lp.find_layers(loss_fn, params, batches[0]), 1e-2, inverse_period=2)
    state = tx.init(params)

    @jax.jit
    def step(params: dict, state: optax.OptState, x: jax.Array) -> tuple:
        _, grads, captured = lp.value_grad_and_capture(loss_fn)(params, x)
        updates, state = tx.update(grads, state, params, captured=captured)
        return optax.apply_updates(params, updates), state

    with ocp.StandardCheckpointer() as checkpointer:
        path = folder.resolve() / "checkpoint"
        if part == "second":
            template = jax.tree.map(ocp.utils.to_shape_dtype_struct, (params, state))
            params, state = checkpointer.restore(path, template)
        span = {"first": batches[:STEPS], "second": batches[STEPS:]}
        for x in span.get(part, batches):
            params, state = step(params, state, x)
        if part == "first":
            checkpointer.save(path, (params, state))
            checkpointer.wait_until_finished()
    return b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)).hex()


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), sys.argv[2]))
