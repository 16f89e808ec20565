import pytest

from dsjax.checkpoint.hf_config import family_of, from_hf, to_hf
from tests.checkpoint.families.published import RELEASES, of_family


@pytest.mark.parametrize("release", of_family("deepseek_v3"))
def test_release_reads_and_writes_back(release):
    published = RELEASES[release]
    model = from_hf(published)
    written = to_hf(model, "deepseek_v3")
    assert from_hf(written) == model and family_of(written) == "deepseek_v3"
    common = published.keys() & written.keys() - {
        "initializer_range",
        "quantization_config",
        "rope_scaling",
    }
    assert {key: written[key] for key in common} == {key: published[key] for key in common}


def test_number_of_mtp_modules_has_two_names():
    published = RELEASES["v3"]
    assert from_hf(published).n_mtp == 1
    assert from_hf(published | {"num_mtp_layers": 1}).n_mtp == 1
    with pytest.raises(ValueError, match=r"num_nextn_predict_layers=1 is not supported, only 2"):
        from_hf(published | {"num_mtp_layers": 2})
