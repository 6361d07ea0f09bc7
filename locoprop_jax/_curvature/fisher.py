"""What the exact Fisher of a batch is good for beside steps: products, norms, Laplace samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from locoprop_jax import _linalg
from locoprop_jax._checks import check_fisher, check_layers, check_positive, check_real
from locoprop_jax._curvature import woodbury
from locoprop_jax._curvature.woodbury import Columns, Weights
from locoprop_jax._layers.blocks import blocks
from locoprop_jax._layers.captured import Captured, check_captured, check_real_captured
from locoprop_jax._layers.layers import Layers, Points, replace
from locoprop_jax._layers.made import Space
from locoprop_jax._layers.rows import Block


def fisher_product(
    layers: Layers,
    captured: Captured,
    vector: Any,
    *,
    block_diagonal: bool = False,
    curvature: str = "captured",
) -> Any:
    """F v, with the Fisher or Gauss-Newton matrix F of a batch.

    F is that of the loss as written. Which matrix is said by what was captured, as for
    `scale_by_natural_gradient`.

    Args:
      layers: from `find_layers`.
      captured: of the batch, from `value_grad_and_capture(..., curvature=...)`.
      vector: v, a tree like the parameters.
      block_diagonal: whether only the layers' own blocks of F count.
      curvature: "captured", or "empirical" for the cotangents of the loss itself.

    Returns:
      A tree like `vector`; zero for parameters in no layer.

    Raises:
      ValueError: no layers, an unknown `curvature`, `captured` from another model or without
        curvature or with exact columns that join positions, layers that differ in their examples.
      TypeError: `captured` is not a `Captured`.

    References:
      Benzing, `Gradient Descent on Neurons and its Link to Approximate Second-Order Optimization
      <https://arxiv.org/abs/2201.12250>`_, 2022: appendix I.
    """
    options = (block_diagonal, curvature)
    own, systems = _open("fisher_product", layers, captured, vector, "changes", *options)
    new = {}
    for columns in systems:
        weights = woodbury.transposed_times(columns, own)
        new |= woodbury.times(columns, weights, own)
    return replace(layers, vector, new, jnp.zeros_like, "gradients", captured.points)


def fisher_norm(
    layers: Layers,
    captured: Captured,
    vector: Any,
    *,
    block_diagonal: bool = False,
    curvature: str = "captured",
) -> Float[Array, ""]:
    """The squared length v'F v, with the Fisher or Gauss-Newton matrix F of a batch.

    For a v of changes of the parameters it is what elastic weight consolidation penalises, exactly
    (Benzing, appendix C.2).

    Args:
      layers: from `find_layers`.
      captured: of the batch, from `value_grad_and_capture(..., curvature=...)`.
      vector: v, a tree like the parameters.
      block_diagonal: whether only the layers' own blocks of F count.
      curvature: "captured", or "empirical" for the cotangents of the loss itself.

    Returns:
      A number, in units of the loss. shape=()

    Raises:
      ValueError, TypeError: as `fisher_product`.
    """
    options = (block_diagonal, curvature)
    own, systems = _open("fisher_norm", layers, captured, vector, "changes", *options)
    norms = [jnp.square(woodbury.transposed_times(columns, own)).sum() for columns in systems]
    return _linalg.total(norms, jnp.float32)


def inverse_fisher_product(
    layers: Layers,
    captured: Captured,
    vector: Any,
    damping: float | Float[Array, ""],
    *,
    block_diagonal: bool = False,
    curvature: str = "captured",
) -> Any:
    """(lambda I + F)^-1 v, with the Fisher or Gauss-Newton matrix F of a batch.

    It is what implicit differentiation asks for (Benzing, appendix C.3). In float32 lambda has to
    be well above 1e-7 times the largest eigenvalue of F.

    Args:
      layers: from `find_layers`.
      captured: of the batch, from `value_grad_and_capture(..., curvature=...)`.
      vector: v, a tree like the parameters.
      damping: lambda, absolute.
      block_diagonal: whether only the layers' own blocks of F count.
      curvature: "captured", or "empirical" for the cotangents of the loss itself.

    Returns:
      A tree like `vector`; v / lambda for parameters in no layer. Not finite where the system is
      singular to rounding.

    Raises:
      ValueError: damping that is not positive; and as `fisher_product`.
      TypeError: as `fisher_product`.
    """
    check_positive(damping=damping)
    options = (block_diagonal, curvature)
    own, systems = _open("inverse_fisher_product", layers, captured, vector, "gradients", *options)
    new = {}
    for columns in systems:
        new |= woodbury.divide(woodbury.factorise(columns, damping), own)
    rest = lambda leaf: leaf / jnp.asarray(damping, leaf.dtype)  # noqa: E731
    return replace(layers, vector, new, rest, points=captured.points)


def sample_laplace(
    rng: Array,
    layers: Layers,
    captured: Captured,
    mode: Any,
    prior_precision: float | Float[Array, ""],
    examples: float | Float[Array, ""],
    *,
    block_diagonal: bool = False,
    curvature: str = "captured",
) -> Any:
    """An exact sample of the Laplace posterior N(mode, (prior I + examples F)^-1).

    F is the Fisher or Gauss-Newton matrix of a batch, of a loss that is a mean over examples. For
    many samples `jax.vmap` over keys: the system is factorised once.

    Args:
      rng: a key.
      layers: from `find_layers`.
      captured: of the batch at the mode, from `value_grad_and_capture(..., curvature=...)`.
      mode: the parameters, trained.
      prior_precision: of a Gaussian prior, the same for all parameters.
      examples: the size of the data set, by which F is multiplied.
      block_diagonal: whether only the layers' own blocks of F count.
      curvature: "captured", or "empirical" for the cotangents of the loss itself.

    Returns:
      A tree like `mode`; parameters in no layer vary like their prior.

    Raises:
      ValueError: a precision or a number of examples that is not positive; and as `fisher_product`.
      TypeError: as `fisher_product`.

    References:
      Benzing, appendix C.1, after A. Doucet, "A note on efficient conditional simulation of
      Gaussian distributions", 2010, and Y. Hoffman, E. Ribak, "Constrained realizations of Gaussian
      fields", 1991.
    """
    check_positive(prior_precision=prior_precision, examples=examples)
    key, noise_key = jax.random.split(rng)
    leaves, structure = jax.tree.flatten(_linalg.wide(mode))
    keys = jax.random.split(key, len(leaves))
    normal = [
        jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)
    ]
    options = (block_diagonal, curvature)
    _, systems = _open("sample_laplace", layers, captured, mode, "values", *options)
    noise = [_noise(jax.random.fold_in(noise_key, i), columns) for i, columns in enumerate(systems)]
    offset = laplace_offset(
        layers,
        systems,
        jax.tree.unflatten(structure, normal),
        noise,
        prior_precision,
        examples,
        captured.points,
    )
    return jax.tree.map(lambda m, d: (m.astype(d.dtype) + d).astype(m.dtype), mode, offset)


def laplace_offset(
    layers: Layers,
    systems: list[dict[str, Columns]],
    normal: Any,
    noise: list[Weights],
    prior_precision: Any,
    examples: Any,
    points: Points | None = None,
) -> Any:
    """What standard normal numbers become in a sample: a linear map M of them with M M' its cov.

    With x = normal / sqrt(prior) a draw of the prior it is x - K (G'x + noise / sqrt(examples)),
    where K = G (lambda I + G'G)^-1 and lambda = prior / examples: x, less what made-up data say of
    it.

    Args:
      layers: from `find_layers`.
      systems: G by layer, of each system.
      normal: a tree like the parameters.
      noise: for the columns of each system.
      prior_precision: of the prior.
      examples: that F stands for.
      points: where kernels that are made of parameters are linearised.
    """
    draw = jax.tree.map(lambda n: n / jnp.sqrt(jnp.asarray(prior_precision, n.dtype)), normal)
    own = woodbury.same_dtype(blocks(layers, draw, "changes", points))
    new = {}
    for columns, extra in zip(systems, noise, strict=True):
        dtype = extra.dtype
        count = jnp.asarray(examples, dtype)
        system = woodbury.factorise(columns, jnp.asarray(prior_precision, dtype) / count)
        seen = woodbury.transposed_times(columns, own) + extra / jnp.sqrt(count)
        pulled = woodbury.times(columns, woodbury.solve(system, seen), own)
        new |= {
            name: jax.tree.map(jnp.subtract, own[name], correction)
            for name, correction in pulled.items()
        }
    return replace(layers, draw, new, points=points)


def _open(
    method: str,
    layers: Layers,
    captured: Any,
    tree: Any,
    space: Space,
    block_diagonal: bool,
    curvature: str,
) -> tuple[dict[str, Block], list[dict[str, Columns]]]:
    """The blocks of a tree, and the columns of each system."""
    check_layers(layers, method)
    check_fisher(method, 0, curvature)
    captured = check_captured(layers, captured, method)
    check_real(method, tree)
    check_real_captured(captured, method)
    captured = captured.pulled()
    own = woodbury.same_dtype(blocks(layers, tree, space, captured.points))
    columns, systems = woodbury.columns_of(captured, own, curvature), []
    for names in woodbury.groups(own, block_diagonal).values():
        systems.append({n: columns[n] for n in names})
        woodbury.check_examples(method, systems[-1])
    return own, systems


def _noise(rng: Array, columns: Mapping[str, Columns]) -> Weights:
    cotangents = next(iter(columns.values())).cotangents
    return jax.random.normal(rng, cotangents.shape[-4:-2], cotangents.dtype)
