"""The shapes of published models: one config trains each, and none inherits what is not its own."""

import pytest

from dsjax import settings
from dsjax.config import Config, ModelConfig, shapes
from tests.test_configs import PATHS, root

SHAPES = {name: value for name, value in vars(shapes).items() if isinstance(value, ModelConfig)}


def test_one_config_trains_each_shape():
    trained = [path for path in PATHS if root(path) is Config]  # others begin with a checkpoint
    models = [settings.load_config(path).model for path in trained]
    assert {name: models.count(shape) for name, shape in SHAPES.items()} == dict.fromkeys(SHAPES, 1)
    # V3 for two longer contexts; tiny, sparse_tiny, nsa_tiny and small are shapes of our own
    assert len(models) == len(SHAPES) + 6


@pytest.mark.parametrize(
    ("names", "fields"),
    [
        (
            "LLM_7B LLM_67B MOE_2B MOE_16B MOE_145B",
            {"attention": "gqa", "rope_scaling": "none", "rope_theta": 1e4, "norm_eps": 1e-6},
        ),
        ("V2 V2_LITE", {"score_func": "softmax", "mscale": 0.707, "norm_topk": False, "n_mtp": 0}),
        ("V3 V3_2", {"score_func": "sigmoid", "mscale": 1.0, "norm_topk": True, "n_mtp": 1}),
        ("V3_2", {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}),
        ("V2 V2_LITE V3 V3_2", {"attention": "mla", "kv_lora_rank": 512, "rope_factor": 40.0}),
        ("NSA_27B", {"attention": "nsa", "nsa_length": 32, "nsa_count": 16, "v_head_dim": 128}),
        ("QWEN_1P5B QWEN_7B", {"norm_eps": 1e-6, "rope_theta": 1e4, "qkv_bias": True}),
        ("QWEN_14B QWEN_32B", {"norm_eps": 1e-5, "rope_theta": 1e6, "qkv_bias": True}),
        ("QWEN3_8B", {"rope_scaling": "yarn", "rope_theta": 1e6, "qk_norm": True}),
        ("LLAMA_8B LLAMA_70B", {"rope_scaling": "llama3", "rope_theta": 5e5, "qkv_bias": False}),
    ],
)
def test_shapes_have_the_fields_of_their_family(names, fields):
    for name in names.split():
        assert {key: getattr(SHAPES[name], key) for key in fields} == fields, name


def test_shapes_without_routed_experts_are_dense_throughout():
    for name, shape in SHAPES.items():
        assert bool(shape.n_moe_layers) == bool(shape.n_routed_experts), name
        assert name.startswith(("MOE", "V", "NSA")) == bool(shape.n_routed_experts), name
