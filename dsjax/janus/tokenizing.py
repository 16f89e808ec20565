"""Training of a VQ tokenizer: pictures to codes, and back.

Papers: VQ-VAE (arXiv:1711.00937), section 3.2, with the codebook of LlamaGen (arXiv:2406.06525,
section 3.1), where both sides have length 1. Three losses: the picture comes back (mean squared
error), entries move to what is encoded, and what is encoded commits itself to its entry. The
gradient passes by the choice of an entry as if it were not there.

Departures: LlamaGen also has a perceptual and an adversarial loss, which photographs need; there
are none here. A tokenizer begins as an autoencoder, which chooses no codes, and its first entries
are encodings of training pictures, far from one another; otherwise most would never be chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

from dsjax.config.janus import VqTraining
from dsjax.data.shuffling import permute, shuffled, stream_key
from dsjax.janus import part_training
from dsjax.janus.encodings import as_pixels, square_of
from dsjax.janus.pairs import Picture
from dsjax.model.parameters import initialize
from dsjax.precision.policy import Policy
from dsjax.train.objective import Batch, Knobs, Metrics
from dsjax.train.optimizer import Optimizer
from dsjax.train.step import TrainState
from dsjax.vision.vq import Vq, unit

_SAMPLE = 128  # pictures whose encodings become entries


class VqLosses(NamedTuple):
    """The three losses, float32 scalars, and the codes, int32 [B, rows, columns]."""

    reconstruction: jax.Array
    codebook: jax.Array
    commitment: jax.Array
    codes: jax.Array


def losses(vq: Vq, pixels_BYXC: jax.Array, *, chooses: bool = True) -> VqLosses:
    """Computes the losses of pictures, float32 [B, size, size, 3], -1 to 1.

    Distances to entries are summed over a code's width and averaged over codes.

    Args:
      chooses: whether a picture comes back from its codes, or from its encoding itself.
    """
    latents = unit(vq.quant_conv(vq.encoder(pixels_BYXC)).astype(jnp.float32))
    entries = unit(vq.codebook[...].astype(jnp.float32))
    products = jnp.einsum("byxc,vc->byxv", latents, entries, precision=jax.lax.Precision.HIGHEST)
    codes = products.argmax(axis=-1).astype(jnp.int32)
    chosen = entries[codes]
    stop = jax.lax.stop_gradient
    passed = latents + stop(chosen - latents) if chooses else latents
    found = vq.decoder(vq.post_quant_conv(passed)).astype(jnp.float32)
    return VqLosses(
        jnp.square(found - pixels_BYXC).mean(),
        jnp.square(stop(latents) - chosen).sum(axis=-1).mean(),
        jnp.square(latents - stop(chosen)).sum(axis=-1).mean(),
        codes,
    )


def vq_step(
    declared: Vq, optimizer: Optimizer, commitment: float, *, chooses: bool = True
) -> Callable[[TrainState, Batch, Knobs], tuple[TrainState, Metrics]]:
    """Builds a step for `dsjax.train.loop`; a batch has `pictures`, uint8 [1, B, size, size, 3].

    Args:
      commitment: the weight of the third loss.
      chooses: whether codes are chosen; if not, the first loss is the only one.
    """
    structure, _ = nnx.split(declared, nnx.Param)

    def loss(params: nnx.State, pixels: jax.Array) -> tuple[jax.Array, VqLosses]:
        found = losses(nnx.merge(structure, params), pixels, chooses=chooses)
        if not chooses:
            return found.reconstruction, found
        return found.reconstruction + found.codebook + commitment * found.commitment, found

    def step(state: TrainState, batch: Batch, knobs: Knobs) -> tuple[TrainState, Metrics]:
        pixels = as_pixels(batch["pictures"][0])
        (total, found), grads = jax.value_and_grad(loss, has_aux=True)(state.params, pixels)
        params, moments, grad_norm = optimizer.update(
            grads, state.optimizer, state.params, knobs["learning_rate"], jnp.isfinite(total)
        )
        used = jnp.zeros(declared.config.n_codes).at[found.codes.reshape(-1)].set(1.0)
        fine = jnp.isfinite(total) & jnp.isfinite(grad_norm)
        return TrainState(params, state.router, moments), {
            "loss": total,
            "reconstruction_loss": found.reconstruction,
            "codebook_loss": found.codebook,
            "used_codes": used.mean(),
            "grad_norm": grad_norm,
            "skipped": ~fine,
        }

    return step


def with_entries(vq: Vq, shown: Sequence[Picture], size: int, seed: int) -> Vq:
    """Returns a tokenizer whose entries are encodings of pictures: one at random, then each the
    farthest from those before it.

    Raises:
      ValueError: a picture cannot be read; or the pictures have fewer codes than the codebook has
        entries.
    """
    config = vq.config
    each = (size // config.scale) ** 2
    chosen = shuffled(len(shown), stream_key("codebook", seed, 0))[:_SAMPLE]
    some = [shown[number] for number in chosen]
    if len(some) * each < config.n_codes:
        raise ValueError(
            f"{len(shown)} pictures of {each} codes cannot fill a codebook of {config.n_codes} "
            "entries; give more pictures, or a smaller vq.n_codes"
        )
    squares = np.stack([square_of(picture, size) for picture in some])
    encode = jax.jit(lambda vq, pixels: unit(vq.quant_conv(vq.encoder(pixels))))
    latents = np.asarray(encode(vq, as_pixels(squares))).reshape(-1, config.code_dim)
    entries = [0]
    nearest = np.full(len(latents), np.inf)
    while len(entries) < config.n_codes:
        distances = np.square(latents - latents[entries[-1]]).sum(axis=-1)
        nearest = np.minimum(nearest, distances)
        entries.append(int(nearest.argmax()))
    vq.codebook[...] = jnp.asarray(latents[entries])
    return vq


class PictureRows:
    """Pictures alone, without end, each epoch in an order of its own; `dsjax.data.loader.Rows`."""

    def __init__(self, shown: Sequence[Picture], size: int, *, seed: int) -> None:
        self._shown, self._size, self._seed = shown, size, seed

    @property
    def identity(self) -> Mapping[str, int | float | str]:
        """What determines every row."""
        return {"pictures": len(self._shown), "size": self._size, "seed": self._seed}

    def epochs(self, row: int) -> float:
        """Returns how often the rows before `row` go through all pictures."""
        return row / len(self._shown)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        epoch, place = divmod(row, len(self._shown))
        place = permute(place, len(self._shown), stream_key("pictures", self._seed, epoch))
        return {"pictures": square_of(self._shown[place], self._size)}


def declared_vq(config: VqTraining) -> Vq:
    """Declares the tokenizer of a run, without values."""
    return Vq(config.vq, Policy(jnp.dtype(config.precision.compute)))


def train(
    config: VqTraining,
    shown: Sequence[Picture],
    folder: Path,
    *,
    command: str,
    console: Console,
    init: Callable[[], Vq] | None = None,
) -> int:
    """Trains a tokenizer on pictures, on one device; result and errors are those of `session.run`.
    What it learned is in the newest checkpoint of the run: `trained`.

    Args:
      init: returns what it begins with, but for its entries; None: random weights.
    """
    declared, size, seed = declared_vq(config), config.size, config.train.seed

    def begin() -> Vq:
        vq = init() if init else initialize(declared, jax.random.key(seed))
        return with_entries(vq, shown, size, seed)

    return part_training.train(
        config,
        declared,
        PictureRows(shown, size, seed=seed),
        folder,
        step=lambda optimizer: vq_step(
            declared, optimizer, config.commitment, chooses=config.codes == "on"
        ),
        begin=begin,
        reports=lambda last: {name: each for name, each in last.items() if name.endswith("loss")},
        command=command,
        console=console,
    )


def trained(config: VqTraining, folder: Path) -> Vq:
    """Reads the tokenizer that a run has trained."""
    return part_training.trained(config, declared_vq(config), folder)
