"""The leaves of a tree of arrays: what they are called, and the dtype that serves them all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def path_name(path: Sequence[Any]) -> str:
    """A parameter's path as text: "encoder/Dense_0/kernel". NNX's trailing `.value` is left out."""
    if path and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value":
        path = path[:-1]
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a parameter tree by path; masked-out ones (`optax.MaskedNode`) are absent."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def wide_dtype(leaves: Iterable[Any]) -> Any:
    """Float64 if one of the leaves is, else float32: half precision is too little to compute in."""
    return jnp.float64 if any(leaf.dtype == jnp.float64 for leaf in leaves) else jnp.float32
