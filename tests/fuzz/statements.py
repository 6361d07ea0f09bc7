"""The statements without statements inside: layers, normalisations, attention, cells, poolings."""

from collections.abc import Callable
from typing import NamedTuple

from tests.fuzz.kernels import (
    ACTIVATIONS,
    BIASES,
    PRODUCTS,
    draw_activation,
    draw_bias,
    draw_kernel,
    kernel,
)
from tests.fuzz.programs import mostly, pick


class Kind(NamedTuple):
    """A kind of statement.

    Attributes:
      applies: whether it can be applied to what a writer has at hand.
      draw: (random generator, writer) to options.
      write: (writer, options) to lines, the shape at hand changed to that of the result.
      weight: how often it is drawn.
      keeps: whether the shape stays.
    """

    applies: Callable
    draw: Callable
    write: Callable
    weight: float = 1.0
    keeps: bool = False


def rank(*ranks):
    """For values with so many axes of positions."""
    return lambda w: len(w.positions) in ranks


def always(w):
    return True


def nothing(rng, w):
    return {}


def activated(text, name):
    return ACTIVATIONS[name].format(f"({text})")


# --- layers --------------------------------------------------------------------------------------


def draw_dense(rng, w, width=None):
    width = int(rng.integers(1, 6)) if width is None else width
    return {
        "width": width,
        "kernel": draw_kernel(rng, w.width, width),
        "product": mostly(rng, "x @ W", PRODUCTS, 0.6),
        "bias": draw_bias(rng),
        "activation": draw_activation(rng),
    }


def product(w, options, h="h"):
    """A layer's outputs as an expression."""
    own = kernel(w, options["kernel"], w.width, options["width"])
    found = PRODUCTS[options["product"]](own, h, len(w.shape))
    return BIASES[options["bias"]](w, found, options["width"])


def write_dense(w, options):
    w.line(f"h = {activated(product(w, options), options['activation'])}")
    w.shape = (*w.shape[:-1], options["width"])


def write_row_bias(w, options):
    """The bias is the last row of the kernel."""
    d, width = w.width, options["width"]
    w.line("h = jnp.concatenate([h, jnp.ones_like(h[..., :1])], -1)")
    w.line(f"h = jnp.tanh(h @ {w.param(d + 1, width)})")
    w.shape = (*w.shape[:-1], width)


def write_heads(w, options):
    heads, width = options["heads"], options["width"]
    own = w.param(w.width, heads, width)
    w.line(f'h = jnp.einsum("...i,ihk->...hk", h, {own})')
    if options["bias"]:
        w.line(f"h = h + {w.param(heads, width)}")
    w.line("h = jnp.tanh(h)")
    if options["back"]:
        w.line(f'h = jnp.einsum("...hk,hko->...o", h, {w.param(heads, width, w.width)})')
    else:
        w.line("h = h.reshape(*h.shape[:-2], -1)")
        w.shape = (*w.shape[:-1], heads * width)


def write_split(w, options):
    """One array, split before it is used."""
    d = w.width
    a, b = w.name("a"), w.name("b")
    w.line(f"{a}, {b} = jnp.split({w.param(d, 2 * d)}, 2, axis=1)")
    how = "h @ {a} * jax.nn.sigmoid(h @ {b})" if options["gate"] else "jnp.tanh(h @ {a}) @ {b}"
    w.line("h = " + how.format(a=a, b=b))


def write_sliced_stack(w, options):
    d = w.width
    own = w.param(options["count"], d, d)
    for i in range(options["count"]):
        w.line(f"h = jnp.tanh(h @ {own}[{i}])")


def write_flattened(w, options):
    """Positions and features together."""
    *positions, d = w.shape[1:]
    own = w.param(*positions, d, options["width"])
    if options["einsum"]:
        letters = "tuv"[: len(positions)]
        w.line(f'h = jnp.einsum("b{letters}i,{letters}io->bo", h, {own})')
    else:
        w.line(f"h = h.reshape(len(h), -1) @ {own}.reshape(-1, {options['width']})")
    w.line(f"h = jnp.tanh(h + {w.param(options['width'])})")
    w.shape = (w.shape[0], options["width"])


def write_experts(w, options):
    n, d, width = options["count"], w.width, options["width"]
    gate, own = w.param(d, n), w.param(n, d, width)
    w.line(f"g = jax.nn.softmax(h @ {gate})")
    if options["apart"]:
        w.line(f"e = jnp.einsum('...ni,nio->...no', g[..., None] * h[..., None, :], {own})")
        w.line("h = jnp.tanh(e).sum(-2)")
    else:
        w.line(f"e = jnp.einsum('...i,nio->...no', h, {own})")
        if options["bias"]:
            w.line(f"e = e + {w.param(n, width)}")
        w.line("h = jnp.einsum('...n,...no->...o', g, jnp.tanh(e))")
    w.shape = (*w.shape[:-1], width)


def draw_conv(rng, w):
    groups = 2 if w.width % 2 == 0 and rng.random() < 0.3 else 1
    return {
        "groups": groups,
        "width": groups * int(rng.integers(1, 4)),
        "window": tuple(int(i) for i in rng.integers(1, 4, len(w.positions))),
        "stride": int(rng.integers(1, 3)),
        "padding": pick(rng, ["SAME", "VALID", "CAUSAL"]),
        "dilation": int(rng.integers(1, 3)),
        "bias": bool(rng.random() < 0.6),
        "masked": bool(rng.random() < 0.2),
        "activation": draw_activation(rng),
    }


def write_conv(w, options):
    n = len(w.positions)
    window, stride, dilation = options["window"], options["stride"], options["dilation"]
    reach = [(k - 1) * dilation for k in window]
    padding = {
        "SAME": [(r // 2, r - r // 2) for r in reach],
        "VALID": [(0, 0)] * n,
        "CAUSAL": [(r, 0) for r in reach],
    }[options["padding"]]
    sizes = [
        (size + sum(pad) - r - 1) // stride + 1
        for size, pad, r in zip(w.positions, padding, reach, strict=True)
    ]
    w.need(all(size > 0 for size in sizes) and w.width % options["groups"] == 0)
    shape = (*window, w.width // options["groups"], options["width"])
    own = w.param(*shape)
    if options["masked"]:
        own = f"{own} * {w.constant(*shape, recipe='mask')}"
    space = "HW"[:n]
    w.line(
        f"h = jax.lax.conv_general_dilated(h, {own}, {(stride,) * n}, {padding}, "
        f'rhs_dilation={(dilation,) * n}, dimension_numbers=("N{space}C", "{space}IO", '
        f'"N{space}C"), feature_group_count={options["groups"]})'
    )
    bias = f"h + {w.param(options['width'])}" if options["bias"] else "h"
    w.line(f"h = {activated(bias, options['activation'])}")
    w.shape = (w.shape[0], *sizes, options["width"])


# --- entry by entry ------------------------------------------------------------------------------

SCALES = {
    "features": "h * {0}",
    "first": "{0} * h",
    "divided": "h / (1.5 + jnp.tanh({0}))",
    "exponential": "h * jnp.exp({0})",
    "one more": "h * (1 + {0})",
    "clipped by data": "h * {0} * jax.nn.sigmoid(h)",
}


def write_scale(w, options):
    own = {"features": (w.width,), "number": (), "all": w.shape[1:]}[options["of"]]
    w.line("h = " + SCALES[options["how"]].format(w.param(*own, scale=0.3, shift=1.0)))
    if options["bias"]:
        w.line(f"h = h + {w.param(w.width)}")


def draw_scale(rng, w):
    of = mostly(rng, "features", ["number", "all"], 0.4)
    bias = bool(rng.random() < 0.4)
    return {"of": of, "how": pick(rng, SCALES), "bias": bias}


def write_norm(w, options):
    axes = {"layer": "-1", "rms": "-1", "batch": "0"}[options["of"]]
    if options["of"] == "batch":
        w.need(w.whole and w.batch > 2)
        w.mixes_examples = True
    w.need(options["of"] != "layer" or w.width > 1)
    centred = "h" if options["of"] == "rms" else f"(h - h.mean({axes}, keepdims=True))"
    inverse = f"jax.lax.rsqrt((c**2).mean({axes}, keepdims=True) + 1e-1)"
    scale, bias = w.param(w.width, scale=0.3, shift=1.0), w.param(w.width)
    w.line(f"c = {centred}")
    w.line(f"c = c * ({inverse} * {scale})" if options["first"] else f"c = {scale} * c * {inverse}")
    w.line(f"h = c + {bias}" if options["bias"] else "h = c")


def draw_norm(rng, w):
    names = ["rms"] + ["layer"] * 2 * (w.width > 1) + ["batch"] * (w.whole and w.batch > 2)
    flags = rng.random(2) < 0.5
    return {"of": pick(rng, names), "first": bool(flags[0]), "bias": bool(flags[1])}


def write_activation(w, options):
    w.line(f"h = {ACTIVATIONS[options['activation']].format('h')}")


def write_positions(w, options):
    shape = (*w.positions, w.width)
    if options["lookup"]:
        w.line(f"h = h + {w.param(*shape)}[jnp.arange({shape[0]})]")
    else:
        w.line(f"h = h + {w.param(*shape)}")


def write_token(w, options):
    """A class token in front."""
    w.need(len(w.positions) == 1)
    w.line(f"t = jnp.broadcast_to({w.param(1, w.width)}, (len(h), 1, {w.width}))")
    w.line("h = jnp.concatenate([t, h], 1)")
    w.shape = (w.shape[0], w.shape[1] + 1, w.shape[2])


# --- no parameters -------------------------------------------------------------------------------


def write_numbers(w, options):
    own = w.constant(w.width)
    w.line(f"h = h {options['how']} {own}")


def write_data(w, options):
    w.need(w.whole)
    own = w.argument(*w.shape[: options["rank"]], recipe=options["recipe"])
    own += "[:, None]" * (len(w.shape) - options["rank"]) if options["rank"] == 1 else ""
    if options["rank"] == 1 and len(w.shape) > 2:
        own = own.replace("[:, None]", "") + f".reshape(-1{', 1' * (len(w.shape) - 1)})"
    w.line(f"h = h {options['how']} {own}")


def draw_data(rng, w):
    return {
        "how": pick(rng, "*+"),
        "recipe": pick(rng, ["mask", "normal"]),
        "rank": pick(rng, [1, len(w.shape)]),
    }


POOLS = {
    "mean": "h.mean({})",
    "sum": "h.sum({})",
    "max": "h.max({})",
    "first": "h[:, 0]",
    "last": "h[:, -1]",
    "flat": "h.reshape(len(h), -1)",
}


def write_pool(w, options):
    how, axes = options["how"], tuple(range(1, len(w.shape) - 1))
    w.line("h = " + POOLS[how].format(axes))
    if how in ("first", "last"):
        w.shape = (w.shape[0], *w.shape[2:])
    elif how == "flat":
        width = 1
        for n in w.shape[1:]:
            width *= n
        w.shape = (w.shape[0], width)
    else:
        w.shape = (w.shape[0], w.width)


def write_positions_of_features(w, options):
    w.line("h = h[..., None]")
    w.shape = (*w.shape, 1)


def write_stop(w, options):
    w.line("h = h + jax.lax.stop_gradient(h)")


def _width(rng, w):
    return {"width": int(rng.integers(1, 5))}


KINDS = {
    "dense": Kind(always, draw_dense, write_dense, 8.0),
    "bias as a row": Kind(always, _width, write_row_bias, 0.7),
    "heads": Kind(
        lambda w: len(w.shape) < 4,
        lambda rng, w: {
            "heads": int(rng.integers(1, 3)),
            "width": int(rng.integers(1, 4)),
            "bias": bool(rng.random() < 0.5),
            "back": bool(rng.random() < 0.7),
        },
        write_heads,
    ),
    "split": Kind(always, lambda rng, w: {"gate": bool(rng.random() < 0.5)}, write_split, 1, True),
    "sliced stack": Kind(
        always, lambda rng, w: {"count": int(rng.integers(1, 4))}, write_sliced_stack, 1, True
    ),
    "flattened": Kind(
        rank(1, 2),
        lambda rng, w: _width(rng, w) | {"einsum": bool(rng.random() < 0.5)},
        write_flattened,
    ),
    "experts": Kind(
        rank(0, 1),
        lambda rng, w: (
            _width(rng, w)
            | {
                "count": int(rng.integers(1, 4)),
                "apart": bool(rng.random() < 0.4),
                "bias": bool(rng.random() < 0.5),
            }
        ),
        write_experts,
    ),
    "conv": Kind(rank(1, 2), draw_conv, write_conv, 4.0),
    "scale": Kind(always, draw_scale, write_scale, 1.5, True),
    "norm": Kind(always, draw_norm, write_norm, 1.5, True),
    "activation": Kind(
        always, lambda rng, w: {"activation": draw_activation(rng)}, write_activation, 0.7, True
    ),
    "positions": Kind(
        rank(1), lambda rng, w: {"lookup": bool(rng.random() < 0.4)}, write_positions, 1, True
    ),
    "token": Kind(rank(1), nothing, write_token),
    "numbers": Kind(always, lambda rng, w: {"how": pick(rng, "*+")}, write_numbers, 0.5, True),
    "data": Kind(lambda w: w.whole, draw_data, write_data, 0.7, True),
    "pool": Kind(rank(1, 2), lambda rng, w: {"how": pick(rng, POOLS)}, write_pool),
    "features as positions": Kind(rank(0, 1), nothing, write_positions_of_features, 0.4),
    "stop": Kind(always, nothing, write_stop, 0.2, True),
}
