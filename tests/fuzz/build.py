"""From a program as plain data to its Python, and from that to a loss, parameters and a batch."""

import dataclasses
from typing import Any

import numpy as np

from tests.fuzz.blocks import BLOCKS, LEAVES
from tests.fuzz.heads import (
    DECAYS,
    DERIVATIVES,
    derivative_shape,
    draw_embedding,
    draw_head,
    write_embedding,
    write_head,
    write_loss,
)
from tests.fuzz.programs import Program, Statement, mostly, pick
from tests.fuzz.statements import KINDS, draw_dense
from tests.fuzz.writer import MAX_RANK, Invalid, Writer

SIMPLE = KINDS | LEAVES
PRELUDE = """\
import jax, jax.numpy as jnp, numpy as np, optax
import locoprop_jax as lp
"""
OWN = """
@jax.custom_jvp
def own(x):
    return jnp.tanh(x)


own.defjvp(lambda x, t: (own(*x), (1 - own(*x) ** 2) * t[0]))
"""
OWN_BY_VJP = """
@jax.custom_vjp
def own_by_vjp(x):
    return jnp.tanh(x)


own_by_vjp.defvjp(lambda x: (jnp.tanh(x), x), lambda x, t: ((1 - jnp.tanh(x) ** 2) * t,))
"""
WRAPPERS = {
    "": "",
    "jit": "loss_fn = jax.jit(loss_fn)",
    "checkpoint": "loss_fn = jax.checkpoint(loss_fn)",
    "jit of checkpoint": "loss_fn = jax.jit(jax.checkpoint(loss_fn))",
}

# --- statements ----------------------------------------------------------------------------------


def write(w: Writer, statement: Statement) -> None:
    """The lines of a statement."""
    if statement.kind in SIMPLE:
        kind = SIMPLE[statement.kind]
        w.need(kind.applies(w))
        w.new_group()
        kind.write(w, statement.options)
    elif statement.kind == "embedding":
        w.need(w.words is not None and len(w.shape) < MAX_RANK)
        w.new_group()
        write_embedding(w, statement.options)
    else:
        kind, holds = BLOCKS[statement.kind]
        w.need(kind.applies(w) and len(statement.bodies) == len(holds))
        bodies = [lambda body=body: write_body(w, body) for body in statement.bodies]
        kind.write(w, statement.options, *bodies)


def write_body(w: Writer, body: tuple[Statement, ...]) -> None:
    for statement in body:
        write(w, statement)


def draw_statement(rng: np.random.Generator, w: Writer, keep: bool, depth: int) -> Statement:
    """A statement that can be applied, written too; with `keep` the shape stays."""
    kinds: dict[str, Any] = {n: k for n, k in SIMPLE.items() if k.applies(w)}
    if depth < 2:
        kinds |= {n: k for n, (k, _) in BLOCKS.items() if k.applies(w)}
    if keep:
        kinds = {n: k for n, k in kinds.items() if k.keeps or n == "dense"}
    name = pick(rng, kinds, [k.weight for k in kinds.values()])
    options = kinds[name].draw(rng, w)
    if name == "dense" and keep:
        options = draw_dense(rng, w, w.width)
    if name in SIMPLE:
        statement = Statement(name, options)
        write(w, statement)
        return statement
    drawn: list[tuple[Statement, ...]] = []

    def body_of(keeps):
        def body():
            count = int(rng.integers(1, 3))
            drawn.append(
                tuple(draw_statement(rng, w, keeps or keep, depth + 1) for _ in range(count))
            )

        return body

    kind, holds = BLOCKS[name]
    kind.write(w, options, *(body_of(keeps) for keeps in holds))
    return Statement(name, options, tuple(drawn))


# --- programs ------------------------------------------------------------------------------------


def _draw_shape(rng):
    batch = pick(rng, [1, 2, 3, 4, 5, 6, 6, 6])
    ranks = pick(rng, [0, 1, 2], [5, 4, 1])
    return (batch, *(int(n) for n in rng.integers(1, 5, ranks)))


def draw(seed: int) -> Program:
    """The program of a seed."""
    for attempt in range(100):
        try:
            program = _draw(np.random.default_rng([seed, attempt]), seed)
            source(program)
            return program
        except Invalid:  # two choices that do not fit
            continue
    raise AssertionError(f"no program of seed {seed}")


def _draw(rng, seed):
    shape = _draw_shape(rng)
    derivative = mostly(rng, "", DERIVATIVES, 0.12) if len(shape) == 1 else ""
    words = None
    if not derivative and len(shape) < 3 and rng.random() < 0.25:
        words = int(rng.integers(2, 6))
    else:
        shape = (*shape, int(rng.integers(1, 6)))
    flat = bool(rng.random() < 0.5)
    w = Writer(shape, flat, words)
    statements = []
    tied = False
    if words is not None:
        statements.append(Statement("embedding", draw_embedding(rng, w)))
        tied = rng.random() < 0.35
        write(w, statements[0])
    for _ in range(int(rng.integers(0 if words else 1, 5))):
        before = w.whole
        w.whole = not derivative
        statements.append(draw_statement(rng, w, keep=False, depth=0))
        w.whole = before
    if tied and w.width != statements[0].options["width"]:
        width = statements[0].options["width"]
        back = {"width": width, "kernel": "plain", "product": "x @ W", "bias": "", "activation": ""}
        statements.append(Statement("dense", back))
        w.shape = (*w.shape[:-1], width)
    count = pick(rng, [1, 2, 3], [7, 2, 1])
    return Program(
        seed=seed,
        shape=shape,
        statements=tuple(statements),
        heads=tuple(Statement("head", draw_head(rng, w, tied and i == 0)) for i in range(count)),
        words=words,
        dtype=pick(rng, ["float64", "float32", "bfloat16"], [16, 3, 1]),
        derivative=derivative,
        decay=mostly(rng, "", DECAYS, 0.2),
        wrapper=mostly(rng, "", WRAPPERS, 0.2),
        aux=bool(rng.random() < 0.2),
        closed=bool(rng.random() < 0.15) and not derivative,
        flat=flat,
    )


# --- their Python --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Source:
    """A program's Python, and what an oracle may ask about it.

    Attributes:
      text: it defines `net`, `loss_of`, `loss_fn`, `params` and `batch`.
      mixes_examples: whether examples meet in the network.
    """

    text: str
    mixes_examples: bool


def source(program: Program) -> Source:
    """The Python of a program.

    Raises:
      Invalid: its statements do not fit.
    """
    w = Writer(program.shape, program.flat, program.words)
    w.whole = not program.derivative
    table = None
    for i, statement in enumerate(program.statements):
        write(w, statement)
        if statement.kind == "embedding":
            w.need(i == 0)
            group = f'p["{w.group}w0"]' if program.flat else f'p["{w.group}"]["w0"]'
            how = statement.options["how"]
            table = (f"{group}.T" if how == "transposed" else group, statement.options["width"])
    w.need(program.words is None or table is not None)
    losses = []
    for head in program.heads:
        w.new_group()
        losses += write_head(w, head.options, table)
    w.need(w.params)
    shape_of_first = (*w.shape[:-1], program.heads[0].options["width"])
    of_net = list(w.zs)
    arguments = [name for name in w.data if any(_mentions(line, name) for line in w.lines)]
    if program.derivative:
        w.need(not arguments and not any("own_by_vjp" in line for line in w.lines))
        own = derivative_shape(program.derivative, program.shape, shape_of_first)
        w.need(own is not None)
        w.zs.append("d")
        options = {"loss": "squared", "reduction": "mean", "closed": False}
        losses += write_loss(w, options, "d", own)
    return Source(_text(program, w, arguments, of_net, losses), w.mixes_examples)


def _mentions(line, name):
    return (
        name
        in line.replace(".", " ")
        .replace("(", " ")
        .replace(")", " ")
        .replace(",", " ")
        .replace("[", " ")
        .replace("]", " ")
        .split()
    )


def _text(program, w, arguments, of_net, losses):
    rest = "".join(f", {name}" for name in w.data)
    x = "" if program.closed else ", x"
    to_net = "".join(f", {name}" for name in arguments)
    lines = [PRELUDE]
    body = "\n".join(w.lines)
    lines += [text for text, use in ((OWN, "own("), (OWN_BY_VJP, "own_by_vjp(")) if use in body]
    lines += [_arrays(program, w)]
    lines += [f"def net(p, x{to_net}):", "    h = x", *w.lines, f"    return {', '.join(of_net)},"]
    lines += ["", "", f"def outputs(p{x}{rest}):"]
    if program.derivative:
        lines += [f"    d = {DERIVATIVES[program.derivative]}"]
        lines += [f"    return *net(p, x{to_net}), d"]
    else:
        lines += [f"    return net(p, x{to_net})"]
    lines += ["", "", f"def loss_of(zs{x}{rest}):", f"    {', '.join(w.zs)}, = zs"]
    lines += ["    loss = 0.0", *("    " + line for line in losses), "    return loss"]
    lines += ["", "", f"def data_loss(p{x}{rest}):"]
    lines += [f"    return loss_of(outputs(p{x}{rest}){x}{rest})"]
    lines += ["", "", f"def loss_fn(p{x}{rest}):"]
    decay = f" + {DECAYS[program.decay]}" if program.decay else ""
    lines += [f"    zs = outputs(p{x}{rest})", f"    loss = loss_of(zs{x}{rest}){decay}"]
    lines += [
        '    return loss, {"outputs": zs, "parameters": p}' if program.aux else "    return loss"
    ]
    lines += [
        "",
        WRAPPERS[program.wrapper],
        f"batch = ({', '.join([x[2:]] * bool(x) + list(w.data))},)",
    ]
    return "\n".join(lines).replace("(,)", "()") + "\n"


RECIPES = {
    "normal": "rng.normal(size={shape})",
    "mask": "(rng.random({shape}) < 0.7).astype(float)",
    "positive": "rng.random({shape}) + 0.1",
    "fraction": "rng.random({shape})",
    "distribution": "(lambda v: v / v.sum(-1, keepdims=True))(rng.random({shape}) + 0.1)",
    "permutation": "rng.permutation({first})",
    "label": "rng.integers(0, {count}, {shape})",
}


def _array(name, array, seed, dtype):
    kind, *count = array.recipe.split()
    recipe = RECIPES[kind].format(
        shape=array.shape, first=(*array.shape, 0)[0], count=count[0] if count else ""
    )
    if array.scale != 1.0:
        recipe = f"{array.scale} * {recipe}"
    if array.shift:
        recipe = f"{array.shift} + {recipe}"
    if kind in ("label", "permutation"):
        return f"(lambda rng: {recipe})(np.random.default_rng({seed}))"
    return f"array({seed}, lambda rng: {recipe})"


def _arrays(program, w):
    dtype, seed = program.dtype, program.seed
    lines = ["", "def array(seed, draw):"]
    lines += [
        f"    return np.asarray(draw(np.random.default_rng([{seed}, seed])), jnp.{dtype})",
        "",
    ]
    number = 0
    for name, array in (w.constants | w.data).items():
        number += 1
        lines.append(f"{name} = {_array(name, array, number, dtype)}")
    if program.words is None:
        lines.append(f"x = array(0, lambda rng: rng.normal(size={program.shape}))")
    else:
        lines.append(
            f"x = np.random.default_rng({seed}).integers(0, {program.words}, {program.shape})"
        )
    lines.append("params = {")
    for group, own in w.params.items():
        parts = {}
        for name, array in own.items():
            number += 1
            fan_in = array.shape[-2] if len(array.shape) > 1 else 1
            scaled = dataclasses.replace(array, scale=round(array.scale / fan_in**0.5, 3))
            parts[name] = _array(name, scaled, number, dtype)
        if program.flat:
            lines += [f'    "{group}{name}": {text},' for name, text in parts.items()]
        else:
            inner = ", ".join(f'"{name}": {text}' for name, text in parts.items())
            lines.append(f'    "{group}": {{{inner}}},')
    lines += ["}", "", ""]
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Built:
    """A program that can be called: what its Python defines."""

    program: Program
    text: str
    mixes_examples: bool
    names: dict[str, Any]

    def __getattr__(self, name):
        return self.names[name]


def build(program: Program) -> Built:
    """The loss, parameters and batch of a program.

    Raises:
      Invalid: its statements do not fit.
    """
    found = source(program)
    names: dict[str, Any] = {}
    exec(compile(found.text, f"<program {program.seed}>", "exec"), names)
    return Built(program, found.text, found.mixes_examples, names)
