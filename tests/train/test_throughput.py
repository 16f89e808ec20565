"""The arithmetic of speed, and the table of peaks."""

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


def test_meter_counts_steps_and_nothing_between_stretches(monkeypatch):
    clock = iter([0.0, 100.0, 102.0, 104.0, 200.0, 205.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    meter = Meter(flops_per_token=3.0, peak=Peak(600.0, "made up"))
    assert meter.whole() is None
    meter.start()
    meter.step(40)
    meter.step(40)
    assert meter.take() == (20.0, 2.0, 0.1)
    meter.start()  # 96 seconds of evaluation lie behind
    meter.step(100)
    assert meter.take() == (20.0, 5.0, 0.1)
    assert meter.whole() == (20.0, 2.0, 0.1)


def test_compiling_inside_a_step_is_left_out_and_what_came_before_it_is_not(monkeypatch):
    clock = iter([0.0, 100.0, 103.0, 203.0, 205.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    meter = Meter(flops_per_token=3.0, peak=Peak(600.0, "made up"))
    meter.start()
    with meter.left_out():  # after 3 seconds of rollout, for 100
        pass
    meter.step(50)
    assert meter.take() == (10.0, 5.0, 0.05)
