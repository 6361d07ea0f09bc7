"""A new method is one short file, against its formula; what all methods do is in the contract."""

import pathlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.dense_nets import assert_blocks, nets, update_function
from tests.neurons import diagonal_foof


@given(
    net=nets(),
    damping=st.floats(0.01, 2),
    decay=st.sampled_from([0.0, 0.9]),
    seed=st.integers(0, 99),
)
def test_two_steps_divide_by_the_average_of_the_diagonals(net, damping, decay, seed):
    tx = diagonal_foof.scale_by_diagonal_foof(net.layers(), damping=damping, decay=decay)
    params, update = net.params(seed), update_function(net, tx)
    batches, state = [net.data(seed), net.data(seed + 100)], tx.init(params)
    for batch in batches:
        updates, state = update(params, state, *batch)
    slopes, expected = net.gradients(params, *batches[-1]), {}
    first, second = (
        [np.square(x).mean(0) for x, *_ in net.backprop(params, *batch)] for batch in batches
    )
    for name, bias, a, b in zip(net.names, net.biases, first, second, strict=True):
        diagonal = (decay * a + b) / (decay + 1)
        size = len(diagonal) - bias
        diagonal[:size] += damping * diagonal[:size].mean()
        expected[name] = slopes[name] / diagonal[:, None]
    assert_blocks(net, updates, expected)


def test_it_is_one_file_of_at_most_150_lines():
    assert len(pathlib.Path(diagonal_foof.__file__).read_text().splitlines()) <= 150
