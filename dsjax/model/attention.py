"""Which attention a config means, and what every attention class says of itself.

The class is chosen here and nowhere else; cache, FLOP counts and memory estimates ask it. A new
kind of attention is one class with these methods, one line in `attention_class` and its fields in
`ModelConfig`.
"""

from __future__ import annotations

from typing import Protocol

import jax

from dsjax.config import ModelConfig
from dsjax.model.gqa import GQA
from dsjax.model.layer_cache import EntryShape, LayerCache
from dsjax.model.mla import MLA


class Attention(Protocol):
    """Attention of one layer. Angles are rope's cosine and sine, float32 [B, T, R/2]."""

    @staticmethod
    def cached(config: ModelConfig) -> dict[str, EntryShape]:
        """Names what decoding caches per token and layer."""
        ...

    @staticmethod
    def matmul_parameters(config: ModelConfig) -> int:
        """Counts the weights of one layer that multiply a token."""
        ...

    @staticmethod
    def context_flops(config: ModelConfig, length: int, causal: bool) -> int:
        """Counts the operations per token of attending over a sequence of `length`: all of the
        square, or the causal half of it.
        """
        ...

    @staticmethod
    def latent_values(config: ModelConfig) -> int:
        """Counts what `remat="selective"` keeps per token as "latent"."""
        ...

    def __call__(
        self,
        x_BTD: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        segment_ids_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Attends causally within whole sequences, or within their segments: [B, T, D]."""
        ...

    def extend(
        self,
        x_BTD: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        cache: LayerCache,
        positions_BT: jax.Array,
    ) -> tuple[jax.Array, LayerCache]:
        """Adds tokens at consecutive positions to the cache and attends from them to it."""
        ...


def attention_class(config: ModelConfig) -> type[MLA] | type[GQA]:
    """Returns the class that `model.attention` names."""
    return {"mla": MLA, "gqa": GQA}[config.attention]
