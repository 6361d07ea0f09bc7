"""Networks that are a sequence of dense layers, each fed by the one before and by nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from locoprop_jax._layers.blocks import blocks
from locoprop_jax._layers.layers import Layer, Layers, Points


def check_sequence(layers: Layers, method: str, remedy: str) -> tuple[str, ...]:
    """The names of the layers, from the first to the output layer.

    Args:
      layers: from `find_layers`.
      method: for errors.
      remedy: what to use for other networks.

    Raises:
      ValueError: they are not such a sequence, or a transfer function has no derivative by entries.
    """
    needs = f"`{method}` needs layers that feed one another in a single chain, with nothing but "
    needs += "elementwise functions in between, but"
    for layer in layers.values():
        if layer.kind != "dense" or not layer.is_single:
            raise ValueError(f"{needs} {layer.name} is no single dense layer. {remedy}.")
    for before, layer in itertools.pairwise(layers.values()):
        if why := _break(before, layer):
            raise ValueError(f"{needs} {why}. {remedy}.")
    for layer in list(layers.values())[:-1]:
        if not layer.transfer.is_elementwise:
            raise ValueError(
                f"`{method}` needs the derivative of each transfer function by entries, but that "
                f"of {layer.name} is {layer.transfer.name}, a function of whole rows. {remedy}."
            )
    return tuple(layers)


def _break(before: Layer, layer: Layer) -> str:
    if before.is_output:
        return f"{before.name} feeds the loss and not {layer.name}"
    if layer.source is None:
        return f"what feeds {layer.name} is not the outputs of {before.name} alone"
    if layer.source != before.name:
        return f"{layer.source} feeds {layer.name} beside other layers"
    if before.bypasses:
        return f"the outputs of {before.name} also reach the loss past {layer.name}"
    return ""


def kernels(
    layers: Layers, params: Any, names: Sequence[str], method: str, points: Points
) -> dict[str, Any]:
    """The kernels (d_in, d_out) of some layers, in float32 or float64.

    Raises:
      TypeError: there are no parameters.
      ValueError: a kernel is masked.
    """
    if params is None:
        raise TypeError(f"`{method}` needs the parameters: pass `params` to it.")
    found = blocks(layers, params, "values", points)
    missing = [name for name in names if "kernel" not in found.get(name, {})]
    if missing:
        raise ValueError(
            f"`{method}` propagates curvature through the kernels of all layers above, but that of "
            f"{', '.join(missing)} is masked. Give it all parameters, and mask its updates."
        )
    return {name: found[name]["kernel"] for name in names}
