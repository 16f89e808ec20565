"""Janus and Janus-Pro as transformers converts them: a Llama that sees and draws."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from dsjax.checkpoint.families.family import TopNames
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
from dsjax.checkpoint.families.table import Fields, Values
from dsjax.config.vision import GROUPS, SiglipConfig, VisionConfig, VqConfig

_NAMES = VqNames("down.{level}", "up.{level}", "block", ("block_1", "attn_1", "block_2"))
BOOKKEEPING = frozenset(
    """
    model_type architectures dtype torch_dtype initializer_range transformers_version
    hidden_dropout_rate attention_dropout projection_dropout dropout num_image_tokens num_channels
    in_channels out_channels return_dict output_attentions output_hidden_states id2label label2id
    problem_type _name_or_path chunk_size_feed_forward is_encoder_decoder num_patches
    tie_word_embeddings
    """.split()
)
_ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
NAMES_OF_ACTIVATIONS = {ours: name for name, ours in _ACTIVATIONS.items()}
IMAGE_TOKEN = 100581  # of every release, and the default of transformers
# Fields of ours, theirs, kinds and defaults.
_TOWER = (
    ("image_size", "image_size", "int", 384),
    ("patch_size", "patch_size", "int", 16),
    ("dim", "hidden_size", "int", 1024),
    ("n_layers", "num_hidden_layers", "int", 24),
    ("n_heads", "num_attention_heads", "int", 16),
    ("norm_eps", "layer_norm_eps", "float", 1e-6),
)
_CODES = (
    ("n_codes", "num_embeddings", "int", 16384),
    ("code_dim", "embed_dim", "int", 8),
    ("latent_channels", "latent_channels", "int", 256),
    ("channels", "base_channels", "int", 128),
    ("n_blocks", "num_res_blocks", "int", 2),
    ("n_groups", "norm_num_groups", "int", GROUPS),
)


def text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the language model's section. Whether the head is tied is said outside it, and true
    if not said at all; a head in the files that differs is obeyed (`hf_folder.reconcile`).
    """
    given = config.get("text_config")
    tied = config.get("tie_word_embeddings")
    said = {} if not isinstance(given, Mapping) else dict(given)
    return said | {"tie_word_embeddings": True if tied is None else tied}


def fields(config: Mapping[str, Any], problems: list[str]) -> Fields:
    """Reads fields outside all sections."""
    return Fields(config, "config.json", problems)


def section(config: Mapping[str, Any], name: str, problems: list[str]) -> Fields:
    """Reads a section."""
    values = config.get(name)
    if not isinstance(values, Mapping):
        problems.append(f"config.json.{name}={values!r} is not an object")
        values = {}
    return Fields(values, f"config.json.{name}", problems)


def activation(section: Fields, default: str) -> Any:
    """Reads which GELU a section asks for."""
    section.fixed("hidden_act", *_ACTIVATIONS)
    return _ACTIVATIONS.get(str(section.values.get("hidden_act") or default), "gelu")


def read(config: Mapping[str, Any], problems: list[str]) -> VisionConfig | None:
    """Reads vision_config and vq_config; None if there were problems."""
    vision, vq = (section(config, name, problems) for name in ("vision_config", "vq_config"))
    whole, tower = Values({}), Values({"activation": activation(vision, "gelu")})
    whole.take("dim", vision, "projection_dim", "int", 2048)
    dim = whole["dim"]
    tower.take_all(vision, _TOWER)
    tower["inter_dim"] = vision.times("mlp_ratio", tower["dim"], 4.0)
    tower.places["inter_dim"] = f"{vision.place}.mlp_ratio"
    vision.fixed("attention_bias", True)
    vision.fixed("use_qk_norm", False)
    whole.take("aligner_depth", vision, "depth", "int", 2)
    vq.fixed("hidden_act", "gelu")
    vq.fixed("double_latent", False)
    vq.fixed("projection_dim", dim)
    vq.fixed("image_token_embed_dim", dim)
    multipliers = vq.values.get("channel_multiplier", [1, 1, 2, 2, 4])
    vq.seen.add("channel_multiplier")
    if not isinstance(multipliers, list) or not all(type(each) is int for each in multipliers):
        problems.append(f"{vq.place}.channel_multiplier={multipliers!r} is not a list of integers")
        multipliers = [1]
    codes = Values({"multipliers": tuple(multipliers)})
    codes.places["multipliers"] = f"{vq.place}.channel_multiplier"
    codes.take_all(vq, _CODES)
    drawn = vq.read("num_patches", "int", 0)
    whole.take("drawing_depth", vq, "num_hidden_layers", "int", 2)
    token = fields(config, problems).read("image_token_id", "int", IMAGE_TOKEN)
    for each in (vision, vq):
        each.refuse_rest(BOOKKEEPING)
    if problems:
        return None
    seen = tower.build(SiglipConfig, "tower")
    whole |= {
        "tower": seen,
        "aligner_activation": tower["activation"],
        "vq": codes.build(VqConfig, "vq"),
        "drawn": None if drawn in (0, seen.grid) else drawn,
        "head_dim": dim,
        "image_token": token,
    }
    return whole.build(VisionConfig, "vision")


def write(vision: VisionConfig, text: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the sections of config.json."""
    tower, vq = vision.tower, vision.vq
    assert vq is not None
    said = dict(text)
    return {
        "tie_word_embeddings": said.pop("tie_word_embeddings"),
        "image_token_id": IMAGE_TOKEN if vision.image_token is None else vision.image_token,
        "text_config": {"model_type": "llama", **said},
        "vision_config": {
            "model_type": "janus_vision_model",
            "image_size": tower.image_size,
            "patch_size": tower.patch_size,
            "hidden_size": tower.dim,
            "num_hidden_layers": tower.n_layers,
            "num_attention_heads": tower.n_heads,
            "mlp_ratio": tower.inter_dim / tower.dim,
            "layer_norm_eps": tower.norm_eps,
            "hidden_act": NAMES_OF_ACTIVATIONS[tower.activation],
            "projection_dim": vision.dim,
            "depth": vision.aligner_depth,
            "num_image_tokens": tower.n_tokens,
        },
        "vq_config": {
            "model_type": "janus_vqgan",
            "num_embeddings": vq.n_codes,
            "embed_dim": vq.code_dim,
            "latent_channels": vq.latent_channels,
            "base_channels": vq.channels,
            "channel_multiplier": list(vq.multipliers),
            "num_res_blocks": vq.n_blocks,
            "num_hidden_layers": vision.drawing_depth,
            "projection_dim": vision.dim,
            "image_token_embed_dim": vision.dim,
            "num_patches": vision.code_grid,
            # transformers has no field for what all releases share; diffusers calls it so.
            **({} if vq.n_groups == GROUPS else {"norm_num_groups": vq.n_groups}),
        },
    }


def parts(vision: VisionConfig) -> Iterator[Part]:
    """Yields every tensor."""
    tower, vq = vision.tower, vision.vq
    assert vq is not None
    yield from tower_parts("model.vision_model.", tower, "projection_layer")
    yield from _projector(
        "model.aligner", ("aligner",), tower.dim, vision.dim, vision.aligner_depth
    )
    pencil = ("pencil",)
    yield from vq_parts("model.vqmodel.", (*pencil, "vq"), vq, _NAMES)
    codes = (vq.n_codes, vq.code_dim)
    yield Part("model.generation_embeddings.weight", (*pencil, "embed"), (), codes)
    yield from _projector(
        "model.generation_aligner", (*pencil, "aligner"), vq.code_dim, vision.dim,
        vision.drawing_depth,
    )  # fmt: skip
    head, own = "model.generation_head.", (*pencil, "head")
    yield from linear(f"{head}proj_out", (*own, "project"), vision.head_dim, vision.dim)
    yield from linear(f"{head}vision_head", (*own, "vision_head"), vq.n_codes, vision.head_dim)


def tower_parts(prefix: str, config: SiglipConfig, output: str) -> Iterator[Part]:
    """Yields the tensors of a tower as transformers names them.

    Args:
      output: the name of attention's last layer.
    """
    D, F, embeddings = config.dim, config.inter_dim, f"{prefix}embeddings."
    positions = f"{embeddings}position_embedding.weight"
    patch = f"{embeddings}patch_embedding"
    yield from tower_ends(config, patch, positions, (config.n_tokens, D))
    for layer in range(config.n_layers):
        name, slot, path = f"{prefix}encoder.layers.{layer}.", (layer,), ("tower", "layers")
        yield from norm(f"{name}layer_norm1", (*path, "norm1"), D, slot)
        for place, letter in enumerate("qkv"):
            own, where = f"{name}self_attn.{letter}_proj", (layer, place)
            yield Part(f"{own}.weight", (*path, "attn", "wqkv"), where, (D, D), "matrix")
            yield Part(f"{own}.bias", (*path, "attn", "bqkv"), where, (D,))
        yield from linear(f"{name}self_attn.{output}", (*path, "attn", "proj"), D, D, slot)
        yield from norm(f"{name}layer_norm2", (*path, "norm2"), D, slot)
        yield from linear(f"{name}mlp.fc1", (*path, "fc1"), F, D, slot)
        yield from linear(f"{name}mlp.fc2", (*path, "fc2"), D, F, slot)
    yield from norm(f"{prefix}post_layernorm", ("tower", "norm"), D)


def _projector(name: str, path: LeafPath, width: int, dim: int, depth: int) -> Iterator[Part]:
    yield from linear(f"{name}.fc1", (*path, "layers", "0"), dim, width)
    for layer in range(depth - 1):
        own = (*path, "layers", str(layer + 1))
        yield from linear(f"{name}.hidden_layers.{layer}", own, dim, dim)


JANUS = dataclasses.replace(
    LLAMA,
    name="janus",
    architecture="JanusForConditionalGeneration",
    section="text_config",
    top=TopNames.below("model.language_model."),
    sight=Sight(
        text,
        read,
        write,
        parts,
        frozenset({"vision_config", "vq_config", "image_token_id", "tie_word_embeddings"}),
    ),
)
