"""Statistics averaged over steps, and inverses made of them once in a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from locoprop_jax import _linalg
from locoprop_jax._checks import MAX_SIZE, check_decay, check_whole, is_number
from locoprop_jax._layers.method import zero_count
from locoprop_jax._trees import real_dtype, wide_dtype

ByLayer = dict[str, Any]


def row_limit(max_size: Any) -> int:
    """The limit itself, from a method's argument.

    Its default is not the number, which `optax.inject_hyperparams` would take for one to trace.

    Raises:
      ValueError: it is no positive whole number.
    """
    if max_size is None:
        return MAX_SIZE
    check_whole(max_size=max_size)
    return int(max_size)


def is_too_large(size: int, limit: int | None) -> bool:
    """Whether a matrix of so many rows is kept by its diagonal; never without a limit."""
    return limit is not None and size > limit


class AmortisedState(NamedTuple):
    """What the states of amortised methods are.

    Attributes:
      count: finite batches so far. shape=(), dtype=int32
      refused: batches that were not finite, and updated nothing. shape=(), dtype=int32
      gathered: `count` after the last batch whose statistics were gathered. shape=(), dtype=int32
      failures: factorisations that did not succeed; their layers kept what they had.
        shape=(), dtype=int32
      statistics: running sums by layer. Empty for the current batch's alone.
      inverse: what was made of their averages, by layer. Empty if it is not kept.
    """

    count: Int[Array, ""]
    refused: Int[Array, ""]
    gathered: Int[Array, ""]
    failures: Int[Array, ""]
    statistics: ByLayer
    inverse: ByLayer

    def diagnostics(self) -> dict[str, Array]:
        """The counters, and the steps since statistics were gathered, if they are averaged."""
        own = {"count": self.count, "refused": self.refused, "failures": self.failures}
        return own | ({"age": self.count - self.gathered} if self.statistics else {})


State = TypeVar("State", bound=AmortisedState)


class Amortisation(NamedTuple):
    """When statistics are gathered, how they are averaged, and when they are inverted.

    Attributes:
      decay: what is left of the average after a step; 0 for the current batch alone.
      period: the steps from one inversion to the next.
      gathering: how many steps up to each inversion gather statistics, its own included.
    """

    decay: Any
    period: int
    gathering: int

    @property
    def is_averaged(self) -> bool:
        return not is_number(self.decay) or self.decay > 0

    def check(self) -> None:
        """Refuse what is out of range.

        Raises:
          ValueError: it is.
        """
        check_decay(decay=self.decay)
        check_whole(inverse_period=self.period, statistics_steps=self.gathering)
        if self.gathering > self.period:
            raise ValueError(
                f"`statistics_steps` are some of the {self.period} of `inverse_period`, got "
                f"{self.gathering}."
            )

    def init(
        self, kind: type[State], statistics: Callable[[], ByLayer], inverse: Callable[[], ByLayer]
    ) -> State:
        """The state before the first batch, of zeros for statistics and inverses."""
        counts = zero_count(), zero_count(), zero_count(), zero_count()
        return kind(*counts, statistics() if self.is_averaged else {}, inverse())

    def advance(
        self,
        state: State,
        ok: Bool[Array, ""],
        gather: Callable[[], ByLayer],
        invert: Callable[[ByLayer], ByLayer],
        witness: Callable[[Any], Any] = _linalg.diagonals,
    ) -> State:
        """The state with this batch in its averages and, if one is due, with new inverses.

        Statistics that are not finite, because they overflow, leave the averages as they were.

        Args:
          state: before.
          ok: whether the batch may be used.
          gather: its statistics by layer.
          invert: what to make of averages; nothing where inverses are not kept.
          witness: of the statistics of a layer and of their inverse, arrays that are finite where
            these are.
        """
        due = ok & _is_due(state.count, self.period)
        soon = ok & ((-state.count) % self.period < self.gathering)

        def refresh(old: State) -> State:
            now, new = gather(), old
            if self.is_averaged:
                # What the average forgets is counted in steps, gathered or not.
                steps = old.count + 1 - old.gathered
                dtype = real_dtype(wide_dtype(jax.tree.leaves(now)))
                finite = _linalg.all_finite([witness(own) for own in now.values()])
                left = jnp.where(finite, _linalg.power(self.decay, steps, dtype), 1)
                term = _linalg.where(finite, now, _linalg.zeros_like(now))
                new = old._replace(
                    statistics=_linalg.average(old.statistics, term, left),
                    gathered=jnp.where(finite, old.count + 1, old.gathered),
                )
            inverse, failures = jax.lax.cond(
                due,
                lambda: keep_finite(
                    invert(self.averages(new) if self.is_averaged else now),
                    old.inverse,
                    old.failures,
                    witness,
                ),
                lambda: (old.inverse, old.failures),
            )
            return new._replace(inverse=inverse, failures=failures)

        # One conditional for all that is kept: each of them copies what it passes on.
        wanted = due | soon if self.is_averaged else due
        return jax.lax.cond(wanted, refresh, lambda old: old, state)

    def averages(self, state: AmortisedState) -> ByLayer:
        """The debiased averages of the statistics."""
        return _linalg.debiased(state.statistics, self.decay, state.gathered)


def _is_due(count: Int[Array, ""], period: int) -> Bool[Array, ""]:
    """Whether this step inverts: each `period` of them, and early on after 0, 1, 2, 4, 8..."""
    is_power_of_two = count & (count - 1) == 0
    return (count % period == 0) | ((count < period) & is_power_of_two)


def keep_finite(
    new: ByLayer,
    old: ByLayer,
    failures: Int[Array, ""],
    witness: Callable[[Any], Any] = lambda tree: tree,
) -> tuple[ByLayer, Int[Array, ""]]:
    """The new trees where they are finite, the old ones elsewhere, and how often that was.

    A tree is finite where its `witness` is.
    """
    finite = {name: _linalg.all_finite(witness(tree)) for name, tree in new.items()}
    kept = {name: _linalg.where(finite[name], new[name], old[name]) for name in new}
    failed = [1 - flag.astype(jnp.int32) for flag in finite.values()]
    return kept, sum(failed, start=failures)
