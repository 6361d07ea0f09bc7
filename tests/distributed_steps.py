"""Steps of a small transformer in two processes of four simulated devices each; one of the two.

    python -m tests.distributed_steps PORT INDEX [METHOD ...]

Prints, as JSON, for each way to lay arrays out over the eight devices and each method: the largest
difference of the parameters from those that one device trains, the bytes of state on one device
beside all of them, and from the compiled program the stacks of matrices that one device factorises,
the arrays that are gathered, and the bytes that it sends beside what is known from shapes.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import locoprop_jax as lp
from benchmarks.costs.communication import data_parallel
from benchmarks.shared.collectives import factorised, sent

PROCESSES, DEVICES, STEPS = 2, 4, 3
BLOCKS, WIDTH, CLASSES, BATCH, TOKENS = 2, 16, 8, 16, 4
LAYOUTS = ("data parallel", "fsdp")
METHODS: dict[str, Callable[[Any], optax.GradientTransformationExtraArgs]] = {
    "foof": lambda layers: lp.foof(layers, 0.1),
    "lnb": lambda layers: lp.lnb(layers, 0.1),
    "kfac": lp.kfac,
}
NAMES = {"foof": "FOOF", "lnb": "LNB", "kfac": "K-FAC"}


def init_params() -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape) / np.sqrt(shape[0])

    def block() -> dict[str, np.ndarray]:
        square = {name: normal(WIDTH, WIDTH) for name in ("query", "key", "value", "mix")}
        wide = {"up": normal(WIDTH, 2 * WIDTH), "bias": np.zeros(2 * WIDTH)}
        return square | wide | {"down": normal(2 * WIDTH, WIDTH)}

    return {"blocks": [block() for _ in range(BLOCKS)], "out": normal(WIDTH, CLASSES)}


def loss_fn(params: Any, batch: Any) -> jax.Array:
    """Of the class of each token."""
    x, labels = batch
    for p in params["blocks"]:
        weights = jax.nn.softmax((x @ p["query"]) @ jnp.swapaxes(x @ p["key"], 1, 2) / 4)
        x = x + weights @ (x @ p["value"]) @ p["mix"]
        x = x + jnp.tanh(x @ p["up"] + p["bias"]) @ p["down"]
    losses = lp.losses.softmax_cross_entropy_with_integer_labels(x @ params["out"], labels)
    return losses.mean(1).mean()


def make_step(tx: optax.GradientTransformationExtraArgs, curvature: str | None) -> Callable:
    """A step as on one device."""

    def step(params: Any, state: Any, batch: Any, key: jax.Array) -> tuple[Any, Any]:
        capture = lp.value_grad_and_capture(loss_fn, curvature=curvature)
        sampled = {} if curvature is None else {"rng": key}
        loss, grads, captured = capture(params, batch, **sampled)
        updates, state = tx.update(
            grads,
            state,
            params,
            captured=captured,
            value=loss,
            grad=grads,
            value_fn=lambda params: loss_fn(params, batch),
        )
        return optax.apply_updates(params, updates), state

    return step


def along_an_axis(mesh: Mesh, array: Any) -> NamedSharding:
    """FSDP's layout of an array: along its longest axis that all devices divide."""
    axes = [i for i, size in enumerate(array.shape) if size % mesh.size == 0]
    if not axes:
        return NamedSharding(mesh, P())
    longest = max(axes, key=lambda i: array.shape[i])
    return NamedSharding(mesh, P(*(None,) * longest, "data"))


def put(tree: Any, shardings: Any) -> Any:
    """Each process its own parts of what both have; keys of random numbers as they are."""

    def place(x: Any, sharding: NamedSharding) -> jax.Array:
        array = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: array[index])

    return jax.tree.map(place, tree, shardings)


def bytes_by_depth(text: str, devices: int) -> list[float]:
    """That one device sends: in each step, where statistics are gathered, where they are inverted.

    These are no conditional deep, one and two.
    """
    found = [0.0, 0.0, 0.0]
    for own in sent(text, devices):
        found[min(own.depth, 2)] += own.bytes(devices)
    return found


def report(method: str, layout: str, mesh: Mesh) -> dict[str, Any]:
    """One method in one layout."""
    rng, params = np.random.default_rng(1), init_params()
    inputs = rng.normal(size=(STEPS, BATCH, TOKENS, WIDTH))
    labels = rng.integers(0, CLASSES, (STEPS, BATCH, TOKENS))
    batches = list(zip(inputs, labels, strict=True))
    layers = lp.find_layers(loss_fn, params, batches[0])
    tx = METHODS[method](layers)
    step = make_step(tx, "fisher_mc" if method == "kfac" else None)
    whole, by_example = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

    def train(step: Callable, held: Any, batches: Any, keys: Any) -> Any:
        for batch, key in zip(batches, keys, strict=True):
            held = step(*held, batch, key)
        return held[0]

    keys = [jax.random.key(i) for i in range(STEPS)]
    held = (params, jax.jit(tx.init)(params))
    expected = train(jax.jit(step), held, batches, keys)

    laid = jax.tree.map(
        lambda x: whole if layout == "data parallel" else along_an_axis(mesh, x), held
    )
    held, size = put(held, laid), sum(x.nbytes for x in jax.tree.leaves(held[1]))
    on_one = sum(x.addressable_data(0).nbytes for x in jax.tree.leaves(held[1]))
    batches = [put(batch, (by_example, by_example)) for batch in batches]
    keys = [jax.random.wrap_key_data(put(jax.random.key_data(key), whole)) for key in keys]
    compiled = jax.jit(step, out_shardings=laid).lower(*held, batches[0], keys[0]).compile()
    found = jax.jit(lambda tree: tree, out_shardings=whole)(train(compiled, held, batches, keys))
    errors = [
        float(np.abs(np.asarray(own.addressable_data(0)) - other).max())
        for own, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    ]
    text = compiled.as_text()
    known = data_parallel(layers, params, BATCH * TOKENS, mesh.size)[NAMES[method]]
    return {
        "error": max(errors),
        "state": on_one / size,
        "factorised": factorised(text),
        "sent": bytes_by_depth(text, mesh.size),
        "by shapes": list(known),
        "gathered": [own.shape for own in sent(text, mesh.size) if own.operation == "all-gather"],
    }


def main(port: str, index: str, *methods: str) -> None:
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)  # to compile sooner
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", PROCESSES, int(index))
    assert jax.device_count() == PROCESSES * DEVICES
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    results: dict[str, Any] = {layout: {} for layout in LAYOUTS}
    for method in methods or METHODS:
        for layout in LAYOUTS:
            results[layout][method] = report(method, layout, mesh)
    print(json.dumps(results), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
