"""The two sides of `kfac_peer`: K-FAC here, and kfac-jax in a process of its own."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

import locoprop_jax as lp
from benchmarks.shared.methods import Choice, Hyperparameters, LogUniform, SearchSpace
from benchmarks.shared.training import Problem

HERE = Path(__file__).parent
CHILD = HERE / "kfac_peer_child.py"
REQUIREMENTS = HERE / "kfac_peer_requirements.txt"

OUR_DEFAULTS: Hyperparameters = {"damping": 1.0, "step_damping": 0.1}
OUR_SPACE: SearchSpace = {
    "damping": LogUniform(1e-2, 100.0),
    "step_damping": LogUniform(1e-3, 10.0),
}
THEIR_DEFAULTS: Hyperparameters = {"adaptive": 1.0, "damping": 150.0}
THEIR_SPACE: SearchSpace = {
    "adaptive": Choice((1.0, 0.0)),
    "damping": LogUniform(0.01, 1000.0),
    "learning_rate": LogUniform(0.01, 3.0),
    "momentum": Choice((0.0, 0.5, 0.9)),
}
THEIR_EXAMPLE: Mapping[str, Any] = {
    "l2_reg": 1e-5,
    "curvature_ema": 0.95,
    "num_burnin_steps": 5,
}
THEIR_ADAPTATION: Mapping[str, Any] = {
    "use_adaptive_learning_rate": True,
    "use_adaptive_momentum": True,
    "use_adaptive_damping": True,
    "damping_adaptation_interval": 5,
    "damping_adaptation_decay": 0.95,
    "min_damping": 1e-5,
    "max_damping": 1000.0,
}

Weights = dict[str, np.ndarray]  # kernel0, bias0, kernel1, ...


class Side(Protocol):
    """One implementation of K-FAC, and where its run stands."""

    def start(self, values: Hyperparameters) -> float:
        """Begin a run at the initial parameters; the seconds that this took."""
        ...

    def steps(self, count: int) -> tuple[float, list[float]]:
        """Take steps: their seconds, and the loss of each batch before its step."""
        ...

    def weights(self) -> Weights: ...


# --- here ----------------------------------------------------------------------------------------


def our_optimizer(
    layers: lp.Layers, inverse_period: int, **values: Any
) -> optax.GradientTransformationExtraArgs:
    return lp.kfac(layers, inverse_period=inverse_period, **values)


def our_step(loss_fn: Callable[..., Array], layers: lp.Layers, inverse_period: int) -> Any:
    """`init` and `step`, which take the hyperparameters as arrays: trials compile nothing anew."""
    capture = lp.value_grad_and_capture(loss_fn, curvature="ggn_mc", defer_curvature=True)

    def init(params: Any, values: Any) -> Any:
        return our_optimizer(layers, inverse_period, **values).init(params)

    def step(params: Any, state: Any, values: Any, batch: Array, key: Array) -> Any:
        loss, grads, captured = capture(params, batch, rng=key)
        updates, state = our_optimizer(layers, inverse_period, **values).update(
            grads,
            state,
            params,
            captured=captured,
            value=loss,
            grad=grads,
            value_fn=lambda p: loss_fn(p, batch),
        )
        return optax.apply_updates(params, updates), state, loss

    return jax.jit(init), jax.jit(step, donate_argnums=(0, 1))


class Ours:
    def __init__(
        self, problem: Problem, params: Any, order: Int[np.ndarray, "steps batch"], period: int
    ) -> None:
        self.problem, self.order, self.period = problem, order, period
        self.initial = jax.device_get(params)
        self.functions: Any = None

    def start(self, values: Hyperparameters) -> float:
        begin = time.perf_counter()
        self.params = jax.tree.map(jnp.array, self.initial)  # copies: the step is given them
        if self.functions is None:
            layers = lp.find_layers(self.problem.loss_fn, self.params, self._batch(0))
            self.functions = our_step(self.problem.loss_fn, layers, self.period)
        self.values = {name: jnp.float32(value) for name, value in values.items()}
        self.state = jax.block_until_ready(self.functions[0](self.params, self.values))
        self.taken = 0
        return time.perf_counter() - begin

    def steps(self, count: int) -> tuple[float, list[float]]:
        batches = [self._batch(self.taken + i) for i in range(count)]
        keys = list(jax.random.split(jax.random.key(self.taken), count))
        jax.block_until_ready((batches, keys))
        losses = []
        begin = time.perf_counter()
        for batch, key in zip(batches, keys, strict=True):
            self.params, self.state, loss = self.functions[1](
                self.params, self.state, self.values, batch, key
            )
            losses.append(loss)
        jax.block_until_ready(self.params)
        seconds = time.perf_counter() - begin
        self.taken += count
        return seconds, [float(loss) for loss in losses]

    def weights(self) -> Weights:
        return as_weights(self.params)

    def _batch(self, step: int) -> Float[Array, "batch 784"]:
        return jnp.array(self.problem.train[self.order[step]])


def as_weights(params: Any) -> Weights:
    layers = params["params"]
    return {
        f"{name}{i}": np.array(layers[f"Dense_{i}"][name])
        for i in range(len(layers))
        for name in ("kernel", "bias")
    }


def as_params(weights: Weights) -> Any:
    return {
        "params": {
            f"Dense_{i}": {name: weights[f"{name}{i}"] for name in ("kernel", "bias")}
            for i in range(sum(name.startswith("kernel") for name in weights))
        }
    }


# --- there ---------------------------------------------------------------------------------------


class PeerError(RuntimeError):
    """The other process, or its environment, failed; the message has what it said."""


class Child:
    """A process that answers a line of JSON with a line of JSON; `kfac_peer_child.py` says which.

    Args:
      command: starts it.
    """

    def __init__(self, command: Sequence[str]) -> None:
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
            )
        except OSError as error:
            raise PeerError(f"{command[0]} cannot be started: {error.strerror}.") from error

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Raises PeerError where the answer is an error, is none, or does not come."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self._process.wait()
            raise PeerError(f"The peer's process ended with status {status} when asked to {do}.")
        try:
            answer = json.loads(line)
        except ValueError as error:
            raise PeerError(f"The peer answered {line!r} when asked to {do}.") from error
        if "error" in answer:
            raise PeerError(f"The peer failed when asked to {do}:\n{answer['error']}")
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()  # the end of its requests
        except BrokenPipeError:
            pass
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def used(values: Hyperparameters) -> Hyperparameters:
    """Without those of kfac-jax that adapt, which a search draws all the same."""
    if values.get("adaptive"):
        return {name: values[name] for name in ("adaptive", "damping")}
    return dict(values)


def their_settings(values: Hyperparameters, inverse_period: int) -> dict[str, Any]:
    """The options of `kfac_jax.Optimizer` and the arguments of its `step`."""
    options = dict(THEIR_EXAMPLE) | {"inverse_update_period": inverse_period}
    if values["adaptive"]:
        options |= dict(THEIR_ADAPTATION) | {"initial_damping": values["damping"]}
        return {"options": options, "arguments": {}}
    names = ("learning_rate", "momentum", "damping")
    return {"options": options, "arguments": {name: values[name] for name in names}}


class Theirs:
    def __init__(
        self,
        child: Child,
        images: Float[np.ndarray, "images 784"],
        order: Int[np.ndarray, "steps batch"],
        initial: Weights,
        inverse_period: int,
        directory: Path,
    ) -> None:
        self.child, self.inverse_period, self.directory = child, inverse_period, directory
        arrays = directory / "problem.npz"
        np.savez(arrays, images=images, order=order, **initial)  # pyright: ignore[reportArgumentType]
        self.machine = child.ask("load", arrays=str(arrays))

    def start(self, values: Hyperparameters) -> float:
        return self.child.ask("start", **their_settings(values, self.inverse_period))["seconds"]

    def steps(self, count: int) -> tuple[float, list[float]]:
        answer = self.child.ask("steps", count=count)
        return answer["seconds"], answer["losses"]

    def weights(self) -> Weights:
        path = self.directory / "weights.npz"
        self.child.ask("save", path=str(path))
        with np.load(path) as content:
            return dict(content)


def child_command(python: Path) -> list[str]:
    # -I: neither this directory's modules nor what PYTHONPATH names
    return [str(python), "-I", str(CHILD)]


def make_environment(directory: Path) -> Path:
    """The Python of an environment with the peer, made where it is not there yet."""
    home = (
        directory
        / hashlib.sha256(
            (sys.version + sys.base_prefix).encode() + REQUIREMENTS.read_bytes()
        ).hexdigest()[:16]
    )
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = home / "installed"  # written last
    if not stamp.exists():
        print(f"Installing kfac-jax into {home}.", file=sys.stderr)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        for command in (
            [sys.executable, "-m", "venv", "--clear", home],
            [*pip, "--requirement", REQUIREMENTS],
        ):
            if subprocess.run(list(map(str, command))).returncode:
                raise PeerError(
                    f"kfac-jax could not be installed into {home}, see above. Name a Python that "
                    f"has what {REQUIREMENTS.name} lists with --peer-python."
                )
        stamp.touch()
    return python
