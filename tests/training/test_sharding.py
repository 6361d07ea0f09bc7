"""Steps on eight simulated devices are those of one, and gather no whole activations."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sharded_steps import BATCH, LAYERS, TOKENS, WIDTH

METHODS = (
    "foof",
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("foof_kept", "lnb", "kfac", "locoprop_m")),
)
LAYOUTS = ("data parallel", "fsdp", "tensor parallel", "layers apart")


@functools.cache
def found(method):
    """By layout, from a process that has eight devices."""
    flags = "--xla_force_host_platform_device_count=8"
    run = subprocess.run(
        [sys.executable, "-m", "tests.sharded_steps", method],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    results = json.loads(run.stdout.splitlines()[-1])
    return {layout: results[layout][method] for layout in LAYOUTS}


@pytest.mark.parametrize("method", METHODS)
def test_steps_are_those_of_one_device(method):
    for result in found(method).values():
        assert result["error"] < 1e-7


@pytest.mark.parametrize("method", METHODS)
def test_no_whole_activations_are_gathered(method):
    """Where features lie on several devices, X'X needs them all, of a device's own examples."""
    for layout, result in found(method).items():
        limit = 1 if layout == "data parallel" else LAYERS * BATCH * TOKENS * WIDTH
        assert result["gathered"] < limit


@pytest.mark.parametrize("method", [METHODS[0], METHODS[1], METHODS[3]])
def test_stacked_systems_are_solved_apart_where_the_state_lies_apart(method):
    """One layer of the stack on each device; in the other layouts each device solves all."""
    for layout, result in found(method).items():
        stacks = {shape[0] for shape in result["factorised"] if len(shape) == 3}
        assert stacks == {1 if layout == "layers apart" else LAYERS}
