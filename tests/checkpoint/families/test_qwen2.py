import pytest

from dsjax.checkpoint.hf_config import family_of, from_hf, to_hf
from tests.checkpoint.families.published import RELEASES, of_family


@pytest.mark.parametrize("release", of_family("qwen2"))
def test_release_reads_and_writes_back(release):
    published = RELEASES[release]
    model = from_hf(published)
    written = to_hf(model, "qwen2")
    assert from_hf(written) == model and family_of(written) == "qwen2"
    common = published.keys() & written.keys() - {
        "initializer_range",
        "quantization_config",
        "rope_scaling",
    }
    assert {key: written[key] for key in common} == {key: published[key] for key in common}


def test_multimodal_rope_that_is_off_is_passed_over():
    published = RELEASES["r1_distill_qwen_1p5b"]
    assert published["use_mrope"] is False
    with pytest.raises(ValueError, match=r"config\.json has use_mrope, unknown here"):
        from_hf(published | {"use_mrope": True})


def test_sliding_window_is_refused_only_where_it_is_on():
    published = RELEASES["r1_distill_qwen_7b"]
    assert published["sliding_window"] == 4096
    with pytest.raises(ValueError, match=r"use_sliding_window=True is not supported"):
        from_hf(published | {"use_sliding_window": True})
    layers = ["full_attention"] * 28
    assert from_hf(published | {"layer_types": layers}) == from_hf(published)
    with pytest.raises(
        ValueError, match=r"layer_types=.*is not supported, only \['full_attention'"
    ):
        from_hf(published | {"layer_types": [*layers[1:], "sliding_attention"]})
