"""What a model has beside its language model: to see, and in Janus to draw.

Seeing: a tower and an aligner turn each picture into embeddings, which replace those of as many
placeholders in the prompt. Drawing (Janus, arXiv:2410.13848, section 3): the hidden state at the
last position predicts a code of the VQ tokenizer, whose own embedding is the next input. The
embeddings of codes are a table of their own, not the codebook.
"""

from __future__ import annotations

import jax
from flax import nnx

from dsjax.config.vision import VisionConfig
from dsjax.model.layers import Normal, declare
from dsjax.precision.policy import Policy
from dsjax.vision.projector import CodeHead, HybridProjector, Projector
from dsjax.vision.sam import Sam
from dsjax.vision.siglip import Siglip
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


class Eyes(nnx.Module):
    """Sees, and draws if the model can. The constructor declares the parameters."""

    def __init__(self, config: VisionConfig, policy: Policy):
        self.tower = Siglip(config.tower, policy)
        exact = config.aligner_activation == "gelu"
        width, depth = config.tower.dim, config.aligner_depth
        if config.high:
            self.high = Sam(config.high, config.tower.grid, policy)
            self.hybrid = HybridProjector(width, 4 * config.high.out_channels, config.dim, policy)
        else:
            self.aligner = Projector(width, config.dim, depth, policy, exact=exact)
        if config.vq:
            self.pencil = Pencil(config, policy)
        self.config, self.policy = config, policy

    def __call__(self, pixels_BYXC: jax.Array, high_BYXC: jax.Array | None = None) -> jax.Array:
        """Turns pictures, float32 [B, size, size, 3], into embeddings [B, tokens, D].

        Args:
          high_BYXC: the same, larger, for the second tower of a model that has one.
        """
        if high_BYXC is None:
            return self.aligner(self.tower(pixels_BYXC))
        return self.hybrid(self.tower(pixels_BYXC), self.high(high_BYXC))
