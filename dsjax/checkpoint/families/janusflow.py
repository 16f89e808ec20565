"""JanusFlow in DeepSeek's own layout: the config.json and the tensors of `multi_modality` where a
model draws by a flow.

Its sections leave out what is a default of DeepSeek's code, whose widths of aligners are spelt out:
here they follow from the sections. The VAE is not part of it (`dsjax.checkpoint.vae`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dsjax.checkpoint.families.deepseek_tower import (
    read_tower,
    section,
    tower_parts,
    written_tower,
)
from dsjax.checkpoint.families.sight import LeafPath, Part, conv, linear
from dsjax.checkpoint.families.table import Fields, Values
from dsjax.config.vision import PATCH, FlowConfig, VisionConfig

SECTIONS = ("vision_und_enc_config", "vision_gen_enc_config", "vision_gen_dec_config")
_ENCODER, _DECODER = "ShallowUViTEncoder", "ShallowUViTDecoder"
_SHARED = {
    "block_out_channels": [768],
    "layers_in_middle": 2,
    "hidden_size": 2048,
    "norm_eps": 1e-6,
    "use_bias": True,
    "use_mid_block": True,
    "elementwise_affine": True,  # read by no layer of DeepSeek's code
}
# What DeepSeek's code takes where a section does not say.
_OF_ENCODER = _SHARED | {"input_channels": 3, "kernel_size": 7, "stride": 4, "padding": None}
_OF_DECODER = _SHARED | {"in_channels": 768, "out_channels": 3, "upsamples": 2}
_UNREAD = frozenset({"dropout", "elementwise_affine"})


def draws_by_flow(config: Mapping[str, Any]) -> bool:
    """Tells by its sections whether a config.json of `multi_modality` is JanusFlow's."""
    return any(name in config for name in SECTIONS)


def read(config: Mapping[str, Any], language: Fields, problems: list[str]) -> VisionConfig | None:
    """Reads the sections of the tower and of both U-ViTs; None if there were problems.

    Args:
      language: the language model's section, defaults filled in.
    """
    whole = Values({"aligner_depth": 1})
    whole.take("dim", language, "hidden_size", "int")
    dim = whole["dim"]
    tower = read_tower(config, SECTIONS[0], problems)
    encoder = _uvit(config, SECTIONS[1], _ENCODER, _OF_ENCODER, dim, problems)
    decoder = _uvit(config, SECTIONS[2], _DECODER, _OF_DECODER, dim, problems)
    for name in ("kernel_size", "stride"):
        encoder.fixed(name, PATCH)
    encoder.fixed("padding", 0)
    shape = Values({})
    channels = _width(encoder)
    decoder.fixed("block_out_channels", [channels])
    decoder.fixed("in_channels", channels)
    decoder.fixed("upsamples", 1)
    shape["channels"] = channels
    shape.places["channels"] = f"{encoder.place}.block_out_channels"
    shape.take("latent_channels", encoder, "input_channels", "int")
    decoder.fixed("out_channels", shape["latent_channels"])
    shape.take("norm_eps", encoder, "norm_eps", "float")
    shape.take("head_eps", language, "rms_norm_eps", "float")
    decoder.fixed("norm_eps", shape["norm_eps"])
    shape.take("encoder_blocks", encoder, "layers_in_middle", "int")
    shape.take("decoder_blocks", decoder, "layers_in_middle", "int")
    for each in (encoder, decoder):
        each.refuse_rest(_UNREAD)
    if problems:
        return None
    whole |= {"tower": tower, "flow": shape.build(FlowConfig, "flow")}
    return whole.build(VisionConfig, "vision")


def _uvit(
    config: Mapping[str, Any],
    name: str,
    cls: str,
    defaults: Mapping[str, Any],
    dim: int,
    problems: list[str],
) -> Fields:
    """Returns the `params` of a U-ViT's section, defaults filled in."""
    said = section(config, name, problems, cls)
    given = {name: value for name, value in said.values.items() if value is not None}
    fields = Fields({**defaults, **given}, said.place, problems)
    fields.fixed("hidden_size", dim)
    for each in ("use_bias", "use_mid_block"):
        fields.fixed(each, True)
    return fields


def _width(fields: Fields) -> int:
    widths = fields.values["block_out_channels"]
    fields.seen.add("block_out_channels")
    if isinstance(widths, list) and [*map(type, widths)] == [int] and widths[0] > 0:
        return widths[0]
    fields.problems.append(
        f"{fields.place}.block_out_channels={widths!r} is not a list of one integer above 0"
    )
    return 0


def write(vision: VisionConfig) -> dict[str, Any]:
    """Writes the sections of config.json but the language model's."""
    flow = vision.flow
    assert flow is not None
    shared = {
        "block_out_channels": [flow.channels],
        "hidden_size": vision.dim,
        "norm_eps": flow.norm_eps,
    }
    return {
        SECTIONS[0]: written_tower(vision.tower, "vision_und_enc"),
        SECTIONS[1]: {
            "cls": _ENCODER,
            "model_type": "vision_gen_enc",
            "params": shared
            | {
                "input_channels": flow.latent_channels,
                "kernel_size": PATCH,
                "stride": PATCH,
                "padding": 0,
                "layers_in_middle": flow.encoder_blocks,
            },
        },
        SECTIONS[2]: {
            "cls": _DECODER,
            "model_type": "vision_gen_dec",
            "params": shared
            | {
                "in_channels": flow.channels,
                "out_channels": flow.latent_channels,
                "upsamples": 1,
                "layers_in_middle": flow.decoder_blocks,
            },
        },
    }


def parts(vision: VisionConfig) -> Iterator[Part]:
    """Yields every tensor."""
    flow, D = vision.flow, vision.dim
    assert flow is not None
    C, brush = flow.channels, ("brush",)
    encoder, decoder = (*brush, "encoder"), (*brush, "decoder")
    yield Part("beg_of_und_embed", ("begin",), (), (1, D))
    yield from tower_parts("vision_und_enc_model.vision_tower.", vision.tower)
    yield from linear("vision_und_enc_aligner", ("aligner", "layers", "0"), D, vision.tower.dim)
    name = "vision_gen_enc_model."
    for layer, width in (("linear_1", C), ("linear_2", D)):
        yield from linear(f"{name}time_embed.{layer}", (*encoder, "time", layer), D, width)
    yield from conv(f"{name}in_conv", (*encoder, "conv_in"), PATCH, flow.latent_channels, C)
    yield from _blocks(name, encoder, C, D, flow.encoder_blocks)
    yield from linear("vision_gen_enc_aligner", (*brush, "encoder_aligner"), D, C)
    name = "vision_gen_dec_model."
    yield from _blocks(name, decoder, 2 * C, D, flow.decoder_blocks)
    out = f"{name}out_convs.0."
    yield Part(f"{out}norm.weight", (*decoder, "norm_out", "weight"), (), (2 * C,))
    yield from conv(
        f"{out}unpatch_conv", (*decoder, "conv_out"), 1, 2 * C, flow.latent_channels * PATCH**2
    )
    yield Part(f"{name}input_norm.weight", (*decoder, "norm_in", "weight"), (), (C,))
    head = "vision_gen_dec_aligner"
    yield Part(f"{head}_norm.weight", (*brush, "decoder_norm", "weight"), (), (D,))
    yield from linear(head, (*brush, "decoder_aligner"), C, D)


def _blocks(name: str, path: LeafPath, channels: int, dim: int, count: int) -> Iterator[Part]:
    wide = 4 * channels
    for number in range(count):
        block, own = f"{name}mid_block.res_blocks.{number}.", (*path, "blocks", str(number))
        yield from conv(f"{block}depthwise", (*own, "depthwise"), 7, 1, channels)
        yield Part(f"{block}norm.weight", (*own, "norm", "weight"), (), (channels,))
        yield from linear(f"{block}channelwise_linear_1", (*own, "widen"), wide, channels)
        for leaf in ("weight", "bias"):
            response = f"{block}channelwise_norm.{leaf}"
            yield Part(response, (*own, "response", leaf), (), (1, 1, 1, wide))
        yield from linear(f"{block}channelwise_linear_2", (*own, "narrow"), channels, wide)
        yield from linear(f"{block}cond_embeds_mapper", (*own, "modulate"), 2 * channels, dim)
