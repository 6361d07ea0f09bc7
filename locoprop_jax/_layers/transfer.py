"""Transfer functions, their convex integrals and matching losses.

A layer's transfer function f is what the network applies to each of its pre-activations. Capture
finds it in the model (`find_layers`), as a piece of the traced computation; this file gives such a
piece a name, tells whether it is monotone, and holds the functions of LocoProp's Table 2 with
their convex integrals F (f = F').
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.special
import numpy as np
from jaxtyping import Array, Float

from locoprop_jax._tracing import jaxpr
from locoprop_jax._trees import is_complex

Elementwise = Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class Transfer:
    """An elementwise function applied to a layer's pre-activations.

    Attributes:
      name: what the field calls it, "custom" for a function that Table 2 and `jax.nn` lack.
      function: the function, of arrays of any shape.
      note: why it is what it is, for the reader of the layer table.
      given: whether the user said so, rather than the model.
      is_elementwise: False for a function of whole rows, which only a user can give (softmax).
    """

    name: str
    function: Elementwise = dataclasses.field(repr=False)
    note: str = dataclasses.field(default="", compare=False)
    given: bool = False
    is_elementwise: bool = True

    def __call__(self, a: Float[Array, ...]) -> Float[Array, ...]:
        return self.function(a)

    @property
    def is_identity(self) -> bool:
        return self.name == "identity"

    def derivative(self, a: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """f'(a); at a kink what autodiff makes of it.

        Raises:
          ValueError: for a function of whole rows, whose Jacobian is not diagonal.
        """
        if not self.is_elementwise:
            raise ValueError(f"The transfer function {self.name!r} has no derivative by entries.")
        # In reverse: a function may have a derivative of its own that has no forward mode.
        return jax.vjp(self.function, a)[1](jnp.ones_like(a))[0]

    def is_monotone(self) -> bool:
        """Whether the function is non-decreasing, checked on a grid over [-1e4, 1e4].

        For a function of rows: whether it is the gradient of a convex function, so that its
        Jacobian is symmetric and positive semi-definite, checked at some rows. Functions with
        complex values are not: they have no order.
        """
        if not self.is_elementwise:
            return _is_convex_gradient(self.function)
        values = _evaluate(self.function, _GRID)
        if np.iscomplexobj(values):
            return False
        values = values[np.isfinite(values)]  # far out some formulas overflow
        slack = 1e-6 * np.maximum(1.0, np.abs(values[:-1]))
        return bool(np.all(np.diff(values) >= -slack))


class TracedPiece:
    """An elementwise function cut out of a traced computation, for arrays of any shape.

    A jaxpr is typed for one shape and dtype, so other shapes are cut into pieces of its size.
    Compared by the text of its equations without the shapes, which is the same for every batch
    size, and by its constants.
    """

    def __init__(self, closed: Any, shape: tuple[int, ...], dtype: Any):
        self.closed, self.shape, self.dtype = closed, shape, dtype

    @cached_property
    def _key(self) -> tuple:
        text = re.sub(r"\[[\d,]*\]", "[]", str(self.closed))
        return text, tuple(np.asarray(c).tobytes() for c in getattr(self.closed, "consts", ()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TracedPiece) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __call__(self, a: Float[Array, ...]) -> Float[Array, ...]:
        run = jaxpr.as_callable(self.closed)
        size = math.prod(self.shape)
        flat = jnp.ravel(a).astype(self.dtype)
        chunks = jnp.pad(flat, (0, -flat.size % size)).reshape(-1, *self.shape)
        result = run(chunks[0])[0] if len(chunks) == 1 else jax.vmap(lambda x: run(x)[0])(chunks)
        result = jnp.ravel(result)[: a.size].reshape(a.shape)
        # From real to complex numbers or back it is the piece that decides.
        is_of_kind = is_complex(result.dtype) == is_complex(a.dtype)
        return result.astype(a.dtype) if is_of_kind else result


# --- Table 2 -------------------------------------------------------------------------------------


class TransferFunction(NamedTuple):
    """A transfer function of LocoProp's Table 2 with its convex integral.

    Attributes:
      name: of the row.
      function: f, non-decreasing.
      integral: F with gradient f, elementwise; for softmax F of each row, shape (...,).
      entropy: the divergence by a formula of its own, where that of `divergence` would not do.
    """

    name: str
    function: Elementwise
    integral: Elementwise
    entropy: Callable[[Array, Array], Array] | None = None

    def derivative(self, a: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """f'(a); at a kink one of the one-sided derivatives.

        Raises:
          ValueError: for step, whose derivative is zero or undefined, and for softmax, whose
            Jacobian is not diagonal (`jax.vjp` applies it).
        """
        if self.name in ("step", "softmax"):
            raise ValueError(f"The transfer function {self.name!r} has no derivative by entries.")
        return jax.jvp(self.function, (a,), (jnp.ones_like(a),))[1]

    def divergence(
        self, a: Float[Array, "*shape"], target: Float[Array, "*shape"]
    ) -> Float[Array, "*shape"]:
        """Bregman divergence D_F(a, target) by entries: see `matching_loss`."""
        if self.entropy is not None:
            return self.entropy(a, target)
        tangent = self.function(target) * (a - target)
        return self.integral(a) - self.integral(target) - tangent


def step(a: Float[Array, ...]) -> Float[Array, ...]:
    """1/2 (1 + sign(a))."""
    return (1 + jnp.sign(a)) / 2


def softmax(a: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """Of each row."""
    return jax.nn.softmax(a, -1)


def _relative_entropy(a: Float[Array, "... d"], target: Float[Array, "... d"]) -> Array:
    """KL(softmax(target) | softmax(a)), by entries that are not negative and sum to it."""
    log_a, log_target = jax.nn.log_softmax(a, -1), jax.nn.log_softmax(target, -1)
    p, q = jnp.exp(log_target), jnp.exp(log_a)
    return p * (log_target - log_a) - p + q


def log_cosh(a: Float[Array, ...]) -> Float[Array, ...]:
    """Log cosh(a), without overflow."""
    return jnp.abs(a) + jnp.log1p(jnp.exp(-2 * jnp.abs(a))) - math.log(2)


@jax.custom_jvp
def _softplus_integral(a: Float[Array, "..."]) -> Float[Array, "..."]:
    """-Li2(-exp a); reflected for a > 0, where the exponential would overflow."""
    power = jnp.exp(-jnp.abs(a))
    small = -jnp.minimum(power, 0.25)  # by its series, where 1 + power would round power away
    series = jnp.zeros_like(small)
    for k in range(25, 0, -1):
        series = small * (series + 1 / k**2)
    dilogarithm = jnp.where(power < 0.25, series, jax.scipy.special.spence(1 + power))
    return jnp.where(a > 0, a**2 / 2 + math.pi**2 / 6 + dilogarithm, -dilogarithm)


# By definition; the derivative of spence is NaN where the exponential vanishes.
_softplus_integral.defjvps(lambda tangent, _, a: jax.nn.softplus(a) * tangent)


def leaky_relu(slope: float = 0.01) -> TransferFunction:
    """max(a, 0) - slope max(-a, 0), for any slope from 0 (ReLU)."""
    return TransferFunction(
        "leaky_relu",
        lambda a: jax.nn.leaky_relu(a, slope),
        lambda a: jnp.where(a > 0, a**2, slope * a**2) / 2,
    )


def elu(scale: float = 1.0) -> TransferFunction:
    """A for a > 0, scale (exp(a) - 1) below, for any scale from 0."""

    def integral(a: Float[Array, ...]) -> Float[Array, ...]:
        below = jnp.minimum(a, 0)
        return jnp.where(a > 0, a**2 / 2, scale * (jnp.expm1(below) - below))

    return TransferFunction("elu", lambda a: jax.nn.elu(a, scale), integral)


# LocoProp, Table 2.
TABLE_2 = {
    row.name: row
    for row in (
        TransferFunction("step", step, lambda a: jnp.maximum(a, 0)),
        TransferFunction("identity", lambda a: a, lambda a: a**2 / 2),
        TransferFunction("relu", jax.nn.relu, lambda a: jnp.maximum(a, 0) ** 2 / 2),
        leaky_relu(),
        TransferFunction("sigmoid", jax.nn.sigmoid, jax.nn.softplus),
        TransferFunction("softmax", softmax, lambda a: jax.nn.logsumexp(a, -1), _relative_entropy),
        TransferFunction("tanh", jnp.tanh, log_cosh),
        TransferFunction("arctan", jnp.arctan, lambda a: a * jnp.arctan(a) - jnp.log1p(a**2) / 2),
        TransferFunction("softplus", jax.nn.softplus, _softplus_integral),
        elu(),
    )
}

# Known by name only, so that tables and errors can say it.
_OTHERS: dict[str, Elementwise] = {
    "gelu": jax.nn.gelu,
    "gelu (exact)": lambda a: jax.nn.gelu(a, approximate=False),
    "silu": jax.nn.silu,
    "relu6": jax.nn.relu6,
    "selu": jax.nn.selu,
    "hard_tanh": jax.nn.hard_tanh,
    "soft_sign": jax.nn.soft_sign,
    "log_sigmoid": jax.nn.log_sigmoid,
    "sin": jnp.sin,
    "mish": lambda a: a * jnp.tanh(jax.nn.softplus(a)),
    "squared_relu": lambda a: jnp.square(jax.nn.relu(a)),
}

_KNOWN = {name: row.function for name, row in TABLE_2.items() if name != "softmax"} | _OTHERS


def matching_loss(
    transfer: str | TransferFunction,
    a: Float[Array, "*shape"],
    target: Float[Array, "*shape"],
) -> Float[Array, "*shape"]:
    """Matching loss of a transfer function, by entries (LocoProp, eqs. 1 and 5, Table 2).

    The Bregman divergence D_F(a, target) = F(a) - F(target) - f(target)' (a - target) of the
    function's convex integral F: convex in `a`, never negative, with gradient f(a) - f(target).

    Args:
      transfer: a name of Table 2 ("step", "identity", "relu", "leaky_relu", "sigmoid", "softmax",
        "tanh", "arctan", "softplus", "elu") or a `TransferFunction`.
      a: pre-activations; softmax takes the last axis for a row.
      target: target pre-activations.

    Returns:
      The loss of each entry; sum it over a row for the loss of a layer's output.

    Raises:
      ValueError: for a name that Table 2 lacks.
    """
    if isinstance(transfer, str):
        if transfer not in TABLE_2:
            raise ValueError(
                f"`matching_loss` knows the transfer functions {', '.join(TABLE_2)}; "
                f"got {transfer!r}."
            )
        transfer = TABLE_2[transfer]
    return transfer.divergence(a, target)


# --- naming --------------------------------------------------------------------------------------

_TAIL = np.geomspace(6.0, 1e4, 40)[1:]
_GRID = np.concatenate([-_TAIL[::-1], np.linspace(-6.0, 6.0, 241), _TAIL])
# A strip around the real axis, between the poles of tanh: there no known function overflows.
_STRIP = np.linspace(-6.0, 6.0, 241) + 1j * np.sin(np.arange(241))


def _grid(dtype: Any) -> np.ndarray:
    """Where functions of such numbers are compared."""
    return _STRIP if is_complex(dtype) else _GRID


def _evaluate(function: Elementwise, grid: np.ndarray) -> np.ndarray:
    """Values on a grid, also when called inside a trace."""
    with jax.ensure_compile_time_eval(), jax.numpy_dtype_promotion("standard"):
        return _doubled(jax.jit(function)(jnp.asarray(grid)))


def _doubled(values: Array) -> np.ndarray:
    return np.asarray(values, np.complex128 if is_complex(values.dtype) else np.float64)


@functools.cache
def _known(dtype: Any) -> dict[str, Elementwise]:
    """The known functions that take numbers of a dtype, and return such."""
    scalar, found = jax.ShapeDtypeStruct((), dtype), {}
    for name, function in _KNOWN.items():
        try:
            with jax.numpy_dtype_promotion("standard"):
                result = jax.eval_shape(function, scalar)
        except (TypeError, ValueError):  # JAX has no such function of these numbers
            continue
        if result.dtype == scalar.dtype:
            found[name] = function
    return found


@functools.cache
def _known_values(dtype: Any) -> dict[str, np.ndarray]:
    """The known functions on the grid of a dtype, compiled together."""
    known, grid = _known(dtype), jnp.asarray(_grid(dtype), dtype)
    with jax.ensure_compile_time_eval(), jax.numpy_dtype_promotion("standard"):
        values = jax.jit(lambda a: {name: f(a) for name, f in known.items()})(grid)
        return {name: _doubled(value) for name, value in values.items()}


def recognise(function: Elementwise, dtype: Any, note: str = "") -> Transfer:
    """Name a function by its program or its values, to the precision it was traced in.

    A known function replaces the piece it was recognised from: it takes any shape and computes in
    its argument's dtype, where the piece of a bfloat16 model would round to bfloat16.
    """
    widest = jnp.result_type(complex if is_complex(dtype) else float)
    if isinstance(function, TracedPiece):  # the layers of a network apply few functions
        name = _known_pieces(dtype).get(function) or _name_once(function, dtype, widest)
    else:
        name = _name_by_values(function, dtype, widest)
    return Transfer(name, _KNOWN.get(name, function), note)


@functools.cache
def _known_pieces(dtype: Any) -> dict[Elementwise, str]:
    """The names of known functions, as they are traced: nothing has to be compiled for these."""
    scalar = jax.ShapeDtypeStruct((), dtype)
    with jax.numpy_dtype_promotion("standard"):
        traced = {name: jax.make_jaxpr(f)(scalar) for name, f in _known(dtype).items()}
    return {TracedPiece(closed, (), dtype): name for name, closed in traced.items()}


def _name_by_values(function: Elementwise, dtype: Any, widest: Any) -> str:
    values = _evaluate(function, _grid(dtype))
    if np.iscomplexobj(values) != is_complex(dtype):  # a modulus, or a phase
        return "custom"
    errors = {
        name: float(np.max(np.abs(values - expected) / np.maximum(1.0, np.abs(expected))))
        for name, expected in _known_values(widest).items()
    }
    best = min(errors, key=lambda name: errors[name])
    return best if errors[best] <= 8 * float(jnp.finfo(dtype).eps) else "custom"


_name_once = functools.lru_cache(maxsize=256)(_name_by_values)


def _is_convex_gradient(function: Elementwise) -> bool:
    points = np.random.default_rng(0).normal(size=(8, 5)) * 3
    with jax.ensure_compile_time_eval(), jax.numpy_dtype_promotion("standard"):
        jacobians = np.asarray(jax.vmap(jax.jacobian(function))(jnp.asarray(points)), np.float64)
    asymmetry = np.abs(jacobians - jacobians.transpose(0, 2, 1)).max()
    return bool(asymmetry < 1e-5 and np.linalg.eigvalsh(jacobians).min() > -1e-5)


def identity(note: str = "") -> Transfer:
    """No transfer function, and why."""
    return Transfer("identity", _KNOWN["identity"], note)


def given(function: Elementwise) -> Transfer:
    """A transfer function that the user gives in place of the one found: elementwise or of rows."""
    rows = _GRID[:240].reshape(-1, 4)
    values, alone = _evaluate(function, rows), _evaluate(function, rows.reshape(-1, 1))
    if not np.allclose(values, alone.reshape(rows.shape), rtol=1e-5, atol=1e-6):
        is_softmax = np.allclose(values, _evaluate(softmax, rows), rtol=1e-5, atol=1e-6)
        name, function = ("softmax", softmax) if is_softmax else ("custom", function)
        return Transfer(name, function, "given", given=True, is_elementwise=False)
    found = recognise(function, jnp.float32)
    return dataclasses.replace(found, function=function, note="given", given=True)
