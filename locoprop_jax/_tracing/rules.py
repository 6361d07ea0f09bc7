"""Functions with their own derivative (`custom_jvp`, `custom_vjp`) that parameters enter.

Many such rules save memory or rounding errors and have the function's own derivative: a fused
layer and its loss, say. Their layers can be read from the function, whose rows and cotangents are
those of the rule. Others have another derivative on purpose (rounding with a straight-through
estimator, clipped gradients): what X and E would be is not known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from locoprop_jax._tracing.jaxpr import (
    as_callable,
    closed_over_nothing,
    own_function,
    read_results,
    run_equation,
)

LARGEST = 10**8  # entries of operands; above this a rule is believed


def is_true_derivative(jaxpr: Any, eqn: Any, known: Sequence[Any]) -> bool:
    """Whether a rule gives the derivatives of the function that it belongs to.

    Both are computed at one random place, which tells rules apart that differ nearly everywhere. A
    function that JAX cannot differentiate itself has no derivative to compare.

    Args:
      jaxpr: that the equation stands in.
      eqn: the function's equation.
      known: the operands that are known when tracing, None for the others.
    """
    avals = [v.aval for v in eqn.invars]
    if sum(math.prod(aval.shape) for aval in avals) > LARGEST:
        return True
    body = as_callable(closed_over_nothing(own_function(eqn)))
    # What nobody reads is dropped.
    results = read_results(eqn)
    kept = [aval is not None and jnp.issubdtype(aval.dtype, np.inexact) for aval in results]
    rng = np.random.default_rng(0)
    with jax.ensure_compile_time_eval():
        operands = [
            _random(rng, aval) if value is None or isinstance(value, Tracer) else value
            for aval, value in zip(avals, known, strict=True)
        ]
        moved = [
            i for i, x in enumerate(operands) if jnp.issubdtype(jnp.result_type(x), np.inexact)
        ]

        def pulled(function: Any) -> tuple[Any, Any]:
            def of_moved(*values: Any) -> list[Any]:
                given = dict(zip(moved, values, strict=True))
                results = function([given.get(i, x) for i, x in enumerate(operands)])
                pairs = zip(results, kept, strict=True)
                return [x for x, is_kept in pairs if is_kept]

            values, pull = jax.vjp(of_moved, *(jnp.asarray(operands[i]) for i in moved))
            rng = np.random.default_rng(1)
            return values, pull([_random(rng, value) for value in values])

        try:
            rule = pulled(lambda x: run_equation(jaxpr, eqn, x))
            true = pulled(lambda x: body(*x))
        except Exception:  # one of them has no derivative, or the rule does not take these numbers
            return False
    pairs = zip(jax.tree.leaves(rule), jax.tree.leaves(true), strict=True)
    return all(_are_close(one, other) for one, other in pairs)


def _random(rng: np.random.Generator, aval: Any) -> Any:
    """Numbers around 1 of either sign; counts are zero, and flags true."""
    if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0, impl=jax.random.key_impl(aval)), aval.shape)
    if jnp.issubdtype(aval.dtype, np.inexact):
        return jnp.asarray(rng.normal(size=aval.shape), aval.dtype)
    return jnp.ones(aval.shape, aval.dtype) if aval.dtype == bool else jnp.zeros_like(aval)


def _are_close(one: Any, other: Any) -> bool:
    if one.dtype == jax.dtypes.float0:
        return True
    tolerance = 10 * math.sqrt(float(jnp.finfo(one.dtype).eps))
    one, other = (np.asarray(x, np.complex128) for x in (one, other))
    known = np.isfinite(other)  # a logarithm of a negative number is not
    if (other.size and not known.any()) or np.any(known != np.isfinite(one)):
        return False
    largest = np.abs(other[known]).max(initial=0)
    return bool(np.all(np.abs(one - other)[known] <= tolerance * largest))
