"""Outside models are written for JAX as it comes."""

import jax
import pytest


@pytest.fixture(autouse=True)
def rank_promotion():
    """They broadcast silently, which the tests' own networks must not."""
    with jax.numpy_rank_promotion("allow"):
        yield
