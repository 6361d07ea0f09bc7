"""Names that differ in their numbers alone are one pattern, which stands for just these names."""

import itertools
import re

import hypothesis
import pytest
from hypothesis import strategies as st

from locoprop_jax._layers.folding import fold, unfolded


def numbers(braces: str) -> list[str]:
    """What stands in a pair of braces."""
    found = []
    for item in braces.split(","):
        first, *rest = item.split("..")
        last, step = [*rest, "1"][:2] if rest else (first, "1")
        between = range(int(first), int(last) + 1, int(step))
        found += [str(number).zfill(len(first)) for number in between]
    return found


def expand(pattern: str) -> list[str]:
    """The names that a pattern stands for."""
    parts = re.split(r"\{(.*?)\}", pattern)
    choices = [numbers(part) if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*choices)]


def patterns(names, contents=None):
    contents = [None] * len(names) if contents is None else contents
    return [one.name for one in fold(names, contents)]


# --- every name once, and no other ---------------------------------------------------------------

digits = st.one_of(
    st.integers(0, 12).map(str),
    st.sampled_from(["0", "00", "007", "08", "09", "10", "99", "100"]),
)
name = st.lists(st.sampled_from(["h", "_", "/", "conv"]) | digits, min_size=1).map("".join)


@st.composite
def blocks(draw):
    """Repeated blocks within repeated blocks, some of whose members are missing or unlike."""
    template = draw(st.sampled_from(["h_{}/w", "s{}/b{}/conv", "a{}b{}c{}", "{}", "layer_{:02}"]))
    places = template.count("{")
    sizes = draw(st.lists(st.integers(1, 5), min_size=places, max_size=places))
    starts = draw(st.lists(st.integers(0, 9), min_size=places, max_size=places))
    ranges = [range(a, a + n) for a, n in zip(starts, sizes, strict=True)]
    names = [template.format(*own) for own in itertools.product(*ranges)]
    return [own for own in names if draw(st.integers(0, 9))]


@hypothesis.settings(max_examples=50)
@hypothesis.given(st.data())
def test_each_name_is_in_one_pattern_and_a_pattern_has_no_other(data):
    parts = data.draw(st.tuples(st.lists(name), blocks(), blocks()))
    names = list(dict.fromkeys(itertools.chain(*parts)))
    data.draw(st.randoms(use_true_random=False)).shuffle(names)
    contents = [data.draw(st.sampled_from("aaab")) for _ in names]
    folds = fold(names, contents)
    members = [index for one in folds for index in one.members]
    assert sorted(members) == list(range(len(names)))
    for one in folds:
        assert sorted(expand(one.name)) == sorted(names[index] for index in one.members)
        assert len({contents[index] for index in one.members}) == 1
        assert list(one.members) == sorted(one.members)
        texts = re.split(r"\{.*?\}|[0-9]+", one.name)
        assert "".join(a + b for a, b in zip(texts, (*one.numbers, ""), strict=True)) == one.name
    firsts = [one.members[0] for one in folds]
    assert firsts == sorted(firsts)


# --- what models have ----------------------------------------------------------------------------


def test_equal_blocks_are_one_pattern_for_each_layer_of_a_block():
    names = [f"h_{i}/{own}" for i in range(24) for own in ("ln", "attn/q", "attn/k")]
    kinds = ["scale", "dense", "dense"] * 24
    assert patterns(names, kinds) == ["h_{0..23}/ln", "h_{0..23}/attn/q", "h_{0..23}/attn/k"]


def test_a_block_that_differs_in_one_layer_is_apart_in_that_layer_alone():
    names = [f"h/{i}/{own}" for i in range(12) for own in ("attn", "mlp")]
    contents = ["attn", "first", *["attn", "mlp"] * 11]
    assert patterns(names, contents) == ["h/{0..11}/attn", "h/0/mlp", "h/{1..11}/mlp"]


def test_stages_of_blocks_fold_in_all_numbers_where_they_are_alike():
    names = [f"stage{s}/block{b}/conv{c}" for s in (1, 2) for b in range(3) for c in (1, 2)]
    assert patterns(names) == ["stage{1,2}/block{0..2}/conv{1,2}"]
    of_stage = [own.partition("/")[0] for own in names]
    expected = ["stage1/block{0..2}/conv{1,2}", "stage2/block{0..2}/conv{1,2}"]
    assert patterns(names, of_stage) == expected


def test_stages_of_different_lengths_are_a_pattern_each():
    names = [f"s{s}/b{b}/conv" for s, n in enumerate((3, 4, 6)) for b in range(n)]
    assert patterns(names) == ["s0/b{0..2}/conv", "s1/b{0..3}/conv", "s2/b{0..5}/conv"]
    without = [own for own in names if own != "s1/b0/conv"]
    assert patterns(without) == ["s0/b{0..2}/conv", "s1/b{1..3}/conv", "s2/b{0..5}/conv"]


def test_numbers_that_move_together_are_not_folded():
    names = [f"block_{i}/dense_{2 * i}" for i in range(6)]
    assert patterns(names) == names


@pytest.mark.parametrize(
    "found, expected",
    [
        (["0", "1"], "{0,1}"),
        (["0", "1", "2", "5"], "{0..2,5}"),
        (["0", "3", "4", "5", "6"], "{0,3..6}"),
        (["0", "2", "4", "6", "7", "8"], "{0..6..2,7,8}"),
        (["8", "9", "10", "11"], "{8..11}"),
        (["08", "09", "10", "11"], "{08..11}"),
        (["1", "01", "2", "3"], "{01,1..3}"),
    ],
)
def test_numbers_are_ranges_where_there_are_three_at_equal_distances(found, expected):
    assert patterns(found) == [expected]
    assert sorted(expand(expected)) == sorted(found)


def test_many_numbers_in_a_name_take_no_longer():
    names = [f"a{i}b0c0d{j}e0f0g{i % 2}h{j % 2}i{i}" for i in range(4) for j in range(4)]
    folds = fold(names, [None] * len(names))
    assert sorted(itertools.chain(*(expand(one.name) for one in folds))) == sorted(names)


def test_unfolded_names_are_as_they_were():
    names = ["h_0/w", "h_1/w", "out"]
    folds = unfolded(names)
    assert [one.name for one in folds] == names
    assert [one.members for one in folds] == [(0,), (1,), (2,)]
    assert [one.numbers for one in folds] == [("0",), ("1",), ()]
