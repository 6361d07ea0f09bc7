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
    """Float64 if one of the leaves is, else float32: half precision is too little to compute in.

    Complex, of numbers like these, if one of the leaves is complex.
    """
    dtypes = {jnp.dtype(leaf.dtype) for leaf in leaves}
    is_double = not dtypes.isdisjoint({jnp.dtype("float64"), jnp.dtype("complex128")})
    real = jnp.float64 if is_double else jnp.float32
    return complex_dtype(real) if any(map(is_complex, dtypes)) else real


# --- complex numbers -----------------------------------------------------------------------------


def is_complex(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.complexfloating)


def real_dtype(dtype: Any) -> Any:
    """Of the real parts of such numbers: the dtype itself if they are real."""
    return jnp.finfo(dtype).dtype


def complex_dtype(dtype: Any) -> Any:
    """Of complex numbers whose parts have this dtype, or are widened to float32."""
    return jnp.complex128 if real_dtype(dtype) == jnp.float64 else jnp.complex64


def ascent(tree: Any) -> Any:
    """JAX's gradient of a real number, as the direction in which that number rises fastest.

    For a complex parameter u + iv JAX's is dL/du - i dL/dv, which is the conjugate of it.
    """
    return jax.tree.map(lambda x: jnp.conj(x) if jnp.iscomplexobj(x) else x, tree)
