"""Random programs as plain data: what a loss is made of, drawn from a seed.

A program is a list of statements with options, some of which hold statements themselves. `build`
makes its Python. Statements know the shape of what they are applied to, so they are drawn and
written in one go: each in turn, on what those before it made.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

Options = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Statement:
    """One step of a network, a key of `build.KINDS`.

    Attributes:
      kind: what it does.
      options: how.
      bodies: the statements inside of it, of a loop or a branch.
    """

    kind: str
    options: Options = dataclasses.field(default_factory=dict)
    bodies: tuple[tuple["Statement", ...], ...] = ()


@dataclasses.dataclass(frozen=True)
class Program:
    """A loss, its parameters and a batch.

    Attributes:
      seed: of the arrays.
      shape: of the input, examples first; without features for words.
      words: how many words there are; None for inputs that are numbers.
      dtype: of everything.
      statements: the network.
      heads: of what the loss is a sum.
      derivative: of the network by its inputs that the loss takes too, or "".
      decay: a regularizer on the parameters, or "".
      wrapper: what is around the loss.
      aux: whether it returns more than the loss.
      closed: whether inputs are closed over, and not an argument.
      flat: whether all parameters lie in one dictionary.
    """

    seed: int
    shape: tuple[int, ...]
    statements: tuple[Statement, ...]
    heads: tuple[Statement, ...]
    words: int | None = None
    dtype: str = "float64"
    derivative: str = ""
    decay: str = ""
    wrapper: str = ""
    aux: bool = False
    closed: bool = False
    flat: bool = False


def pick(rng: np.random.Generator, choices: Any, weights: Any = None) -> Any:
    """One of some choices; `weights` are relative."""
    choices = list(choices)
    if weights is not None:
        weights = np.asarray(weights, float) / np.sum(weights)
    return choices[rng.choice(len(choices), p=weights)]


def mostly(rng: np.random.Generator, usual: Any, others: Any, probability: float = 0.5) -> Any:
    """The usual choice, or with a probability one of the others."""
    return pick(rng, others) if rng.random() < probability else usual


def size(program: Program) -> int:
    """How many statements a program has, those inside of others counted too."""

    def count(statements):
        return sum(1 + sum(map(count, statement.bodies)) for statement in statements)

    return count(program.statements) + count(program.heads)
