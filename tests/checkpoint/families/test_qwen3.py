import json
import math

import pytest

import dsjax
from dsjax.checkpoint.hf_config import family_of, from_hf, to_hf
from dsjax.config.shapes import QWEN3_8B
from tests.checkpoint import conversions
from tests.checkpoint.families.published import RELEASES, of_family
from tests.checkpoint.hf_files import plain, write
from tests.closeness import EXACT, assert_close
from tests.golden.cases import CASES
from tests.golden.checkpoint import tokens

PUBLISHED = RELEASES["r1_0528_qwen3_8b"]
SCALING = PUBLISHED["rope_scaling"]


@pytest.mark.parametrize("release", of_family("qwen3"))
def test_release_reads_and_writes_back(release):
    published = RELEASES[release]
    model = from_hf(published)
    written = to_hf(model, "qwen3")
    assert from_hf(written) == model and family_of(written) == "qwen3"
    common = published.keys() & written.keys() - {"initializer_range", "rope_scaling"}
    assert {key: written[key] for key in common} == {key: published[key] for key in common}
    kept = SCALING.keys() - {"attn_factor"}
    assert {key: written["rope_scaling"][key] for key in kept} == {
        key: SCALING[key] for key in kept
    }


def test_release_is_the_shape_of_its_config():
    assert from_hf(PUBLISHED) == QWEN3_8B.__class__(
        **vars(QWEN3_8B) | {"init_std": from_hf(PUBLISHED).init_std}
    )


def test_attn_factor_is_passed_over_and_attention_factor_is_not():
    """As transformers reads them: the first is unknown to it, the second scales cos and sin."""
    bare = {key: value for key, value in SCALING.items() if key != "attn_factor"}
    assert from_hf(PUBLISHED) == from_hf(PUBLISHED | {"rope_scaling": bare})
    cancelled = from_hf(PUBLISHED | {"rope_scaling": bare | {"attention_factor": 1.0}})
    assert (from_hf(PUBLISHED).mscale, cancelled.mscale) == (1.0, 0.0)
    own = 0.1 * math.log(4) + 1
    assert SCALING["attn_factor"] * own == pytest.approx(1, rel=1e-15)
    with pytest.raises(ValueError, match=r"attn_factor='high' is not a number"):
        from_hf(PUBLISHED | {"rope_scaling": bare | {"attn_factor": "high"}})


def test_absent_head_width_is_128():
    """Not hidden_size / num_attention_heads, which another family's loader would take."""
    absent = {key: value for key, value in PUBLISHED.items() if key != "head_dim"}
    assert from_hf(absent | {"num_attention_heads": 64}).head_dim == 128
    assert to_hf(from_hf(PUBLISHED), "qwen3")["head_dim"] == 128


def test_biases_and_sliding_windows_are_refused():
    for change in ({"attention_bias": True}, {"use_sliding_window": True}):
        (name,) = change
        with pytest.raises(ValueError, match=rf"{name}=True is not supported, only False"):
            from_hf(PUBLISHED | change)


def test_checkpoint_survives_conversion_both_ways(tmp_path):
    case = CASES["qwen3"]
    folder = write(tmp_path / "hf", case.config, plain(case))
    conversions.bring_in(folder, tmp_path / "converted")
    conversions.send_out(tmp_path / "converted", tmp_path / "back")
    ids = tokens(case, 12)[None]
    want = dsjax.load(folder)(ids)
    for place in ("converted", "back"):
        assert_close(dsjax.load(tmp_path / place)(ids), want, EXACT, place)
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["architectures"] == ["Qwen3ForCausalLM"]
