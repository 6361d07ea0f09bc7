"""One method's training step: the learning rate's schedule, the step itself, its compilation."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

import locoprop_jax as lp
from benchmarks.shared.methods import Hyperparameters, Method

Params = Any
Batch = Any  # a pytree of arrays whose first axis is the example
LossFn = Callable[[Params, Batch], Float[Array, ""]]

WARMUP = 0.05  # of all steps, as the paper's 5 of 100 epochs
SAMPLED = ("fisher_mc", "ggn_mc")  # the kinds of curvature that need a key


class State(NamedTuple):
    params: Params
    opt_state: optax.OptState
    rng: Array  # for curvature that is sampled; else it stays as it is


Step = Callable[[State, Batch, Int[Any, " batch"]], tuple[State, Float[Array, ""]]]
Numbers = Mapping[str, ArrayLike]  # hyperparameters that are arguments of a compiled step


class Family(NamedTuple):
    """A method's state and step, compiled once for all values of some numbers."""

    start: Callable[[Numbers, Params, Array], State]
    step: Callable[[Numbers, State, Batch, Int[Any, " batch"]], tuple[State, Float[Array, ""]]]


def warmup_linear_decay(peak: float, steps: int) -> optax.Schedule:
    """Linear warm-up over the first 5% of the steps, then linear decay that ends at zero.

    No step is wasted on a rate of zero: the first has a share of the peak, the last a share too.
    """
    warmup = max(1, round(WARMUP * steps))

    def schedule(count: ArrayLike) -> Float[Array, ""]:
        taken = jnp.asarray(count, jnp.float32)
        rising = (taken + 1) / warmup
        falling = (steps - taken) / max(1, steps - warmup + 1)
        return peak * jnp.clip(jnp.minimum(rising, falling), 0, 1)

    return schedule


def count_examples(batch: Batch) -> int:
    return len(jax.tree.leaves(batch)[0])


def slice_examples(examples: Batch, start: int, size: int) -> Batch:
    return jax.tree.map(lambda leaf: leaf[start : start + size], examples)


def make_step(loss_fn: LossFn, tx: optax.GradientTransformationExtraArgs, method: Method) -> Step:
    """One training step, to be jitted: the whole training set and a batch's indices go in.

    The set lives on the device, so that a step moves a few kilobytes of indices and no images.
    `tx.update` gets the loss, its gradient and the loss as a function, as Optax's line searches do.
    """

    def step(
        state: State, examples: Batch, indices: Int[Any, " batch"]
    ) -> tuple[State, Float[Array, ""]]:
        batch = jax.tree.map(lambda leaf: leaf[indices], examples)
        rng, extra = state.rng, {}
        if method.needs_capture:
            sampled = {}
            if method.curvature in SAMPLED:
                rng, sampled["rng"] = jax.random.split(rng)
            capture = lp.value_grad_and_capture(
                loss_fn,
                transferred=method.transferred,
                curvature=method.curvature,
                defer_curvature=True,
            )
            loss, grads, extra["captured"] = capture(state.params, batch, **sampled)
        else:
            loss, grads = jax.value_and_grad(loss_fn)(state.params, batch)
        updates, opt_state = tx.update(
            grads,
            state.opt_state,
            state.params,
            value=loss,
            grad=grads,
            value_fn=lambda params: loss_fn(params, batch),
            **extra,
        )
        return State(optax.apply_updates(state.params, updates), opt_state, rng), loss

    return step


def compile_step(
    loss_fn: LossFn,
    method: Method,
    schedule: optax.Schedule,
    hyperparameters: Hyperparameters,
    params: Params,
    examples: Batch,
    batch_size: int,
    seed: int = 0,
) -> tuple[State, Step]:
    """Build the optimizer and compile its step. `params` are donated with the state."""
    layers = layers_for(loss_fn, method, params, examples, batch_size)
    tx = optax.with_extra_args_support(method.build(layers, schedule, **hyperparameters))
    # Under jit the state's arrays are fresh buffers of settled types: safe to donate, no retrace.
    start = jax.jit(lambda params, rng: State(params, tx.init(params), rng))
    state = start(params, jax.random.key(seed))
    step = jax.jit(make_step(loss_fn, tx, method), donate_argnums=0)
    indices = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    return state, step.lower(state, examples, indices).compile()


def compile_family(
    loss_fn: LossFn,
    method: Method,
    build: Callable[[Any, Numbers], optax.GradientTransformation],
    numbers: Numbers,
    params: Params,
    examples: Batch,
    batch_size: int,
) -> Family:
    """Compile a step whose optimizer `build(layers, numbers)` is made anew where it is traced.

    `numbers` give the names and types; a state is donated to its step, and so are the parameters
    that it started from.
    """
    layers = layers_for(loss_fn, method, params, examples, batch_size)

    def make(numbers: Numbers) -> optax.GradientTransformationExtraArgs:
        return optax.with_extra_args_support(build(layers, numbers))

    def begin(numbers: Numbers, params: Params, rng: Array) -> State:
        return State(params, make(numbers).init(params), rng)

    def step(
        numbers: Numbers, state: State, examples: Batch, indices: Int[Any, " batch"]
    ) -> tuple[State, Float[Array, ""]]:
        return make_step(loss_fn, make(numbers), method)(state, examples, indices)

    start = jax.jit(begin)
    state = jax.eval_shape(start, numbers, params, jax.random.key(0))
    indices = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    lowered = jax.jit(step, donate_argnums=1).lower(numbers, state, examples, indices)
    return Family(start, lowered.compile())


def layers_for(
    loss_fn: LossFn, method: Method, params: Params, examples: Batch, batch_size: int
) -> lp.Layers | None:
    """What the method's `build` needs to know of the network."""
    if not method.needs_capture:
        return None
    return lp.find_layers(loss_fn, params, slice_examples(examples, 0, batch_size))


def split_learning_rate(hyperparameters: Hyperparameters) -> tuple[float, Hyperparameters]:
    """The schedule's peak, and what remains for `Method.build`."""
    rest = dict(hyperparameters)
    return rest.pop("learning_rate"), rest


@contextlib.contextmanager
def interrupt_deferred() -> Iterator[None]:
    """Let Ctrl-C wait until the end of the block: for compilation.

    XLA finishes what it compiles in any case, and Python crashes at its exit when the interrupt is
    raised from there (JAX 0.10).
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is interrupted, and only it may change signal handlers
        return
    received: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if received:
        raise KeyboardInterrupt
