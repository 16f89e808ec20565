import numpy as np
import pytest

from dsjax.checkpoint.families.sight import Part
from tests.checkpoint.broken_rules import refused
from tests.checkpoint.families import (
    test_deepseek_towers,
    test_deepseek_vl,
    test_deepseek_vl_v2,
    test_janusflow,
    test_multi_modality,
)

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("kind", "published", "ours"),
    [
        ("plain", (1, 4, 6), (4, 6)),
        ("matrix", (4, 6), (6, 4)),
        ("kernel", (8, 3, 5, 5), (5, 5, 3, 8)),
        ("fused", (12, 4), (3, 4, 4)),
    ],
)
def test_conversion_is_invertible(kind, published, ours):
    part = Part("x", ("x", "weight"), (), published, kind)
    tensor = RNG.normal(size=published)
    got = part.ours(tensor, ours)
    assert got.shape == ours
    np.testing.assert_array_equal(part.published(got), tensor)


def test_fused_queries_come_first_and_are_transposed():
    tensor = RNG.normal(size=(12, 4))
    got = Part("x", ("x",), (), (12, 4), "fused").ours(tensor, (3, 4, 4))
    for place in range(3):
        np.testing.assert_array_equal(got[place], tensor[4 * place : 4 * place + 4].T)


def test_a_kernel_is_turned_to_rows_columns_in_out():
    tensor = RNG.normal(size=(8, 3, 5, 5))
    got = Part("x", ("x",), (), (8, 3, 5, 5), "kernel").ours(tensor, (5, 5, 3, 8))
    assert got[1, 2, 0, 7] == tensor[7, 0, 1, 2]


def test_a_record_of_training_is_no_parameter():
    assert not Part("x", ("vq", "usage"), (), (4,)).counts
    assert Part("x", ("vq", "codebook"), (), (4, 2)).counts


@pytest.mark.parametrize(
    ("config", "some"),
    [
        (test_multi_modality.JANUS_1B, "gen_vision_config.params.n_embed"),
        (test_multi_modality.VL_1B, "vision_config.params.image_size"),
        (test_janusflow.RELEASED, "vision_gen_dec_config.params.norm_eps"),
        (test_deepseek_towers.RELEASED, "vision_config.params.high_res_cfg.image_size"),
        (test_deepseek_vl.CONFIG, "vision_config.intermediate_size"),
        (test_deepseek_vl_v2.TINY, "vision_config.width"),
        (test_deepseek_vl_v2.BASE, "language_config.n_group"),
    ],
)
def test_broken_rules_name_the_fields_of_the_file(config, some):
    found = refused(config)
    assert some in found and len(found) > 8
