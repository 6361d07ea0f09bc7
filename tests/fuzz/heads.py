"""What the loss makes of the network: output layers, losses of their outputs, embeddings."""

from tests.fuzz.kernels import draw_kernel
from tests.fuzz.programs import mostly, pick
from tests.fuzz.statements import product

# --- embeddings: what turns words into numbers ---------------------------------------------------

LOOKUPS = {
    "take": "{table}[x]",
    "jnp.take": "jnp.take({table}, x, axis=0)",
    "one-hot": "jax.nn.one_hot(x, {words}, dtype={table}.dtype) @ {table}",
    "transposed": "{table}.T[x]",
    "vmap": "{map}(x)",
}


def draw_embedding(rng, w):
    return {"how": pick(rng, LOOKUPS), "width": int(rng.integers(1, 5))}


def write_embedding(w, options):
    width = options["width"]
    shape = (width, w.words) if options["how"] == "transposed" else (w.words, width)
    table = w.param(*shape)
    function = f"lambda i: {table}[i]"
    for _ in w.shape:
        function = f"jax.vmap({function})"
    text = LOOKUPS[options["how"]].format(table=table, words=w.words, map=f"({function})")
    w.line(f"h = {text}")
    w.shape = (*w.shape, width)
    return table


# --- losses --------------------------------------------------------------------------------------

# One loss for each row of outputs z; the targets' recipe.
LOSSES = {
    "squared": ("((z - y) ** 2).sum(-1)", "normal"),
    "l2": ("optax.l2_loss(z, y).sum(-1)", "normal"),
    "marked squared": ("lp.losses.squared_error(z, y).sum(-1)", "normal"),
    "huber": ("optax.huber_loss(z, y).sum(-1)", "normal"),
    "sigmoid": ("optax.sigmoid_binary_cross_entropy(z, y).sum(-1)", "fraction"),
    "softmax": ("optax.softmax_cross_entropy(z, y)", "distribution"),
    "marked softmax": ("lp.losses.softmax_cross_entropy(z, y)", "distribution"),
    "log softmax": ("-(jax.nn.log_softmax(z) * y).sum(-1)", "distribution"),
    "integers": ("optax.softmax_cross_entropy_with_integer_labels(z, y)", "label"),
    "picked": (
        "-jnp.take_along_axis(jax.nn.log_softmax(z), y[..., None], -1)[..., 0]",
        "label",
    ),
    "poisson": ("(jnp.exp(0.3 * z) - z * y).sum(-1)", "fraction"),
    "log cosh": ("jnp.logaddexp(z - y, y - z).sum(-1)", "normal"),
}
REDUCTIONS = {
    "mean": "l.mean()",
    "sum": "l.sum()",
    "weighted": "(l * m).sum() / m.sum()",
    "masked": "jnp.where(m > 0.5, l, 0.0).mean()",
    "vmap": "l.reshape(len(l), -1).sum(-1).mean()",
    "scaled": "0.5 * l.mean()",
}


def draw_head(rng, w, tied):
    width = int(rng.integers(1, 4))
    options = {
        "loss": pick(rng, LOSSES),
        "reduction": mostly(rng, "mean", REDUCTIONS, 0.6),
        "closed": bool(rng.random() < 0.2),
        "width": width,
        "kernel": draw_kernel(rng, w.width, width, 0.15),
        "product": "x @ W",
        "bias": pick(rng, ["", "added"]),
    }
    if tied and rng.random() < 0.8:
        options |= {"kernel": "tied", "width": w.words, "bias": ""}
    elif rng.random() < 0.15:
        options |= {"kernel": "none", "width": w.width}
    return options


def write_head(w, options, table):
    """The outputs of a head; the lines of its loss, to be written later."""
    z, width = w.name("z"), options["width"]
    if options["kernel"] == "none":
        w.need(width == w.width)
        w.line(f"{z} = h")
    elif options["kernel"] == "tied":
        name, size = table or ("", None)
        w.need(name and w.width == size and width == w.words)
        w.line(f"{z} = h @ {name}.T")
    else:
        w.line(f"{z} = {product(w, options)}")
    w.zs.append(z)
    return [*write_loss(w, options, z, (*w.shape[:-1], width))]


def write_loss(w, options, z, shape):
    text, recipe = LOSSES[options["loss"]]
    own = shape[:-1] if recipe == "label" else shape
    recipe = f"label {shape[-1]}" if recipe == "label" else recipe
    y = (w.constant if options["closed"] else w.argument)(*own, recipe=recipe)
    yield f"z, y = {z}, {y}"
    if options["reduction"] in ("weighted", "masked"):
        yield f"m = {w.argument(*shape[:-1], recipe='positive')}"
    yield f"l = {text}"
    yield f"loss = loss + {REDUCTIONS[options['reduction']]}"


# --- derivatives of the network by its inputs ----------------------------------------------------

DERIVATIVES = {
    "laplacian": (
        "jax.vmap(lambda v: jnp.trace(jax.hessian(lambda v: net(p, v[None])[0].sum())(v)))(x)"
        "[:, None]"
    ),
    "gradient": "jax.grad(lambda x: net(p, x)[0].sum())(x)",
    "gradient of each": "jax.vmap(jax.grad(lambda v: net(p, v[None])[0].sum()))(x)",
    "jvp": "jax.jvp(lambda x: net(p, x)[0], (x,), (jnp.ones_like(x),))[1]",
    "jacobian": ("jax.vmap(jax.jacfwd(lambda v: net(p, v[None])[0][0]))(x).reshape(len(x), -1)"),
}


def derivative_shape(name, x, z):
    """Of the derivative, for inputs and outputs of these shapes."""
    return {
        "laplacian": (x[0], 1),
        "gradient": x,
        "gradient of each": x,
        "jvp": z,
        "jacobian": (x[0], x[1] * z[1]) if len(z) == 2 else None,
    }[name]


# --- regularizers --------------------------------------------------------------------------------

DECAYS = {
    "l2": "0.05 * sum(jnp.sum(v**2) for v in jax.tree.leaves(p))",
    "half l2": "0.5 * 0.1 * optax.tree.norm(p, squared=True)",
    "norm": "0.01 * optax.tree.norm(p)",
    "l1": "0.01 * sum(jnp.sum(jnp.abs(v)) for v in jax.tree.leaves(p))",
    "mean": "0.01 * sum(jnp.mean(v**2) for v in jax.tree.leaves(p)[:1])",
}
