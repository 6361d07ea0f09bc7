"""Train and save now and then; go on from the last checkpoint, if there is one.

    python -m tests.restarts FOLDER pickle|orbax [STEP]

Prints where it starts, and at the end the bytes of parameters and state as text. After that step it
is killed, in the middle of whatever else it does.
"""

import os
import pickle
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import locoprop_jax as lp

STEPS, EVERY = 60, 4


def loss_fn(params: dict, x: jax.Array, key: jax.Array) -> jax.Array:
    kept = jax.random.bernoulli(key, 0.9, x.shape)
    h = jnp.tanh((x * kept) @ params["code"]["kernel"] + params["code"]["bias"])
    return lp.losses.squared_error(h @ params["out"]["kernel"], x).sum(-1).mean()


def batch(step: int) -> tuple[jax.Array, jax.Array]:
    """What a step sees, whoever takes it."""
    x = np.random.default_rng(step).normal(size=(8, 4)).astype(np.float32)
    return jnp.asarray(x), jax.random.key(step)


def start() -> dict:
    rng = np.random.default_rng(0)
    kernels = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((4, 3), (3, 4)))
    return {
        "code": {"kernel": next(kernels), "bias": jnp.zeros(3, jnp.float32)},
        "out": {"kernel": next(kernels)},
    }


class Pickled:
    """Checkpoints in one file, which the next one replaces as a whole."""

    def __init__(self, folder: Path):
        self.path = folder / "checkpoint.pickle"

    def restore(self, template: Any) -> tuple[int, Any]:
        if not self.path.exists():
            return 0, template
        step, tree = pickle.loads(self.path.read_bytes())
        return step, jax.tree.map(jnp.asarray, tree)

    def save(self, step: int, tree: Any) -> None:
        beside = self.path.with_suffix(".new")
        beside.write_bytes(pickle.dumps((step, jax.tree.map(np.array, tree))))
        os.replace(beside, self.path)

    def close(self) -> None:
        pass


class Orbax:
    """Checkpoints that are written while training goes on."""

    def __init__(self, folder: Path):
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=True)
        self.manager = ocp.CheckpointManager(folder.resolve() / "orbax", options=options)

    def restore(self, template: Any) -> tuple[int, Any]:
        last = self.manager.latest_step()
        if last is None:
            return 0, template
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
        return last, self.manager.restore(last, args=ocp.args.StandardRestore(shapes))

    def save(self, step: int, tree: Any) -> None:
        self.manager.save(step, args=ocp.args.StandardSave(tree))

    def close(self) -> None:
        self.manager.wait_until_finished()
        self.manager.close()


def main(folder: Path, store: str, last: int | None = None) -> Iterator[str]:
    """Train to the end, or be killed after a step; what is to be printed."""
    params = start()
    layers = lp.find_layers(loss_fn, params, *batch(0))
    rates = optax.cosine_decay_schedule(0.05, STEPS)
    tx = optax.chain(lp.foof(layers, rates, inverse_period=5), lp.average_iterates())

    @jax.jit
    def step(params: dict, state: optax.OptState, x: jax.Array, key: jax.Array) -> tuple:
        _, grads, captured = lp.value_grad_and_capture(loss_fn)(params, x, key)
        updates, state = tx.update(grads, state, params, captured=captured)
        return optax.apply_updates(params, updates), state

    checkpoints = {"pickle": Pickled, "orbax": Orbax}[store](folder)
    done, (params, state) = checkpoints.restore((params, tx.init(params)))
    yield f"from {done}"
    while done < STEPS:
        params, state = step(params, state, *batch(done))
        done += 1
        if done % EVERY == 0:
            checkpoints.save(done, (params, state))
        if done == last:
            os.kill(os.getpid(), signal.SIGKILL)
    checkpoints.close()
    yield b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((params, state))).hex()


if __name__ == "__main__":
    for line in main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])):
        print(line, flush=True)
