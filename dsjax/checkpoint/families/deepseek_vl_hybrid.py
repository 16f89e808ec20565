"""DeepSeek-VL 7B as transformers converts it: a Llama that sees with SigLIP and SAM-B."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from dsjax.checkpoint.families import deepseek_vl, janus
from dsjax.checkpoint.families.deepseek_vl import DEEPSEEK_VL
from dsjax.checkpoint.families.sight import LeafPath, Part, Sight, conv, linear, norm
from dsjax.checkpoint.families.table import Values
from dsjax.config.vision import SamConfig, VisionConfig

_SAM, _SECTION = "model.high_res_vision_model.vision_encoder.", "high_res_vision_config"
_DERIVED = frozenset({"num_pos_feats", "scale"})  # of SAM's prompts, which are not here
# Fields of ours, theirs, kinds and defaults.
_SAM_FIELDS = (
    ("image_size", "image_size", "int", SamConfig.image_size),
    ("patch_size", "patch_size", "int", SamConfig.patch_size),
    ("dim", "hidden_size", "int", SamConfig.dim),
    ("n_layers", "num_hidden_layers", "int", SamConfig.n_layers),
    ("n_heads", "num_attention_heads", "int", SamConfig.n_heads),
    ("norm_eps", "layer_norm_eps", "float", SamConfig.norm_eps),
    ("window", "window_size", "int", SamConfig.window),
    ("out_channels", "output_channels", "int", SamConfig.out_channels),
)


def read(config: Mapping[str, Any], problems: list[str]) -> VisionConfig | None:
    """Reads both towers' sections; None if there were problems."""
    low = deepseek_vl.read(config, problems)
    high = janus.section(config, _SECTION, problems)
    high.fixed("model_type", "sam_vision_model")
    high.fixed("hidden_act", "gelu")
    for name in ("qkv_bias", "use_abs_pos", "use_rel_pos"):
        high.fixed(name, True)
    shape = Values({})
    shape.take_all(high, _SAM_FIELDS)
    shape.take("inter_dim", high, "mlp_dim", "int", high.times("mlp_ratio", shape["dim"], 4.0))
    layers = high.values.get("global_attn_indexes", list(SamConfig.global_layers))
    high.seen.add("global_attn_indexes")
    if not isinstance(layers, list) or not all(type(each) is int for each in layers):
        problems.append(f"{high.place}.global_attn_indexes={layers!r} is not a list of integers")
    high.refuse_rest(janus.BOOKKEEPING | _DERIVED)
    if problems or low is None:
        return None
    shape["global_layers"] = tuple(layers)
    shape.places["global_layers"] = f"{high.place}.global_attn_indexes"
    whole = Values(vars(low) | {"high": shape.build(SamConfig, "sam")})
    whole.places["dim"] = deepseek_vl.WIDTH
    return whole.build(VisionConfig, "vision")


def write(vision: VisionConfig, text: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the sections of config.json."""
    high = vision.high
    assert high is not None
    return deepseek_vl.write(vision, text) | {
        _SECTION: {
            "model_type": "sam_vision_model",
            "image_size": high.image_size,
            "patch_size": high.patch_size,
            "hidden_size": high.dim,
            "num_hidden_layers": high.n_layers,
            "num_attention_heads": high.n_heads,
            "mlp_dim": high.inter_dim,
            "layer_norm_eps": high.norm_eps,
            "window_size": high.window,
            "global_attn_indexes": list(high.global_layers),
            "output_channels": high.out_channels,
        }
    }


def parts(vision: VisionConfig) -> Iterator[Part]:
    """Yields every tensor."""
    high, tower = vision.high, vision.tower
    assert high is not None
    C = high.out_channels
    yield from sam_parts(_SAM, high, ("patch_embed.projection", "layers", "layer_norm"))
    yield from _neck(f"{_SAM}neck", ("high", "neck"), high)
    yield from _neck("model.high_res_vision_neck", ("high", "neck_hd"), high)
    name = "model.high_res_vision_proj"
    yield from conv(f"{name}.conv1", ("high", "down1"), 3, C, 2 * C, bias=False)
    yield from conv(f"{name}.conv2", ("high", "down2"), 3, 2 * C, 4 * C, bias=False)
    yield Part("model.high_res_vision_alpha", ("high", "alpha"), (), (1,))
    yield from janus.tower_parts("model.vision_model.", tower, "out_proj")
    half, aligner = vision.dim // 2, "model.aligner."
    yield from linear(f"{aligner}vision_proj", ("hybrid", "low"), half, tower.dim)
    yield from linear(f"{aligner}high_res_vision_proj", ("hybrid", "high"), half, 4 * C)
    yield from linear(f"{aligner}proj", ("hybrid", "out"), vision.dim, vision.dim)


def sam_parts(prefix: str, config: SamConfig, names: tuple[str, str, str]) -> Iterator[Part]:
    """Yields the tensors of SAM's tower without its neck.

    Args:
      names: what a layout calls the patches' embedding, the layers, and a layer's norms.
    """
    patch, layers, norms = names
    D, F, H = config.dim, config.inter_dim, config.dim // config.n_heads
    shape = (1, config.grid, config.grid, D)
    yield Part(f"{prefix}pos_embed", ("high", "positions"), (), shape)
    yield from conv(f"{prefix}{patch}", ("high", "patch"), config.patch_size, 3, D)
    for layer in range(config.n_layers):
        name, path = f"{prefix}{layers}.{layer}.", ("high", "layers", str(layer))
        side = config.grid if layer in config.global_layers else config.window
        yield from norm(f"{name}{norms}1", (*path, "norm1"), D)
        for table in ("rel_pos_h", "rel_pos_w"):
            yield Part(f"{name}attn.{table}", (*path, "attn", table), (), (2 * side - 1, H))
        yield Part(f"{name}attn.qkv.weight", (*path, "attn", "wqkv"), (), (3 * D, D), "fused")
        yield Part(f"{name}attn.qkv.bias", (*path, "attn", "bqkv"), (), (3 * D,))
        yield from linear(f"{name}attn.proj", (*path, "attn", "proj"), D, D)
        yield from norm(f"{name}{norms}2", (*path, "norm2"), D)
        yield from linear(f"{name}mlp.lin1", (*path, "lin1"), F, D)
        yield from linear(f"{name}mlp.lin2", (*path, "lin2"), D, F)


def _neck(name: str, path: LeafPath, config: SamConfig) -> Iterator[Part]:
    C = config.out_channels
    yield from conv(f"{name}.conv1", (*path, "conv1"), 1, config.dim, C, bias=False)
    yield from norm(f"{name}.layer_norm1", (*path, "norm1"), C)
    yield from conv(f"{name}.conv2", (*path, "conv2"), 3, C, C, bias=False)
    yield from norm(f"{name}.layer_norm2", (*path, "norm2"), C)


DEEPSEEK_VL_HYBRID = dataclasses.replace(
    DEEPSEEK_VL,
    name="deepseek_vl_hybrid",
    architecture="DeepseekVLHybridForConditionalGeneration",
    sight=Sight(
        janus.text,
        read,
        write,
        parts,
        frozenset({"vision_config", _SECTION, "image_token_id", "tie_word_embeddings"}),
        unread="model.vision_model.head.",
    ),
)
