"""DeepSeek-V4 as transformers 5.24 defines it: window, sparse and heavy layers, each with experts.

Tensors have DeepSeek's own names (`layers.0.attn.wq_a.weight`), not Hugging Face's. transformers
writes them half renamed (`model.layers.0.attn.norm.weight`, `model.hc_head.hc_fn`): both are read,
the first are written. MTP modules (`mtp.0...`) are passed over, as in transformers. Experts in FP4
are refused.

config.json says which layer is of which kind in one of three ways: `layer_types`, `compress_ratios`
(tokens of an entry: 0, 4, 128), or not at all: heavy in the first two and then in every other one,
sparse in the rest. The same goes for layers whose experts a table chooses: `mlp_layer_types`, or
the first `num_hash_layers`.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from dsjax.checkpoint.families.family import Family, Place, Rule, TopNames, ffn_rules
from dsjax.checkpoint.families.rope import read_scaling, write_rope
from dsjax.checkpoint.families.table import MAX_LISTED, Fields, Row, Values, field, fixed
from dsjax.config import ModelConfig
from dsjax.model.layer_kinds import LayerKind, kinds

_KINDS = {
    "sliding_attention": "window",
    "compressed_sparse_attention": "sparse",
    "heavily_compressed_attention": "heavy",
}
_PUBLISHED = {ours: name for name, ours in _KINDS.items()}
_BY_RATIO = {0: "window", 4: "sparse", 128: "heavy"}


def _listed(fields: Fields, key: str, known: Mapping[Any, Any], count: int) -> list[Any] | None:
    """Reads a list with one entry per layer, of which there may be more; None if it is absent."""
    fields.seen.add(key)
    found = fields.values.get(key)
    if found is None:
        return None
    right = isinstance(found, list) and len(found) >= count
    if not right or any(
        type(each) not in (int, str) or each not in known for each in found[:count]
    ):
        fields.problems.append(
            f"{fields.place}.{key}={repr(found)[:80]} does not give each of {count} layers one of "
            f"{', '.join(map(str, known))}"
        )
        return None
    return [known[each] for each in found[:count]]


def _read_kinds(fields: Fields, values: Values) -> None:
    count = min(values["n_layers"], MAX_LISTED)
    layers = _listed(fields, "layer_types", _KINDS, count)
    by_ratio = _listed(fields, "compress_ratios", _BY_RATIO, count)
    usual = ["sparse" if layer > 1 and layer % 2 else "heavy" for layer in range(count)]
    values["layer_types"] = tuple(layers or by_ratio or usual)
    values.places["layer_types"] = f"{fields.place}.layer_types"
    rates = fields.values.get("compress_rates")
    fields.seen.add("compress_rates")
    if rates is not None and not isinstance(rates, Mapping):
        fields.problems.append(f"{fields.place}.compress_rates={rates!r} is not an object")
    place = f"{fields.place}.compress_rates"
    inner = Fields(rates if isinstance(rates, Mapping) else {}, place, fields.problems)
    for ours, kind, older, usual_ratio in (
        ("sparse_ratio", "compressed_sparse_attention", "compress_rate_csa", 4),
        ("heavy_ratio", "heavily_compressed_attention", "compress_rate_hca", 128),
    ):
        values.take(ours, inner, kind, "int", usual_ratio)
        fields.seen.add(older)
        if fields.values.get(older) is not None:
            values.take(ours, fields, older, "int")
    inner.refuse_rest()


def _write_kinds(model: ModelConfig) -> dict[str, Any]:
    return {
        "layer_types": [_PUBLISHED[kind] for kind in model.layer_types],
        "compress_rates": {
            _PUBLISHED["sparse"]: model.sparse_ratio,
            _PUBLISHED["heavy"]: model.heavy_ratio,
        },
    }


def _read_hashed(fields: Fields, values: Values) -> None:
    count = min(values["n_layers"], MAX_LISTED)
    first = min(fields.read("num_hash_layers", "int", 3), count)
    listed = _listed(fields, "mlp_layer_types", {"hash_moe": True, "moe": False}, count)
    hashed = [layer < first for layer in range(count)] if listed is None else listed
    values["hash_layers"] = tuple(layer for layer in range(count) if hashed[layer])


def _write_hashed(model: ModelConfig) -> dict[str, Any]:
    hashed = set(model.hash_layers)
    types = ["hash_moe" if layer in hashed else "moe" for layer in range(model.n_layers)]
    return {"mlp_layer_types": types}


def _read_rope_dim(fields: Fields, values: Values) -> None:
    width = values["head_dim"]
    share = fields.read("partial_rotary_factor", "float", 0.0)
    turned = fields.times("partial_rotary_factor", width, 0.0)
    usual = turned if share else width // 8
    values.take("qk_rope_head_dim", fields, "qk_rope_head_dim", "int", usual)
    given = values["qk_rope_head_dim"]
    if share and turned != given:
        fields.problems.append(
            f"{fields.place}.partial_rotary_factor={share} of {width} channels is not "
            f"qk_rope_head_dim={given}"
        )


def _read_rope(fields: Fields, values: Values) -> None:
    """Reads one rope for window layers and one for the others, nested or as fields of their own."""
    fields.seen |= {"rope_parameters", "rope_scaling"}
    theta = fields.read("rope_theta", "float", 10000.0)
    compressed = fields.read("compress_rope_theta", "float", 160000.0)
    settings = fields.values.get("rope_parameters") or fields.values.get("rope_scaling") or {}
    if not isinstance(settings, Mapping):
        fields.problems.append(f"{fields.place} has rope settings that are no object: {settings!r}")
        return
    nested = all(isinstance(settings.get(name), Mapping) for name in ("main", "compress"))
    main, scaling = {"rope_theta": theta}, dict(settings) | {"rope_theta": compressed}
    if nested:
        main, scaling = settings["main"], settings["compress"]
    name = "rope_parameters" if fields.values.get("rope_parameters") else "rope_scaling"
    place = f"{fields.place}.{name}"
    plain = Fields(main, f"{place}.main" if nested else fields.place, fields.problems)
    values.take("rope_theta", plain, "rope_theta", "float", theta)
    plain.fixed("rope_type", "default")
    _fix_share(plain, values)
    plain.refuse_rest()
    # cos and sin are not scaled unless the file says so, and mscale has no effect.
    own = {"attention_factor": 1.0} | {
        key: value for key, value in scaling.items() if value is not None and "mscale" not in key
    }
    own["rope_type"] = own.get("rope_type") or own.pop("type", None) or "default"
    own.pop("type", None)
    if own["rope_type"] != "yarn":
        own.pop("attention_factor")
    inner = Fields(own, f"{place}.compress" if nested else place, fields.problems)
    values.take("compress_rope_theta", inner, "rope_theta", "float", compressed)
    if not nested:
        values.places["compress_rope_theta"] = f"{fields.place}.compress_rope_theta"
    _fix_share(inner, values)
    own.pop("partial_rotary_factor", None)
    read_scaling(inner, values)


def _fix_share(inner: Fields, values: Values) -> None:
    share = inner.read("partial_rotary_factor", "float", 0.0)
    turned = inner.times("partial_rotary_factor", values["head_dim"], 0.0)
    if share and turned != values["qk_rope_head_dim"]:
        inner.problems.append(
            f"{inner.place}.partial_rotary_factor={share} of {values['head_dim']} channels is not "
            f"{values['qk_rope_head_dim']}, as elsewhere in the file"
        )


def _write_rope(model: ModelConfig) -> dict[str, Any]:
    return write_rope(model) | {"compress_rope_theta": model.compress_rope_theta}


def _read_width(fields: Fields, values: Values) -> None:
    # No layer has a dense feed-forward, so the field that is required has no effect.
    for ours in ("moe_inter_dim", "inter_dim"):
        values.take(ours, fields, "moe_intermediate_size", "int")


def _read_score(fields: Fields, values: Values) -> None:
    fields.fixed("scoring_func", "sqrtsoftplus", "sigmoid")
    values.take("score_func", fields, "scoring_func", "str", "sqrtsoftplus")


_ROWS = (
    field("vocab_size", "vocab_size"),
    field("hidden_size", "dim"),
    field("num_hidden_layers", "n_layers"),
    field("num_attention_heads", "n_heads"),
    fixed("num_key_value_heads", 1),
    field("head_dim", "head_dim"),
    fixed("hidden_act", "silu", "swish"),
    field("max_position_embeddings", "max_seq_len"),
    field("rms_norm_eps", "norm_eps"),
    field("tie_word_embeddings", "tie_embed", False),
    *(fixed(key, value) for key, value in (("attention_dropout", 0.0), ("attention_bias", False))),
    *(fixed(key, True, written=False) for key in ("is_causal", "use_rope")),
    fixed("mlp_bias", False, written=False),
    Row(_read_rope_dim, lambda model: {"qk_rope_head_dim": model.qk_rope_head_dim}),
    Row(_read_rope, _write_rope),
    field("q_lora_rank", "q_lora_rank"),
    field("o_groups", "o_groups"),
    field("o_lora_rank", "o_lora_rank"),
    field("sliding_window", "window_size"),
    Row(_read_kinds, _write_kinds),
    field("index_n_heads", "index_n_heads"),
    field("index_head_dim", "index_head_dim"),
    field("index_topk", "index_topk"),
    field("hc_mult", "hc_mult", 4),
    field("hc_sinkhorn_iters", "hc_sinkhorn_iters", 20),
    field("hc_eps", "hc_eps", 1e-6),
    Row(_read_width, lambda model: {"moe_intermediate_size": model.moe_inter_dim}),
    field("n_routed_experts", "n_routed_experts"),
    fixed("n_shared_experts", 1, ours="n_shared_experts"),
    field("num_experts_per_tok", "n_activated_experts"),
    Row(_read_hashed, _write_hashed),
    Row(_read_score, lambda model: {"scoring_func": model.score_func}),
    fixed("topk_method", "noaux_tc", written=False),
    fixed("norm_topk_prob", True, ours="norm_topk"),
    field("routed_scaling_factor", "route_scale", 1.5),
    field("swiglu_limit", "swiglu_limit", 10.0),
    fixed("expert_dtype", "fp8", written=False),
)


def _matrix(name: str, path: tuple[str, ...], *shape: int, plain: bool = False) -> Rule:
    return Rule(f"{name}.weight", path, shape, plain=plain)


def _kept(name: str, path: tuple[str, ...], *shape: int) -> Rule:
    """Returns the rule for what is float32 in every checkpoint."""
    return Rule(name, path, shape, keep_float32=True, plain=True)


def _connection(name: str, path: tuple[str, ...], model: ModelConfig, last: bool) -> list[Rule]:
    streams = model.hc_mult
    numbers, scales = (streams, 1) if last else ((2 + streams) * streams, 3)
    return [
        _kept(f"{name}_fn", (*path, "fn"), numbers, streams * model.dim),
        _kept(f"{name}_base", (*path, "base"), numbers),
        _kept(f"{name}_scale", (*path, "scale"), scales),
    ]


def _compressor(
    name: str, path: tuple[str, ...], model: ModelConfig, width: int, kind: str
) -> list[Rule]:
    sparse = kind == "sparse"
    channels, ratio = (2 * width, model.sparse_ratio) if sparse else (width, model.heavy_ratio)
    return [
        _kept(f"{name}.ape", (*path, "ape"), ratio, channels),
        _matrix(f"{name}.wkv", (*path, "wkv"), channels, model.dim, plain=True),
        _matrix(f"{name}.wgate", (*path, "wgate"), channels, model.dim, plain=True),
        _matrix(f"{name}.norm", (*path, "norm", "weight"), width),
    ]


def _attention(model: ModelConfig, kind: str) -> list[Rule]:
    D, Q, H = model.dim, model.q_lora_rank, model.head_dim
    heads, grouped = model.n_heads * H, model.o_groups * model.o_lora_rank
    attn = ("attn",)
    rules = [
        _kept("attn.attn_sink", (*attn, "sink"), model.n_heads),
        _matrix("attn.wq_a", (*attn, "wq_a"), Q, D),
        _matrix("attn.q_norm", (*attn, "q_norm", "weight"), Q),
        _matrix("attn.wq_b", (*attn, "wq_b"), heads, Q),
        _matrix("attn.wkv", (*attn, "wkv"), H, D),
        _matrix("attn.kv_norm", (*attn, "kv_norm", "weight"), H),
        _matrix("attn.wo_a", (*attn, "wo_a"), grouped, heads // model.o_groups),
        _matrix("attn.wo_b", (*attn, "wo_b"), D, grouped),
    ]
    if kind != "window":
        rules += _compressor("attn.compressor", (*attn, "compressor"), model, H, kind)
    if kind == "sparse":
        name, path, width = "attn.indexer", (*attn, "indexer"), model.index_head_dim
        queries = model.index_n_heads * width
        rules += [
            _matrix(f"{name}.wq_b", (*path, "wq_b"), queries, Q),
            _matrix(
                f"{name}.weights_proj", (*path, "weights_proj"), model.index_n_heads, D, plain=True
            ),
            *_compressor(f"{name}.compressor", (*path, "compressor"), model, width, kind),
        ]
    return rules


_EXPERT_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def _feed_forward(name: str, path: tuple[str, ...], model: ModelConfig, expert: bool) -> list[Rule]:
    rules = ffn_rules(name, path, model.dim, model.moe_inter_dim, expert=expert)
    return [
        dataclasses.replace(
            rule, name=re.sub(r"\w+_proj", lambda found: _EXPERT_NAMES[found[0]], rule.name)
        )
        for rule in rules
    ]


def _layer(model: ModelConfig, kind: LayerKind) -> list[Rule]:
    experts, width = model.n_routed_experts, model.dim
    rules = [
        *_connection("hc_attn", ("hc_attn",), model, last=False),
        _matrix("attn_norm", ("attn_norm", "weight"), width),
        *_attention(model, kind.attention),
        *_connection("hc_ffn", ("hc_ffn",), model, last=False),
        _matrix("ffn_norm", ("ffn_norm", "weight"), width),
        _matrix("ffn.gate", ("ffn", "gate", "weight"), experts, width, plain=True),
    ]
    if kind.hashed:
        table = (model.vocab_size, model.n_activated_experts)
        rules.append(Rule("ffn.gate.tid2eid", ("tid2eid",), table, trains=False, integer=True))
    else:
        bias = _kept("ffn.gate.bias", ("ffn", "gate", "bias"), experts)
        rules.append(dataclasses.replace(bias, trains=False))
    return [
        *rules,
        *_feed_forward("ffn.experts.{expert}.", ("ffn", "experts"), model, expert=True),
        *_feed_forward("ffn.shared_experts.", ("ffn", "shared"), model, expert=False),
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _V4(Family):
    """Layers are stacked by kind, and the residual streams have weights of their own."""

    def names(self, model: ModelConfig) -> bool:
        return model.attention == "compressed" and model.router_bias

    def places(self, model: ModelConfig) -> list[Place]:
        counts: Counter[LayerKind] = Counter()
        found = []
        for kind in kinds(model):
            stack = ("moe_layers", kind.stack)
            found.append(Place(stack, counts[kind], _layer(model, kind)))
            counts[kind] += 1
        return found

    def outside_layers(self, model: ModelConfig) -> list[Rule]:
        return _connection("hc_head", ("moe_layers", "hc_head"), model, last=True)

    def canonical(self, name: str) -> str | None:
        name = name.removeprefix("model.")
        if name.startswith("mtp."):
            return None
        name = name.replace("hc_head.hc_", "hc_head_").replace(".attn.norm.", ".attn.kv_norm.")
        return {"embed_tokens.weight": "embed.weight", "lm_head.weight": "head.weight"}.get(
            name, name
        )


DEEPSEEK_V4 = _V4(
    name="deepseek_v4",
    architecture="DeepseekV4ForCausalLM",
    constants={
        "attention": "compressed",
        "n_dense_layers": 0,
        "n_kv_heads": 1,
        "n_shared_experts": 1,
        "router_bias": True,
        "norm_topk": True,
    },
    rows=_ROWS,
    attention=lambda model: [],
    scale="pow2",
    neutral=frozenset({"num_nextn_predict_layers", "router_jitter_noise"}),
    top=TopNames("embed.weight", "layers.", "norm.weight", "head.weight"),
)
