import pytest

from dsjax.checkpoint.hf_config import family_of, from_hf, to_hf
from tests.checkpoint.families.published import RELEASES, of_family


@pytest.mark.parametrize("release", of_family("deepseek_v2"))
def test_release_reads_and_writes_back(release):
    published = RELEASES[release]
    model = from_hf(published)
    written = to_hf(model, "deepseek_v2")
    assert from_hf(written) == model and family_of(written) == "deepseek_v2"
    common = published.keys() & written.keys() - {
        "initializer_range",
        "quantization_config",
        "rope_scaling",
    }
    assert {key: written[key] for key in common} == {key: published[key] for key in common}


def test_plain_heads_are_refused():
    """VL2-Tiny's language model says so; without the switch its widths would read as MLA's."""
    with pytest.raises(ValueError, match=r"use_mla=False is not supported, only True"):
        from_hf(RELEASES["v2_lite"] | {"use_mla": False})


def test_groups_are_read_where_the_method_has_them():
    assert from_hf(RELEASES["v2"]).n_limited_groups == 3
    greedy = from_hf(RELEASES["v2_lite"] | {"n_group": None, "topk_group": 9})
    assert (greedy.n_expert_groups, greedy.n_limited_groups) == (1, 1)
