"""What the primitives of JAX do, as far as reading a loss takes it: tables of them."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.extend.core import primitives


def _primitives(*names: str) -> frozenset:
    """The primitives of these names that this JAX has; they are compared as objects ever after."""
    found = (getattr(primitives, f"{name}_p", None) for name in names)
    return frozenset(primitive for primitive in found if primitive is not None)


# Calls whose body is evaluated in place, and rematerialisation, which is rebuilt around its body.
CALLS = _primitives("jit", "pjit", "closed_call", "core_call")
REMAT = _primitives("remat")
SCAN = _primitives("scan")
COND = _primitives("cond")
CUSTOM = _primitives("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
STOP_GRADIENT = _primitives("stop_gradient")
DOT_GENERAL = _primitives("dot_general")
ADD = _primitives("add", "add_jaxvals")  # add_any, where derivatives meet
TRANSPOSE = _primitives("transpose")
SQUEEZE = _primitives("squeeze")
RESHAPE = SQUEEZE | _primitives("reshape")
BROADCAST = _primitives("broadcast_in_dim")
CAST = _primitives("convert_element_type", "reduce_precision")
SAME = _primitives("copy", "copy_p", "device_put", "name", "sharding_constraint")
MUL = _primitives("mul")
DIV = _primitives("div")
REDUCE_SUM = _primitives("reduce_sum")
REDUCE = REDUCE_SUM | _primitives("reduce_max", "reduce_min", "reduce_prod")
ABS, SUB, NEG = _primitives("abs"), _primitives("sub"), _primitives("neg")
REDUCE_OTHER = _primitives("argmax", "argmin", "reduce_and", "reduce_or", "reduce_xor")
SORT = _primitives("sort")
CUMSUM = _primitives("cumsum")
CUMULATIVE = CUMSUM | _primitives("cumprod", "cummax", "cummin", "cumlogsumexp")
DYNAMIC_SLICE = _primitives("dynamic_slice")
SLICE = DYNAMIC_SLICE | _primitives("slice")
UPDATE_SLICE = _primitives("dynamic_update_slice")
PAD = _primitives("pad")
REVERSE = _primitives("rev")
CONCATENATE = _primitives("concatenate")
GATHER = _primitives("gather")
SCATTER = _primitives("scatter", "scatter_add", "scatter_mul", "scatter_min", "scatter_max")
SELECT = _primitives("select_n")
CONVOLUTION = _primitives("conv_general_dilated")
# Linear but for kinks.
PIECEWISE = _primitives("abs", "max", "min", "clamp", "reduce_max", "reduce_min")
LOG, EXP = _primitives("log"), _primitives("exp")
SQUARE = _primitives("integer_pow", "square")
# Not exported by name.
SPLIT = frozenset(
    eqn.primitive
    for eqn in jax.make_jaxpr(lambda x: jax.lax.split(x, (1, 1)))(np.zeros(2, np.float32)).eqns
)
STACK = frozenset(  # made of others before JAX 0.11
    eqn.primitive
    for eqn in jax.make_jaxpr(lambda x: jax.numpy.stack([x, x]))(np.zeros(2, np.float32)).eqns
    if eqn.primitive not in BROADCAST | CONCATENATE | RESHAPE | CALLS
)


def order_read(eqn: Any) -> tuple[int, ...] | None:
    """The order of axes in which a reshape reads its operand; None for that of the operand.

    No NumPy function asks for another one, but `jax.vmap` of a convolution over kernels does.
    """
    is_plain = eqn.primitive in SQUEEZE  # whose parameter of this name is another
    return None if is_plain else eqn.params.get("dimensions")


# Equations through which a loss is a weighted sum of its terms.
SUMS = ADD | _primitives("sub", "neg", "reduce_sum") | RESHAPE | BROADCAST | CAST | SAME
_ENTRY_BY_ENTRY = """
abs acos acosh and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp copy cos cosh
digamma eq erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igamma_grad_a igammac integer_pow
is_finite le lgamma log log1p log2 logistic lt max min ne neg nextafter not one_minus_square or
polygamma pow rem round rsqrt select_n sign sin sinh sqrt square sub tan tanh xor zeta
"""
ELEMENTWISE = ADD | CAST | MUL | DIV | STOP_GRADIENT | _primitives(*_ENTRY_BY_ENTRY.split())
