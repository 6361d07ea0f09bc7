"""The table of a large model fits a screen; all of it is there as plain data."""

import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import locoprop_jax as lp
from locoprop_jax._layers.table import left_out
from tests.layers.test_folding import expand

COUNT = 24


def normal(*shape):
    return jnp.ones(shape)


def squares(outputs):
    return jnp.mean(outputs**2)


def deep(block, count=COUNT):
    """The layers of a model of equal blocks, whose first is given to `block` as number 0."""
    params = {"in": normal(3, 4), "out": {"kernel": normal(4, 2), "bias": normal(2)}}
    for number in range(count):
        params[f"h_{number}"] = {
            "up": {"kernel": normal(4, 6), "bias": normal(6)},
            "down": {"kernel": normal(6, 4)},
        }

    def loss(params, x):
        h = x @ params["in"]
        for number in range(count):
            h = block(params[f"h_{number}"], h, number)
        return squares(h @ params["out"]["kernel"] + params["out"]["bias"][None, None])

    return loss, params, normal(5, 7, 3)


def residual(params, h, number):
    inner = h @ params["up"]["kernel"] + params["up"]["bias"][None, None]
    return h + (jnp.sin if number == 0 else jnp.tanh)(inner) @ params["down"]["kernel"]


TABLE = """\
layer           times  kind   shape   bias  rows  transfer                        parameters
--------------------------------------------------------------------------------------------
in                  1  dense  3 -> 4  no       7  identity: used by 2 operations          12
h_0/up              1  dense  4 -> 6  yes      7  sin                                     30
h_{0..23}/down     24  dense  6 -> 4  no       7  identity: then `add`                   576
h_{1..23}/up       23  dense  4 -> 6  yes      7  tanh                                   690
out                 1  dense  4 -> 2  yes      7  (loss)                                  10
50 layers, 1,318 parameters
{0..2} in a name stands for 0, 1 and 2; such a line counts the parameters of all its layers.
`print(layers.table(fold=False))` shows each layer."""


@pytest.fixture(scope="module")
def large():
    return lp.find_layers(*deep(residual))


def lines_of(table):
    """The names and the parameters of a table's lines, and the total."""
    _, _, *lines = table.splitlines()
    lines = lines[: next(i for i, line in enumerate(lines) if " layers, " in line) + 1]
    count = [int(own[-1].replace(",", "")) for line in lines[:-1] if (own := line.split())]
    return [line.split()[0] for line in lines[:-1]], count, lines[-1]


def test_equal_blocks_of_a_large_model_share_their_lines(large):
    assert str(large) == large.table() == large.table(fold=True) == TABLE


def test_a_folded_table_has_the_layers_and_totals_of_the_other(large):
    names, counts, total = lines_of(str(large))
    each, sizes, total_of_each = lines_of(large.table(fold=False))
    assert each == list(large) and sizes == [layer.size for layer in large.values()]
    assert sorted(name for line in names for name in expand(line)) == sorted(each)
    assert sum(counts) == sum(sizes)
    assert total == total_of_each == f"{len(each)} layers, {sum(sizes):,} parameters"


def test_a_small_model_is_folded_only_if_asked():
    layers = lp.find_layers(*deep(residual, 4))
    assert str(layers) == layers.table(fold=False)
    assert "h_{1..3}/up" in layers.table(fold=True)


def test_nothing_to_fold_is_the_table_without_counts():
    layers = lp.find_layers(*deep(residual, 1))
    assert layers.table(fold=True) == str(layers)


def refused(params, h, number):
    powers = jnp.exp(params["up"]["bias"])[None, None]
    return h + (h @ params["up"]["kernel"]) ** powers @ params["down"]["kernel"]


def test_parameters_that_are_refused_are_folded_in_the_error_and_in_the_table():
    loss, params, x = deep(refused)
    with pytest.raises(ValueError, match="50 layers, but these parameters are in none") as caught:
        lp.find_layers(loss, params, x)
    layers = lp.find_layers(loss, params, x, on_uncaptured="pass")
    assert len(layers.uncaptured) == COUNT
    other = layers.uncaptured[0]
    (line,) = [text for text in str(layers).splitlines() if "/bias" in text]
    assert line == f"  h_{{0..23}}/up/bias [6] (24 times): {other.reason}"
    assert f"\n{line}. {other.remedy}\n" in str(caught.value)
    assert str(caught.value).count("/bias") == 1
    assert layers.table(fold=False).count("/bias") == COUNT


def test_a_reason_that_names_a_neighbour_is_folded_with_it():
    reason = "it belongs to 'h_{0}/up{{1}}/w2', which is in no layer because it's used 2 times"
    uncaptured = [
        {
            "path": f"h_{number}/up{{1}}/b2",
            "shape": [6],
            "reason": reason.format(number),
            "remedy": f"Look at 'h_{number}' and 'h_5'.",
        }
        for number in range(4)
    ]
    (line,) = left_out(uncaptured, folded=True, remedies=True)
    assert line == (
        "  h_{0..3}/up{1}/b2 [6] (4 times): it belongs to 'h_{0..3}/up{1}/w2', which is in no "
        "layer because it's used 2 times. Look at 'h_{0..3}' and 'h_5'."
    )
    each = left_out(uncaptured, folded=False, remedies=True)
    assert each == [f"  {o['path']} [6]: {o['reason']}. {o['remedy']}" for o in uncaptured]


# --- as plain data -------------------------------------------------------------------------------


def test_plain_data_has_what_the_layers_have_and_json_takes_it():
    params = {
        "conv": {"kernel": normal(3, 3, 2, 4), "bias": normal(4)},
        "both": normal(2, 4, 4),
        "power": normal(4),
        "unused": normal(2),
    }

    def loss(params, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        a = jax.lax.conv_general_dilated(
            x, params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=numbers
        )
        h = jnp.tanh(a + params["conv"]["bias"][None, None, None]).mean((1, 2))
        h = jax.nn.relu(h @ params["both"][0]) @ params["both"][1]
        return squares(h ** params["power"][None])

    layers = lp.find_layers(loss, params, normal(5, 6, 6, 2), on_uncaptured="pass")
    about = layers.to_dict()
    assert json.loads(json.dumps(about)) == about
    assert [record["name"] for record in about["layers"]] == list(layers)
    assert about["size"] == sum(layer.size for layer in layers.values()) == 76 + 32
    for record, layer in zip(about["layers"], layers.values(), strict=True):
        special = {"window", "transfer", "note", "parameters"}
        assert {name: getattr(layer, name) for name in set(record) - special} == {
            name: value for name, value in record.items() if name not in special
        }
        assert record["window"] == list(layer.window)
        assert (record["transfer"], record["note"]) == (layer.transfer.name, layer.transfer.note)
    conv, first, second = about["layers"]
    assert (conv["kind"], conv["d_in"], conv["rows"], conv["transfer"]) == ("conv", 18, 36, "tanh")
    assert conv["parameters"] == {
        "kernel": [{"path": "conv/kernel", "shape": [3, 3, 2, 4], "part": None}],
        "bias": [{"path": "conv/bias", "shape": [4], "part": None}],
    }
    assert first["parameters"]["bias"] == [] and not first["has_bias"]
    for number, record in enumerate((first, second)):
        (kernel,) = record["parameters"]["kernel"]
        assert (kernel["path"], kernel["shape"]) == ("both", [2, 4, 4])
        assert kernel["part"] == [[number, number + 1], [0, 4], [0, 4]]
    assert about["uncaptured"] == [
        {
            "path": other.path,
            "shape": list(other.shape),
            "reason": other.reason,
            "remedy": other.remedy,
            "has_gradient": other.has_gradient,
        }
        for other in layers.uncaptured
    ]
    assert {other["path"] for other in about["uncaptured"]} == {"power", "unused"}


# --- models that are large -----------------------------------------------------------------------


class Bottleneck(nn.Module):
    width: int
    stride: int

    @nn.compact
    def __call__(self, x):
        def norm(name=None):
            return nn.BatchNorm(use_running_average=True, name=name)

        strides = (self.stride, self.stride)
        y = nn.relu(norm()(nn.Conv(self.width, (1, 1), use_bias=False)(x)))
        y = nn.relu(norm()(nn.Conv(self.width, (3, 3), strides, use_bias=False)(y)))
        y = norm()(nn.Conv(4 * self.width, (1, 1), use_bias=False)(y))
        if x.shape != y.shape:
            x = nn.Conv(4 * self.width, (1, 1), strides, use_bias=False, name="conv_proj")(x)
            x = norm("norm_proj")(x)
        return nn.relu(x + y)


class ResNet50(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(64, (7, 7), (2, 2), use_bias=False)(x)
        x = nn.max_pool(nn.relu(nn.BatchNorm(use_running_average=True)(x)), (3, 3), (2, 2), "SAME")
        for stage, blocks in enumerate((3, 4, 6, 3)):
            for block in range(blocks):
                x = Bottleneck(64 * 2**stage, 2 if stage and not block else 1)(x)
        return nn.Dense(1000)(x.mean((1, 2)))


class Transformer(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        batch, length, width = x.shape
        parts = nn.Dense(3 * width, name="qkv")(nn.LayerNorm()(x))
        heads = (part.reshape(batch, length, -1, 64) for part in jnp.split(parts, 3, -1))
        x += nn.Dense(width, name="proj")(nn.dot_product_attention(*heads).reshape(x.shape))
        return x + nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x))))


class Gpt2(nn.Module):
    blocks: int
    width: int

    @nn.compact
    def __call__(self, ids):
        words = nn.Embed(50257, self.width)
        places = self.param("places", nn.initializers.zeros, (1024, self.width))
        x = words(ids) + places[None, : ids.shape[1]]
        for number in range(self.blocks):
            x = Transformer(self.width, name=f"h_{number}")(x)
        return words.attend(nn.LayerNorm()(x))


IMAGES = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
WORDS = jax.ShapeDtypeStruct((2, 1024), jnp.int32)
LABELS = jax.ShapeDtypeStruct((2,), jnp.int32)


@pytest.mark.slow
@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    "model, x, y, size, lines",
    [
        (ResNet50(), IMAGES, LABELS, 25_557_032, 46),
        (Gpt2(12, 768), WORDS, WORDS, 124_439_808, 13),
        (Gpt2(24, 1024), WORDS, WORDS, 354_823_168, 13),
    ],
    ids=["resnet-50", "gpt-2", "gpt-2 medium"],
)
def test_large_models_fit_a_screen(model, x, y, size, lines):
    def loss(params, others, x, y):
        logits = model.apply({"params": params, **others}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        others = dict(jax.eval_shape(model.init, jax.random.key(0), x))
        layers = lp.find_layers(loss, others.pop("params"), others, x, y)
    table = str(layers)
    names, counts, total = lines_of(table)
    assert len(table.splitlines()) == lines
    assert sorted(name for line in names for name in expand(line)) == sorted(layers)
    assert sum(counts) == size and re.fullmatch(rf"\d+ layers, {size:,} parameters", total)
