"""Training of a tower from pictures and captions, before any language model looks through it.

Paper: SigLIP (arXiv:2303.15343), whose towers Janus and DeepSeek-VL begin with. A picture and a
caption become a vector each; those of a pair are to agree, all others of the batch are not
(`dsjax.vision.sigmoid_loss`). What reads captions is thrown away afterwards.

Departures: a picture's vector is the mean of its features, where SigLIP's pooling head attends to
them; a caption's is that of its words without their order, where SigLIP has a transformer. Captions
of a batch are distinct, so that no picture is told that its own caption is another's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

from dsjax.config.janus import TowerTraining
from dsjax.data.shuffling import permute, stream_key
from dsjax.janus import part_training
from dsjax.janus.encodings import as_pixels, square_of
from dsjax.janus.pairs import Picture
from dsjax.model.layers import Constant, Normal, declare
from dsjax.model.parameters import initialize
from dsjax.precision.policy import Policy
from dsjax.train.objective import Batch, Knobs, Metrics
from dsjax.train.optimizer import Optimizer
from dsjax.train.step import TrainState
from dsjax.vision.projector import Linear, Projector
from dsjax.vision.siglip import Siglip
from dsjax.vision.sigmoid_loss import FIRST_BIAS, FIRST_LOG_SCALE, SigmoidLoss, sigmoid_loss
from dsjax.vision.vq import unit

NO_WORD = -1  # the id after a caption's last word, up to the longest caption


class Contrast(nnx.Module):
    """A tower, and what compares its pictures with captions."""

    def __init__(self, config: TowerTraining, policy: Policy):
        D = config.tower.dim
        self.tower = Siglip(config.tower, policy)
        self.seen = Linear(("embed", "latent"), (D, D), policy)
        self.embed = declare((config.vocab_size, D), ("latent", "latent"), Normal(1.0))
        self.said = Projector(D, D, 2, policy)
        self.log_scale = declare((), (), Constant(FIRST_LOG_SCALE))
        self.bias = declare((), (), Constant(FIRST_BIAS))
        self.policy = policy

    def pictures(self, pixels_BYXC: jax.Array) -> jax.Array:
        """Turns pictures, float32 [B, size, size, 3], into vectors of length 1, float32 [B, D]."""
        return unit(self.seen(self.tower(pixels_BYXC).mean(axis=1)).astype(jnp.float32))

    def captions(self, ids_BT: jax.Array) -> jax.Array:
        """Turns captions, int32 [B, T], NO_WORD at their ends, into vectors, float32 [B, D]."""
        words_BTD = self.embed[...].astype(self.policy.compute)[ids_BT]
        there_BT1 = (ids_BT != NO_WORD)[..., None]
        mean_BD = words_BTD.mean(axis=1, where=there_BT1)
        return unit(self.said(mean_BD).astype(jnp.float32))

    def loss(self, pixels_BYXC: jax.Array, ids_BT: jax.Array) -> SigmoidLoss:
        """Compares pictures with captions; the same place of both is a pair."""
        pictures_BD, captions_BD = self.pictures(pixels_BYXC), self.captions(ids_BT)
        return sigmoid_loss(pictures_BD, captions_BD, self.log_scale[...], self.bias[...])


def contrast_step(
    declared: Contrast, optimizer: Optimizer
) -> Callable[[TrainState, Batch, Knobs], tuple[TrainState, Metrics]]:
    """Builds a step for `dsjax.train.loop`; a batch has `pictures`, uint8 [1, B, size, size, 3],
    and `ids`, int32 [1, B, T]. Its metric `matched` is the share of pictures that agree with their
    own caption more than with any other of the batch.
    """
    structure, _ = nnx.split(declared, nnx.Param)

    def loss(params: nnx.State, batch: Batch) -> SigmoidLoss:
        contrast = nnx.merge(structure, params)
        return contrast.loss(as_pixels(batch["pictures"][0]), batch["ids"][0])

    def step(state: TrainState, batch: Batch, knobs: Knobs) -> tuple[TrainState, Metrics]:
        (total, logits_BB), grads = jax.value_and_grad(loss, has_aux=True)(state.params, batch)
        params, moments, grad_norm = optimizer.update(
            grads, state.optimizer, state.params, knobs["learning_rate"], jnp.isfinite(total)
        )
        own_B = jnp.arange(len(logits_BB))
        return TrainState(params, state.router, moments), {
            "loss": total,
            "matched": (logits_BB.argmax(axis=-1) == own_B).mean(),
            "grad_norm": grad_norm,
            "skipped": ~(jnp.isfinite(total) & jnp.isfinite(grad_norm)),
        }

    return step


class CaptionedRows:
    """Pictures with their captions, without end; `dsjax.data.loader.Rows`.

    Every batch has other captions, each once, and every caption shows all its pictures in an order
    of its own before it repeats one.
    """

    def __init__(
        self,
        shown: Mapping[tuple[int, ...], Sequence[Picture]],
        size: int,
        *,
        batch_size: int,
        seed: int,
    ) -> None:
        """`shown` has the pictures of each caption, which is given as the ids of its words."""
        if batch_size > len(shown):
            raise ValueError(
                f"a batch of {batch_size} pictures (train.batch_size) asks for as many captions, "
                f"and there are {len(shown)}; lower it"
            )
        longest = max(map(len, shown))
        self._ids = [
            np.array([*ids, *[NO_WORD] * (longest - len(ids))], dtype=np.int32) for ids in shown
        ]
        self._shown = list(shown.values())
        self._size, self._batch_size, self._seed = size, batch_size, seed

    @property
    def identity(self) -> Mapping[str, int | float | str]:
        """What determines every row."""
        return {
            "captions": len(self._shown),
            "pictures": sum(map(len, self._shown)),
            "size": self._size,
            "batch_size": self._batch_size,
            "seed": self._seed,
        }

    def epochs(self, row: int) -> float:
        """Returns how often the rows before `row` go through as many pictures as there are."""
        return row / sum(map(len, self._shown))

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        step, place = divmod(row, self._batch_size)
        n_captions = len(self._shown)
        caption = permute(place, n_captions, stream_key("captions", self._seed, step))
        pictures = self._shown[caption]
        epoch, number = divmod(step, len(pictures))
        key = stream_key(f"pictures of {caption}", self._seed, epoch)
        picture = pictures[permute(number, len(pictures), key)]
        return {"pictures": square_of(picture, self._size), "ids": self._ids[caption]}


def declared_contrast(config: TowerTraining) -> Contrast:
    """Declares what a run trains, without values."""
    return Contrast(config, Policy(jnp.dtype(config.precision.compute)))


def train(
    config: TowerTraining,
    shown: Mapping[tuple[int, ...], Sequence[Picture]],
    folder: Path,
    *,
    command: str,
    console: Console,
    init: Callable[[Contrast], Contrast] = lambda contrast: contrast,
) -> int:
    """Trains a tower on pictures and their captions, on one device; result and errors are those of
    `session.run`. What it learned is in the newest checkpoint of the run: `trained`.

    Args:
      shown: see `CaptionedRows`.
      init: changes the random weights that it begins with.

    Raises:
      ValueError: a batch has more pictures than there are captions.
    """
    declared, own = declared_contrast(config), config.train
    rows = CaptionedRows(shown, config.tower.image_size, batch_size=own.batch_size, seed=own.seed)
    return part_training.train(
        config,
        declared,
        rows,
        folder,
        step=functools.partial(contrast_step, declared),
        begin=lambda: init(initialize(declared, jax.random.key(own.seed))),
        reports=lambda last: {name: last[name] for name in ("loss", "matched")},
        command=command,
        console=console,
    )


def trained(config: TowerTraining, folder: Path) -> Siglip:
    """Reads the tower that a run has trained."""
    return part_training.trained(config, declared_contrast(config), folder).tower
