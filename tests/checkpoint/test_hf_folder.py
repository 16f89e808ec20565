import os

import ml_dtypes
import numpy as np
import pytest

from dsjax.checkpoint import names
from dsjax.checkpoint.hf_config import from_hf
from dsjax.checkpoint.hf_folder import FP8, is_hf, open_hf, scale_name, scale_shape
from dsjax.files import write_json
from tests.checkpoint.hf_files import BLOCK, in_fp8, plain, quantization, write
from tests.golden.cases import CASES, ORACLE_CASES

ALL_CASES = {**CASES, **ORACLE_CASES}
V3, MTP, LLAMA = ALL_CASES["v3"], ALL_CASES["v3_mtp"], ALL_CASES["llama"]
BF16 = np.dtype(ml_dtypes.bfloat16)
EXPERT = "model.layers.1.mlp.experts.0.up_proj.weight"


def fp8_config(case):
    return case.config | {"quantization_config": quantization()}


@pytest.mark.parametrize("name", ALL_CASES)
def test_folder_of_each_family_is_opened(tmp_path, name):
    case = ALL_CASES[name]
    folder = open_hf(write(tmp_path, case.config, plain(case), max_bytes=100_000))
    assert folder.model == from_hf(case.config)
    assert (folder.config, folder.block) == (case.config, None)
    assert [row.tensor for row in folder.rows] == list(names.tensors(folder.model, folder.family))
    assert {(row.dtype, row.scale) for row in folder.rows} == {(np.dtype(np.float32), None)}
    assert len(folder.files.files) > 1


def test_fp8_is_told_by_the_scales(tmp_path):
    tensors = in_fp8(MTP)
    # Not every projection has to be in FP8, nor only projections.
    tensors[EXPERT.replace("1", "0", 1)] = np.zeros((32, 64), BF16)
    del tensors[scale_name(EXPERT.replace("1", "0", 1))]
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(FP8)
    tensors[scale_name("lm_head.weight")] = np.ones(scale_shape((160, 64), BLOCK), np.float32)
    folder = open_hf(write(tmp_path, fp8_config(MTP), tensors))
    assert folder.block == BLOCK
    rows = {row.tensor.name: row for row in folder.rows}
    assert rows[EXPERT.replace("1", "0", 1)][1:] == (BF16, None)
    assert rows["lm_head.weight"][1:] == (FP8, "lm_head.weight_scale_inv")
    assert rows["model.layers.1.eh_proj.weight"][1:] == (BF16, None)
    assert rows["model.layers.0.mlp.gate.e_score_correction_bias"].dtype == np.float32
    for row in folder.rows:
        if row.tensor.quantized and row.tensor.name != EXPERT.replace("1", "0", 1):
            assert row[1:] == (FP8, f"{row.tensor.name}_scale_inv")


def test_scales_of_ragged_weights_are_rounded_up():
    assert scale_shape((576, 7168), (128, 128)) == (5, 56)
    assert scale_shape((1, 129), (128, 64)) == (1, 3)


def test_weights_without_fp8_may_keep_the_config(tmp_path):
    folder = open_hf(write(tmp_path, fp8_config(V3), plain(V3, BF16)))
    assert {row.scale for row in folder.rows} == {None}


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_router_bias_may_be_stored_narrow(tmp_path, dtype):
    tensors = {name: value.astype(dtype) for name, value in plain(V3).items()}
    assert {row.dtype for row in open_hf(write(tmp_path, V3.config, tensors)).rows} == {
        np.dtype(dtype)
    }


def without_mtp(tensors):
    return {
        name: value
        for name, value in tensors.items()
        if not name.startswith(("model.layers.1.", "model.layers.2."))
    }


def test_absent_mtp_is_left_out_and_said(tmp_path, caplog):
    """transformers saves a V3 without its MTP tensors and keeps the config's count."""
    kept = without_mtp(plain(MTP))
    folder = open_hf(write(tmp_path, MTP.config, kept))
    assert folder.model.n_mtp == 0 and folder.config["num_nextn_predict_layers"] == 2
    assert {row.tensor.name for row in folder.rows} == kept.keys()
    assert "announces 2 multi-token prediction layers, and the files contain none" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize(("announced", "left"), [(None, 2), (0, 2), (1, 1)])
@pytest.mark.parametrize("fp8", [False, True])
def test_mtp_that_config_does_not_announce_is_left_out_and_said(
    tmp_path, caplog, announced, left, fp8
):
    config, tensors = (fp8_config(MTP), in_fp8(MTP)) if fp8 else (MTP.config, plain(MTP))
    folder = open_hf(write(tmp_path, config | {"num_nextn_predict_layers": announced}, tensors))
    assert folder.model.n_mtp == (announced or 0)
    kept = [f"model.layers.{layer}." for layer in range(1 + (announced or 0))]
    names_kept = {name for name in tensors if not name.startswith("model.layers.")}
    names_kept |= {name for name in tensors if name.startswith(tuple(kept))}
    read = {row.tensor.name for row in folder.rows} | {row.scale for row in folder.rows} - {None}
    assert read == names_kept
    assert f"contain {left} multi-token prediction layers that config.json does not" in caplog.text
    assert len(caplog.records) == 1


def test_layers_beyond_the_model_that_are_no_mtp_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"unexpected 'model\.layers\.2\.input_layernorm"):
        open_hf(write(tmp_path, V3.config | {"num_hidden_layers": 2}, plain(V3)))


def test_copies_in_mtp_layers_may_be_missing(tmp_path):
    """Savers that write a shared tensor once leave them out."""
    tensors = {
        name: value
        for name, value in plain(MTP).items()
        if not name.endswith((".embed_tokens.weight", ".shared_head.head.weight"))
        or name == "model.embed_tokens.weight"
    }
    folder = open_hf(write(tmp_path, MTP.config, tensors))
    assert folder.model.n_mtp == 2
    assert {row.tensor.name for row in folder.rows} == tensors.keys()


TIED = ALL_CASES["qwen2"]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_tied_head_that_repeats_the_embedding_is_read_as_tied(tmp_path, caplog, dtype):
    tensors = plain(TIED, BF16)
    tensors[HEAD] = tensors[EMBEDDING].astype(dtype)
    folder = open_hf(write(tmp_path, TIED.config, tensors))
    assert folder.model.tie_embed
    assert HEAD not in {row.tensor.name for row in folder.rows}
    assert [record.message for record in caplog.records] == [
        f"{tmp_path}: lm_head.weight repeats the embedding: read as tied"
    ]


@pytest.mark.parametrize("row", [0, -1])
def test_tied_head_that_differs_is_refused(tmp_path, row):
    tensors = plain(TIED)
    tensors[HEAD] = tensors[EMBEDDING].copy()
    tensors[HEAD][row, -1] += 1
    write(tmp_path, TIED.config, tensors)
    with pytest.raises(ValueError, match=r"tie_word_embeddings true, and lm_head\.weight differs"):
        open_hf(tmp_path)
    assert not open_hf(tmp_path, {"tie_word_embeddings": False}).model.tie_embed


def test_missing_head_is_refused_with_the_switch_that_it_may_lack(tmp_path):
    with pytest.raises(ValueError, match=r"missing lm_head.* --override tie_word_embeddings=true"):
        open_hf(write(tmp_path, TIED.config | {"tie_word_embeddings": False}, plain(TIED)))


def test_part_of_mtp_is_refused(tmp_path):
    tensors = {
        name: value for name, value in plain(MTP).items() if not name.startswith("model.layers.2.")
    }
    with pytest.raises(ValueError, match=r"missing model\.layers\.2\.enorm\.weight"):
        open_hf(write(tmp_path, MTP.config, tensors))


def test_old_rotary_tables_are_ignored(tmp_path):
    tensors = plain(LLAMA) | {
        f"model.layers.{layer}.self_attn.rotary_emb.{table}": np.zeros(12, np.float32)
        for layer in range(3)
        for table in ("inv_freq", "cos_cached", "sin_cached")
    }
    tensors["model.rotary_emb.inv_freq"] = np.zeros(12, np.float32)
    folder = open_hf(write(tmp_path, LLAMA.config, tensors))
    assert not any("rotary" in row.tensor.name for row in folder.rows)


def changed(tensors, **changes):
    """`tensors` with some replaced, or removed where None is given."""
    merged = tensors | {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in merged.items() if value is not None}


NORM, BIAS = "model.norm.weight", "model.layers.1.mlp.gate.e_score_correction_bias"
Q_A = "model.layers.0.self_attn.q_a_proj.weight"  # [48, 64]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({NORM: None}, r"missing model\.norm\.weight \[64\]"),
        ({EXPERT: None}, r"missing model\.layers\.1\.mlp\.experts\.0\.up_proj\.weight \[32, 64\]"),
        ({BIAS: None}, r"missing model\.layers\.1\.mlp\.gate\.e_score_correction_bias"),
        ({"model.x": np.zeros(2, np.int8)}, r"unexpected 'model\.x' int8\[2\]"),
        ({"model.layers.3.x": np.zeros(2, np.int8)}, r"unexpected 'model\.layers\.3\.x'"),
        ({EXPERT: np.zeros((64, 32), BF16)}, r"bfloat16\[64, 32\], config\.json gives \[32, 64\]"),
        ({NORM: np.zeros((64, 1), BF16)}, r"model\.norm\.weight is bfloat16\[64, 1\]"),
        ({NORM: np.zeros(64, np.int8)}, r"norm\.weight has dtype int8; weights may be"),
        ({BIAS: np.zeros(32, np.float64)}, r"correction_bias has dtype float64; weights may be"),
        ({NORM: np.zeros(64, FP8)}, r"model\.norm\.weight is in FP8, which only matrices may be"),
        ({scale_name(Q_A): None}, r"missing .*q_a_proj\.weight_scale_inv, the scales of an FP8"),
        ({Q_A: None}, r"missing model\.layers\.0\.self_attn\.q_a_proj\.weight \[48, 64\]"),
        (
            {Q_A: np.zeros((48, 64), BF16)},
            r"q_a_proj\.weight_scale_inv is there, but .* is bfloat16 and not in FP8",
        ),
        (
            {scale_name(Q_A): np.zeros((4, 3), np.float32)},
            r"weight_scale_inv is float32\[4, 3\], blocks of \[16, 16\] give float32\[3, 4\]",
        ),
        (
            {scale_name(Q_A): np.zeros((3, 4), BF16)},
            r"weight_scale_inv is bfloat16\[3, 4\], blocks of \[16, 16\] give float32\[3, 4\]",
        ),
        ({"a.weight_scale_inv": np.zeros(1, np.float32)}, r"unexpected 'a\.weight_scale_inv'"),
    ],
)  # fmt: skip
def test_tensors_that_disagree_with_the_config_are_refused(tmp_path, changes, message):
    tensors = changed(in_fp8(V3), **changes)
    with pytest.raises(ValueError, match=message):
        open_hf(write(tmp_path, fp8_config(V3), tensors))


def test_fp8_needs_the_config_too(tmp_path):
    with pytest.raises(ValueError, match=r"is in FP8, but config\.json has no quantization_config"):
        open_hf(write(tmp_path, V3.config, in_fp8(V3)))


def test_all_mismatches_are_listed_together(tmp_path):
    tensors = changed(
        plain(V3), **{NORM: None, EXPERT: np.zeros((1, 1), BF16), "extra": np.zeros(1, BF16)}
    )
    with pytest.raises(ValueError) as failure:
        open_hf(write(tmp_path, V3.config, tensors))
    message = str(failure.value)
    assert str(tmp_path) in message and "Download what is missing" in message
    for part in (f"missing {NORM}", f"{EXPERT} is", "unexpected 'extra'"):
        assert part in message


def test_long_lists_are_cut_and_counted(tmp_path):
    tensors = {name: value for name, value in plain(V3).items() if ".experts." not in name}
    with pytest.raises(ValueError, match=r"; and 189 more such \(192 in all\)\. Download"):
        open_hf(write(tmp_path, V3.config, tensors))


def test_config_of_another_shape_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json gives \[160, 128\]"):
        open_hf(write(tmp_path, V3.config | {"hidden_size": 128}, plain(V3)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_routed_experts": 0}, r"config\.json\.n_routed_experts=0, so all layers are dense"),
        ({"num_experts_per_tok": 33}, r"config\.json\.num_experts_per_tok=33 exceeds"),
        ({"hidden_size": -64}, r"hidden_size=-64 is not between 0 and 2,147,483,647"),
        ({"hidden_size": 2**63}, r"hidden_size=9223372036854775808 is not between"),
        ({"hidden_size": 64.0}, r"hidden_size=64\.0 is not an integer"),
        ({"num_hidden_layers": 10**9}, r"describes more than 1,000,000 tensors"),
        ({"num_nextn_predict_layers": 10**9}, r"describes more than 1,000,000 tensors"),
        ({"n_routed_experts": 2**30}, r"describes more than 1,000,000 tensors"),
        (
            {"rope_scaling": V3.config["rope_scaling"] | {"factor": 0}},
            r"config\.json\.rope_scaling\.factor=0\.0",
        ),
        ({"model_type": "gpt2"}, r"model_type='gpt2' is not supported, only deepseek"),
        ({"quantization_config": quantization() | {"quant_method": "awq"}}, r"quant_method='awq'"),
    ],
)
def test_impossible_config_is_refused_with_its_place(tmp_path, change, message):
    with pytest.raises(ValueError, match=message) as failure:
        open_hf(write(tmp_path, V3.config | change, plain(V3)))
    assert str(tmp_path) in str(failure.value)


def test_remote_code_is_not_looked_at(tmp_path):
    (tmp_path / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = V3.config | {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Model"}}
    assert open_hf(write(tmp_path, config, plain(V3))).model == from_hf(V3.config)
    assert not (tmp_path / "ran").exists()


def test_hf_folder_is_known_whole_or_not(tmp_path):
    assert is_hf(write(tmp_path / "whole", LLAMA.config, plain(LLAMA)))
    os.remove(tmp_path / "whole" / "model.safetensors")
    assert is_hf(tmp_path / "whole")
    for name in ("pytorch_model.bin", "model.safetensors", "pytorch_model.bin.index.json"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
        assert is_hf(tmp_path / name)
    (tmp_path / "run").mkdir()
    assert not is_hf(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text('{"name": "tiny", "model": {}}')
    assert not is_hf(tmp_path / "run") and not is_hf(tmp_path / "run" / "config.json")


def test_overrides_are_read_as_if_the_file_said_so(tmp_path):
    scaling = V3.config["rope_scaling"]
    config = V3.config | {"surprise": 1, "hidden_act": "gelu", "transformers.js_config": {"a": 1}}
    write(tmp_path, config, plain(V3))
    before = (tmp_path / "config.json").read_bytes()
    folder = open_hf(
        tmp_path,
        {
            "surprise": None,
            "hidden_act": "silu",
            "rope_scaling.factor": 7,
            "transformers.js_config": None,
        },
    )
    assert folder.model == from_hf(V3.config | {"rope_scaling": scaling | {"factor": 7}})
    assert folder.config["rope_scaling"] == scaling | {"factor": 7}
    assert (tmp_path / "config.json").read_bytes() == before
    with pytest.raises(ValueError, match=r"config\.json\.rope_scaling\.factor='x' is not a number"):
        open_hf(tmp_path, {"rope_scaling.factor": "x"})


def test_root_of_a_hub_cache_is_named(tmp_path):
    root = tmp_path / "models--deepseek-ai--DeepSeek-V3"
    snapshot = write(root / "snapshots" / "4c1f24", V3.config, plain(V3))
    (root / "blobs").mkdir()
    (root / "snapshots" / "zz-older").mkdir()
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("4c1f24")
    with pytest.raises(
        ValueError, match=rf"root of a model in the Hub's cache.*{snapshot}: name that folder"
    ):
        open_hf(root)
    with pytest.raises(ValueError, match=rf"is the Hub's cache; .* as {root}/snapshots/REVISION"):
        open_hf(tmp_path)
    assert open_hf(snapshot).model == from_hf(V3.config)


@pytest.mark.parametrize("with_config", [False, True])
def test_lora_adapter_is_named_with_its_base(tmp_path, with_config):
    write_json(tmp_path / "adapter_config.json", {"base_model_name_or_path": "deepseek-ai/X"})
    if with_config:
        write_json(tmp_path / "config.json", LLAMA.config)
    for weights in (False, True):
        if weights:
            (tmp_path / "adapter_model.safetensors").write_bytes(b"")
        with pytest.raises(
            ValueError, match=r"a LoRA adapter for 'deepseek-ai/X', .*merge_and_unl"
        ):
            open_hf(tmp_path)


def test_merged_model_may_keep_the_config_of_its_adapter(tmp_path):
    write_json(tmp_path / "adapter_config.json", {"base_model_name_or_path": "x"})
    assert open_hf(write(tmp_path, LLAMA.config, plain(LLAMA))).family == "llama"


def test_file_in_place_of_a_folder_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"pipe is not a folder; name the folder"):
        open_hf(tmp_path / "pipe")
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\0\0\0")
    with pytest.raises(ValueError, match=r"model\.gguf is a GGUF file"):
        open_hf(tmp_path / "model.gguf")
    write(tmp_path / "llama", LLAMA.config, plain(LLAMA))
    with pytest.raises(ValueError, match=r"model\.safetensors is not a folder; name the folder"):
        open_hf(tmp_path / "llama" / "model.safetensors")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 4302354432\n"


def test_shards_that_are_lfs_pointers_are_named_once(tmp_path):
    write(tmp_path, V3.config, plain(V3), max_bytes=20_000)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 20
    for shard in shards:
        shard.write_bytes(LFS)
    with pytest.raises(ValueError, match=r"git lfs pull") as failure:
        open_hf(tmp_path)
    message = str(failure.value).replace(str(tmp_path), "")
    assert len(message) < 600 and f"({len(shards)} in all)" in message


def test_message_about_missing_scales_does_not_grow_with_the_checkpoint(tmp_path):
    tensors = {name: value for name, value in in_fp8(V3).items() if not name.endswith("_scale_inv")}
    with pytest.raises(
        ValueError, match=r"the scales of an FP8 weight; and \d+ more such"
    ) as failure:
        open_hf(write(tmp_path, fp8_config(V3), tensors))
    assert len(str(failure.value).replace(str(tmp_path), "")) < 700
