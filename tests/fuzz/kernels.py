"""Kernels, biases and activations: the ways in which each can be written."""

from tests.fuzz.programs import mostly, pick

# --- kernels: an expression of shape (d_in, d_out) -----------------------------------------------


def _weight_norm(w, i, o):
    v, g = w.param(i, o), w.param(o)
    return f"({g} * {v} / jnp.linalg.norm({v}, axis=0))"


def _concatenated(w, i, o):
    w.need(o > 1)
    a, b = w.param(i, 1), w.param(i, o - 1)
    return f"jnp.concatenate([{a}, {b}], 1)"


def _square(formula):
    def kernel(w, i, o):
        w.need(i == o)
        return formula.format(w.param(i, o))

    return kernel


def _one(formula):
    return lambda w, i, o: formula.format(w.param(i, o))


def _masked(w, i, o):
    return f"({w.param(i, o)} * {w.constant(i, o, recipe='mask')})"


def _two(formula):
    return lambda w, i, o: formula.format(w.param(i, o), w.param(i, o))


KERNELS = {
    "plain": _one("{0}"),
    "transposed": lambda w, i, o: f"{w.param(o, i)}.T",
    "times a number": _one("(0.3 * {0})"),
    "flat": lambda w, i, o: f"{w.param(i * o)}.reshape({i}, {o})",
    "squeezed": lambda w, i, o: f"{w.param(1, i, o)}[0]",
    "part": lambda w, i, o: f"{w.param(i, o + 1)}[:, 1:]",
    "of a stack": lambda w, i, o: f"{w.param(3, i, o)}[1]",
    "flipped": _one("{0}[::-1, ::-1]"),
    "masked": _masked,
    "selected": lambda w, i, o: f"jnp.where({w.constant(i, o)} > 0, {w.param(i, o)}, 0)",
    "sum": _two("({0} + {1})"),
    "product": _two("({0} * {1})"),
    "low rank": lambda w, i, o: f"({w.param(i, 2)} @ {w.param(2, o)})",
    "residual low rank": lambda w, i, o: f"({w.param(i, o)} + {w.param(i, 1)} @ {w.param(1, o)})",
    "weight norm": _weight_norm,
    "outputs scaled": lambda w, i, o: f"({w.param(i, o)} * {w.param(o)})",
    "inputs scaled": lambda w, i, o: f"({w.param(i)}[:, None] * {w.param(i, o)})",
    "scaled": lambda w, i, o: f"(jnp.exp({w.param(scale=0.3)}) * {w.param(i, o)})",
    "normed": lambda w, i, o: f"(lambda v: v / jnp.sqrt(jnp.sum(v**2)))({w.param(i, o)})",
    "concatenated": _concatenated,
    "padded": lambda w, i, o: f"jnp.pad({w.param(i, o)}, ((0, 0), (1, 0)))[:, 1:]",
    "positive": _one("jax.nn.softplus({0})"),
    "softmax": _one("jax.nn.softmax({0}, axis=0)"),
    "triangular": _one("jnp.tril({0})"),
    "symmetric": _square("(lambda v: v + v.T)({0})"),
    "skew": _square("(lambda v: v - v.T)({0})"),
    "exponential": _square("(jnp.eye(len({0}), dtype=h.dtype) + {0} + {0} @ {0} / 2)"),
    "half frozen": _one("({0} + jax.lax.stop_gradient({0}))"),
    "broadcast": lambda w, i, o: f"jnp.broadcast_to({w.param(i)}[:, None], ({i}, {o}))",
    "outer": lambda w, i, o: f"jnp.outer({w.param(i)}, {w.param(o)})",
    "permuted": lambda w, i, o: f"{w.param(i, o)}[{w.constant(i, recipe='permutation')}]",
    "standardised": lambda w, i, o: f"(lambda v: v - v.mean(0))({w.param(i, o)})",
    "rolled": _one("jnp.roll({0}, 1, 0)"),
}
SQUARE = {"symmetric", "skew", "exponential"}


def draw_kernel(rng, i, o, probability=0.35):
    names = [n for n in KERNELS if (n not in SQUARE or i == o) and (n != "concatenated" or o > 1)]
    return mostly(rng, "plain", names, probability)


def kernel(w, name, i, o):
    return KERNELS[name](w, i, o)


# --- products of data with a kernel --------------------------------------------------------------


def _vmapped(k, h, ndim):
    function = f"lambda v: {k}.T @ v"
    for _ in range(ndim - 1):
        function = f"jax.vmap({function})"
    return f"{function}({h})"


PRODUCTS = {
    "x @ W": lambda k, h, ndim: f"{h} @ {k}",
    "einsum": lambda k, h, ndim: f'jnp.einsum("io,...i->...o", {k}, {h})',
    "dot_general": lambda k, h, ndim: (
        f"jax.lax.dot_general({h}, {k}, ((({ndim - 1},), (0,)), ((), ())))"
    ),
    "kernel first": lambda k, h, ndim: f"jnp.swapaxes({k}.T @ jnp.swapaxes({h}, -1, -2), -1, -2)",
    "tensordot": lambda k, h, ndim: f"jnp.tensordot({h}, {k}, 1)",
    "rows": lambda k, h, ndim: (
        f"({h}.reshape(-1, {h}.shape[-1]) @ {k}).reshape(*{h}.shape[:-1], -1)"
    ),
    "vmap": _vmapped,
    "features first": lambda k, h, ndim: (
        f'jnp.moveaxis(jnp.einsum("io,i...->o...", {k}, jnp.moveaxis({h}, -1, 0)), 0, -1)'
    ),
}


# --- biases --------------------------------------------------------------------------------------

BIASES = {
    "": lambda w, h, d: h,
    "added": lambda w, h, d: f"{h} + {w.param(d)}",
    "first": lambda w, h, d: f"{w.param(d)} + {h}",
    "subtracted": lambda w, h, d: f"{h} - {w.param(d)}",
    "two": lambda w, h, d: f"{h} + {w.param(d)} + {w.param(d)}",
    "one number": lambda w, h, d: f"{h} + {w.param()}",
    "one number apart": lambda w, h, d: f"{h} + {w.param(1)}",
    "times a number": lambda w, h, d: f"{h} + 0.1 * {w.param(d)}",
    "positive": lambda w, h, d: f"{h} + jnp.exp({w.param(d, scale=0.3)})",
    "flipped": lambda w, h, d: f"{h} + {w.param(d)}[::-1]",
    "positions": lambda w, h, d: f"{h} + {w.param(*w.positions, d)}",
    "broadcast": lambda w, h, d: f"(lambda a: a + jnp.broadcast_to({w.param(d)}, a.shape))({h})",
}


def draw_bias(rng):
    return pick(rng, BIASES, [6, 6] + [0.6] * (len(BIASES) - 2))


# --- activations ---------------------------------------------------------------------------------

ACTIVATIONS = {
    "": "{}",
    "tanh": "jnp.tanh({})",
    "relu": "jax.nn.relu({})",
    "silu": "jax.nn.silu({})",
    "softplus": "jax.nn.softplus({})",
    "gelu": "jax.nn.gelu({})",
    "sigmoid": "jax.nn.sigmoid({})",
    "leaky_relu": "jax.nn.leaky_relu({})",
    "elu": "jax.nn.elu({})",
    "sin": "jnp.sin({})",
    "own": "own({})",
    "own by vjp": "own_by_vjp({})",
    "jit": "jax.jit(jnp.tanh)({})",
    "softmax": "jax.nn.softmax({})",
    "maximum": "jnp.maximum({}, 0.1)",
    "clip": "jnp.clip({}, -1.0, 1.0)",
    "square": "0.1 * {} ** 2",
    "sum of two": "(lambda v: jnp.tanh(v) + 0.1 * v)({})",
}


def draw_activation(rng):
    return mostly(rng, "tanh", ACTIVATIONS, 0.7)
