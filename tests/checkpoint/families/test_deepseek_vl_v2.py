"""DeepSeek-VL2: totals of the three sizes from config.json alone, and what is refused."""

import copy
import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.checkpoint import names
from dsjax.checkpoint.exporting import export_checkpoint
from dsjax.checkpoint.eyes import load_eyes, published
from dsjax.checkpoint.families import family_for
from dsjax.checkpoint.families.deepseek_vl_v2 import parts
from dsjax.checkpoint.hf_config import from_hf, to_hf, vision_of
from dsjax.checkpoint.inspection import summarize
from dsjax.checkpoint.load import open_checkpoint
from dsjax.config.vision import SiglipConfig, TilesConfig, VisionConfig
from dsjax.display import Transfer
from dsjax.files import write_json
from dsjax.model.parameters import declarations
from dsjax.precision.policy import Policy
from dsjax.vision.eyes import Eyes
from tests.golden import vl2

FAMILY = "deepseek_vl_v2"


def released(dim, **language):
    """config.json as DeepSeek publishes it: what is a default of their classes is left out."""
    return {
        "architectures": ["DeepseekVLV2ForCausalLM"],
        "candidate_resolutions": vl2.resolutions(384),
        "global_view_pos": "head",
        "model_type": FAMILY,
        "tile_tag": "2D",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.38.2",
        "vision_config": {
            "layers": 27,
            "mlp_ratio": 3.7362,
            "model_name": "siglip_so400m_patch14_384",
            "model_type": "vision",
            "patch_size": 14,
            "width": 1152,
        },
        "projector_config": {"model_type": "mlp_projector", "n_embed": dim},
        "language_config": {
            "architectures": ["DeepseekV2ForCausalLM"],
            "bos_token_id": 0,
            "eos_token_id": 1,
            "first_k_dense_replace": 1,
            "hidden_size": dim,
            "lm_head": True,
            "max_position_embeddings": 4096,
            "model_type": "deepseek_v2",
            "n_group": 1,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "q_lora_rank": None,
            "rm_head": False,
            "topk_group": 1,
            "torch_dtype": "bfloat16",
            **language,
        },
    }


TINY = released(
    1280, intermediate_size=6848, moe_intermediate_size=896, n_routed_experts=64,
    num_attention_heads=10, num_key_value_heads=10, num_hidden_layers=12, vocab_size=129280,
    use_mla=False, kv_lora_rank=None, qk_nope_head_dim=0, qk_rope_head_dim=0, v_head_dim=0,
    topk_method="greedy",
)  # fmt: skip
SMALL = released(
    2048, intermediate_size=10944, moe_intermediate_size=1408, n_routed_experts=64,
    num_attention_heads=16, num_key_value_heads=16, num_hidden_layers=27, vocab_size=102400,
    kv_lora_rank=512, topk_method="greedy",
)  # fmt: skip
BASE = released(
    2560, intermediate_size=12288, moe_intermediate_size=1536, n_routed_experts=72,
    num_attention_heads=32, num_key_value_heads=32, num_hidden_layers=30, vocab_size=129280,
    kv_lora_rank=512, topk_method="noaux_tc", scoring_func="sigmoid", norm_topk_prob=True,
    routed_scaling_factor=2.0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "tensors", "parameters", "language"),
    [
        (TINY, 2_582, 3_370_501_440, 2_934_734_080),
        (SMALL, 5_639, 16_148_349_504, 15_706_484_224),
        (BASE, 6_973, 27_480_134_248, 27_033_548_328),
    ],
    ids=["tiny", "small", "base"],
)
def test_totals_are_exact(tmp_path, config, tensors, parameters, language):
    write_json(tmp_path / "config.json", config)
    summary = summarize(tmp_path, expect=True)
    assert (summary["tensor_count"], summary["total_params"]) == (tensors, parameters)
    named = names.tensors(from_hf(config), FAMILY)
    assert sum(math.prod(row.shape) for row in named) == language


def test_the_module_has_the_parameters_that_are_named():
    vision = vision_of(TINY)
    assert vision
    declared = {each.path: each.count for each in declarations(Eyes(vision, Policy(jnp.float32)))}
    named: dict[str, int] = {}
    for part in parts(vision):
        path = ".".join(part.path)
        named[path] = named.get(path, 0) + part.n_parameters
    assert named == declared
    assert sum(named.values()) == 428_225_600 + 7_539_200 + 2 * 1280


def test_sizes_differ_in_attention_and_router():
    tiny, small, base = map(from_hf, (TINY, SMALL, BASE))
    assert (tiny.attention, tiny.head_dim, tiny.kv_heads) == ("gqa", 128, 10)
    assert (small.attention, small.q_lora_rank, small.v_head_dim) == ("mla", 0, 128)
    assert {each.norm_eps for each in (tiny, small, base)} == {1e-6}
    for model in (tiny, small):
        assert (model.score_func, model.router_bias, model.norm_topk) == ("softmax", False, False)
    assert (base.score_func, base.router_bias, base.norm_topk) == ("sigmoid", True, True)
    assert base.route_scale == 2.0
    # DeepSeek's class has queries of 1536 unless null says that there are none.
    absent = copy.deepcopy(SMALL)
    del absent["language_config"]["q_lora_rank"]
    assert from_hf(absent).q_lora_rank == 1536


def test_the_tower_has_the_other_gelu_and_the_projector_the_exact_one():
    vision = vision_of(TINY)
    assert vision and vision.tower.inter_dim == 4304 and vision.view_side == 14
    assert (vision.tower.activation, vision.aligner_activation) == ("gelu_tanh", "gelu")


@pytest.mark.parametrize("config", [TINY, SMALL, BASE], ids=["tiny", "small", "base"])
def test_config_is_written_and_read_again(config):
    model, vision = from_hf(config), vision_of(config)
    again = to_hf(model, FAMILY, vision=vision)
    assert from_hf(again) == model and vision_of(again) == vision
    for section in ("vision_config", "projector_config"):
        assert {**again[section], **config[section]} == again[section] | {
            name: value for name, value in config[section].items() if name == "model_name"
        }
    for name in ("candidate_resolutions", "global_view_pos", "tile_tag", "architectures"):
        assert again[name] == config[name]


@pytest.mark.parametrize("case", vl2.CASES)
def test_tensors_are_read_and_written_again(tmp_path, case):
    """Every one of the tower, the projector and the two vectors, to the bit."""
    folder = vl2.write(tmp_path, vl2.CASES[case])
    checkpoint = open_checkpoint(folder)
    assert checkpoint.hf and checkpoint.hf.beside
    wanted = vl2.published(vl2.CASES[case])
    found = published(load_eyes(checkpoint), checkpoint.hf.beside.parts)
    assert {"image_newline", "view_seperator", "vision.attn_pool.latent"} < found.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, wanted.pop(name), err_msg=name)
    assert all(name.startswith("language.") for name in wanted)


def test_there_is_no_other_layout(tmp_path):
    from rich.console import Console

    checkpoint = vl2.write(tmp_path / "a", vl2.CASES["heads"])
    with (
        Transfer(Console(quiet=True)) as progress,
        pytest.raises(ValueError, match="deepseek_vl_v2 is the only layout that dsjax has"),
    ):
        export_checkpoint(checkpoint, tmp_path / "b", dtype="keep", progress=progress)


def test_models_that_it_cannot_describe_are_refused():
    model, vision = from_hf(vl2.CASES["heads"]), vision_of(vl2.CASES["heads"])
    assert vision and family_for(model) == "deepseek"
    with pytest.raises(ValueError, match="has models that see tiles"):
        to_hf(model, FAMILY, vision=dataclasses.replace(vision, tiles=None))
    exact = dataclasses.replace(vision.tower, activation="gelu")
    with pytest.raises(ValueError, match="cannot say"):
        to_hf(model, FAMILY, vision=dataclasses.replace(vision, tower=exact))


@pytest.mark.parametrize("inter_dim", [4304, 4608, 4305, 1, 4999])
def test_a_towers_inner_width_survives_the_ratio(inter_dim):
    tower = SiglipConfig(
        patch_size=14, dim=1152, inter_dim=inter_dim, activation="gelu_tanh", pool=True
    )
    tiles = TilesConfig(resolutions=((384, 384),))
    model = dataclasses.replace(from_hf(SMALL))
    vision = VisionConfig(dim=2048, tower=tower, tiles=tiles)
    assert vision_of(to_hf(model, FAMILY, vision=vision)) == vision


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("tile_tag",), "1D", "tile_tag='1D' is not '2D'"),
        (("global_view_pos",), "tail", "global_view_pos='tail' is not supported"),
        (("candidate_resolutions",), [[384]], "candidate_resolutions=[[384]] is not a list of"),
        (("candidate_resolutions",), [[384, 300]], "must be widths and heights of whole tiles"),
        (("vision_config",), 3, "vision_config=3 is not an object"),
        (("vision_config", "global_pool"), "avg", "global_pool='avg' is not supported"),
        (("vision_config", "qk_norm"), True, "has qk_norm, unknown here"),
        (("projector_config", "projector_type"), "linear", "projector_type='linear' is not"),
        (("projector_config", "n_embed"), 7, "n_embed=7 is not 1280, the width that it connects"),
        (("projector_config", "input_dim"), 7, "input_dim=7 is not 1152"),
        (("projector_config", "depth"), 1, "depth=1 is not at least 2"),
        (("projector_config", "token_pooling"), True, "has token_pooling, unknown here"),
        (("language_config", "topk_method"), "gready", "topk_method='gready' is not supported"),
        (("language_config", "topk_method"), "noaux_tc", "lacks scoring_func, which must be"),
        (("language_config", "scoring_func"), "sigmoid", "scoring_func='sigmoid' is not"),
        (("aligner",), {"cls": "X"}, "has aligner, unknown here"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(place, value, said):
    config = copy.deepcopy(TINY)
    inner = config
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    with pytest.raises(ValueError) as caught:
        from_hf(config)
    assert said in str(caught.value)
