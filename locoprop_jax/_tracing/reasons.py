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
    "Broadcast it over the examples before the loop.",
)


def changed(how: str, primitive: str) -> Reason:
    """It is something else by the time that it meets the data."""
    return Reason(
        f"`{how}` changes it before it meets the data in `{primitive}`",
        "Let it meet the data as it is, rearranged, in parts or times a number, and change "
        "the inputs or outputs instead. Running statistics are no parameters: pass them as an "
        "argument.",
    )


def own_derivative(primitive: str) -> Reason:
    return Reason(
        f"it is used inside a function with its own derivative (`{primitive}`)",
        "Apply the layer outside of that function, whose derivative would be lost otherwise.",
    )


def no_layer(primitive: str) -> Reason:
    """Capture does not know what this makes of data and a parameter."""
    remedies = {
        "sub": "Add its negative, or subtract the data from what is added to it.",
        "div": "Multiply by it.",
    }
    return Reason(
        f"capture knows no layer that is a `{primitive}` of data and a parameter",
        remedies.get(
            primitive,
            "Write it with matrix products, convolutions, look-ups, and products and sums entry by "
            "entry, in `jit`, `vmap`, `checkpoint` or `scan`.",
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
        "Use it in the same way at each place, or transposed, or a parameter of its own at each.",
    )
