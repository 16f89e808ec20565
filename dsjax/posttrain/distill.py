"""Distillation by logits: a student learns a teacher's distribution over the next token.

  forward_kl   sum_v p_T log(p_T / p_S): the student covers all that the teacher might say
  reverse_kl   sum_v p_S log(p_S / p_T): the student keeps to what the teacher would say; on its own
               samples this is on-policy distillation (arXiv:2306.13649, arXiv:2306.08543)
  top_k_kl     the forward one when only the teacher's likeliest tokens are known

Both distributions are taken at a temperature tau, softmax(logits / tau), and the loss is multiplied
by tau^2, which keeps the size of its gradient (Hinton et al., arXiv:1503.02531, section 2).

`forward_kl` and its siblings are `dsjax.model.head.TokenLoss`es without the walk over chunks: they
return values and the derivatives by the student's logits, so that the logits of a batch, of either
model, never exist at once. DeepSeek-R1 itself distilled by its samples alone (arXiv:2501.12948,
section 2.4), which is fine-tuning.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

Valued = tuple[jax.Array, jax.Array]  # losses [...], derivatives by the student's logits [..., V]


class TopK(NamedTuple):
    """A teacher's likeliest next tokens, at some temperature."""

    ids: jax.Array  # int32 [..., K], the likeliest first
    # float32 [..., K + 1]: log-probabilities of these, and of all other tokens together
    logp: jax.Array


def forward_kl(student: jax.Array, teacher: jax.Array, temperature: float) -> Valued:
    """Compares logits [..., V] by KL(teacher, student), in nats, times the squared temperature.

    The derivative is temperature * (p_S - p_T).
    """
    log_p, log_q = (_log_softmax(logits, temperature) for logits in (teacher, student))
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    values = _times(p, log_p - log_q).sum(axis=-1)
    return temperature**2 * values, temperature * (q - p)


def reverse_kl(student: jax.Array, teacher: jax.Array, temperature: float) -> Valued:
    """Compares logits [..., V] by KL(student, teacher), in nats, times the squared temperature.

    The derivative is temperature * p_S (log(p_S / p_T) - KL).
    """
    log_p, log_q = (_log_softmax(logits, temperature) for logits in (teacher, student))
    q = jnp.exp(log_q)
    values = _times(q, log_q - log_p).sum(axis=-1)
    return temperature**2 * values, temperature * _times(q, log_q - log_p - values[..., None])


def top_k(logits: jax.Array, k: int, temperature: float) -> TopK:
    """Returns the `k` likeliest tokens under logits [..., V]."""
    log_p = _log_softmax(logits, temperature)
    best, ids = jax.lax.top_k(log_p, k)
    # The rest is summed up: subtracted from 1, float32 would leave nothing of it.
    others = jnp.where(_spread(ids, best, log_p) > -jnp.inf, -jnp.inf, log_p)
    rest = jax.nn.logsumexp(others, axis=-1, keepdims=True)
    return TopK(ids.astype(jnp.int32), jnp.concatenate([best, rest], axis=-1))


def top_k_kl(student: jax.Array, teacher: TopK, temperature: float) -> Valued:
    """Compares the student's logits [..., V] with a teacher's likeliest tokens.

    All other tokens count as one: the loss is the forward KL over K + 1 outcomes, times the squared
    temperature. It is a lower bound of the KL over the vocabulary, equal to it for K = V, and 0
    only where the student agrees on the K and hence on the mass of the rest. (To scale the K up to
    1 instead would teach the student that nothing else is ever said.)

    Args:
      teacher: of the same temperature.
    """
    log_q = _log_softmax(student, temperature)
    log_p = _spread(teacher.ids, teacher.logp[..., :-1], student)
    known = log_p > -jnp.inf
    log_rest_p = teacher.logp[..., -1]
    log_rest_q = jax.nn.logsumexp(jnp.where(known, -jnp.inf, log_q), axis=-1)
    p, rest_p = jnp.exp(log_p), jnp.exp(log_rest_p)
    values = _times(p, log_p - log_q).sum(axis=-1) + _times(rest_p, log_rest_p - log_rest_q)
    # What the teacher gives to the rest, shared out as the student shares it.
    shared = rest_p[..., None] * jnp.exp(log_q - log_rest_q[..., None])
    wanted = jnp.where(known, p, shared)
    return temperature**2 * values, temperature * (jnp.exp(log_q) - wanted)


def _spread(ids: jax.Array, values: jax.Array, like: jax.Array) -> jax.Array:
    """Returns the values [..., K] at their ids, and minus infinity elsewhere, shaped as `like`."""
    nothing = jnp.full_like(like, -jnp.inf)
    return jnp.put_along_axis(nothing, ids, values, axis=-1, inplace=False)


def _log_softmax(logits: jax.Array, temperature: float) -> jax.Array:
    return jax.nn.log_softmax(logits / temperature, axis=-1)


def _times(probability: jax.Array, log_ratio: jax.Array) -> jax.Array:
    # 0 log 0 is 0: a token that a distribution excludes has the logit minus infinity.
    return jnp.where(probability > 0, probability * log_ratio, 0.0)
