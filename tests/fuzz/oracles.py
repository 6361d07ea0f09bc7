"""What has to hold for every program: each oracle compares capture or a method with plain JAX."""

import contextlib
import dataclasses
import functools
import re
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax

import locoprop_jax as lp
from locoprop_jax._layers.layers import parameter_paths, replace
from locoprop_jax._trees import leaves_by_path, path_name
from tests.fuzz.build import Built
from tests.fuzz.interpret import run
from tests.helpers import brought_back
from tests.test_contract import METHODS

TOLERANCE = {"float64": 1e-8, "float32": 2e-3, "bfloat16": 0.3}
MAX_OUTPUTS = 40  # of programs whose curvature is compared with a dense one
MAX_ENTRIES = 400
# A few steps on a local loss descend if they are short; how short depends on the layer's inputs.
SHORTER = {"locoprop_s": 1e-2, "locoprop_m": 1e-2, "scale_by_local_loss": 1e-2}


class Failure(Exception):
    """An oracle does not hold.

    Attributes:
      oracle: which one, with what went wrong in so many words that a shrunk program has them too.
    """

    def __init__(self, oracle: str, details: str = ""):
        super().__init__(f"{oracle}: {details}")
        self.oracle = oracle


@dataclasses.dataclass
class Findings:
    """What a program showed beside that nothing failed.

    Attributes:
      checked: the oracles that were asked.
      refused: the reasons that were given for parameters in no layer, and by whole losses.
    """

    checked: list[str] = dataclasses.field(default_factory=list)
    refused: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A program as the oracles see it."""

    built: Built
    layers: lp.Layers
    findings: Findings

    @property
    def dtype(self) -> str:
        return self.built.program.dtype

    @property
    def arguments(self):
        return self.built.params, *self.built.batch

    @property
    def has_aux(self):
        return self.built.program.aux

    def capture(self, **options):
        return lp.value_grad_and_capture(self.built.loss_fn, has_aux=self.has_aux, **options)

    def loss(self, *args):
        """The loss alone."""
        result = self.built.loss_fn(*args)
        return result[0] if self.has_aux else result


def _close(oracle: str, found: Any, expected: Any, tolerance: float) -> None:
    """Compare trees, each leaf by the size of the largest of its entries."""
    if jax.tree.structure(found) != jax.tree.structure(expected):
        raise Failure(oracle, "other structure")
    pairs = zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True)
    for (path, a), b in pairs:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        name = jax.tree_util.keystr(path)
        if a.shape != b.shape:
            raise Failure(oracle, f"{name} has the shape {a.shape}, not {b.shape}")
        if not np.all(np.isfinite(b)):
            continue
        scale = max(1.0, float(np.max(np.abs(b), initial=0)))
        error = float(np.max(np.abs(a - b), initial=0)) / scale
        if not error <= tolerance:
            raise Failure(oracle, f"{name} is off by {error:.1e} of {scale:.1e}:\n{a}\n{b}")


# --- one step: gradients, arrays, methods ---------------------------------------------------------


def step(s: Setting, names: Sequence[str]) -> None:
    """Gradients, arrays and updates of one step are what they have to be.

    Loss and gradients are JAX's; X'E is what of them has met data; X W is A; each method's update
    is finite and descends. They are one function, traced once.
    """
    methods = {name: tx for name in names if (tx := _method(s, name)) is not None}
    built = s.built

    def everything(params, *batch):
        found, grads, captured = s.capture(transferred=True)(params, *batch)
        expected = jax.value_and_grad(built.loss_fn, has_aux=s.has_aux)(params, *batch)
        of_data = jax.grad(built.data_loss)(params, *batch) if built.program.decay else expected[1]
        value = found[0] if s.has_aux else found
        line = {"value": value, "grad": grads, "value_fn": lambda p: s.loss(p, *batch)}
        updates = {}
        for name, tx in methods.items():
            with _refusals(s, name):
                updates[name] = tx.update(
                    grads, tx.init(params), params, captured=captured, **line
                )[0]
        back = brought_back(s.layers, captured, of_data)
        return (found, grads), expected, back, of_data, _products(s, captured, params), updates

    found, expected, back, of_data, products, updates = run(everything, *s.arguments)
    tolerance = TOLERANCE[s.dtype]
    _close("loss and gradients", found, expected, tolerance)
    _close("X'E", back, _met_data(s, back, of_data, expected[1]), tolerance)
    _close("X W", *products, tolerance)
    s.findings.checked += ["loss and gradients", "X'E", "X W"]
    for name, update in updates.items():
        _check_update(name, expected[1], of_data, update)
        s.findings.checked.append(name)


def _met_data(s, back, of_data, grads):
    """What X'E should be: of a parameter that is a layer at its own value, penalties too."""
    alone = {
        own.path
        for layer in s.layers.values()
        for own in layer.parameters
        if layer.kind == "bias" and layer.rows == 1 and layer.uses == 1
    }

    def nearer(path, found, data, whole):
        is_whole = np.sum(np.abs(found - whole)) < np.sum(np.abs(found - data))
        return whole if path_name(path) in alone and is_whole else data

    return jax.tree_util.tree_map_with_path(nearer, back, of_data, grads)


def _products(s, captured, params):
    """Inputs times weights, and outputs."""
    found, expected = {}, {}
    for name, layer in s.layers.items():
        if layer.kind == "bias" or not all(hasattr(own, "path") for own in layer.parts.values()):
            continue
        arrays, weights = captured[name], layer.block(params)
        x = _extended(layer, arrays.inputs, weights.dtype)
        # In a branch that did not run all is zero.
        ran = jnp.any(arrays.outputs != 0, -1, keepdims=True)
        found[name] = jnp.where(ran, jnp.einsum("...bsi,...io->...bso", x, weights), 0)
        expected[name] = arrays.outputs
    return found, expected


def _extended(layer, x, dtype):
    """Inputs with a one for the bias."""
    x = x.astype(dtype)
    if layer.bias is None:
        return x
    return jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1), dtype)], -1)


def _method(s: Setting, name: str) -> Any:
    """A method of the contract for this program; None where it does not apply."""
    row, built = METHODS[name], s.built
    covered = parameter_paths(s.layers)
    is_covered = all(path in covered for path in leaves_by_path(built.params))
    if name.startswith("natural_gradient") and built.program.shape[0] != 6:
        return None  # which the contract's is built for
    if row.is_whole and (not is_covered or s.has_aux):
        return None
    with _refusals(s, name):
        tx = row.build(s.layers, SHORTER.get(name, 1.0) * row.learning_rate, **row.options)
        return tx if is_covered else lp.with_fallback(tx, s.layers, optax.sgd(0.1))
    return None


@contextlib.contextmanager
def _refusals(s: Setting, name: str):
    """Count what the library refuses; anything else is raised."""
    try:
        yield
    except ValueError as error:
        if not is_own(error):
            raise
        s.findings.refused.append(f"{name}: {first_words(error)}")


def _check_update(name: str, grads: Any, of_data: Any, updates: Any) -> None:
    """Finite, and descending unless the data have nothing to say."""
    g, d, u = (
        np.concatenate([np.ravel(leaf).astype(float) for leaf in jax.tree.leaves(tree)])
        for tree in (grads, of_data, updates)
    )
    if not np.all(np.isfinite(g)):
        return
    if not np.all(np.isfinite(u)):
        raise Failure(f"{name} is finite", str(updates))
    if d @ d > 1e-10 * (1 + g @ g) and not g @ u < 0:
        raise Failure(f"{name} descends", f"{g @ u} for |g|^2 = {g @ g}\n{grads}\n{updates}")


# --- curvature -----------------------------------------------------------------------------------


def curvature(s: Setting) -> None:
    """The columns of each layer's curvature give its block of the dense Gauss-Newton matrix."""
    built = s.built
    if s.dtype != "float64" or built.mixes_examples or not built.batch:
        return
    if any(head.options["kernel"] == "none" for head in built.program.heads):
        return  # an unmarked loss begins at the outputs of a layer
    zs = jax.tree.leaves(jax.eval_shape(built.outputs, *s.arguments))
    sizes = sum(p.size for p in jax.tree.leaves(built.params))
    if sum(z.size for z in zs) > MAX_OUTPUTS or sizes > MAX_ENTRIES:
        return
    try:
        captured = jax.eval_shape(s.capture(curvature="ggn_exact"), *s.arguments)[2]
    except ValueError as error:
        if not is_own(error):
            raise
        s.findings.refused.append(f"ggn_exact: {first_words(error)}")
        return
    if captured.has_joint_columns or not captured.are_apart:
        s.findings.refused.append("ggn_exact: columns are not by example")
        return
    single = [n for n, layer in s.layers.items() if layer.rows is not None and layer.kind != "tied"]

    def everything(params, *batch):
        arrays = s.capture(curvature="ggn_exact")(params, *batch)[2]
        own, whole = {}, {}
        matrix = _dense(built, params, batch)
        points = arrays.points
        for name in single:
            layer = s.layers[name]
            c = arrays[name].curvature
            x = _extended(layer, arrays[name].inputs, c.dtype)
            # Each column of each example as a gradient.
            g = jnp.einsum("...bsi,...kbso->kb...io", x, c)
            g = g.reshape(-1, *g.shape[2:])

            def as_tree(block, name=name, layer=layer):
                nothing = jax.tree.map(jnp.zeros_like, params)
                new = {name: layer.split(block)}
                return replace(s.layers, nothing, new, space="gradients", points=points)

            rows = jax.vmap(lambda b: jax.flatten_util.ravel_pytree(as_tree(b))[0])(g)
            paths = {parameter.path for parameter in layer.parameters}
            mine = _mask(params, layer, paths)
            own[name] = rows.T @ rows
            whole[name] = matrix * mine[:, None] * mine[None]
        return own, whole

    found, expected = run(everything, *s.arguments)
    _close("curvature", found, expected, 1e-6)
    s.findings.checked += ["curvature"]


def _mask(params, layer, paths):
    """Ones at the entries of a layer's parameters, of parts of them too."""
    ones = layer_entries(params, layer, paths)
    return jax.flatten_util.ravel_pytree(ones)[0]


def layer_entries(params, layer, paths):
    leaves = {path: np.zeros(leaf.shape) for path, leaf in leaves_by_path(params).items()}
    for parameter in layer.parameters:
        part = getattr(parameter, "part", None)
        if part is None:
            leaves[parameter.path][...] = 1.0
        else:
            indices = np.arange(leaves[parameter.path].size).reshape(leaves[parameter.path].shape)
            leaves[parameter.path].reshape(-1)[np.asarray(part.take(indices)).reshape(-1)] = 1.0
    treedef = jax.tree.structure(params)
    order = list(leaves_by_path(params))
    return jax.tree.unflatten(treedef, [leaves[path] for path in order])


def _dense(built, params, batch):
    """J'HJ of all outputs by all parameters, H that of the loss by its outputs."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)

    def outputs(flat):
        return jax.flatten_util.ravel_pytree(built.outputs(unravel(flat), *batch))[0]

    zs, unravel_z = jax.flatten_util.ravel_pytree(built.outputs(params, *batch))
    jacobian = jax.jacrev(outputs)(flat)
    hessian = jax.hessian(lambda z: built.loss_of(unravel_z(z), *batch))(zs)
    return jacobian.T @ hessian @ jacobian


# --- compiled ------------------------------------------------------------------------------------


def compiled(s: Setting) -> None:
    """Under `jax.jit`, and so in XLA and not in NumPy, all is the same."""

    def everything(params, *batch):
        value, grads, captured = s.capture()(params, *batch)
        arrays = {n: (captured[n].inputs, captured[n].cotangents) for n in s.layers}
        return value, grads, arrays

    with_xla = jax.jit(everything, compiler_options={"xla_backend_optimization_level": 0})(
        *s.arguments
    )
    with_numpy = run(everything, *s.arguments)
    _close("jit", with_numpy, with_xla, TOLERANCE[s.dtype])
    s.findings.checked += ["jit"]


# --- all of them ---------------------------------------------------------------------------------


def first_words(error: Exception | str) -> str:
    """What an error says, without the names of this program."""
    text = re.sub(r"['`\"][^'`\"]*['`\"]", "_", str(error).replace("\n", " "))
    return re.sub(r"\d+", "N", text)[:90]


def is_own(error: Exception) -> bool:
    """Whether it is a refusal that the library raised itself."""
    *_, (last, _) = traceback.walk_tb(error.__traceback__)
    return last.f_globals["__name__"].startswith("locoprop_jax")


def check(
    built: Built,
    names: tuple[str, ...],
    with_jit: bool = False,
    more: tuple[Callable[[Setting], None], ...] = (),
) -> Findings:
    """Ask all oracles about a program.

    Args:
      built: the program.
      names: of the methods that take a step.
      with_jit: whether it is compiled too.
      more: further oracles.

    Raises:
      Failure: one does not hold, or something else was raised on the way.
    """
    findings = Findings()
    place = "JAX itself"
    try:
        jax.eval_shape(built.loss_fn, built.params, *built.batch)
        place = "find_layers"
        layers = lp.find_layers(
            built.loss_fn,
            built.params,
            *built.batch,
            has_aux=built.program.aux,
            on_uncaptured="pass",
        )
        s = Setting(built, layers, findings)
        findings.refused += [
            f"uncaptured: {first_words(str(other.reason))}"
            for other in layers.uncaptured
            if other.has_gradient
        ]
        oracles: list[Callable[[Setting], None]] = [functools.partial(step, names=names), curvature]
        oracles += [compiled] if with_jit else []
        for oracle in (*oracles, *more):
            place = getattr(oracle, "__name__", "step")
            oracle(s)
    except Failure:
        raise
    except Exception as error:
        raise Failure(f"{place} raises {type(error).__name__}: {first_words(error)}") from error
    return findings
