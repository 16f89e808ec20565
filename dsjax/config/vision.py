"""The shapes of what a model sees and draws with."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from dsjax.config.rules import (
    require,
    require_at_most,
    require_few,
    require_not_negative,
    require_positive,
)

GROUPS = 32  # of a group norm in a published autoencoder
PATCH = 2  # latents per position of the language model, along each side, in JanusFlow


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiglipConfig:
    """The shape of a SigLIP tower; the defaults are those of Janus and DeepSeek-VL.

    Pixels at the right and the bottom that fill no patch are not seen: SO400M's 384 / 14 is 27.
    """

    image_size: int = 384
    patch_size: int = 16
    dim: int = 1024
    n_layers: int = 24
    n_heads: int = 16
    inter_dim: int = 4096
    norm_eps: float = 1e-6
    # DeepSeek's towers have the exact function, whatever SigLIP's usual configs say, but in VL2
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    pool: bool = False  # the weights of a pooling head are there, which no model of ours reads

    def __post_init__(self) -> None:
        require_positive(
            "tower", self, "image_size", "patch_size", "dim", "n_layers", "n_heads", "inter_dim",
            "norm_eps",
        )  # fmt: skip
        require_few("tower", self, "n_layers")
        require_at_most("tower", self, "patch_size", "image_size")
        require(
            self.dim % self.n_heads == 0,
            f"tower.dim={self.dim} does not divide by tower.n_heads={self.n_heads}",
        )

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size

    @property
    def n_tokens(self) -> int:
        return self.grid**2


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamConfig:
    """The shape of a SAM tower; the defaults are those of SAM-B, as in DeepSeek-VL 7B."""

    image_size: int = 1024
    patch_size: int = 16
    dim: int = 768
    n_layers: int = 12
    n_heads: int = 12
    inter_dim: int = 3072
    norm_eps: float = 1e-6
    window: int = 14  # side of the squares of patches that most layers attend in
    global_layers: tuple[int, ...] = (2, 5, 8, 11)  # those that attend everywhere, ascending
    out_channels: int = 256

    def __post_init__(self) -> None:
        require_positive(
            "sam", self, "image_size", "patch_size", "dim", "n_layers", "n_heads", "inter_dim",
            "norm_eps", "window", "out_channels",
        )  # fmt: skip
        require_few("sam", self, "n_layers")
        require(
            self.dim % self.n_heads == 0,
            f"sam.dim={self.dim} does not divide by sam.n_heads={self.n_heads}",
        )
        require(
            self.image_size % self.patch_size == 0,
            f"sam.image_size={self.image_size} does not divide by sam.patch_size={self.patch_size}",
        )
        layers = self.global_layers
        require(
            bool(layers) and sorted({*layers}) == [*layers] and layers[-1] < self.n_layers,
            f"sam.global_layers={layers} must be numbers of some of the {self.n_layers} layers, "
            "ascending",
        )

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """The shape of a convolutional encoder, from pixels to latents, and of its decoder.

    Each level after the first halves the sides, so a latent stands for a square of
    2^(levels - 1).
    """

    group: ClassVar[str] = "autoencoder"  # what errors call it
    latent_channels: int
    channels: int = 128  # of the finest level
    multipliers: tuple[int, ...]  # of its channels, a level each
    n_blocks: int = 2  # of a level of the encoder; the decoder's have one more
    n_groups: int = GROUPS  # that channels are normalised in

    def __post_init__(self) -> None:
        group = self.group
        require_positive(group, self, "latent_channels", "channels", "n_blocks", "n_groups")
        require_few(group, self, "n_blocks")
        require(
            bool(self.multipliers) and min(self.multipliers) > 0,
            f"{group}.multipliers={self.multipliers} must be numbers above 0, one per level",
        )
        widths = sorted({self.channels * times for times in self.multipliers})
        require(
            not any(width % self.n_groups for width in widths),
            f"{group}.channels={self.channels} and {group}.multipliers={self.multipliers} give "
            f"widths of {', '.join(map(str, widths))}, which must divide into {self.n_groups} "
            f"groups to be normalized; choose {group}.channels from {self.n_groups}, "
            f"{2 * self.n_groups}, {3 * self.n_groups}, ...",
        )

    @property
    def scale(self) -> int:
        """Pixels per latent, along each side."""
        return 1 << (len(self.multipliers) - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VqConfig(AutoencoderConfig):
    """The shape of a VQ tokenizer: pictures to codes, and back; the defaults are Janus'."""

    group: ClassVar[str] = "vq"
    n_codes: int = 16384
    code_dim: int = 8
    latent_channels: int = 256
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    usage: int = 0  # numbers in the record of used codes that DeepSeek's files keep; 0: none

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("vq", self, "n_codes", "code_dim")
        require_not_negative("vq", self, "usage")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VaeConfig(AutoencoderConfig):
    """The shape of a VAE: pictures to latents, and back; the defaults are SDXL's."""

    group: ClassVar[str] = "vae"
    latent_channels: int = 4
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    scaling: float = 0.13025  # times which the latents have a variance of about 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("vae", self, "scaling")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """The shape of what JanusFlow draws with; the defaults are JanusFlow-1.3B's.

    Two shallow U-ViTs lead from a VAE's latents to the language model and back. A position of the
    language model stands for a square of PATCH latents.

    Attributes:
      channels: of the blocks; the second U-ViT's have twice as many.
      head_eps: of the norm between the language model and the second U-ViT.
    """

    latent_channels: int = 4
    channels: int = 768
    encoder_blocks: int = 2
    decoder_blocks: int = 2
    norm_eps: float = 1e-6
    head_eps: float = 1e-6

    def __post_init__(self) -> None:
        require_positive(
            "flow", self, "latent_channels", "channels", "encoder_blocks", "decoder_blocks",
            "norm_eps", "head_eps",
        )  # fmt: skip
        require_few("flow", self, "encoder_blocks", "decoder_blocks")
        require(
            self.channels % 2 == 0,
            f"flow.channels={self.channels} is odd, and half of them are the cosines of a time",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TilesConfig:
    """How large pictures are cut (DeepSeek-VL2, arXiv:2412.10302, section 2.1).

    Attributes:
      resolutions: widths and heights in pixels that a picture may be brought to, whole tiles each.
        Their order decides between equal ones.
      downsample: side of the square of patches that becomes one embedding.
    """

    resolutions: tuple[tuple[int, int], ...]
    downsample: int = 2

    def __post_init__(self) -> None:
        require_positive("tiles", self, "downsample")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """What a model has beside its language model.

    Attributes:
      dim: width of the language model.
      aligner_depth: linear layers from the tower's width to the language model's.
      aligner_activation: what is between them.
      high: a second tower that sees the picture larger (DeepSeek-VL 7B); None: there is none.
      idle_norms: the weights of a norm per tower are there, which no model of ours reads.
      vq: what it draws codes with; None: it does not.
      drawn: codes along each side of a picture that is drawn; None: as many as the tower sees
        patches, as in all published models.
      flow: what it draws latents with; None: it does not.
      drawing_depth: linear layers from a code's embedding to the language model's width.
      head_dim: width inside the head that predicts codes.
      image_token: the id that stands for a picture's features in a prompt.
      tiles: how large pictures are cut (DeepSeek-VL2); None: they are shrunk.
    """

    dim: int
    tower: SiglipConfig
    aligner_depth: int = 2
    aligner_activation: Literal["gelu", "gelu_tanh"] = "gelu"
    high: SamConfig | None = None
    idle_norms: bool = False
    vq: VqConfig | None = None
    drawn: int | None = None
    flow: FlowConfig | None = None
    drawing_depth: int = 2
    head_dim: int = 0
    # None: what the tokenizer calls <image_placeholder>, in DeepSeek-VL2 <image>
    image_token: int | None = None
    tiles: TilesConfig | None = None

    def __post_init__(self) -> None:
        require_positive("vision", self, "dim", "aligner_depth", "drawing_depth")
        require_few("vision", self, "aligner_depth", "drawing_depth")
        require(
            self.high is None or self.dim % 2 == 0,
            f"vision.dim={self.dim} is odd, and each of two towers gives half of it",
        )
        require(
            self.high is not None or not self.idle_norms,
            "vision.idle_norms=True: only models with two towers (vision.high) have these norms",
        )
        require(
            not (self.vq and self.flow), "vision.vq and vision.flow: a model draws in one way only"
        )
        if self.vq:
            require_positive("vision", self, "head_dim")
        if self.drawn is not None:
            require_positive("vision", self, "drawn")
            require(self.vq is not None, "vision.drawn: a model without vision.vq draws no codes")
        if self.tiles:
            side, sizes = self.tower.image_size, self.tiles.resolutions
            require(
                bool(sizes) and not any(each < 1 or each % side for size in sizes for each in size),
                f"tiles.resolutions={sizes} must be widths and heights of whole tiles of {side} "
                "pixels (tower.image_size)",
            )

    @property
    def view_side(self) -> int:
        """Embeddings along each side of what the tower sees at once."""
        return -(-self.tower.grid // (self.tiles.downsample if self.tiles else 1))

    @property
    def draws(self) -> bool:
        return self.vq is not None or self.flow is not None

    @property
    def code_grid(self) -> int:
        """Codes, or positions of a flow, along each side of a picture that is drawn."""
        return self.tower.grid if self.drawn is None else self.drawn
