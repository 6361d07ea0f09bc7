"""A smaller program that fails in the same way."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from tests.fuzz.build import Built, build
from tests.fuzz.oracles import Failure
from tests.fuzz.programs import Program, Statement
from tests.fuzz.writer import Invalid

# What an option becomes when it is simplified; what is not listed stays.
SIMPLEST = {
    "kernel": "plain",
    "product": "x @ W",
    "bias": "",
    "activation": "",
    "loss": "squared",
    "reduction": "mean",
    "closed": False,
    "remat": False,
    "padding": "SAME",
}
PLAINEST = {
    "derivative": "",
    "decay": "",
    "wrapper": "",
    "aux": False,
    "closed": False,
    "flat": True,
    "dtype": "float64",
}


def smaller(program: Program) -> Iterator[Program]:
    """Programs with one thing less; some may not fit."""
    for statements in _smaller_lists(program.statements):
        yield dataclasses.replace(program, statements=statements)
    if len(program.heads) > 1:
        for i in range(len(program.heads)):
            heads = program.heads[:i] + program.heads[i + 1 :]
            yield dataclasses.replace(program, heads=heads)
    for name, plain in PLAINEST.items():
        if getattr(program, name) != plain:
            yield dataclasses.replace(program, **{name: plain})
    for i, n in enumerate(program.shape):
        if n > 1:
            for less in {1, n - 1}:
                shape = (*program.shape[:i], less, *program.shape[i + 1 :])
                yield dataclasses.replace(program, shape=shape)
    for heads in _simpler_lists(program.heads):
        yield dataclasses.replace(program, heads=heads)
    for statements in _simpler_lists(program.statements):
        yield dataclasses.replace(program, statements=statements)


def _smaller_lists(statements: tuple[Statement, ...]) -> Iterator[tuple[Statement, ...]]:
    """Without one of the statements, or with what is inside of it in its place."""
    for i, statement in enumerate(statements):
        before, after = statements[:i], statements[i + 1 :]
        yield before + after
        for body in statement.bodies:
            yield before + body + after
        for k, body in enumerate(statement.bodies):
            for less in _smaller_lists(body):
                yield (*before, _with_body(statement, k, less), *after)


def _simpler_lists(statements: tuple[Statement, ...]) -> Iterator[tuple[Statement, ...]]:
    """With one option of one statement simpler."""
    for i, statement in enumerate(statements):
        before, after = statements[:i], statements[i + 1 :]
        for options in _simpler_options(statement.options):
            yield (*before, dataclasses.replace(statement, options=options), *after)
        for k, body in enumerate(statement.bodies):
            for simpler in _simpler_lists(body):
                yield (*before, _with_body(statement, k, simpler), *after)


def _with_body(statement: Statement, k: int, body: tuple[Statement, ...]) -> Statement:
    bodies = (*statement.bodies[:k], body, *statement.bodies[k + 1 :])
    return dataclasses.replace(statement, bodies=bodies)


def _simpler_options(options: Any) -> Iterator[dict[str, Any]]:
    for name, value in options.items():
        if type(value) is int and value > 1:
            yield {**options, name: value - 1}
        elif isinstance(value, tuple):
            for i, n in enumerate(value):
                if n > 1:
                    yield {**options, name: (*value[:i], 1, *value[i + 1 :])}
        elif type(value) is bool and value:
            yield {**options, name: False}
        elif type(value) is str and name in SIMPLEST and value not in (SIMPLEST[name], "none"):
            yield {**options, name: SIMPLEST[name]}


def shrink(
    program: Program, fails: Callable[[Built], Any], oracle: str, attempts: int = 100
) -> Program:
    """The smallest program that was found to fail at the same oracle.

    Args:
      program: one that fails.
      fails: asks the oracles about a program; raises `Failure` where one does not hold.
      oracle: the one that failed.
      attempts: how many programs may be asked about.
    """
    progress = True
    while progress:
        progress = False
        for candidate in smaller(program):
            try:
                built = build(candidate)
            except Invalid:
                continue
            if attempts == 0:
                return program
            attempts -= 1
            try:
                fails(built)
            except Failure as failure:
                if failure.oracle == oracle:
                    program, progress = candidate, True
                    break
    return program
