"""The declaration of a family, and the parts that families share: rows of config.json, and rules
that name tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from dsjax.checkpoint.families.rope import ROPE
from dsjax.checkpoint.families.sight import Sight
from dsjax.checkpoint.families.table import MAX_LISTED, Fields, Row, Values, field, fixed
from dsjax.config import ModelConfig

if TYPE_CHECKING:
    from dsjax.precision.fp8 import Scale  # what reads config.json alone needs no jax


@dataclasses.dataclass(frozen=True)
class Rule:
    """Names a tensor of a layer: name and leaf relative to the layer, shape as published."""

    name: str
    path: tuple[str, ...]
    shape: tuple[int, ...]
    expert: bool = False  # one tensor per expert; `name` contains `{expert}`
    keep_float32: bool = False
    trains: bool = True
    plain: bool = False  # a matrix that FP8 checkpoints do not quantize
    integer: bool = False  # int64 in every checkpoint

    @property
    def transpose(self) -> bool:
        return len(self.shape) == 2

    @property
    def quantized(self) -> bool:
        return len(self.shape) == 2 and not (self.plain or self.integer)


class TopNames(NamedTuple):
    """Names of the tensors outside of the layers, and the prefix of those of layers."""

    embedding: str = "model.embed_tokens.weight"
    layers: str = "model.layers."
    norm: str = "model.norm.weight"
    head: str = "lm_head.weight"

    @classmethod
    def below(cls, body: str) -> TopNames:
        """Returns the usual names behind another prefix; the head's stays."""
        return cls(f"{body}embed_tokens.weight", f"{body}layers.", f"{body}norm.weight")


PUBLISHED_NAMES = TopNames()


class Place(NamedTuple):
    """Where a layer's tensors are in our parameter tree."""

    stack: tuple[str, ...]  # path of the stack
    number: int  # in the stack
    rules: list[Rule]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """Describes the config.json and the tensor names of a family of checkpoints.

    Attributes:
      name: config.json's `model_type`.
      constants: fields of ModelConfig with the same value in every model of the family.
      rows: the other fields, two-way.
      attention: returns the rules for a layer's attention.
      mtp: the family has multi-token prediction modules.
      indexer: its layers have an indexer.
      scale: the kind of scales that its FP8 checkpoints have.
      neutral: further fields of config.json that do not change what the model computes.
      section: the object in config.json that describes the language model, if the language model
        is part of a larger one; None: config.json itself.
      prefix: prefix of the names of the language model's tensors, such as `language.`.
      top: the names of what is not in a layer.
      sight: what a larger model has besides to see and draw with; None: nothing.
    """

    name: str
    architecture: str
    constants: Mapping[str, Any]
    rows: tuple[Row, ...]
    attention: Callable[[ModelConfig], list[Rule]]
    mtp: bool = False
    indexer: bool = False
    scale: Scale = "fp32"
    neutral: frozenset[str] = frozenset()
    section: str | None = None
    prefix: str = ""
    top: TopNames = PUBLISHED_NAMES
    sight: Sight | None = None

    @property
    def has_experts(self) -> bool:
        return "router_bias" in self.constants

    def names(self, model: ModelConfig) -> bool:
        """Tells whether the family has a name for each tensor of a model."""
        wanted = {"qkv_bias": False, "qk_norm": False, "router_bias": False} | dict(self.constants)
        if not model.n_routed_experts:
            del wanted["router_bias"]
        named = ("attention", "qkv_bias", "qk_norm", "router_bias")
        return (
            all(getattr(model, key) == wanted[key] for key in named if key in wanted)
            and (self.has_experts or not model.n_routed_experts)
            and (self.mtp or not model.n_mtp)
            and self.indexer == bool(model.index_topk)
        )

    def layer(self, model: ModelConfig, *, moe: bool) -> list[Rule]:
        """Returns the rules for a layer, in published order."""
        dim = model.dim
        dense = ffn_rules("mlp.", ("ffn",), dim, model.inter_dim)
        return [
            Rule("input_layernorm.weight", ("attn_norm", "weight"), (dim,)),
            *self.attention(model),
            Rule("post_attention_layernorm.weight", ("ffn_norm", "weight"), (dim,)),
            *(moe_rules(model) if moe else dense),
        ]

    def places(self, model: ModelConfig) -> list[Place]:
        """Returns where each layer of the main model is, and its rules."""
        rules = {moe: self.layer(model, moe=moe) for moe in (False, model.n_moe_layers > 0)}
        dense = model.n_dense_layers
        return [
            Place(("moe_layers",), layer - dense, rules[True])
            if layer >= dense
            else Place(("dense_layers",), layer, rules[False])
            for layer in range(model.n_layers)
        ]

    def outside_layers(self, model: ModelConfig) -> list[Rule]:
        """Returns the rules for further tensors that are not in a layer, with whole paths."""
        del model
        return []

    def canonical(self, name: str) -> str | None:
        """Returns the name that the rules have for a tensor of a file; None to pass it over."""
        return name


# Rows of config.json. A default may depend on fields of earlier rows.


def _heads(values: Mapping[str, Any]) -> int:
    return values["n_heads"]


TEXT = (
    field("vocab_size", "vocab_size"),
    field("hidden_size", "dim"),
    field("intermediate_size", "inter_dim"),
    field("num_hidden_layers", "n_layers"),
    field("num_attention_heads", "n_heads"),
    fixed("hidden_act", "silu", "swish"),
    field("max_position_embeddings", "max_seq_len"),
    field("rms_norm_eps", "norm_eps"),
    field("tie_word_embeddings", "tie_embed", False),
    fixed("attention_dropout", 0.0),
    # False in embedding models derived from causal ones, whose tensors look the same.
    fixed("is_causal", True, written=False),
    fixed("use_rope", True, written=False),
    fixed("partial_rotary_factor", 1, written=False),
    ROPE,
)

MLA = (
    fixed("attention_bias", False),
    fixed("mlp_bias", False, written=False),
    # MLA has no key-value heads of its own.
    fixed("num_key_value_heads", _heads),
    fixed("rope_interleave", True, written=False),
    field("q_lora_rank", "q_lora_rank", 0, value=lambda model: model.q_lora_rank or None),
    field("kv_lora_rank", "kv_lora_rank"),
    field("qk_nope_head_dim", "qk_nope_head_dim"),
    field("qk_rope_head_dim", "qk_rope_head_dim"),
    field("v_head_dim", "v_head_dim"),
)
# Derived from the widths of MLA's heads, which are read individually.
MLA_NEUTRAL = frozenset({"head_dim", "qk_head_dim"})


def _equal_heads(values: Mapping[str, Any]) -> int:
    return values["dim"] // max(values["n_heads"], 1)


def _full_attention(values: Mapping[str, Any]) -> list[str]:
    return ["full_attention"] * min(values["n_layers"], MAX_LISTED)


def _read_equal_heads(fields: Fields, values: Values) -> None:
    values["head_dim"] = _equal_heads(values)
    fields.fixed("head_dim", values["head_dim"])
    if values["dim"] % max(values["n_heads"], 1):
        fields.problems.append(
            f"{values.places['dim']}={values['dim']} does not divide by "
            f"{values.places['n_heads']}={values['n_heads']}"
        )


# Grouped-query attention. HEAD_DIM and EQUAL_HEADS are for families whose head width is free or
# always dim / n_heads.
GQA = (
    field("num_key_value_heads", "n_kv_heads", _heads, value=lambda model: model.kv_heads),
    fixed("layer_types", _full_attention, written=False),
)
# Without effect unless `use_sliding_window` is true, which is refused.
GQA_NEUTRAL = frozenset({"sliding_window"})
HEAD_DIM = Row(
    lambda fields, values: values.take("head_dim", fields, "head_dim", "int", _equal_heads(values)),
    lambda model: (
        {} if model.qk_head_dim * model.n_heads == model.dim else {"head_dim": model.head_dim}
    ),
)
EQUAL_HEADS = Row(_read_equal_heads, lambda model: {})

# Of the router: DeepSeekMoE and V2 choose experts by softmax, each group by its best.
SOFTMAX = {"score_func": "softmax", "group_score": "max", "router_bias": False}

EXPERTS = (
    field("first_k_dense_replace", "n_dense_layers"),
    fixed("moe_layer_freq", 1),
    field("moe_intermediate_size", "moe_inter_dim"),
    field("n_routed_experts", "n_routed_experts"),
    field("n_shared_experts", "n_shared_experts", 0),
    field("num_experts_per_tok", "n_activated_experts"),
)


# Rules that name the tensors of a layer.


def mla_rules(model: ModelConfig) -> list[Rule]:
    """Returns the rules for multi-head latent attention."""
    dim, heads, latent, compressed = model.dim, model.n_heads, model.kv_lora_rank, model.q_lora_rank
    queries = heads * model.qk_head_dim
    if compressed:
        query = [
            Rule("self_attn.q_a_proj.weight", ("attn", "wq_a"), (compressed, dim)),
            Rule("self_attn.q_a_layernorm.weight", ("attn", "q_norm", "weight"), (compressed,)),
            Rule("self_attn.q_b_proj.weight", ("attn", "wq_b"), (queries, compressed)),
        ]
    else:
        query = [Rule("self_attn.q_proj.weight", ("attn", "wq"), (queries, dim))]
    key_value = (latent + model.qk_rope_head_dim, dim)
    expanded = heads * (model.qk_nope_head_dim + model.v_head_dim)
    return [
        *query,
        Rule("self_attn.kv_a_proj_with_mqa.weight", ("attn", "wkv_a"), key_value),
        Rule("self_attn.kv_a_layernorm.weight", ("attn", "kv_norm", "weight"), (latent,)),
        Rule("self_attn.kv_b_proj.weight", ("attn", "wkv_b"), (expanded, latent)),
        Rule("self_attn.o_proj.weight", ("attn", "wo"), (dim, heads * model.v_head_dim)),
    ]


def gqa_rules(model: ModelConfig) -> list[Rule]:
    """Returns the rules for grouped-query attention."""
    dim = model.dim
    queries, keys = model.n_heads * model.qk_head_dim, model.kv_heads * model.qk_head_dim
    rules = []
    for letter, width in (("q", queries), ("k", keys), ("v", keys)):
        rules.append(Rule(f"self_attn.{letter}_proj.weight", ("attn", f"w{letter}"), (width, dim)))
        if model.qkv_bias:
            rules.append(Rule(f"self_attn.{letter}_proj.bias", ("attn", f"b{letter}"), (width,)))
    if model.qk_norm:
        rules += [
            Rule(f"self_attn.{name}.weight", ("attn", name, "weight"), (model.qk_head_dim,))
            for name in ("q_norm", "k_norm")
        ]
    return [*rules, Rule("self_attn.o_proj.weight", ("attn", "wo"), (dim, queries))]


def ffn_rules(
    prefix: str, path: tuple[str, ...], dim: int, hidden: int, *, expert: bool = False
) -> list[Rule]:
    """Returns the rules for the three matrices of a feed-forward network."""
    return [
        Rule(f"{prefix}gate_proj.weight", (*path, "w_gate"), (hidden, dim), expert),
        Rule(f"{prefix}up_proj.weight", (*path, "w_up"), (hidden, dim), expert),
        Rule(f"{prefix}down_proj.weight", (*path, "w_down"), (dim, hidden), expert),
    ]


def moe_rules(model: ModelConfig) -> list[Rule]:
    """Returns the rules for a mixture of experts: router, experts, shared experts."""
    dim, hidden, experts = model.dim, model.moe_inter_dim, model.n_routed_experts
    gate = ("ffn", "gate")
    rules = [Rule("mlp.gate.weight", (*gate, "weight"), (experts, dim), plain=True)]
    if model.router_bias:
        name, path = "mlp.gate.e_score_correction_bias", (*gate, "bias")
        rules.append(Rule(name, path, (experts,), keep_float32=True, trains=False))
    rules += ffn_rules("mlp.experts.{expert}.", ("ffn", "experts"), dim, hidden, expert=True)
    if model.n_shared_experts:
        shared = model.n_shared_experts * hidden  # published as one wide feed-forward
        rules += ffn_rules("mlp.shared_experts.", ("ffn", "shared"), dim, shared)
    return rules
