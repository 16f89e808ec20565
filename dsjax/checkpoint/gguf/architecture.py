"""llama.cpp's architectures: which one computes a model, what it cannot compute, and its keys.

`deepseek2` has MLA, with experts or without; `deepseek`, `llama`, `qwen2` and `qwen3` have
grouped-query attention: with experts, without, with biases, and with norms of queries and keys.
Facts about llama.cpp are those of its loader and graphs (src/models/deepseek2.cpp and its
neighbours, src/llama-graph.cpp, src/llama-context.cpp).

What it computes in another way than the model is refused by name: the file would load, and answer
wrongly without a message.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from dsjax.checkpoint.families import naming
from dsjax.config import ModelConfig
from dsjax.files import listed, shown

Arch = Literal["deepseek2", "deepseek", "llama", "qwen2", "qwen3"]
ARCHITECTURES: tuple[Arch, ...] = ("deepseek2", "deepseek", "llama", "qwen2", "qwen3")
MAX_LAYERS, MAX_EXPERTS = 512, 512
# Of queries that are projected directly; told from V3's by the depth alone.
LITE_DEPTHS = (26, 27)
_SOFTMAX, _SIGMOID = 1, 2
# llama.cpp gives the latents' norms the model's epsilon, where theirs is 1e-6 whatever the model's
# is. Up to here that shifts them by less than float32 rounding does in a few layers.
_LARGEST_EPS = 1e-5


class Field(NamedTuple):
    """The value of a key, and its type in the file."""

    kind: Literal["u32", "f32", "bool", "str", "strs", "i32s"]
    value: Any


def arch_of(model: ModelConfig) -> Arch:
    """Returns the architecture that computes a model."""
    if model.attention == "mla":
        return "deepseek2"
    if model.n_routed_experts:
        return "deepseek"
    if model.qk_norm:
        return "qwen3"
    return "qwen2" if model.qkv_bias else "llama"


def check(model: ModelConfig, place: str) -> None:
    """Refuses a model that llama.cpp would not compute.

    Raises:
      ValueError: names every such property.
    """
    problems = list(_problems(model, arch_of(model)))
    if problems:
        raise ValueError(
            f"{place}: llama.cpp's {arch_of(model)} computes another model than this one: "
            f"{'; '.join(problems)}. Run it here (tools/generate.py)"
            + (", or export a Hugging Face folder for another program" if naming(model) else "")
        )


def _problems(model: ModelConfig, arch: Arch) -> Iterator[str]:
    if model.attention in ("nsa", "compressed"):
        yield f"model.attention={model.attention}: it has no such attention"
        return
    if model.n_layers > MAX_LAYERS or model.n_routed_experts > MAX_EXPERTS:
        yield (
            f"model.n_layers={model.n_layers} and n_routed_experts={model.n_routed_experts}: at "
            f"most {MAX_LAYERS} and {MAX_EXPERTS} are possible"
        )
    if arch == "deepseek2":
        yield from _mla_problems(model)
    else:
        yield from _gqa_problems(model, arch)
    if model.n_routed_experts:
        yield from _router_problems(model, arch)
    if model.rope_scaling == "yarn" and (model.beta_fast, model.beta_slow) != (32, 1):
        yield (
            f"YaRN's model.beta_fast={model.beta_fast:g} and beta_slow={model.beta_slow:g}: it "
            "takes 32 and 1 whatever the file says"
        )


def _mla_problems(model: ModelConfig) -> Iterator[str]:
    if model.index_topk:
        yield f"model.index_topk={model.index_topk}: it attends to all tokens, without an indexer"
    if bool(model.q_lora_rank) == (model.n_layers in LITE_DEPTHS):
        depths = " or ".join(map(str, LITE_DEPTHS))
        rule = (
            f"it takes any model of {depths} layers for V2-Lite, whose queries are projected "
            "directly"
            if model.q_lora_rank
            else f"it reads queries that are projected directly at {depths} layers only"
        )
        yield f"model.q_lora_rank={model.q_lora_rank} with n_layers={model.n_layers}: {rule}"
    if model.norm_eps > _LARGEST_EPS:
        yield (
            f"model.norm_eps={model.norm_eps:g}: it takes this for the latents' norms too, where "
            "they have 1e-06"
        )
    if model.rope_scaling not in ("none", "yarn"):
        yield f"model.rope_scaling={model.rope_scaling}: with MLA it knows yarn only"
    if model.rope_scaling == "yarn" and model.rope_factor > 1:
        if not model.mscale_all_dim or model.mscale != model.mscale_all_dim:
            yield (
                f"model.mscale={model.mscale:g} and mscale_all_dim={model.mscale_all_dim:g}: it "
                "knows one value for both"
            )
    elif model.rope_scaling == "yarn" and model.rope_factor < 1:
        yield f"model.rope_factor={model.rope_factor:g} with yarn: it must be at least 1"


def _gqa_problems(model: ModelConfig, arch: Arch) -> Iterator[str]:
    if arch not in ("llama", "qwen3") and model.qk_head_dim * model.n_heads != model.dim:
        yield (
            f"model.head_dim={model.head_dim}: it must be dim / n_heads, {model.dim} / "
            f"{model.n_heads}"
        )
    if arch != "llama" and model.rope_scaling == "llama3":
        yield "model.rope_scaling=llama3: it is known for llama only"
    if model.rope_scaling == "yarn" and model.mscale_all_dim:
        yield f"model.mscale_all_dim={model.mscale_all_dim:g}: it is known with MLA only"
    if model.rope_scaling == "yarn" and model.rope_factor < 1:
        yield f"model.rope_factor={model.rope_factor:g} with yarn: it must be at least 1"
    if model.n_mtp:
        yield f"model.n_mtp={model.n_mtp}: multi-token prediction is known with MLA only"
    if arch == "deepseek" and model.qkv_bias:
        yield "model.qkv_bias with routed experts"
    if arch == "deepseek" and model.qk_norm:
        yield "model.qk_norm with routed experts"
    if arch == "qwen3" and model.qkv_bias:
        yield "model.qkv_bias with qk_norm"


def _router_problems(model: ModelConfig, arch: Arch) -> Iterator[str]:
    if not model.n_shared_experts:
        yield "model.n_shared_experts=0: it needs at least one"
    if _has_groups(model) and model.group_score == "max":
        yield (
            f"model.group_score=max with n_expert_groups={model.n_expert_groups}, the rule of V2: "
            "it scores a group by the sum of its two best experts, the rule of V3"
        )
    if arch == "deepseek":
        for name, only in (("score_func", "softmax"), ("norm_topk", False), ("router_bias", False)):
            if getattr(model, name) != only:
                yield f"model.{name}={getattr(model, name)}: it knows {only} only"


def _has_groups(model: ModelConfig) -> bool:
    """Tells whether groups limit the choice; keeping all of them does not."""
    return model.n_limited_groups < model.n_expert_groups


def mtp_problem(model: ModelConfig) -> str | None:
    """Says why llama.cpp could not draft with a model's multi-token prediction modules."""
    if not model.n_mtp:
        return None
    if not model.mtp_after_final_norm:
        return "they read the hidden state before the final norm, where it has the normed one"
    if not model.q_lora_rank or not model.n_moe_layers:
        return "it knows them with experts and a query latent only"
    return None


def without_mtp(model: ModelConfig) -> ModelConfig:
    """Returns the main model alone."""
    return dataclasses.replace(model, n_mtp=0)


def write(model: ModelConfig) -> dict[str, Field]:
    """Returns the keys that describe a model, without the prefix of the architecture."""
    arch = arch_of(model)
    heads = model.kv_heads
    fields = {
        "block_count": Field("u32", model.n_layers + model.n_mtp),
        "context_length": Field("u32", model.max_seq_len),
        "embedding_length": Field("u32", model.dim),
        "feed_forward_length": Field("u32", model.inter_dim),
        "vocab_size": Field("u32", model.vocab_size),
        "attention.head_count": Field("u32", model.n_heads),
        # MLA is computed as one key and value head, the latent.
        "attention.head_count_kv": Field("u32", 1 if arch == "deepseek2" else heads),
        "attention.layer_norm_rms_epsilon": Field("f32", model.norm_eps),
        "rope.dimension_count": Field("u32", model.rope_dim),
        "rope.freq_base": Field("f32", model.rope_theta),
    }
    if arch == "deepseek2":
        fields |= _mla(model)
    else:
        fields["attention.key_length"] = Field("u32", model.qk_head_dim)
        fields["attention.value_length"] = Field("u32", model.value_head_dim)
    if arch in ("deepseek2", "deepseek"):
        fields |= _experts(model)
    return fields | _rope_scaling(model)


def _mla(model: ModelConfig) -> dict[str, Field]:
    rank = model.kv_lora_rank
    fields = {
        "attention.kv_lora_rank": Field("u32", rank),
        "attention.key_length": Field("u32", rank + model.qk_rope_head_dim),
        "attention.value_length": Field("u32", rank),
        "attention.key_length_mla": Field("u32", model.qk_head_dim),
        "attention.value_length_mla": Field("u32", model.v_head_dim),
    }
    if model.q_lora_rank:
        fields["attention.q_lora_rank"] = Field("u32", model.q_lora_rank)
    if model.n_mtp:
        fields["nextn_predict_layers"] = Field("u32", model.n_mtp)
    return fields


def _experts(model: ModelConfig) -> dict[str, Field]:
    if not model.n_routed_experts:  # required all the same
        return {
            "leading_dense_block_count": Field("u32", model.n_layers),
            "expert_shared_count": Field("u32", 0),
            "expert_feed_forward_length": Field("u32", model.inter_dim),
        }
    fields = {
        "leading_dense_block_count": Field("u32", model.n_dense_layers),
        "expert_count": Field("u32", model.n_routed_experts),
        "expert_used_count": Field("u32", model.n_activated_experts),
        "expert_shared_count": Field("u32", model.n_shared_experts),
        "expert_feed_forward_length": Field("u32", model.moe_inter_dim),
        "expert_weights_scale": Field("f32", model.route_scale),
        "expert_weights_norm": Field("bool", model.norm_topk),
        # Absent, it means softmax; so it is always written.
        "expert_gating_func": Field("u32", _GATING[model.score_func]),
    }
    if _has_groups(model):
        fields["expert_group_count"] = Field("u32", model.n_expert_groups)
        fields["expert_group_used_count"] = Field("u32", model.n_limited_groups)
    return fields


_GATING = {"softmax": _SOFTMAX, "sigmoid": _SIGMOID}


def _rope_scaling(model: ModelConfig) -> dict[str, Field]:
    kind = model.rope_scaling
    if kind in ("none", "llama3"):  # llama3 is a tensor, not a key
        return {"rope.scaling.type": Field("str", "none")}
    fields = {
        "rope.scaling.type": Field("str", kind),
        "rope.scaling.factor": Field("f32", model.rope_factor),
    }
    if kind == "linear":
        return fields
    fields |= {
        "rope.scaling.original_context_length": Field("u32", model.original_seq_len),
        "rope.scaling.yarn_beta_fast": Field("f32", model.beta_fast),
        "rope.scaling.yarn_beta_slow": Field("f32", model.beta_slow),
    }
    if model.attention == "mla":
        # The loader divides by 0.1.
        log_multiplier = Field("f32", 0.1 * model.mscale_all_dim)
        return fields | {"rope.scaling.yarn_log_multiplier": log_multiplier}
    if model.mscale != 1:  # the factor on cos and sin, in terms of llama.cpp's own
        own = 0.1 * math.log(model.rope_factor) + 1
        ratio = (0.1 * model.mscale * math.log(model.rope_factor) + 1) / own
        fields["rope.scaling.attn_factor"] = Field("f32", ratio)
    return fields


def read(
    keys: Mapping[str, Any], tensors: frozenset[str], divisors: np.ndarray | None, place: str
) -> tuple[ModelConfig, Arch]:
    """Reads the model that a file's keys describe.

    Args:
      keys: of the file, with their prefixes.
      tensors: the names of the file's tensors, which say what keys do not: whether the head is
        tied, and the router has a bias.
      divisors: of the frequencies of the rotation, if the file has them (Llama-3's scaling).

    Raises:
      ValueError: the architecture is another one, or keys are missing, wrong or not supported.
    """
    arch = keys.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise ValueError(
            f"{place} has general.architecture={shown(str(arch))}; only "
            f"{', '.join(ARCHITECTURES)} can be read"
        )
    reader = _Reader(keys, arch)
    values = reader.common()
    if arch == "deepseek2":
        reader.mla(values)
    else:
        reader.gqa(values, arch)
    if arch in ("deepseek2", "deepseek"):
        reader.experts(values, tensors)
    else:
        values["n_dense_layers"] = values["n_layers"]
    reader.rope_scaling(values, arch, divisors)
    values["tie_embed"] = "output.weight" not in tensors
    if reader.problems:
        raise ValueError(f"{place}: {listed(reader.problems)}; it is damaged or of another version")
    try:
        return ModelConfig(**values), arch
    except ValueError as error:
        raise ValueError(f"{place} describes no model: {error}") from None


class _Reader:
    """Reads keys of an architecture, and collects what is wrong with them."""

    def __init__(self, keys: Mapping[str, Any], arch: str):
        self._keys, self._arch = keys, arch
        self.problems: list[str] = []

    def whole(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if isinstance(value, list) and value and len(set(map(repr, value))) == 1:
            value = value[0]  # one value per layer, all alike
        if type(value) is not int or not 0 <= value < 2**31:
            return self._wrong(name, value, "a whole number", 1)
        return value

    def real(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if type(value) not in (int, float) or not math.isfinite(value):
            return self._wrong(name, value, "a number", 1.0)
        # The shortest decimal that gives the same float32: 1e-06, not 9.999999974752427e-07.
        return float(str(np.float32(value)))

    def text(self, name: str, default: str) -> str:
        value = self._get(name, default)
        return value if isinstance(value, str) else self._wrong(name, value, "a text", default)

    def has(self, name: str) -> bool:
        return f"{self._arch}.{name}" in self._keys

    def _get(self, name: str, default: Any) -> Any:
        return self._keys.get(f"{self._arch}.{name}", default)

    def _wrong(self, name: str, value: Any, wanted: str, instead: Any) -> Any:
        key = f"{self._arch}.{name}"
        self.problems.append(
            f"the key {key} is missing"
            if value is None
            else f"{key}={str(value)[:40]} is not {wanted}"
        )
        return instead

    def common(self) -> dict[str, Any]:
        n_mtp = self.whole("nextn_predict_layers", 0)
        tokens = self._keys.get("tokenizer.ggml.tokens")
        return {
            "n_layers": self.whole("block_count") - n_mtp,
            "n_mtp": n_mtp,
            "max_seq_len": self.whole("context_length"),
            "dim": self.whole("embedding_length"),
            "inter_dim": self.whole("feed_forward_length"),
            "vocab_size": self.whole("vocab_size", len(tokens) if tokens else None),
            "n_heads": self.whole("attention.head_count"),
            "norm_eps": self.real("attention.layer_norm_rms_epsilon"),
            "rope_theta": self.real("rope.freq_base", 10000.0),
        }

    def mla(self, values: dict[str, Any]) -> None:
        rope = self.whole("rope.dimension_count")
        if not self.has("attention.key_length_mla"):
            self.problems.append(
                "attention.key_length_mla is missing: the file is of an old llama.cpp, with "
                "attn_kv_b in one piece; convert the original checkpoint instead"
            )
        values |= {
            "attention": "mla",
            "q_lora_rank": self.whole("attention.q_lora_rank", 0),
            "kv_lora_rank": self.whole("attention.kv_lora_rank"),
            "qk_rope_head_dim": rope,
            "qk_nope_head_dim": max(self.whole("attention.key_length_mla", rope + 1) - rope, 0),
            "v_head_dim": self.whole("attention.value_length_mla", 1),
        }

    def gqa(self, values: dict[str, Any], arch: str) -> None:
        equal = values["dim"] // max(values["n_heads"], 1)
        head_dim = self.whole("attention.key_length", equal)
        if self.whole("attention.value_length", head_dim) != head_dim:
            self.problems.append("attention.key_length and value_length differ")
        if self.whole("rope.dimension_count", head_dim) != head_dim:
            self.problems.append("rope.dimension_count is not attention.key_length")
        values |= {
            "attention": "gqa",
            "n_kv_heads": self.whole("attention.head_count_kv", values["n_heads"]),
            "head_dim": 0 if head_dim * values["n_heads"] == values["dim"] else head_dim,
            "qkv_bias": arch == "qwen2",
            "qk_norm": arch == "qwen3",
        }
        if self.whole("expert_count", 0) and arch != "deepseek":
            self.problems.append(f"{arch}.expert_count: experts are known for deepseek only")

    def experts(self, values: dict[str, Any], tensors: frozenset[str]) -> None:
        gating = self.whole("expert_gating_func", 0) or _SOFTMAX
        if gating not in _GATING.values():
            self.problems.append(f"expert_gating_func={gating} is neither softmax nor sigmoid")
        count = self.whole("expert_count", 0)
        values["n_dense_layers"] = self.whole("leading_dense_block_count", 0)
        if not count:
            values["n_dense_layers"] = values["n_layers"]
            return
        groups = max(self.whole("expert_group_count", 1), 1)
        values |= {
            "n_routed_experts": count,
            "n_activated_experts": self.whole("expert_used_count"),
            "n_shared_experts": self.whole("expert_shared_count", 0),
            "moe_inter_dim": self.whole("expert_feed_forward_length"),
            "route_scale": self.real("expert_weights_scale", 0.0) or 1.0,
            "norm_topk": bool(self._get("expert_weights_norm", False)),
            "score_func": "sigmoid" if gating == _SIGMOID else "softmax",
            "router_bias": any(name.endswith(".exp_probs_b.bias") for name in tensors),
            "n_expert_groups": groups,
            "n_limited_groups": self.whole("expert_group_used_count", 1) if groups > 1 else 1,
        }
        # Files of V2 have groups that llama.cpp scores by V3's rule; the model's is its own.
        of_v2 = values["score_func"] == "softmax" and not values["router_bias"]
        values["group_score"] = "max" if of_v2 else "top2"

    def rope_scaling(self, values: dict[str, Any], arch: str, divisors: np.ndarray | None) -> None:
        factor = self.real("rope.scaling.factor", 1.0) or 1.0
        kind = self.text("rope.scaling.type", "linear" if factor != 1 else "none")
        if divisors is not None:
            found = llama3_settings(divisors, values["rope_theta"])
            if found is None:
                self.problems.append("rope_freqs.weight is not of Llama-3's scaling")
            values |= found or {}
        elif kind == "linear" and factor != 1:
            values |= {"rope_scaling": "linear", "rope_factor": factor}
        elif kind == "yarn":
            values |= {
                "rope_scaling": "yarn",
                "rope_factor": factor,
                "beta_fast": self.real("rope.scaling.yarn_beta_fast", 32.0),
                "beta_slow": self.real("rope.scaling.yarn_beta_slow", 1.0),
            }
            length = self.whole("rope.scaling.original_context_length", values["max_seq_len"])
            values["original_seq_len"] = length
            values |= self._temperature(factor, arch)
        elif kind not in ("none", "linear"):
            self.problems.append(f"rope.scaling.type={kind[:40]!r} is not supported")

    def _temperature(self, factor: float, arch: str) -> dict[str, float]:
        attn_factor = self.real("rope.scaling.attn_factor", 1.0)
        if arch == "deepseek2":
            if attn_factor != 1:
                self.problems.append("rope.scaling.attn_factor is not supported with MLA")
            all_dim = round(self.real("rope.scaling.yarn_log_multiplier", 0.0) / 0.1, 6)
            if not all_dim and factor > 1:
                self.problems.append("rope.scaling.yarn_log_multiplier is missing")
            return {"mscale": all_dim or 1.0, "mscale_all_dim": all_dim}
        step = 0.1 * math.log(factor) if factor > 1 else 0.0
        mscale = round((attn_factor * (step + 1) - 1) / step, 6) if step else 1.0
        return {"mscale": mscale, "mscale_all_dim": 0.0}


def llama3_settings(divisors: np.ndarray, theta: float) -> dict[str, Any] | None:
    """Recovers the settings of Llama-3's scaling from its divisors; None if they are not of it.

    The part of a frequency that is kept grows with it, in a straight line between two factors of
    the original length. Only ratios of factors and length have an effect: the low factor is 1.

    Args:
      divisors: float32 [rope dim / 2].
    """
    n = len(divisors)
    factor = float(divisors.max(initial=1.0))
    if not (np.isfinite(divisors).all() and divisors.min(initial=1.0) >= 1 - 1e-6 and factor > 1):
        return None
    per_turn = theta ** (-np.arange(n) / n) / (2 * math.pi)  # 1 / wavelength
    kept = (1 / divisors.astype(np.float64) - 1 / factor) / (1 - 1 / factor)
    ramp = (kept > 1e-5) & (kept < 1 - 1e-5)
    guesses = [(8192, 4.0)]  # of every Llama 3, where too few channels lie on the line
    if ramp.sum() > 1:
        slope, start = np.polyfit(per_turn[ramp], kept[ramp], 1)
        guesses = [(round(-slope / start), 1 - 1 / float(start))] if start < 0 < slope else []
    for length, high in guesses:
        high = float(f"{high:.4g}")
        wanted = np.clip((length * per_turn - 1) / (high - 1), 0, 1)
        if np.abs(wanted - kept).max() < 1e-4:
            return {
                "rope_scaling": "llama3",
                "rope_factor": float(str(np.float32(factor))),
                "original_seq_len": length,
                "low_freq_factor": 1.0,
                "high_freq_factor": high,
            }
    return None
