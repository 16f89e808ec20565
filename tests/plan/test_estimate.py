"""Arithmetic against the compiler, on the cases that the compiler has judged (`compiled.json`)."""

from pathlib import Path

import pytest

from dsjax import settings
from dsjax.plan import figures, topology
from tests.plan.test_aot import CASES, load

ROOT = Path(__file__).parents[2]


def estimated(case):
    slice_ = topology.parse(case["topology"])
    return figures.make(load(case), slice_, case["step"], compiled=False)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_memory_is_within_10_percent_of_the_compiler(case):
    plan = estimated(case)
    assert plan["argument_bytes"] == pytest.approx(case["argument_bytes"], rel=0.01)
    # A decoding step is little but its arguments.
    rel = 0.03 if case["step"] == "decode" else 0.1
    peak = case["peak_bytes_per_device"]
    assert plan["peak_bytes_per_device"] == pytest.approx(peak, rel=rel)
    assert plan["peak_bytes_per_device"] == sum(plan["estimated_parts"].values())


def test_thousands_of_chips_are_estimated_without_a_compiler():
    config = settings.load_config(ROOT / "configs/v3_671b.py")
    batch = ["train.micro_batch_size=4096", "train.batch_size=16384", "train.batch_size_start=0"]
    config = settings.override(config, [*batch, "mesh.data=-1", "mesh.fsdp=8"])
    plan = figures.make(config, topology.parse("v5p:16x16x16"), "train", compiled=False)
    assert plan["devices"] == 4096 and plan["mesh"]["data"] == 8 and plan["fits"]
    assert plan["tokens_per_device_and_pass"] == 4096
