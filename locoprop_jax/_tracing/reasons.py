"""Why a parameter is in no layer, each with what to do about it."""

from __future__ import annotations


class Reason(str):
    """Why capture does not understand a parameter's use.

    Attributes:
      remedy: how to write the model so that it does.
    """

    remedy: str

    def __new__(cls, what: str, remedy: str) -> Reason:
        reason = super().__new__(cls, what)
        reason.remedy = remedy
        return reason


# --- where it meets the data ---------------------------------------------------------------------

LOOP_START = Reason(
    "a loop starts from it, the same for all examples",
    "Broadcast it over the examples before the loop. A kernel that the loop trains on data, as in "
    "meta-learning, is in no layer: data have entered it.",
)

_IMPLICIT = (
    "Write its steps as a `scan`, or make a matrix of the parameters alone, such as "
    "`jnp.linalg.inv`, and multiply by that. Or broadcast the parameters over the examples first."
)
_REMEDIES = {
    "div": "Multiply by the reciprocal of the data.",
    "while": "Let it run a fixed number of times, as a `scan` or `fori_loop` does: JAX has no "
    "gradient of a `while_loop` either. With diffrax, pass `adjoint=diffrax.DirectAdjoint()`.",
    "custom_linear_solve": _IMPLICIT,
    "call_hi_primitive": _IMPLICIT,  # `custom_root` since JAX 0.11
    "custom_root": _IMPLICIT,
}


def changed(how: str, primitive: str) -> Reason:
    """It is something else by the time that it meets the data."""
    return Reason(
        f"`{how}` changes it, anew at each turn of a loop, before it meets the data in "
        f"`{primitive}`",
        "Change it before the loop, for all turns at once, and let the loop take slices of that.",
    )


def own_derivative(primitive: str) -> Reason:
    """A function with a rule that is not, or cannot be told to be, its true derivative."""
    return Reason(
        f"it is used inside a function with its own derivative (`{primitive}`), which is not that "
        "of its steps, or these have none",
        "Apply the layer outside of that function, and pass on what it makes. With diffrax, pass "
        "`adjoint=diffrax.DirectAdjoint()`; of another solver, write the steps as a `scan`.",
    )


def no_layer(primitive: str) -> Reason:
    """Capture does not know what this makes of data and a parameter."""
    return Reason(
        f"capture knows no layer that is a `{primitive}` of data and a parameter",
        _REMEDIES.get(
            primitive,
            "Broadcast it over the examples first, by `jnp.broadcast_to`: it is a layer of its own "
            "then.",
        ),
    )


# --- kinds of layers -----------------------------------------------------------------------------

MOVED_OVER = Reason(
    "it is what a convolution moves a kernel of data over",
    "Let it be the kernel: the convolution's second operand.",
)
BATCH_IN_GROUPS = Reason(
    "a convolution takes its batch in groups",
    "Use `feature_group_count`, or `jax.vmap` over the groups.",
)
NOT_ROWS = Reason(
    "capture knows no layer that takes more or less than rows of a table",
    "Take whole rows by one index each, as `table[ids]` does.",
)
PARTS_OF_ROWS = Reason(
    "capture knows no layer that takes parts of the rows of a table",
    "Take whole rows, as `table[ids]` does, then their parts.",
)

# --- the whole model -----------------------------------------------------------------------------

NO_GRADIENT = Reason("the loss does not depend on it (unused, or behind a stop_gradient)", "")
NEVER_MEETS_DATA = Reason(
    "it never meets the data: only a regularizer uses it",
    "Train it by another optimizer.",
)


def follows(name: str, why: Reason) -> Reason:
    """It makes one kernel, scale or bias with a parameter that is in no layer."""
    return Reason(f"it belongs to {name!r}, which is in no layer because {why}", why.remedy)


def used_differently(roles: list[str]) -> Reason:
    """Several uses, which do not make one layer."""
    return Reason(
        f"it is used {len(roles)} times ({', '.join(roles)}), not with the same shape, orientation "
        "and bias each time",
        "Use it in the same way at each place, or transposed, or a parameter of its own at each. A "
        "kernel that data change, as in meta-learning, is in no layer: data have entered it.",
    )
