"""Partial differential equations with known solutions, and a potential with its forces.

Points are drawn once, and the networks are 3 x 32 tanh in float64. Derivatives are taken of the
network of all points, along tangents as large as these, so that each row of a layer is one point's.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import locoprop_jax as lp

WIDTH, HIDDEN = 32, 3
Points = Float[Array, "points d"]
Values = Float[Array, " points"]
Function = Callable[[Points], Values]


class Problem(NamedTuple):
    """A loss of all its points, and how far a network is from the solution.

    Attributes:
      what: a line about it.
      inputs: of the network.
      loss: of the parameters.
      error: the relative L2 error at other points, of the parameters.
    """

    what: str
    inputs: int
    loss: Callable[[Any], Array]
    error: Callable[[Any], Array]


def init(key: Array, inputs: int) -> list[dict[str, Array]]:
    """Glorot's parameters of a network with one output."""
    sizes = [inputs, *[WIDTH] * HIDDEN, 1]
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {"kernel": jax.random.normal(k, (i, o)) * np.sqrt(2 / (i + o)), "bias": jnp.zeros(o)}
        for k, i, o in zip(keys, sizes, sizes[1:], strict=False)
    ]


def network(params: Any, x: Points) -> Values:
    *hidden, last = params
    for layer in hidden:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return (x @ last["kernel"] + last["bias"])[:, 0]


# --- derivatives ---------------------------------------------------------------------------------


def slope(f: Function, x: Points, axis: int) -> Values:
    v = jnp.zeros_like(x).at[:, axis].set(1.0)
    return jax.jvp(f, (x,), (v,))[1]


def curvature(f: Function, x: Points, axis: int) -> Values:
    return slope(lambda x: slope(f, x, axis), x, axis)


def laplacian(f: Function, x: Points) -> Values:
    terms = [curvature(f, x, i) for i in range(x.shape[1])]
    return sum(terms[1:], terms[0])


# --- equations -----------------------------------------------------------------------------------


def mean_square(values: Array, targets: Array) -> Array:
    return lp.losses.squared_error(values, targets).mean()


def relative_error(found: Array, true: Array) -> Array:
    return jnp.sqrt(jnp.sum((found - true) ** 2) / jnp.sum(true**2))


def boundary(random: np.random.Generator, points: int, d: int, axes: Sequence[int]) -> Points:
    """Points of the unit cube on the faces across some axes."""
    x = random.random((points, d))
    x[np.arange(points), random.choice(axes, points)] = random.integers(2, size=points)
    return jnp.asarray(x)


def equation(
    what: str,
    operator: Callable[[Function, Points], Values],
    solution: Function,
    d: int,
    inside: int,
    edge: Callable[[np.random.Generator], Points],
) -> Problem:
    """`operator(u) = operator(solution)` inside the unit cube, `u = solution` at its edge."""
    random = np.random.default_rng(0)
    x, at_edge = jnp.asarray(random.random((inside, d))), edge(random)
    test = jnp.asarray(random.random((4000, d)))
    right, values = operator(solution, x), solution(at_edge)

    def loss(params: Any) -> Array:
        def u(x: Points) -> Values:
            return network(params, x)

        return mean_square(operator(u, x), right) + mean_square(u(at_edge), values)

    def error(params: Any) -> Array:
        return relative_error(network(params, test), solution(test))

    return Problem(what, d, loss, error)


def poisson_2d(inside: int = 300) -> Problem:
    return equation(
        "Poisson in 2 dimensions, sin(pi x) sin(pi y)",
        laplacian,
        lambda x: jnp.sin(jnp.pi * x[:, 0]) * jnp.sin(jnp.pi * x[:, 1]),
        2,
        inside,
        lambda random: boundary(random, inside // 3, 2, [0, 1]),
    )


def poisson_5d(inside: int = 400) -> Problem:
    return equation(
        "Poisson in 5 dimensions, the sum of cos(pi x_i)",
        laplacian,
        lambda x: jnp.cos(jnp.pi * x).sum(1),
        5,
        inside,
        lambda random: boundary(random, inside // 2, 5, range(5)),
    )


def heat(inside: int = 300) -> Problem:
    """The first axis is the time."""

    def start_and_sides(random: np.random.Generator) -> Points:
        sides = boundary(random, inside // 4, 2, [1])
        start = jnp.asarray(random.random((inside // 4, 2))).at[:, 0].set(0.0)
        return jnp.concatenate([sides, start])

    return equation(
        "heat in 1 + 1 dimensions, exp(-pi^2 t / 4) sin(pi x)",
        lambda u, x: slope(u, x, 0) - 0.25 * curvature(u, x, 1),
        lambda x: jnp.exp(-(jnp.pi**2) * x[:, 0] / 4) * jnp.sin(jnp.pi * x[:, 1]),
        2,
        inside,
        start_and_sides,
    )


def helmholtz(inside: int = 400) -> Problem:
    return equation(
        "Helmholtz in 2 dimensions, k = 4, sin(pi x) sin(2 pi y)",
        lambda u, x: laplacian(u, x) + 16 * u(x),
        lambda x: jnp.sin(jnp.pi * x[:, 0]) * jnp.sin(2 * jnp.pi * x[:, 1]),
        2,
        inside,
        lambda random: boundary(random, inside // 3, 2, [0, 1]),
    )


def molecule(configurations: int = 150) -> Problem:
    """Three atoms in a plane, bound by Morse potentials; the error is that of the forces."""

    def energy(x: Points) -> Values:
        atoms = x.reshape(-1, 3, 2)
        pairs = [(0, 1), (1, 2), (0, 2)]
        lengths = [jnp.sqrt(((atoms[:, i] - atoms[:, j]) ** 2).sum(1)) for i, j in pairs]
        return jnp.stack([(1 - jnp.exp(1 - r)) ** 2 for r in lengths]).sum(0)

    def forces(u: Function, x: Points) -> Points:
        return -jax.grad(lambda x: u(x).sum())(x)

    rest = np.array([0.0, 0.0, 1.0, 0.0, 0.5, np.sqrt(0.75)])
    random = np.random.default_rng(0)

    def draw(count: int) -> Points:
        return jnp.asarray(rest + 0.2 * random.normal(size=(count, 6)))

    x, test = draw(configurations), draw(2000)
    energies, pulls = energy(x), forces(energy, x)

    def loss(params: Any) -> Array:
        def u(x: Points) -> Values:
            return network(params, x)

        return mean_square(u(x), energies) + mean_square(forces(u, x), pulls)

    def error(params: Any) -> Array:
        return relative_error(forces(lambda x: network(params, x), test), forces(energy, test))

    return Problem("energies and forces of three atoms, Morse potentials", 6, loss, error)


PROBLEMS: dict[str, Callable[..., Problem]] = {
    "poisson_2d": poisson_2d,
    "poisson_5d": poisson_5d,
    "heat": heat,
    "helmholtz": helmholtz,
    "molecule": molecule,
}
