"""Sets of token ids as bits, 32 ids per word; id i is bit i % 32 of word i // 32.

Where top-k or top-p cut a distribution, training must renormalize over the same ids. A threshold
would not name them: the trainer's logits differ from the engine's in the last bits. The bits do, in
V / 8 bytes per token, 16 KB for V3's vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

WIDTH = 32
EVERYTHING = 0xFFFFFFFF  # a word of a set that has all ids


def n_words(vocab_size: int) -> int:
    """Returns the number of words of a set, X."""
    return -(-vocab_size // WIDTH)


def pack(members: jax.Array) -> jax.Array:
    """Packs marked ids, bool [..., V], into words, uint32 [..., X]."""
    *shape, size = members.shape
    members = jnp.pad(members, ((0, 0),) * len(shape) + ((0, -size % WIDTH),))
    bits = members.reshape(*shape, -1, WIDTH).astype(jnp.uint32)
    return (bits << _places(bits.shape)).sum(axis=-1, dtype=jnp.uint32)


def unpack(words: jax.Array, vocab_size: int) -> jax.Array:
    """Undoes `pack`."""
    bits = words[..., None] >> _places((*words.shape, WIDTH)) & jnp.uint32(1)
    return bits.reshape(*words.shape[:-1], -1)[..., :vocab_size] != 0


def _places(shape: tuple[int, ...]) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
