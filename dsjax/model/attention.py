"""What every kind of attention declares, and what all kinds share.

Cache, FLOP counts and memory estimates ask the class for what they need, so a new kind is one
subclass, one line in `dsjax.model.block.attention_class` and its fields in `ModelConfig`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
from flax import nnx

from dsjax.config import ModelConfig
from dsjax.kernels.cached_attention import Attended
from dsjax.model import rope
from dsjax.model.layer_cache import EntryShape, LayerCache
from dsjax.parallel import context
from dsjax.precision.activations import attention_linear
from dsjax.precision.matmul import linear
from dsjax.precision.policy import Policy

Angles = tuple[jax.Array, jax.Array]  # rope cosine and sine, float32 [B, T, R/2]


class Attention(nnx.Module):
    """Causal attention of one layer. A subclass declares its parameters, `wo` among them."""

    config: ModelConfig
    policy: Policy
    wo: nnx.Variable
    splits: ClassVar[bool] = True  # whether devices may hold a part of the cached positions each

    @staticmethod
    def cached(config: ModelConfig) -> dict[str, EntryShape]:
        """Names what decoding caches per token and layer."""
        raise NotImplementedError

    @staticmethod
    def matmul_parameters(config: ModelConfig) -> int:
        """Counts the weights of one layer that multiply a token."""
        raise NotImplementedError

    @staticmethod
    def context_flops(config: ModelConfig, length: int, causal: bool) -> int:
        """Counts the operations per token of attending over a sequence of `length`: all of the
        square, or the causal half of it.
        """
        square = 2 * length * config.n_heads * (config.qk_head_dim + config.value_head_dim)
        return square // 2 if causal else square

    @staticmethod
    def latent_values(config: ModelConfig) -> int:
        """Counts what `remat="selective"` keeps per token as "latent"."""
        return 0

    def queries(self, x_BTD: jax.Array, angles: Angles) -> jax.Array:
        """Returns rotated queries [B, T, N, H]."""
        raise NotImplementedError

    def entries(self, x_BTD: jax.Array, angles: Angles) -> dict[str, jax.Array]:
        """Returns what decoding caches of each token, under the names of `cached`: [B, T, P, X], or
        [B, T, X] where the entry has one head, whatever the mesh.
        """
        raise NotImplementedError

    def expansion(self) -> Any:
        """Returns the weights that `expand` needs, [..., heads]."""
        return None

    def expand(self, *entries_and_weights: Any) -> tuple[jax.Array, jax.Array]:
        """Returns keys [B, S, P, H] and values [B, S, P, W], given entries and the weights of
        `expansion` that belong to these heads.
        """
        raise NotImplementedError

    def attend(
        self, cache: LayerCache, q_BTNH: jax.Array, positions_BT: jax.Array, weights: Any
    ) -> Attended:
        """Attends to the cached positions up to each query's own.

        Args:
          cache: or this device's part of it (`dsjax.parallel.split_cache.part`).
          weights: what `expansion` returns.
        """
        raise NotImplementedError

    def lay_out_for_decoding(self) -> None:
        """Lays the layer's weights out as `extend` multiplies few tokens fastest."""

    @jax.named_scope("attention")
    def __call__(
        self, x_BTD: jax.Array, angles: Angles, segment_ids_BT: jax.Array | None = None
    ) -> jax.Array:
        """Attends within whole sequences, or within their segments: [B, T, D]."""
        out_BTNW = context.attend(
            self.queries(x_BTD, angles),
            tuple(self.entries(x_BTD, angles).values()),
            self.expansion(),
            self.expand,
            scale=rope.attention_scale(self.config),
            segment_ids_BT=segment_ids_BT,
            target=self.policy.target,
        )
        out_BTX = out_BTNW.reshape(*x_BTD.shape[:2], -1)
        return attention_linear(out_BTX, self.wo[...], self.policy)

    def extend(
        self, x_BTD: jax.Array, angles: Angles, cache: LayerCache, positions_BT: jax.Array
    ) -> tuple[jax.Array, LayerCache]:
        """Adds tokens at consecutive positions to the cache and attends from them to it."""
        q_BTNH = self.queries(x_BTD, angles)
        cache = cache.append(positions_BT[:, 0], **self.entries(x_BTD, angles))
        out_BTNW = cache.attend(self.attend, q_BTNH, positions_BT, self.expansion())
        out_BTX = out_BTNW.reshape(*x_BTD.shape[:2], -1)
        return linear(out_BTX, self.wo[...], self.policy), cache
