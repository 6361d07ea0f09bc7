"""Output losses whose Hessian and predictive distribution are known.

Each is a drop-in for the Optax function of its name: the same values and gradients, one loss per
example. Written with one of these, a loss tells `value_grad_and_capture` where the network ends and
the loss begins (practical Gauss-Newton, section 2), which the Fisher and Gauss-Newton methods need:

    def loss_fn(params, batch):
        logits = model.apply(params, batch["image"])
        return lp.losses.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

The losses may be weighted, masked, summed and averaged in any way, and several of them added. Mark
a loss of your own by `output_loss`.

A marked loss is the function itself inside a `jax.jit` whose name capture knows: the name passes
through `jit`, `vmap` and `checkpoint`, and the compiled program is that of the plain function.
"""

from __future__ import annotations

import functools
import itertools
import math
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

_marked: weakref.WeakValueDictionary[str, OutputLoss] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class OutputLoss:
    """A loss of each example, `loss(outputs, labels)`, that capture recognises in a traced loss.

    Outputs have the shape (*examples, *outputs of one example), losses the shape (*examples,).
    Made by `output_loss`; the losses of this module are of this type too.
    """

    def __init__(
        self,
        function: Callable[..., Array],
        sample: Callable[..., Any] | None,
        root: Callable[[Array, Array], Array] | None = None,
        mass: Callable[[Array], Array] | None = None,
        output_axes: int | None = None,
        total: Callable[[Array, Array], Array] | None = None,
    ):
        """Mark a function.

        Args:
          function: the loss of each example.
          sample: `sample(rng, outputs)`, labels from the predictive distribution.
          root: R v of (outputs, v), where R R' is the Hessian; None to take it by autodiff.
          mass: by what the labels multiply `root`'s Hessian, of shape (*examples,); None for one.
          output_axes: how many axes the outputs of one example have; None for any number.
          total: the sum of R R' over rows, of (outputs, weights) with the shapes (rows, K) and
            (rows,); None to add it up column by column.
        """
        functools.update_wrapper(self, function)
        self.name = f"output_loss_{next(_numbers)}_{getattr(function, '__name__', 'custom')}"
        self.function = function
        self.sampler = sample
        self.root = root
        self.mass = mass
        self.output_axes = output_axes
        self.total = total

        def marked(outputs: Array, labels: Any) -> Array:
            losses = function(outputs, labels)
            _check_shapes(self, outputs, losses)
            return losses

        marked.__name__ = self.name
        self._call = jax.jit(marked)
        _marked[self.name] = self

    def __call__(self, outputs: Float[Array, "..."], labels: Any) -> Float[Array, "..."]:
        """The loss of each example."""
        return self._call(jnp.asarray(outputs), labels)

    def __repr__(self) -> str:
        return f"<OutputLoss: {getattr(self.function, '__name__', 'custom')}>"

    def sample(self, rng: Array, outputs: Float[Array, "..."]) -> Any:
        """Labels from the predictive distribution, one for each example.

        Raises:
          ValueError: the loss was marked without a sampler.
        """
        if self.sampler is None:
            raise ValueError(
                f"{self!r} was marked without a sampler of labels: write "
                f"`@output_loss(sample=...)` with a function of (rng, outputs)."
            )
        return self.sampler(rng, outputs)

    def hessian_product(
        self, outputs: Float[Array, "..."], labels: Any, vectors: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """The Hessian of each example's loss times a vector of the shape of its outputs."""
        gradient = jax.grad(lambda z: jnp.sum(self.function(z, labels)))
        # Reverse over reverse: a loss may have a derivative of its own that has no forward mode.
        return jax.vjp(gradient, outputs)[1](vectors)[0]

    def root_product(
        self, outputs: Float[Array, "..."], labels: Any, vectors: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """R v for each example, where R R' is the Hessian of its loss, or its positive part.

        The columns of R are its products with unit vectors. R is diagonal for elementwise losses
        and diag(sqrt p) - p sqrt(p)' for the softmax; autodiff and an eigendecomposition of each
        example's Hessian give it for a user's own loss, negative eigenvalues set to zero.
        """
        examples = jnp.ndim(jax.eval_shape(self.function, outputs, labels))
        if self.root is None:
            axes = tuple(range(examples, jnp.ndim(outputs)))
            return dense_root(lambda z: jnp.sum(self.function(z, labels)), outputs, axes)(vectors)
        product = self.root(outputs, vectors)
        if self.mass is None:
            return product
        return product * spread(jnp.sqrt(self.mass(labels)), outputs.ndim).astype(product.dtype)


def _check_shapes(loss: OutputLoss, outputs: Array, losses: Array) -> None:
    shape = jnp.shape(losses)
    axes = outputs.ndim - len(shape)
    if shape == outputs.shape[: len(shape)] and loss.output_axes in (None, axes):
        return
    raise ValueError(
        f"{loss!r} has to return one loss per example, of the leading shape of the outputs: got "
        f"outputs of shape {outputs.shape} and losses of shape {shape}. Take sums and means "
        f"outside."
    )


def find(name: str) -> OutputLoss | None:
    """The marked loss of a jitted function's name."""
    return _marked.get(name)


def output_loss(
    *, sample: Callable[[Array, Array], Any] | None = None
) -> Callable[[Callable[..., Array]], OutputLoss]:
    """Mark your own loss of each example, so that capture knows its curvature.

    Its Hessian by the outputs is taken by autodiff, K products for K outputs per example. Where
    the Hessian is indefinite (practical Gauss-Newton, equation 27: a mixture of two classifiers),
    its positive part takes its place, example by example.

    Args:
      sample: `sample(rng, outputs)`, labels drawn from the distribution that the outputs predict;
        None if `curvature="fisher_mc"` is never asked for. Called under `jax.vmap` over `rng`.

    Returns:
      A decorator of `loss(outputs, labels)`, which maps outputs (*examples, *outputs of one) and
      any labels to losses (*examples,), each a function of its own example's outputs alone.

    Examples:
      >>> import jax, jax.numpy as jnp, locoprop_jax as lp
      >>> @lp.losses.output_loss(sample=lambda rng, a: jax.random.poisson(rng, jnp.exp(a)))
      ... def poisson(log_rates, counts):
      ...     return jnp.exp(log_rates) - counts * log_rates
      >>> poisson(jnp.zeros(3), jnp.ones(3)).shape
      (3,)
    """
    return lambda function: OutputLoss(function, sample)


# --- square roots of Hessians --------------------------------------------------------------------


def spread(x: Array, ndim: int) -> Array:
    """Append axes of one, so that a number per example meets its outputs."""
    return x.reshape(x.shape + (1,) * (ndim - x.ndim))


def at_least_float32(x: Array) -> Array:
    """Curvature is computed in float32 at least, whatever the model's dtype."""
    return x.astype(working_dtype(x.dtype))


def working_dtype(dtype: Any) -> Any:
    """The dtype that curvature of outputs of this dtype is computed in."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


def dense_root(
    loss: Callable[[Array], Array], outputs: Array, axes: tuple[int, ...]
) -> Callable[[Array], Array]:
    """R v for the Hessian R R' of a scalar loss that is block-diagonal over all other axes.

    The Hessian comes from one Hessian-vector product per entry of a block; from a single one,
    with ones, where the blocks are single numbers. Its negative eigenvalues are set to zero.

    Args:
      loss: of the outputs.
      outputs: where to take the Hessian.
      axes: of the outputs, those that the blocks span.

    Returns:
      A function of v, an array of the shape of the outputs.
    """
    product = jax.vjp(jax.grad(loss), outputs)[1]
    if not axes:
        diagonal = at_least_float32(product(jnp.ones_like(outputs))[0])
        return lambda v: jnp.sqrt(jnp.maximum(diagonal, 0)) * v.astype(diagonal.dtype)
    order = [i for i in range(outputs.ndim) if i not in axes] + list(axes)
    shape = tuple(outputs.shape[i] for i in order)
    size = math.prod(outputs.shape[i] for i in axes)
    vectors = unit_vectors(outputs.shape, axes, outputs.dtype)
    columns = at_least_float32(jax.vmap(lambda v: product(v)[0])(vectors))
    columns = columns.transpose([0, *[i + 1 for i in order]]).reshape(size, -1, size)
    hessian = columns.transpose(1, 0, 2)
    values, bases = jnp.linalg.eigh((hessian + hessian.transpose(0, 2, 1)) / 2)
    # Symmetric, so that its square is the Hessian.
    root = (bases * jnp.sqrt(jnp.maximum(values, 0))[:, None, :]) @ bases.transpose(0, 2, 1)
    back = [order.index(i) for i in range(outputs.ndim)]

    def apply(v: Array) -> Array:
        rows = v.astype(root.dtype).transpose(order).reshape(-1, size)
        return jnp.einsum("nij,nj->ni", root, rows).reshape(shape).transpose(back)

    return apply


def unit_vectors(shape: tuple[int, ...], axes: tuple[int, ...], dtype: Any) -> Array:
    """The unit vectors along some axes, the same at all places of the others: (size, *shape)."""
    sizes = [shape[i] if i in axes else 1 for i in range(len(shape))]
    size = math.prod(sizes)
    return jnp.broadcast_to(jnp.eye(size, dtype=dtype).reshape(size, *sizes), (size, *shape))


def _softmax_root(logits: Array, v: Array) -> Array:
    """(diag(sqrt p) - p sqrt(p)') v."""
    p = jax.nn.softmax(logits)
    root = jnp.sqrt(p)
    return root * v - p * jnp.sum(root * v, -1, keepdims=True)


def _softmax_total(logits: Array, weights: Array) -> Array:
    """The sum of w (diag(p) - p p') over rows."""
    p = jax.nn.softmax(logits)
    weighted = weights[:, None] * p
    return jnp.diag(weighted.sum(0)) - jnp.matmul(
        weighted.T, p, precision=jax.lax.Precision.HIGHEST
    )


def _sigmoid_root(logits: Array, v: Array) -> Array:
    return jnp.sqrt(jax.nn.sigmoid(logits) * jax.nn.sigmoid(-logits)) * v


def _squared_root(predictions: Array, v: Array) -> Array:
    del predictions
    return math.sqrt(2) * v


# --- the losses ----------------------------------------------------------------------------------


def _sample_one_hot(rng: Array, logits: Array) -> Array:
    return jax.nn.one_hot(jax.random.categorical(rng, logits), logits.shape[-1], dtype=logits.dtype)


def _sample_normal(rng: Array, predictions: Array) -> Array:
    noise = jax.random.normal(rng, predictions.shape, predictions.dtype)
    return predictions + math.sqrt(0.5) * noise


def _softmax_cross_entropy(
    logits: Float[Array, "*examples classes"], labels: Float[Array, "*examples classes"]
) -> Float[Array, "*examples"]:
    """`optax.softmax_cross_entropy`: the cross entropy of each example, labels as probabilities.

    Predicts a class with p = softmax(logits); its Hessian is diag(p) - pp', times the sum of the
    example's labels (zero for one that is masked by its labels).
    """
    return optax.softmax_cross_entropy(logits, labels)


def _softmax_cross_entropy_with_integer_labels(
    logits: Float[Array, "*examples classes"], labels: Int[Array, "*examples"]
) -> Float[Array, "*examples"]:
    """`optax.softmax_cross_entropy_with_integer_labels`: the cross entropy of each example.

    Predicts a class with p = softmax(logits); its Hessian is diag(p) - pp'.
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def _sigmoid_binary_cross_entropy(
    logits: Float[Array, "..."], labels: Array
) -> Float[Array, "..."]:
    """`optax.sigmoid_binary_cross_entropy`: the cross entropy of each entry.

    Predicts a bit with p = sigmoid(logit); its second derivative is p (1 - p).
    """
    return optax.sigmoid_binary_cross_entropy(logits, labels)


def _squared_error(
    predictions: Float[Array, "..."], targets: Float[Array, "..."]
) -> Float[Array, "..."]:
    """`optax.squared_error`: (prediction - target)^2 of each entry; half of it is `optax.l2_loss`.

    Predicts a normal distribution of variance 1/2; its second derivative is 2.
    """
    return optax.squared_error(predictions, targets)


def _build(function: Callable[..., Array], *args: Any, **kwargs: Any) -> OutputLoss:
    function.__name__ = function.__qualname__ = function.__name__.removeprefix("_")
    return OutputLoss(function, *args, **kwargs)


softmax_cross_entropy = _build(
    _softmax_cross_entropy,
    _sample_one_hot,
    _softmax_root,
    mass=lambda labels: jnp.sum(labels, -1),
    output_axes=1,
    total=_softmax_total,
)
softmax_cross_entropy_with_integer_labels = _build(
    _softmax_cross_entropy_with_integer_labels,
    jax.random.categorical,
    _softmax_root,
    output_axes=1,
    total=_softmax_total,
)
sigmoid_binary_cross_entropy = _build(
    _sigmoid_binary_cross_entropy,
    lambda rng, a: jax.random.bernoulli(rng, jax.nn.sigmoid(a)).astype(a.dtype),
    _sigmoid_root,
    output_axes=0,
)
squared_error = _build(_squared_error, _sample_normal, _squared_root, output_axes=0)

# Those whose terms are never negative, for labels that are probabilities.
NON_NEGATIVE = (
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
    sigmoid_binary_cross_entropy,
    squared_error,
)
