"""Hugging Face transformers as a reference: float32, eager attention and experts, its own loading
of a published checkpoint.

Departures from the published files: none. The router of DeepSeek-V3 in transformers once filled
masked groups with 0.0, where DeepSeek's code has minus infinity; the releases since have it too,
and `run` refuses an older one.
"""

from __future__ import annotations

import json
import pathlib
import tempfile

import numpy as np
import safetensors.numpy
import torch
import transformers

from tests.golden import checkpoint
from tests.golden.cases import Case


def load(case: Case) -> transformers.PreTrainedModel:
    """Writes the checkpoint to a folder and lets transformers read it."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        (path / "config.json").write_text(json.dumps(case.config))
        tensors = {
            name: np.ascontiguousarray(value) for name, value in checkpoint.published(case).items()
        }
        safetensors.numpy.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return read(path)


def read(path: pathlib.Path) -> transformers.PreTrainedModel:
    """Lets transformers read the checkpoint in a folder, as float32."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not report["missing_keys"], f"transformers did not find {report['missing_keys']}"
    assert not report["mismatched_keys"], f"transformers cannot use {report['mismatched_keys']}"
    return model.eval()


@torch.no_grad()
def logits(model: transformers.PreTrainedModel, ids: np.ndarray) -> np.ndarray:
    """Logits of every token of one row: float32 [length, vocabulary]."""
    return model(torch.from_numpy(ids).long()[None], use_cache=False).logits[0].numpy()


@torch.no_grad()
def run(case: Case, length: int) -> dict[str, np.ndarray]:
    """Logits of random tokens, and what single modules make of a random input."""
    torch.use_deterministic_algorithms(True)
    model = load(case)
    ids = torch.from_numpy(checkpoint.tokens(case, length)).long()[None]
    x = torch.from_numpy(checkpoint.inputs(case, length))[None]
    outputs = {"logits": model(ids, use_cache=False).logits[0]}
    stack, first, last = model.model, model.model.layers[0], model.model.layers[-1]
    outputs["norm"] = last.post_attention_layernorm(x * checkpoint.SMALL)[0]
    outputs["dense"] = first.mlp(x)[0]
    positions = torch.arange(length)[None]
    mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
    rotary = stack.rotary_emb(x, positions)
    attention = last.self_attn(
        hidden_states=x, position_embeddings=rotary, attention_mask=mask, position_ids=positions
    )
    outputs["attention"] = attention[0][0]
    if hasattr(last.mlp, "gate"):
        outputs["moe"] = last.mlp(x)[0]
        _, outputs["router_weights"], experts = last.mlp.gate(x)
        outputs["router_experts"] = experts.to(torch.int32)
        _refuse_zero_mask(last.mlp.gate, experts)
    return {name: value.contiguous().numpy() for name, value in outputs.items()}


def _refuse_zero_mask(gate: torch.nn.Module, experts: torch.Tensor) -> None:
    """A token's experts must come from `topk_group` groups."""
    if gate.num_group and gate.topk_group:
        groups = experts // (gate.num_experts // gate.num_group)
        most = max(len(set(row)) for row in groups.tolist())
        assert most <= gate.topk_group, (
            f"transformers {transformers.__version__} chose experts from {most} groups where "
            f"{gate.topk_group} are kept: it fills masked groups with 0.0; use a newer release"
        )
