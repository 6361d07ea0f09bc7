"""Chains: rearrangements of an array, as small hashable values.

A chain is a tuple of `("transpose", permutation)`, `("reshape", shape)` and `("broadcast", shape)`
steps. Capture writes down with chains how a parameter becomes a kernel and how an activation
becomes rows; they apply to NumPy and JAX arrays alike, and those without a broadcast invert.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

Shape = tuple[int, ...]
Chain = tuple[tuple[str, Shape], ...]


def apply(chain: Chain, x: Any) -> Any:
    """Rearrange `x` step by step."""
    for step, argument in chain:
        if step == "transpose":
            x = x.transpose(argument)
        elif step == "reshape":
            x = x.reshape(argument)
        elif isinstance(x, np.ndarray):
            x = np.broadcast_to(x, argument)
        else:
            x = jnp.broadcast_to(x, argument)
    return x


def extend(chain: Chain, shape: Shape, step: str, argument: Shape) -> Chain:
    """Append a step to a chain whose result has `shape`; what changes nothing is left out."""
    if step == "transpose":
        if chain and chain[-1][0] == "transpose":
            argument = tuple(chain[-1][1][i] for i in argument)
            chain = chain[:-1]
        unchanged = argument == tuple(range(len(argument)))
    else:
        unchanged = argument == shape
        if step == "reshape" and chain and chain[-1][0] == "reshape":
            chain, unchanged = chain[:-1], False
    return chain if unchanged else (*chain, (step, argument))


def result_shape(chain: Chain, shape: Shape) -> Shape:
    """The shape that a chain gives to an array of `shape`."""
    for step, argument in chain:
        shape = tuple(shape[i] for i in argument) if step == "transpose" else argument
    return shape


def is_invertible(chain: Chain) -> bool:
    return all(step != "broadcast" for step, _ in chain)


def is_spread(chain: Chain) -> bool:
    """Whether it ends with a broadcast."""
    return bool(chain) and chain[-1][0] == "broadcast"


def inverse(chain: Chain, shape: Shape) -> Chain:
    """The chain that undoes `chain`, which was applied to an array of `shape`."""
    steps = []
    for step, argument in chain:
        if step == "transpose":
            steps.append((step, tuple(int(i) for i in np.argsort(argument))))
            shape = tuple(shape[i] for i in argument)
        else:
            steps.append((step, shape))
            shape = argument
    return tuple(reversed(steps))


def others(shape: Shape, axes: Shape) -> Shape:
    """The axes of an array of `shape` but for these."""
    return tuple(i for i in range(len(shape)) if i not in axes)


def numbers(shape: Shape) -> np.ndarray:
    """Each entry's number: followed through rearrangements it says where the entry goes."""
    return np.arange(math.prod(shape)).reshape(shape)


def are_same(one: Chain, other: Chain, shape: Shape) -> bool:
    """Whether two chains do the same to an array of this shape."""
    if one == other:
        return True
    entries = numbers(shape)
    return np.array_equal(apply(one, entries), apply(other, entries))


def varies(x: np.ndarray, axis: int) -> bool:
    """Whether an array changes along an axis; what was broadcast does not and is not looked at."""
    if x.strides[axis] == 0:
        return False
    x = x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.strides)]
    return bool(np.any(np.diff(x, axis=axis)))


class Part(NamedTuple):
    """A box out of an array.

    Attributes:
      chain: how the array is rearranged first.
      starts: of the box, by axis.
      limits: of the box, by axis.
    """

    chain: Chain
    starts: Shape
    limits: Shape

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(map(slice, self.starts, self.limits))

    def overlaps(self, other: Part) -> bool:
        """Whether they may have entries in common."""
        if self.chain != other.chain:
            return True
        spans = zip(self.starts, self.limits, other.starts, other.limits, strict=True)
        return all(max(a, c) < min(b, d) for a, b, c, d in spans)

    def take(self, x: Any) -> Any:
        return apply(self.chain, x)[self.slices]

    def put(self, x: Any, box: Any) -> Any:
        """The array with another box in it."""
        rearranged = apply(self.chain, x).at[self.slices].set(box)
        return apply(inverse(self.chain, x.shape), rearranged)


def group(chain: Chain, shape: Shape, groups: tuple[Shape, ...]) -> Chain:
    """Go on to an array with one axis for each group of axes of `shape`, the chain's result.

    `group((), (2, 3, 5), ((1,), (2, 0)))` gives arrays of shape (3, 10).
    """
    order = tuple(axis for axes in groups for axis in axes)
    chain = extend(chain, shape, "transpose", order)
    merged = tuple(math.prod(shape[i] for i in axes) for axes in groups)
    return extend(chain, tuple(shape[i] for i in order), "reshape", merged)


def lift(chain: Chain, lengths: Shape) -> Chain:
    """The chain for arrays with further axes in front, which it leaves alone."""
    n = len(lengths)

    def step(name: str, argument: Shape) -> tuple[str, Shape]:
        if name == "transpose":
            return name, (*range(n), *(i + n for i in argument))
        return name, (*lengths, *argument)

    return tuple(step(*each) for each in chain) if lengths else chain
