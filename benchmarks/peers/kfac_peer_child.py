"""kfac-jax's half of `kfac_peer`: a process that takes its steps when it is told to.

It runs in an environment of its own, with kfac-jax, JAX and NumPy and nothing of this repository.
Requests come as lines of JSON on stdin and each is answered with one on stdout; arrays travel in
.npz files. `Child` in `kfac_peer_sides` is the other end.

    {"do": "load", "arrays": "problem.npz"}                  images, batches, initial parameters
    {"do": "start", "options": {...}, "arguments": {...}}    an optimizer; the initial parameters
    {"do": "steps", "count": 20}           seconds of that many steps, the batches' losses before
    {"do": "save", "path": "params.npz"}   the parameters
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import kfac_jax  # pyright: ignore[reportMissingImports]
import numpy as np

Params = list[dict[str, jax.Array]]


def make_loss(l2_reg: float) -> Callable[[Params, jax.Array], jax.Array]:
    """The autoencoder's loss; tanh everywhere but at the code, in the middle, and the logits."""

    def loss_fn(params: Params, images: jax.Array) -> jax.Array:
        hidden = images
        for i, layer in enumerate(params, 1):
            hidden = hidden @ layer["kernel"] + layer["bias"]
            if i not in (len(params) // 2, len(params)):
                hidden = jnp.tanh(hidden)
        kfac_jax.register_sigmoid_cross_entropy_loss(hidden, images)
        entropy = jnp.maximum(hidden, 0) - hidden * images + jnp.log1p(jnp.exp(-jnp.abs(hidden)))
        return entropy.sum(-1).mean() + l2_reg / 2 * kfac_jax.utils.inner_product(params, params)

    return loss_fn


class Peer:
    """One optimizer at a time, and where it stands.

    Its optimizers are kept: those that differ by nothing but the initial damping are one, which
    compiles once.
    """

    def __init__(self) -> None:
        self.optimizers: dict[str, Any] = {}

    def load(self, arrays: str) -> dict[str, Any]:
        with np.load(arrays) as content:
            self.images, self.order = content["images"], content["order"]
            layers = sum(name.startswith("kernel") for name in content.files)
            self.initial = [
                {"kernel": content[f"kernel{i}"], "bias": content[f"bias{i}"]}
                for i in range(layers)
            ]
        return {"jax": jax.__version__, "device": jax.devices()[0].device_kind}

    def start(self, options: Mapping[str, Any], arguments: Mapping[str, float]) -> dict[str, Any]:
        """A new run from the initial parameters.

        Args:
          options: of `kfac_jax.Optimizer`.
          arguments: of each step: learning_rate, momentum, damping, where they do not adapt.
        """
        begin = time.perf_counter()
        options = dict(options)
        damping = options.get("initial_damping")
        self.burn_in = options.get("num_burnin_steps", 10)
        key = json.dumps(options | {"initial_damping": damping is not None}, sort_keys=True)
        if key not in self.optimizers:
            loss_fn = make_loss(options["l2_reg"])
            self.optimizers[key] = kfac_jax.Optimizer(jax.value_and_grad(loss_fn), **options)
        self.optimizer = self.optimizers[key]
        self.arguments = {name: jnp.asarray(value) for name, value in arguments.items()}
        self.params = jax.tree_util.tree_map(jnp.array, self.initial)  # copies: they are donated
        self.rng, key_of_init = jax.random.split(jax.random.PRNGKey(0))
        self.state = self.optimizer.init(self.params, key_of_init, self._batch(0))
        if damping is not None:
            self.state.damping = jnp.asarray(damping, self.state.damping.dtype)
        self.taken = 0
        jax.block_until_ready(self.state.velocities)
        return {"seconds": time.perf_counter() - begin}

    def steps(self, count: int) -> dict[str, Any]:
        batches = [self._batch(self.taken + i) for i in range(count)]
        if self.taken == 0:  # the burn-in sees the first batches, and the steps see them again
            batches = [self._batch(i) for i in range(self.burn_in)] + batches
        keys = list(jax.random.split(jax.random.fold_in(self.rng, self.taken), count))
        jax.block_until_ready((batches, keys))
        iterator, losses = iter(batches), []
        begin = time.perf_counter()
        for key in keys:
            losses.append(self._step(key, iterator))
        jax.block_until_ready(self.params)
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "losses": [float(loss) for loss in losses]}

    def save(self, path: str) -> dict[str, Any]:
        arrays: dict[str, Any] = {
            f"{name}{i}": np.asarray(array)
            for i, layer in enumerate(self.params)
            for name, array in layer.items()
        }
        np.savez(path, **arrays)
        return {"damping": float(self.state.damping)}

    def _step(self, key: jax.Array, batches: Iterator[jax.Array]) -> jax.Array:
        self.params, self.state, stats = self.optimizer.step(
            self.params,
            self.state,
            key,
            data_iterator=batches,
            global_step_int=self.taken,
            **self.arguments,
        )
        self.taken += 1
        return stats["loss"]

    def _batch(self, step: int) -> jax.Array:
        return jnp.array(self.images[self.order[step]])


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer until there are no more requests; what goes wrong is an answer too."""
    peer = Peer()
    for line in requests:
        request = json.loads(line)
        try:
            answer = getattr(peer, request.pop("do"))(**request)
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    serve(sys.stdin, answers)
