"""Traced functions run by NumPy: a tiny program takes a millisecond, and a second to compile.

`run` traces a function and evaluates its equations one by one. What NumPy does alike is in the
tables below; every other primitive is left to JAX.
"""

import functools
import math
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import scipy.special

from locoprop_jax._tracing.jaxpr import scan_of
from tests.fuzz import indexing

# --- primitives ----------------------------------------------------------------------------------


def _float32(x):
    """What a product or a sum of numbers of few bits is made in."""
    return x.astype(np.float32) if x.dtype.itemsize == 2 and x.dtype.kind != "i" else x


def _integer_pow(x, y, **_):
    return x**y if y >= 0 else 1 / x**-y


def _div(x, y):
    return np.trunc(x / y).astype(x.dtype) if x.dtype.kind in "iu" else x / y


def _select(which, *cases):
    if len(cases) == 2 and which.dtype == bool:
        return np.where(which, cases[1], cases[0])
    return np.choose(which.astype(int), cases)


def _broadcast_in_dim(x, shape, broadcast_dimensions, **_):
    own = [1] * len(shape)
    for size, axis in zip(x.shape, broadcast_dimensions, strict=True):
        own[axis] = size
    return np.broadcast_to(x.reshape(own), shape)


def _dot_general(x, y, dimension_numbers, preferred_element_type=None, **_):
    (cx, cy), (bx, by) = dimension_numbers
    fx = [i for i in range(x.ndim) if i not in (*cx, *bx)]
    fy = [i for i in range(y.ndim) if i not in (*cy, *by)]
    shape = [x.shape[i] for i in (*bx, *fx)] + [y.shape[i] for i in fy]
    batch, inner = [x.shape[i] for i in bx], math.prod(x.shape[i] for i in cx)
    a = _float32(x).transpose(*bx, *fx, *cx).reshape(*batch, -1, inner)
    b = _float32(y).transpose(*by, *cy, *fy).reshape(*batch, inner, -1)
    return (a @ b).reshape(shape)


def _reshape(x, new_sizes, dimensions, **_):
    return (x if dimensions is None else x.transpose(dimensions)).reshape(new_sizes)


def _slice(x, start_indices, limit_indices, strides, **_):
    strides = strides or (1,) * x.ndim
    bounds = zip(start_indices, limit_indices, strides, strict=True)
    return x[tuple(slice(*bound) for bound in bounds)]


def _starts(x, sizes, starts):
    bounds = zip(starts, x.shape, sizes, strict=True)
    return tuple(slice(s := int(np.clip(i, 0, n - k)), s + k) for i, n, k in bounds)


def _dynamic_slice(x, *starts, slice_sizes, **_):
    return x[_starts(x, slice_sizes, starts)]


def _dynamic_update_slice(x, update, *starts, **_):
    x = np.array(x)
    x[_starts(x, update.shape, starts)] = update
    return x


def _pad(x, value, padding_config, **_):
    places, crops, shape = [], [], []
    for n, (low, high, gap) in zip(x.shape, padding_config, strict=True):
        start, end = max(low, 0), max(high, 0)
        size = start + n + max(n - 1, 0) * gap + end
        places.append(slice(start, start + (n - 1) * (gap + 1) + 1, gap + 1) if n else slice(0))
        crops.append(slice(start - low, size - (end - high)))
        shape.append(size)
    result = np.full(shape, value, x.dtype)
    result[tuple(places)] = x
    return result[tuple(crops)]


def _split(x, sizes, axis, **_):
    return np.split(x, np.cumsum(sizes)[:-1], axis)


def _sum(x, axes, **_):
    return _float32(x).sum(tuple(axes))


def _cumulative(function):
    def run(x, axis, reverse, **_):
        x = np.flip(x, axis) if reverse else x
        x = function(x, axis=axis)
        return np.flip(x, axis) if reverse else x

    return run


def _argument(function):
    return lambda x, axes, index_dtype, **_: function(x, axis=axes[0]).astype(index_dtype)


def _iota(*_, dtype, shape, dimension, **__):
    own = [1] * len(shape)
    own[dimension] = shape[dimension]
    return np.broadcast_to(np.arange(shape[dimension], dtype=dtype).reshape(own), shape)


def _plain(function):
    return lambda *args, **_: function(*args)


def _over_axes(function):
    return lambda x, axes, **_: function(x, axis=tuple(axes))


RULES = {
    **{
        name: _plain(function)
        for name, function in {
            "abs": np.abs,
            "add": np.add,
            "add_any": np.add,
            "and": np.bitwise_and,
            "ceil": np.ceil,
            "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
            "copy": np.array,
            "copy_p": np.array,
            "cos": np.cos,
            "cosh": np.cosh,
            "div": _div,
            "device_put": lambda *args: list(args),
            "empty2": lambda: 0.0,
            "eq": np.equal,
            "erf": lambda x: scipy.special.erf(_float32(x)),
            "exp": np.exp,
            "exp2": np.exp2,
            "expm1": np.expm1,
            "floor": np.floor,
            "ge": np.greater_equal,
            "gt": np.greater,
            "is_finite": np.isfinite,
            "le": np.less_equal,
            "log": np.log,
            "log1p": np.log1p,
            "logistic": lambda x: 1 / (1 + np.exp(-x)),
            "lt": np.less,
            "max": np.maximum,
            "min": np.minimum,
            "mul": np.multiply,
            "ne": np.not_equal,
            "neg": np.negative,
            "not": np.invert,
            "one_minus_square": lambda x: 1 - np.square(x),
            "optimization_barrier": lambda *args: list(args),
            "or": np.bitwise_or,
            "pow": np.power,
            "rem": np.fmod,
            "rsqrt": lambda x: 1 / np.sqrt(x),
            "select_n": _select,
            "sign": np.sign,
            "sin": np.sin,
            "sinh": np.sinh,
            "sqrt": np.sqrt,
            "square": np.square,
            "stop_gradient": np.array,
            "sub": np.subtract,
            "tan": np.tan,
            "tanh": np.tanh,
            "xor": np.bitwise_xor,
        }.items()
    },
    "argmax": _argument(np.argmax),
    "argmin": _argument(np.argmin),
    "broadcast_in_dim": _broadcast_in_dim,
    "cholesky": indexing.cholesky,
    "concatenate": lambda *xs, dimension: np.concatenate(xs, dimension),
    "conv_general_dilated": indexing.convolution,
    "convert_element_type": lambda x, new_dtype, **_: x.astype(new_dtype),
    "cumlogsumexp": _cumulative(np.logaddexp.accumulate),
    "cummax": _cumulative(np.maximum.accumulate),
    "cummin": _cumulative(np.minimum.accumulate),
    "cumprod": _cumulative(np.multiply.accumulate),
    "cumsum": _cumulative(np.add.accumulate),
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "expand_dims": lambda x, dimensions: np.expand_dims(x, dimensions),
    "gather": indexing.gather,
    "integer_pow": _integer_pow,
    "iota": _iota,
    "pad": _pad,
    "reduce_and": _over_axes(np.all),
    "reduce_max": _over_axes(np.max),
    "reduce_min": _over_axes(np.min),
    "reduce_or": _over_axes(np.any),
    "reduce_prod": _over_axes(np.prod),
    "reduce_sum": _sum,
    "reshape": _reshape,
    "rev": lambda x, dimensions: np.flip(x, dimensions),
    "scatter": indexing.scatter(indexing.assign),
    "scatter-add": indexing.scatter(np.add.at),
    "scatter_add": indexing.scatter(np.add.at),
    "slice": _slice,
    "split": _split,
    "squeeze": lambda x, dimensions: np.squeeze(x, tuple(dimensions)),
    "stack": lambda *xs, axis, **_: np.stack(xs, axis),
    "transpose": lambda x, permutation: x.transpose(permutation),
    "unstack": lambda x, axis, **_: [np.take(x, i, axis) for i in range(x.shape[axis])],
    "triangular_solve": indexing.triangular_solve,
}

# --- control flow --------------------------------------------------------------------------------


def _cond(equation, which, *args):
    branches = equation.params["branches"]
    return _closed(branches[int(np.clip(int(which), 0, len(branches) - 1))], args)


def _while(equation, *args):
    params = equation.params
    of_cond, of_body = params["cond_nconsts"], params["body_nconsts"]
    first, second = args[:of_cond], args[of_cond : of_cond + of_body]
    carry = list(args[of_cond + of_body :])
    while bool(_closed(params["cond_jaxpr"], [*first, *carry])[0]):
        carry = _closed(params["body_jaxpr"], [*second, *carry])
    return carry


def _scan(equation, *args):
    params = equation.params
    kinds = scan_of(equation)  # which no public parameter tells
    n_consts, n_carry, length = kinds.consts, kinds.carry, params["length"]
    consts, carry = args[:n_consts], list(args[n_consts : n_consts + n_carry])
    turns = range(length)
    stacked: list[Any] = [None] * length
    for i in reversed(turns) if params["reverse"] else turns:
        results = _closed(
            params["jaxpr"], [*consts, *carry, *(x[i] for x in args[n_consts + n_carry :])]
        )
        carry, stacked[i] = results[:n_carry], results[n_carry:]
    if not length:
        avals = [v.aval for v in equation.outvars[n_carry:]]
        return carry + [np.zeros(a.shape, a.dtype) for a in avals]
    return carry + [np.stack(parts) for parts in zip(*stacked, strict=True)]


def _linear_solve(equation, *args):
    """By the solver that it brings, the last of those that have operands of their own."""
    params = equation.params
    lengths = params["const_lengths"]
    before = lengths.matvec + lengths.vecmat
    return _closed(
        params["jaxprs"].solve,
        [*args[before : before + lengths.solve], *args[sum(lengths) :]],
    )


LOOPS = {"cond": _cond, "while": _while, "scan": _scan, "custom_linear_solve": _linear_solve}


def _body(equation):
    """The jaxpr of a call, None for anything else."""
    return equation.params.get("jaxpr", equation.params.get("call_jaxpr"))


# --- the run -------------------------------------------------------------------------------------


def _as_array(x, aval):
    """A value of the type that JAX says it has; keys stay JAX's."""
    if jnp.issubdtype(aval.dtype, jax.dtypes.extended):
        return x
    return np.asarray(x, aval.dtype)


def _equation(equation, args):
    name = equation.primitive.name
    if name in LOOPS:
        return LOOPS[name](equation, *args)
    if (inner := _body(equation)) is not None:
        return _closed(inner, args)
    if (rule := RULES.get(name)) is not None:
        found = rule(*args, **equation.params)
        if found is not NotImplemented:
            return found if equation.primitive.multiple_results else [found]
    found = equation.primitive.bind(*args, **equation.params)
    return found if equation.primitive.multiple_results else [found]


def _closed(jaxpr, args):
    """The results of a jaxpr, which brings its constants if it has some."""
    inner, consts = getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())
    env: dict[Any, Any] = {}

    def read(atom):
        return _as_array(atom.val, atom.aval) if isinstance(atom, jex.Literal) else env[atom]

    def write(variables, values):
        for variable, value in zip(variables, values, strict=True):
            env[variable] = _as_array(value, variable.aval)

    write(inner.constvars, consts)
    write(inner.invars, args)
    for equation in inner.eqns:
        write(equation.outvars, _equation(equation, [read(v) for v in equation.invars]))
    return [read(v) for v in inner.outvars]


def run(function, *args):
    """The results of a function that JAX can trace, as NumPy's arrays."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    with np.errstate(all="ignore"):
        results = _closed(closed, jax.tree.leaves(args))
    return jax.tree.unflatten(jax.tree.structure(shapes), results)


def interpreted(function):
    """As `jax.jit`, by NumPy."""
    return functools.partial(run, function)
