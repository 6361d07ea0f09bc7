"""Steps of a small transformer on eight simulated devices; run in a process of its own.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.sharded_steps

Prints, as JSON, for each way to lay arrays out over devices and each method: the largest difference
of its updates from those of one device, the size of the largest array that is gathered, and the
shapes of the systems that one device factorises.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import locoprop_jax as lp
from benchmarks.shared.collectives import factorised, sent

LAYERS, BATCH, TOKENS, WIDTH, HIDDEN, HEADS = 8, 32, 8, 8, 16, 2

METHODS = {
    "foof": lambda layers: lp.scale_by_foof(layers, damping=1e-2),
    "foof_kept": lambda layers: lp.scale_by_foof(layers, decay=0.9, inverse_period=2),
    "lnb": lambda layers: lp.scale_by_lnb(layers),
    "kfac": lambda layers: lp.scale_by_kfac(layers, curvature="empirical"),
    "locoprop_s": lambda layers: lp.locoprop_s(layers),
    "locoprop_m": lambda layers: lp.locoprop_m(layers),
}


def init_params() -> dict:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2]))

    blocks = {
        "qkv": normal(LAYERS, WIDTH, 3 * WIDTH),
        "mix": normal(LAYERS, WIDTH, WIDTH),
        "up": normal(LAYERS, WIDTH, HIDDEN),
        "down": normal(LAYERS, HIDDEN, WIDTH),
    }
    return {"blocks": blocks, "out": normal(WIDTH, WIDTH)}


def loss_fn(params: dict, batch: tuple, activations: NamedSharding | None = None) -> jax.Array:
    """The loss; activations are laid out as models of several devices say it."""
    x, y = batch

    def block(x: jax.Array, p: dict) -> tuple[jax.Array, None]:
        if activations is not None:
            x = jax.lax.with_sharding_constraint(x, activations)
        heads = (x @ p["qkv"]).reshape(*x.shape[:2], 3, HEADS, -1)
        q, k, v = (heads[:, :, i] for i in range(3))
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k), -1)
        x = x + jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape) @ p["mix"]
        return x + jnp.tanh(x @ p["up"]) @ p["down"], None

    x, _ = jax.lax.scan(block, x, params["blocks"])
    return 0.5 * jnp.mean(jnp.square(x @ params["out"] - y).sum((1, 2)))


def layouts() -> dict[str, tuple[Mesh, P, dict]]:
    """By name the mesh, the layout of the batch and those of parameters."""
    devices = np.asarray(jax.devices())
    data, both = Mesh(devices, ("data",)), Mesh(devices.reshape(4, 2), ("data", "model"))
    columns, rows, whole = P(None, None, "model"), P(None, "model"), P()
    names = ("qkv", "mix", "up", "down")
    return {
        "data parallel": (data, P("data"), {"blocks": dict.fromkeys(names, whole), "out": whole}),
        "fsdp": (
            data,
            P("data"),
            {"blocks": dict.fromkeys(names, P(None, "data")), "out": P("data")},
        ),
        "tensor parallel": (
            both,
            P("data"),
            {
                "blocks": {"qkv": columns, "mix": rows, "up": columns, "down": rows},
                "out": P(None, "model"),
            },
        ),
        "layers apart": (
            data,
            P("data"),
            {"blocks": dict.fromkeys(names, P("data")), "out": whole},
        ),
    }


def put(tree: dict, mesh: Mesh, specs: dict) -> dict:
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
    return jax.tree.map(place, tree, specs)


def put_state(state: optax.OptState, mesh: Mesh, apart: bool) -> optax.OptState:
    """Each stack of matrices over the devices, if the stacks of weights are."""

    def place(x: jax.Array) -> jax.Array:
        is_stack = apart and x.ndim > 1 and x.shape[0] == LAYERS
        return jax.device_put(x, NamedSharding(mesh, P("data") if is_stack else P()))

    return jax.tree.map(place, state)


def main() -> None:
    """Print the findings."""
    jax.config.update("jax_enable_x64", True)
    params, rng = init_params(), np.random.default_rng(1)
    batch = tuple(jnp.asarray(rng.normal(size=(BATCH, TOKENS, WIDTH))) for _ in range(2))
    layers = lp.find_layers(loss_fn, params, batch)
    results: dict[str, dict] = {}
    for method in sys.argv[1:] or METHODS:
        tx = METHODS[method](layers)

        def step(
            activations: NamedSharding | None,
            params: dict,
            state: optax.OptState,
            batch: tuple,
            tx=tx,
        ) -> tuple:
            loss = functools.partial(loss_fn, activations=activations)
            _, grads, captured = lp.value_grad_and_capture(loss)(params, batch)
            return tx.update(grads, state, params, captured=captured)

        expected, _ = jax.jit(step, static_argnums=0)(None, params, tx.init(params), batch)
        for layout, (mesh, of_batch, of_params) in layouts().items():
            state = put_state(tx.init(params), mesh, layout == "layers apart")
            inputs = (put(params, mesh, of_params), state, put(batch, mesh, (of_batch,) * 2))
            kept = jax.tree.map(lambda x: x.sharding, inputs[:2])  # as training goes on with them
            one = functools.partial(step, NamedSharding(mesh, of_batch))
            compiled = jax.jit(one, out_shardings=kept).lower(*inputs).compile()
            updates, _ = compiled(*inputs)
            error = max(
                float(jnp.max(jnp.abs(np.asarray(a) - b)) / jnp.max(jnp.abs(b)))
                for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True)
            )
            text = compiled.as_text()
            gathered = [
                own.size
                for own in sent(text, mesh.size)
                if own.operation in ("all-gather", "all-to-all")
            ]
            results.setdefault(layout, {})[method] = {
                "error": error,
                "gathered": max(gathered, default=0),
                "factorised": sorted(set(factorised(text))),
            }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
