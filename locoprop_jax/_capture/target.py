"""A target: where curvature cotangents are injected into a traced loss."""

from __future__ import annotations

from typing import NamedTuple

from locoprop_jax import losses
from locoprop_jax._tracing.chains import Chain, Shape
from locoprop_jax._tracing.heads import Cut
from locoprop_jax._tracing.program import Equation
from locoprop_jax._tracing.trace import Traced

KINDS = ("fisher_mc", "fisher_empirical", "ggn_mc", "ggn_exact", "ggn_output")
PULLED = ("fisher_mc", "ggn_mc", "ggn_exact")  # by passes of their own

REMEDY = (
    "Write the loss with `locoprop_jax.losses` (such as `losses.softmax_cross_entropy`), or mark "
    "your own loss of each example by `@losses.output_loss(sample=...)`, and only weight, sum and "
    "average its terms"
)


class Weight(NamedTuple):
    """The derivative of the loss by a value, as the weight of a known loss's terms.

    Attributes:
      value: the value.
      sign: by what its derivative is multiplied.
      axes: its axes that belong to those of the terms, in their order, None for one that it does
        not have; along all others the derivative is added up. None where it has the terms' shape.
    """

    value: int
    sign: float = 1.0
    axes: tuple[int | None, ...] | None = None


class Target(NamedTuple):
    """Where cotangents are injected.

    Its Hessian is that of a known loss, marked or recognised, times its weight in the loss, or of
    a head.

    Attributes:
      value: the outputs of the network.
      examples: the axes of the outputs along which the Hessian is block-diagonal, in the order of
        the loss terms' axes if the loss is marked.
      outputs: the other axes: those of one block.
      alone: the axes along which exact columns differ: those of one block, and those whose entries
        meet in the network.
      joins_positions: whether an exact column has entries at several positions of one example.
      batch: how many examples there are, if all rows of layers that reach one of the outputs are
        those of one example; None if rows of several reach it, or that cannot be told.
      loss: the known loss; None for a head.
      to_terms: what brings the outputs to (*terms, *outputs of one) for a known loss.
      weights: what weighs the known loss's terms, all added up; nothing for a head.
      head: the loss as a function of the outputs, up to what is linear in them; None for a known
        loss.
      call: of the marked loss; None where nothing is marked.
      mass_axes: of the labels, the axes in the order of `examples` (None where it has no such
        axis) and then all others; None unless the loss needs the mass of its labels.
    """

    value: int
    examples: Shape
    outputs: Shape
    alone: Shape
    joins_positions: bool = False
    batch: int | None = None
    loss: losses.OutputLoss | None = None
    to_terms: Chain = ()
    weights: tuple[Weight, ...] = ()
    head: Cut | None = None
    call: Equation | None = None
    mass_axes: tuple[tuple[int | None, ...], Shape] | None = None

    @property
    def weighing(self) -> tuple[int, ...]:
        """The values whose derivatives weigh the known loss."""
        return tuple(weight.value for weight in self.weights)

    @property
    def needed(self) -> tuple[int, ...]:
        """What the Hessian is made of besides: what a marked loss takes, or the head."""
        if self.head is not None:
            return tuple(self.head.free)
        return () if self.call is None else self.call.inputs


def asker(curvature: str) -> str:
    """Who asks for targets, for errors."""
    return f"`curvature={curvature!r}`" if curvature in KINDS else f"`{curvature}`"


def batch_of(traced: Traced, value: int) -> set[int]:
    """The batch axes of a value that are longer than one."""
    if traced.batch_axes is None:
        return set()
    return {i for i in traced.batch_axes[value] if traced.program.shape(value)[i] > 1}
