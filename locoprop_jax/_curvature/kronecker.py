"""Curvature of each layer as the Kronecker product of an input and an output factor.

K-FAC and KFRA share the input factor, the damping and the amortisation; they differ in where the
output factors come from.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from locoprop_jax import _linalg
from locoprop_jax._checks import check_not_negative
from locoprop_jax._layers import rows
from locoprop_jax._layers.blocks import dtype_of, matrix, unmatrix
from locoprop_jax._layers.captured import Captured
from locoprop_jax._layers.division import divide_layers
from locoprop_jax._layers.layers import Layer, Layers
from locoprop_jax._layers.method import Batch, matrix_shapes, transformation
from locoprop_jax._layers.rows import Block, Inputs
from locoprop_jax._layers.stacking import map_layers, over_stack
from locoprop_jax._neurons.amortised import Amortisation, AmortisedState, is_too_large


class Factors(NamedTuple):
    """Of a layer whose block W is a matrix (d, d_out), its bias the last row.

    Attributes:
      inputs: S = X'X / N, X with its column of ones; of an embedding its diagonal.
      outputs: Gamma, for K-FAC C'C summed over samples and rows.

    A factor that is larger than the method keeps is its diagonal.
    """

    inputs: Float[Array, "d d"] | Float[Array, " d"]
    outputs: Float[Array, "d_out d_out"] | Float[Array, " d_out"]


class InputFactor(NamedTuple):
    """The inverse of the damped input factor, and a number in place of the other's."""

    inputs: Float[Array, "d d"] | Float[Array, " d"]
    scale: Float[Array, ""]


class EigenFactors(NamedTuple):
    """The eigenvectors of both factors, and the damped inverse in their basis.

    Attributes:
      bases: of the inputs' and the outputs' factor, in columns; ones for a diagonal factor.
      scale: 1 / (a_i b_j + damping) for the eigenvalues a and b.
    """

    bases: Factors
    scale: Float[Array, "d d_out"]


class KfacState(AmortisedState):
    """State of `scale_by_kfac` and `scale_by_kfra`.

    Attributes:
      count: finite batches so far. shape=(), dtype=int32
      refused: batches that were not finite, and updated nothing. shape=(), dtype=int32
      gathered: `count` after the last batch whose factors were gathered. shape=(), dtype=int32
      failures: factorisations that did not succeed; their layers kept the inverse they had.
        shape=(), dtype=int32
      statistics: `Factors` by layer, their running sums. Empty for the current batch's alone.
      inverse: by layer, the inverses of the damped `Factors`, of the input factor alone with a
        number for the other, or `EigenFactors`.
    """

    def spectra(self) -> dict[str, Array]:
        """The eigenvalues of both factors, and of what is kept of their damped inverses."""
        found = {}
        for layer, own in self.statistics.items():
            found |= _spectra(f"{layer}/", own)
        for layer, own in self.inverse.items():
            if isinstance(own, EigenFactors):
                found[f"{layer}/damped"] = own.scale.reshape(*own.scale.shape[:-2], -1)
            else:
                found |= _spectra(f"{layer}/damped_", own)
        return found


class Damping(NamedTuple):
    """How damped factors are inverted and what becomes of the output factor.

    Attributes:
      amount: k, in units of the mean eigenvalue of S (x) Gamma, or absolute.
      relative: which of the two.
      exact: whether k is added in the eigenvectors of both factors.
      output_factor: "keep", "constant" or "norm".
    """

    amount: Any
    relative: bool = True
    exact: bool = False
    output_factor: str = "keep"

    def check(self) -> None:
        """Refuse what is out of range.

        Raises:
          ValueError: it is.
        """
        check_not_negative(damping=self.amount)
        if self.output_factor not in ("keep", "constant", "norm"):
            raise ValueError(
                f"`output_factor` is 'keep', 'constant' or 'norm', got {self.output_factor!r}."
            )
        if self.exact and self.output_factor != "keep":
            raise ValueError(
                f"`output_factor={self.output_factor!r}` leaves out one of two factors, which "
                f"exact damping does not have apart. Use `exact_damping=False`."
            )

    def zeros(
        self, factors: Factors, block: jax.ShapeDtypeStruct
    ) -> Factors | InputFactor | EigenFactors:
        """What `invert` returns, before the first inversion, for factors of zeros."""
        if self.output_factor == "constant":
            return InputFactor(factors.inputs, jnp.zeros(block.shape[:-2], block.dtype))
        return EigenFactors(factors, jnp.zeros(block.shape, block.dtype)) if self.exact else factors

    def invert(
        self, factors: Factors, unit: Float[Array, ""]
    ) -> Factors | InputFactor | EigenFactors:
        """The inverse of the damped product of two factors.

        Args:
          factors: of a layer.
          unit: what the amount is in units of, if it is relative.
        """
        amount = jnp.asarray(self.amount, unit.dtype)
        amount = amount * unit if self.relative else amount
        if self.exact:
            return _invert_exactly(factors, amount)
        inputs, outputs = _mean_eigenvalues(factors)
        pi, root = jnp.sqrt(inputs / outputs), jnp.sqrt(amount)
        inverse = _linalg.inverse(_linalg.damped(factors.inputs, root * pi))
        if self.output_factor == "constant":
            smallest = jnp.finfo(root.dtype).tiny
            return InputFactor(inverse, 1 / jnp.maximum(root / pi, smallest))
        return Factors(inverse, _linalg.inverse(_linalg.damped(factors.outputs, root / pi)))

    def divide(
        self, gradient: Float[Array, "d d_out"], by: Factors | InputFactor | EigenFactors
    ) -> Float[Array, "d d_out"]:
        """The gradient by what `invert` returned."""
        if isinstance(by, InputFactor):
            return by.scale * _linalg.multiply(by.inputs, gradient)
        if isinstance(by, EigenFactors):
            left, right = by.bases
            turned = _linalg.multiply_right(_linalg.multiply(left.T, gradient), right)
            return _linalg.multiply_right(_linalg.multiply(left, by.scale * turned), right.T)
        alone = _linalg.multiply(by.inputs, gradient)
        both = _linalg.multiply_right(alone, by.outputs)
        return _as_long_as(both, alone) if self.output_factor == "norm" else both


def _invert_exactly(factors: Factors, amount: Float[Array, ""]) -> EigenFactors:
    values, bases = zip(*map(_eigenvalues, factors), strict=True)
    inputs, outputs = (jnp.maximum(value, 0) for value in values)
    products = inputs[:, None] * outputs[None] + amount
    smallest = jnp.finfo(products.dtype).tiny
    return EigenFactors(Factors(*bases), 1 / jnp.maximum(products, smallest))


def _eigenvalues(factor: Array) -> tuple[Array, Array]:
    """And the eigenvectors, in columns; of a diagonal factor, ones."""
    if factor.ndim == 1:
        return factor, jnp.ones_like(factor)
    values, basis = jnp.linalg.eigh((factor + factor.T) / 2)
    return values, basis


# Gamma of each of the layers of the incoming blocks, from (captured, params, blocks).
OutputFactors = Callable[
    [Captured, Any, dict[str, Block]],
    dict[str, Float[Array, "d_out d_out"] | Float[Array, " d_out"]],
]


def scale_by_kronecker(
    method: str,
    layers: Layers,
    output_factors: OutputFactors,
    damping: Damping,
    amortisation: Amortisation,
    max_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Divide each layer's gradient by its damped Kronecker product.

    Args:
      method: for errors.
      layers: from `find_layers`, checked.
      output_factors: where they come from; called where statistics are gathered.
      damping: of the product.
      amortisation: of its factors.
      max_size: larger factors are kept by their diagonals; None for no limit.

    Raises:
      ValueError: at construction, for options out of range.
    """
    damping.check()
    amortisation.check()

    def init(params: Any) -> KfacState:
        shapes = matrix_shapes(layers, params)

        def factors() -> dict[str, Factors]:
            return {n: _zero_factors(shapes[n], layers[n].is_lookup, max_size) for n in shapes}

        return amortisation.init(
            KfacState,
            factors,
            lambda: {name: damping.zeros(own, shapes[name]) for name, own in factors().items()},
        )

    def step(batch: Batch, state: KfacState) -> tuple[Any, KfacState]:
        captured, slopes, ok = batch.captured, batch.slopes, batch.is_finite()

        def gather() -> dict[str, Factors]:
            outputs = output_factors(captured, batch.params, slopes)
            return {
                name: over_stack(layers[name], functools.partial(_factors, max_size=max_size))(
                    captured[name].rows(dtype_of(slope)), slope, outputs[name]
                )
                for name, slope in slopes.items()
            }

        def invert(averages: dict[str, Factors]) -> dict[str, Any]:
            units = {name: unit_of(layers[name], factors) for name, factors in averages.items()}
            sources = {name: (factors, units[name]) for name, factors in averages.items()}
            return divide_layers(layers, lambda _, own: damping.invert(*own), sources)

        def apply(_: str, arrays: tuple[Block, Any]) -> Block:
            slope, inverse = arrays
            return unmatrix(damping.divide(matrix(slope), inverse), slope)

        state = amortisation.advance(state, ok, gather, invert)
        sources = {name: (slopes[name], state.inverse[name]) for name in slopes}
        return batch.finish(map_layers(layers, apply, sources), state, ok)

    return transformation(method, layers, init, step)


# --- one layer -----------------------------------------------------------------------------------


def _zero_factors(block: jax.ShapeDtypeStruct, is_lookup: bool, max_size: int | None) -> Factors:
    """For a block (*stack, d, d_out) as one matrix."""
    *stack, d, d_out = block.shape

    def zeros(size: int, is_diagonal: bool) -> Array:
        square = (size,) if is_diagonal else (size, size)
        return jnp.zeros((*stack, *square), block.dtype)

    return Factors(
        zeros(d, is_lookup or is_too_large(d, max_size)),
        zeros(d_out, is_too_large(d_out, max_size)),
    )


def _factors(
    inputs: Inputs,
    like: Block,
    outputs: Float[Array, "d_out d_out"] | Float[Array, " d_out"],
    max_size: int | None,
) -> Factors:
    d = sum(len(part) if name == "kernel" else 1 for name, part in like.items())
    moment = rows.extended_squares if is_too_large(d, max_size) else rows.extended_moment
    dtype = dtype_of(like)
    return Factors(moment(inputs, like) / rows.count(inputs), outputs.astype(dtype))


def unit_of(layer: Layer, factors: Factors) -> Float[Array, "*stack"]:
    """What relative damping is in units of: the mean eigenvalue of the product of the factors.

    The entries of a scale, or of a bias on its own, are layers of one output each, and their factor
    a number that is seldom known well: of few examples some are next to zero. They are damped in
    units of the mean over all entries, as a layer's outputs are, or those entries would be thrown
    far.
    """
    inputs, outputs = over_stack(layer, _mean_eigenvalues)(factors)
    products = inputs * outputs
    if layer.kind in ("scale", "bias"):
        return jnp.broadcast_to(products.mean(), products.shape)
    return products


def _spectra(prefix: str, own: Factors | InputFactor) -> dict[str, Array]:
    """The eigenvalues of factors, of one layer or of a stack; of a diagonal one its entries."""
    factors = own._asdict()
    factors.pop("scale", None)
    # One that is larger than is kept has an axis less than one that is not.
    most = max(x.ndim for x in factors.values())
    are_square = all(x.shape[-2:] == (x.shape[-1],) * 2 for x in factors.values() if x.ndim == most)
    return {
        prefix + name: _linalg.eigenvalues(x, is_diagonal=x.ndim < most or not are_square)
        for name, x in factors.items()
    }


def _mean_eigenvalues(factors: Factors) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """One for a factor of zeros: a gradient that never met data is not made long."""
    means = map(_linalg.mean_eigenvalue, factors)
    inputs, outputs = (jnp.where(mean > 0, mean, 1) for mean in means)
    return inputs, outputs


def _as_long_as(
    model: Float[Array, "d d_out"], direction: Float[Array, "d d_out"]
) -> Float[Array, "d d_out"]:
    """The direction with the other's norm; zero if it is."""
    length = jnp.linalg.norm(direction)
    return direction * (jnp.linalg.norm(model) / jnp.where(length > 0, length, 1))
