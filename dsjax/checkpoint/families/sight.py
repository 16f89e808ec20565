"""What a family's checkpoints have beside the language model: sections of config.json, and tensors.

These tensors are few and small beside a language model's, so they are read whole. They reach our
leaves in one of four ways (`Part.kind`):

  plain    the numbers in their order, in the leaf's shape
  matrix   [out, in] becomes [in, out]
  kernel   [out, in, rows, columns] becomes [rows, columns, in, out]
  fused    queries, keys and values in one [3 x out, in] become [3, in, out]
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from dsjax.config.vision import SiglipConfig, VisionConfig, VqConfig

Kind = Literal["plain", "matrix", "kernel", "fused"]
LeafPath = tuple[str, ...]


class Part(NamedTuple):
    """A published tensor, and its place in the parameter tree of `dsjax.vision.eyes.Eyes`."""

    name: str
    path: LeafPath  # of the leaf
    slot: tuple[int, ...]  # index of the tensor in the leaf
    shape: tuple[int, ...]  # as published
    kind: Kind = "plain"

    @property
    def counts(self) -> bool:
        """Tells whether its numbers are parameters, not a record of training."""
        return self.path[-1] != "usage"

    def ours(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Converts a published tensor to its part of the leaf, which has this shape."""
        if self.kind == "matrix":
            tensor = tensor.T
        elif self.kind == "kernel":
            tensor = tensor.transpose(2, 3, 1, 0)
        elif self.kind == "fused":
            tensor = tensor.reshape(3, -1, tensor.shape[1]).swapaxes(1, 2)
        return tensor.reshape(shape)

    def published(self, array: np.ndarray) -> np.ndarray:
        """Converts a part of the leaf to the published tensor; the inverse of `ours`."""
        if self.kind == "matrix":
            array = array.T
        elif self.kind == "kernel":
            array = array.transpose(3, 2, 0, 1)
        elif self.kind == "fused":
            array = array.swapaxes(1, 2)
        return np.ascontiguousarray(array).reshape(self.shape)

    @property
    def n_parameters(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Sight:
    """How a family describes and names what its models see and draw with.

    Attributes:
      text: returns the language model's section of config.json, defaults filled in.
      read: returns what config.json says, and adds problems to a list.
      write: returns the sections of config.json, the language model's included, which is given.
      parts: yields every tensor once, in published order.
      sections: the fields of config.json that these read.
      unread: how the names begin of tensors that may be there, and are left out; "": none.
    """

    text: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    read: Callable[[Mapping[str, Any], list[str]], VisionConfig | None]
    write: Callable[[VisionConfig, Mapping[str, Any]], dict[str, Any]]
    parts: Callable[[VisionConfig], Iterator[Part]]
    sections: frozenset[str]
    unread: str = ""


# Parts that the layouts share.


def linear(name: str, path: LeafPath, out: int, width: int, slot: tuple[int, ...] = ()):
    """Yields weight and bias of a linear layer [out, width]."""
    yield Part(f"{name}.weight", (*path, "weight"), slot, (out, width), "matrix")
    yield Part(f"{name}.bias", (*path, "bias"), slot, (out,))


def norm(name: str, path: LeafPath, width: int, slot: tuple[int, ...] = ()):
    """Yields weight and bias of a norm."""
    for leaf in ("weight", "bias"):
        yield Part(f"{name}.{leaf}", (*path, leaf), slot, (width,))


def conv(
    name: str, path: LeafPath, size: int, channels_in: int, channels: int, *, bias: bool = True
):
    """Yields weight and bias of a convolution."""
    shape = (channels, channels_in, size, size)
    yield Part(f"{name}.weight", (*path, "weight"), (), shape, "kernel")
    if bias:
        yield Part(f"{name}.bias", (*path, "bias"), (), (channels,))


class VqNames(NamedTuple):
    """What the two layouts call the blocks of a VQ tokenizer, `{level}` and `{place}` filled in."""

    encoder: str
    decoder: str
    block: str
    middle: tuple[str, str, str]


def vq_parts(prefix: str, path: LeafPath, config: VqConfig, names: VqNames) -> Iterator[Part]:
    """Yields the tensors of a VQ tokenizer."""
    widths = [config.channels * times for times in config.multipliers]
    latent, code = config.latent_channels, config.code_dim
    fine, coarse = config.channels, widths[-1]

    def levels(side: str, template: str, first: int, widths: list[int], n: int) -> Iterator[Part]:
        last = len(widths) - 1
        before = first
        for level, width in enumerate(widths):
            name = f"{prefix}{side}.{template.format(level=level)}"
            own = (*path, side, "levels", str(level))
            attends = level == (last if side == "encoder" else 0)
            for place in range(n):
                yield from residual(
                    f"{name}.{names.block}.{place}", (*own, "blocks", str(place)), before, width
                )
                before = width
            for place in range(n if attends else 0):
                yield from _attention(
                    f"{name}.attn.{place}", (*own, "attentions", str(place)), width
                )
            if level < last:
                resample = "downsample" if side == "encoder" else "upsample"
                yield from conv(f"{name}.{resample}.conv", (*own, "resample"), 3, width, width)

    def middle(side: str) -> Iterator[Part]:
        before, attention, after = (f"{prefix}{side}.mid.{each}" for each in names.middle)
        own = (*path, side, "middle")
        yield from residual(before, (*own, "before"), coarse, coarse)
        yield from _attention(attention, (*own, "attention"), coarse)
        yield from residual(after, (*own, "after"), coarse, coarse)

    def ends(side: str, width: int, channels: int) -> Iterator[Part]:
        yield from norm(f"{prefix}{side}.norm_out", (*path, side, "norm_out"), width)
        yield from conv(f"{prefix}{side}.conv_out", (*path, side, "conv_out"), 3, width, channels)

    yield from conv(f"{prefix}encoder.conv_in", (*path, "encoder", "conv_in"), 3, 3, fine)
    yield from levels("encoder", names.encoder, fine, widths, config.n_blocks)
    yield from middle("encoder")
    yield from ends("encoder", coarse, latent)
    yield from conv(f"{prefix}decoder.conv_in", (*path, "decoder", "conv_in"), 3, latent, coarse)
    yield from middle("decoder")
    yield from levels("decoder", names.decoder, coarse, widths[::-1], config.n_blocks + 1)
    yield from ends("decoder", widths[0], 3)
    codebook = (config.n_codes, code)
    yield Part(f"{prefix}quantize.embedding.weight", (*path, "codebook"), (), codebook)
    if config.usage:
        yield Part(f"{prefix}quantize.codebook_used", (*path, "usage"), (), (config.usage,))
    yield from conv(f"{prefix}quant_conv", (*path, "quant_conv"), 1, latent, code)
    yield from conv(f"{prefix}post_quant_conv", (*path, "post_quant_conv"), 1, code, latent)


def residual(
    name: str, path: LeafPath, channels_in: int, channels: int, *, shortcut: str = "nin_shortcut"
) -> Iterator[Part]:
    """Yields the tensors of a residual block; `shortcut` is what they call its last layer."""
    yield from norm(f"{name}.norm1", (*path, "norm1"), channels_in)
    yield from conv(f"{name}.conv1", (*path, "conv1"), 3, channels_in, channels)
    yield from norm(f"{name}.norm2", (*path, "norm2"), channels)
    yield from conv(f"{name}.conv2", (*path, "conv2"), 3, channels, channels)
    if channels_in != channels:
        own = (*path, "nin_shortcut")
        yield from conv(f"{name}.{shortcut}", own, 1, channels_in, channels)


def _attention(name: str, path: LeafPath, channels: int) -> Iterator[Part]:
    yield from norm(f"{name}.norm", (*path, "norm"), channels)
    for each in ("q", "k", "v", "proj_out"):
        yield from conv(f"{name}.{each}", (*path, each), 1, channels, channels)


def tower_ends(config: SiglipConfig, patch: str, positions: str, shape: tuple[int, ...]):
    """Yields the tensors that embed patches."""
    D, P = config.dim, config.patch_size
    yield Part(positions, ("tower", "positions"), (), shape)
    yield Part(f"{patch}.weight", ("tower", "patch"), (), (D, 3, P, P), "kernel")
    yield Part(f"{patch}.bias", ("tower", "patch_bias"), (), (D,))
