"""One two-way name table per family: Hugging Face's tensors on one side, the leaves of our
parameter tree on the other.

A `Rule` gives the name of a tensor inside a layer and the leaf it fills; `tensors(config, family)`
writes out the table for a config: every tensor a published checkpoint of that shape holds, once.
Both directions of a conversion read the same rows, so that what one renames the other cannot fail
to name back.

What differs between the two sides:
1. Hugging Face stores projections [out, in] and computes `x @ w.T`; ours are [in, out]. `transpose`
   marks the rows concerned.
2. Hugging Face keeps one tensor a layer and expert; ours stack them, so a row is one slot of a
   leaf [L, ...] or [L, E, ...].
3. A multi-token prediction module is published as one more layer after the last (V3:
   `model.layers.61`), with copies of the embedding and the head beside its own tensors. Ours reads
   the main ones: a copy is checked on the way in and written again on the way out.

No channel is permuted. MLA's rope channels are published as adjacent pairs and `model/mla.py`
rotates adjacent pairs; the llama-like families are published for a half-split rotation and
`model/gqa.py` rotates halves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

from dsjax.config import ModelConfig

Family = Literal["deepseek", "deepseek_v2", "deepseek_v3", "llama", "qwen2"]
FAMILIES: tuple[Family, ...] = get_args(Family)


class Tensor(NamedTuple):
    """One tensor of a Hugging Face checkpoint and where it lives in our parameter tree."""

    name: str
    path: tuple[str, ...]  # of the leaf
    slot: tuple[int, ...]  # of the tensor in the leaf: (), (layer,) or (layer, expert)
    shape: tuple[int, ...]  # as published
    transpose: bool  # published [out, in], ours [in, out]
    is_copy: bool = False  # a second copy of a leaf that another row fills
    keep_float32: bool = False  # never stored narrower: the router's bias
    quantized: bool = False  # an FP8 checkpoint stores it in FP8, with a `_scale_inv` beside it

    @property
    def target_shape(self) -> tuple[int, ...]:
        """Shape of this tensor's part of the leaf."""
        return self.shape[::-1] if self.transpose else self.shape


@dataclasses.dataclass(frozen=True)
class Rule:
    """A tensor of a layer: name and leaf relative to the layer, shape as published."""

    name: str
    path: tuple[str, ...]
    shape: tuple[int, ...]
    expert: bool = False  # one tensor an expert; `name` has the place of its number
    keep_float32: bool = False

    @property
    def transpose(self) -> bool:
        return len(self.shape) == 2

    @property
    def quantized(self) -> bool:
        """Every projection; of a layer's other matrices there is only the router's gate."""
        return self.name.endswith("_proj.weight") or "_proj_with_mqa." in self.name


def tensors(config: ModelConfig, family: Family) -> Iterator[Tensor]:
    """Yields every tensor of a checkpoint of this family and shape.

    Raises:
      ValueError: the family cannot hold a model of this shape.
    """
    _check_family(config, family)
    vocabulary = (config.vocab_size, config.dim)
    yield Tensor("model.embed_tokens.weight", ("embed", "weight"), (), vocabulary, False)
    for layer in range(config.n_layers):
        stack, index = "dense_layers", layer
        if layer >= config.n_dense_layers:
            stack, index = "moe_layers", layer - config.n_dense_layers
        rules = _layer_rules(config, moe=stack == "moe_layers")
        yield from _expand(
            rules, f"model.layers.{layer}.", (stack,), index, config.n_routed_experts
        )
    yield Tensor("model.norm.weight", ("norm", "weight"), (), (config.dim,), False)
    if not config.tie_embed:
        yield Tensor("lm_head.weight", ("head", "weight"), (), vocabulary, True)
    for depth in range(config.n_mtp):
        yield from _mtp(config, depth)


def _check_family(config: ModelConfig, family: Family) -> None:
    if family not in FAMILIES:
        raise ValueError(f"model family {family!r} is not one of {', '.join(FAMILIES)}")
    holds = {
        "deepseek": config.attention == "gqa" and not config.qkv_bias and not config.router_bias,
        "deepseek_v2": config.attention == "mla" and not config.router_bias,
        "deepseek_v3": config.attention == "mla"
        and (config.router_bias or not config.n_routed_experts),
        "llama": config.attention == "gqa" and not config.qkv_bias and not config.n_routed_experts,
        "qwen2": config.attention == "gqa" and config.qkv_bias and not config.n_routed_experts,
    }
    if not holds[family] or (config.n_mtp and family != "deepseek_v3"):
        raise ValueError(
            f"family {family} has no names for model.attention={config.attention}, "
            f"qkv_bias={config.qkv_bias}, n_routed_experts={config.n_routed_experts}, "
            f"router_bias={config.router_bias}, n_mtp={config.n_mtp}; "
            f"choose another of {', '.join(FAMILIES)}"
        )


def _layer_rules(config: ModelConfig, *, moe: bool) -> list[Rule]:
    dim = config.dim
    attention = _mla_rules(config) if config.attention == "mla" else _gqa_rules(config)
    return [
        Rule("input_layernorm.weight", ("attn_norm", "weight"), (dim,)),
        *attention,
        Rule("post_attention_layernorm.weight", ("ffn_norm", "weight"), (dim,)),
        *(_moe_rules(config) if moe else _ffn_rules("mlp.", ("ffn",), dim, config.inter_dim)),
    ]


def _mla_rules(config: ModelConfig) -> list[Rule]:
    dim, heads, latent = config.dim, config.n_heads, config.kv_lora_rank
    queries = heads * config.qk_head_dim
    if config.q_lora_rank:
        query = [
            Rule("self_attn.q_a_proj.weight", ("attn", "wq_a"), (config.q_lora_rank, dim)),
            Rule(
                "self_attn.q_a_layernorm.weight",
                ("attn", "q_norm", "weight"),
                (config.q_lora_rank,),
            ),
            Rule("self_attn.q_b_proj.weight", ("attn", "wq_b"), (queries, config.q_lora_rank)),
        ]
    else:
        query = [Rule("self_attn.q_proj.weight", ("attn", "wq"), (queries, dim))]
    expanded = heads * (config.qk_nope_head_dim + config.v_head_dim)
    return [
        *query,
        Rule(
            "self_attn.kv_a_proj_with_mqa.weight",
            ("attn", "wkv_a"),
            (latent + config.qk_rope_head_dim, dim),
        ),
        Rule("self_attn.kv_a_layernorm.weight", ("attn", "kv_norm", "weight"), (latent,)),
        Rule("self_attn.kv_b_proj.weight", ("attn", "wkv_b"), (expanded, latent)),
        Rule("self_attn.o_proj.weight", ("attn", "wo"), (dim, heads * config.v_head_dim)),
    ]


def _gqa_rules(config: ModelConfig) -> list[Rule]:
    dim = config.dim
    queries, keys = config.n_heads * config.qk_head_dim, config.kv_heads * config.qk_head_dim
    rules = []
    for letter, width in (("q", queries), ("k", keys), ("v", keys)):
        rules.append(Rule(f"self_attn.{letter}_proj.weight", ("attn", f"w{letter}"), (width, dim)))
        if config.qkv_bias:
            rules.append(Rule(f"self_attn.{letter}_proj.bias", ("attn", f"b{letter}"), (width,)))
    return [*rules, Rule("self_attn.o_proj.weight", ("attn", "wo"), (dim, queries))]


def _ffn_rules(
    prefix: str, path: tuple[str, ...], dim: int, hidden: int, *, expert: bool = False
) -> list[Rule]:
    return [
        Rule(f"{prefix}gate_proj.weight", (*path, "w_gate"), (hidden, dim), expert),
        Rule(f"{prefix}up_proj.weight", (*path, "w_up"), (hidden, dim), expert),
        Rule(f"{prefix}down_proj.weight", (*path, "w_down"), (dim, hidden), expert),
    ]


def _moe_rules(config: ModelConfig) -> list[Rule]:
    dim, hidden, experts = config.dim, config.moe_inter_dim, config.n_routed_experts
    rules = [Rule("mlp.gate.weight", ("ffn", "gate", "weight"), (experts, dim))]
    if config.router_bias:
        bias = ("ffn", "gate", "bias")
        rules.append(Rule("mlp.gate.e_score_correction_bias", bias, (experts,), keep_float32=True))
    rules += _ffn_rules("mlp.experts.{expert}.", ("ffn", "experts"), dim, hidden, expert=True)
    if config.n_shared_experts:
        shared = config.n_shared_experts * hidden  # published as one wide feed-forward
        rules += _ffn_rules("mlp.shared_experts.", ("ffn", "shared"), dim, shared)
    return rules


def _mtp(config: ModelConfig, depth: int) -> Iterator[Tensor]:
    """Yields the tensors of one multi-token prediction module, published as layer n_layers +
    depth."""
    dim, index = config.dim, (depth,)
    prefix = f"model.layers.{config.n_layers + depth}."
    vocabulary = (config.vocab_size, dim)
    yield Tensor(
        prefix + "embed_tokens.weight", ("embed", "weight"), (), vocabulary, False, is_copy=True
    )
    yield Tensor(prefix + "enorm.weight", ("mtp", "enorm", "weight"), index, (dim,), False)
    yield Tensor(prefix + "hnorm.weight", ("mtp", "hnorm", "weight"), index, (dim,), False)
    # Input columns: the embedding first, then the hidden state (the paper's bracket lists them the
    # other way round).
    yield Tensor(prefix + "eh_proj.weight", ("mtp", "eh_proj"), index, (dim, 2 * dim), True)
    rules = _layer_rules(config, moe=config.n_moe_layers > 0)
    yield from _expand(rules, prefix, ("mtp", "layer"), depth, config.n_routed_experts)
    yield Tensor(
        prefix + "shared_head.norm.weight", ("mtp", "norm", "weight"), index, (dim,), False
    )
    head, transpose = (
        (("embed", "weight"), False) if config.tie_embed else (("head", "weight"), True)
    )
    yield Tensor(prefix + "shared_head.head.weight", head, (), vocabulary, transpose, is_copy=True)


def _expand(
    rules: list[Rule], prefix: str, stack: tuple[str, ...], index: int, experts: int
) -> Iterator[Tensor]:
    for rule in rules:
        for expert in range(experts) if rule.expert else (None,):
            yield Tensor(
                prefix + rule.name.format(expert=expert),
                stack + rule.path,
                (index,) if expert is None else (index, expert),
                rule.shape,
                rule.transpose,
                keep_float32=rule.keep_float32,
                quantized=rule.quantized,
            )
