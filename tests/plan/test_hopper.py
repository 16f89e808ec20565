"""Programs compiled for an H100 that is not here, and what decoding and training start on it
(slow).

The slow tests need the extra `plan_gpu`, 130 MB; without it they are skipped.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsjax.plan import hopper

ROOT = Path(__file__).parents[2]

compiles = pytest.mark.skipif(
    not hopper.is_installed(), reason="the GPU's compiler is not here: pip install '.[plan_gpu]'"
)


def test_mesh_without_the_compiler_names_the_extra(monkeypatch):
    monkeypatch.setattr(hopper, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"which is not installed; install the extra `plan_gpu`"):
        hopper.mesh()


def counted(bench, case):
    """In a process of its own, without the flags that the tests set for a CPU."""
    command = [sys.executable, "-m", f"tests.bench.{bench}", "--json", str(case)]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["JAX_PLATFORMS"] = "cpu"
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    (found,) = json.loads(done.stdout)
    return found


@compiles
@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "kernels", "per_layer", "moved"),
    [(1, 200, 12, 1.1), (8, 197, 12, 1.45), (32, 212, 13, 1.15)],
)
def test_token_of_the_3b_shape_starts_and_moves_no_more_than_it_did(
    batch, kernels, per_layer, moved
):
    """The goal is 12 kernels per layer; these are the bounds that have been reached."""
    found = counted("bench_kernels", batch)
    assert found["kernels"] <= kernels and found["per_layer"] <= per_layer
    assert found["waits"] == 0  # for the host
    assert found["needed"] < found["moved"] <= moved * found["needed"]
    # One before the loop over steps and two after it; of each step a graph before the MoE layers,
    # one of each, and one after them. With loops in command buffers all 16 steps are one graph.
    assert found["launches"] <= 3 + 16 * 17
    assert found["captured"] == 1


@compiles
@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "moved"), [("small", 2.2), ("small_isolated", 2.2), ("small_fp8", 2.5)]
)
def test_training_step_moves_little_more_than_it_needs(case, moved):
    found = counted("bench_step_kernels", case)
    _, products, others = found["total"]
    needed = found["needed_state"] + found["needed_activations"]
    assert found["waits"] == 0  # for the host
    assert needed < products + others <= moved * needed
    # No layer's values are copied into stacks and out of them.
    _, products, others = found["parts"]["stacks of layers"]
    assert products + others < 0.02 * needed
