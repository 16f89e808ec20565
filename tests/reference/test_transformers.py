"""The comparisons of `tests/test_equivalence.py` live: checkpoints that nobody has looked at, read
by transformers itself.

Shapes and weights follow from a seed. Set DSJAX_REFERENCE_SEED to try others; a token whose sixth
and seventh expert score alike to the last digit of float32 may then go either way, and its logits
with it.
"""

from __future__ import annotations

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.checkpoint import names
from dsjax.checkpoint.hf_config import family_of, from_hf
from tests.closeness import LOGITS, assert_close
from tests.golden import checkpoint, compare, ours
from tests.golden.cases import CASES, LENGTH, LLAMA, QWEN2, QWEN3, STORED, V2, V2_LITE, V3, Case

pytestmark = [
    pytest.mark.torch,
    # transformers and torch deprecate faster than they release.
    pytest.mark.filterwarnings("ignore"),
]
SEED = int(os.environ.get("DSJAX_REFERENCE_SEED", "100"))
FAMILIES = {
    "v3": V3, "v2": V2, "v2_lite": V2_LITE, "llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3,
}  # fmt: skip


@pytest.fixture(scope="module")
def reference():
    from tests.golden import transformers_reference

    return transformers_reference


def drawn(family: str, seed: int) -> Case:
    """A checkpoint of a random shape."""
    rng = np.random.default_rng([seed, *family.encode()])

    def pick(*choices):
        return choices[rng.integers(len(choices))]

    heads = pick(2, 3, 4)
    config = FAMILIES[family] | {
        "vocab_size": int(rng.integers(50, 300)),
        "hidden_size": heads * pick(16, 24),
        "intermediate_size": int(rng.integers(20, 150)),
        "num_hidden_layers": pick(2, 3, 4),
        "num_attention_heads": heads,
        "rope_theta": pick(1000.0, 10000.0, 500000.0),
        "rms_norm_eps": pick(1e-6, 1e-5, 1e-3),
        "tie_word_embeddings": pick(True, False),
    }
    if family in ("llama", "qwen2", "qwen3"):
        config |= {"num_key_value_heads": pick(1, heads), "head_dim": pick(8, 24)}
        return Case({name: value for name, value in config.items()}, seed)
    mscales = pick(
        {"mscale": 1.0, "mscale_all_dim": 0.707},
        {"mscale": 0.707, "mscale_all_dim": 0.707},
        {"mscale": None, "mscale_all_dim": None},
    )
    low = float(rng.uniform(-2, 1))
    config |= {
        "num_key_value_heads": heads,
        "q_lora_rank": pick(None, 20, 36),
        "kv_lora_rank": pick(16, 40),
        "qk_nope_head_dim": pick(8, 24),
        "qk_rope_head_dim": pick(8, 16, 32),
        "v_head_dim": pick(8, 20),
        "first_k_dense_replace": pick(1, 1, 2),
        "moe_intermediate_size": int(rng.integers(8, 40)),
        "n_shared_experts": pick(1, 2, 3),
        "num_experts_per_tok": pick(2, 5, 8),
        "routed_scaling_factor": pick(1.0, 2.5, 16.0),
        "rope_scaling": V3["rope_scaling"] | {"factor": pick(8, 40), **mscales},
    }
    if family != "v2_lite":
        config |= {"n_routed_experts": 40, "n_group": pick(4, 5, 10), "topk_group": pick(2, 3)}
    return Case(config, seed, bias=(low, float(rng.uniform(low, 2))))


@pytest.mark.parametrize("seed", [SEED, SEED + 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_random_checkpoint_equals_transformers(family, seed, reference):
    case = drawn(family, seed)
    want = reference.run(case, LENGTH)
    got = ours.run(case, LENGTH)
    assert got.keys() == want.keys()
    compare.assert_equivalent(got, want)


@pytest.mark.parametrize("name", CASES)
def test_stored_outputs_are_those_of_this_transformers(name, reference):
    live, stored = reference.run(CASES[name], LENGTH), compare.golden(name)
    every = np.arange(LENGTH)
    for key, value in stored.items():
        rows = every if key.startswith("router") else every[STORED]
        assert_close(live[key][rows].astype(np.float64), value.astype(np.float64), name=key)


@pytest.mark.parametrize("name", ["v3", "v2_lite", "qwen2", "qwen3"])
def test_gradients_equal_transformers(name, reference):
    """The gradient of the next-token loss for every published tensor, the router's through its
    chosen weights."""
    import torch

    case, length = CASES[name], 96
    tokens = checkpoint.tokens(case, length)
    model = reference.load(case)
    ids = torch.from_numpy(tokens).long()[None]
    logits = model(ids, use_cache=False).logits[0, :-1]
    torch.nn.functional.cross_entropy(logits, ids[0, 1:]).backward()
    want = {
        key: value.grad.numpy() for key, value in model.named_parameters() if value.grad is not None
    }

    config, tree = checkpoint.parameters(case)

    def loss(model):
        log_probabilities = jax.nn.log_softmax(model(tokens[None])[0, :-1])
        return -jnp.take_along_axis(log_probabilities, tokens[1:, None], axis=1).mean()

    gradient = jax.jit(jax.grad(loss))(ours.place(config, tree))
    compared = set()
    for row in names.tensors(config, family_of(case.config)):
        if row.keep_float32:
            continue
        key, index = _packed(row.name)
        leaf = gradient
        for step in row.path:
            leaf = getattr(leaf, step)
        part = np.asarray(leaf.get_value())[row.slot]
        assert_close(part.T if row.transpose else part, want[key][index], LOGITS, row.name)
        compared.add(key)
    assert compared == want.keys()


def _packed(name: str) -> tuple[str, tuple]:
    """Where transformers keeps a published tensor: it packs the experts of a layer, gate before
    up."""
    if ".experts." not in name:
        return name, ()
    layer, _, rest = name.partition(".experts.")
    expert, projection, _ = rest.split(".")
    if projection == "down_proj":
        return f"{layer}.experts.down_proj", (int(expert),)
    half = slice(0, 32) if projection == "gate_proj" else slice(32, 64)
    return f"{layer}.experts.gate_up_proj", (int(expert), half)


@pytest.mark.parametrize("name", CASES)
def test_config_and_names_as_transformers_writes_them(name, reference, tmp_path):
    """Saved again, a checkpoint has the other spelling of its config, and the names and shapes of
    our table."""
    from safetensors import safe_open

    case = CASES[name]
    reference.load(case).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in saved
    # transformers announces an MTP layer that it neither has nor saves.
    assert dataclasses.replace(from_hf(saved), n_mtp=0) == from_hf(case.config)
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    rows = names.tensors(from_hf(case.config), family_of(case.config))
    assert {row.name: row.shape for row in rows} == shapes
