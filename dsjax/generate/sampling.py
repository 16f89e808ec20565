"""Sampling the next token: temperature, top-k, top-p and min-p, with separate settings per row.

The filters run in the order of Hugging Face transformers: divide the logits by the temperature;
top-k keeps the k most likely tokens; top-p keeps the fewest of those whose renormalised
probabilities sum to at least p; min-p keeps tokens at least min_p times as likely as the most
likely one. Among equal logits the lower ids are kept. Every filter keeps a prefix of the tokens in
order of probability, so nothing is sorted: a bisection over the bits of the logits finds the last
token of the prefix.

A draw depends only on the seed and the position of its row, not on the rest of the batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_COLDEST = float(np.finfo(np.float32).tiny)  # some machines flush smaller values to zero
_RANDOM = "threefry2x32"  # fixed here: the process may have another default


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How one request draws its tokens; temperature 0 takes the most likely token.

    Raises:
      ValueError: a setting is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0  # 0 keeps every token
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature={self.temperature} must be finite and not negative; 0 takes the "
                "most likely token"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must not be negative; 0 keeps every token")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]; 1 keeps every token")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must lie in [0, 1]; 0 keeps every token")
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed={self.seed} must lie in [0, 2**32)")


class Knobs(NamedTuple):
    """The settings of a batch as arrays, so that one compiled program serves all settings."""

    temperature_B: jax.Array  # float32
    top_k_B: jax.Array  # int32
    top_p_B: jax.Array  # float32
    min_p_B: jax.Array  # float32
    keys_B: jax.Array  # random keys
    bias_BV: jax.Array | None = None  # float32, added to the logits before anything is drawn


def knobs(samplings: Sequence[Sampling]) -> Knobs:
    """Stacks the settings of a batch's rows into arrays; without a bias."""
    seeds_B2 = np.asarray([[0, sampling.seed] for sampling in samplings], np.uint32)
    temperature_B = [s.temperature if s.temperature >= _COLDEST else 0.0 for s in samplings]
    top_k_B = [min(sampling.top_k, np.iinfo(np.int32).max) for sampling in samplings]
    return Knobs(
        temperature_B=jnp.asarray(temperature_B, jnp.float32),
        top_k_B=jnp.asarray(top_k_B, jnp.int32),
        top_p_B=jnp.asarray([sampling.top_p for sampling in samplings], jnp.float32),
        min_p_B=jnp.asarray([sampling.min_p for sampling in samplings], jnp.float32),
        keys_B=jax.random.wrap_key_data(jnp.asarray(seeds_B2), impl=_RANDOM),
    )


def repeated(knobs: Knobs, times: int) -> Knobs:
    """Repeats each row's settings, for several tokens per row."""
    return jax.tree.map(lambda field: jnp.repeat(field, times, axis=0), knobs)


def biased(logits_BV: jax.Array, knobs: Knobs) -> jax.Array:
    """Adds the bias, if there is one; -inf forbids a token."""
    return logits_BV if knobs.bias_BV is None else logits_BV + knobs.bias_BV


def greedy(logits_BV: jax.Array) -> jax.Array:
    """Returns the most likely token of each row, int32 [B]; of equal logits the lowest id."""
    return jax.lax.platform_dependent(
        logits_BV,
        cpu=_first_greatest,
        default=lambda logits_BV: jnp.argmax(logits_BV, axis=-1).astype(jnp.int32),
    )


def probabilities(logits_BV: jax.Array, knobs: Knobs) -> jax.Array:
    """Returns the distribution that each row draws from, float32 [B, V]: filtered and
    renormalised, or one-hot at the most likely token where the temperature is 0.

    Args:
      logits_BV: float32.
    """
    logits_BV = biased(logits_BV, knobs)
    drawn_BV = jax.nn.softmax(_filtered(logits_BV, knobs), axis=-1)
    likeliest_BV = jax.nn.one_hot(greedy(logits_BV), logits_BV.shape[-1], dtype=jnp.float32)
    return jnp.where(knobs.temperature_B[:, None] > 0, drawn_BV, likeliest_BV)


def log_probabilities(
    logits_BV: jax.Array, tokens_B: jax.Array, knobs: Knobs
) -> tuple[jax.Array, jax.Array]:
    """Returns two log-probabilities of given tokens, float32 [B] each: under the model (log-softmax
    of the unscaled logits), and under the distribution that the row draws from (`probabilities`).

    Args:
      logits_BV: float32.
      tokens_B: int32.
    """

    def of_tokens(logs_BV: jax.Array) -> jax.Array:
        return jnp.take_along_axis(logs_BV, tokens_B[:, None], axis=-1)[:, 0]

    model_B = of_tokens(jax.nn.log_softmax(logits_BV, axis=-1))
    logits_BV = biased(logits_BV, knobs)
    drawn_B = of_tokens(jax.nn.log_softmax(_filtered(logits_BV, knobs), axis=-1))
    certain_B = jnp.where(tokens_B == greedy(logits_BV), 0.0, -jnp.inf)
    return model_B, jnp.where(knobs.temperature_B > 0, drawn_B, certain_B)


def kept(logits_BV: jax.Array, knobs: Knobs) -> jax.Array:
    """Marks the tokens among which each row draws, bool [B, V]: those that the filters keep, or the
    most likely one where the temperature is 0.

    Args:
      logits_BV: float32.
    """
    logits_BV = biased(logits_BV, knobs)
    drawn_BV = jnp.isfinite(_filtered(logits_BV, knobs))
    likeliest_BV = jax.nn.one_hot(greedy(logits_BV), logits_BV.shape[-1], dtype=bool)
    return jnp.where(knobs.temperature_B[:, None] > 0, drawn_BV, likeliest_BV)


def sample(logits_BV: jax.Array, knobs: Knobs, positions_B: jax.Array) -> jax.Array:
    """Draws a token for each row, int32 [B].

    Args:
      logits_BV: float32.
      positions_B: int32, the position that each token will take; it selects the random numbers.
    """

    logits_BV = biased(logits_BV, knobs)

    def draw() -> jax.Array:
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[-1:], jnp.float32))(
            jax.vmap(jax.random.fold_in)(knobs.keys_B, positions_B)
        )
        drawn_B = _first_greatest(_filtered(logits_BV, knobs) + noise_BV)
        return jnp.where(knobs.temperature_B > 0, drawn_B, greedy(logits_BV))

    return jax.lax.cond(jnp.any(knobs.temperature_B > 0), draw, lambda: greedy(logits_BV))


def _first_greatest(values_BV: jax.Array) -> jax.Array:
    """Returns what `jnp.argmax` does, in two reductions: XLA's CPU code for that one computes what
    it reduces one by one, which takes ten times as long.
    """
    ids_1V = jnp.arange(values_BV.shape[-1], dtype=jnp.int32)[None, :]
    greatest_B1 = jnp.max(values_BV, axis=-1, keepdims=True)
    return jnp.min(jnp.where(values_BV == greatest_B1, ids_1V, ids_1V[0, -1]), axis=-1)


def _filtered(logits_BV: jax.Array, knobs: Knobs) -> jax.Array:
    """Divides by the temperature, shifts each row's maximum to 0 and sets filtered-out tokens to
    -inf.
    """
    drawn_B = knobs.temperature_B > 0
    temperature_B = jnp.where(drawn_B, knobs.temperature_B, 1.0)
    behind_BV = jnp.max(logits_BV, axis=-1, keepdims=True) - logits_BV
    behind_BV = behind_BV / temperature_B[:, None]
    narrow_B = (knobs.top_k_B > 0) | (knobs.top_p_B < 1) | (knobs.min_p_B > 0)
    # The bisections are worth a branch: most batches filter nothing.
    kept_BV = jax.lax.cond(
        jnp.any(drawn_B & narrow_B),
        lambda: _kept(behind_BV, knobs),
        lambda: jnp.ones(behind_BV.shape, bool),
    )
    return jnp.where(kept_BV, -behind_BV, -jnp.inf)


def _kept(behind_BV: jax.Array, knobs: Knobs) -> jax.Array:
    """Marks the tokens that top-k, top-p and min-p keep, bool [B, V].

    Args:
      behind_BV: float32, how far each logit lies below its row's maximum.
    """
    everything_BV = jnp.ones(behind_BV.shape, bool)
    weight_BV = jnp.exp(-behind_BV)  # relative to the most likely token

    def top_k() -> jax.Array:
        n_tokens_B = jnp.where(knobs.top_k_B > 0, knobs.top_k_B, behind_BV.shape[-1])
        return _shortest_prefix(behind_BV, everything_BV.astype(jnp.int32), n_tokens_B)

    def top_p() -> jax.Array:
        among_BV = jnp.where(kept_BV, weight_BV, 0.0)
        enough_B = knobs.top_p_B * jnp.sum(among_BV, axis=-1)
        # With top_p = 1 a rounded sum could miss its target, and infinity is never reached.
        enough_B = jnp.where(knobs.top_p_B < 1, enough_B, jnp.inf)
        return _shortest_prefix(behind_BV, among_BV, enough_B)

    kept_BV = jax.lax.cond(jnp.any(knobs.top_k_B > 0), top_k, lambda: everything_BV)
    kept_BV &= jax.lax.cond(jnp.any(knobs.top_p_B < 1), top_p, lambda: everything_BV)
    return kept_BV & (weight_BV >= knobs.min_p_B[:, None])


def _shortest_prefix(behind_BV: jax.Array, amount_BV: jax.Array, enough_B: jax.Array) -> jax.Array:
    """Marks the fewest tokens, in order of likelihood and then of id, whose amounts sum to at least
    `enough_B`; all tokens where no prefix does. bool [B, V].
    """
    # Non-negative floats sort like their bit patterns, so the cutoff is found in 31 halvings.
    rank_BV = jax.lax.bitcast_convert_type(behind_BV, jnp.int32)
    ids_1V = jnp.arange(behind_BV.shape[-1], dtype=jnp.int32)[None, :]

    def up_to(rank_B: jax.Array, id_B: jax.Array) -> jax.Array:
        before_BV = rank_BV < rank_B[:, None]
        return before_BV | ((rank_BV == rank_B[:, None]) & (ids_1V <= id_B[:, None]))

    def enough(chosen_BV: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(chosen_BV, amount_BV, 0), axis=-1) >= enough_B

    last_B = jnp.full(enough_B.shape, ids_1V.shape[-1] - 1, jnp.int32)
    infinity_B = jnp.full(enough_B.shape, np.float32(np.inf).view(np.int32), jnp.int32)
    rank_B = _smallest(lambda rank_B: enough(up_to(rank_B, last_B)), infinity_B)
    id_B = _smallest(lambda id_B: enough(up_to(rank_B, id_B)), last_B)
    return up_to(rank_B, id_B)


def _smallest(holds: Callable[[jax.Array], jax.Array], greatest_B: jax.Array) -> jax.Array:
    """Bisects for the smallest value in 0 ... greatest_B for which the monotone `holds` is true;
    greatest_B if there is none. int32 [B].
    """

    def halve(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B, high_B = bounds
        middle_B = low_B + (high_B - low_B) // 2
        holds_B = holds(middle_B)
        return jnp.where(holds_B, low_B, middle_B + 1), jnp.where(holds_B, middle_B, high_B)

    def open_(bounds: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.any(bounds[0] < bounds[1])

    return jax.lax.while_loop(open_, halve, (jnp.zeros_like(greatest_B), greatest_B))[1]
