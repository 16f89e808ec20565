"""Training of a model that sees and draws: Janus' three stages are three such configs."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

from dsjax.config.posttraining import PostTraining, TuningConfig
from dsjax.config.rules import (
    require,
    require_fraction,
    require_not_negative,
    require_positive,
)
from dsjax.config.train import OptimConfig, PrecisionConfig
from dsjax.config.vision import SiglipConfig, VisionConfig, VqConfig

KINDS = ("see", "text", "draw")
PARTS = ("language", "tower", "aligner", "drawing")


@dataclasses.dataclass(frozen=True, kw_only=True)
class JanusConfig:
    """What a run reads, in which ratio, and which parts of the model it trains.

    Pairs of a picture and a text are in folders (each picture beside a .txt), JSON lines, parquet
    (bytes or paths) or webdataset tars: `dsjax.janus.pairs`.
    """

    see: str = ""  # globs or folders of pairs whose text is predicted
    text: str = ""  # globs or folders of text alone
    draw: str = ""  # globs or folders of pairs whose picture is predicted
    # rows of see, text and draw in every micro-batch; Janus-Pro's stages: 1:0:3, 2:3:5 and 5:1:4
    ratio: tuple[int, ...] = (1, 0, 3)
    # what trains: language, tower, aligner (of the tower) and drawing (the embeddings, the aligner
    # and the head of codes; of JanusFlow both U-ViTs and their aligners). The VQ tokenizer and the
    # VAE never do.
    trains: tuple[str, ...] = ("aligner", "drawing")
    blank: float = 0.1  # share of drawings whose prompt is blanked out, for guidance
    sequence_length: int = 4096  # tokens per row, into which examples are packed
    vae: str = ""  # the folder of the VAE, stabilityai/sdxl-vae, where JanusFlow is to draw
    # weight of the loss that aligns what an inner layer makes of a drawing with what the tower sees
    # of the picture (JanusFlow, section 3.4); 0: none. JanusFlow's is 1
    align: float = 0.0
    align_layer: int = 6  # the layer of the language model, counted from 1
    # what projects its states, alignment.safetensors of an earlier stage; empty: begins anew
    alignment: str = ""
    question: str = "Describe the picture."  # asked where a pair has a text and no question
    heldout_fraction: float = 0.02  # of the examples of each kind; 0: none, and no held-out loss
    cache_dir: str = ""  # of codes, latents, and pictures in tables; empty: see data.cache_dir
    seed: int = 0  # of the order, and of which prompts are blanked out

    def __post_init__(self) -> None:
        require_not_negative("janus", self, "seed", "align")
        require_positive("janus", self, "align_layer")
        require_fraction("janus", self, "blank")
        require(
            not self.alignment or self.align > 0,
            f"janus.alignment={self.alignment} is read where janus.align is above 0; set "
            "janus.align=1 or leave janus.alignment out",
        )
        require(
            self.sequence_length >= 2,
            f"janus.sequence_length={self.sequence_length} must be at least 2",
        )
        require(
            0 <= self.heldout_fraction < 1,
            f"janus.heldout_fraction={self.heldout_fraction} must lie in [0, 1)",
        )
        require(
            len(self.ratio) == len(KINDS) and min(self.ratio) >= 0 and max(self.ratio) > 0,
            f"janus.ratio={self.ratio} must be three whole numbers, not all 0: the rows of see, "
            "text and draw",
        )
        require(
            not self.align or self.ratio[-1] > 0,
            f"janus.align={self.align} aligns drawings, and janus.ratio={self.ratio} has none; "
            "set janus.align=0",
        )
        unknown = [part for part in self.trains if part not in PARTS]
        require(
            bool(self.trains) and not unknown,
            f"janus.trains={','.join(self.trains)} must name some of {', '.join(PARTS)}",
        )
        require(
            bool(self.question.strip()),
            "janus.question is empty, and what a model is asked about a picture cannot be",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Janus(PostTraining):
    """A stage of training."""

    tool: ClassVar[str] = "tools/paint.py"

    janus: JanusConfig = dataclasses.field(default_factory=JanusConfig)
    # What the checkpoint sees and draws with, for a plan; a run looks at the checkpoint itself.
    vision: VisionConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        size, whole = self.micro_batch_size, sum(self.ratio)
        require(
            size % whole == 0,
            f"a micro-batch of {size} rows (train.micro_batch_size, else train.batch_size) does "
            f"not divide into janus.ratio={':'.join(map(str, self.ratio))}; choose a multiple of "
            f"{whole}",
        )
        for axis in ("context", "pipe"):
            require(
                getattr(self.mesh, axis) == 1,
                f"mesh.{axis}={getattr(self.mesh, axis)}: models that see train with mesh.{axis}=1;"
                " use mesh.data, mesh.fsdp or mesh.tensor",
            )
        if self.model is None:
            return
        layers = self.model.n_layers
        require(
            not self.janus.align or self.janus.align_layer <= layers,
            f"janus.align_layer={self.janus.align_layer} is not one of the language model's "
            f"{layers} layers; choose 1 to {layers}",
        )
        length, limit = self.sequence_length, self.model.max_seq_len
        require(
            length <= limit,
            f"janus.sequence_length={length} exceeds the checkpoint's max_seq_len={limit}; lower "
            "it",
        )

    @property
    def ratio(self) -> tuple[int, ...]:
        """`janus.ratio` in lowest terms."""
        return tuple(each // math.gcd(*self.janus.ratio) for each in self.janus.ratio)

    @property
    def counts(self) -> tuple[int, ...]:
        """Rows of each kind in a micro-batch, in the order of KINDS."""
        times = self.micro_batch_size // sum(self.ratio)
        return tuple(times * each for each in self.ratio)

    @property
    def sequence_length(self) -> int:
        """Tokens per row."""
        return self.janus.sequence_length


@dataclasses.dataclass(frozen=True, kw_only=True)
class VqTraining:
    """The training of a VQ tokenizer."""

    name: str
    vq: VqConfig
    size: int  # sides of a picture
    # whether codes are chosen; off: an autoencoder, as the tokenizer's first lesson
    codes: Literal["on", "off"] = "on"
    commitment: float = 0.25  # weight of the loss that ties what is encoded to its entry
    train: TuningConfig = dataclasses.field(default_factory=TuningConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    precision: PrecisionConfig = dataclasses.field(default_factory=PrecisionConfig)

    def __post_init__(self) -> None:
        require_not_negative("tokenizer", self, "commitment")
        require(
            self.size > 0 and self.size % self.vq.scale == 0,
            f"tokenizer.size={self.size} does not divide by the {self.vq.scale} pixels of a code",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerTraining:
    """The training of a SigLIP tower on pictures and captions, by the sigmoid loss."""

    name: str
    tower: SiglipConfig
    vocab_size: int  # ids of the words that captions have
    # batch_size: pictures that are compared with as many captions
    train: TuningConfig = dataclasses.field(default_factory=TuningConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    precision: PrecisionConfig = dataclasses.field(default_factory=PrecisionConfig)

    def __post_init__(self) -> None:
        require_positive("tower", self, "vocab_size")
