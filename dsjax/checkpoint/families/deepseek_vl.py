"""DeepSeek-VL 1.3B as transformers converts it: a Llama that sees.

The tower is a SigLIP by transformers' own class, whose defaults are another tower's: the other
GELU, 224 pixels and a pooling head. Its config.json is read field by field for that reason. Nothing
reads the head, which is left out if it is there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from dsjax.checkpoint.families import janus
from dsjax.checkpoint.families.family import TopNames
from dsjax.checkpoint.families.llama import LLAMA
from dsjax.checkpoint.families.sight import Part, Sight, linear
from dsjax.checkpoint.families.table import Values
from dsjax.config.vision import SiglipConfig, VisionConfig

_TOWER = "model.vision_model."
IMAGE_TOKEN = 100015  # of the releases, and the default of transformers
WIDTH = "config.json.text_config.hidden_size"
# Fields of ours, theirs, kinds and defaults.
_TOWER_FIELDS = (
    ("image_size", "image_size", "int", 224),
    ("patch_size", "patch_size", "int", 16),
    ("dim", "hidden_size", "int", 768),
    ("n_layers", "num_hidden_layers", "int", 12),
    ("n_heads", "num_attention_heads", "int", 12),
    ("inter_dim", "intermediate_size", "int", 3072),
    ("norm_eps", "layer_norm_eps", "float", 1e-6),
)


def read(config: Mapping[str, Any], problems: list[str]) -> VisionConfig | None:
    """Reads vision_config; None if there were problems."""
    vision = janus.section(config, "vision_config", problems)
    vision.fixed("model_type", "siglip_vision_model")
    tower = Values({"activation": janus.activation(vision, "gelu_pytorch_tanh")})
    tower.take_all(vision, _TOWER_FIELDS)
    vision.refuse_rest(janus.BOOKKEEPING | {"vision_use_head"})
    language = janus.text(config).get("hidden_size")
    token = janus.fields(config, problems).read("image_token_id", "int", IMAGE_TOKEN)
    if problems or not isinstance(language, int):
        return None
    seen = tower.build(SiglipConfig, "tower")
    whole = Values({"dim": language, "tower": seen, "image_token": token})
    whole.places["dim"] = WIDTH
    return whole.build(VisionConfig, "vision")


def write(vision: VisionConfig, text: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the sections of config.json."""
    tower, said = vision.tower, dict(text)
    return {
        "tie_word_embeddings": said.pop("tie_word_embeddings"),
        "image_token_id": IMAGE_TOKEN if vision.image_token is None else vision.image_token,
        "text_config": {"model_type": "llama", **said},
        "vision_config": {
            "model_type": "siglip_vision_model",
            "image_size": tower.image_size,
            "patch_size": tower.patch_size,
            "hidden_size": tower.dim,
            "num_hidden_layers": tower.n_layers,
            "num_attention_heads": tower.n_heads,
            "intermediate_size": tower.inter_dim,
            "layer_norm_eps": tower.norm_eps,
            "hidden_act": janus.NAMES_OF_ACTIVATIONS[tower.activation],
            "vision_use_head": False,
        },
    }


def parts(vision: VisionConfig) -> Iterator[Part]:
    """Yields every tensor."""
    tower, layers = vision.tower, ("aligner", "layers")
    yield from janus.tower_parts(_TOWER, tower, "out_proj")
    yield from linear("model.aligner.linear1", (*layers, "0"), vision.dim, tower.dim)
    yield from linear("model.aligner.linear2", (*layers, "1"), vision.dim, vision.dim)


DEEPSEEK_VL = dataclasses.replace(
    LLAMA,
    name="deepseek_vl",
    architecture="DeepseekVLForConditionalGeneration",
    section="text_config",
    top=TopNames.below("model.language_model."),
    sight=Sight(
        janus.text,
        read,
        write,
        parts,
        frozenset({"vision_config", "image_token_id", "tie_word_embeddings"}),
        unread=f"{_TOWER}head.",
    ),
)
