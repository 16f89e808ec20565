import numpy as np
import pytest

from dsjax.checkpoint import names
from dsjax.checkpoint.hf_config import family_of, from_hf, to_hf
from dsjax.checkpoint.hf_folder import open_hf
from dsjax.checkpoint.load import open_checkpoint
from tests.checkpoint import conversions
from tests.checkpoint.families.published import RELEASES, of_family
from tests.checkpoint.hf_files import plain, write
from tests.golden.cases import CASES


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


def test_kimi_goes_both_ways_with_its_tokenizer(tmp_path):
    """Its tokenizer is tiktoken.model and settings; the code beside them stays behind."""
    case = CASES["v3"]
    config = case.config | {"model_type": "kimi_k2", "auto_map": {"AutoConfig": "x.Y"}}
    source = write(tmp_path / "source", config, plain(case))
    beside = {"tiktoken.model": b"IQ== 0\n", "tokenizer_config.json": b"{}", "LICENSE": b"x"}
    for name, data in (beside | {"tokenization_kimi.py": b"raise SystemExit"}).items():
        (source / name).write_bytes(data)
    conversions.bring_in(source, tmp_path / "ours")
    assert open_checkpoint(tmp_path / "ours").family == "kimi_k2"
    conversions.send_out(tmp_path / "ours", tmp_path / "back")
    back = open_hf(tmp_path / "back")
    assert back.config == {key: value for key, value in config.items() if key != "auto_map"} | {
        "torch_dtype": "float32"
    }
    for name, data in beside.items():
        assert (tmp_path / "back" / name).read_bytes() == data
    assert not (tmp_path / "back" / "tokenization_kimi.py").exists()
    for row in back.rows:
        np.testing.assert_array_equal(
            back.files.read(row.tensor.name), plain(case)[row.tensor.name]
        )
