"""How many bytes each device sends in a step of each method, data-parallel; nothing is run.

    python -m benchmarks communication                 GPT-2 small on a thousand devices
    python -m benchmarks communication --devices 8

What is added up or gathered over devices is known from shapes: the gradient in every step, FOOF's
and K-FAC's statistics where they are gathered and their inverses where they are made, once in a
period of 20 steps each; LNB's sums in every step. Sums go round a ring: of an array on D devices
each sends 2 (D - 1) / D. Inverses are counted as sums; where they can be gathered instead it is up
to a half less. tests/training/test_distributed.py holds this beside compiled programs.
"""

import argparse
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import locoprop_jax as lp
from benchmarks.costs.costs import PERIOD, cross_entropy
from benchmarks.shared import cli
from benchmarks.shared.models import LanguageModel
from benchmarks.shared.report import aligned
from benchmarks.shared.timing import bytes_of
from locoprop_jax._neurons.amortised import AmortisedState
from locoprop_jax._neurons.layer_system import metric_flops

PRODUCTS = 3  # with the metric, in a step of LNB: two iterations, and one for its start


class Bytes(NamedTuple):
    """That each device sends.

    Attributes:
      always: in every step.
      gathering: more where statistics are gathered.
      inverting: and where they are inverted, at most.
    """

    always: float
    gathering: float = 0.0
    inverting: float = 0.0

    @property
    def mean(self) -> float:
        """Over a period of inversions."""
        return self.always + (self.gathering + self.inverting) / PERIOD


def data_parallel(layers: lp.Layers, params: Any, rows: int, devices: int) -> Mapping[str, Bytes]:
    """By method.

    Args:
      layers: from `find_layers`.
      params: their arrays, or shapes of these.
      rows: of the whole batch: its examples, times their positions.
      devices: how many.
    """
    ring = 2 * (devices - 1) / devices
    gradient = ring * bytes_of(params)
    found = {"Adam": Bytes(gradient)}
    for name, tx in {"FOOF": lp.foof(layers), "K-FAC": lp.kfac(layers)}.items():
        state = _amortised(jax.eval_shape(tx.init, params))
        found[name] = Bytes(
            gradient, ring * bytes_of(state.statistics), ring * bytes_of(state.inverse)
        )
    numbers = sum(_sums_of_lnb(layer, rows) for layer in layers.values())
    itemsize = max(leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    return found | {"LNB": Bytes(gradient + ring * itemsize * numbers)}


def _amortised(state: optax.OptState) -> AmortisedState:
    """The part of a complete optimizer's state that has statistics."""
    is_it = lambda node: isinstance(node, AmortisedState) or hasattr(node, "inverse")  # noqa: E731
    return next(node for node in jax.tree.leaves(state, is_leaf=is_it) if is_it(node))


def _sums_of_lnb(layer: lp.Layer, rows: int) -> int:
    """The numbers that are added up over devices: X'X once, or each product with the metric."""
    copies = layer.stack or 1
    moments = 2 * layer.d_in
    if layer.is_lookup:
        return copies * (layer.d_in + moments)
    flops = metric_flops(rows, layer.d_in, layer.d_out, PRODUCTS)
    if flops["gram"] < flops["direct"]:
        return copies * (layer.d_in**2 + moments)
    return copies * (PRODUCTS * layer.d_in * layer.d_out + moments)


def gpt2() -> tuple[lp.Layers, Any]:
    """Its layers and parameters, of shapes alone."""
    model = LanguageModel(50257, 12, 768, 12)
    tokens = jax.ShapeDtypeStruct((1, 1024), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)

    def loss_fn(params: Any, tokens: Any) -> jax.Array:
        logits: Any = model.apply(params, tokens)
        return cross_entropy(logits, tokens)

    return lp.find_layers(loss_fn, params, tokens), params


def table(found: Mapping[str, Bytes]) -> str:
    header = ("method", "in every step", "statistics", "inverses", "mean of 20", "beside Adam's")
    adam = found["Adam"].mean
    rows = [
        (name, *(f"{x / 1e6:,.0f} MB" for x in (*own, own.mean)), f"{own.mean / adam:.2f}")
        for name, own in found.items()
    ]
    return aligned(header, rows)


def main(argv: cli.Argv = None) -> int:
    parser: argparse.ArgumentParser = cli.make_parser(
        "communication", "The bytes that each device sends in a step, data-parallel."
    )
    cli.add_numbers(
        parser,
        {
            "devices": (1024, "that the batch is divided among"),
            "tokens": (2**19, "in the whole batch"),
        },
    )
    args = parser.parse_args(argv)
    layers, params = gpt2()
    size = bytes_of(params)
    print(f"GPT-2 small, {size / 1e6:,.0f} MB of parameters, {args.devices} devices; sent by each:")
    print(table(data_parallel(layers, params, args.tokens, args.devices)))
    return 0
