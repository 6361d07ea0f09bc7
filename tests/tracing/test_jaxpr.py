"""Traced functions, flattened and evaluated, against the functions themselves."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from locoprop_jax._tracing.evaluate import Address, evaluate, tap
from locoprop_jax._tracing.program import flatten

X = jnp.asarray(np.random.default_rng(0).normal(size=(3,)))


def plain(x):
    return jnp.sum(jnp.exp(jnp.sin(x)) * x)


def calls(x):
    twice = jax.jit(lambda x: jnp.sin(jax.jit(jnp.sin)(x)))
    return jnp.sum(twice(x) * twice(2 * x))


def rematerialised(x):
    inner = jax.checkpoint(lambda x: jnp.exp(jax.checkpoint(jnp.sin)(x)))
    return jnp.sum(inner(x) * jax.jit(inner)(x))


def with_constants(x):
    return jnp.sum(x * X) + jnp.where(x > 0, x, np.arange(3.0)).sum()


def with_custom_derivatives(x):
    return jnp.sum(jax.nn.relu(x) + jax.nn.softplus(x) + jax.nn.silu(x))


def with_control_flow(x):
    x = jax.lax.fori_loop(0, 3, lambda _, x: jnp.sin(x), x)
    return jax.lax.cond(x[0] > 0, jnp.sum, jnp.max, jnp.stack([x, x]))


each_function = pytest.mark.parametrize(
    "f",
    [plain, calls, rematerialised, with_constants, with_custom_derivatives, with_control_flow],
)


def primitives(program):
    return [str(equation.primitive) for equation in program.equations]


# --- tap -----------------------------------------------------------------------------------------


def test_a_tap_is_seen_by_derivatives_only():
    x, z = jnp.asarray([-0.0, 1.0]), jnp.asarray([5.0, 5.0])
    value, (dx, dz) = jax.value_and_grad(lambda x, z: jnp.sum(tap(x, z) ** 3), argnums=(0, 1))(x, z)
    assert value == 1.0
    np.testing.assert_array_equal(dx, 3 * x**2)
    np.testing.assert_array_equal(dz, dx)
    np.testing.assert_array_equal(np.signbit(tap(x, z)), [True, False])


def test_a_tap_leaves_nothing_in_the_compiled_forward_pass():
    with_tap = jax.jit(lambda x: jnp.sin(tap(x, jnp.zeros_like(x)))).lower(X)
    assert str(with_tap.compile().as_text()).count(" add(") == 0


# --- the flat view -------------------------------------------------------------------------------


@each_function
def test_a_flat_program_computes_the_function(f):
    program = flatten(jax.make_jaxpr(f)(X))
    (x,), (output,) = program.inputs, program.outputs
    equations, free = program.slice([], output)
    assert free[0] == x and program.constants.keys() >= set(free[1:])
    np.testing.assert_allclose(program.call(equations, {x: X}, output), f(X), rtol=1e-14)


@each_function
def test_every_equation_has_a_path_of_its_own_and_reads_what_is_known(f):
    program = flatten(jax.make_jaxpr(f)(X))
    paths = [equation.path for equation in program.all_equations()]
    assert len(set(paths)) == len(paths)
    known = set(program.constants)

    def walk(program):
        assert [e.path for e in program.equations] == sorted(e.path for e in program.equations)
        known.update(program.inputs)
        for position, equation in enumerate(program.equations):
            assert known.issuperset(equation.inputs)
            known.update(equation.outputs)
            for body in program.bodies.get(position, ()):
                walk(body)

    walk(program)
    assert known == set(range(len(program.avals)))


def test_calls_and_rematerialisation_are_inlined_and_nothing_else():
    assert primitives(flatten(jax.make_jaxpr(calls)(X))).count("sin") == 4
    flat = primitives(flatten(jax.make_jaxpr(rematerialised)(X)))
    assert flat.count("exp") == flat.count("sin") == 2
    assert "custom_jvp_call" in primitives(flatten(jax.make_jaxpr(jax.nn.relu)(X)))
    assert "scan" in primitives(flatten(jax.make_jaxpr(with_control_flow)(X)))


def test_the_numbering_is_the_same_at_every_size():
    small, large = (flatten(jax.make_jaxpr(rematerialised)(jnp.zeros(n))) for n in (3, 6))
    assert primitives(small) == primitives(large)
    assert [e.path for e in small.equations] == [e.path for e in large.equations]
    assert [e.inputs for e in small.equations] == [e.inputs for e in large.equations]


def test_a_slice_is_cut_at_its_sources():
    program = flatten(jax.make_jaxpr(lambda x, y: jnp.sum(jnp.sin(x) * y))(X, X))
    sine = program.equations[primitives(program).index("sin")].outputs[0]
    equations, free = program.slice([sine], program.outputs[0])
    assert [str(equation.primitive) for equation in equations] == ["mul", "reduce_sum"]
    assert set(free) == {sine, program.inputs[1]}


# --- the running view ----------------------------------------------------------------------------


def sines(closed):
    return [e.path for e in flatten(closed).equations if str(e.primitive) == "sin"]


@each_function
def test_evaluation_is_the_function(f):
    def evaluated(x):
        results, recorded = evaluate(closed, [x], frozenset(), {})
        assert recorded == {}
        return results[0]

    closed = jax.make_jaxpr(f)(X)
    found = jax.jit(jax.value_and_grad(evaluated))(X)
    expected = jax.jit(jax.value_and_grad(f))(X)
    chex.assert_trees_all_equal(found, expected)


@pytest.mark.parametrize("f", [plain, calls, rematerialised])
def test_operands_and_results_are_recorded_wherever_they_are(f):
    closed = jax.make_jaxpr(f)(X)
    paths = sines(closed)
    addresses = frozenset(Address(p, side, 0) for p in paths for side in ("in", "out"))
    _, recorded = jax.jit(lambda x: evaluate(closed, [x], addresses, {}))(X)
    assert recorded.keys() == addresses and paths
    for path in paths:
        sine = jnp.sin(recorded[Address(path, "in", 0)])
        np.testing.assert_allclose(recorded[Address(path, "out", 0)], sine, rtol=1e-15)


def cotangents_by_hand(f, x):
    """dL/ds for every sine s of the functions above, in the order of the program."""
    once, twice = jnp.sin(x), jnp.sin(jnp.sin(x))
    once_2, twice_2 = jnp.sin(2 * x), jnp.sin(jnp.sin(2 * x))
    return {
        plain: [jnp.exp(once) * x],
        calls: [jnp.cos(once) * twice_2, twice_2, jnp.cos(once_2) * twice, twice],
        rematerialised: 2 * [jnp.exp(2 * once)],
    }[f]


@pytest.mark.parametrize("f", [plain, calls, rematerialised])
def test_the_derivative_by_a_perturbation_is_the_cotangent_of_a_result(f):
    def perturbed(x, perturbations):
        return evaluate(closed, [x], frozenset(), perturbations)[0][0]

    closed = jax.make_jaxpr(f)(X)
    zeros = {path: jnp.zeros(3) for path in sines(closed)}
    cotangents = jax.jit(jax.grad(perturbed, argnums=1))(X, zeros)
    found = [cotangents[path] for path in sines(closed)]
    np.testing.assert_allclose(found, cotangents_by_hand(f, X), rtol=1e-12)


def test_what_is_rematerialised_stays_so():
    def f(x):
        return jnp.sum(jax.checkpoint(lambda x: jnp.exp(jnp.sin(x)) ** 2)(x))

    def evaluated(x):
        return evaluate(closed, [x], addresses, {})[0][0]

    closed = jax.make_jaxpr(f)(X)
    addresses = frozenset(Address(path, "out", 0) for path in sines(closed))
    found, expected = (str(jax.make_jaxpr(jax.grad(g))(X)).count("= exp ") for g in (evaluated, f))
    assert found == expected == 2
