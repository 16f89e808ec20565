"""Converts Hugging Face's config.json to ModelConfig and back.

Every field is either used, known not to affect the mathematics, or refused by name; the tables of
the families are in families/. A config that is written is read back before it is returned, so a
model that the format cannot describe is refused, not changed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from dsjax.checkpoint import families
from dsjax.checkpoint.families.table import Fields, Values
from dsjax.config import ModelConfig
from dsjax.config.vision import VisionConfig

if TYPE_CHECKING:
    from dsjax.precision.fp8 import Scale  # what reads config.json alone needs no jax

_MAX_TENSORS = 1_000_000  # of a checkpoint; V3 has 92,000
_DTYPES = ("float32", "bfloat16", "float16")

# Fields that do not change what the model computes: bookkeeping, text generation, training-only
# losses, storage, and implementation choices of a framework.
_NEUTRAL = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _experts_implementation
    _flash_attn_2_enabled _name_or_path add_bos_token add_eos_token architectures
    attn_implementation auto_map aux_loss_alpha bad_words_ids begin_suppress_tokens bos_token
    bos_token_id chunk_size_feed_forward classifier_dropout cls_token_id compute_dtype
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token eos_token_id ep_size exponential_decay_length_penalty
    finetuning_task flash_attention forced_bos_token_id forced_eos_token_id gradient_checkpointing
    group_size_ratio id2label initializer_range is_decoder is_encoder_decoder
    keys_to_ignore_at_inference label2id length_penalty mask_token_id max_length
    max_sequence_length max_window_layers min_length model_max_length model_type name_or_path
    no_repeat_ngram_size num_beam_groups num_beams num_labels num_logits_to_keep
    num_return_sequences output_attentions output_hidden_states output_router_logits output_scores
    pad_token pad_token_id prefix pretraining_tp problem_type quantization_config
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    router_aux_loss_coef sep_token_id seq_aux seq_length suppress_tokens task_specific_params
    temperature tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config
    transformers_version typical_p unk_token_id unsloth_fixed unsloth_version use_bfloat16
    use_cache use_flash_attention use_flash_attn use_return_dict
    """.split()
)


def family_of(config: Mapping[str, Any]) -> str:
    """Returns the family of a config.json, its `model_type`.

    Raises:
      ValueError: `model_type` is missing or not supported.
    """
    try:
        return families.find(config.get("model_type")).name
    except ValueError as error:
        raise ValueError(f"config.json: {error}") from None


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Reads the contents of a config.json.

    Raises:
      ValueError: fields are missing, have the wrong type, or ask for mathematics that this package
        does not implement; all of them are named in one message.
    """
    family = families.find(family_of(config))
    problems: list[str] = []
    outer = Fields(config, "config.json", problems)
    fields = outer
    if family.section is not None:
        inner = config.get(family.section)
        outer.seen.add(family.section)
        if family.sight is not None and isinstance(inner, Mapping):
            inner = family.sight.text(config)
            outer.seen |= family.sight.sections
            try:
                family.sight.read(config, problems)
            except ValueError as error:  # a rule is broken
                problems.append(str(error))
        outer.refuse_rest(_NEUTRAL | family.neutral)
        _named_dtype(outer)
        if not isinstance(inner, Mapping):
            problems.append(f"config.json.{family.section}={inner!r} is not an object")
            inner = {}
        fields = Fields(inner, f"config.json.{family.section}", problems)
    values = Values(family.constants)
    for row in family.rows:
        row.read(fields, values)
    _named_dtype(fields)
    layers = values["n_layers"]
    values["n_dense_layers"] = min(values.get("n_dense_layers", layers), layers)
    fields.refuse_rest(_NEUTRAL | family.neutral)
    layers += values.get("n_mtp", 0)
    if layers * (3 * values.get("n_routed_experts", 0) + 7) > _MAX_TENSORS:
        problems.append(
            f"config.json describes more than {_MAX_TENSORS:,} tensors, beyond any published model"
        )
    if not problems:
        try:
            return values.build(ModelConfig, "model")
        except ValueError as error:
            problems.append(str(error))
    named = "; ".join(dict.fromkeys(problems))  # what tower and language model read is twice
    raise ValueError(
        f"config.json describes a model that dsjax cannot compute: {named}. If "
        "you know that a field should have another value: --override FIELD=VALUE uses it and "
        "leaves the file as it is (null: absent)"
    )


def named_dtype(config: Mapping[str, Any]) -> str:
    """Returns the dtype that a config.json which `from_hf` reads names, or bfloat16, DeepSeek's
    choice, if it names none. The files may have another, which counts.
    """
    return _named_dtype(Fields(config, "config.json", []))


def _named_dtype(fields: Fields) -> str:
    found = [name for name in ("torch_dtype", "dtype") if fields.values.get(name) is not None]
    names = [str(fields.values[name]).removeprefix("torch.") for name in found]
    fields.problems.extend(
        f"{fields.place}.{name}={repr(fields.values[name])[:80]} is not one of {', '.join(_DTYPES)}"
        for name, dtype in zip(found, names, strict=True)
        if dtype not in _DTYPES
    )
    return next(iter(names), "bfloat16")


def vision_of(config: Mapping[str, Any]) -> VisionConfig | None:
    """Reads what a model has to see and draw with, of a config.json that `from_hf` reads; None if
    it has nothing.
    """
    sight = families.find(family_of(config)).sight
    return sight.read(config, []) if sight else None


def weight_block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Returns the rows and columns of a weight that share a scale; None if nothing is quantized.

    Raises:
      ValueError: the weights are quantized in another way than DeepSeek's, FP8 E4M3 in blocks.
    """
    values = config.get("quantization_config")
    place = "config.json.quantization_config"
    if not values:
        return None
    if not isinstance(values, Mapping):
        raise ValueError(f"{place}={values!r} is not an object")
    problems: list[str] = []
    fields = Fields(values, place, problems)
    fields.fixed("quant_method", "fp8")
    if not problems:
        fields.fixed("fmt", "e4m3")
        fields.fixed("activation_scheme", "dynamic")
        fields.fixed("scale_fmt", "float", "ue8m0")  # of activations; scales of weights are stored
        fields.fixed("dequantize", False)
        fields.fixed("expert_dtype", "fp8")
        fields.seen.add("weight_block_size")
        block = values.get("weight_block_size")
        if block is None:
            problems.append(f"{place} lacks weight_block_size")
        elif not isinstance(block, list) or [*map(type, block)] != [int, int] or min(block) < 1:
            problems.append(f"{place}.weight_block_size={block!r} is not two integers above 0")
        # The tensors themselves show which modules are in FP8.
        fields.refuse_rest(frozenset({"modules_to_not_convert", "modules_to_convert"}))
        if not problems and block:
            return block[0], block[1]
    raise ValueError(
        "; ".join(problems) + ". Only FP8 as DeepSeek publishes it (quant_method fp8, e4m3, "
        "weight_block_size, dynamic activations) can be read; take the original checkpoint"
    )


def to_hf(
    model: ModelConfig,
    family: str,
    *,
    dtype: str = "bfloat16",
    block: tuple[int, int] | None = None,
    vision: VisionConfig | None = None,
) -> dict[str, Any]:
    """Writes the contents of a config.json that transformers, vLLM and llama.cpp's converter read.

    The caller adds the ids of special tokens.

    Args:
      dtype: of the weights, or with FP8 of the other weights.
      block: rows and columns that share a scale, if weights are in FP8.
      vision: what the model has besides, for a family of models that see.

    Raises:
      ValueError: the family's config.json cannot describe this model; names the fields.
    """
    declared = families.find(family)
    written = model
    if not model.n_routed_experts:  # the router's settings are required, but without effect
        router = {"score_func", "norm_topk", "route_scale"} & declared.constants.keys()
        written = dataclasses.replace(
            model, norm_topk=False, **{key: declared.constants[key] for key in router}
        )
    text: dict[str, Any] = {}
    for row in declared.rows:
        text |= row.write(written)
    section = {} if declared.section is None else {declared.section: text}
    if declared.sight is not None:
        if vision is None:
            raise ValueError(f"a language model alone is not of family {family}, whose models see")
        section = declared.sight.write(vision, text)
    values = {
        "architectures": [declared.architecture],
        "model_type": family,
        **(section or text),
        # Not read back: V3 publishes 0.02 and was trained with 0.006.
        "initializer_range": model.init_std,
        "use_cache": True,
        "torch_dtype": dtype,
    }
    if block:
        values["quantization_config"] = quantization_config(block, declared.scale)
    _check_reads_back(values, model, family)
    if declared.sight is not None and (found := vision_of(values)) != vision:
        raise ValueError(
            f"the config.json of family {family} cannot say {vision} (it reads as {found})"
        )
    return values


def quantization_config(block: tuple[int, int], scale: Scale = "fp32") -> dict[str, Any]:
    """Returns what config.json says about FP8 weights with one scale per block."""
    said = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(block),
    }
    return said | {"scale_fmt": "ue8m0"} if scale == "pow2" else said


def _check_reads_back(values: Mapping[str, Any], model: ModelConfig, family: str) -> None:
    try:
        read = from_hf(values)
    except ValueError as error:
        raise ValueError(f"family {family} cannot hold this model: {error}") from None
    wanted, got = _in_use(model), _in_use(read)
    lost = [
        f"model.{name}={value!r} (it reads as {got.get(name)!r})"
        for name, value in wanted.items()
        # mscale may be written as an attention_factor, which rounds it.
        if got.get(name) != value
        and not (name == "mscale" and math.isclose(value, got.get(name, 0.0), rel_tol=1e-9))
    ]
    if lost:
        raise ValueError(
            f"the config.json of family {family} cannot say {', '.join(lost)}; no loader of "
            "that family would compute this model"
        )


def _in_use(model: ModelConfig) -> dict[str, Any]:
    """Returns the fields that this model's mathematics depends on, with defaults filled in."""
    fields = dataclasses.asdict(model)
    if model.attention == "gqa":
        fields |= {"n_kv_heads": model.kv_heads, "head_dim": model.qk_head_dim}
    for is_unused, names in _UNUSED:
        for name in names.split() if is_unused(model) else ():
            fields.pop(name, None)
    return fields


# For which models the mathematics does not depend on which fields.
_UNUSED: tuple[tuple[Callable[[ModelConfig], bool], str], ...] = (
    (lambda model: True, "init_std"),
    (lambda model: model.attention == "mla", "n_kv_heads head_dim qkv_bias qk_norm"),
    (
        lambda model: model.attention == "gqa",
        "q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim",
    ),
    (
        lambda model: model.attention != "nsa",
        "nsa_length nsa_stride nsa_block nsa_count nsa_window",
    ),
    (
        lambda model: model.attention != "compressed",
        "layer_types window_size sparse_ratio heavy_ratio o_groups o_lora_rank "
        "compress_rope_theta hc_mult hc_sinkhorn_iters hc_eps hash_layers",
    ),
    (
        lambda model: model.attention == "compressed",
        "kv_lora_rank qk_nope_head_dim v_head_dim inter_dim",
    ),
    (lambda model: model.rope_scaling == "none", "rope_factor"),
    (lambda model: model.rope_scaling not in ("yarn", "llama3"), "original_seq_len"),
    (lambda model: model.rope_scaling != "yarn", "beta_fast beta_slow mscale mscale_all_dim"),
    (lambda model: model.rope_scaling != "llama3", "low_freq_factor high_freq_factor"),
    (
        lambda model: not model.n_routed_experts,
        "n_shared_experts n_activated_experts moe_inter_dim n_expert_groups n_limited_groups "
        "score_func group_score router_bias norm_topk route_scale",
    ),
    (lambda model: model.n_expert_groups == 1, "group_score"),
    (lambda model: not model.n_mtp, "mtp_after_final_norm"),
)
