"""Fingerprints: the same on any sharding, another one for any change."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dsjax.checkpoint import fingerprint
from dsjax.checkpoint.fingerprint import inspect


def fingerprints(**arrays):
    return inspect(arrays).fingerprints


def test_fingerprint_does_not_depend_on_the_sharding():
    rng = np.random.default_rng(0)
    array = jnp.asarray(rng.normal(size=(8, 4, 16)), jnp.float32)
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    specs = [("fsdp",), (None, "data"), (None, None, ("data", "fsdp")), ("data", "fsdp")]
    placed = {
        str(number): jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
        for number, spec in enumerate(specs)
    }
    assert set(fingerprints(plain=array, **placed).values()) == {fingerprints(a=array)["a"]}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "float8_e4m3fn", "bool"])
def test_fingerprint_changes_with_any_bit_and_any_order(dtype):
    rng = np.random.default_rng(1)
    array = rng.integers(0, 2, 96).astype(dtype) if dtype == "bool" else None
    if array is None:
        array = rng.normal(size=96).astype(dtype)
    variants = [array, np.roll(array, 1), array[::-1].copy()]
    for bit in () if dtype == "bool" else rng.choice(8 * array.nbytes, 40, replace=False):
        raw = bytearray(array.tobytes())
        raw[bit // 8] ^= 1 << bit % 8
        variants.append(np.frombuffer(raw, array.dtype))
    found = fingerprints(**{str(n): jnp.asarray(value) for n, value in enumerate(variants)})
    assert len(set(found.values())) == len(variants)


def test_inspection_finds_what_is_not_finite():
    arrays = {
        "fine": jnp.ones(3),
        "nan": jnp.array([1.0, jnp.nan]),
        "infinite": jnp.array([[-jnp.inf]], jnp.bfloat16),
        "whole": jnp.arange(3),
    }
    assert inspect(arrays).not_finite == ["nan", "infinite"]


def test_fingerprint_is_the_sum_that_it_says(monkeypatch):
    """Element by element in Python, whatever the size of the blocks."""
    array = np.random.default_rng(2).normal(size=(3, 5, 4)).astype(np.float32)
    total = 0
    for place, word in enumerate(array.view(np.uint32).ravel().tolist()):
        mixed = (place + 0x9E3779B97F4A7C15) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ mixed >> 32) * 0x94D049BB133111EB % 2**64 | 1
        total += word * mixed
    for block in (1, 3, 7, 20, 1000):
        monkeypatch.setattr(fingerprint, "_BLOCK", block)
        assert fingerprints(a=jnp.asarray(array))["a"] == f"{total % 2**64:016x}"


def test_fingerprint_counts_a_part_in_its_place():
    whole = np.random.default_rng(3).normal(size=(4, 6)).astype(np.float32)
    halves = itertools.product((slice(0, 1), slice(1, 4)), (slice(0, 4), slice(4, 6)))
    parts = [fingerprint.inspect_part(whole[index], index, whole.shape)[0] for index in halves]
    everything = fingerprint.inspect_part(whole, (slice(None),) * 2, whole.shape)[0]
    assert sum(map(int, parts)) % 2**64 == int(everything)
