"""Two processes of four devices each train as one device does, and divide the inversions."""

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed_steps import BATCH, LAYOUTS, METHODS, PROCESSES, TOKENS, WIDTH

pytestmark = pytest.mark.slow
TRIES, PATIENCE = 3, 1200  # seconds; compiling takes most of them
each_method = pytest.mark.parametrize("method", METHODS)


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def together(method):
    """What each process printed, and whether all went well."""
    port = free_port()
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distributed_steps", str(port), str(index), method],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(PROCESSES)
    ]
    try:
        # Both end when one fails: the other's collectives time out, or the coordinator does.
        printed = [child.communicate(timeout=PATIENCE)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    return printed, all(child.returncode == 0 for child in children)


@functools.cache
def found(method):
    """By layout, from the first process. A port may be taken between finding and using it."""
    for _ in range(TRIES):
        printed, ok = together(method)
        if ok or not any("address already in use" in text.lower() for text in printed):
            break
    assert ok, "\n\n".join(text[-3000:] for text in printed)
    lines = [line for line in printed[0].splitlines() if line.startswith("{")]
    return {layout: own[method] for layout, own in json.loads(lines[-1]).items()}


@each_method
def test_parameters_are_those_of_one_device(method):
    assert set(found(method)) == set(LAYOUTS)
    for result in found(method).values():
        assert result["error"] < 1e-10


@each_method
def test_equal_layers_are_inverted_apart(method):
    """Of matrices that are alike a device factorises one; LNB has none."""
    for result in found(method).values():
        own = [shape for shape in result["factorised"] if max(shape) >= WIDTH]
        assert bool(own) == (method != "lnb")
        # The last layer has none beside it that is like it: what it needs, all devices do.
        assert sum(len(shape) == 2 for shape in own) <= 1
        assert all(shape[0] == 1 for shape in own if len(shape) == 3)


@each_method
def test_no_activations_are_gathered_data_parallel(method):
    """Only what was inverted."""
    for shape in found(method)["data parallel"]["gathered"]:
        assert BATCH not in shape[:-2]
        assert BATCH * TOKENS not in shape


@each_method
def test_fsdp_divides_the_state(method):
    """The whole of it, but for K-FAC's input factors of an odd number of rows."""
    assert found(method)["data parallel"]["state"] == 1
    assert found(method)["fsdp"]["state"] < (0.5 if method == "kfac" else 0.15)


@each_method
def test_what_is_sent_is_what_the_page_counts(method):
    """But for numbers alone, and vectors that tell how long a step is."""
    result = found(method)["data parallel"]
    always, gathering, inverting = result["sent"]
    by_shapes = result["by shapes"]
    if method == "lnb":  # what it sends in every step stands in a conditional, for finite batches
        always, gathering = always + gathering, 0.0
    assert always == pytest.approx(by_shapes[0], rel=0.1)
    assert gathering == pytest.approx(by_shapes[1], rel=0.1)
    assert 0.3 * by_shapes[2] <= inverting <= 1.1 * by_shapes[2]
