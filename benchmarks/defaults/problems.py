"""The problems by name: those that constants may be chosen on, and those kept apart until the end.

All are small: an Adam step takes milliseconds on two CPU cores. Their data come with Debian, Python
or scikit-learn, or are drawn from a seed.
"""

import functools
from collections.abc import Callable

from benchmarks.defaults import problems_generated as generated
from benchmarks.defaults import problems_images as images
from benchmarks.defaults import problems_text as text
from benchmarks.defaults.problem import Problem

_CHOSEN: dict[str, Callable[[str], Problem]] = {
    "autoencoder": images.autoencoder,
    "mlp_tanh": images.mlp_tanh,
    "vgg": images.vgg,
    "resnet": images.resnet,
    "vit": images.vit,
    "character_lm": text.character_lm,
    "character_gru": text.character_gru,
    "unet": images.unet,
    "scales": generated.scales,
    "smooth": generated.smooth,
    "mlp_small_batch": images.mlp_small_batch,
}
_APART: dict[str, Callable[[str], Problem]] = {
    "recommender": generated.recommender,
    "lstm": images.lstm,
    "mixer": images.mixer,
    "conv_layer_norm": images.conv_layer_norm,
    "narrow": images.narrow,
    "imbalanced": images.imbalanced,
    "tied_lm": text.tied_lm,
    "embedding_bag": text.embedding_bag,
    "deep_set": generated.deep_set,
    "graph": generated.graph,
    "diffusion": generated.diffusion,
    "tabular": generated.tabular,
}

CHOSEN = tuple(_CHOSEN)
APART = tuple(_APART)
PROBLEMS: dict[str, Callable[[], Problem]] = {
    name: functools.partial(build, name) for name, build in (_CHOSEN | _APART).items()
}


def load(name: str) -> Problem:
    """The problem of a name; its data are loaded or generated now."""
    if name not in PROBLEMS:
        raise ValueError(f"There is no problem {name!r}. There are: {', '.join(PROBLEMS)}.")
    return PROBLEMS[name]()
