"""What every test runs under: float64, no silent promotion or broadcasting, repeatable examples."""

import os

import hypothesis
import jax
import pytest

# The oracles compare in float64; a GPU is used only when asked for.
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Compiling dominates the time of these tests, and nothing in them is large enough to optimize.
jax.config.update("jax_disable_most_optimizations", True)
# JAX before 0.12 compiles in a third of the time without its newer emitters; later it ignores this.
without = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {without}"
if "JAX_PLATFORMS" not in os.environ:
    jax.config.update("jax_platforms", "cpu")

# No shrinking: it compiles hundreds of networks, minutes for a failure, and ours are small anyway.
for profile, max_examples in {"locoprop_jax": 3, "thorough": 100}.items():
    hypothesis.settings.register_profile(
        profile,
        max_examples=max_examples,
        deadline=None,
        derandomize="CI" in os.environ,
        phases=set(hypothesis.Phase) - {hypothesis.Phase.shrink, hypothesis.Phase.explain},
    )
hypothesis.settings.load_profile("locoprop_jax")


def pytest_configure(config):
    """Keep what is compiled, for both workers and for the next run."""
    if not config.pluginmanager.has_plugin("cacheprovider"):
        return
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(autouse=True)
def strict_promotion(request):
    """No silent dtype promotion, except where a test says it cannot do without.

    The front ends' dense, convolution and attention layers keep to this. `optax.adam` and its kin
    do not (`1 - decay**count`: a float and an integer array), nor `optax.MultiSteps`, nor Flax's
    normalisation layers (float32 at least). Tests of these carry the marker.
    """
    standard = request.node.get_closest_marker("standard_promotion")
    with jax.numpy_dtype_promotion("standard" if standard else "strict"):
        yield
