"""Janus' stages in small: a model that names and draws coloured shapes, from nothing.

A VQ tokenizer, a tower that learns as SigLIP did (arXiv:2303.15343) and a language model that
reads captions, then the three stages of Janus-Pro (arXiv:2501.17811, section 2.2) in their ratios,
each of which trains what it trains there. Departure: the tower has seen the pictures of the stages
themselves, where SigLIP has seen the web.

Command: python tools/shapes.py --workdir runs/shapes_tiny
Hardware: 2 CPU cores, 4 GB of memory.
Cost: 10.5 minutes on two idle cores, by the sum of its runs.
Expected: 99 % of held-out pictures named rightly, 94 % of drawings right with guidance of 1.5
(docs/pictures.md).
"""

from typing import Literal

from dsjax.config import ModelConfig, OptimConfig, PrecisionConfig
from dsjax.config.coloured_shapes import ColouredShapes, PaintStage
from dsjax.config.janus import Janus, JanusConfig, TowerTraining, VqTraining
from dsjax.config.posttraining import TuningConfig
from dsjax.config.vision import SiglipConfig, VisionConfig, VqConfig

FLOAT32 = PrecisionConfig(compute="float32")
MODEL = ModelConfig(
    attention="gqa",
    vocab_size=64,
    max_seq_len=192,
    dim=128,
    n_layers=3,
    n_dense_layers=3,
    n_heads=4,
    n_kv_heads=4,
    head_dim=32,
    inter_dim=384,
    init_std=0.03,
)
VQ = VqConfig(
    n_codes=64,
    code_dim=8,
    latent_channels=32,
    channels=32,
    multipliers=(1, 1, 1),
    n_blocks=1,
    n_groups=8,  # of four channels each, as Janus' finest level has
)
VISION = VisionConfig(
    dim=128,
    tower=SiglipConfig(image_size=48, patch_size=16, dim=128, n_layers=2, n_heads=4, inter_dim=384),
    vq=VQ,
    drawn=12,  # finer than what is seen: a shape needs more than nine codes
    head_dim=128,
    image_token=7,
)


def tokenizer(
    name: str, codes: Literal["on", "off"], steps: int, learning_rate: float
) -> VqTraining:
    return VqTraining(
        name=name,
        vq=VQ,
        size=48,
        codes=codes,
        commitment=0.02,  # with more, what is encoded gathers at a few entries
        train=TuningConfig(
            steps=steps, batch_size=8, eval_every=0, checkpoint_every=200, log_every=20,
            tensorboard=False,
        ),
        optim=OptimConfig(
            learning_rate=learning_rate, schedule="cosine", warmup_steps=20, weight_decay=0.0
        ),
        precision=FLOAT32,
    )  # fmt: skip


TOWER = TowerTraining(
    name="tower",
    tower=VISION.tower,
    vocab_size=MODEL.vocab_size,
    train=TuningConfig(
        steps=800, batch_size=108, eval_every=0, checkpoint_every=200, log_every=20,
        tensorboard=False,
    ),
    optim=OptimConfig(learning_rate=2e-3, schedule="cosine", warmup_steps=50, weight_decay=0.0),
    precision=FLOAT32,
)  # fmt: skip


def stage(
    name: str,
    ratio: tuple[int, int, int],
    trains: tuple[str, ...],
    steps: int,
    batch_size: int,
    learning_rate: float,
) -> PaintStage:
    config = Janus(
        name=name,
        janus=JanusConfig(
            see="{run}/data/see.jsonl",
            text="{run}/data/captions.jsonl",
            draw="{run}/data/draw.jsonl",
            ratio=ratio,
            trains=trains,
            sequence_length=167,
            heldout_fraction=0.0,
            cache_dir="{run}/cache",
        ),
        train=TuningConfig(
            steps=steps, batch_size=batch_size, remat="none", eval_every=0, checkpoint_every=200,
            log_every=20, tensorboard=False,
        ),
        optim=OptimConfig(
            learning_rate=learning_rate, schedule="cosine", warmup_steps=20, weight_decay=0.0
        ),
        precision=FLOAT32,
    )  # fmt: skip
    return PaintStage(name=name, config=config)


config = ColouredShapes(
    name="shapes_tiny",
    model=MODEL,
    vision=VISION,
    autoencoder=tokenizer("autoencoder", "off", 300, 3e-3),
    tokenizer=tokenizer("tokenizer", "on", 450, 2e-3),
    tower=TOWER,
    stages=(
        stage("words", (0, 1, 0), ("language",), 100, 8, 2e-3),
        stage("adaptors", (1, 0, 3), ("aligner", "drawing"), 150, 16, 2e-3),
        stage("unified", (2, 3, 5), ("language", "aligner", "drawing"), 1500, 20, 1.5e-3),
        stage("fine_tuned", (5, 1, 4), ("language", "tower", "aligner", "drawing"), 2400, 20, 1e-3),
    ),
)
