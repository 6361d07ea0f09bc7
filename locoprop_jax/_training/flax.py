"""A Flax train state that passes captured arrays on; no other file imports Flax."""

from __future__ import annotations

import dataclasses
from typing import Any

import optax
from flax.training import train_state


class TrainState(train_state.TrainState):
    """Flax's `TrainState`, whose `apply_gradients` hands extra arguments to the optimizer."""

    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> TrainState:
        """Take a step.

        Args:
          grads: the gradients, a tree like `params`.
          **kwargs: fields of the state to replace (`batch_stats`, ...); anything else, `captured`
            first of all, goes to the optimizer's `update`.

        Returns:
          The state after the step.
        """
        fields = {field.name for field in dataclasses.fields(self)}
        replace = {name: value for name, value in kwargs.items() if name in fields}
        extra = {name: value for name, value in kwargs.items() if name not in fields}
        tx = optax.with_extra_args_support(self.tx)
        updates, opt_state = tx.update(grads, self.opt_state, self.params, **extra)
        params = optax.apply_updates(self.params, updates)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **replace)
