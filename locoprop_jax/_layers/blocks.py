"""A layer's kernel and bias as methods handle them: apart, beside the rows they meet.

A block holds the parts of a layer that a method was given, which under `optax.masked` may be one
of the two. `matrix` makes it the W of the papers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from locoprop_jax import _linalg
from locoprop_jax._layers.captured import Captured
from locoprop_jax._layers.layers import Layer, Layers, Points, parameter_paths
from locoprop_jax._layers.made import Space, paths, read
from locoprop_jax._layers.rows import Block, join_rows
from locoprop_jax._trees import is_complex, leaves_by_path, wide_dtype

# --- parameters ----------------------------------------------------------------------------------


def blocks(
    layers: Layers, tree: Any, space: Space = "gradients", points: Points | None = None
) -> dict[str, Block]:
    """The kernels and biases in a tree by layer, in float32 or float64, without masked ones.

    Of complex layers in numbers whose parts are these.

    Args:
      layers: from `find_layers`.
      tree: like the parameters.
      space: what it holds: values, changes or gradients of the parameters.
      points: where kernels that are made of parameters are linearised, from `Captured`.

    Raises:
      ValueError: the tree is of another model, or a layer has a real kernel and a complex bias, or
        the other way round.
    """
    leaves = leaves_by_path(tree)
    _check_model(layers, leaves)
    found_blocks = {}
    for name, layer in layers.items():
        found = {
            part: read(place, leaves, space, (points or {}).get((name, part)))
            for part, place in layer.parts.items()
            if all(path in leaves for path in paths(place))
        }
        if found:
            _check_kind(layer, found)
            dtype = wide_dtype(found.values())
            found_blocks[name] = {part: leaf.astype(dtype) for part, leaf in found.items()}
    return found_blocks


def _check_model(layers: Layers, leaves: Mapping[str, Any]) -> None:
    remedy = "Call `find_layers` with the loss function and the parameters that you train."
    parameters = [parameter for layer in layers.values() for parameter in layer.parameters]
    if leaves and not any(parameter.path in leaves for parameter in parameters):
        raise ValueError(
            f"None of the parameters is in a layer: the layers have {parameters[0].path!r} and so "
            f"on, the parameters are {next(iter(leaves))!r} and so on. {remedy}"
        )
    for parameter in parameters:
        shape = getattr(leaves.get(parameter.path), "shape", parameter.shape)
        if shape != parameter.shape:
            raise ValueError(
                f"The parameter {parameter.path!r} has the shape {shape}, in the layers "
                f"{parameter.shape}. {remedy}"
            )


def _check_kind(layer: Layer, found: Block) -> None:
    kinds = {part: is_complex(leaf.dtype) for part, leaf in found.items()}
    if len(set(kinds.values())) > 1:
        path = paths(layer.parts["kernel" if kinds["bias"] else "bias"])[0]
        raise ValueError(
            f"The layer {layer.name!r} has one real parameter, {path!r}, and a complex one beside "
            f"it. Store both as complex numbers, or both as real ones."
        )


def dtype_of(block: Block) -> Any:
    """Of all its parts."""
    return next(iter(block.values())).dtype


def others(layers: Layers, tree: Any) -> list[Array]:
    """The leaves that are in no layer."""
    inside = parameter_paths(layers)
    return [leaf for path, leaf in leaves_by_path(tree).items() if path not in inside]


def unit_norm(leaf: Array) -> Array:
    """A leaf in no layer divided by its Euclidean norm, whatever its size; zeros for zeros."""
    wide = leaf.astype(wide_dtype([leaf]))
    size = jnp.max(jnp.abs(wide), initial=0)
    near = wide / jnp.where(size > 0, size, 1).astype(wide.dtype)
    norm = jnp.sqrt(_linalg.squares(near).sum())
    return (near / jnp.where(norm > 0, norm, 1).astype(wide.dtype)).astype(leaf.dtype)


# --- curvature -----------------------------------------------------------------------------------


def curvature_of(
    captured: Captured, name: str, source: str, dtype: Any, *, is_after: bool = False
) -> Float[Array, "*stack samples batch shared d_out"]:
    """The curvature cotangents of a layer, as a method asked for them.

    Args:
      captured: of the batch.
      name: of the layer.
      source: "captured", or "empirical" for the loss's own cotangents.
      dtype: of the result.
      is_after: whether of the outputs after the transfer function.

    Raises:
      ValueError: they were not captured.
    """
    arrays = captured[name]
    if source == "captured":
        curvature = arrays.transferred_curvature if is_after else arrays.curvature
        return curvature.astype(dtype)
    empirical = arrays.transferred_cotangents if is_after else arrays.cotangents
    return empirical[..., None, :, :, :].astype(dtype) * jnp.sqrt(
        jnp.asarray(captured.terms, dtype)
    )


def curvature_rows(
    captured: Captured, name: str, source: str, dtype: Any, *, is_after: bool = False
) -> Float[Array, "*stack samples_rows d_out"]:
    """`curvature_of` as rows: their second moment, summed, is the Fisher's factor of the outputs.

    Raises:
      ValueError: they were not captured.
    """
    return join_rows(curvature_of(captured, name, source, dtype, is_after=is_after), 3)


def divide(
    block: Block,
    mean: Float[Array, " d_in"],
    bias: float | Float[Array, ""],
    solve: Callable[[Array], Array],
) -> Block:
    """M^-1 block for a damped second moment M of (x, 1), or of x without a bias.

    The bias is eliminated first.

    Args:
      block: with a kernel.
      mean: of x.
      bias: the inverse of the bias's own entry in M.
      solve: divides by what then remains for the kernel: with a free bias the damped covariance.
    """
    if "bias" not in block:
        return {"kernel": solve(block["kernel"])}
    bias = jnp.asarray(bias, block["bias"].dtype)
    alone = bias * block["bias"]
    kernel = solve(block["kernel"] - jnp.conj(mean)[:, None] * alone[None])
    return {"kernel": kernel, "bias": alone - bias * (mean @ kernel)}


def matrix(block: Block) -> Float[Array, "d d_out"]:
    """A block as one matrix, the bias its last row."""
    return jnp.concatenate(
        [block[part].reshape(-1, block[part].shape[-1]) for part in _parts(block)]
    )


def unmatrix(value: Float[Array, "d d_out"], like: Block) -> Block:
    """The inverse of `matrix`."""
    parts = {"kernel": lambda: value[: like["kernel"].shape[0]], "bias": lambda: value[-1]}
    return {part: parts[part]() for part in like}


def _parts(block: Block) -> list[str]:
    return [part for part in ("kernel", "bias") if part in block]
