"""SigLIP as DeepSeek's own layouts describe and name it, and the sections of their config.json.

A section has a class and its `params`. The code spells out the tower's shape; config.json gives the
name of that shape, and which layer is the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dsjax.checkpoint.families.sight import Part, linear, norm, tower_ends
from dsjax.checkpoint.families.table import Fields, Values
from dsjax.config.vision import SiglipConfig

TOWER = SiglipConfig(pool=True)
_NAME = "siglip_large_patch16_384"
# Of a section beside cls and params; `model_name` of the SigLIP is checked.
_BOOKKEEPING = frozenset({"model_type", "cls", "params", "torch_dtype", "transformers_version"})


def section(config: Mapping[str, Any], name: str, problems: list[str], *classes: str) -> Fields:
    """Returns the `params` of a section, which must be of one of these classes."""
    values = config.get(name)
    if not isinstance(values, Mapping) or not isinstance(values.get("params"), Mapping):
        problems.append(f"config.json.{name}={values!r} is not an object with params")
        values = {"cls": classes[0], "params": {}}
    section = Fields(values, f"config.json.{name}", problems)
    section.fixed("cls", *classes)
    section.refuse_rest(_BOOKKEEPING)
    return Fields(values["params"], f"config.json.{name}.params", problems)


def read_tower(config: Mapping[str, Any], name: str, problems: list[str]) -> SiglipConfig:
    """Reads the section of a tower."""
    vision = section(config, name, problems, "CLIPVisionTower")
    tower = siglip(vision)
    vision.refuse_rest(frozenset({"image_mean", "image_std", "pixel_mean", "pixel_std"}))
    return tower


def siglip(vision: Fields) -> SiglipConfig:
    """Reads the fields of a SigLIP."""
    tower = Values(vars(TOWER))
    tower.take("image_size", vision, "image_size", "int", TOWER.image_size)
    vision.fixed("model_name", _NAME)
    vision.fixed("select_feature", "same")
    chosen = vision.values.get("select_layer", -1)
    vision.seen |= {"select_layer"}
    most = TOWER.n_layers
    if type(chosen) is int and chosen and -most <= chosen <= most:
        tower["n_layers"] = chosen if chosen > 0 else most + chosen + 1
    else:
        vision.problems.append(
            f"{vision.place}.select_layer={chosen!r} names none of {most} layers"
        )
    if vision.problems:
        return TOWER
    return tower.build(SiglipConfig, "tower")


def written_tower(tower: SiglipConfig, kind: str) -> dict[str, Any]:
    """Writes the section of a tower."""
    return {"cls": "CLIPVisionTower", "model_type": kind, "params": written_siglip(tower)}


def written_siglip(tower: SiglipConfig) -> dict[str, Any]:
    """Writes the fields of a SigLIP."""
    return {
        "image_size": tower.image_size,
        "model_name": _NAME,
        "select_feature": "same",
        "select_layer": -1 if tower.n_layers == TOWER.n_layers else tower.n_layers,
    }


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
