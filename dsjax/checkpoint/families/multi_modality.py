"""DeepSeek's own layout of models that see: Janus, Janus-Pro and DeepSeek-VL 1.3B.

One `model_type` for all of them: what there is follows from the sections of config.json. Their
language model's section leaves out what is Llama's default. The towers carry a pooling head that
nothing reads, and the VQ tokenizer a count of each code's uses.

DeepSeek-VL 7B (two towers) and JanusFlow (a rectified flow) have sections that are refused by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from dsjax.checkpoint.families.llama import LLAMA
from dsjax.checkpoint.families.sight import (
    LeafPath,
    Part,
    Sight,
    VqNames,
    linear,
    norm,
    tower_ends,
    vq_parts,
)
from dsjax.checkpoint.families.table import Fields
from dsjax.config.vision import SiglipConfig, VisionConfig, VqConfig

_NAMES = VqNames("conv_blocks.{level}", "conv_blocks.{level}", "res", ("0", "1", "2"))
# The shapes that their code spells out; config.json says little of them.
_TOWER = "siglip_large_patch16_384"
TOWER, VQ = SiglipConfig(pool=True), VqConfig(usage=65_536)
# transformers' LlamaConfig, which DeepSeek's config.json relies on.
_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
_DRAWING = ("gen_vision_config", "gen_aligner_config", "gen_head_config")
# Of a section beside cls and params; `model_name` of the SigLIP is checked.
_BOOKKEEPING = frozenset({"model_type", "cls", "params", "torch_dtype", "transformers_version"})


def text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the language model's section, with Llama's defaults for what it leaves out."""
    section = config.get("language_config")
    said = dict(section) if isinstance(section, Mapping) else {}
    return _LLAMA | {name: value for name, value in said.items() if value is not None}


def _section(config: Mapping[str, Any], name: str, problems: list[str], *classes: str) -> Fields:
    """Returns the `params` of a section, which must be of one of these classes."""
    values = config.get(name)
    if not isinstance(values, Mapping) or not isinstance(values.get("params"), Mapping):
        problems.append(f"config.json.{name}={values!r} is not an object with params")
        values = {"cls": classes[0], "params": {}}
    section = Fields(values, f"config.json.{name}", problems)
    section.fixed("cls", *classes)
    section.refuse_rest(_BOOKKEEPING)
    return Fields(values["params"], f"config.json.{name}.params", problems)


def _aligner(
    config: Mapping[str, Any], name: str, width: int, dim: int, problems: list[str]
) -> int:
    """Reads the section of an aligner; returns its depth."""
    fields = _section(config, name, problems, "MlpProjector")
    fields.fixed("projector_type", "mlp_gelu", "linear")
    fields.fixed("input_dim", width)
    fields.fixed("n_embed", dim)
    depth = fields.read("depth", "int", 1)
    if fields.values.get("projector_type") == "linear":
        depth = 1
    fields.refuse_rest()
    return depth


def read(config: Mapping[str, Any], problems: list[str]) -> VisionConfig | None:
    """Reads the sections of tower, aligners, head and VQ tokenizer; None if there were problems."""
    dim = text(config)["hidden_size"]
    vision = _section(config, "vision_config", problems, "CLIPVisionTower")
    image_size = vision.read("image_size", "int", TOWER.image_size)
    vision.fixed("model_name", _TOWER)
    vision.fixed("select_feature", "same")
    chosen = vision.values.get("select_layer", -1)
    vision.seen |= {"select_layer"}
    most, n_layers = TOWER.n_layers, 0
    if type(chosen) is int and chosen and -most <= chosen <= most:
        n_layers = chosen if chosen > 0 else most + chosen + 1
    else:
        problems.append(f"{vision.place}.select_layer={chosen!r} names none of {most} layers")
    vision.refuse_rest(frozenset({"image_mean", "image_std", "pixel_mean", "pixel_std"}))
    depth = _aligner(config, "aligner_config", TOWER.dim, dim, problems)
    vq, head_dim, drawing_depth = None, 0, 2
    if any(name in config for name in _DRAWING):
        codes = _section(config, "gen_vision_config", problems, "VQ-16")
        vq = dataclasses.replace(
            VQ,
            n_codes=codes.read("image_token_size", "int", VQ.n_codes),
            code_dim=codes.read("n_embed", "int", VQ.code_dim),
        )
        head = _section(config, "gen_head_config", problems, "vision_head")
        head_dim = head.read("image_token_embed", "int")
        head.fixed("image_token_size", vq.n_codes)
        head.fixed("n_embed", dim)
        drawing_depth = _aligner(config, "gen_aligner_config", vq.code_dim, dim, problems)
        for fields in (codes, head):
            fields.refuse_rest()
    if problems:
        return None
    return VisionConfig(
        dim=dim,
        tower=dataclasses.replace(TOWER, image_size=image_size, n_layers=n_layers),
        aligner_depth=depth,
        vq=vq,
        drawing_depth=drawing_depth,
        head_dim=head_dim,
    )


def write(vision: VisionConfig, text: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the sections of config.json."""
    tower, vq = vision.tower, vision.vq
    layers = -1 if tower.n_layers == TOWER.n_layers else tower.n_layers
    sections: dict[str, Any] = {
        "language_config": {"model_type": "llama", **text},
        "vision_config": {
            "cls": "CLIPVisionTower",
            "model_type": "vision",
            "params": {
                "image_size": tower.image_size,
                "model_name": _TOWER,
                "select_feature": "same",
                "select_layer": layers,
            },
        },
        "aligner_config": _written("aligner", tower.dim, vision.dim, vision.aligner_depth),
    }
    if vq:
        sections |= {
            "gen_vision_config": {
                "cls": "VQ-16",
                "model_type": "gen_vision",
                "params": {"image_token_size": vq.n_codes, "n_embed": vq.code_dim},
            },
            "gen_aligner_config": _written(
                "gen_aligner", vq.code_dim, vision.dim, vision.drawing_depth
            ),
            "gen_head_config": {
                "cls": "vision_head",
                "model_type": "gen_head",
                "params": {
                    "image_token_embed": vision.head_dim,
                    "image_token_size": vq.n_codes,
                    "n_embed": vision.dim,
                },
            },
        }
    return sections


def _written(kind: str, width: int, dim: int, depth: int) -> dict[str, Any]:
    return {
        "cls": "MlpProjector",
        "model_type": kind,
        "params": {
            "depth": depth,
            "input_dim": width,
            "n_embed": dim,
            "projector_type": "mlp_gelu",
        },
    }


def parts(vision: VisionConfig) -> Iterator[Part]:
    """Yields every tensor."""
    tower, vq = vision.tower, vision.vq
    yield from tower_parts("vision_model.vision_tower.", tower)
    yield from _projector("aligner", ("aligner",), tower.dim, vision.dim, vision.aligner_depth)
    if vq is None:
        return
    pencil, own = ("pencil",), ("pencil", "head")
    yield from vq_parts("gen_vision_model.", (*pencil, "vq"), vq, _NAMES)
    yield from _projector(
        "gen_aligner", (*pencil, "aligner"), vq.code_dim, vision.dim, vision.drawing_depth
    )
    project = "gen_head.output_mlp_projector"
    yield from linear(project, (*own, "project"), vision.head_dim, vision.dim)
    yield from linear("gen_head.vision_head", (*own, "vision_head"), vq.n_codes, vision.head_dim)
    yield Part("gen_embed.weight", (*pencil, "embed"), (), (vq.n_codes, vq.code_dim))


def tower_parts(prefix: str, config: SiglipConfig) -> Iterator[Part]:
    """Yields the tensors of a tower as timm names them."""
    D, F = config.dim, config.inter_dim
    shape = (1, config.n_tokens, D)
    yield from tower_ends(config, f"{prefix}patch_embed.proj", f"{prefix}pos_embed", shape)
    for layer in range(config.n_layers):
        name, slot, path = f"{prefix}blocks.{layer}.", (layer,), ("tower", "layers")
        yield from norm(f"{name}norm1", (*path, "norm1"), D, slot)
        fused = (*path, "attn", "wqkv")
        yield Part(f"{name}attn.qkv.weight", fused, slot, (3 * D, D), "fused")
        yield Part(f"{name}attn.qkv.bias", (*path, "attn", "bqkv"), slot, (3 * D,))
        yield from linear(f"{name}attn.proj", (*path, "attn", "proj"), D, D, slot)
        yield from norm(f"{name}norm2", (*path, "norm2"), D, slot)
        yield from linear(f"{name}mlp.fc1", (*path, "fc1"), F, D, slot)
        yield from linear(f"{name}mlp.fc2", (*path, "fc2"), D, F, slot)
    yield from norm(f"{prefix}norm", ("tower", "norm"), D)
    if config.pool:
        name, path = f"{prefix}attn_pool.", ("tower", "pool")
        yield Part(f"{name}latent", (*path, "latent"), (), (1, 1, D))
        yield from linear(f"{name}q", (*path, "q"), D, D)
        yield from linear(f"{name}kv", (*path, "kv"), 2 * D, D)
        yield from linear(f"{name}proj", (*path, "proj"), D, D)
        yield from norm(f"{name}norm", (*path, "norm"), D)
        yield from linear(f"{name}mlp.fc1", (*path, "fc1"), F, D)
        yield from linear(f"{name}mlp.fc2", (*path, "fc2"), D, F)


def _projector(name: str, path: LeafPath, width: int, dim: int, depth: int) -> Iterator[Part]:
    for layer in range(depth):
        own = (*path, "layers", str(layer))
        yield from linear(f"{name}.layers.{2 * layer}", own, dim, dim if layer else width)


MULTI_MODALITY = dataclasses.replace(
    LLAMA,
    name="multi_modality",
    architecture="MultiModalityCausalLM",
    section="language_config",
    prefix="language_model.",
    sight=Sight(
        text,
        read,
        write,
        parts,
        frozenset({"vision_config", "aligner_config", *_DRAWING}),
    ),
)
