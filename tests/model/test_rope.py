import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.model import rope
from tests.closeness import F32, assert_close
from tests.model.tiny import TINY
from tests.oracles import rope as oracle

V3 = dataclasses.replace(
    TINY,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    rope_scaling="yarn",
    rope_factor=40.0,
    max_seq_len=163840,
)
SCALINGS = {
    "none": dataclasses.replace(V3, rope_scaling="none"),
    "linear": dataclasses.replace(V3, rope_scaling="linear", rope_factor=4.0),
    "yarn": V3,
    "yarn with two mscales": dataclasses.replace(V3, mscale=1.0, mscale_all_dim=0.707),
    "llama3": dataclasses.replace(
        V3, rope_scaling="llama3", rope_factor=8.0, rope_theta=5e5, original_seq_len=8192
    ),
}


def test_yarn_of_v3_gives_the_published_numbers():
    """The worked vector of the facts sheet: 192-wide heads, 64 rotated, factor 40 over 4,096
    positions.
    """
    frequencies = rope.inverse_frequencies(V3)
    want = {
        10: 0.0562341,
        11: 0.0390069,
        16: 0.0055,
        22: 1.77828e-4,
        23: 3.33380e-5,
        31: 3.33380e-6,
    }
    for channel, value in want.items():
        assert frequencies[channel] == pytest.approx(value, rel=2e-6)
    assert rope.attention_scale(V3) == pytest.approx(0.13523378, abs=1e-8)
    assert rope.attention_scale(dataclasses.replace(V3, mscale_all_dim=0.707)) == pytest.approx(
        0.11472139, abs=1e-8
    )
    assert rope.attention_scale(dataclasses.replace(V3, rope_scaling="none")) == pytest.approx(
        0.07216878, abs=1e-8
    )


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("layout", ["pairs", "halves"])
def test_rotation_equals_oracle(name, layout):
    config, positions = SCALINGS[name], np.array([0, 1, 7, 600, 4097])
    x = np.random.default_rng(0).normal(size=(len(positions), config.rope_dim))
    angles = rope.angles(jnp.asarray(positions, jnp.int32)[None], config)
    got = getattr(rope, f"rotate_{layout}")(jnp.asarray(x, jnp.float32)[None, :, None], *angles)
    # float32 angles at position 4097 carry about 2e-4 radians of rounding.
    want = getattr(oracle, f"rotate_{layout}")(x, positions, config)
    assert_close(got[0, :4, 0], want[:4], F32._replace(bound=3e-5), "rotated")
    np.testing.assert_allclose(got[0, 4, 0], want[4], atol=2e-3)


def test_last_channels_turn_as_pairs_and_back():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 2, 10)), jnp.float32)
    cos, sin = (
        jnp.asarray(f(np.arange(6.0)).reshape(1, 3, 2), jnp.float32) for f in (np.cos, np.sin)
    )
    turned = rope.rotate_last(x, 4, cos, sin)
    np.testing.assert_array_equal(turned[..., :6], x[..., :6])
    np.testing.assert_array_equal(turned[..., 6:], rope.rotate_pairs(x[..., 6:], cos, sin))
    assert_close(rope.rotate_last(turned, 4, cos, -sin), x, F32)


def test_scores_depend_on_distance_alone():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 1, 64)), jnp.float32)

    def score(first, second):
        rotated = rope.rotate_pairs(x, *rope.angles(jnp.asarray([[first, second]], jnp.int32), V3))
        return float((rotated[0, 0] * rotated[0, 1]).sum())

    assert score(3, 10) == pytest.approx(score(103, 110), rel=1e-4)
    assert score(3, 10) != pytest.approx(score(3, 11), rel=1e-2)


def test_positions_restart_with_each_document():
    segments = jnp.asarray([[1, 1, 1, 2, 2, 3, 0, 0], [4, 4, 1, 1, 1, 1, 1, 2]], jnp.int32)
    want = [[0, 1, 2, 0, 1, 0, 0, 1], [0, 1, 0, 1, 2, 3, 4, 0]]
    np.testing.assert_array_equal(rope.positions_in_segments(segments), want)
