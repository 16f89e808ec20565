"""Choosing the next token, and a plain way to continue a text.

`complete` runs the whole window again for each token. That suits the sample at the end of a
training run, where a compiled cache would cost more than it saves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np


def greedy(logits_BV: jax.Array) -> jax.Array:
    """The likeliest token of each row, int32 [B]."""
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)


def keep_top_p(logits_BV: jax.Array, top_p: float) -> jax.Array:
    """Sets to -inf all but the fewest tokens whose probabilities together reach `top_p`."""
    order_BV = jnp.argsort(-logits_BV, axis=-1)
    sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
    probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    kept_BV = jnp.where(before_BV < top_p, sorted_BV, -jnp.inf).at[:, 0].set(sorted_BV[:, 0])
    return jnp.take_along_axis(kept_BV, jnp.argsort(order_BV, axis=-1), axis=-1)


def sample(
    key: jax.Array, logits_BV: jax.Array, *, temperature: float = 1.0, top_p: float = 1.0
) -> jax.Array:
    """Draws a token for each row, int32 [B]; temperature 0 is greedy.

    Args:
      logits_BV: float32.

    Raises:
      ValueError: temperature is negative, or top_p lies outside (0, 1].
    """
    if temperature < 0:
        raise ValueError(
            f"temperature={temperature} must not be negative; 0 takes the likeliest token"
        )
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must lie in (0, 1]; 1 keeps every token")
    if temperature == 0:
        return greedy(logits_BV)
    logits_BV = logits_BV / temperature
    if top_p < 1:
        logits_BV = keep_top_p(logits_BV, top_p)
    return jax.random.categorical(key, logits_BV, axis=-1).astype(jnp.int32)


def complete(
    model: Callable[[jax.Array], jax.Array],
    prompt: Sequence[int],
    *,
    n_tokens: int,
    window: int,
    seed: int = 0,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> list[int]:
    """Continues `prompt` by `n_tokens` tokens, each from the last `window` tokens before it.

    Args:
      model: a pytree that maps tokens int32 [1, window] to logits float32 [1, window, V].

    Raises:
      ValueError: the prompt is empty.
    """
    if not prompt:
        raise ValueError(
            "an empty prompt has no next token; start with the beginning-of-sequence token"
        )

    @jax.jit
    def next_token(
        model: Callable, window_1T: jax.Array, last: jax.Array, key: jax.Array
    ) -> jax.Array:
        logits_1V = jax.lax.dynamic_index_in_dim(model(window_1T), last, axis=1, keepdims=False)
        return sample(key, logits_1V, temperature=temperature, top_p=top_p)[0]

    tokens = list(prompt)
    key = jax.random.key(seed)
    for index in range(n_tokens):
        recent = tokens[-window:]
        padded = np.zeros((1, window), np.int32)
        padded[0, : len(recent)] = recent  # what follows a position does not reach it
        last = jnp.int32(len(recent) - 1)
        tokens.append(int(next_token(model, padded, last, jax.random.fold_in(key, index))))
    return tokens[len(prompt) :]
