"""Checkpoints to write as GGUF files, and what the files must hold, worked out independently."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import tokenizers
from gguf import GGUFReader

from dsjax.checkpoint.gguf.exporting import export_gguf
from tests.checkpoint.conversions import quiet
from tests.checkpoint.hf_files import plain, write
from tests.golden.cases import CASES, ORACLE_CASES, Case

V2_DEEP = Case(
    CASES["v2_lite"].config | {"num_hidden_layers": 26, "n_routed_experts": 8, "vocab_size": 96}, 21
)
V3_MTP = Case(ORACLE_CASES["v3_mtp"].config | {"num_nextn_predict_layers": 1}, 22)
# llama.cpp's architecture of each.
ARCHITECTURES = {
    "v3": "deepseek2",
    "v3_mtp": "deepseek2",
    "v2_lite": "deepseek2",
    "llama": "llama",
    "llama_linear": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "deepseek_moe": "deepseek",
}


def case_of(name: str) -> Case:
    return {**CASES, **ORACLE_CASES, "v2_lite": V2_DEEP, "v3_mtp": V3_MTP}[name]


def checkpoint(folder: Path, name: str, **fields: object) -> Path:
    """Writes a case in Hugging Face's form, with other values of some fields of its config.json."""
    case = case_of(name)
    case = dataclasses.replace(case, config=case.config | fields)
    return write(folder, case.config, plain(case))


def exported(folder: Path, target: Path, choice: str | None = None) -> GGUFReader:
    export_gguf(folder, target, choice=choice, progress=quiet())
    return GGUFReader(target)


def keys(reader: GGUFReader) -> dict[str, object]:
    return {name: field.contents() for name, field in reader.fields.items()}


def write_tokenizer(folder: Path, pre: object = None, **config: object) -> tokenizers.Tokenizer:
    """Writes a small byte-level BPE whose ids leave gaps, and its tokenizer_config.json."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = pre or tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        show_progress=False,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<s>", "</s>"],
    )
    inner.train_from_iterator(
        ["the theory of the thing, and then the other 12 things"] * 3, trainer
    )
    inner.add_tokens([tokenizers.AddedToken("<think>", special=False, normalized=False)])
    inner.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": {"content": "</s>"}} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return inner


def expected(name: str) -> dict[str, np.ndarray]:
    """What the tensors of a case's file must hold, from the published ones."""
    case = case_of(name)
    arch, config, published = ARCHITECTURES[name], case.config, plain(case)
    heads = config["num_attention_heads"]
    made: dict[str, np.ndarray] = {}
    for full, value in published.items():
        if not full.startswith("model.layers."):
            made[_TOP[full]] = value
            continue
        layer, rest = full.removeprefix("model.layers.").split(".", 1)
        prefix = f"blk.{layer}."
        if ".experts." in rest:
            _, expert, part, _ = rest.rsplit(".", 3)
            stack = made.setdefault(
                f"{prefix}ffn_{part[:-5]}_exps.weight",
                np.empty((config["n_routed_experts"], *value.shape), np.float32),
            )
            stack[int(expert)] = value
        elif rest == "self_attn.kv_b_proj.weight":
            both = value.reshape(heads, -1, config["kv_lora_rank"])
            nope = config["qk_nope_head_dim"]
            made[prefix + "attn_k_b.weight"] = both[:, :nope].transpose(0, 2, 1)
            made[prefix + "attn_v_b.weight"] = both[:, nope:]
        elif rest in ("embed_tokens.weight", "shared_head.head.weight"):
            continue  # copies
        else:
            if arch in ("llama", "deepseek") and rest[10:12] in ("q_", "k_"):
                count = heads if rest[10] == "q" else config["num_key_value_heads"]
                value = np.concatenate([_paired(part) for part in np.split(value, count)])
            made[prefix + _LAYER[rest]] = value
    return made


def _paired(head: np.ndarray) -> np.ndarray:
    """Puts channel i + d/2 of a head beside channel i."""
    half = len(head) // 2
    order = [index for low in range(half) for index in (low, low + half)]
    return head[order]


_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
    "enorm.weight": "nextn.enorm.weight",
    "hnorm.weight": "nextn.hnorm.weight",
    "eh_proj.weight": "nextn.eh_proj.weight",
    "shared_head.norm.weight": "nextn.shared_head_norm.weight",
}
