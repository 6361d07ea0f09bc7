"""Random models: the generator, what runs them, the shrinker, and a few programs of the day."""

import datetime
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.fuzz import run
from tests.fuzz.build import build, draw
from tests.fuzz.interpret import run as interpret
from tests.fuzz.oracles import Failure, check
from tests.fuzz.programs import Program, Statement, size
from tests.fuzz.shrink import shrink, smaller
from tests.fuzz.writer import Invalid
from tests.helpers import quick_jit

pytestmark = pytest.mark.standard_promotion
COUNT = 12


@pytest.fixture(autouse=True)
def standard_ranks():
    """Programs broadcast as users do."""
    with jax.numpy_rank_promotion("allow"):
        yield


def test_programs_of_the_day(capsys):
    """Another few each day; a failure prints the number of its program and a smaller one."""
    seed = int(f"{datetime.datetime.now(datetime.UTC):%Y%m%d}") * 1000
    with capsys.disabled():
        print(f"\nrandom models: python3 make.py fuzz --seed {seed} --count {COUNT}")
    lines = []
    report = run.explore(seed, COUNT, None, attempts=20, say=lines.append)
    assert not report.failures, "\n".join(lines)
    assert report.programs == COUNT
    assert report.checked["X'E"] == COUNT


# --- the generator -------------------------------------------------------------------------------


def test_a_seed_gives_one_program_and_a_program_one_text():
    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    assert build(draw(3)).text == build(draw(3)).text


def test_programs_are_what_jax_can_differentiate():
    for seed in range(100, 115):
        built = build(draw(seed))
        loss = jax.grad(lambda *args, f=built: f.loss_fn(*args), has_aux=built.program.aux)
        grads = jax.eval_shape(loss, built.params, *built.batch)
        assert jax.tree.structure(grads[0] if built.program.aux else grads) == jax.tree.structure(
            built.params
        )


def test_programs_are_of_many_kinds():
    kinds, programs = set(), [draw(seed) for seed in range(300)]

    def note(statements):
        for statement in statements:
            kinds.add(statement.kind)
            for body in statement.bodies:
                note(body)

    for program in programs:
        note(program.statements)
    assert len(kinds) > 20
    for name in ("dtype", "derivative", "decay", "wrapper", "aux", "closed", "flat"):
        assert len({getattr(program, name) for program in programs}) > 1


def test_statements_that_do_not_fit_are_no_program():
    image = Statement("pool", {"how": "mean"})  # of positions, of which there are none
    program = Program(0, (2, 3), (image,), (draw(0).heads[0],))
    with pytest.raises(Invalid):
        build(program)


# --- NumPy in place of XLA -----------------------------------------------------------------------

X = np.random.default_rng(0).normal(size=(2, 5, 4))
KERNEL = np.random.default_rng(1).normal(size=(3, 2, 6))


def convolved(x, kernel):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (2,),
        [(2, 1)],
        rhs_dilation=(2,),
        dimension_numbers=("NHC", "HIO", "NHC"),
        feature_group_count=2,
    )


def recurrent(x, kernel):
    def cell(h, row):
        h = jnp.tanh(row @ kernel[:, 0, :4].T @ kernel[:, 1, :4] + h)
        return h, h

    return jax.lax.scan(jax.checkpoint(cell), x[:, 0], jnp.moveaxis(x, 1, 0), reverse=True)


def chosen(x, kernel):
    f = jax.lax.cond(x.sum() > 0, jnp.sin, jnp.tanh, x)
    return jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] * 0.5), (0, f))


def looked_up(x, kernel):
    ids = jnp.array([[0, 2], [1, -1]])
    return kernel[ids], kernel.at[ids].add(1.0), jnp.take(kernel, ids, 1), x[:, 1:4, ::-1]


def factorised(x, kernel):
    a = x[0].T @ x[0] + jnp.eye(4)
    root = jnp.linalg.cholesky(a)
    return root, jax.scipy.linalg.cho_solve((root, True), x[0].T), jnp.linalg.eigh(a)[0]


@pytest.mark.parametrize("function", [convolved, recurrent, chosen, looked_up, factorised])
def test_numpy_computes_what_xla_does(function):
    def with_derivatives(x, kernel):
        def first(kernel):
            leaves = jax.tree.leaves(function(x, kernel))
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in leaves if leaf.dtype == x.dtype)

        values = function(x, kernel)
        if function is chosen:  # a `while_loop` has no derivative
            return values
        return values, jax.grad(first)(kernel), jax.jvp(first, (kernel,), (kernel,))

    found, expected = interpret(with_derivatives, X, KERNEL), quick_jit(with_derivatives)(X, KERNEL)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), found, expected
    )


# --- the shrinker --------------------------------------------------------------------------------


def test_smaller_programs_are_smaller():
    program = draw(11)
    for other in smaller(program):
        assert other != program
        assert size(other) <= size(program) or len(other.statements) <= len(program.statements)


def test_a_wrong_oracle_is_found_and_its_program_shrunk():
    """Whoever says that no program has a hyperbolic tangent is shown a small one that has."""

    def wrong(setting):
        if "jnp.tanh" in setting.built.text:
            raise Failure("no tanh", "there is one")

    def asked(built):
        wrong(type("Setting", (), {"built": built}))

    program = next(p for p in map(draw, range(100)) if "jnp.tanh" in build(p).text and size(p) > 4)
    with pytest.raises(Failure, match="no tanh"):
        asked(build(program))
    small = shrink(program, asked, "no tanh", attempts=400)
    assert "jnp.tanh" in build(small).text
    assert size(small) <= 3 < size(program)  # of words an embedding, what is sought, a head
    assert len(small.heads) == 1
    assert set(small.shape) == {1}


def test_an_oracle_that_fails_is_a_failure_of_the_program():
    def wrong(setting):
        raise Failure("wrong on purpose", str(setting.layers))

    with pytest.raises(Failure, match="wrong on purpose"):
        check(build(draw(3)), (), more=(wrong,))


def test_another_exception_is_a_failure_that_says_where():
    def broken(setting):
        raise KeyError("x")

    with pytest.raises(Failure, match="broken raises KeyError"):
        check(build(draw(3)), (), more=(broken,))


def test_the_command_prints_the_seed_the_program_and_where_to_go_on(monkeypatch, capsys):
    def wrong(built, names, with_jit):
        raise Failure("wrong on purpose")

    monkeypatch.setattr(run, "check", wrong)
    assert run.main(["--seed", "7", "--count", "2", "--attempts", "3"]) == 1
    printed = capsys.readouterr().out
    assert "program 7 fails, wrong on purpose" in printed
    assert "def loss_fn" in printed
    assert "python3 make.py fuzz --seed 8 --count 1" in printed
    assert "go on with --seed 9" in printed
