"""The matrix products and solves that a step cannot do without: its floor.

Each shape is timed bare, times how often the step needs it.
"""

from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_factor, cho_solve

import locoprop_jax as lp
from benchmarks.shared.timing import Compiled, compile_call
from locoprop_jax._local_losses.coordinates import cheapest_path


class Product(NamedTuple):
    """A matrix product by its operands' shapes; the first one is transposed where it says so."""

    left: tuple[int, int]
    right: tuple[int, int]
    transposed: bool  # left.T @ right

    @property
    def flops(self) -> int:
        rows, inner = self.left[::-1] if self.transposed else self.left
        return 2 * rows * inner * self.right[1]


class Solve(NamedTuple):
    """A positive definite system with some right-hand sides: Cholesky and two triangular solves."""

    size: int
    columns: int

    @property
    def flops(self) -> int:
        return self.size**3 // 3 + 2 * self.size**2 * self.columns


Kernel = Product | Solve


def gradient_products(layers: lp.Layers, rows: int) -> Counter[Kernel]:
    """The matrix products of a gradient: forward, by the weights, by the inputs."""
    products: Counter[Kernel] = Counter()
    for i, layer in enumerate(layers.values()):
        products[Product((rows, layer.d_in), (layer.d_in, layer.d_out), False)] += 1
        products[Product((rows, layer.d_in), (rows, layer.d_out), True)] += 1
        if i:  # nobody asks for the gradient by the images
            products[Product((rows, layer.d_out), (layer.d_out, layer.d_in), False)] += 1
    return products


def inverse_products(layers: lp.Layers) -> Counter[Kernel]:
    """What applies FOOF's inverses; making them is not counted."""
    return Counter(
        Product((layer.d_in, layer.d_in), (layer.d_in, layer.d_out), False)
        for layer in layers.values()
    )


def foof_kernels(layers: lp.Layers, rows: int) -> Counter[Kernel]:
    """What FOOF needs with an inversion for each step: X'X and the solution of its system."""
    kernels: Counter[Kernel] = Counter()
    for layer in layers.values():
        d = layer.d_in  # the bias is eliminated
        kernels[Product((rows, d), (rows, d), True)] += 1
        kernels[Solve(d, layer.d_out)] += 1
    return kernels


def metric_products(layers: lp.Layers, rows: int, count: int) -> Counter[Kernel]:
    """Products with each layer's metric, forward and transposed: LNB's floor as the paper has it.

    Where X'X is cheaper LNB goes through that, and may take less than this.
    """
    kernels: Counter[Kernel] = Counter()
    for layer in layers.values():
        kernels[Product((rows, layer.d_in), (layer.d_in, layer.d_out), False)] += count
        kernels[Product((rows, layer.d_in), (rows, layer.d_out), True)] += count
    return kernels


def local_products(
    layers: lp.Layers, rows: int, iterations: int, matching: bool
) -> Counter[Kernel]:
    """The matrix products of LocoProp's local iterations, all but the first (which needs none)."""
    products: Counter[Kernel] = Counter()
    for layer in layers.values():
        d_in, d_out, more = layer.d_in, layer.d_out, iterations - 1
        linear = not matching or (layer.transfer.is_identity and not layer.uses_head)
        usable = ["direct", "gram"] if linear else ["direct"]
        if cheapest_path(rows, d_in, d_out, iterations, usable, linear=linear) == "gram":
            products[Product((rows, d_in), (rows, d_in), True)] += 1
            products[Product((d_in, d_in), (d_in, d_out), False)] += more
        else:
            products[Product((rows, d_in), (d_in, d_out), False)] += more
            products[Product((rows, d_in), (rows, d_out), True)] += more
    return products


def compile_kernel(kernel: Kernel, key: jax.Array) -> Compiled:
    if isinstance(kernel, Solve):
        root = jax.random.normal(key, (kernel.size, kernel.size))
        system = root @ root.T + kernel.size * jnp.eye(kernel.size)
        right = jax.random.normal(key, (kernel.size, kernel.columns))
        return compile_call(lambda a, b: cho_solve(cho_factor(a), b), system, right)
    left = jax.random.normal(key, kernel.left)
    right = jax.random.normal(key, kernel.right)

    def multiply(a: jax.Array, b: jax.Array) -> jax.Array:
        return (a.T if kernel.transposed else a) @ b

    return compile_call(multiply, left, right)
