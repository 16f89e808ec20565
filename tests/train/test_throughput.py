"""The arithmetic of speed, and the table of peaks."""

import json
import types

import jax
import pytest

from dsjax.train import throughput
from dsjax.train.throughput import Meter, Peak, peak_flops


def device(kind, platform="tpu"):
    return types.SimpleNamespace(device_kind=kind, platform=platform)


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("TPU v5p", 459e12),
        ("TPU v5 lite", 197e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H200", 989.5e12),
    ],
)
def test_peak_of_known_devices_is_published(kind, flops):
    assert peak_flops([device(kind)] * 4).flops == 4 * flops


def test_peak_of_a_cpu_is_measured_once_for_all_its_devices():
    """Eight fake devices share the cores, so they have one peak together."""
    peak = peak_flops(jax.devices())
    one = throughput.measure_matmul_flops()
    assert peak.source.startswith("float32 matrix product measured on this CPU")
    assert 1e8 < peak.flops < 4 * one


@pytest.fixture
def clock(monkeypatch):
    """Tells the times that it is given, one for each reading."""
    times = []
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: times.pop(0))
    return times


def test_meter_counts_steps_and_nothing_between_stretches(clock):
    clock += [0.0, 100.0, 102.0, 104.0, 200.0, 205.0]
    meter = Meter(flops_per_token=3.0, peak=Peak(600.0, "made up"))
    assert meter.whole() is None
    meter.start()
    meter.step(40)
    meter.step(40)
    assert meter.take() == (20.0, 2.0, 0.0, 0.1)
    meter.start()  # 96 seconds of evaluation lie behind
    meter.step(100)
    assert meter.take() == (20.0, 5.0, 0.0, 0.1)
    assert meter.whole() == (20.0, 2.0, 0.0, 0.1)


def test_compiling_inside_a_step_is_left_out_and_what_came_before_it_is_not(clock):
    clock += [0.0, 100.0, 103.0, 203.0, 205.0]
    meter = Meter(flops_per_token=3.0, peak=Peak(600.0, "made up"))
    meter.start()
    with meter.left_out():  # after 3 seconds of rollout, for 100
        pass
    meter.step(50)
    assert meter.take() == (10.0, 5.0, 0.0, 0.05)


def test_waiting_for_data_is_counted_per_step(clock):
    clock += [0.0, 10.0, 10.0, 11.0, 14.0, 14.0, 17.0, 18.0, 20.0]
    meter = Meter(flops_per_token=3.0, peak=Peak(600.0, "made up"))
    meter.start()
    for _ in range(2):
        with meter.waiting():
            pass
        meter.step(10)
    assert meter.take().data_seconds == 2.0  # 1 and 3 seconds
    meter.start()
    assert meter.whole().data_seconds == 2.0


def test_meter_goes_on_from_an_earlier_session_on_other_devices(clock):
    clock += [0.0, 0.0, 2.0, 4.0, 100.0, 100.0, 101.0]
    before = Meter(flops_per_token=3.0, peak=Peak(600.0, "made up"))
    before.start()
    before.step(40)
    before.step(40)
    state = json.loads(json.dumps(before.state()))
    after = Meter(flops_per_token=3.0, peak=Peak(1200.0, "twice as many"), before=state)
    assert after.whole() == before.whole()  # not one step of its own
    after.start()
    after.step(40)
    assert after.whole() == (24.0, 2.0, 0.0, 3 * 120 / (600 * 4 + 1200))
    assert after.take().step_seconds == 1.0  # of its own alone


def test_median_is_of_the_newest_thousand_steps(clock):
    clock += [0.0, *range(0, 2002, 2), *range(2001, 3001)]
    meter = Meter(flops_per_token=1.0, peak=Peak(1.0, "made up"))
    meter.start()
    for _ in range(2000):
        meter.step(1)
    assert meter.whole().step_seconds == 1.0 and len(meter.state()["newest"]) == 1000


def test_peak_of_memory_is_the_fullest_devices_or_this_processs():
    full, fuller = (
        types.SimpleNamespace(memory_stats=lambda peak=peak: {"peak_bytes_in_use": peak})
        for peak in (3, 7)
    )
    assert throughput.peak_bytes([full, fuller]) == 7
    assert throughput.peak_bytes(jax.devices()) > 50e6  # Python with jax takes as much
