"""What a model has beside its language model: to see, and in Janus to draw.

Seeing: a tower and an aligner turn each picture into embeddings, which replace those of as many
placeholders in the prompt. Drawing codes (Janus, arXiv:2410.13848, section 3): the hidden state at
the last position predicts a code of the VQ tokenizer, whose own embedding is the next input. The
embeddings of codes are a table of their own, not the codebook. Drawing by a flow (JanusFlow,
arXiv:2411.07975, section 3): the hidden states of a whole noisy picture predict where it moves.

DeepSeek-VL2 sees a picture as a whole and in tiles (tiles.py), which two embeddings of its own set
apart: one after every row, one between the whole and the tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.config.vision import VisionConfig
from dsjax.model.layers import LayerNorm, Normal, RMSNorm, declare
from dsjax.precision.policy import Policy
from dsjax.vision.projector import STD, CodeHead, HybridProjector, Linear, Projector, unfold
from dsjax.vision.sam import Sam
from dsjax.vision.siglip import Siglip
from dsjax.vision.uvit import UvitDecoder, UvitEncoder
from dsjax.vision.vq import Vq


class Pencil(nnx.Module):
    """Draws: the VQ tokenizer, and what leads from codes to the language model and back."""

    def __init__(self, config: VisionConfig, policy: Policy):
        vq = config.vq
        assert vq is not None
        self.vq = Vq(vq, policy)
        self.embed = declare((vq.n_codes, vq.code_dim), ("latent", "latent"), Normal(1.0))
        self.aligner = Projector(vq.code_dim, config.dim, config.drawing_depth, policy)
        self.head = CodeHead(config.dim, config.head_dim, vq.n_codes, policy)
        self.policy = policy

    def embeddings(self, codes: jax.Array) -> jax.Array:
        """Returns the language model's inputs for codes, int32 [...]: [..., D]."""
        return self.aligner(self.embed[...].astype(self.policy.compute)[codes])


class Noisy(NamedTuple):
    """Noisy latents as the language model and the second U-ViT see them."""

    inputs_BTD: jax.Array  # of the language model: the time, then the latents row by row
    skip_BYXC: jax.Array
    time_BD: jax.Array


class Brush(nnx.Module):
    """Draws by a flow: what leads from noisy latents to the language model, and back."""

    def __init__(self, config: VisionConfig, policy: Policy):
        flow, D = config.flow, config.dim
        assert flow is not None
        self.encoder = UvitEncoder(flow, D, policy)
        self.encoder_aligner = Linear(("latent", "embed"), (flow.channels, D), policy)
        self.decoder_norm = RMSNorm(D, flow.head_eps)
        self.decoder_aligner = Linear(("embed", "latent"), (D, flow.channels), policy)
        self.decoder = UvitDecoder(flow, D, policy)
        self.config = flow

    @jax.named_scope("brush-read")
    def read(self, latents_BYXC: jax.Array, time_B: jax.Array) -> Noisy:
        """Prepares latents for the language model.

        Args:
          latents_BYXC: float32, in units of `dsjax.vision.vae`.
          time_B: from 0, where they are noise, to 1, where they are a picture.
        """
        time_BD = self.encoder.time(time_B)
        skip_BYXC = self.encoder(latents_BYXC, time_BD)
        B, Y, X, C = skip_BYXC.shape
        picture_BTD = self.encoder_aligner(skip_BYXC.reshape(B, Y * X, C))
        return Noisy(jnp.concatenate([time_BD[:, None], picture_BTD], axis=1), skip_BYXC, time_BD)

    @jax.named_scope("brush-velocity")
    def velocity(self, states_BTD: jax.Array, noisy: Noisy) -> jax.Array:
        """Predicts how latents move per unit of time: float32, in their shape.

        Args:
          states_BTD: the language model's, of the positions of the latents alone.
        """
        x_BTC = self.decoder_aligner(self.decoder_norm(states_BTD))
        x_BYXC = x_BTC.reshape(noisy.skip_BYXC.shape)
        return self.decoder(x_BYXC, noisy.skip_BYXC, noisy.time_BD).astype(jnp.float32)


class Eyes(nnx.Module):
    """Sees, and draws if the model can. The constructor declares the parameters."""

    def __init__(self, config: VisionConfig, policy: Policy):
        self.tower = Siglip(config.tower, policy)
        exact = config.aligner_activation == "gelu"
        width, depth = config.tower.dim, config.aligner_depth
        if config.high:
            self.high = Sam(config.high, config.tower.grid, policy)
            width_high = 4 * config.high.out_channels
            self.hybrid = HybridProjector(width, width_high, config.dim, policy)
            if config.idle_norms:  # kept to be written, as the towers' pooling heads
                self.high_norm, self.low_norm = LayerNorm(width_high), LayerNorm(width)
        else:
            width *= config.tiles.downsample**2 if config.tiles else 1
            self.aligner = Projector(width, config.dim, depth, policy, exact=exact)
        if config.tiles:
            self.newline, self.separator = (
                declare((config.dim,), ("norm",), Normal(config.dim**-0.5)) for _ in range(2)
            )
        if config.vq:
            self.pencil = Pencil(config, policy)
        if config.flow:
            self.brush = Brush(config, policy)
            # before each picture's features, where its begin token is in the prompt
            self.begin = declare((config.dim,), ("norm",), Normal(STD))
        self.config, self.policy = config, policy

    def __call__(self, pixels_BYXC: jax.Array, high_BYXC: jax.Array | None = None) -> jax.Array:
        """Turns pictures, float32 [B, size, size, 3], into embeddings [B, tokens, D].

        Args:
          high_BYXC: the same, larger, for the second tower of a model that has one.
        """
        seen_BTD = self.tower(pixels_BYXC)
        if high_BYXC is not None:
            return self.hybrid(seen_BTD, self.high(high_BYXC))
        if self.config.tiles:
            seen_BTD = unfold(seen_BTD, self.config.tiles.downsample)
        features_BTD = self.aligner(seen_BTD)
        return self._begun(features_BTD) if self.config.flow else features_BTD

    def _begun(self, features_BTD: jax.Array) -> jax.Array:
        """Adds the embedding that JanusFlow has before a picture's features."""
        B, _, D = features_BTD.shape
        begin_BTD = jnp.broadcast_to(self.begin[...].astype(features_BTD.dtype), (B, 1, D))
        return jnp.concatenate([begin_BTD, features_BTD], axis=1)
