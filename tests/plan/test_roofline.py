"""The slowest of arithmetic, memory and network, at the data sheet's rates."""

import pytest

from dsjax.plan.roofline import roofline
from dsjax.plan.topology import parse

SLICE = parse("v5e:4x4")  # 16 x 197 TFLOP/s, 0.82 TB/s, 4 links of 45 GB/s


@pytest.mark.parametrize(
    ("memory", "network", "limit", "seconds"),
    [(0.0, 0.0, "compute", 2.0), (8.2e12, 0.0, "memory", 10.0), (0.0, 9e11, "network", 5.0),
     (8.2e12, None, "memory", 10.0)],
)  # fmt: skip
def test_step_takes_its_slowest_part(memory, network, limit, seconds):
    peak = 16 * 197e12
    line = roofline(
        SLICE, program_flops=2 * peak, model_flops=peak, memory_bytes=memory, network_bytes=network
    )
    assert (line.limit, line.step_seconds) == (limit, pytest.approx(seconds))
    assert line.mfu == pytest.approx(1 / seconds)
    assert line.compute_seconds == 2.0
