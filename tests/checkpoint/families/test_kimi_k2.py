import pytest

from dsjax.checkpoint import names
from dsjax.checkpoint.hf_config import family_of, from_hf, to_hf
from tests.checkpoint.families.published import RELEASES, of_family


@pytest.mark.parametrize("release", of_family("kimi_k2"))
def test_release_reads_and_writes_back(release):
    published = RELEASES[release]
    model = from_hf(published)
    written = to_hf(model, "kimi_k2")
    assert from_hf(written) == model and family_of(written) == "kimi_k2"
    common = published.keys() & written.keys() - {
        "initializer_range",
        "quantization_config",
        "rope_scaling",
    }
    assert {key: written[key] for key in common} == {key: published[key] for key in common}


def test_kimi_is_v3_under_another_name():
    published = RELEASES["kimi_k2"]
    model = from_hf(published)
    assert model == from_hf(published | {"model_type": "deepseek_v3"})
    assert (model.beta_fast, model.beta_slow, model.rope_factor) == (1.0, 1.0, 32.0)
    assert list(names.tensors(model, "kimi_k2")) == list(names.tensors(model, "deepseek_v3"))
    assert to_hf(model, "kimi_k2")["architectures"] == ["DeepseekV3ForCausalLM"]
