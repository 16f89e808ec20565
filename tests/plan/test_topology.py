"""Slices by name: what they are, and what is said of names that are none."""

import pytest

from dsjax.plan import topology


@pytest.mark.parametrize(
    ("name", "chips", "devices"),
    [
        ("v5p:8x8x8", 512, 512),
        ("v5e:4x4", 16, 16),
        ("tpu7x:4x4x4", 64, 128),
        ("V6e:16x16", 256, 256),
    ],
)
def test_topology_counts_chips_and_devices(name, chips, devices):
    parsed = topology.parse(name)
    assert (parsed.n_chips, parsed.n_devices) == (chips, devices)
    assert parsed.name == name.lower()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5:4x4", "there is no topology 'v5:4x4'; did you mean v5p:8x8x8 or v5e:4x4"),
        (
            "h100:8",
            "there is no topology 'h100:8'; a topology .* such as v4:4x4x4, v5e:4x4, v5p:8x8x8",
        ),
        ("v5p:8x8", "a shape of v5p is 3 whole numbers, such as v5p:8x8x8"),
        ("v5e:4x4x4", "a shape of v5e is 2 whole numbers"),
        ("v5e:4xfour", "a shape of v5e is 2 whole numbers"),
        ("v5p", "a shape of v5p is 3 whole numbers"),
        ("v5p:8x3x8", "must be a multiple of a host's 2x2x1 chips"),
    ],
)
def test_topology_refuses_what_is_none(name, message):
    with pytest.raises(ValueError, match=message):
        topology.parse(name)


def test_devices_without_the_compiler_name_the_extra(monkeypatch):
    monkeypatch.setattr(topology, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"libtpu, which is not installed; install the extra `plan`"
    ):
        topology.devices(topology.parse("v5e:4x4"))
