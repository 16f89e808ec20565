"""DeepSeek-V3.2: its config.json, its tensors as published, and FP8 with power-of-two scales."""

import dataclasses

import numpy as np
import pytest

from dsjax.checkpoint import names
from dsjax.checkpoint.families import FAMILIES, family_for
from dsjax.checkpoint.hf_config import family_of, from_hf, to_hf
from dsjax.checkpoint.hf_folder import FLOAT32, FP8, open_hf
from dsjax.checkpoint.load import load, open_checkpoint
from dsjax.config.shapes import V3, V3_2
from dsjax.model.layers import stays_float32
from tests.checkpoint import conversions
from tests.checkpoint.families.published import RELEASES
from tests.checkpoint.hf_files import plain, write
from tests.golden.cases import V32, Case

INDEXER = "model.layers.{}.self_attn.indexer."
CASE = Case(V32 | {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}, seed=21)


def test_release_reads_and_writes_back():
    published = RELEASES["v3.2"]
    model = from_hf(published)
    assert dataclasses.replace(model, init_std=V3_2.init_std) == V3_2
    written = to_hf(model, "deepseek_v32", block=(128, 128))
    assert from_hf(written) == model and family_of(written) == "deepseek_v32"
    assert written["quantization_config"] == published["quantization_config"]
    common = published.keys() & written.keys() - {"initializer_range", "rope_scaling"}
    assert {key: written[key] for key in common} == {key: published[key] for key in common}


def test_models_with_and_without_indexer_have_families_of_their_own():
    assert (family_for(V3), family_for(V3_2)) == ("deepseek_v3", "deepseek_v32")
    assert not FAMILIES["deepseek_v3"].names(V3_2) and not FAMILIES["deepseek_v32"].names(V3)
    with pytest.raises(ValueError, match=r"deepseek_v3 has no names for .*index_topk=2048"):
        next(names.tensors(V3_2, "deepseek_v3"))


def test_every_layer_has_an_indexer_of_the_published_tensors():
    tensors = {tensor.name: tensor for tensor in names.tensors(V3_2, "deepseek_v32")}
    for layer in (0, 3, 60, 61):  # dense, MoE, the last, and that of the MTP module
        prefix = INDEXER.format(layer)
        found = {
            name.removeprefix(prefix): (each.shape, each.quantized, each.keep_float32)
            for name, each in tensors.items()
            if name.startswith(prefix)
        }
        assert found == {
            "wq_b.weight": ((8192, 1536), True, False),
            "wk.weight": ((128, 7168), True, False),
            "k_norm.weight": ((128,), False, True),
            "k_norm.bias": ((128,), False, True),
            "weights_proj.weight": ((64, 7168), False, False),
        }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index_topk": 0}, r"index_topk above 0, not 16, 48, 0"),
        ({"index_topk": None}, r"config\.json lacks index_topk"),
        ({"index_n_heads": "many"}, r"config\.json\.index_n_heads='many' is not an integer"),
        ({"index_head_dim": 16}, r"json\.index_head_dim=16 has no room for"),
        (
            {"layer_types": ["indexed_attention", "full_attention", "indexed_attention"]},
            r"config\.json\.layer_types=.*full_attention.* is not supported, only \['indexed",
        ),
        (
            {"mlp_layer_types": ["sparse"] * 3},
            r"mlp_layer_types=.* is not supported, only \['dense",
        ),
        ({"q_lora_rank": None}, r"config\.json\.q_lora_rank above 0"),
    ],
)
def test_config_that_cannot_be_computed_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        from_hf(V32 | changes)


def test_what_transformers_derives_is_read():
    derived = {
        "layer_types": ["indexed_attention"] * 3, "mlp_layer_types": ["dense", "sparse", "sparse"],
        "head_dim": 32, "qk_head_dim": 48,
    }  # fmt: skip
    assert from_hf(V32 | derived) == from_hf(V32)


def test_fp8_has_scales_that_are_powers_of_two(tmp_path):
    """Out as FP8 from plain weights, in again as they are, and out again to the same bytes."""
    source = write(tmp_path / "source", CASE.config, plain(CASE))
    conversions.bring_in(source, tmp_path / "ours", "fp8")
    conversions.send_out(tmp_path / "ours", tmp_path / "fp8")
    folder = open_hf(tmp_path / "fp8")
    assert folder.config["quantization_config"]["scale_fmt"] == "ue8m0"
    dtypes = {row.tensor.name: row.dtype for row in folder.rows}
    prefix = INDEXER.format(1)
    assert dtypes[f"{prefix}wq_b.weight"] == dtypes[f"{prefix}wk.weight"] == FP8
    assert dtypes[f"{prefix}weights_proj.weight"] == "bfloat16"
    assert dtypes[f"{prefix}k_norm.weight"] == dtypes[f"{prefix}k_norm.bias"] == FLOAT32
    scales = [folder.files.read(row.scale) for row in folder.rows if row.scale]
    assert scales and all((np.frexp(scale)[0] == 0.5).all() for scale in scales)
    conversions.bring_in(tmp_path / "fp8", tmp_path / "again", "keep")
    conversions.send_out(tmp_path / "again", tmp_path / "back")
    back = open_hf(tmp_path / "back")
    for row in folder.rows:
        name = row.tensor.name
        same = back.files.read(name).tobytes() == folder.files.read(name).tobytes()
        assert same and back.config == folder.config, name


@pytest.mark.parametrize("ours", [False, True], ids=["published", "converted"])
def test_loaded_as_bfloat16_the_indexer_keeps_what_is_float32(ours, tmp_path):
    folder = write(tmp_path / "source", CASE.config, plain(CASE))
    if ours:
        conversions.bring_in(folder, tmp_path / "ours", "bfloat16")
        folder = tmp_path / "ours"
        assert open_checkpoint(folder).dtype == "bfloat16"
    model = load(folder, dtype="bfloat16")
    indexer = model.moe_layers.attn.indexer
    assert indexer.wk[...].dtype == indexer.wq_b[...].dtype == "bfloat16"
    for variable in (indexer.weights_proj, indexer.k_norm.weight, indexer.k_norm.bias):
        assert stays_float32(variable) and variable[...].dtype == np.float32
    want = plain(CASE)[f"{INDEXER.format(1)}k_norm.bias"]
    np.testing.assert_array_equal(indexer.k_norm.bias[...][0], want)
