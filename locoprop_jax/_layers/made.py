"""Kernels that a network makes of its parameters before they meet the data.

A mask, a norm, a product of two kernels, a gather by symmetry, the bias as one more row: a layer's
kernel K is then a function of one or several arrays p of the tree. Methods work on K. Its gradient
G by K and a change D of K are brought there and back by the Jacobian J of K at the current p:

    values K(p)        changes K' = J p'        gradients g = J'G

    from gradients g   G = (J J')^+ J g        the smallest G with J'G = g
    from changes D     p' = (J'J)^+ J'D        the p' that changes K most nearly by D

so that G meets D as g meets p', and a positive definite map of G to D is one of g to p'. Both
systems are solved by conjugate gradient, which takes as many steps as J has distinct singular
values: one for a mask, and for a function that keeps lengths none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.scipy.sparse.linalg import cg
from jaxtyping import Array

from locoprop_jax._layers.parameter import Parameter
from locoprop_jax._tracing.jaxpr import StaticJaxpr, as_callable
from locoprop_jax._trees import wide_dtype

# What a tree like the parameters holds; its shapes alone where nothing else is known yet.
Space = Literal["values", "changes", "gradients", "shapes"]
Point = Sequence[Array]  # the parameters that a kernel is made of, then what else it is made of
ITERATIONS = 20
TOLERANCE = 1e-6  # of the residual, in units of the right side


@dataclasses.dataclass(frozen=True)
class Made:
    """A kernel or bias as a function of parameters.

    Attributes:
      sources: the parameters, as they are in the tree.
      function: (*parameters, *others) -> the kernel as a block has it. Static.
      is_isometry: whether it keeps lengths, and is linear in the parameters alone: J'J = I.
      has_bias: whether the last row of the kernel is the layer's bias.
    """

    sources: tuple[Parameter, ...]
    function: StaticJaxpr
    is_isometry: bool = False
    has_bias: bool = False

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(source.path for source in self.sources)

    def read(self, leaves: Sequence[Array], space: Space, point: Point | None) -> Array:
        """The block, from arrays like the parameters that it is made of.

        Args:
          leaves: in the order of `sources`.
          space: what they are.
          point: where the function is linearised; not needed for an isometry.
        """
        if space == "shapes":
            return jnp.zeros(self.function.closed.out_avals[0].shape, wide_dtype(leaves))
        if space == "values":
            return self._call(leaves, point)
        push, pull = self._jacobian(leaves, point)
        changes = push(tuple(leaves))
        if space == "changes" or self.is_isometry:
            return changes
        return self._solve(lambda block: push(pull(block)), changes)

    def write(self, block: Array, like: Sequence[Any], space: Space, point: Point | None) -> Any:
        """The inverse: arrays in the order of `sources`, from changes of the block or gradients."""
        push, pull = self._jacobian(like, point)
        gradients = pull(block)
        if space == "gradients" or self.is_isometry:
            return gradients
        return self._solve(lambda leaves: pull(push(leaves)), gradients)

    def _call(self, leaves: Sequence[Array], point: Point | None) -> Array:
        count = len(self.sources)
        others = () if point is None else tuple(point[count:])
        pairs = zip((*leaves, *others), self.function.closed.in_avals, strict=True)
        given = [jnp.asarray(x).astype(aval.dtype) for x, aval in pairs]
        (block,) = as_callable(self.function.closed)(*given)
        return block.astype(wide_dtype(leaves))

    def _solve(self, product: Callable[[Any], Any], right: Any) -> Any:
        """The smallest solution of a consistent system.

        It is consistent to the precision that the function has, which in bfloat16 is low: further
        iterations would find their way into directions that change no block.
        """
        rounding = max(
            float(jnp.finfo(aval.dtype).eps)
            for aval in self.function.closed.in_avals
            if jnp.issubdtype(aval.dtype, jnp.inexact)
        )
        return cg(product, right, tol=max(TOLERANCE, 2 * rounding), maxiter=ITERATIONS)[0]

    def _jacobian(
        self, like: Sequence[Any], point: Point | None
    ) -> tuple[Callable[[Any], Array], Callable[[Array], Any]]:
        """The maps J and J', of arrays in the dtype that solving takes."""
        count = len(self.sources)
        dtype = wide_dtype(like)
        if point is None or len(point) == 0:
            assert self.is_isometry, "the function is linearised at the parameters"
            at = tuple(jnp.zeros(jnp.shape(leaf), dtype) for leaf in like)
        else:
            at = tuple(jnp.asarray(leaf).astype(dtype) for leaf in point[:count])
        # Backwards first: a function with its own derivative may have no other one.
        block, pull = jax.vjp(lambda *leaves: self._call(leaves, point), *at)
        push = jax.linear_transpose(pull, block)
        return (
            lambda leaves: push(tuple(jnp.asarray(leaf).astype(dtype) for leaf in leaves))[0],
            # The conjugate transpose: gradients come as directions of ascent.
            lambda block: jax.tree.map(jnp.conj, pull(jnp.conj(block.astype(dtype)))),
        )


Part = Parameter | Made


def paths(part: Part) -> tuple[str, ...]:
    """The parameters of a kernel or bias."""
    return (part.path,) if isinstance(part, Parameter) else part.paths


def read(
    part: Part, leaves: Mapping[str, Array], space: Space, point: Point | None = None
) -> Array:
    """A kernel or bias as a block has it, from a tree's leaves by path."""
    if isinstance(part, Parameter):
        return part.read(leaves[part.path])
    return part.read([leaves[path] for path in part.paths], space, point)


def write(
    part: Part,
    block: Array,
    leaves: Mapping[str, Array],
    space: Space,
    point: Point | None = None,
) -> dict[str, Array]:
    """The inverse; a part of an array is put into the leaf."""
    if isinstance(part, Parameter):
        leaf = leaves[part.path]
        return {part.path: part.write(block.astype(leaf.dtype), leaf)}
    like = [leaves[path] for path in part.paths]
    return dict(zip(part.paths, part.write(block, like, space, point), strict=True))
