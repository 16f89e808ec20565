"""Rope settings at the edges of what is legal."""

import math

import pytest

from dsjax.checkpoint.families import family_for
from dsjax.checkpoint.hf_config import from_hf, to_hf
from tests.golden.cases import LLAMA, QWEN2, V3

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 640}


def yarn(**changes):
    return {"rope_scaling": YARN | changes}


def test_equal_betas_are_legal():
    model = from_hf(V3 | yarn(beta_fast=1.0, beta_slow=1.0))
    assert (model.beta_fast, model.beta_slow) == (1.0, 1.0)
    with pytest.raises(ValueError, match=r"scaling\.beta_slow=2\.0 exceeds .*scaling\.beta_f"):
        from_hf(V3 | yarn(beta_fast=1.0, beta_slow=2.0))


def test_zero_beta_is_the_default():
    """As in transformers; taken as it stands it would divide by zero."""
    model = from_hf(V3 | yarn(beta_fast=0, beta_slow=0))
    assert (model.beta_fast, model.beta_slow) == (32.0, 1.0)


def test_null_factor_is_the_ratio_of_the_lengths():
    assert from_hf(V3 | yarn(factor=None)).rope_factor == 2560 / 640
    with pytest.raises(ValueError, match=r"rope_scaling lacks factor"):
        from_hf(LLAMA | {"rope_scaling": {"type": "linear"}})


@pytest.mark.parametrize("config", [LLAMA, QWEN2])
@pytest.mark.parametrize("factor", [1.0, 0.8, 1.3, 0.1 * math.log(4.0) + 1])
def test_explicit_attention_factor_survives(config, factor):
    model = from_hf(config | yarn(attention_factor=factor))
    assert 0.1 * model.mscale * math.log(4.0) + 1 == pytest.approx(factor, rel=1e-14)
    assert model.mscale_all_dim == 0.0
    back = from_hf(to_hf(model, family_for(model)))
    assert back.mscale == pytest.approx(model.mscale, rel=1e-12)


def test_attention_factor_takes_the_place_of_mscale():
    """It is the factor on cos and sin, whatever mscale says; mscale_all_dim scales the scores."""
    model = from_hf(V3 | yarn(attention_factor=1.2, mscale=9.0, mscale_all_dim=0.7))
    step = 0.1 * math.log(4.0)
    ratio = (step * model.mscale + 1) / (step * 0.7 + 1)
    assert ratio == pytest.approx(1.2, rel=1e-14) and model.mscale_all_dim == 0.7


def test_attention_factor_of_nothing_stretched():
    assert from_hf(LLAMA | yarn(factor=1.0, attention_factor=1)).mscale == 1.0
    with pytest.raises(ValueError, match=r"attention_factor=2 is not supported, only 1"):
        from_hf(LLAMA | yarn(factor=1.0, attention_factor=2))


def test_settings_that_are_off_switch_nothing_on():
    assert from_hf(QWEN2 | {"rope_scaling": {"type": None, "mrope_section": None}}) == from_hf(
        QWEN2 | {"rope_scaling": {}}
    )
    assert from_hf(V3 | yarn(finetuned=True, extrapolate=False)) == from_hf(V3 | yarn())
    with pytest.raises(ValueError, match=r"rope_scaling has mrope_section, unknown here"):
        from_hf(QWEN2 | {"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}})


def test_equal_frequency_factors_of_llama3_are_legal():
    scaling = LLAMA["rope_scaling"] | {"low_freq_factor": 2.0, "high_freq_factor": 2.0}
    assert from_hf(LLAMA | {"rope_scaling": scaling}).high_freq_factor == 2.0
