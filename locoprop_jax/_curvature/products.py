"""Products of the Gauss-Newton matrix and of the Fisher with a vector, matrix-free."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from locoprop_jax import _linalg, losses
from locoprop_jax._capture import curvature
from locoprop_jax._capture.curvature import Point
from locoprop_jax._capture.target import Target
from locoprop_jax._capture.targets import find_targets, is_non_negative
from locoprop_jax._checks import check_real
from locoprop_jax._layers.layers import Layers
from locoprop_jax._tracing.chunks import is_traced
from locoprop_jax._tracing.evaluate import evaluate
from locoprop_jax._tracing.heads import addresses, cut
from locoprop_jax._tracing.trace import layer_names, trace
from locoprop_jax._trees import path_name

Tree = Any
Outputs = list[Array]  # one array for each target
Product = Callable[[Tree], Tree]


class Linearised(NamedTuple):
    """A network at some parameters, up to the outputs that its loss takes.

    Attributes:
      push: J v for the Jacobian J of the outputs by the parameters; linear.
      pull: J' u; linear.
      hessian: H u for the Hessian H of the loss by the outputs; linear.
      targets: where the outputs are.
      points: the outputs, and what the loss makes of them.
      is_non_negative: whether the loss is seen never to be negative.
    """

    push: Callable[[Tree], Outputs]
    pull: Callable[[Outputs], Tree]
    hessian: Callable[[Outputs], Outputs]
    targets: tuple[Target, ...]
    points: list[Point]
    is_non_negative: bool


def gauss_newton_vector_product(
    loss_fn: Callable[..., Any],
    params: Tree,
    *args: Any,
    has_aux: bool = False,
    layers: Layers | None = None,
    **kwargs: Any,
) -> Product:
    """Products of vectors with the generalised Gauss-Newton matrix (practical GN, eqs. 12, 13).

    The matrix is J'HJ, with J the Jacobian of the network's outputs by all parameters and H the
    Hessian of the loss, as written, by these outputs: what a mean over the batch divides by stays
    in it. Any loss will do whose heads are convex, of several outputs too unless unmarked ones meet
    in one term; where the Hessian of a loss marked by `locoprop_jax.losses.output_loss` is not
    positive semi-definite its positive part counts. What an unmarked loss does with parameters
    after its last layer, or past every layer (weight decay), does not enter.

    The network runs forward when this is called, a product is one pass forward and one backward.

    Args:
      loss_fn: `loss_fn(params, *args, **kwargs)` with a scalar loss, or a pair (loss, aux).
      params: where to take the matrix.
      *args: a batch and whatever else the loss takes.
      has_aux: whether the loss function returns a pair.
      layers: from `find_layers`, for the block-diagonal matrix: one block for each layer, and one
        for all other parameters. A product then costs as many passes as there are blocks, one
        after the other.
      **kwargs: keyword arguments of the loss.

    Returns:
      A linear function of a tree like `params`, with a tree like it for a result.

    Raises:
      TypeError: the loss is not a scalar, or a parameter is not an array.
      ValueError: no layer was found, or unmarked outputs of several layers meet in the loss; a
        parameter, or what the loss takes, is complex.

    References:
      N. Schraudolph, `Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent
      <https://doi.org/10.1162/08997660260028683>`_, 2002.

    Examples:
      >>> import jax.numpy as jnp, locoprop_jax as lp
      >>> def loss_fn(w, x):
      ...     return jnp.mean((x @ w["kernel"]) ** 2)
      >>> w, x = {"kernel": jnp.ones((3, 1))}, jnp.eye(3)
      >>> lp.gauss_newton_vector_product(loss_fn, w, x)(w)["kernel"].round(2).tolist()
      [[0.67], [0.67], [0.67]]
    """
    name = "gauss_newton_vector_product"
    check_real(name, params)
    network = linearise(loss_fn, params, args, kwargs, has_aux, name)

    def product(vector: Tree) -> Tree:
        return network.pull(network.hessian(network.push(vector)))

    return product if layers is None else _by_layer(product, layers)


def fisher_vector_product(
    loss_fn: Callable[..., Any],
    params: Tree,
    *args: Any,
    rng: Array | None = None,
    samples: int = 1,
    has_aux: bool = False,
    layers: Layers | None = None,
    **kwargs: Any,
) -> Product:
    """Products of vectors with the Fisher, for labels sampled from the model (practical GN, C.1).

    The matrix is the sum over loss terms of w e e', with e the gradient of one term for a label
    that the model predicts, averaged over some labels, and w the term's weight in the loss: for
    exponential families in their natural parameters its expectation is the Gauss-Newton matrix.

    Args:
      loss_fn: `loss_fn(params, *args, **kwargs)`, of losses of `locoprop_jax.losses`, or of cross
        entropies and squared errors that are recognised.
      params: where to take the matrix.
      *args: a batch and whatever else the loss takes.
      rng: a key, for the labels. The loss does not get it.
      samples: how many labels for each term.
      has_aux: whether the loss function returns a pair (loss, aux).
      layers: from `find_layers`, for the block-diagonal matrix, as for
        `gauss_newton_vector_product`.
      **kwargs: keyword arguments of the loss.

    Returns:
      A linear function of a tree like `params`, with a tree like it for a result.

    Raises:
      TypeError: the loss is not a scalar, a parameter is not an array, or `rng` is missing.
      ValueError: the loss is neither marked nor recognised, a parameter is complex, or `samples` is
        not positive.
    """
    curvature.check_arguments("fisher_mc", samples)
    if rng is None:
        raise TypeError(
            "`fisher_vector_product` samples labels: pass a key as the keyword `rng`, such as "
            "`rng=jax.random.key(0)`."
        )
    check_real("fisher_vector_product", params)
    network = linearise(loss_fn, params, args, kwargs, has_aux, "fisher_mc")
    drawn = curvature.cotangents(network.targets, network.points, "fisher_mc", samples, rng)

    def outer(target: Target, columns: Array, vector: Array) -> Array:
        along = jnp.sum(columns * vector[None], [i + 1 for i in target.outputs], keepdims=True)
        return jnp.sum(columns * along, 0)

    def product(vector: Tree) -> Tree:
        pushed = network.push(vector)
        return network.pull([*map(outer, network.targets, drawn, pushed)])

    return product if layers is None else _by_layer(product, layers)


def linearise(
    loss_fn: Callable[..., Any],
    params: Tree,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    has_aux: bool,
    asked: str,
) -> Linearised:
    """Run the network forward, up to the outputs that its loss takes.

    Args:
      loss_fn: the loss function.
      params: where.
      args: the loss's other arguments.
      kwargs: its keyword arguments.
      has_aux: whether it returns a pair.
      asked: a kind of curvature, or the name of the method that asks, for errors.

    Raises:
      ValueError: the outputs cannot be told.
    """
    return network_of(loss_fn, params, args, kwargs, has_aux, asked).at(params)


class Network(NamedTuple):
    """A loss function, traced and understood, before anything is run.

    Attributes:
      at: linearised at some parameters, of the shapes that it was traced with.
      is_non_negative: whether the loss is seen never to be negative.
    """

    at: Callable[[Tree], Linearised]
    is_non_negative: bool


def network_of(
    loss_fn: Callable[..., Any],
    params: Tree,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    has_aux: bool,
    asked: str,
) -> Network:
    """What `linearise` does before it runs the network; its arguments and errors are the same."""
    traced = trace(loss_fn, params, tuple(args), kwargs, has_aux)
    program = traced.program
    targets = find_targets(traced, asked, layer_names(traced), ())
    rests = {v: cut(traced, v, program.outputs[0]) for t in targets for v in t.weighing}
    free = [v for rest in rests.values() for v in rest.free]
    needed = [v for target in targets for v in (target.value, *target.needed)]
    wanted = addresses(program, [*needed, *rests, *free])
    in_chunks = is_traced((params, traced.arguments))

    def forward(params: Tree) -> tuple[Outputs, dict]:
        flat = [*jax.tree.leaves(params), *traced.arguments]
        _, recorded = evaluate(
            traced.closed, flat, frozenset(wanted.values()), {}, in_chunks=in_chunks
        )
        return [recorded[wanted[target.value]] for target in targets], recorded

    def at(params: Tree) -> Linearised:
        # By the transpose of the pass backward, which also exists where only that one is defined.
        outputs, pull, recorded = jax.vjp(forward, params, has_aux=True)
        push = jax.linear_transpose(lambda u: pull(u)[0], outputs)
        given = [*jax.tree.leaves(params), *traced.arguments]
        known: dict[int, Any] = dict(zip(program.inputs, given, strict=True))
        known |= program.constants
        known |= {value: recorded[address] for value, address in wanted.items()}

        slopes = {v: jax.grad(rest.function(known))(known[v]) for v, rest in rests.items()}
        points = [curvature.point(t, known, known[t.value], slopes) for t in targets]
        # Once: it may take a factorisation, which a loop over products would repeat.
        products = [_hessian(target, point) for target, point in zip(targets, points, strict=True)]

        def hessian(vectors: Outputs) -> Outputs:
            return [product(vector) for product, vector in zip(products, vectors, strict=True)]

        return Linearised(
            lambda v: push(v)[0], lambda u: pull(u)[0], hessian, targets, points, is_positive
        )

    is_positive = is_non_negative(traced, targets)
    return Network(at, is_positive)


def _hessian(target: Target, point: Point) -> Callable[[Array], Array]:
    """The product with the Hessian of the loss as written by a target's outputs."""
    if target.loss is None:
        assert point.head is not None
        # Reverse over reverse: a loss may have a derivative of its own that has no forward mode.
        product = jax.vjp(jax.grad(point.head), point.value)[1]
        return lambda vector: product(vector)[0]
    if target.loss.root is None:  # it may be indefinite
        loss = functools.partial(curvature.weighted, target, point)
        root = losses.dense_root(loss, point.value, target.outputs)
        return lambda vector: root(root(vector)).astype(vector.dtype)
    # By the root in closed form, which takes fewer operations than a derivative of a gradient.
    root, dtype = curvature.root_of(target, point), losses.working_dtype(point.value.dtype)
    turned = jax.linear_transpose(root, jax.ShapeDtypeStruct(point.value.shape, dtype))
    return lambda vector: root(turned(vector.astype(dtype))[0]).astype(vector.dtype)


def _by_layer(product: Product, layers: Layers) -> Product:
    """The product with the diagonal blocks: each layer's, and that of the other parameters."""
    numbers = {
        parameter.path: i
        for i, layer in enumerate(layers.values())
        for parameter in layer.parameters
    }

    def only(block: Array, tree: Tree) -> Tree:
        def part(path: Any, leaf: Array) -> Array:
            number = numbers.get(path_name(path), len(layers))
            return jnp.where(block == number, leaf, jnp.zeros_like(leaf))

        return jax.tree_util.tree_map_with_path(part, tree)

    def of_blocks(vector: Tree) -> Tree:
        def add_block(i: Array, total: Tree) -> Tree:
            return _linalg.add(total, only(i, product(only(i, vector))))

        # In a loop, because the program would be as long as the network is deep, twice.
        return jax.lax.fori_loop(0, len(layers) + 1, add_block, _linalg.zeros_like(vector))

    return of_blocks
