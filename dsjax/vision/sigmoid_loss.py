"""SigLIP's loss of pictures and their texts (Zhai et al., arXiv:2303.15343, section 3)."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

FIRST_LOG_SCALE, FIRST_BIAS = math.log(10), -10.0


class SigmoidLoss(NamedTuple):
    """The loss, a float32 scalar, and the logits of pairs, float32 [pictures, texts]."""

    loss: jax.Array
    logits_BB: jax.Array


def sigmoid_loss(
    pictures_BD: jax.Array, texts_BD: jax.Array, log_scale: jax.Array, bias: jax.Array
) -> SigmoidLoss:
    """Asks of every pair of a picture and a text whether they belong together.

      -1/B sum_ij log sigmoid(z_ij (exp(t') x_i . y_j + b)),   z_ij = 1 if i = j, else -1

    No pair depends on another, as pairs of a softmax do. A text that fits two pictures of a batch
    would be told not to fit one of them, so the texts must differ.

    Args:
      pictures_BD, texts_BD: float32, of length 1 each; the same row of both is a pair.
      log_scale, bias: t' and b, learned scalars that begin with FIRST_LOG_SCALE and FIRST_BIAS:
        nearly all pairs are wrong, and at first none is believed.
    """
    products_BB = jnp.einsum(
        "id,jd->ij", pictures_BD, texts_BD, precision=jax.lax.Precision.HIGHEST
    )
    logits_BB = jnp.exp(log_scale) * products_BB + bias
    signs_BB = 2 * jnp.eye(len(logits_BB)) - 1
    each_B = -jax.nn.log_sigmoid(signs_BB * logits_BB).sum(axis=-1)
    return SigmoidLoss(each_B.mean(), logits_BB)
