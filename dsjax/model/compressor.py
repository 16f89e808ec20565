"""Compresses runs of tokens to one vector each, for the attention of DeepSeek-V4 and its indexer.

A token gives values and, per channel, gates. An entry is the sum of the values of its run, weighted
per channel by a softmax of the gates, to which a learned number is added for each place in the run;
then it is normalised, and its last channels are rotated at the position of the run's first token.

Runs that overlap (sparse layers) have two series of values and gates: an entry takes the first
series of the run before and the second of its own. The first entry of a document has its own only.

Letters besides the package's: Z entries, U tokens of a run.

V4 report section 2.3, as transformers 5.24 computes it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from dsjax.config import ModelConfig
from dsjax.kernels.native_sparse import Stack
from dsjax.model import rope
from dsjax.model.attention import Angles
from dsjax.model.layers import Constant, Float32, Normal, RMSNorm, declare
from dsjax.precision.matmul import linear
from dsjax.precision.policy import Policy

_MASKED = -1e30


class Runs(NamedTuple):
    """Runs of tokens to compress."""

    begins_BZ: jax.Array  # int32, place of the first token; negative: no run
    positions_BZ: jax.Array  # int32, of that token in its document
    angles: Angles  # of these positions


class Compressor(nnx.Module):
    def __init__(
        self, config: ModelConfig, policy: Policy, *, ratio: int, width: int, overlaps: bool
    ):
        """
        Args:
          ratio: tokens of a run.
          width: of an entry.
          overlaps: whether entries take a series of the run before.
        """
        init, channels = Normal(config.init_std), width * (2 if overlaps else 1)
        self.wkv = declare((config.dim, channels), ("embed", "latent"), init)
        self.wgate = declare((config.dim, channels), ("embed", "latent"), init)
        self.ape = declare((channels, ratio), ("latent", "norm"), Constant(0.0), Float32)
        self.norm = RMSNorm(width, config.norm_eps)
        self.ratio, self.width, self.overlaps = ratio, width, overlaps
        self.rotated = config.qk_rope_head_dim
        self.policy = policy

    @staticmethod
    def token_width(width: int, *, overlaps: bool) -> int:
        """Returns how many numbers `of_tokens` gives per token."""
        return width * (4 if overlaps else 2)

    def of_tokens(self, x_BTD: jax.Array) -> jax.Array:
        """Returns each token's values and gates, side by side: [B, T, X]."""
        pair = [linear(x_BTD, w[...], self.policy) for w in (self.wkv, self.wgate)]
        return jnp.concatenate(pair, axis=-1)

    def __call__(self, tokens: Stack, runs: Runs) -> jax.Array:
        """Makes the entries of some runs: [B, Z, width].

        Args:
          tokens: what `of_tokens` gave, one head. A run that ends after the stack holds what is
            there, and must never be seen.
        """
        ape_UX = self.ape[...].T
        values, gates = self._read(tokens, runs.begins_BZ)
        gates = gates.astype(jnp.float32) + ape_UX[None, None]
        if self.overlaps:
            before = self._read(tokens, runs.begins_BZ - self.ratio)
            first, own = slice(self.width), slice(self.width, None)
            seen_BZ11 = (runs.positions_BZ >= self.ratio)[:, :, None, None]
            gates_before = before[1].astype(jnp.float32) + ape_UX[None, None]
            gates_before = jnp.where(seen_BZ11, gates_before[..., first], _MASKED)
            values = jnp.concatenate([before[0][..., first], values[..., own]], axis=2)
            gates = jnp.concatenate([gates_before, gates[..., own]], axis=2)
        weights_BZUX = jax.nn.softmax(gates, axis=2)
        summed_BZX = (values * weights_BZUX.astype(values.dtype)).sum(axis=2)
        normed_BZX = self.norm(summed_BZX)
        return rope.rotate_last(normed_BZX[:, :, None], self.rotated, *runs.angles)[:, :, 0]

    def _read(self, tokens: Stack, begins_BZ: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns values and gates of runs, [B, Z, U, X] each."""
        places_BZU = begins_BZ[..., None] + lax.iota(jnp.int32, self.ratio)[None, None]
        places_BZU = jnp.clip(places_BZU, 0, tokens.length - 1)
        values, gates = jnp.split(tokens.take(places_BZU[:, None])[:, 0], 2, axis=-1)
        return values, gates
