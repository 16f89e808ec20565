"""DeepSeek's own layout of models that see: Janus, Janus-Pro, JanusFlow and DeepSeek-VL.

One `model_type` for all of them: what there is follows from the sections of config.json
(janusflow.py has those of JanusFlow, deepseek_towers.py those of DeepSeek-VL 7B). Their language
model's section leaves out what is Llama's default. The towers carry a pooling head that nothing
reads, and the VQ tokenizer a count of each code's uses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from dsjax.checkpoint.families import deepseek_towers, janusflow
from dsjax.checkpoint.families.deepseek_tower import (
    read_tower,
    section,
    tower_parts,
    written_tower,
)
from dsjax.checkpoint.families.llama import LLAMA
from dsjax.checkpoint.families.sight import LeafPath, Part, Sight, VqNames, linear, vq_parts
from dsjax.checkpoint.families.table import Fields, Values
from dsjax.config.vision import VisionConfig, VqConfig

_NAMES = VqNames("conv_blocks.{level}", "conv_blocks.{level}", "res", ("0", "1", "2"))
# The shape that their code spells out; config.json says little of it.
VQ = VqConfig(usage=65_536)
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
_SECTIONS = ("vision_config", "aligner_config", *_DRAWING)


def text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the language model's section, with Llama's defaults for what it leaves out."""
    section = config.get("language_config")
    said = dict(section) if isinstance(section, Mapping) else {}
    return _LLAMA | {name: value for name, value in said.items() if value is not None}


def _aligner(
    config: Mapping[str, Any], name: str, width: int, dim: int, problems: list[str]
) -> int:
    """Reads the section of an aligner; returns its depth."""
    fields = section(config, name, problems, "MlpProjector")
    fields.fixed("projector_type", "mlp_gelu", "linear")
    fields.fixed("input_dim", width)
    fields.fixed("n_embed", dim)
    depth = fields.read("depth", "int", 1)
    if fields.values.get("projector_type") == "linear":
        depth = 1
    fields.refuse_rest()
    return depth


def read(config: Mapping[str, Any], problems: list[str]) -> VisionConfig | None:
    """Reads the sections of tower, aligners, head and VQ tokenizer, or of JanusFlow's parts, or of
    two towers; None if there were problems.
    """
    language = Fields(text(config), "config.json.language_config", problems)
    if janusflow.draws_by_flow(config):
        if others := [name for name in _SECTIONS if name in config]:
            problems.append(f"config.json has {', '.join(others)} beside sections of JanusFlow")
        return janusflow.read(config, language, problems)
    dim = language.read("hidden_size", "int")
    if deepseek_towers.sees_with_two(config):
        if others := [name for name in _DRAWING if name in config]:
            problems.append(f"config.json has {', '.join(others)} beside two towers")
        return deepseek_towers.read(config, language, problems)
    tower = read_tower(config, "vision_config", problems)
    depth = _aligner(config, "aligner_config", tower.dim, dim, problems)
    whole = Values({"dim": dim, "tower": tower, "aligner_depth": depth})
    whole.places |= {
        "dim": f"{language.place}.hidden_size",
        "aligner_depth": "config.json.aligner_config.params.depth",
    }
    shape = Values(vars(VQ))
    if any(name in config for name in _DRAWING):
        codes = section(config, "gen_vision_config", problems, "VQ-16")
        shape.take("n_codes", codes, "image_token_size", "int", VQ.n_codes)
        shape.take("code_dim", codes, "n_embed", "int", VQ.code_dim)
        head = section(config, "gen_head_config", problems, "vision_head")
        whole.take("head_dim", head, "image_token_embed", "int")
        head.fixed("image_token_size", shape["n_codes"])
        head.fixed("n_embed", dim)
        depth = _aligner(config, "gen_aligner_config", shape["code_dim"], dim, problems)
        whole["drawing_depth"] = depth
        whole.places["drawing_depth"] = "config.json.gen_aligner_config.params.depth"
        for fields in (codes, head):
            fields.refuse_rest()
    if problems:
        return None
    if "head_dim" in whole:  # it draws
        whole["vq"] = shape.build(VqConfig, "vq")
    return whole.build(VisionConfig, "vision")


def write(vision: VisionConfig, text: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the sections of config.json."""
    tower, vq = vision.tower, vision.vq
    sections: dict[str, Any] = {"language_config": {"model_type": "llama", **text}}
    if vision.flow:
        return sections | janusflow.write(vision)
    if vision.high:
        return sections | deepseek_towers.write(vision)
    sections |= {
        "vision_config": written_tower(tower, "vision"),
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
    if vision.flow:
        yield from janusflow.parts(vision)
        return
    if vision.high:
        yield from deepseek_towers.parts(vision)
        return
    tower, vq = vision.tower, vision.vq
    yield from tower_parts("vision_model.vision_tower.", tower)
    yield from projector_parts("aligner", ("aligner",), tower.dim, vision.dim, vision.aligner_depth)
    if vq is None:
        return
    pencil, own = ("pencil",), ("pencil", "head")
    yield from vq_parts("gen_vision_model.", (*pencil, "vq"), vq, _NAMES)
    yield from projector_parts(
        "gen_aligner", (*pencil, "aligner"), vq.code_dim, vision.dim, vision.drawing_depth
    )
    project = "gen_head.output_mlp_projector"
    yield from linear(project, (*own, "project"), vision.head_dim, vision.dim)
    yield from linear("gen_head.vision_head", (*own, "vision_head"), vq.n_codes, vision.head_dim)
    yield Part("gen_embed.weight", (*pencil, "embed"), (), (vq.n_codes, vq.code_dim))


def projector_parts(name: str, path: LeafPath, width: int, dim: int, depth: int) -> Iterator[Part]:
    """Yields the tensors of a projector as nn.Sequential numbers them."""
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
        frozenset({*_SECTIONS, *janusflow.SECTIONS}),
    ),
)
