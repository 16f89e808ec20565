"""Hugging Face's config.json <-> ModelConfig. Every field is honoured, known to leave the
mathematics alone, or refused by name.

Nothing is guessed from a model's name: V2's two published mscale values, for one, differ between
checkpoints of the same shape.

Where loaders disagree about a field the config is refused rather than read one way:
1. V2 with `norm_topk_prob`: DeepSeek's code then drops `routed_scaling_factor`, transformers
   ignores the switch.
2. YaRN with only one of `mscale` and `mscale_all_dim`: the missing one has two published defaults.
3. YaRN without `original_max_position_embeddings`: 4096 in DeepSeek's code,
   `max_position_embeddings` in transformers.

What is written is read again before it is handed out, so that a model that the format cannot
describe is refused and not changed. `init_std` goes out as `initializer_range` and does not come
back: V3 publishes 0.02 and was trained from 0.006.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from dsjax.checkpoint.names import FAMILIES, Family
from dsjax.config import ModelConfig

_REQUIRED = object()
_MOST = 2**31 - 1  # of any integer: what shapes are made of
_MOST_TENSORS = 1_000_000  # of a checkpoint; V3 has 92,000

# Fields that do not change what the model computes: bookkeeping, text generation, training-only
# losses, storage.
_NEUTRAL = frozenset(
    """
    _attn_implementation _name_or_path architectures auto_map aux_loss_alpha bad_words_ids
    begin_suppress_tokens bos_token_id chunk_size_feed_forward diversity_penalty do_sample dtype
    early_stopping encoder_no_repeat_ngram_size eos_token_id ep_size
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    id2label initializer_range is_decoder is_encoder_decoder label2id length_penalty max_length
    max_window_layers min_length model_type no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_router_logits output_scores
    pad_token_id prefix pretraining_tp problem_type quantization_config remove_invalid_values
    repetition_penalty return_dict return_dict_in_generate router_aux_loss_coef sep_token_id seq_aux
    suppress_tokens task_specific_params temperature tokenizer_class top_k top_p torch_dtype
    torchscript transformers_version typical_p unsloth_version use_cache
    """.split()
)
# head_dim and qk_head_dim are derived from the three MLA widths, whatever the file says.
_NEUTRAL_MLA = frozenset({"head_dim", "qk_head_dim"})
_ROPE_KINDS = ("default", "linear", "yarn", "llama3")
_ARCHITECTURES = {
    "deepseek": "DeepseekForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}


class _Fields:
    """Reads fields of a JSON object, remembers which, and collects what is wrong with them."""

    def __init__(self, values: Mapping[str, Any], place: str, problems: list[str]):
        self.values, self.place, self.problems = values, place, problems
        self.seen: set[str] = set()

    def _read(self, name: str, default: Any) -> Any:
        self.seen.add(name)
        if self.values.get(name) is not None:
            return self.values[name]
        if default is _REQUIRED:
            self.problems.append(f"{self.place} lacks {name}")
            return None
        return default

    def _typed(
        self, name: str, default: Any, kinds: tuple[type, ...], wanted: str, blank: Any
    ) -> Any:
        value = self._read(name, default)
        if value is None:
            return blank
        if not isinstance(value, kinds) or (bool not in kinds and isinstance(value, bool)):
            self.problems.append(f"{self.place}.{name}={value!r} is not {wanted}")
            return blank
        return value

    def integer(self, name: str, default: Any = _REQUIRED) -> int:
        value = self._typed(name, default, (int,), "an integer", 0)
        if not 0 <= value <= _MOST:
            self.problems.append(f"{self.place}.{name}={value} is not between 0 and {_MOST:,}")
            return 0
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        value = self._typed(name, default, (int, float), "a number", 0.0)
        if not math.isfinite(value):
            self.problems.append(f"{self.place}.{name}={value!r} is not finite")
            return 0.0
        return float(value)

    def flag(self, name: str, default: Any = _REQUIRED) -> bool:
        return self._typed(name, default, (bool,), "true or false", False)

    def text(self, name: str, default: Any = _REQUIRED) -> str:
        return self._typed(name, default, (str,), "a string", "")

    def block(self, name: str) -> tuple[int, int]:
        value = self._typed(name, _REQUIRED, (list, tuple), "two integers greater than 0", (1, 1))
        if len(value) != 2 or not all(type(size) is int and 0 < size <= _MOST for size in value):
            self.problems.append(f"{self.place}.{name}={value!r} is not two integers above 0")
            return 1, 1
        return value[0], value[1]

    def fixed(self, name: str, *supported: Any) -> None:
        """Accepts a field only if it is absent, null or one of `supported`."""
        value = self._read(name, None)
        if value is not None and value not in supported:
            wanted = (
                ", only " + " or ".join(repr(choice) for choice in supported) if supported else ""
            )
            self.problems.append(f"{self.place}.{name}={value!r} is not supported{wanted}")

    def refuse_rest(self, ignored: frozenset[str] = frozenset()) -> None:
        unknown = sorted(
            name
            for name, value in self.values.items()
            if name not in self.seen | ignored and value is not None
        )
        if unknown:
            self.problems.append(
                f"{self.place} has {', '.join(unknown)}, unknown here, which may change what the "
                "model computes"
            )


def family_of(config: Mapping[str, Any]) -> Family:
    """Family of a config.json, by its `model_type`.

    Raises:
      ValueError: it names none, or one that is not supported.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(
            f"config.json: model_type={model_type!r} is not supported, only {', '.join(FAMILIES)}"
        )
    return model_type


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Reads the contents of a config.json.

    Raises:
      ValueError: a field is missing, has the wrong type, or asks for mathematics that this package
      does not have;
        all such fields are named together.
    """
    family = family_of(config)
    problems: list[str] = []
    fields = _Fields(config, "config.json", problems)
    mla = family in ("deepseek_v2", "deepseek_v3")
    shape: dict[str, Any] = {
        "vocab_size": fields.integer("vocab_size"),
        "dim": fields.integer("hidden_size"),
        "n_layers": fields.integer("num_hidden_layers"),
        "n_heads": fields.integer("num_attention_heads"),
        "inter_dim": fields.integer("intermediate_size"),
        "norm_eps": fields.number("rms_norm_eps"),
        "tie_embed": fields.flag("tie_word_embeddings", False),
        "max_seq_len": fields.integer("max_position_embeddings"),
    }
    fields.fixed("hidden_act", "silu")
    fields.fixed("attention_bias", False)
    fields.fixed("mlp_bias", False)
    fields.fixed("attention_dropout", 0, 0.0)
    shape |= _mla(fields, shape["n_heads"]) if mla else _gqa(fields, family, shape)
    shape |= _rope(fields, mla)
    if family in ("llama", "qwen2"):
        shape["n_dense_layers"] = shape["n_layers"]
    else:
        shape |= _experts(fields, family, shape["n_layers"])
    fields.refuse_rest(_NEUTRAL | _NEUTRAL_MLA if mla else _NEUTRAL)
    layers = shape["n_layers"] + shape.get("n_mtp", 0)
    if layers * (3 * shape.get("n_routed_experts", 0) + 7) > _MOST_TENSORS:
        problems.append(
            f"config.json describes more than {_MOST_TENSORS:,} tensors, beyond any published model"
        )
    if problems:
        raise ValueError(
            "config.json cannot be honoured: "
            + "; ".join(problems)
            + ". Remove or correct these fields if the "
            "checkpoint does not need them; otherwise this model is outside what dsjax computes."
        )
    return ModelConfig(**shape)


def weight_block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a weight that share a scale; None without `quantization_config`.

    Raises:
      ValueError: the weights are quantized in another way than DeepSeek's, FP8 E4M3 in blocks.
    """
    values = config.get("quantization_config")
    if values is None:
        return None
    place = "config.json.quantization_config"
    if not isinstance(values, Mapping):
        raise ValueError(f"{place}={values!r} is not an object")
    problems: list[str] = []
    fields = _Fields(values, place, problems)
    fields.fixed("quant_method", "fp8")
    if not problems:
        fields.fixed("fmt", "e4m3")
        fields.fixed("activation_scheme", "dynamic")
        fields.fixed("scale_fmt", "float", "ue8m0")  # of activations; a weight's scale is stored
        fields.fixed("dequantize", False)
        fields.fixed("expert_dtype", "fp8")
        block = fields.block("weight_block_size")
        # Which modules are in FP8 is seen from the tensors themselves.
        fields.refuse_rest(frozenset({"modules_to_not_convert", "modules_to_convert"}))
        if not problems:
            return block
    raise ValueError(
        "; ".join(problems) + ". Only FP8 as DeepSeek publishes it (quant_method fp8, e4m3, "
        "weight_block_size, dynamic activations) can be read; take the original checkpoint"
    )


def _mla(fields: _Fields, heads: int) -> dict[str, Any]:
    fields.fixed("num_key_value_heads", heads)  # MLA has no key-value heads of its own
    fields.fixed("rope_interleave", True)
    return {
        "attention": "mla",
        "q_lora_rank": fields.integer("q_lora_rank", 0),
        "kv_lora_rank": fields.integer("kv_lora_rank"),
        "qk_nope_head_dim": fields.integer("qk_nope_head_dim"),
        "qk_rope_head_dim": fields.integer("qk_rope_head_dim"),
        "v_head_dim": fields.integer("v_head_dim"),
    }


def _gqa(fields: _Fields, family: Family, shape: Mapping[str, Any]) -> dict[str, Any]:
    heads = shape["n_heads"]
    fields.fixed("use_sliding_window", False)
    if not fields.values.get("use_sliding_window"):
        fields.seen.add(
            "sliding_window"
        )  # published Qwen2 configs carry a width that the switch above turns off
    kinds = fields.values.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == shape["n_layers"]:
        fields.fixed("layer_types", ["full_attention"] * len(kinds))
    else:
        fields.fixed("layer_types")
    return {
        "attention": "gqa",
        "n_kv_heads": fields.integer("num_key_value_heads", heads),
        "head_dim": fields.integer("head_dim", shape["dim"] // max(heads, 1)),
        "qkv_bias": family == "qwen2",
    }


def _experts(fields: _Fields, family: Family, layers: int) -> dict[str, Any]:
    v3 = family == "deepseek_v3"
    fields.fixed("moe_layer_freq", 1)
    fields.fixed("scoring_func", "sigmoid" if v3 else "softmax")
    experts: dict[str, Any] = {
        "n_dense_layers": min(fields.integer("first_k_dense_replace"), layers),
        "n_routed_experts": fields.integer("n_routed_experts"),
        "n_shared_experts": fields.integer("n_shared_experts", 0),
        "n_activated_experts": fields.integer("num_experts_per_tok"),
        "moe_inter_dim": fields.integer("moe_intermediate_size"),
        "score_func": "sigmoid" if v3 else "softmax",
        "group_score": "top2" if v3 else "max",
        "router_bias": v3,
        "norm_topk": fields.flag("norm_topk_prob"),
        "route_scale": fields.number(
            "routed_scaling_factor", 1.0 if family == "deepseek" else _REQUIRED
        ),
    }
    if v3:
        fields.fixed("topk_method", "noaux_tc")
        spelling = (
            "num_mtp_layers" if "num_mtp_layers" in fields.values else "num_nextn_predict_layers"
        )
        experts["n_mtp"] = fields.integer(spelling, 0)
    elif family == "deepseek_v2":
        fields.fixed("norm_topk_prob", False)
        method = fields.text("topk_method")
        if method == "greedy":
            fields.seen |= {"n_group", "topk_group"}  # this method does not read them
            return experts
        fields.fixed("topk_method", "greedy", "group_limited_greedy")
    else:
        fields.fixed("routed_scaling_factor", 1, 1.0)
        fields.fixed("topk_method", "greedy")
        return experts
    experts["n_expert_groups"] = fields.integer("n_group")
    experts["n_limited_groups"] = fields.integer("topk_group")
    return experts


def _rope(fields: _Fields, mla: bool) -> dict[str, Any]:
    """Reads the rope settings in either spelling: `rope_scaling` with `rope_theta`, or
    `rope_parameters`."""
    fields.seen |= {"rope_scaling", "rope_parameters"}
    spellings = {}
    for place in ("rope_scaling", "rope_parameters"):
        value = fields.values.get(place)
        if value is not None and not isinstance(value, Mapping):
            fields.problems.append(f"config.json.{place}={value!r} is not an object")
        elif value:
            settings = dict(value)
            kind = settings.pop("type", "default")
            spellings[place] = settings | {"rope_type": settings.get("rope_type", kind)}
    theta = fields.number("rope_theta", 0.0)
    thetas = {float(s["rope_theta"]) for s in spellings.values() if s.get("rope_theta")} | (
        {theta} if theta else set()
    )
    without_theta = [{k: v for k, v in s.items() if k != "rope_theta"} for s in spellings.values()]
    if len(thetas) > 1 or (len(without_theta) == 2 and without_theta[0] != without_theta[1]):
        fields.problems.append(
            "config.json gives its rope settings more than once, with different values"
        )
    place = next(iter(spellings), "rope_scaling")
    inner = _Fields(
        spellings.get(place, {"rope_type": "default"}), f"config.json.{place}", fields.problems
    )
    inner.seen.add("rope_theta")
    return {"rope_theta": max(thetas, default=10000.0)} | _scaling(inner, mla)


def _scaling(inner: _Fields, mla: bool) -> dict[str, Any]:
    kind = inner.text("rope_type")
    if kind not in _ROPE_KINDS:
        inner.problems.append(
            f"{inner.place}.rope_type={kind!r} is not supported, only {', '.join(_ROPE_KINDS)}"
        )
        return {}
    inner.fixed("partial_rotary_factor", 1, 1.0)
    scaling: dict[str, Any] = {"rope_scaling": "none" if kind == "default" else kind}
    if kind != "default":
        scaling["rope_factor"] = inner.number("factor")
    if kind in ("yarn", "llama3"):
        scaling["original_seq_len"] = inner.integer("original_max_position_embeddings")
    if kind == "llama3":
        scaling["low_freq_factor"] = inner.number("low_freq_factor")
        scaling["high_freq_factor"] = inner.number("high_freq_factor")
    if kind == "yarn":
        scaling |= {
            "beta_fast": inner.number("beta_fast", 32.0),
            "beta_slow": inner.number("beta_slow", 1.0),
        }
        scaling |= _temperature(inner, mla)
        inner.fixed("attention_factor")
        inner.fixed("truncate", True)
    inner.refuse_rest()
    return scaling


def _temperature(inner: _Fields, mla: bool) -> dict[str, float]:
    """YaRN's attention temperature; without the two fields cos and sin carry it (mscale_all_dim =
    0)."""
    given = {name: inner.number(name, 0.0) for name in ("mscale", "mscale_all_dim")}
    if not any(given.values()):
        return {"mscale": 1.0, "mscale_all_dim": 0.0}
    if not all(given.values()):
        inner.problems.append(
            f"{inner.place} has only one of mscale and mscale_all_dim, and their defaults differ "
            "between loaders"
        )
    if not mla:
        inner.problems.append(
            f"{inner.place}: mscale and mscale_all_dim are read by the MLA families only"
        )
    return given


def family_for(config: ModelConfig) -> Family:
    """The family to publish a model as, by its attention and router."""
    if config.attention == "mla":
        return "deepseek_v3" if config.router_bias or config.n_mtp else "deepseek_v2"
    if config.n_routed_experts:
        return "deepseek"
    return "qwen2" if config.qkv_bias else "llama"


def to_hf(
    config: ModelConfig,
    family: Family,
    *,
    dtype: str = "bfloat16",
    block: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Writes the contents of a config.json that transformers, vLLM and llama.cpp's converter read.

    The ids of special tokens are the tokenizer's business: the caller adds them.

    Args:
      dtype: of the weights; with FP8 of those that are not.
      block: rows and columns that share a scale, if the weights are in FP8.

    Raises:
      ValueError: the family's config.json cannot describe this model; names the fields.
    """
    gqa = config.attention == "gqa"
    values = {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.inter_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads if gqa else config.n_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embed,
        "attention_dropout": 0.0,
        "use_cache": True,
        "torch_dtype": dtype,
        **_rope_fields(config),
        **(_gqa_fields(config, family) if gqa else _mla_fields(config)),
    }
    if family not in ("llama", "qwen2"):
        values |= _expert_fields(config, family)
    if block:
        values["quantization_config"] = quantization_config(block)
    _check_reads_back(values, config, family)
    return values


def quantization_config(block: tuple[int, int]) -> dict[str, Any]:
    """What config.json says of weights in FP8, `block` rows and columns of which share a scale."""
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(block),
    }


def _rope_fields(config: ModelConfig) -> dict[str, Any]:
    """The settings as published: `rope_theta` and `rope_scaling`, which every loader knows."""
    kind = config.rope_scaling
    if kind == "none":
        return {"rope_theta": config.rope_theta, "rope_scaling": None}
    # DeepSeek's own code and older loaders read `type`, newer ones `rope_type`.
    scaling: dict[str, Any] = {"type": kind, "rope_type": kind, "factor": config.rope_factor}
    if kind != "linear":
        scaling["original_max_position_embeddings"] = config.original_seq_len
    if kind == "llama3":
        scaling |= {
            "low_freq_factor": config.low_freq_factor,
            "high_freq_factor": config.high_freq_factor,
        }
    if kind == "yarn":
        scaling |= {"beta_fast": config.beta_fast, "beta_slow": config.beta_slow}
        if (config.mscale, config.mscale_all_dim) != (1.0, 0.0):
            scaling |= {"mscale": config.mscale, "mscale_all_dim": config.mscale_all_dim}
    return {"rope_theta": config.rope_theta, "rope_scaling": scaling}


def _mla_fields(config: ModelConfig) -> dict[str, Any]:
    return {
        "attention_bias": False,
        "q_lora_rank": config.q_lora_rank or None,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_nope_head_dim": config.qk_nope_head_dim,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim,
    }


def _gqa_fields(config: ModelConfig, family: Family) -> dict[str, Any]:
    if family == "qwen2":
        fields: dict[str, Any] = {"use_sliding_window": False}
    else:
        fields = {"attention_bias": False}
    if family == "llama":
        fields["mlp_bias"] = False
    if config.qk_head_dim * config.n_heads != config.dim:
        if family == "deepseek":
            raise ValueError(
                f"family deepseek has heads of dim / n_heads values: model.head_dim="
                f"{config.qk_head_dim} for model.dim={config.dim}, model.n_heads={config.n_heads} "
                "cannot be written"
            )
        fields["head_dim"] = config.qk_head_dim
    return fields


def _expert_fields(config: ModelConfig, family: Family) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "first_k_dense_replace": config.n_dense_layers,
        "moe_layer_freq": 1,
        "moe_intermediate_size": config.moe_inter_dim,
        "n_routed_experts": config.n_routed_experts,
        "n_shared_experts": config.n_shared_experts,
        "num_experts_per_tok": config.n_activated_experts,
        "norm_topk_prob": config.norm_topk,
        "scoring_func": config.score_func,
        "routed_scaling_factor": config.route_scale,
    }
    if not config.n_routed_experts:  # the router's settings are required and read by nobody
        fields |= {"scoring_func": "sigmoid" if family == "deepseek_v3" else "softmax"}
        fields |= {"norm_topk_prob": False}
    if family == "deepseek":
        return fields
    fields |= {"n_group": config.n_expert_groups, "topk_group": config.n_limited_groups}
    if family == "deepseek_v2":
        method = "greedy" if config.n_expert_groups == 1 else "group_limited_greedy"
        return fields | {"topk_method": method}
    return fields | {"topk_method": "noaux_tc", "num_nextn_predict_layers": config.n_mtp}


def _check_reads_back(values: Mapping[str, Any], config: ModelConfig, family: Family) -> None:
    try:
        read = from_hf(values)
    except ValueError as error:
        raise ValueError(f"family {family} cannot hold this model: {error}") from None
    wanted, got = _in_use(config), _in_use(read)
    lost = [
        f"model.{name}={value!r} (it reads as {got[name]!r})"
        for name, value in wanted.items()
        if got[name] != value
    ]
    if lost:
        raise ValueError(
            f"the config.json of family {family} cannot say {', '.join(lost)}; no loader of "
            "that family would compute this model"
        )


def _in_use(config: ModelConfig) -> dict[str, Any]:
    """The fields that this model's mathematics depends on, defaults written out."""
    fields = dataclasses.asdict(config)
    unused = {"init_std"}
    if config.attention == "mla":
        unused |= {"n_kv_heads", "head_dim", "qkv_bias"}
    else:
        fields |= {"n_kv_heads": config.kv_heads, "head_dim": config.qk_head_dim}
        unused |= {
            "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"
        }  # fmt: skip
    if config.rope_scaling == "none":
        unused |= {"rope_factor"}
    if config.rope_scaling not in ("yarn", "llama3"):
        unused |= {"original_seq_len"}
    if config.rope_scaling != "yarn":
        unused |= {"beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
    if config.rope_scaling != "llama3":
        unused |= {"low_freq_factor", "high_freq_factor"}
    if not config.n_routed_experts:
        unused |= {
            "n_shared_experts", "n_activated_experts", "moe_inter_dim", "n_expert_groups",
            "n_limited_groups", "score_func", "group_score", "router_bias", "norm_topk",
            "route_scale",
        }  # fmt: skip
    elif config.n_expert_groups == 1:
        unused |= {"group_score"}
    if not config.n_mtp:
        unused |= {"mtp_after_final_norm"}
    return {name: value for name, value in fields.items() if name not in unused}
