"""Opens and loads the VAE that JanusFlow's drawings need, from a folder as diffusers writes it:
`stabilityai/sdxl-vae`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dsjax.checkpoint.eyes import filled
from dsjax.checkpoint.families.sight import LeafPath, Part, conv, linear, norm, residual
from dsjax.checkpoint.families.table import Fields
from dsjax.checkpoint.hf_folder import PLAIN
from dsjax.checkpoint.tensor_files import TensorFolder, read_header
from dsjax.config.vision import GROUPS, VaeConfig
from dsjax.files import listed, read_json
from dsjax.precision.policy import Policy
from dsjax.vision.vae import Vae

WEIGHTS = "diffusion_pytorch_model.safetensors"
_DOWN, _UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
_BOOKKEEPING = frozenset(
    "_class_name _diffusers_version _name_or_path sample_size force_upcast".split()
)
# What diffusers called the layers of attention before 0.17.
_OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclasses.dataclass(frozen=True)
class VaeFolder:
    """A VAE's folder, checked."""

    path: Path
    config: VaeConfig
    files: TensorFolder


def open_vae(path: Path) -> VaeFolder:
    """Opens a folder of config.json and WEIGHTS.

    Raises:
      ValueError: it is not a VAE's folder, the VAE is of another kind, or its tensors are not those
        that config.json describes.
    """
    if (path / "vae" / "config.json").is_file():
        raise ValueError(f"{path} holds a whole pipeline; its VAE is in {path / 'vae'}: name that")
    if not (path / "config.json").is_file() or not (path / WEIGHTS).is_file():
        raise ValueError(
            f"{path} is not the folder of a VAE; download config.json and {WEIGHTS} of "
            "stabilityai/sdxl-vae, and name their folder"
        )
    config = read(read_json(path / "config.json"))
    file = path / WEIGHTS
    found, size = read_header(file)
    files = TensorFolder(path, found, {file: size}).renamed(_canonical)
    wanted = {part.name: part for part in parts(config)}
    problems = [f"missing {name}" for name in wanted if name not in files.tensors]
    for name, info in files.tensors.items():
        if name not in wanted:
            problems.append(f"unexpected {name}")
        elif info.dtype not in PLAIN or _squeezed(info.shape) != _squeezed(wanted[name].shape):
            problems.append(
                f"{name} is {info.dtype}{list(info.shape)}, config.json gives "
                f"{list(wanted[name].shape)} of float32, bfloat16 or float16"
            )
    if problems:
        raise ValueError(
            f"{file}: the tensors are not those of config.json: {listed(problems)}. Download both "
            "files again, from one release"
        )
    return VaeFolder(path, config, files)


def load_vae(folder: VaeFolder, *, mesh: Mesh | None = None) -> Vae:
    """Loads a VAE in float32.

    Args:
      mesh: the mesh to shard the weights over; None: the default device.
    """
    float32 = np.dtype(np.float32)
    module = Vae(folder.config, Policy(jnp.float32))
    return filled(module, list(parts(folder.config)), folder.files, float32, mesh)


def read(config: Mapping[str, Any]) -> VaeConfig:
    """Reads the contents of a config.json.

    Raises:
      ValueError: it describes another kind of model; all problems are named in one message.
    """
    problems: list[str] = []
    fields = Fields(config, "config.json", problems)
    fields.fixed("_class_name", "AutoencoderKL")
    for name in ("in_channels", "out_channels"):
        fields.fixed(name, 3)
    fields.fixed("act_fn", "silu")
    fields.fixed("norm_num_groups", GROUPS)
    for name in ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"):
        fields.fixed(name, True)
    widths = config.get("block_out_channels")
    fields.seen.add("block_out_channels")
    if (
        not isinstance(widths, list)
        or not widths
        or not all(type(each) is int and each > 0 and not each % widths[0] for each in widths)
    ):
        problems.append(
            f"config.json.block_out_channels={widths!r} is not a list of multiples of its first"
        )
        widths = [GROUPS]
    fields.fixed("down_block_types", [_DOWN] * len(widths))
    fields.fixed("up_block_types", [_UP] * len(widths))
    values = {
        "latent_channels": fields.read("latent_channels", "int", VaeConfig.latent_channels),
        "n_blocks": fields.read("layers_per_block", "int", 1),
        "scaling": fields.read("scaling_factor", "float", 0.18215),
    }
    fields.refuse_rest(_BOOKKEEPING)
    if problems:
        raise ValueError(
            f"config.json describes a VAE that dsjax does not compute: {'; '.join(problems)}. "
            "JanusFlow was trained with stabilityai/sdxl-vae"
        )
    multipliers = tuple(width // widths[0] for width in widths)
    return VaeConfig(channels=widths[0], multipliers=multipliers, **values)


def _canonical(name: str) -> str:
    """Returns today's name for a tensor."""
    before, dot, layer = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")
    if layer not in _OLDER:
        return name
    return f"{before}{dot}{_OLDER[layer]}{name[name.rindex('.') :]}"


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Drops the last dims of 1: a linear layer may be stored as a convolution of 1 x 1."""
    return _squeezed(shape[:-1]) if len(shape) > 2 and shape[-1] == 1 else shape


def parts(config: VaeConfig) -> Iterator[Part]:
    """Yields every tensor."""
    widths = [config.channels * times for times in config.multipliers]
    latent, fine, coarse = config.latent_channels, widths[0], widths[-1]
    yield from conv("encoder.conv_in", ("encoder", "conv_in"), 3, 3, fine)
    yield from _levels("encoder", ("down_blocks", "downsamplers"), fine, widths, config.n_blocks)
    yield from _middle("encoder", coarse)
    yield from _ends("encoder", coarse, 2 * latent)
    yield from conv("quant_conv", ("quant_conv",), 1, 2 * latent, 2 * latent)
    yield from conv("post_quant_conv", ("post_quant_conv",), 1, latent, latent)
    yield from conv("decoder.conv_in", ("decoder", "conv_in"), 3, latent, coarse)
    yield from _middle("decoder", coarse)
    names = ("up_blocks", "upsamplers")
    yield from _levels("decoder", names, coarse, widths[::-1], config.n_blocks + 1)
    yield from _ends("decoder", fine, 3)


def _levels(
    side: str, names: tuple[str, str], before: int, widths: list[int], n_blocks: int
) -> Iterator[Part]:
    levels, resamples = names
    for level, width in enumerate(widths):
        name, own = f"{side}.{levels}.{level}", (side, "levels", str(level))
        for place in range(n_blocks):
            path = (*own, "blocks", str(place))
            yield from _residual(f"{name}.resnets.{place}", path, before, width)
            before = width
        if level < len(widths) - 1:
            yield from conv(f"{name}.{resamples}.0.conv", (*own, "resample"), 3, width, width)


def _middle(side: str, width: int) -> Iterator[Part]:
    name, own = f"{side}.mid_block", (side, "middle")
    yield from _residual(f"{name}.resnets.0", (*own, "before"), width, width)
    attention, path = f"{name}.attentions.0", (*own, "attention")
    yield from norm(f"{attention}.group_norm", (*path, "norm"), width)
    for theirs, ours in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
        yield from linear(f"{attention}.{theirs}", (*path, ours), width, width)
    yield from _residual(f"{name}.resnets.1", (*own, "after"), width, width)


def _ends(side: str, width: int, channels: int) -> Iterator[Part]:
    yield from norm(f"{side}.conv_norm_out", (side, "norm_out"), width)
    yield from conv(f"{side}.conv_out", (side, "conv_out"), 3, width, channels)


def _residual(name: str, path: LeafPath, channels_in: int, channels: int) -> Iterator[Part]:
    yield from residual(name, path, channels_in, channels, shortcut="conv_shortcut")
