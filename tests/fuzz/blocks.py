"""Statements that hold others: residuals, loops, branches, maps and what JAX wraps functions in.

Also attention and recurrent cells, whose parts are layers.
"""

from tests.fuzz.programs import pick
from tests.fuzz.statements import Kind, always, nothing, rank

# --- attention and cells -------------------------------------------------------------------------


def write_attention(w, options):
    heads, k, d = options["heads"], options["width"], w.width
    q, key, v = (w.param(d, heads, k) for _ in range(3))
    w.line(f'q = jnp.einsum("btd,dhk->bthk", h, {q})')
    w.line(f'k = jnp.einsum("btd,dhk->bthk", h, {key})')
    w.line(f'v = jnp.einsum("btd,dhk->bthk", h, {v})')
    if options["bias"]:
        w.line(f"q, v = q + {w.param(heads, k)}, v + {w.param(heads, k)}")
    w.line(f'a = jnp.einsum("bthk,bshk->bhts", q, k) / {k**0.5}')
    if options["causal"]:
        w.line("a = jnp.where(jnp.tril(jnp.ones(a.shape[-2:])) > 0, a, -1e9)")
    w.line("a = jax.nn.softmax(a)")
    w.line('o = jnp.einsum("bhts,bshk->bthk", a, v)')
    w.line(f'o = jnp.einsum("bthk,hkd->btd", o, {w.param(heads, k, d)})')
    w.line("h = h + o" if options["residual"] else "h = o")


def draw_attention(rng, w):
    flags = [bool(f) for f in rng.random(3) < 0.5]
    names = dict(zip(("bias", "causal", "residual"), flags, strict=True))
    return {"heads": int(rng.integers(1, 3)), "width": int(rng.integers(1, 4)), **names}


def write_recurrent(w, options):
    d, width, kind = w.width, options["width"], options["kind"]
    n = {"rnn": 1, "gru": 3, "lstm": 4}[kind]
    into, state, b = w.param(d, n * width), w.param(width, n * width), w.param(n * width)
    start = f"jnp.zeros((len(h), {width}), h.dtype)"
    if options["start"]:
        start = f"jnp.broadcast_to({w.param(width)}, (len(h), {width}))"
    w.line(f"s = {start}")
    if kind == "lstm":
        w.line("s = (s, jnp.zeros_like(s))")
    w.line("def cell(s, x):")
    if kind == "rnn":
        w.line(f"    s = jnp.tanh(x @ {into} + s @ {state} + {b})")
        w.line("    return s, s")
    elif kind == "gru":
        w.line(f"    a = jnp.split(x @ {into} + {b}, 3, -1)")
        w.line(f"    c = jnp.split(s @ {state}, 3, -1)")
        w.line("    z, r = jax.nn.sigmoid(a[0] + c[0]), jax.nn.sigmoid(a[1] + c[1])")
        w.line("    s = (1 - z) * s + z * jnp.tanh(a[2] + r * c[2])")
        w.line("    return s, s")
    else:
        w.line(f"    i, f, g, o = jnp.split(x @ {into} + s[0] @ {state} + {b}, 4, -1)")
        w.line("    c = jax.nn.sigmoid(f + 1) * s[1] + jax.nn.sigmoid(i) * jnp.tanh(g)")
        w.line("    return (jax.nn.sigmoid(o) * jnp.tanh(c), c), jax.nn.sigmoid(o) * jnp.tanh(c)")
    cell = "jax.checkpoint(cell)" if options["remat"] else "cell"
    w.line(f"s, h = jax.lax.scan({cell}, s, jnp.moveaxis(h, 1, 0), reverse={options['reverse']})")
    w.line("h = jnp.moveaxis(h, 0, 1)")
    w.shape = (*w.shape[:-1], width)
    if options["last"]:
        w.line(f"h = {'s[0]' if kind == 'lstm' else 's'}")
        w.shape = (w.shape[0], width)


def draw_recurrent(rng, w):
    flags = [bool(f) for f in rng.random(4) < 0.4]
    names = dict(zip(("start", "remat", "reverse", "last"), flags, strict=True))
    return {"kind": pick(rng, ["rnn", "gru", "lstm"]), "width": int(rng.integers(1, 4)), **names}


# --- statements with statements inside: write(writer, options, write_body, ...) ------------------


def _kept(w, before):
    w.need(w.shape == before)


def write_residual(w, options, body):
    before = w.shape
    with w.function() as (f, _):
        body()
    _kept(w, before)
    w.line(f"h = h + {f}(p, h)")


WRAPPERS = {
    "jit": "jax.jit({})",
    "checkpoint": "jax.checkpoint({})",
    "jit of checkpoint": "jax.jit(jax.checkpoint({}))",
    "checkpoint of jit": "jax.checkpoint(jax.jit({}))",
    "saving dots": "jax.checkpoint({}, policy=jax.checkpoint_policies.dots_saveable)",
    "named": 'jax.named_call({}, name="block")',
    "nested jit": "jax.jit(jax.jit({}))",
}


def write_wrapped(w, options, body):
    with w.function() as (f, _):
        body()
    w.line(f"h = {WRAPPERS[options['how']].format(f)}(p, h)")


def write_vmap(w, options, body):
    """Over examples, or over positions with the examples inside."""
    axis = options["axis"]
    w.need(axis < len(w.shape) - 1)
    before = w.shape
    with w.function(arguments="p, h") as (f, _), w.part():
        if axis == 0:
            w.line("h = h[None]")
            w.shape = (1, *before[1:])
            body()
            w.line("h = h[0]")
        else:
            w.shape = (*before[:axis], *before[axis + 1 :])
            body()
    inner = w.shape[1:] if axis == 0 else w.shape
    w.need(len(inner) >= axis)
    w.shape = (*inner[:axis], before[axis], *inner[axis:])
    w.line(f"h = jax.vmap({f}, (None, {axis}), {axis})(p, h)")


def write_twice(w, options, body):
    """The same weights more than once."""
    before = w.shape
    with w.function() as (f, _):
        body()
    _kept(w, before)
    if options["how"] == "calls":
        w.line(f"h = {f}(p, {f}(p, h))")
    elif options["how"] == "sum":
        w.line(f"h = {f}(p, h) + {f}(p, -h)")
    else:
        w.line(f"h = jax.lax.fori_loop(0, {options['count']}, lambda i, h: {f}(p, h), h)")


def _own(w, groups):
    return "{k: p[k] for k in " + repr(tuple(w.keys(groups))) + "}"


def write_scan(w, options, body):
    """A stack of layers, one after the other."""
    before = w.shape
    with w.function(arguments="h, p", returns="h, None") as (f, groups):
        with w.stacked(options["count"]):
            body()
    _kept(w, before)
    f = f"jax.checkpoint({f})" if options["remat"] else f
    w.line(f"h, _ = jax.lax.scan({f}, h, {_own(w, groups)}, length={options['count']})")


def write_ensemble(w, options, body):
    """Networks side by side on the same data, and their mean."""
    with w.function() as (f, groups):
        with w.stacked(options["count"]):
            body()
    w.need(w.keys(groups))
    mapped = f"jax.vmap({f}, (0, None))({_own(w, groups)}, h)"
    w.line(f"h = {mapped}.mean(0)" if options["mean"] else f"h = {mapped}[-1] - {mapped}[0]")


def write_map(w, options, body):
    """One position after the other."""
    before = w.shape
    with w.function(arguments="h") as (f, _), w.part():
        w.shape = (before[0], *before[2:])
        body()
    w.shape = (w.shape[0], before[1], *w.shape[1:])
    w.line(f"h = jnp.moveaxis(jax.lax.map({f}, jnp.moveaxis(h, 1, 0)), 0, 1)")


def write_cond(w, options, first, second):
    before = w.shape
    with w.function() as (f, _):
        first()
    after, w.shape = w.shape, before
    with w.function() as (g, _):
        second()
    _kept(w, after)
    on = {"data": "h.sum() > 0", "always": "True", "number": "jnp.sum(h) < jnp.inf"}[options["on"]]
    w.mixes_examples = w.mixes_examples or options["on"] == "data"
    w.need(w.whole)
    w.line(f"h = jax.lax.cond({on}, {f}, {g}, p, h)")


def _count(rng, w):
    return {"count": int(rng.integers(1, 4)), "remat": bool(rng.random() < 0.4)}


LEAVES = {
    "attention": Kind(rank(1), draw_attention, write_attention, 1.5, True),
    "recurrent": Kind(rank(1), draw_recurrent, write_recurrent, 1.5),
}
# What they hold, by whether it keeps the shape.
BLOCKS = {
    "residual": (Kind(always, nothing, write_residual, 1.5, True), (True,)),
    "wrapped": (
        Kind(always, lambda rng, w: {"how": pick(rng, WRAPPERS)}, write_wrapped, 2.0),
        (False,),
    ),
    "vmap": (
        Kind(
            lambda w: True,
            lambda rng, w: {"axis": int(rng.integers(0, len(w.shape) - 1))},
            write_vmap,
        ),
        (False,),
    ),
    "twice": (
        Kind(
            always,
            lambda rng, w: _count(rng, w) | {"how": pick(rng, ["calls", "sum", "fori"])},
            write_twice,
            1.5,
            True,
        ),
        (True,),
    ),
    "scan": (Kind(always, _count, write_scan, 1.5, True), (True,)),
    "ensemble": (
        Kind(
            always,
            lambda rng, w: _count(rng, w) | {"mean": bool(rng.random() < 0.7)},
            write_ensemble,
            0.8,
        ),
        (False,),
    ),
    "map": (Kind(rank(1, 2), nothing, write_map, 0.6), (False,)),
    "cond": (
        Kind(
            lambda w: w.whole,
            lambda rng, w: {"on": pick(rng, ["data", "always", "number"])},
            write_cond,
            0.8,
            True,
        ),
        (True, True),
    ),
}
