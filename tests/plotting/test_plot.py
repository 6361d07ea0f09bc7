"""What is drawn is what the layers are: their sizes, and the eigenvalues of their inputs."""

import sys

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest

import locoprop_jax as lp
from tests.helpers import quick_jit

WORDS = jnp.array([[0, 1, 1], [4, 1, 2], [0, 0, 1], [5, 2, 2]])


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def loss_fn(params, words):
    h = params["table"][words]
    h = jnp.tanh(h @ params["free"]["kernel"] + params["free"]["bias"][None, None])
    h = jnp.tanh(h @ params["bound"]) * params["scale"][None, None]
    h = jnp.einsum("sbti,sio->sbto", jnp.stack([h, jnp.cos(h)]), params["stack"])
    h = jnp.tanh(h).sum(0)
    window = jax.lax.conv_general_dilated(
        h, params["conv"], (1,), "SAME", dimension_numbers=("NTC", "TIO", "NTC")
    )
    return jnp.mean(window**2)


PARAMS = {
    "table": normal(0, 6, 5),
    "free": {"kernel": normal(1, 5, 4), "bias": normal(2, 4)},
    "bound": normal(3, 4, 4),
    "scale": normal(4, 4),
    "stack": normal(5, 2, 4, 3),
    "conv": normal(6, 2, 3, 2),
}


@pytest.fixture(autouse=True)
def agg():
    matplotlib.use("Agg")
    yield
    from matplotlib import pyplot

    pyplot.close("all")


@pytest.fixture(scope="module")
def model():
    layers = lp.find_layers(loss_fn, PARAMS, WORDS)
    captured = quick_jit(lp.value_grad_and_capture(loss_fn))(PARAMS, WORDS)[2]
    return layers, captured


def rows(captured, name):
    x = np.asarray(captured[name].inputs, np.float64)
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])


def curves(panel):
    """The lines of a panel by label; those of a stack are unlabelled from the second on."""
    found = {}
    for line in panel.get_lines():
        label = line.get_label()
        last = list(found)[-1] if label.startswith("_child") else label
        found.setdefault(last, []).append(np.asarray(line.get_ydata()))
    return found


def eigenvalues(x, centred=False):
    x = x - x.mean(0) if centred else x
    values = np.linalg.eigvalsh(x.T @ x / len(x))[::-1]
    return np.where(values > 1e-12, values, np.nan)


def seen(values):
    return np.where(values > 1e-12, values, np.nan)


SECOND, CENTRED = "eigenvalues of X'X / N", "about the mean, with a bias"


def test_the_spectra_are_numpys(model):
    layers, captured = model
    figure = lp.plot.spectra(layers, captured)
    figure.canvas.draw()
    panels = {axes.get_title(loc="left").partition("\n")[0]: axes for axes in figure.axes}
    names = [name for name in layers if name != "scale"]
    assert [name for name in panels if name] == names
    for name in names:
        found, x = curves(panels[name]), rows(captured, name)
        each = x if x.ndim == 3 else x[None]
        assert len(found[SECOND]) == len(each) == (2 if name == "stack" else 1)
        for line, own in zip(found[SECOND], each, strict=True):
            np.testing.assert_allclose(seen(line), eigenvalues(own), rtol=1e-9, err_msg=name)
        assert (CENTRED in found) == (name == "free")
    found, x = curves(panels["free"]), rows(captured, "free")
    np.testing.assert_allclose(seen(found[CENTRED][0]), eigenvalues(x, True), rtol=1e-9)


@pytest.mark.parametrize("name", ["free", "bound"])
@pytest.mark.parametrize("damping, relative", [(0.3, True), (0.07, False)])
def test_damping_and_effective_rank_are_where_they_belong(model, name, damping, relative):
    layers, captured = model
    figure = lp.plot.spectra(layers, captured, names=[name], damping=damping, relative=relative)
    (panel,) = figure.axes
    x = rows(captured, name)
    moments = (x - x.mean(0) if name == "free" else x) ** 2
    amount = damping * (moments.mean() if relative else 1)
    (shade,) = panel.patches
    assert shade.get_y() + shade.get_height() == pytest.approx(amount, rel=1e-6)
    values = eigenvalues(x, name == "free")
    share = values / np.nansum(values)
    rank = np.exp(-np.nansum(share * np.log(share)))
    undamped = np.nansum(values / (values + amount))
    (line,) = (own for own in panel.get_lines() if own.get_label() == "effective rank")
    np.testing.assert_allclose(line.get_xdata(), rank, rtol=1e-6)
    text = f"{name}\neffective rank {rank:.1f} of {x.shape[1]}, {undamped:.1f} undamped"
    assert panel.get_title(loc="left") == text


def test_of_many_layers_twelve_are_drawn_from_first_to_last():
    params = {f"layer{i}": normal(i, 2, 2) for i in range(14)}

    def loss(params, x):
        for own in params.values():
            x = jnp.tanh(x @ own)
        return jnp.mean(x)

    x = normal(0, 4, 2)
    layers = lp.find_layers(loss, params, x)
    captured = quick_jit(lp.value_grad_and_capture(loss))(params, x)[2]
    figure = lp.plot.spectra(layers, captured)
    drawn = [axes.get_title(loc="left").partition("\n")[0] for axes in figure.axes]
    names = list(layers)
    assert len(drawn) == 12 and drawn == sorted(drawn, key=names.index)
    assert (drawn[0], drawn[-1]) == (names[0], names[-1])


def test_inputs_that_are_zero_are_drawn_too():
    loss = lambda w, x: jnp.mean((x @ w["kernel"]) ** 2)  # noqa: E731
    w, x = {"kernel": jnp.ones((3, 2))}, jnp.zeros((4, 3))
    captured = lp.value_grad_and_capture(loss)(w, x)[2]
    figure = lp.plot.spectra(lp.find_layers(loss, w, x), captured, damping=0.0)
    figure.canvas.draw()
    assert np.isnan(curves(figure.axes[0])[SECOND][0]).all()


# --- layers --------------------------------------------------------------------------------------


def test_bars_are_parameters_and_diamonds_second_moments(model):
    layers, _ = model
    figure = lp.plot.layers(layers)
    figure.canvas.draw()
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == [own.size for own in layers.values()]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(layers)
    kept = {"table": 6, "free": 25, "bound": 16, "stack": 2 * 16, "conv": 36}
    diamonds = {line.get_ydata()[0]: line.get_xdata()[0] for line in axes.get_lines()}
    assert diamonds == {y: kept[name] for y, name in enumerate(layers) if name in kept}
    colours = {}
    for bar, own in zip(axes.patches, layers.values(), strict=True):
        assert colours.setdefault(own.kind, bar.get_facecolor()) == bar.get_facecolor()
    assert len(set(colours.values())) == len(colours) == 4


def test_folded_layers_share_a_bar():
    params = {f"h{i}": normal(i, 3, 3) for i in range(5)}
    loss = lambda p, x: jnp.mean(jax.tree.reduce(lambda x, w: jnp.tanh(x @ w), p, x))  # noqa: E731
    layers = lp.find_layers(loss, params, normal(0, 4, 3))
    (axes,) = lp.plot.layers(layers, fold=True).axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["h{0..4}"]
    assert [bar.get_width() for bar in axes.patches] == [5 * 9]
    assert [line.get_xdata()[0] for line in axes.get_lines()] == [5 * 9]
    assert len(lp.plot.layers(layers).axes[0].patches) == 5


# --- what is refused -----------------------------------------------------------------------------


def test_what_cannot_be_drawn_is_refused(model):
    layers, captured = model
    for names in (["scale"], ["nowhere", "free"], []):
        with pytest.raises(ValueError, match=r"no spectrum to draw.* table, free, bound"):
            lp.plot.spectra(layers, captured, names=names)
    with pytest.raises(ValueError, match="must not be negative"):
        lp.plot.spectra(layers, captured, damping=-1.0)
    with pytest.raises(TypeError, match="needs the activations"):
        lp.plot.spectra(layers, None)
    with pytest.raises(ValueError, match="needs the layers of the model"):
        lp.plot.layers(PARAMS)

    def traced(params):
        return lp.plot.spectra(layers, lp.value_grad_and_capture(loss_fn)(params, WORDS)[2])

    with pytest.raises(ValueError, match="`captured` is traced: return it"):
        jax.eval_shape(traced, PARAMS)


def test_a_missing_matplotlib_is_an_error_with_the_remedy(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (lp.plot.layers, lambda layers: lp.plot.spectra(*model)):
        with pytest.raises(ModuleNotFoundError, match="Matplotlib: pip install matplotlib"):
            draw(model[0])
