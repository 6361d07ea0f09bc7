"""Equations that run in chunks: the same results, one function for what is alike, scopes kept."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import locoprop_jax as lp
from locoprop_jax._tracing.chunks import Chunks
from locoprop_jax._tracing.evaluate import Address, evaluate
from tests.helpers import normal

BLOCKS = 6
PARAMS = [{"kernel": normal(i, 5, 5), "bias": normal(i + 10, 5)} for i in range(BLOCKS)]
X = normal(30, 7, 5)


def block(p, x, scale=0.5):
    h = (x - x.mean(1, keepdims=True)) * jax.lax.rsqrt(x.var(1, keepdims=True) + 1e-3)
    return x + scale * jnp.tanh(h @ p["kernel"] + p["bias"][None])


def deep(params, x):
    for i, p in enumerate(params):
        with jax.named_scope(f"block{i}"):
            x = block(p, x)
    return jnp.mean(x**2)


def rematerialised(params, x):
    for p in params:
        x = jax.checkpoint(block)(p, x)
    return jnp.mean(x**2)


def of_different_numbers(params, x):
    """Blocks that differ in a literal alone."""
    for i, p in enumerate(params):
        x = block(p, x, float(i))
    return jnp.mean(x**2)


def with_two_results(params, x):
    """An equation of which one result is dropped, and one that is printed."""
    for p in params:
        x = block(p, jax.lax.top_k(x, 5)[0])
    jax.debug.callback(lambda _: None, x.sum())
    return jnp.mean(x**2)


LOSSES = [deep, rematerialised, of_different_numbers, with_two_results]


@pytest.mark.parametrize("loss_fn", LOSSES, ids=lambda loss_fn: loss_fn.__name__)
def test_what_is_traced_in_chunks_is_what_runs_equation_by_equation(loss_fn):
    capture = lp.value_grad_and_capture(loss_fn)
    value, grads, captured = jax.jit(capture)(PARAMS, X)
    expected = jax.jit(jax.value_and_grad(loss_fn))(PARAMS, X)
    chex.assert_trees_all_close((value, grads), expected, rtol=1e-12)
    for own, grad in zip(captured.values(), grads, strict=True):
        x, e = own.inputs[:, 0], own.cotangents[:, 0]
        np.testing.assert_allclose(x.T @ e, grad["kernel"], rtol=1e-10, atol=1e-12)


def test_records_are_found_inside_and_between_chunks():
    closed = jax.make_jaxpr(deep)(PARAMS, X)
    flat = [*jax.tree.leaves(PARAMS), X]
    everything = frozenset(
        Address((i,), "out", 0)
        for i, eqn in enumerate(closed.jaxpr.eqns)
        if type(eqn.outvars[0]).__name__ != "DropVar"
    )
    runs = [
        jax.jit(lambda *a, n=n: evaluate(closed, a, everything, {}, in_chunks=n))(*flat)
        for n in (True, False)
    ]
    chex.assert_trees_all_close(*runs, rtol=1e-12)


def test_equal_blocks_are_one_function(monkeypatch):
    """What differs is the first and the last chunk; the blocks between share theirs."""
    kept = []
    initial = Chunks.__init__
    monkeypatch.setattr(
        Chunks, "__init__", lambda self, traced: kept.append(self) or initial(self, traced)
    )

    def functions(blocks):
        kept.clear()
        jax.jit(lp.value_grad_and_capture(deep)).lower(PARAMS[:blocks], X)
        return sum(len(chunks._functions) for chunks in kept)

    assert functions(3) == functions(BLOCKS) > 0


def test_scopes_stay_those_of_each_block():
    text = jax.jit(lp.value_grad_and_capture(deep)).lower(PARAMS, X).as_text(debug_info=True)
    for i in range(BLOCKS):
        assert f"block{i}" in text


def test_what_is_not_traced_is_not_compiled_in_chunks(monkeypatch):
    """Each step would compile them anew."""
    monkeypatch.setattr(Chunks, "run", None)
    lp.value_grad_and_capture(deep)(PARAMS, X)
