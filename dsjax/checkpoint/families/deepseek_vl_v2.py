"""DeepSeek-VL2 (arXiv:2412.10302): a tower that sees pictures in tiles, and a mixture of experts.

The language model is DeepSeek-V2's, with three differences between the sizes: Tiny has plain heads
(`use_mla` false), and Base chooses experts as V3. The code multiplies by `routed_scaling_factor`
after normalising, as V3's, where V2's own code does not.

config.json leaves out what is the default of DeepSeek's classes, which are not transformers': a
`q_lora_rank` that is absent is 1536, and null is none. SigLIP's GELU is the approximation by tanh
here, the projector's is exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from dsjax.checkpoint.families.deepseek_tower import tower_parts
from dsjax.checkpoint.families.family import (
    EQUAL_HEADS,
    EXPERTS,
    GQA,
    GQA_NEUTRAL,
    MLA,
    MLA_NEUTRAL,
    SOFTMAX,
    TEXT,
    Family,
    Rule,
    gqa_rules,
    mla_rules,
)
from dsjax.checkpoint.families.multi_modality import projector_parts
from dsjax.checkpoint.families.sight import Part, Sight
from dsjax.checkpoint.families.table import Fields, Row, Values, field, fixed
from dsjax.config import ModelConfig
from dsjax.config.vision import SiglipConfig, TilesConfig, VisionConfig
from dsjax.vision.pictures import sizes_of

# DeepseekV2Config of their repository.
_LANGUAGE = {
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "moe_intermediate_size": 1407,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 0,
    "n_routed_experts": 0,
    "num_experts_per_tok": 0,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
_HEADS = (*GQA, EQUAL_HEADS, fixed("attention_bias", False))
# Fields of ours, theirs, kinds and defaults.
_TOWER = (
    ("image_size", "image_size", "int", 384),
    ("patch_size", "patch_size", "int", 16),
    ("dim", "width", "int", 1024),
    ("n_layers", "layers", "int", 24),
    ("n_heads", "heads", "int", 16),
)
_LATENT = frozenset(
    "q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim".split()
)  # without effect on plain heads; null or 0 in Tiny's
_BOOKKEEPING = frozenset(
    "model_type model_name torch_dtype dtype transformers_version weight_init use_checkpoint "
    "deterministic num_recomputing_layers".split()
)


def text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the language model's section, with the defaults of DeepSeek's class."""
    section = config.get("language_config")
    return _LANGUAGE | (dict(section) if isinstance(section, Mapping) else {})


def _read_attention(fields: Fields, values: Values) -> None:
    latent = fields.read("use_mla", "bool", True)
    values["attention"] = "mla" if latent else "gqa"
    for row in MLA if latent else _HEADS:
        row.read(fields, values)
    if not latent:
        fields.seen |= _LATENT


def _write_attention(model: ModelConfig) -> dict[str, Any]:
    latent = model.attention == "mla"
    said: dict[str, Any] = {"use_mla": latent}
    if not latent:
        said |= {"q_lora_rank": None, "kv_lora_rank": None}
    for row in MLA if latent else _HEADS:
        said |= row.write(model)
    return said


def _read_router(fields: Fields, values: Values) -> None:
    method = fields.read("topk_method", "str")
    fields.fixed("topk_method", "greedy", "group_limited_greedy", "noaux_tc")
    biased = method == "noaux_tc"
    values["router_bias"] = biased
    values["score_func"] = "sigmoid" if biased else "softmax"
    values["group_score"] = "top2" if biased else "max"
    # softmax is the default
    fields.fixed("scoring_func", values["score_func"])
    if biased and fields.values.get("scoring_func") is None:
        fields.problems.append(f"{fields.place} lacks scoring_func, which must be 'sigmoid'")
    if method == "greedy":
        fields.seen |= {"n_group", "topk_group"}  # without effect for this method
        return
    values.take("n_expert_groups", fields, "n_group", "int")
    values.take("n_limited_groups", fields, "topk_group", "int")


def _write_router(model: ModelConfig) -> dict[str, Any]:
    method = "noaux_tc" if model.router_bias else "group_limited_greedy"
    if not model.router_bias and model.n_expert_groups == 1:
        method = "greedy"
    return {
        "topk_method": method,
        "scoring_func": model.score_func,
        "n_group": model.n_expert_groups,
        "topk_group": model.n_limited_groups,
    }


def read(config: Mapping[str, Any], problems: list[str]) -> VisionConfig | None:
    """Reads the sections of tower and projector, and how pictures are cut; None if there were
    problems.
    """
    outer = Fields(config, "config.json", problems)
    tower = _section(config, "vision_config", problems)
    tower.fixed("global_pool", "map")
    tower.fixed("ignore_head", True)
    tower.fixed("class_token", False)
    shape = Values({"activation": "gelu_tanh", "pool": True})
    shape.take_all(tower, _TOWER)
    width = shape["dim"]
    shape["inter_dim"] = tower.times("mlp_ratio", width, 4.0)
    shape.places["inter_dim"] = f"{tower.place}.mlp_ratio"
    tower.refuse_rest(_BOOKKEEPING)
    dim = text(config)["hidden_size"]
    projector = _section(config, "projector_config", problems)
    projector.fixed("projector_type", "downsample_mlp_gelu")
    projector.fixed("mlp_ratio", 1)
    for name, default, wanted in (("input_dim", 1152, width), ("n_embed", 2048, dim)):
        said = projector.read(name, "int", default)
        if said != wanted:
            problems.append(
                f"{projector.place}.{name}={said} is not {wanted}, the width that it connects"
            )
    depth = projector.read("depth", "int", 2)
    if depth < 2:
        problems.append(f"{projector.place}.depth={depth} is not at least 2")
    cut = Values({})
    cut.take("downsample", projector, "downsample_ratio", "int", 2)
    projector.refuse_rest(_BOOKKEEPING)
    if outer.read("tile_tag", "str") != "2D":
        problems.append(f"config.json.tile_tag={config.get('tile_tag')!r} is not '2D'")
    outer.fixed("global_view_pos", "head")
    said = config.get("candidate_resolutions", [[384, 384]])
    sizes = sizes_of(said)
    if sizes is None:
        problems.append(
            f"config.json.candidate_resolutions={said!r} is not a list of widths and heights"
        )
    if problems or sizes is None:
        return None
    cut["resolutions"] = sizes
    seen, tiles = shape.build(SiglipConfig, "tower"), cut.build(TilesConfig, "tiles")
    whole = Values({"dim": dim, "tower": seen, "aligner_depth": depth, "tiles": tiles})
    whole.places |= {
        "dim": "config.json.language_config.hidden_size",
        "resolutions": "config.json.candidate_resolutions",
        "image_size": shape.places["image_size"],
    }
    return whole.build(VisionConfig, "vision", "tiles", "tower")


def _section(config: Mapping[str, Any], name: str, problems: list[str]) -> Fields:
    values = config.get(name)
    if not isinstance(values, Mapping):
        problems.append(f"config.json.{name}={values!r} is not an object")
        values = {}
    return Fields(values, f"config.json.{name}", problems)


def write(vision: VisionConfig, text: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the sections of config.json."""
    tower, tiles = vision.tower, vision.tiles
    if tiles is None:
        raise ValueError("family deepseek_vl_v2 has models that see tiles, and this one does not")
    return {
        "tile_tag": "2D",
        "global_view_pos": "head",
        "candidate_resolutions": [list(size) for size in tiles.resolutions],
        "language_config": {"model_type": "deepseek_v2", **text},
        "projector_config": {
            "model_type": "mlp_projector",
            "projector_type": "downsample_mlp_gelu",
            "input_dim": tower.dim,
            "n_embed": vision.dim,
            "depth": vision.aligner_depth,
            "downsample_ratio": tiles.downsample,
        },
        "vision_config": {
            "model_type": "vision",
            "image_size": tower.image_size,
            "patch_size": tower.patch_size,
            "width": tower.dim,
            "layers": tower.n_layers,
            "heads": tower.n_heads,
            "mlp_ratio": _ratio(tower.dim, tower.inter_dim),
        },
    }


def _ratio(dim: int, inter_dim: int) -> float:
    """Returns the shortest decimal with which int(dim * ratio) is inter_dim: 3.7362 of SO400M."""
    for digits in range(17):
        ratio = math.ceil(inter_dim / dim * 10**digits) / 10**digits
        if int(dim * ratio) == inter_dim:
            return ratio
    return inter_dim / dim


def parts(vision: VisionConfig) -> Iterator[Part]:
    """Yields every tensor. The separator's name is spelt as they spell it."""
    tower, tiles = vision.tower, vision.tiles
    assert tiles is not None
    yield Part("image_newline", ("newline",), (), (vision.dim,))
    yield Part("view_seperator", ("separator",), (), (vision.dim,))
    yield from tower_parts("vision.", tower)
    width = tower.dim * tiles.downsample**2
    yield from projector_parts("projector", ("aligner",), width, vision.dim, vision.aligner_depth)


class _Vl2(Family):
    """Attention and router are the checkpoint's choice."""

    def names(self, model: ModelConfig) -> bool:
        plain = not (model.qkv_bias or model.qk_norm or model.n_mtp or model.index_topk)
        return model.attention in ("mla", "gqa") and plain


def _attention(model: ModelConfig) -> list[Rule]:
    return mla_rules(model) if model.attention == "mla" else gqa_rules(model)


DEEPSEEK_VL_V2 = _Vl2(
    name="deepseek_vl_v2",
    architecture="DeepseekVLV2ForCausalLM",
    constants=SOFTMAX,
    rows=(
        *TEXT,
        Row(_read_attention, _write_attention),
        fixed("mlp_bias", False, written=False),
        *EXPERTS,
        Row(_read_router, _write_router),
        field("norm_topk_prob", "norm_topk", False),
        field("routed_scaling_factor", "route_scale"),
    ),
    attention=_attention,
    # "lm_head": true says that there is an output head, as there always is.
    neutral=MLA_NEUTRAL | GQA_NEUTRAL | {"lm_head"},
    section="language_config",
    prefix="language.",
    sight=Sight(
        text,
        read,
        write,
        parts,
        frozenset(
            "vision_config projector_config tile_tag global_view_pos candidate_resolutions".split()
        ),
    ),
)
