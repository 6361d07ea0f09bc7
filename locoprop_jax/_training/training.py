"""What training loops need around a method: an optimizer for the parameters in no layer."""

from __future__ import annotations

from typing import Any

import jax
import optax

from locoprop_jax._layers.layers import Layers, parameter_paths
from locoprop_jax._trees import path_name


def with_fallback(
    tx: optax.GradientTransformation,
    layers: Layers,
    fallback: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Give the parameters in no layer an optimizer of their own.

    Args:
      tx: for the parameters of `layers`.
      layers: from `find_layers(..., on_uncaptured="pass")`.
      fallback: for all others, `optax.adam(1e-3)` for example.

    Returns:
      One optimizer for all parameters (an `optax.partition`).
    """
    captured = parameter_paths(layers)

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "layers" if path_name(path) in captured else "fallback",
            params,
        )

    return optax.partition({"layers": tx, "fallback": fallback}, labels)
