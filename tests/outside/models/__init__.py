"""Outside models, a module for each package; `load` fills the list of all of them."""

import importlib
import importlib.util
import warnings

from tests.outside.registry import MODELS

# module here -> what it imports
PACKAGES = {
    "diffrax_models": "diffrax",
    "distrax_models": "distrax",
    "e3nn_models": "e3nn_jax",
    "equinox_models": "equinox",
    "flax_models": "flax",
    "flowjax_models": "flowjax",
    "folx_models": "folx",
    "haiku_models": "haiku",
    "jinns_models": "jinns",
    "jraph_models": "jraph",
    "keras_models": "keras",
    "netket_models": "netket",
    "transformers_models": "transformers",
}


def not_installed() -> list[str]:
    """The packages that this environment lacks."""
    return [name for name in PACKAGES.values() if importlib.util.find_spec(name) is None]


def load() -> dict:
    """All models by name; imports every package, which warn of each other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in PACKAGES:
            importlib.import_module(f"{__name__}.{module}")
    return MODELS
