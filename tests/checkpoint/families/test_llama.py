import pytest

from dsjax.checkpoint.hf_config import family_of, from_hf, to_hf
from tests.checkpoint.families.published import RELEASES, of_family


@pytest.mark.parametrize("release", of_family("llama"))
def test_release_reads_and_writes_back(release):
    published = RELEASES[release]
    model = from_hf(published)
    written = to_hf(model, "llama")
    assert from_hf(written) == model and family_of(written) == "llama"
    common = published.keys() & written.keys() - {
        "initializer_range",
        "quantization_config",
        "rope_scaling",
    }
    assert {key: written[key] for key in common} == {key: published[key] for key in common}


def test_bias_is_refused():
    for name in ("attention_bias", "mlp_bias"):
        with pytest.raises(ValueError, match=rf"{name}=True is not supported, only False"):
            from_hf(RELEASES["llm_7b"] | {name: True})
