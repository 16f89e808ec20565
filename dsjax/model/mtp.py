"""Multi-token prediction (MTP): module k predicts the token k + 1 positions ahead.

At position i, module k joins the normed embedding of token i + k with the normed hidden state of
module k - 1 (the main model's for k = 1), projects the pair to the model width and runs one
transformer layer. Embedding and output head are the main model's; the norm before the head is the
module's own.

Paper: V3 (arXiv:2412.19437) section 2.2, equations 21 to 25. Departures:

1. The embedding comes first in the joined pair, as in the released `eh_proj`; the paper puts the
   hidden state first.
2. The first module reads the main model's state after the final norm (`mtp_after_final_norm`). The
   paper leaves this open, and public loaders differ. Deeper modules read the layer output of the
   module before.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.config import ModelConfig
from dsjax.kernels.sparse_attention import Lesson
from dsjax.model.balance import BalanceWeights
from dsjax.model.block import Block, Context, Statistics
from dsjax.model.layers import Normal, RMSNorm, declare
from dsjax.precision.matmul import linear
from dsjax.precision.policy import Policy


class MTP(nnx.Module):
    def __init__(self, config: ModelConfig, policy: Policy, layer: Block):
        self.enorm = RMSNorm(config.dim, config.norm_eps)
        self.hnorm = RMSNorm(config.dim, config.norm_eps)
        self.eh_proj = declare(
            (2 * config.dim, config.dim), ("latent", "embed"), Normal(config.init_std)
        )
        self.layer = layer
        self.norm = RMSNorm(config.dim, config.norm_eps)
        # The projection does not train in FP8: the published FP8 checkpoint has it in bfloat16.
        self.policy = dataclasses.replace(policy, fp8=None)

    def __call__(
        self,
        embedding_BTD: jax.Array,
        hidden_BTD: jax.Array,
        context: Context,
        balance: BalanceWeights | None,
        experts_BTK: jax.Array | None = None,
        lesson: Lesson | None = None,
    ) -> tuple[jax.Array, Statistics]:
        """Advances the hidden states by one token, given that token's embedding."""
        pair_BTD = self.join(embedding_BTD, hidden_BTD)
        return self.layer(pair_BTD, context, balance, experts_BTK, lesson)

    def join(self, embedding_BTD: jax.Array, hidden_BTD: jax.Array) -> jax.Array:
        """Projects the pair to the model width, as the module's layer reads it."""
        pair = jnp.concatenate([self.enorm(embedding_BTD), self.hnorm(hidden_BTD)], axis=-1)
        return linear(pair, self.eh_proj[...], self.policy)
