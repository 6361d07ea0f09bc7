"""The averaged parameters of practical GN, appendix B.4."""

import chex
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import locoprop_jax as lp


class AverageTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_the_average_is_the_mean_at_first_and_a_moving_average_later(self):
        tx = optax.chain(optax.sgd(1.0), lp.average_iterates(decay=0.75))
        params = {"w": jnp.arange(3.0)}
        update = self.variant(tx.update)
        state, seen = tx.init(params), []
        for t in range(1, 9):
            updates, state = update({"w": jnp.full(3, t**2.0)}, state, params)
            params = optax.apply_updates(params, updates)
            seen.append(np.asarray(params["w"]))
            if t <= 4:
                expected = np.mean(seen, 0)
            else:
                expected = 0.75 * expected + 0.25 * seen[-1]
            np.testing.assert_allclose(lp.averaged_params(state)["w"], expected)
            np.testing.assert_allclose(updates["w"], -float(t**2))


def test_half_precision_parameters_are_averaged_in_single_precision():
    tx = lp.average_iterates()
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    state = tx.init(params)
    _, state = tx.update({"w": jnp.ones(2, jnp.bfloat16)}, state, params)
    assert lp.averaged_params(state)["w"].dtype == jnp.float32


def test_errors_say_where_the_average_belongs():
    with pytest.raises(ValueError, match=r"0 averages.*last in the chain"):
        lp.averaged_params(optax.sgd(1.0).init({"w": jnp.ones(2)}))
    tx = lp.average_iterates()
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update({"w": jnp.ones(2)}, tx.init({"w": jnp.ones(2)}))
    with pytest.raises(ValueError, match="decay"):
        lp.average_iterates(decay=1.0)
