"""Compiling a call, and how long it and its program take."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Compiled(NamedTuple):
    """A compiled function with its arguments.

    Attributes:
      call: calls it.
      repeats: how often in one `call`.
      seconds: to trace and compile.
      temporary, output: bytes.
    """

    call: Callable[[], Any]
    repeats: int
    seconds: float
    temporary: int
    output: int


def compile_call(function: Callable[..., Any], *args: Any) -> Compiled:
    compiled, seconds = _compile(jax.jit(function), *args)
    call = functools.partial(compiled, *args)
    return Compiled(call, 1, seconds, *program_bytes(compiled))


def compile_steps(
    step: Callable[..., Any], params: Any, state: Any, batch: Any, repeats: int = 1
) -> Compiled:
    """Steps that go on from each other, their parameters and state donated as in training."""
    compiled, seconds = _compile(jax.jit(step, donate_argnums=(0, 1)), params, state, batch)
    held = jax.tree.map(jnp.copy, (params, state))

    def call() -> Any:
        nonlocal held
        for _ in range(repeats):
            held = compiled(*held, batch)
        return held

    return Compiled(call, repeats, seconds, *program_bytes(compiled))


def _compile(jitted: Any, *args: Any) -> tuple[Any, float]:
    begin = time.perf_counter()
    compiled = jitted.lower(*args).compile()
    return compiled, time.perf_counter() - begin


def program_bytes(compiled: Any) -> tuple[int, int]:
    """Of what a program keeps for itself, and of its results."""
    memory = compiled.memory_analysis()
    assert memory is not None, "this backend does not say how much memory a program takes"
    return memory.temp_size_in_bytes, memory.output_size_in_bytes


def clock(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begin


def bytes_of(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
