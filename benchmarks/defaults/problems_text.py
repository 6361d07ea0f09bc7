"""Problems of text: the topics of Python's own documentation, which every machine here has."""

import functools
import re
from collections import Counter
from pydoc_data.topics import topics
from typing import Any

import flax.linen as nn
import numpy as np
from jaxtyping import Array, Float, Int

import locoprop_jax as lp
from benchmarks.defaults.problem import Arrays, Problem, init_of
from benchmarks.shared.models import Blocks, LanguageModel

ALPHABET = [chr(i) for i in range(32, 127)] + ["\n"]
CHARACTERS = len(ALPHABET) + 1  # the last one stands for all others
LENGTH = 64  # characters of an example
VOCABULARY = 1000  # words; the last one stands for all others
WORDS = 32  # of an example
PASSAGE = 24  # words of a passage to classify
TOPICS = 12  # classes: the longest topics
HELD_OUT = 10  # one example of so many is held out


# --- the texts -----------------------------------------------------------------------------------


@functools.cache
def texts() -> dict[str, str]:
    """Topics by name, longest first, each paragraph only in the first topic that has it."""
    seen: set[str] = set()
    result = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = (" ".join(p.split()) for p in topics[name].split("\n\n"))
        new = [p for p in dict.fromkeys(paragraphs) if p and p not in seen]
        seen.update(new)
        result[name] = "\n".join(new) + "\n"
    return result


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+|[^a-z\s]", text.lower())


@functools.cache
def _vocabulary() -> dict[str, int]:
    """Numbers of the most frequent words, by word."""
    counts = Counter(word for text in texts().values() for word in _words(text))
    return {word: i for i, (word, _) in enumerate(counts.most_common(VOCABULARY - 1))}


def _word_numbers(text: str) -> Int[np.ndarray, " words"]:
    numbers = _vocabulary()
    return np.array([numbers.get(word, VOCABULARY - 1) for word in _words(text)], np.int32)


def _split_windows(tokens: Int[np.ndarray, " tokens"], length: int) -> tuple[Arrays, Arrays]:
    """Windows of a text with the next token of each one; every tenth is held out."""
    count = (len(tokens) - 1) // length
    windows = {
        "tokens": tokens[: count * length].reshape(count, length),
        "next": tokens[1 : count * length + 1].reshape(count, length),
    }
    held_out = np.arange(count) % HELD_OUT == HELD_OUT - 1
    train = {name: array[~held_out] for name, array in windows.items()}
    order = np.random.default_rng(0).permutation(len(train["tokens"]))  # all topics in each part
    return (
        {name: array[order] for name, array in train.items()},
        {name: array[held_out] for name, array in windows.items()},
    )


@functools.cache
def characters() -> tuple[Arrays, Arrays]:
    numbers = {character: i for i, character in enumerate(ALPHABET)}
    text = "".join(texts().values())
    tokens = np.array([numbers.get(c, len(ALPHABET)) for c in text], np.int32)
    return _split_windows(tokens, LENGTH)


@functools.cache
def words() -> tuple[Arrays, Arrays]:
    return _split_windows(_word_numbers("".join(texts().values())), WORDS)


# --- the networks --------------------------------------------------------------------------------


class CharacterGRU(nn.Module):
    vocabulary: int = CHARACTERS
    width: int = 128

    @nn.compact
    def __call__(self, tokens: Int[Array, "batch length"]) -> Float[Array, "batch length out"]:
        x = nn.Embed(self.vocabulary, self.width // 2)(tokens)
        hidden: Any = nn.RNN(nn.GRUCell(self.width))(x)
        return nn.Dense(self.vocabulary)(hidden)


class TiedLanguageModel(nn.Module):
    """A transformer whose table of embeddings is its last layer too."""

    vocabulary: int = VOCABULARY
    width: int = 32

    @nn.compact
    def __call__(self, tokens: Int[Array, "batch length"]) -> Float[Array, "batch length out"]:
        table = nn.Embed(self.vocabulary, self.width)
        shape = (1, tokens.shape[1], self.width)
        x = table(tokens) + self.param("positions", nn.initializers.normal(0.1), shape)
        x = Blocks(depth=1, heads=4, causal=True)(x)
        return table.attend(nn.LayerNorm()(x))


class EmbeddingBag(nn.Module):
    """Embeddings of a passage's words, averaged, then a hidden layer."""

    vocabulary: int = VOCABULARY
    width: int = 64
    classes: int = TOPICS

    @nn.compact
    def __call__(self, tokens: Int[Array, "batch length"]) -> Float[Array, "batch classes"]:
        x = nn.Embed(self.vocabulary, self.width)(tokens).mean(1)
        return nn.Dense(self.classes)(nn.relu(nn.Dense(self.width)(x)))


# --- the problems --------------------------------------------------------------------------------


def _predict_next(
    name: str,
    what: str,
    network: nn.Module,
    data: tuple[Arrays, Arrays],
    batch_size: int,
    steps: int,
) -> Problem:
    """Softmax cross-entropy of the next token, mean over tokens."""

    def loss_fn(params: Any, batch: Any) -> Float[Array, ""]:
        logits: Any = network.apply({"params": params}, batch["tokens"])
        losses = lp.losses.softmax_cross_entropy_with_integer_labels(logits, batch["next"])
        return losses.mean()

    train, test = data
    init = init_of(network, train["tokens"])
    return Problem(name, what, init, loss_fn, train, test, batch_size, steps, evaluated=500)


def character_lm(name: str) -> Problem:
    network = LanguageModel(CHARACTERS, depth=2, width=64, heads=4)
    what = "transformer of two blocks, next character of Python's topics"
    return _predict_next(name, what, network, characters(), 32, 150)


def character_gru(name: str) -> Problem:
    what = "GRU of 128 units, next character of Python's topics"
    return _predict_next(name, what, CharacterGRU(), characters(), 32, 150)


def tied_lm(name: str) -> Problem:
    what = "transformer of one block, tied embeddings, next word of Python's topics"
    return _predict_next(name, what, TiedLanguageModel(), words(), 16, 200)


def embedding_bag(name: str) -> Problem:
    """Which of the twelve longest topics a passage is from; the last fifth of each is held out."""
    network = EmbeddingBag()

    def loss_fn(params: Any, batch: Any) -> Float[Array, ""]:
        logits: Any = network.apply({"params": params}, batch["tokens"])
        losses = lp.losses.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        return losses.mean()

    splits: tuple[list, list] = [], []
    for label, text in enumerate(list(texts().values())[:TOPICS]):
        numbers = _word_numbers(text)
        cut = len(numbers) * 4 // 5
        for split, part in zip(splits, (numbers[:cut], numbers[cut:]), strict=True):
            starts = range(0, len(part) - PASSAGE + 1, PASSAGE // 2)
            split += [(part[start : start + PASSAGE], label) for start in starts]

    def arrays(passages: list) -> Arrays:
        order = np.random.default_rng(0).permutation(len(passages))
        tokens, labels = zip(*(passages[i] for i in order), strict=True)
        return {"tokens": np.stack(tokens), "labels": np.array(labels, np.int32)}

    train, test = map(arrays, splits)
    what = "averaged embeddings and a hidden layer, the topic of a passage of 24 words"
    return Problem(name, what, init_of(network, train["tokens"]), loss_fn, train, test, 64, 250)
