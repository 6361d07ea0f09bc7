"""Names of axes, solved for as types are: by unification."""

from __future__ import annotations

from collections.abc import Sequence

from locoprop_jax._tracing.chains import Shape

Axis = tuple[int, ...]  # the names of an axis, the slowest first
Axes = tuple[Axis, ...]


class Names:
    """Names of axes, some of which turn out to be equal, or to be made of others."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._meaning: dict[int, Axis] = {}  # what a name that is not its own stands for
        self._mixed: set[int] = set()
        self._whole: dict[int, Axis] = {}  # the axis that a name's was cut out of

    def new(self, size: int) -> int:
        self.sizes.append(size)
        return len(self.sizes) - 1

    def axes(self, shape: Shape) -> Axes:
        """The names of a value that nothing is known of."""
        return tuple((self.new(size),) for size in shape)

    def solved(self, axis: Sequence[int]) -> Axis:
        """The names that these stand for."""
        if self._meaning.keys().isdisjoint(axis):
            return tuple(axis)
        found: list[int] = []
        pending = list(reversed(axis))
        while pending:
            name = pending.pop()
            meaning = self._meaning.get(name)
            if meaning is None:
                found.append(name)
            else:
                pending.extend(reversed(meaning))
        return tuple(found)

    def unify(self, one: Sequence[int], other: Sequence[int]) -> None:
        """Make two axes of the same length the same, as far as their names can be paired."""
        left, right = list(reversed(self.solved(one))), list(reversed(self.solved(other)))
        while left and right:
            a, b = left.pop(), right.pop()
            if a == b:
                continue
            m, n = self.sizes[a], self.sizes[b]
            if m == n:
                self._meaning[b] = (a,)
                left, right = self._again(left), self._again(right)
            elif m == 1:
                right.append(b)
            elif n == 1:
                left.append(a)
            elif m > n and m % n == 0:
                left += self._split(a, n)
                right.append(b)
            elif n > m and n % m == 0:
                right += self._split(b, m)
                left.append(a)
            else:
                return

    def regroup(self, axes: Axes, shape: Shape) -> Axes:
        """The axes of a reshaped value."""
        left = list(reversed(self.solved([name for axis in axes for name in axis])))
        result: list[Axis] = []
        for size in shape:
            found: list[int] = []
            rest = size
            while left and rest > 1:
                name = left.pop()
                n = self.sizes[name]
                if n > rest and n % rest == 0:
                    left += self._split(name, rest)
                elif rest % n:
                    left.append(name)  # it does not fit: the axes are new from here on
                    break
                else:
                    found.append(name)
                    rest //= n
            if size == 1 and left and self.sizes[left[-1]] == 1:
                found.append(left.pop())
            if rest != 1:
                left.clear()
                found.append(self.new(rest))
            result.append(tuple(found) or (self.new(1),))
        return tuple(result)

    def cut(self, axis: Axis, size: int) -> Axis:
        """A part of an axis, or a longer one that has it as a part."""
        name = self.new(size)
        self._whole[name] = axis
        return (name,)

    def origins(self, name: int) -> frozenset[int]:
        """A name and those of the axes that its own was cut out of."""
        found: set[int] = set()
        pending = [name]
        while pending:
            name = pending.pop()
            if name not in found:
                found.add(name)
                wholes = [
                    axis for part, axis in self._whole.items() if (name,) == self.solved((part,))
                ]
                pending.extend(n for axis in wholes for n in self.solved(axis))
        return frozenset(found)

    def mix(self, axis: Sequence[int]) -> None:
        """Note that what one place of an axis makes reaches others."""
        self._mixed.update(axis)

    @property
    def mixed(self) -> frozenset[int]:
        return frozenset(self.solved(tuple(self._mixed)))

    def _split(self, name: int, first: int) -> tuple[int, int]:
        """Take a name apart; its parts as they are pushed on a stack, the slower one last."""
        parts = (self.new(first), self.new(self.sizes[name] // first))
        self._meaning[name] = parts
        return parts[1], parts[0]

    def _again(self, pending: list[int]) -> list[int]:
        """What is left on a stack after one more name has a meaning."""
        return list(reversed(self.solved(tuple(reversed(pending)))))


def unify_all(names: Names, one: Axes, other: Axes) -> None:
    for a, b in zip(one, other, strict=True):
        names.unify(a, b)
