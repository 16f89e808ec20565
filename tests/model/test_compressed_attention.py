"""What the attention of DeepSeek-V4 caches, counts and rotates; its results are those of
`test_mixed_layers` and of tests/kernels.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.model import rope
from dsjax.model.compressed_attention import (
    CompressedAttention,
    angles_of,
    place_row,
    ratio_of,
)
from dsjax.model.parameters import declarations
from dsjax.precision.policy import Policy
from tests.closeness import F32, assert_close
from tests.model.compressed import COMPRESSED, drawn

YARN = dataclasses.replace(
    COMPRESSED, rope_scaling="yarn", rope_factor=16.0, original_seq_len=16, mscale=0.0,
    mscale_all_dim=0.0,
)  # fmt: skip


def test_window_layers_have_a_rope_of_their_own():
    at = jnp.arange(40, dtype=jnp.int32)[None]
    plain = rope.angles(at, dataclasses.replace(COMPRESSED, rope_theta=10000.0))
    far = dataclasses.replace(YARN, rope_theta=COMPRESSED.compress_rope_theta)
    for kind, want in (("window", plain), ("sparse", rope.angles(at, far))):
        for got, one in zip(angles_of(kind, at, YARN), want, strict=True):
            np.testing.assert_array_equal(got, one)
    cos, sin = angles_of("heavy", at, YARN)
    np.testing.assert_allclose(cos**2 + sin**2, 1.0, rtol=1e-5)  # YaRN does not scale them


@pytest.mark.parametrize("kind", ["window", "sparse", "heavy"])
def test_cache_holds_what_the_layer_makes_of_a_token(kind):
    attention = drawn(CompressedAttention(COMPRESSED, Policy(jnp.float32), kind))
    shapes = CompressedAttention.cached_by(COMPRESSED, kind)
    at = jnp.zeros((1, 1), jnp.int32)
    of_tokens = attention._of_tokens(jnp.ones((1, 1, 16)), angles_of(kind, at, COMPRESSED))
    widths = {name: shape.width for name, shape in shapes.items() if shape.every == 1}
    assert {name: x.shape[-1] for name, x in of_tokens.items()} == widths
    entries = {name: shape.every for name, shape in shapes.items() if shape.every > 1}
    names = {"window": (), "sparse": ("entry", "index_entry"), "heavy": ("entry",)}[kind]
    assert entries == {name: ratio_of(kind, COMPRESSED) for name in names}


def test_cache_has_as_many_layers_of_each_kind_as_the_model():
    layers = {name: shape.layers for name, shape in CompressedAttention.cached(COMPRESSED).items()}
    assert layers["window_hash.key"] == 1 and layers["sparse.index_entry"] == 2
    assert {name.split(".")[0] for name in layers} == {"window_hash", "sparse", "heavy"}


def test_parameters_are_counted():
    total = 0
    for kind in COMPRESSED.layer_types:
        module = CompressedAttention(COMPRESSED, Policy(jnp.float32), kind)
        total += sum(
            parameter.count
            for parameter in declarations(module)
            if len(parameter.shape) == 2 and not parameter.path.endswith("ape")
        )
    streams = 2 * COMPRESSED.hc_mult**2 * (2 + COMPRESSED.hc_mult) * COMPRESSED.dim
    counted = CompressedAttention.matmul_parameters(COMPRESSED)
    assert counted == streams + total // COMPRESSED.n_layers


def test_flops_grow_with_the_entries_only():
    short, long = (CompressedAttention.context_flops(COMPRESSED, n, True) for n in (1000, 2000))
    entries = 2 * (16 * 9 * 2 / 4 + 4 * 4 * 8 / 8 / 2) * 500 / 4
    assert short < long < 2 * short
    assert long - short == pytest.approx(2 * entries, rel=0.5)


def test_positions_begin_with_each_document():
    segments = jnp.asarray([[1] * 5 + [2] * 6], jnp.int32)
    row = place_row(segments, segments, COMPRESSED)
    np.testing.assert_array_equal(row.places.first_BT[0], [0] * 5 + [5] * 6)
    np.testing.assert_array_equal(row.runs["sparse"].begins_BZ[0], [0, 5, -1])
    np.testing.assert_array_equal(row.runs["sparse"].positions_BZ[0, :2], [0, 0])
    assert set(row.runs) == {"sparse", "heavy"}


def test_heads_are_projected_by_groups():
    attention = drawn(CompressedAttention(COMPRESSED, Policy(jnp.float32), "window"))
    out = np.random.default_rng(0).normal(size=(1, 2, 4, 8)).astype(np.float32)
    wo_a, wo_b = np.asarray(attention.wo_a[...]), np.asarray(attention.wo_b[...])
    low = [
        out[:, :, 2 * group : 2 * group + 2].reshape(1, 2, 16) @ wo_a[:, 8 * group : 8 * group + 8]
        for group in range(2)
    ]
    assert_close(attention._project(jnp.asarray(out)), np.concatenate(low, axis=-1) @ wo_b, F32)
