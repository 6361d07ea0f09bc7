"""The physics benchmark: its derivatives, and what its table says of curves."""

import jax.numpy as jnp
import numpy as np

from benchmarks.physics.physics import finite, table
from benchmarks.physics.problems import curvature, laplacian, slope
from benchmarks.physics.training import Curve
from tests.helpers import normal


def test_derivatives_are_those_of_a_known_function():
    x = normal(0, 5, 2)

    def f(x):
        return jnp.sin(x[:, 0]) * x[:, 1] ** 3

    sin, cos, y = np.sin(x[:, 0]), np.cos(x[:, 0]), np.asarray(x[:, 1])
    np.testing.assert_allclose(slope(f, x, 0), cos * y**3, rtol=1e-12)
    np.testing.assert_allclose(curvature(f, x, 1), 6 * sin * y, rtol=1e-12)
    np.testing.assert_allclose(laplacian(f, x), 6 * sin * y - sin * y**3, rtol=1e-10)


def test_the_table_has_the_best_run_and_when_it_was_good_enough():
    def curve(*errors):
        places = range(len(errors))
        return finite(Curve([*places], [2.0 * i for i in places], [*errors], [*errors]))

    adam = {"0.001": curve(1.0, 0.5), "0.01": curve(1.0, float("inf")), "0.1": curve(1.0, 0.2)}
    lines = table({"heat": {"adam": adam, "kfac": {"1": curve(1.0, 5e-5, 2e-4)}}}).splitlines()
    assert lines[2].split() == "heat Adam, tuned 1 2.00e-01 2.00e-01 1 -".split()
    assert lines[3].split() == "heat K-FAC 2 2.00e-04 5.00e-05 1e+03 2.00 s".split()
