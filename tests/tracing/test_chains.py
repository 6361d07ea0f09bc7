"""Chains against NumPy."""

import math

import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from locoprop_jax._tracing import chains

shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)


def numbered(shape):
    """An array whose entries say where they come from."""
    return np.arange(math.prod(shape)).reshape(shape)


@st.composite
def steps(draw, shape):
    """Random rearrangements of an array of `shape`, one after the other."""
    result = []
    for _ in range(draw(st.integers(0, 5))):
        if draw(st.booleans()):
            argument = tuple(draw(st.permutations(range(len(shape)))))
            result.append(("transpose", argument))
            shape = tuple(shape[i] for i in argument)
        else:
            size = math.prod(shape)
            divisors = [d for d in range(1, size + 1) if size % d == 0]
            first = draw(st.sampled_from(divisors))
            shape = draw(st.permutations((first, size // first)).map(tuple))
            result.append(("reshape", shape))
    return result


def build(shape, steps):
    """The chain of these steps, and what they make of a numbered array."""
    chain, x = (), numbered(shape)
    for step, argument in steps:
        chain = chains.extend(chain, x.shape, step, argument)
        x = x.transpose(argument) if step == "transpose" else x.reshape(argument)
    return chain, x


arrangements = shapes.flatmap(lambda shape: st.tuples(st.just(shape), steps(shape)))


@given(arrangements)
def test_a_chain_does_what_its_steps_do(arrangement):
    shape, steps = arrangement
    chain, expected = build(shape, steps)
    np.testing.assert_array_equal(chains.apply(chain, numbered(shape)), expected)
    assert chains.result_shape(chain, shape) == expected.shape
    assert len(chain) <= len(steps) and chains.is_invertible(chain)
    hash(chain)


@given(arrangements)
def test_the_inverse_undoes_a_chain(arrangement):
    shape, steps = arrangement
    chain, rearranged = build(shape, steps)
    inverse = chains.inverse(chain, shape)
    np.testing.assert_array_equal(chains.apply(inverse, rearranged), numbered(shape))


@given(arrangements, st.data())
def test_group_merges_axes_in_the_order_given(arrangement, data):
    shape, steps = arrangement
    chain, x = build(shape, steps)
    order = data.draw(st.permutations(range(x.ndim)))
    cuts = sorted(data.draw(st.tuples(*2 * [st.integers(0, x.ndim)])))
    groups = tuple(order[: cuts[0]]), tuple(order[cuts[0] : cuts[1]]), tuple(order[cuts[1] :])
    grouped = chains.apply(chains.group(chain, x.shape, groups), numbered(shape))
    sizes = [math.prod(x.shape[i] for i in axes) for axes in groups]
    np.testing.assert_array_equal(grouped, x.transpose(order).reshape(sizes))


def test_two_transpositions_in_a_row_are_one_step_or_none():
    chain = chains.extend((), (2, 3, 4), "transpose", (1, 2, 0))
    assert chains.extend(chain, (3, 4, 2), "transpose", (2, 0, 1)) == ()
    assert chains.extend(chain, (3, 4, 2), "transpose", (1, 0, 2)) == (("transpose", (2, 1, 0)),)


def test_a_broadcast_has_no_inverse():
    chain = chains.extend((("reshape", (1, 3)),), (1, 3), "broadcast", (2, 3))
    assert not chains.is_invertible(chain)
    expected = [[0, 1, 2], [0, 1, 2]]
    np.testing.assert_array_equal(chains.apply(chain, np.arange(3)), expected)
    np.testing.assert_array_equal(chains.apply(chain, jnp.arange(3)), expected)
