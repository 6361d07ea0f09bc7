"""LocoProp, PocoProp and ProxProp: named points of the local-loss framework.

The learning rate of each is eta of the local iterations and carries the schedule; gamma, the step
size of the activations, is constant. The loss's cotangents carry 1/B for a mean over a batch of B:
the paper's choices of gamma for B = 1000 are 10 to 5000.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import optax

from locoprop_jax._layers.layers import Layers
from locoprop_jax._local_losses import divergences
from locoprop_jax._local_losses.divergences import Target
from locoprop_jax._local_losses.inner import inner
from locoprop_jax._local_losses.linear import exact
from locoprop_jax._local_losses.local_loss import scale_by_local_loss
from locoprop_jax._local_losses.regularizers import Regularizer, l2
from locoprop_jax._local_losses.rmsprop import scale_free_rmsprop
from locoprop_jax._local_losses.solver import Solver
from locoprop_jax._training.training import with_fallback

Optimizer = Callable[[Any], optax.GradientTransformation]

# TensorFlow's RMSProp with heavy-ball momentum, the optimizer of the paper's experiments.
RMSPROP = functools.partial(
    optax.rmsprop,
    decay=0.9,
    eps=1e-6,
    initial_scale=1.0,
    eps_in_sqrt=True,
    momentum=0.9,
)

# The defaults, chosen on the problems of `python -m benchmarks defaults`.
GAMMA = 0.05  # root-mean-square distance of a layer's target from its outputs
GAMMA_TRANSFERRED = 0.02  # the same for targets after the transfer function
LEARNING_RATE = 0.1  # of the local iterations, in units of that distance


def locoprop_s(
    layers: Layers,
    learning_rate: optax.ScalarOrSchedule = LEARNING_RATE,
    *,
    gamma: float = GAMMA,
    relative: bool = True,
    iterations: int = 10,
    optimizer: Optimizer | None = None,
    regularizer: Regularizer | None = None,
    correction: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """LocoProp with local squared losses (LocoProp, eq. 3, Algorithm 1).

    Each layer moves its outputs towards a gradient step on them, A - gamma E, by `iterations`
    steps of `optimizer` on 1/2 |X W~ - (A - gamma E)|^2. Works with any transfer function.

    Args:
      layers: from `find_layers`.
      learning_rate: eta of the local iterations, a number or a schedule; without a unit, as
        `scale_by_local_loss` describes.
      gamma: how far the target of each layer is from its outputs: the root mean square over rows
        and outputs.
      relative: False for the paper's own parameters: gamma multiplies the cotangents, and eta is
        the local optimizer's learning rate, both absolute.
      iterations: T, how many local steps are taken for each batch.
      optimizer: the local optimizer's constructor, called with the learning rate of each step. None
        for the paper's RMSProp with momentum; without its start at one where `relative`.
      regularizer: None, as in the paper's Algorithms; `l2()` adds 1/(2 eta) |W~ - W|^2, as in its
        eq. 3 and in the review's Algorithm 2 ("fixed").
      correction: None for the paper's: all layers at once. With a number one after the other, as
        `scale_by_local_loss` describes.

    Returns:
      A complete optimizer. Its `update` needs `captured`, from `value_grad_and_capture`.

    Raises:
      ValueError, TypeError: as `scale_by_local_loss`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, locoprop_jax as lp
      >>> def loss_fn(params, x, y):
      ...     hidden = jnp.tanh(x @ params["in"])
      ...     return jnp.mean((hidden @ params["out"] - y) ** 2)
      >>> params = {"in": jnp.cos(jnp.arange(12.0).reshape(3, 4)), "out": jnp.ones((4, 1))}
      >>> x = jnp.sin(jnp.arange(15.0).reshape(5, 3))
      >>> y = x[:, :1] * x[:, 1:2]
      >>> tx = lp.locoprop_s(lp.find_layers(loss_fn, params, x, y))
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     loss, grads, captured = lp.value_grad_and_capture(loss_fn)(params, x, y)
      ...     updates, state = tx.update(grads, state, params, captured=captured)
      ...     return optax.apply_updates(params, updates), state, loss
      >>> losses = []
      >>> for _ in range(5):
      ...     params, state, loss = step(params, state)
      ...     losses.append(f"{loss:.3f}")
      >>> print(*losses)
      0.665 0.292 0.084 0.035 0.028
    """
    rates, steps = (learning_rate, gamma, relative), (optimizer, iterations)
    return _iterated("squared", layers, rates, steps, regularizer, correction)


def locoprop_m(
    layers: Layers,
    learning_rate: optax.ScalarOrSchedule = LEARNING_RATE,
    *,
    gamma: float = GAMMA_TRANSFERRED,
    relative: bool = True,
    iterations: int = 10,
    optimizer: Optimizer | None = None,
    regularizer: Regularizer | None = None,
    correction: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """LocoProp with local matching losses (LocoProp, eq. 7, Algorithm 2).

    Each layer moves f(outputs) towards a mirror-descent step on them, f(A) - gamma E, by
    `iterations` steps of `optimizer` on the matching loss of its transfer function f; at an output
    layer on the loss itself. Needs non-decreasing transfer functions.

    Arguments, result and errors are those of `locoprop_s`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, locoprop_jax as lp
      >>> def loss_fn(params, x, y):
      ...     hidden = jnp.tanh(x @ params["in"])
      ...     return jnp.mean((hidden @ params["out"] - y) ** 2)
      >>> params = {"in": jnp.cos(jnp.arange(12.0).reshape(3, 4)), "out": jnp.ones((4, 1))}
      >>> x = jnp.sin(jnp.arange(15.0).reshape(5, 3))
      >>> y = x[:, :1] * x[:, 1:2]
      >>> tx = lp.locoprop_m(lp.find_layers(loss_fn, params, x, y))
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     loss, grads, captured = lp.value_grad_and_capture(loss_fn)(params, x, y)
      ...     updates, state = tx.update(grads, state, params, captured=captured)
      ...     return optax.apply_updates(params, updates), state, loss
      >>> losses = []
      >>> for _ in range(5):
      ...     params, state, loss = step(params, state)
      ...     losses.append(f"{loss:.3f}")
      >>> print(*losses)
      0.665 0.474 0.310 0.190 0.108
    """
    rates, steps = (learning_rate, gamma, relative), (optimizer, iterations)
    return _iterated("matching", layers, rates, steps, regularizer, correction)


def pocoprop_s(
    layers: Layers,
    learning_rate: optax.ScalarOrSchedule = LEARNING_RATE,
    *,
    gamma: float = GAMMA_TRANSFERRED,
    relative: bool = True,
    iterations: int = 10,
    optimizer: Optimizer | None = None,
    regularizer: Regularizer | None = None,
) -> optax.GradientTransformationExtraArgs:
    """LocoProp with squared losses after the transfer function (LocoProp, eq. 16, Algorithm 3).

    Each layer moves f(outputs) towards f(A) - gamma H, with H the cotangents after f, by steps on
    1/2 |f(X W~) - (f(A) - gamma H)|^2; output layers are as in `locoprop_s`.

    Arguments, result and errors are those of `locoprop_s`; the arrays have to come from
    `value_grad_and_capture(loss_fn, transferred=True)`.
    """
    rates, steps = (learning_rate, gamma, relative), (optimizer, iterations)
    return _iterated("post_squared", layers, rates, steps, regularizer)


def pocoprop_m(
    layers: Layers,
    learning_rate: optax.ScalarOrSchedule = LEARNING_RATE,
    *,
    gamma: float = GAMMA,
    relative: bool = True,
    iterations: int = 10,
    optimizer: Optimizer | None = None,
    regularizer: Regularizer | None = None,
) -> optax.GradientTransformationExtraArgs:
    """LocoProp with the duals of the matching losses (LocoProp, eq. 18, Algorithm 4).

    Each layer moves its outputs towards A - gamma H, with H the cotangents after the transfer
    function, as measured after it; output layers are as in `locoprop_s`. Needs non-decreasing
    transfer functions.

    Arguments, result and errors are those of `locoprop_s`; the arrays have to come from
    `value_grad_and_capture(loss_fn, transferred=True)`.
    """
    rates, steps = (learning_rate, gamma, relative), (optimizer, iterations)
    return _iterated("dual_matching", layers, rates, steps, regularizer)


def proxprop(
    layers: Layers,
    learning_rate: optax.ScalarOrSchedule,
    *,
    gamma: float = 1.0,
    solver: Solver | None = None,
) -> optax.GradientTransformationExtraArgs:
    """ProxProp (Frerix et al., 2018; LocoProp, appendix C).

    Each hidden layer takes the proximal step argmin 1/2 |X W~ - (A - gamma E)|^2
    + 1/(2 eta) |W~ - W|^2; everything else a gradient step of size gamma.

    Args:
      layers: from `find_layers`.
      learning_rate: eta, ProxProp's tau_m of the weights, a number or a schedule.
      gamma: ProxProp's tau, of activations and output layers; a step on the loss as written.
      solver: `exact()` if None; `conjugate_gradient(iterations)` is ProxProp's cheaper one.

    Returns:
      A complete optimizer. Its `update` needs `captured`, from `value_grad_and_capture`.

    Raises:
      ValueError: all layers are output layers, or as `scale_by_local_loss`.
    """
    hidden = Layers([layer for layer in layers.values() if not layer.is_output])
    if not hidden:
        raise ValueError(
            "`proxprop` needs a hidden layer, but the outputs of "
            f"{', '.join(layers) or 'no layer'} go straight into the loss."
        )
    local = scale_by_local_loss(
        hidden, learning_rate, gamma=gamma, regularizer=l2(), solver=solver or exact()
    )
    return optax.chain(with_fallback(local, hidden, optax.scale(gamma)), optax.scale(-1.0))


def locoprop_kfac(
    layers: Layers,
    learning_rate: optax.ScalarOrSchedule,
    *,
    gamma: float = 1.0,
    target: Target | None = None,
) -> optax.GradientTransformationExtraArgs:
    """K-FAC as LocoProp: squared losses with natural-gradient targets (LocoProp, eq. 15).

    W - gamma (X'X + 1/eta)^-1 G D^-1, with D the damped Fisher factor of the outputs: K-FAC with
    factored damping lambda_A = 1/(eta N), lambda_E that of the target, learning rate gamma / N
    for N rows (Proposition 1).

    Args:
      layers: from `find_layers`.
      learning_rate: eta, whose inverse damps the inputs' factor; a number or a schedule.
      gamma: the activation step size.
      target: `natural()` if None.

    Returns:
      A complete optimizer. Its `update` needs `captured`, from `value_grad_and_capture`.

    Raises:
      ValueError, TypeError: as `scale_by_local_loss`.
    """
    local = scale_by_local_loss(
        layers,
        learning_rate,
        gamma=gamma,
        target=target or divergences.natural(),
        regularizer=l2(),
        solver=exact(),
    )
    return optax.chain(local, optax.scale(-1.0))


def _iterated(
    divergence: str,
    layers: Layers,
    rates: tuple[optax.ScalarOrSchedule, float, bool],
    steps: tuple[Optimizer | None, int],
    regularizer: Regularizer | None,
    correction: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    (learning_rate, gamma, relative), (optimizer, iterations) = rates, steps
    if optimizer is None:
        optimizer = scale_free_rmsprop if relative else RMSPROP
    local = scale_by_local_loss(
        layers,
        learning_rate,
        gamma=gamma,
        relative=relative,
        divergence=divergence,
        regularizer=regularizer,
        solver=inner(optimizer, iterations),
        correction=correction,
    )
    return optax.chain(local, optax.scale(-1.0))
