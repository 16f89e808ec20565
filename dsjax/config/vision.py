"""The shapes of what a model sees and draws with."""

from __future__ import annotations

import dataclasses
from typing import Literal

from dsjax.config.rules import require, require_at_most, require_not_negative, require_positive

GROUPS = 32  # of a group norm in a VQ tokenizer


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
    # DeepSeek's towers have the exact function, whatever SigLIP's usual configs say
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    pool: bool = False  # the weights of a pooling head are there, which no model of ours reads

    def __post_init__(self) -> None:
        require_positive(
            "tower", self, "image_size", "patch_size", "dim", "n_layers", "n_heads", "inter_dim",
            "norm_eps",
        )  # fmt: skip
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
class VqConfig:
    """The shape of a VQ tokenizer: pictures to codes, and back; the defaults are Janus'.

    Each level after the first halves the sides, so a code stands for a square of 2^(levels - 1).
    """

    n_codes: int = 16384
    code_dim: int = 8
    latent_channels: int = 256
    channels: int = 128  # of the finest level
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)  # of its channels, a level each
    n_blocks: int = 2  # of a level of the encoder; the decoder's have one more
    usage: int = 0  # numbers in the record of used codes that DeepSeek's files keep; 0: none

    def __post_init__(self) -> None:
        require_positive("vq", self, "n_codes", "code_dim", "latent_channels", "channels")
        require_positive("vq", self, "n_blocks")
        require_not_negative("vq", self, "usage")
        require(
            bool(self.multipliers) and min(self.multipliers) > 0,
            f"vq.multipliers={self.multipliers} must be numbers above 0, one per level",
        )
        widths = sorted({self.channels * times for times in self.multipliers})
        require(
            not any(width % GROUPS for width in widths),
            f"vq.channels={self.channels} and vq.multipliers={self.multipliers} give widths of "
            f"{', '.join(map(str, widths))}, which must divide into {GROUPS} groups to be "
            "normalized; choose vq.channels from 32, 64, 96, ...",
        )

    @property
    def scale(self) -> int:
        """Pixels per code, along each side."""
        return 1 << (len(self.multipliers) - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """What a model has beside its language model.

    Attributes:
      dim: width of the language model.
      aligner_depth: linear layers from the tower's width to the language model's.
      aligner_activation: what is between them.
      high: a second tower that sees the picture larger (DeepSeek-VL 7B); None: there is none.
      vq: what it draws with; None: it only sees.
      drawing_depth: linear layers from a code's embedding to the language model's width.
      head_dim: width inside the head that predicts codes.
      image_token: the id that stands for a picture's features in a prompt.
    """

    dim: int
    tower: SiglipConfig
    aligner_depth: int = 2
    aligner_activation: Literal["gelu", "gelu_tanh"] = "gelu"
    high: SamConfig | None = None
    vq: VqConfig | None = None
    drawing_depth: int = 2
    head_dim: int = 0
    image_token: int | None = None  # None: what the tokenizer calls <image_placeholder>

    def __post_init__(self) -> None:
        require_positive("vision", self, "dim", "aligner_depth", "drawing_depth")
        require(
            self.high is None or self.dim % 2 == 0,
            f"vision.dim={self.dim} is odd, and each of two towers gives half of it",
        )
        if self.vq:
            require_positive("vision", self, "head_dim")

    @property
    def code_grid(self) -> int:
        """Codes along each side of a picture that is drawn: as many as the tower sees patches."""
        return self.tower.grid
