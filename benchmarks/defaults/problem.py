"""What a problem is: a network, its loss, its data, and how long it is trained."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from benchmarks.shared.steps import LossFn, Params, slice_examples
from benchmarks.shared.training import epoch_batches

Arrays = dict[str, np.ndarray]  # each with a leading example axis

EVALUATED = 2000  # examples at most that a training or a test loss is measured on


class Problem(NamedTuple):
    """A small training problem.

    Attributes:
      name: its key in `PROBLEMS`.
      what: network, data and loss in a line.
      init: parameters from a random key.
      loss_fn: the mean loss of a batch, of (params, batch).
      train: the training examples.
      test: held-out examples of the same distribution; None where there is nothing to hold out.
      batch_size, steps: how it is trained.
      evaluated: how many examples the losses at the end are measured on, at most.
    """

    name: str
    what: str
    init: Callable[[Array], Params]
    loss_fn: LossFn
    train: Arrays
    test: Arrays | None
    batch_size: int
    steps: int
    evaluated: int = EVALUATED

    def batches(self, seed: int, steps: int | None = None) -> Iterator[Arrays]:
        """The batches of a run: each epoch is a permutation of its own, the same for all methods.

        Args:
          seed: of the permutations.
          steps: how many batches; None for the problem's steps.
        """
        examples = len(next(iter(self.train.values())))
        indices = itertools.chain.from_iterable(
            epoch_batches(examples, self.batch_size, epoch, seed) for epoch in itertools.count()
        )
        for at in itertools.islice(indices, self.steps if steps is None else steps):
            yield {name: array[at] for name, array in self.train.items()}

    def evaluation(self) -> dict[str, Arrays]:
        """The examples that losses are measured on: "train", and "test" where there are any."""
        parts = {"train": self.train, "test": self.test}
        return {
            split: slice_examples(examples, 0, self.evaluated)
            for split, examples in parts.items()
            if examples is not None
        }


def init_of(network: Any, *inputs: np.ndarray) -> Callable[[Array], Params]:
    """A linen network's parameters from a key, by its inputs' shapes."""
    first = [x[:1] for x in inputs]
    return jax.jit(lambda key: network.init(key, *first)["params"])


def split_off(examples: Arrays, held_out: int) -> tuple[Arrays, Arrays]:
    """Training and test examples, the last ones held out."""
    train = {name: array[:-held_out] for name, array in examples.items()}
    return train, {name: array[-held_out:] for name, array in examples.items()}
