"""DeepSeek-VL 7B's two towers as DeepSeek's own layout describes and names them.

A SAM sees the picture large, a SigLIP sees it shrunk, and either normalizes what it sees. Beside
them are two norms that DeepSeek's code makes and never calls. The code spells out SAM's shape;
config.json gives the name of that shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dsjax.checkpoint.families import deepseek_tower
from dsjax.checkpoint.families.deepseek_tower import (
    section,
    siglip,
    tower_parts,
    written_siglip,
)
from dsjax.checkpoint.families.deepseek_vl_hybrid import sam_parts
from dsjax.checkpoint.families.sight import LeafPath, Part, conv, linear, norm
from dsjax.checkpoint.families.table import Fields, Values
from dsjax.config.vision import SamConfig, VisionConfig
from dsjax.vision.pictures import SAM_NORM, SIGLIP_NORM

SAM = SamConfig()
CLASS, PROJECTOR = "HybridVisionTower", "low_high_hybrid_split_mlp_gelu"
_NAME = "sam_b_downsample"
# What training reads, and where it began.
_TRAINING = frozenset({"freeze_high", "freeze_low"})
_START = frozenset({"ckpt_path"})
_HIGH, _LOW = "vision_model.vision_tower_high.vision_tower.", "vision_model.vision_tower_low."


def sees_with_two(config: Mapping[str, Any]) -> bool:
    """Tells whether a config.json of `multi_modality` is DeepSeek-VL 7B's."""
    vision = config.get("vision_config")
    return isinstance(vision, Mapping) and vision.get("cls") == CLASS


def read(config: Mapping[str, Any], language: Fields, problems: list[str]) -> VisionConfig | None:
    """Reads the sections of towers and aligner; None if there were problems.

    Args:
      language: the language model's section, defaults filled in.
    """
    whole = Values({"idle_norms": True})
    whole.take("dim", language, "hidden_size", "int")
    both = section(config, "vision_config", problems, CLASS)
    both.fixed("concat_type", "tuple")
    low, high = (_inner(both, f"{name}_res_cfg") for name in ("low", "high"))
    tower = siglip(low)
    shape = Values(vars(SAM))
    shape.take("image_size", high, "image_size", "int", SAM.image_size)
    high.fixed("model_name", _NAME)
    high.fixed("select_feature", "same")
    high.fixed("select_layer", -1)
    # The norms are as wide, and 1024 where nothing is said.
    low.fixed("output_dim", tower.dim)
    high.fixed("output_dim", 4 * SAM.out_channels)
    for fields, (mean, std) in ((low, SIGLIP_NORM), (high, SAM_NORM)):
        _normalizes(fields, mean, std)
        fields.refuse_rest(_START)
    both.refuse_rest(_TRAINING)
    aligner = section(config, "aligner_config", problems, "MlpProjector")
    aligner.fixed("projector_type", PROJECTOR)
    aligner.fixed("input_dim", tower.dim)
    aligner.fixed("n_embed", whole["dim"])
    aligner.fixed("depth", 2)
    aligner.refuse_rest()
    # DeepSeek's code brings SAM's features to this grid, whatever the other tower's is.
    if not problems and tower.image_size != deepseek_tower.TOWER.image_size:
        problems.append(
            f"{low.place}.image_size={tower.image_size} is not supported, only "
            f"{deepseek_tower.TOWER.image_size}"
        )
    if problems:
        return None
    whole |= {"tower": tower, "high": shape.build(SamConfig, "sam")}
    return whole.build(VisionConfig, "vision")


def _inner(both: Fields, name: str) -> Fields:
    """Returns the object that describes one tower."""
    both.seen.add(name)
    values = both.values.get(name)
    if not isinstance(values, Mapping):
        both.problems.append(f"{both.place}.{name}={values!r} is not an object")
        values = {}
    return Fields(values, f"{both.place}.{name}", both.problems)


def _normalizes(fields: Fields, mean: Sequence[float], std: Sequence[float]) -> None:
    """Accepts a tower only if it normalizes what it sees with these numbers."""
    for name, wanted in (("pixel_mean", mean), ("pixel_std", std)):
        fields.seen.add(name)
        value = fields.values.get(name)
        if value != [*wanted]:
            fields.problems.append(
                f"{fields.place}.{name}={repr(value)[:80]} is not supported, only {[*wanted]}"
            )


def write(vision: VisionConfig) -> dict[str, Any]:
    """Writes the sections of towers and aligner."""
    high, tower = vision.high, vision.tower
    assert high is not None

    def described(fields: dict[str, Any], norms: Sequence[Sequence[float]], width: int) -> Any:
        mean, std = map(list, norms)
        return {**fields, "output_dim": width, "pixel_mean": mean, "pixel_std": std}

    sam = {
        "image_size": high.image_size,
        "model_name": _NAME,
        "select_feature": "same",
        "select_layer": -1,
    }
    return {
        "vision_config": {
            "cls": CLASS,
            "model_type": "vision",
            "params": {
                "concat_type": "tuple",
                "high_res_cfg": described(sam, SAM_NORM, 4 * high.out_channels),
                "low_res_cfg": described(written_siglip(tower), SIGLIP_NORM, tower.dim),
            },
        },
        "aligner_config": {
            "cls": "MlpProjector",
            "model_type": "aligner",
            "params": {
                "depth": 2,
                "input_dim": tower.dim,
                "n_embed": vision.dim,
                "projector_type": PROJECTOR,
            },
        },
    }


def parts(vision: VisionConfig) -> Iterator[Part]:
    """Yields every tensor."""
    high, tower = vision.high, vision.tower
    assert high is not None
    C = high.out_channels
    yield from sam_parts(_HIGH, high, ("patch_embed.proj", "blocks", "norm"))
    yield Part(f"{_HIGH}hd_alpha_downsamples", ("high", "alpha"), (), (1,))
    yield from _neck(f"{_HIGH}neck", ("high", "neck"), high)
    yield from conv(f"{_HIGH}downsamples.0", ("high", "down1"), 3, C, 2 * C, bias=False)
    yield from conv(f"{_HIGH}downsamples.1", ("high", "down2"), 3, 2 * C, 4 * C, bias=False)
    yield from _neck(f"{_HIGH}neck_hd", ("high", "neck_hd"), high)
    yield from tower_parts(f"{_LOW}vision_tower.", tower)
    if vision.idle_norms:
        yield from norm("vision_model.high_layer_norm", ("high_norm",), 4 * C)
        yield from norm("vision_model.low_layer_norm", ("low_norm",), tower.dim)
    half = vision.dim // 2
    yield from linear("aligner.high_up_proj", ("hybrid", "high"), half, 4 * C)
    yield from linear("aligner.low_up_proj", ("hybrid", "low"), half, tower.dim)
    yield from linear("aligner.layers.1", ("hybrid", "out"), vision.dim, vision.dim)


def _neck(name: str, path: LeafPath, config: SamConfig) -> Iterator[Part]:
    C = config.out_channels
    yield from conv(f"{name}.0", (*path, "conv1"), 1, config.dim, C, bias=False)
    yield from norm(f"{name}.1", (*path, "norm1"), C)
    yield from conv(f"{name}.2", (*path, "conv2"), 3, C, C, bias=False)
    yield from norm(f"{name}.3", (*path, "norm2"), C)
