"""Dense networks with matching losses, and backpropagation through them in NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import strategies as st

import locoprop_jax as lp


def sigmoid(a):
    return np.exp(-np.logaddexp(0, -a))


def softmax(a):
    e = np.exp(a - a.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# name -> f for the network, f and f' for the reference
TRANSFERS = {
    "identity": (lambda a: a, lambda a: a, np.ones_like),
    "relu": (jax.nn.relu, lambda a: np.maximum(a, 0), lambda a: (a > 0).astype(float)),
    "leaky_relu": (
        jax.nn.leaky_relu,
        lambda a: np.where(a > 0, a, 0.01 * a),
        lambda a: np.where(a > 0, 1, 0.01),
    ),
    "sigmoid": (jax.nn.sigmoid, sigmoid, lambda a: sigmoid(a) * sigmoid(-a)),
    "softplus": (jax.nn.softplus, lambda a: np.logaddexp(a, 0), sigmoid),
    "tanh": (jnp.tanh, np.tanh, lambda a: 1 - np.tanh(a) ** 2),
    "home-made": (
        lambda a: a + jnp.arctan(a),
        lambda a: a + np.arctan(a),
        lambda a: 1 + 1 / (1 + a**2),
    ),
}

# name -> the loss of one row, and the f whose matching loss it is: its gradient is f(a) - y
HEADS = {
    "squared": (lambda a, y: optax.l2_loss(a, y).sum(-1), lambda a: a),
    "sigmoid": (lambda a, y: optax.sigmoid_binary_cross_entropy(a, y).sum(-1), sigmoid),
    "softmax": (optax.softmax_cross_entropy, softmax),
}

# name -> the Hessian of the loss of one row, the Jacobian of f, by f(a)
HESSIANS = {
    "squared": lambda p: np.eye(len(p)),
    "sigmoid": lambda p: np.diag(p * (1 - p)),
    "softmax": lambda p: np.diag(p) - np.outer(p, p),
}


@dataclasses.dataclass(frozen=True)
class Net:
    """A dense network with a matching loss, optionally over tokens and with weight decay in it."""

    widths: tuple[int, ...] = (3, 2)
    transfers: tuple[str, ...] = ()
    biases: tuple[bool, ...] = (True,)
    head: str = "sigmoid"
    batch: int = 5
    tokens: int | None = None
    mean_over_tokens: bool = True
    out_in: bool = False  # kernels are (d_out, d_in)
    decay: float = 0.0

    @property
    def names(self):
        return [f"layer{m}" for m in range(len(self.biases))]

    @property
    def terms(self):
        """c: how many terms the loss averages over."""
        return self.batch * (self.tokens or 1 if self.mean_over_tokens else 1)

    def params(self, seed=0):
        rng = np.random.default_rng(seed)
        params = {}
        for name, d_in, d_out, bias in zip(
            self.names, self.widths, self.widths[1:], self.biases, strict=False
        ):
            shape = (d_out, d_in) if self.out_in else (d_in, d_out)
            params[name] = {"kernel": jax.device_put(rng.normal(size=shape))}
            if bias:
                params[name]["bias"] = jax.device_put(rng.normal(size=d_out))
        return params

    def data(self, seed=1):
        rng = np.random.default_rng(seed)
        shape = (self.batch,) if self.tokens is None else (self.batch, self.tokens)
        y = rng.uniform(size=(*shape, self.widths[-1]))
        if self.head == "softmax":
            y /= y.sum(-1, keepdims=True)
        return jax.device_put((rng.normal(size=(*shape, self.widths[0])), y))

    def outputs(self, params, x):
        for name, transfer in zip(self.names, (*self.transfers, "identity"), strict=True):
            kernel = params[name]["kernel"]
            x = x @ (kernel.T if self.out_in else kernel)
            if "bias" in params[name]:
                x = x + params[name]["bias"].reshape((1,) * (x.ndim - 1) + (-1,))
            x = TRANSFERS[transfer][0](x)
        return x

    def loss(self, params, x, y):
        losses = HEADS[self.head][0](self.outputs(params, x), y)
        if self.tokens is not None and not self.mean_over_tokens:
            losses = losses.sum(-1)
        decay = sum(jnp.sum(p**2) for p in jax.tree.leaves(params))
        return losses.mean() + self.decay / 2 * decay

    def layers(self, **options):
        return lp.find_layers(self.loss, self.params(), *self.data(), **options)

    def block(self, params, name):
        """W: the kernel as (d_in, d_out), with the bias as its last row."""
        kernel = np.asarray(params[name]["kernel"])
        kernel = kernel.T if self.out_in else kernel
        bias = [np.asarray(params[name]["bias"])[None]] if "bias" in params[name] else []
        return np.concatenate([kernel, *bias])

    def backprop(self, params, x, y):
        """(X, A, E, f) of each layer: inputs with their one, pre-activations, dL/dA, transfer."""
        x = np.asarray(x).reshape(-1, self.widths[0])
        y = np.asarray(y).reshape(-1, self.widths[-1])
        blocks = [self.block(params, name) for name in self.names]
        ones = [np.ones((len(x), int(bias))) for bias in self.biases]
        inputs, outputs = [np.concatenate([x, ones[0]], 1)], [inputs_times(x, ones[0], blocks[0])]
        for m, transfer in enumerate(self.transfers):
            x = TRANSFERS[transfer][1](outputs[-1])
            inputs.append(np.concatenate([x, ones[m + 1]], 1))
            outputs.append(inputs_times(x, ones[m + 1], blocks[m + 1]))
        f_head = HEADS[self.head][1]
        cotangents = [(f_head(outputs[-1]) - y) / self.terms]
        for m in reversed(range(len(self.transfers))):
            back = cotangents[0] @ blocks[m + 1][: self.widths[m + 1]].T
            cotangents.insert(0, back * TRANSFERS[self.transfers[m]][2](outputs[m]))
        fs = [*(TRANSFERS[transfer][1] for transfer in self.transfers), f_head]
        return list(zip(inputs, outputs, cotangents, fs, strict=True))

    def gradients(self, params, x, y):
        """The gradient of the loss by each block, weight decay included."""
        return {
            name: x.T @ e + self.decay * self.block(params, name)
            for name, (x, _, e, _) in zip(self.names, self.backprop(params, x, y), strict=True)
        }

    def jacobian(self, params, x):
        """By how much each output of each row moves with each parameter, (rows, d_out, n).

        The parameters are in the order of `flat`.
        """
        layers = self.backprop(params, x, np.zeros((*np.shape(x)[:-1], self.widths[-1])))
        rows, back = len(layers[0][0]), np.eye(self.widths[-1])[None]
        blocks = [self.block(params, name) for name in self.names]
        found = {}
        for m in reversed(range(len(layers))):
            inputs = layers[m][0]
            by_block = inputs[:, None, :, None] * back[:, :, None]
            found[self.names[m]] = self.tree(m, by_block)
            if m > 0:
                slope = TRANSFERS[self.transfers[m - 1]][2](layers[m - 1][1])
                back = (back @ blocks[m][: self.widths[m]].T) * slope[:, None]
        leaves = jax.tree.leaves(found)
        return np.concatenate([leaf.reshape(rows, self.widths[-1], -1) for leaf in leaves], -1)

    def tree(self, m, block):
        """The parameters of a layer, of W by the last two axes."""
        kernel = block[..., : self.widths[m], :]
        parts = {"kernel": np.swapaxes(kernel, -1, -2) if self.out_in else kernel}
        return parts | ({"bias": block[..., -1, :]} if self.biases[m] else {})

    def gauss_newton(self, params, x, y):
        """J'HJ of the loss without its weight decay, in the order of `flat`."""
        j, (*_, (_, outputs, _, f)) = self.jacobian(params, x), self.backprop(params, x, y)
        hessians = [HESSIANS[self.head](p) for p in f(outputs)]
        return sum(jr.T @ h @ jr for jr, h in zip(j, hessians, strict=True)) / self.terms

    def slope(self, params, x, y):
        """The gradient of the loss, in the order of `flat`."""
        blocks = self.gradients(params, x, y)
        return flat({name: self.tree(m, blocks[name]) for m, name in enumerate(self.names)})

    def value(self, params, x, y):
        """The loss, compiled once for all parameters and batches of a shape."""
        return float(_compiled_loss(self)(params, x, y))

    def after(self, params, x, y):
        """(H, f') of each layer: dL/df(A), and the derivative of its transfer function.

        At the last layer, whose transfer function counts as the identity, H is E.
        """
        layers = self.backprop(params, x, y)
        blocks = [self.block(params, name) for name in self.names]
        result = []
        for m, transfer in enumerate(self.transfers):
            back = layers[m + 1][2] @ blocks[m + 1][: self.widths[m + 1]].T
            result.append((back, TRANSFERS[transfer][2]))
        return [*result, (layers[-1][2], np.ones_like)]


@functools.cache
def _compiled_loss(net):
    return jax.jit(net.loss)


def flat(tree):
    """All entries of a tree, in the order of `jax.flatten_util.ravel_pytree`."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def inputs_times(x, ones, block):
    return np.concatenate([x, ones], 1) @ block


DEEP = Net(widths=(3, 4, 2), transfers=("tanh",), biases=(True, True))


def update_function(net, tx):
    """(params, state, batch) -> (updates, state), compiled."""

    @jax.jit
    def update(params, state, *batch):
        capture = lp.value_grad_and_capture(net.loss, transferred=True)
        _, grads, captured = capture(params, *batch)
        return tx.update(grads, state, params, captured=captured)

    return update


def take_step(net, tx, params=None, batch=None):
    params = net.params() if params is None else params
    batch = net.data() if batch is None else batch
    updates, state = update_function(net, tx)(params, tx.init(params), *batch)
    return optax.apply_updates(params, updates), state


def assert_equal_to_rounding(actual, desired, error=1e-10):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        scale = max(1.0, np.abs(b).max(initial=0.0))
        np.testing.assert_allclose(a, b, rtol=error, atol=error * scale)


def assert_blocks(net, params, blocks, error=1e-10):
    assert_equal_to_rounding({name: net.block(params, name) for name in net.names}, blocks, error)


def averaged_factors(factors, decay, gathered, due):
    """After each step, the two factors of each layer as averaged at the last step that was due.

    Both are sums over the steps gathered, forgotten by `decay` a step, over what their weights are.
    """
    total, last, result = {name: (0.0, 0.0) for name in factors[0]}, 0, {}
    for count, now in enumerate(factors):
        if count in gathered:
            kept, last = decay ** (count + 1 - last), count + 1
            for name, pair in total.items():
                pairs = zip(pair, now[name][:2], strict=True)
                total[name] = tuple(kept * old + (1 - kept) * new for old, new in pairs)
        if count in due:
            result = {n: [f / (1 - decay**last) for f in pair] for n, pair in total.items()}
        yield result


@st.composite
def nets(draw):
    depth = draw(st.integers(1, 3))
    return Net(
        widths=tuple(draw(st.lists(st.integers(1, 6), min_size=depth + 1, max_size=depth + 1))),
        transfers=tuple(draw(st.sampled_from(list(TRANSFERS))) for _ in range(depth - 1)),
        biases=tuple(draw(st.booleans()) for _ in range(depth)),
        head=draw(st.sampled_from(list(HEADS))),
        batch=draw(st.integers(1, 6)),
        tokens=draw(st.none() | st.integers(1, 3)),
        mean_over_tokens=draw(st.booleans()),
        out_in=draw(st.booleans()),
        decay=draw(st.sampled_from([0.0, 0.1])),
    )


def one_more_refused(state):
    """The state after a batch that it refused: as it was, but for the counters of these."""

    def count(path, leaf):
        return leaf + 1 if jax.tree_util.keystr(path[-1:]) == ".refused" else leaf

    return jax.tree_util.tree_map_with_path(count, state)
