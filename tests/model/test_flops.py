"""Counts against published figures, and against the declared parameters."""

import math
from pathlib import Path

import jax.numpy as jnp
import pytest

from dsjax import settings
from dsjax.config import ModelConfig
from dsjax.model import flops
from dsjax.model.parameters import declarations
from dsjax.model.transformer import Transformer
from dsjax.precision.policy import Policy

CONFIGS = (
    "llm_7b llm_67b moe_2b moe_16b moe_145b v2_lite v2_236b v3_671b r1_distill_qwen_1p5b "
    "r1_distill_qwen_7b r1_distill_qwen_14b r1_distill_qwen_32b r1_distill_llama_8b "
    "r1_distill_llama_70b r1_0528_qwen3_8b tiny small"
).split()


ROOT = Path(__file__).parents[2]


def model(name):
    return settings.load_config(ROOT / "configs" / f"{name}.py").model


def declared(config):
    return declarations(Transformer(config, Policy(compute=jnp.float32)))


@pytest.mark.parametrize(
    ("name", "total", "activated", "mtp"),
    [
        ("v3_671b", 671_026_419_200, 37_552_297_472, 11_610_068_224),
        ("v2_lite", 15_706_484_224, 2_661_150_208, 0),
        ("r1_distill_qwen_1p5b", 1_777_088_000, 1_777_088_000, 0),
        ("r1_distill_qwen_7b", 7_615_616_512, 7_615_616_512, 0),
        ("r1_distill_qwen_14b", 14_770_033_664, 14_770_033_664, 0),
        ("r1_distill_qwen_32b", 32_763_876_352, 32_763_876_352, 0),
        ("r1_distill_llama_8b", 8_030_261_248, 8_030_261_248, 0),
        ("r1_distill_llama_70b", 70_553_706_496, 70_553_706_496, 0),
        ("r1_0528_qwen3_8b", 8_190_735_360, 8_190_735_360, 0),
    ],
)
def test_counts_of_released_models_to_the_unit(name, total, activated, mtp):
    config = model(name)
    assert flops.count_parameters(declared(config), config) == (total, activated, mtp)


@pytest.mark.parametrize(
    ("name", "total", "activated"),
    [
        ("llm_7b", 6.9e9, 6.9e9),
        ("llm_67b", 67.4e9, 67.4e9),
        ("moe_2b", 2.0e9, 0.3e9),
        ("moe_16b", 16.4e9, 2.8e9),
        ("moe_145b", 144.6e9, 22.2e9),
        ("v2_236b", 235.7e9, 21.4e9),
        ("tiny", 10.0e6, 4.5e6),
        ("small", 0.3e9, 0.1e9),
    ],
)
def test_counts_of_other_models_as_published(name, total, activated):
    config = model(name)
    counts = flops.count_parameters(declared(config), config)
    digits = 1 if total > 1e9 else 0
    assert round(counts.total / 1e9, digits) == round(total / 1e9, digits)
    assert round(counts.activated / 1e9, 1) == round(activated / 1e9, 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_matmul_parameters_equal_declared_matrices(name):
    """Everything declared with two or more dims is a matrix product, but the embedding lookup."""
    config = model(name)
    lookup = config.vocab_size * config.dim
    matrices = [
        p for p in declared(config) if p.path.split(".")[-1] not in ("bias", "bq", "bk", "bv")
    ]
    matrices = [p for p in matrices if "norm.weight" not in p.path]
    counts = flops.count_parameters(matrices, config)
    assert counts.activated == flops.matmul_parameters(config) + lookup
    if config.n_mtp:
        head = config.vocab_size * config.dim
        used = math.prod([config.n_mtp, flops.mtp_matmul_parameters(config) - head])
        inactive = config.n_routed_experts - config.n_activated_experts
        inactive *= 3 * config.dim * config.moe_inter_dim * config.n_mtp
        assert counts.mtp == used + inactive


@pytest.mark.parametrize(
    ("name", "length", "causal", "mtp", "giga"),
    [
        ("v3_671b", 4096, True, False, 250.4),
        ("v3_671b", 4096, False, False, 281.2),
        ("v3_671b", 4096, True, True, 260.6),
        ("v2_236b", 4096, True, False, 155.3),
        ("v2_lite", 2048, True, False, 15.56),
        ("v2_lite", 4096, True, False, 16.41),
    ],
)
def test_train_flops_equal_published_tables(name, length, causal, mtp, giga):
    got = flops.train_flops_per_token(model(name), length, causal=causal, mtp=mtp) / 1e9
    assert got == pytest.approx(giga, rel=3e-4)


def test_train_flops_are_three_forward_passes():
    config = model("tiny")
    forward = flops.forward_flops_per_token(config, 256)
    assert flops.train_flops_per_token(config, 256, mtp=False) == 3 * forward
    assert flops.train_flops_per_token(config, 256) > 3 * forward


def dense(**changes):
    shape = {"vocab_size": 8, "dim": 8192, "n_layers": 80, "n_dense_layers": 80, "n_heads": 64}
    return ModelConfig(**shape | {"inter_dim": 8, "attention": "gqa", "n_kv_heads": 8} | changes)


def test_cache_bytes_equal_published_table():
    assert flops.cache_bytes_per_token(model("v3_671b")) == 70_272
    assert flops.cache_bytes_per_token(dense()) == 327_680  # Qwen2.5-72B
    llama_405b = dense(dim=16384, n_layers=126, n_dense_layers=126, n_heads=128)
    assert flops.cache_bytes_per_token(llama_405b) == 516_096
    assert flops.cache_bytes_per_token(model("v2_236b"), 1) == 34_560  # elements
