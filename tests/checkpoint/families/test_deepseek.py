import pytest

from dsjax.checkpoint.hf_config import family_of, from_hf, to_hf
from tests.checkpoint.families.published import RELEASES, of_family


@pytest.mark.parametrize("release", of_family("deepseek"))
def test_release_reads_and_writes_back(release):
    published = RELEASES[release]
    model = from_hf(published)
    written = to_hf(model, "deepseek")
    assert from_hf(written) == model and family_of(written) == "deepseek"
    common = published.keys() & written.keys() - {
        "initializer_range",
        "quantization_config",
        "rope_scaling",
    }
    assert {key: written[key] for key in common} == {key: published[key] for key in common}


def test_head_is_as_wide_as_the_published_code_makes_it():
    published = RELEASES["moe_16b"]
    assert from_hf(published | {"head_dim": 128}) == from_hf(published)
    with pytest.raises(ValueError, match=r"head_dim=64 is not supported, only 128"):
        from_hf(published | {"head_dim": 64})


def test_scaling_of_the_routed_output_is_refused():
    with pytest.raises(ValueError, match=r"routed_scaling_factor=2.0 is not supported, only 1.0"):
        from_hf(RELEASES["moe_16b"] | {"routed_scaling_factor": 2.0})
