import dataclasses
import math
import pathlib

import jax.numpy as jnp
import pytest

from dsjax.checkpoint import names
from dsjax.checkpoint.hf_config import family_of, from_hf
from dsjax.config import ModelConfig
from dsjax.model.parameters import declarations
from dsjax.model.transformer import Transformer
from dsjax.precision.policy import Policy
from dsjax.settings import load_config
from tests.golden.cases import CASES, ORACLE_CASES

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
PUBLISHED_V3 = load_config(CONFIGS / "v3_671b.py").model
ALL_CASES = {**CASES, **ORACLE_CASES}


def leaves(config: ModelConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Shape of each leaf of the parameter tree, by path."""
    model = Transformer(config, Policy(jnp.float32))
    return {tuple(leaf.path.split(".")): leaf.shape for leaf in declarations(model)}


@pytest.mark.parametrize("name", ALL_CASES)
def test_table_fills_every_parameter_once(name):
    case = ALL_CASES[name]
    config = from_hf(case.config)
    wanted = leaves(config)
    rows = list(names.tensors(config, family_of(case.config)))
    assert len({row.name for row in rows}) == len(rows)
    indices: dict[tuple[str, ...], set[tuple[int, ...]]] = {}
    for row in rows:
        shape = wanted[row.path]
        assert shape[len(row.slot) :] == row.target_shape, row
        if not row.is_copy:
            assert row.slot not in indices.setdefault(row.path, set()), row
            indices[row.path].add(row.slot)
    assert indices.keys() == wanted.keys()
    for path, filled in indices.items():
        stack = wanted[path][: len(next(iter(filled)))]
        every = {()}
        for size in stack:
            every = {(*index, i) for index in every for i in range(size)}
        assert filled == every, path


@pytest.mark.parametrize(
    ("config", "family"),
    [
        ("llm_67b", "llama"),
        ("moe_16b", "deepseek"),
        ("v2_236b", "deepseek_v2"),
        ("v2_lite", "deepseek_v2"),
        ("v3_671b", "deepseek_v3"),
        ("r1_distill_llama_8b", "llama"),
        ("r1_distill_qwen_1p5b", "qwen2"),
        ("r1_0528_qwen3_8b", "qwen3"),
        ("tiny", "deepseek_v3"),
    ],
)
def test_table_holds_all_parameters_of_a_config(config, family):
    model = load_config(CONFIGS / f"{config}.py").model
    rows = (row for row in names.tensors(model, family) if not row.is_copy)
    assert sum(math.prod(row.shape) for row in rows) == sum(map(math.prod, leaves(model).values()))


def test_table_of_v3_has_as_many_rows_as_published():
    """The published index lists 91,991 tensors: these and a scale for each FP8 weight."""
    rows = list(names.tensors(PUBLISHED_V3, "deepseek_v3"))
    assert len(rows) + sum(row.quantized for row in rows) == 91_991


def test_every_projection_of_a_layer_is_quantized():
    """The Hub counts 680,571,043,840 values of deepseek-ai/DeepSeek-V3 in FP8."""
    rows = list(names.tensors(PUBLISHED_V3, "deepseek_v3"))
    in_fp8 = {row.name for row in rows if row.quantized}
    assert in_fp8 == {row.name for row in rows if "_proj" in row.name and "eh_proj" not in row.name}
    assert sum(math.prod(row.shape) for row in rows if row.quantized) == 680_571_043_840
    layer = [
        row.name.removeprefix("model.layers.0.")
        for row in names.tensors(from_hf(CASES["qwen2"].config), "qwen2")
        if row.quantized and ".layers.0." in row.name
    ]
    attention, ffn = [f"self_attn.{part}" for part in "qkvo"], ["mlp.gate", "mlp.up", "mlp.down"]
    assert layer == [f"{part}_proj.weight" for part in attention + ffn]


def test_table_of_v3_names_what_is_special():
    rows = {row.name: row for row in names.tensors(PUBLISHED_V3, "deepseek_v3")}
    bias = rows["model.layers.3.mlp.gate.e_score_correction_bias"]
    assert (bias.path, bias.slot) == (("moe_layers", "ffn", "gate", "bias"), (0,))
    assert (bias.shape, bias.transpose, bias.keep_float32) == ((256,), False, True)
    assert [row.name for row in rows.values() if row.is_copy] == [
        "model.layers.61.embed_tokens.weight",
        "model.layers.61.shared_head.head.weight",
    ]
    projection = rows["model.layers.61.eh_proj.weight"]
    assert (projection.path, projection.slot) == (("mtp", "eh_proj"), (0,))
    assert (projection.shape, projection.target_shape) == ((7168, 14336), (14336, 7168))
    expert = rows["model.layers.60.mlp.experts.255.down_proj.weight"]
    assert (expert.path[-2:], expert.slot, expert.shape) == (
        ("experts", "w_down"),
        (57, 255),
        (7168, 2048),
    )
    assert rows["model.layers.2.mlp.gate_proj.weight"].path == ("dense_layers", "ffn", "w_gate")
    assert rows["model.layers.61.mlp.gate.e_score_correction_bias"].keep_float32
    assert rows["lm_head.weight"].target_shape == (7168, 129280)
    assert not rows["model.embed_tokens.weight"].transpose


def test_table_of_tied_models_has_no_head():
    case = CASES["qwen2"]
    rows = {row.name for row in names.tensors(from_hf(case.config), "qwen2")}
    assert "lm_head.weight" not in rows and "model.layers.2.self_attn.v_proj.bias" in rows


@pytest.mark.parametrize(
    ("change", "family", "remedy"),
    [
        ({}, "llama", "choose deepseek_v3 or kimi_k2"),
        ({}, "deepseek_v2", "choose deepseek_v3 or kimi_k2"),
        ({"n_mtp": 1}, "deepseek", "choose deepseek_v3 or kimi_k2"),
        ({"router_bias": False}, "deepseek_v3", "nor has any other, so it stays here"),
    ],
)
def test_table_refuses_a_shape_the_family_lacks(change, family, remedy):
    refusal = rf"family {family} has no names for model\.attention=mla.*{remedy}"
    with pytest.raises(ValueError, match=refusal):
        next(names.tensors(dataclasses.replace(PUBLISHED_V3, **change), family))


def test_table_refuses_an_unknown_family():
    with pytest.raises(
        ValueError, match="model_type='gpt2' is not supported, only deepseek, deepseek_v2"
    ):
        next(names.tensors(PUBLISHED_V3, "gpt2"))
