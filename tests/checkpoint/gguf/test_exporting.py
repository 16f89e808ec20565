"""GGUF files, read back by the package's own reader and compared with what they must hold."""

import io

import gguf
import ml_dtypes
import numpy as np
import pytest
from rich.console import Console

from dsjax.checkpoint.gguf import exporting
from dsjax.checkpoint.gguf.exporting import export_gguf
from dsjax.display import Transfer
from tests.checkpoint.conversions import bring_in, quiet
from tests.checkpoint.gguf.files import (
    ARCHITECTURES,
    case_of,
    checkpoint,
    expected,
    exported,
    keys,
    write_tokenizer,
)
from tests.checkpoint.hf_files import BLOCK, in_fp8, quantization, write
from tests.checkpoint.runs import write_run
from tests.vision import toy


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tensors_are_llama_cpps_in_float32(tmp_path, name):
    reader = exported(checkpoint(tmp_path / "hf", name), tmp_path / "m.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    wanted = expected(name)
    if name == "llama":
        divisors = found.pop("rope_freqs.weight").data
        # Wavelengths over a length of 64: kept up to 16, divided by 8 from 64 on, blended between.
        waves = 2 * np.pi * 500000.0 ** (np.arange(1, 3) / 12)  # 18.8 and 56
        kept = (64 / waves - 1) / (4 - 1)
        blended = 1 / (kept + (1 - kept) / 8)
        np.testing.assert_allclose(divisors, [1, *blended, *[8] * 9], rtol=1e-5)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key].tensor_type == gguf.GGMLQuantizationType.F32
        np.testing.assert_array_equal(found[key].data, value, err_msg=key)


def test_keys_describe_v3(tmp_path):
    found = keys(exported(checkpoint(tmp_path / "hf", "v3_mtp"), tmp_path / "m.gguf"))
    config = case_of("v3_mtp").config
    own = {
        key.removeprefix("deepseek2."): value
        for key, value in found.items()
        if key.startswith("deepseek2.")
    }
    assert own == {
        "block_count": 2,  # one layer and one module
        "nextn_predict_layers": 1,
        "context_length": 2560,
        "embedding_length": 64,
        "feed_forward_length": 112,
        "vocab_size": 160,
        "attention.head_count": 4,
        "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "attention.key_length": 40 + 32,
        "attention.value_length": 40,
        "attention.key_length_mla": 16 + 32,
        "attention.value_length_mla": 24,
        "attention.q_lora_rank": 48,
        "attention.kv_lora_rank": 40,
        "leading_dense_block_count": 0,
        "expert_count": 32,
        "expert_used_count": 6,
        "expert_shared_count": 1,
        "expert_feed_forward_length": 32,
        "expert_weights_scale": 2.5,
        "expert_weights_norm": True,
        "expert_gating_func": 2,
        "expert_group_count": 8,
        "expert_group_used_count": 3,
        "rope.dimension_count": 32,
        "rope.freq_base": 10000.0,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 40.0,
        "rope.scaling.original_context_length": 64,
        "rope.scaling.yarn_beta_fast": 32.0,
        "rope.scaling.yarn_beta_slow": 1.0,
        "rope.scaling.yarn_log_multiplier": pytest.approx(0.1),
    }
    assert config["num_nextn_predict_layers"] == 1
    assert found["general.architecture"] == "deepseek2"
    assert found["general.file_type"] == 0 and found["general.quantization_version"] == 2
    assert found["tokenizer.ggml.model"] == "none"


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "F16", "BF16", "MXFP4"])
def test_quantized_bytes_are_the_packages(tmp_path, kind):
    folder = checkpoint(tmp_path / "hf", "v3")
    reader = exported(folder, tmp_path / "m.gguf", f"experts={kind},*=Q8_0")
    found = {tensor.name: tensor for tensor in reader.tensors}
    wanted = gguf.quantize(
        expected("v3")["blk.1.ffn_up_exps.weight"], gguf.GGMLQuantizationType[kind]
    )
    tensor = found["blk.1.ffn_up_exps.weight"]
    assert tensor.tensor_type.name == kind
    assert tensor.data.tobytes() == wanted.tobytes()
    # Rows of 40 and 24 values do not divide into blocks; norms and the router stay as they are.
    assert found["blk.0.attn_output.weight"].tensor_type.name == "Q8_0"
    assert found["blk.0.attn_v_b.weight"].tensor_type.name == "F16"
    assert found["blk.1.ffn_gate_inp.weight"].tensor_type.name == "F32"
    assert found["blk.1.attn_norm.weight"].tensor_type.name == "F32"


def test_of_a_model_that_sees_the_language_model_is_written(tmp_path):
    progress = Transfer(Console(file=(said := io.StringIO()), width=200))
    folder = toy.write(tmp_path / "janus")
    (folder / "tokenizer.json").unlink()  # no kind that llama.cpp has
    export_gguf(folder, tmp_path / "m.gguf", progress=progress)
    assert "without its pictures" in said.getvalue()
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert "blk.1.attn_q.weight" in names and not any("vision" in name for name in names)


def test_pieces_do_not_change_the_file(tmp_path, monkeypatch):
    folder = checkpoint(tmp_path / "hf", "v3")
    exported(folder, tmp_path / "whole" / "m.gguf", "Q8_0")
    monkeypatch.setattr(exporting, "_PIECE", 100)
    exported(folder, tmp_path / "cut" / "m.gguf", "Q8_0")
    assert (tmp_path / "cut/m.gguf").read_bytes() == (tmp_path / "whole/m.gguf").read_bytes()


def test_sources_of_all_kinds_give_the_same_tensors(tmp_path):
    folder = checkpoint(tmp_path / "hf", "v3")
    bring_in(folder, tmp_path / "ours")
    write_run(tmp_path / "run", case_of("v3"), 3)
    wanted = {t.name: t.data for t in exported(folder, tmp_path / "a.gguf").tensors}
    for source in ("ours", "run"):
        reader = exported(tmp_path / source, tmp_path / f"{source}.gguf")
        assert [tensor.name for tensor in reader.tensors] == list(wanted)
        for tensor in reader.tensors:
            np.testing.assert_array_equal(tensor.data, wanted[tensor.name], tensor.name)


def test_fp8_becomes_bfloat16(tmp_path):
    case = case_of("v3")
    config = case.config | {"quantization_config": quantization(), "torch_dtype": "bfloat16"}
    tensors = in_fp8(case)
    reader = exported(write(tmp_path / "hf", config, tensors), tmp_path / "m.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}["blk.0.ffn_up.weight"]
    assert found.tensor_type.name == "BF16"
    name = "model.layers.0.mlp.up_proj.weight"
    scales = tensors[f"{name}_scale_inv"].repeat(BLOCK[0], 0).repeat(BLOCK[1], 1)
    values = tensors[name].astype(np.float32)
    wanted = values * scales[: values.shape[0], : values.shape[1]]
    assert found.data.tobytes() == wanted.astype(ml_dtypes.bfloat16).tobytes()


def test_interrupted_export_continues(tmp_path, monkeypatch):
    folder = checkpoint(tmp_path / "hf", "v3")
    exported(folder, tmp_path / "whole" / "m.gguf", "Q8_0")
    convert, done = exporting._convert, []

    def fail(piece, plan, source):
        if len(done) == 40:
            raise OSError("no more")
        done.append(piece)
        return convert(piece, plan, source)

    target = tmp_path / "m.gguf"
    monkeypatch.setattr(exporting, "_convert", fail)
    with pytest.raises(OSError, match="no more"):
        export_gguf(folder, target, choice="Q8_0", progress=quiet())
    assert not target.exists() and (tmp_path / "m.gguf.partial").is_dir()
    again = []
    monkeypatch.setattr(exporting, "_convert", lambda *args: again.append(1) or convert(*args))
    export_gguf(folder, target, choice="Q8_0", progress=quiet())
    assert target.read_bytes() == (tmp_path / "whole/m.gguf").read_bytes()
    assert len(again) < 52 + 2 * 31 * 3  # not from the beginning
    assert not (tmp_path / "m.gguf.partial").exists()


def test_existing_file_is_kept(tmp_path):
    folder = checkpoint(tmp_path / "hf", "qwen2")
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(ValueError, match=r"m\.gguf exists; remove it, or name another"):
        export_gguf(folder, tmp_path / "m.gguf", progress=quiet())
    assert (tmp_path / "m.gguf").read_text() == "mine"
    with pytest.raises(ValueError, match="is inside"):
        export_gguf(folder, folder / "m.gguf", progress=quiet())


@pytest.mark.parametrize(
    ("value", "choice", "message"),
    [(np.nan, "F32", "contains NaN or infinity"), (1e5, "Q8_0", "beyond 65,504.*=BF16")],
)
def test_values_that_a_type_cannot_hold_are_refused(tmp_path, value, choice, message):
    folder = checkpoint(tmp_path / "hf", "qwen2")
    tensors = dict(expected_hf(folder))
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    write(folder, case_of("qwen2").config, tensors)
    with pytest.raises(ValueError, match=rf"layers\.1\.mlp\.up_proj\.weight.*{message}"):
        export_gguf(folder, tmp_path / "m.gguf", choice=choice, progress=quiet())
    assert not list(tmp_path.glob("m.gguf*"))


def expected_hf(folder):
    from dsjax.checkpoint.tensor_files import open_folder

    files = open_folder(folder)
    return {name: files.read(name) for name in files.tensors}


def test_another_model_of_llama_cpps_is_refused(tmp_path):
    folder = checkpoint(tmp_path / "hf", "v3", rms_norm_eps=1e-3)
    with pytest.raises(ValueError, match=r"norm_eps=0\.001"):
        export_gguf(folder, tmp_path / "m.gguf", progress=quiet())
    assert not list(tmp_path.glob("m.gguf*"))


def test_modelfile_lies_beside(tmp_path):
    folder = checkpoint(tmp_path / "hf", "llama", vocab_size=310)
    write_tokenizer(folder)
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": 1}')
    exported(folder, tmp_path / "m.gguf")
    assert (tmp_path / "Modelfile").read_text() == (
        'FROM ./m.gguf\nPARAMETER num_ctx 2560\nPARAMETER temperature 0.6\nPARAMETER stop "</s>"\n'
    )
