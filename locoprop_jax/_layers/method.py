"""What methods do alike around what is their own: from Optax's arguments to blocks, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int

from locoprop_jax import _linalg
from locoprop_jax._checks import check_real, check_state
from locoprop_jax._layers.blocks import blocks, matrix
from locoprop_jax._layers.captured import Captured, check_captured, check_real_captured
from locoprop_jax._layers.layers import Layers, replace
from locoprop_jax._layers.rows import Block
from locoprop_jax._layers.stacking import over_stack
from locoprop_jax._trees import ascent

State = TypeVar("State", bound=Any)  # a NamedTuple: `count` finite batches, `refused` others


class Batch(NamedTuple):
    """One batch as a method sees it.

    Attributes:
      layers: all of them.
      updates: the incoming ones, a tree like the parameters; complex gradients as the directions
        in which the loss rises (`ascent`).
      slopes: those of them that are in layers, as blocks; without masked ones.
      captured: the arrays of the batch.
      params: the parameters; None where none were passed.
      extra_args: what else was passed, meant for this method or for others.
    """

    layers: Layers
    updates: Any
    slopes: dict[str, Block]
    captured: Captured
    params: Any
    extra_args: Mapping[str, Any]

    def is_finite(self, arrays: Any = ()) -> Bool[Array, ""]:
        """Whether the updates are, and these arrays of the batch."""
        return _linalg.all_finite((self.updates, arrays))

    def values(self) -> dict[str, Block]:
        """The parameters that are in layers, as blocks; without masked ones."""
        return blocks(self.layers, self.params, "values", self.captured.points)

    def replaced(
        self, new: Mapping[str, Block], other: Callable[[Array], Array] = lambda leaf: leaf
    ) -> Any:
        """The updates with new blocks, and `other` of the leaves in no layer."""
        return replace(self.layers, self.updates, new, other, points=self.captured.points)

    def finish(
        self, new: Mapping[str, Block], state: State, ok: Bool[Array, ""]
    ) -> tuple[Any, State]:
        """The updates with new blocks, and the state with this batch counted.

        Parameters in no layer keep their gradient. A batch that is not ok updates nothing and is
        counted as refused; what else the state keeps of it is up to the method.
        """
        directions = self.replaced(new)
        state = counted(state, ok)
        return _linalg.where(ok, directions, _linalg.zeros_like(directions)), state


def transformation(
    method: str,
    layers: Layers,
    init: optax.TransformInitFn,
    step: Callable[[Batch, State], tuple[Any, State]],
    *,
    takes_complex: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """A method as an Optax transformation whose `update` needs `captured`.

    It takes gradients as JAX has them, and its updates are directions in which the loss rises: for
    complex parameters one is the conjugate of the other.

    Args:
      method: its name, for errors.
      layers: that it was built with.
      init: from the parameters, their shapes, or Optax's stand-in for them, to the state.
      step: from a batch and the state to the updates and the new state.
      takes_complex: whether it is right for complex layers; if not, they are refused.
    """

    def checked_init(params: Any) -> Any:
        if not takes_complex:
            check_real(method, params)
        return init(params)

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        captured: Captured | None = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        own = check_captured(layers, captured, method)
        if not takes_complex:
            check_real(method, updates)
            check_real_captured(own, method)
        updates = ascent(updates)
        check_state(method, state, jax.eval_shape(init, updates))
        slopes = blocks(layers, updates, "gradients", own.points)
        batch = Batch(layers, updates, slopes, own, params, extra_args)
        return step(batch, state)

    return optax.GradientTransformationExtraArgs(checked_init, update)


def counted(state: State, ok: Bool[Array, ""]) -> State:
    """The state with a batch more among those that it took, or refused."""
    one = ok.astype(jnp.int32)
    return state._replace(count=state.count + one, refused=state.refused + 1 - one)


# --- what `init` is made of ----------------------------------------------------------------------


def zero_count() -> Int[Array, ""]:
    """A counter at its start; one for each, because a buffer cannot be donated twice."""
    return jnp.zeros([], jnp.int32)


def _is_stand_in(params: Any) -> bool:
    """Whether these are no parameters, but what `optax.tree.map_params` marks their places with."""
    return not jax.tree.leaves(params)


def blocks_like(layers: Layers, params: Any) -> dict[str, Any]:
    """The blocks of the parameters, for state laid out like them; a stand-in itself for each."""
    if _is_stand_in(params):
        return dict.fromkeys(layers, params)
    return dict(blocks(layers, params, "shapes"))


def kernel_shapes(layers: Layers, params: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """The shape (*stack, d_in, d_out) and dtype of each kernel that is not masked, by layer."""
    if _is_stand_in(params):
        return dict.fromkeys(layers, _STAND_IN)
    own = blocks(layers, params, "shapes")
    return {
        name: jax.ShapeDtypeStruct(block["kernel"].shape, block["kernel"].dtype)
        for name, block in own.items()
        if "kernel" in block
    }


def matrix_shapes(layers: Layers, params: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """The shape (*stack, d, d_out) and dtype of each block as one matrix, by layer."""
    if _is_stand_in(params):
        return dict.fromkeys(layers, _STAND_IN)
    return {
        name: jax.eval_shape(over_stack(layers[name], matrix), block)
        for name, block in blocks(layers, params, "shapes").items()
    }


_STAND_IN = jax.ShapeDtypeStruct((1, 1), jnp.float32)
