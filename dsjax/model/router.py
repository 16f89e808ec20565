"""The router: which experts each token goes to, and their weights.

One function serves every generation of models:

* DeepSeekMoE and V2-Lite: softmax scores; the best K of all experts.
* V2: softmax scores; experts form groups, ranked by their best expert, and only experts of the best
  groups are eligible.
* V3 and R1: sigmoid scores; a bias per expert is added for selection, but never to the weights;
  groups are ranked by the sum of their two best biased scores; the chosen experts' scores are
  normalised to sum to `route_scale`.
* V4: as V3 without groups, with scores sqrt(softplus(logit)).

Scores are computed in float32 from float32 weights on every platform.

Papers: DeepSeekMoE (arXiv:2401.06066) section 3; V2 (arXiv:2405.04434) section 2.2; V3
(arXiv:2412.19437) section 2.1.2.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dsjax.config import ModelConfig
from dsjax.kernels.expert_choice import Rule, expert_choice, fits
from dsjax.kernels.target import Target
from dsjax.model.layers import Constant, Normal, RouterState, declare
from dsjax.precision.matmul import float32_matmul


class Routing(NamedTuple):
    """The router's decision for M tokens."""

    experts_MK: jax.Array  # int32, order within a row unspecified
    weights_MK: jax.Array  # float32
    scores_ME: jax.Array  # float32, unbiased
    overruled_M: jax.Array  # bool, whether replayed choices replace others, in whatever order


def scores(logits_ME: jax.Array, score_func: str) -> jax.Array:
    """Computes the affinity of each token to each expert, above 0."""
    if score_func == "sqrtsoftplus":
        return jnp.sqrt(jax.nn.softplus(logits_ME))
    return (
        jax.nn.sigmoid(logits_ME) if score_func == "sigmoid" else jax.nn.softmax(logits_ME, axis=-1)
    )


def _mask_groups(choice_ME: jax.Array, n_groups: int, n_kept: int, group_score: str) -> jax.Array:
    """Masks the experts outside each token's best groups."""
    grouped_MGX = choice_ME.reshape(choice_ME.shape[0], n_groups, -1)
    if group_score == "top2":
        worth_MG = jax.lax.top_k(grouped_MGX, 2)[0].sum(axis=-1)
    else:
        worth_MG = grouped_MGX.max(axis=-1)
    kept = jax.lax.top_k(worth_MG, n_kept)[1]
    # Minus infinity, as in DeepSeek's own code: biased scores may be negative, so with the 0 of the
    # Hugging Face port a masked expert could win.
    kept_MG = jax.nn.one_hot(kept, n_groups, dtype=jnp.bool_).any(axis=1)
    return jnp.where(kept_MG[:, :, None], grouped_MGX, -jnp.inf).reshape(choice_ME.shape)


def select(scores_ME: jax.Array, bias_E: jax.Array | None, config: ModelConfig) -> jax.Array:
    """Chooses K experts for each token: int32 [M, K]."""
    choice_ME = scores_ME if bias_E is None else scores_ME + bias_E[None]
    if config.n_limited_groups < config.n_expert_groups:
        choice_ME = _mask_groups(
            choice_ME, config.n_expert_groups, config.n_limited_groups, config.group_score
        )
    return checkpoint_name(jax.lax.top_k(choice_ME, config.n_activated_experts)[1], "routing")


def weigh(scores_ME: jax.Array, experts_MK: jax.Array, config: ModelConfig) -> jax.Array:
    """Computes the chosen experts' weights from unbiased scores: float32 [M, K]."""
    # A token's experts differ. Said so, a TPU adds up the gradients without sorting them first.
    weights_MK = jax.vmap(
        lambda scores_E, chosen_K: scores_E.at[chosen_K].get(unique_indices=True)
    )(scores_ME, experts_MK)
    if config.norm_topk:
        weights_MK = weights_MK / (weights_MK.sum(axis=-1, keepdims=True) + 1e-20)
    return weights_MK * config.route_scale


def route(
    logits_ME: jax.Array,
    bias_E: jax.Array | None,
    config: ModelConfig,
    experts_MK: jax.Array | None = None,
) -> Routing:
    """Chooses experts and their weights.

    Args:
      logits_ME: float32.
      bias_E: float32 selection bias, or None.
      experts_MK: int32, choices to replay; weights still come from these logits, with gradients.
    """
    scores_ME = scores(logits_ME, config.score_func)
    own_MK = select(jax.lax.stop_gradient(scores_ME), bias_E, config)
    if experts_MK is None:
        experts_MK, overruled_M = own_MK, jnp.zeros(len(own_MK), bool)
    else:
        overruled_M = (jnp.sort(own_MK) != jnp.sort(experts_MK)).any(axis=-1)
    return Routing(experts_MK, weigh(scores_ME, experts_MK, config), scores_ME, overruled_M)


def rule_of(config: ModelConfig) -> Rule:
    """Returns how experts are chosen from sigmoid scores, for the kernel that does it."""
    return Rule(
        config.n_activated_experts,
        config.n_expert_groups,
        config.n_limited_groups,
        by_best_two=config.group_score == "top2",
        normalised=config.norm_topk,
        scale=config.route_scale,
    )


class Router(nnx.Module):
    def __init__(self, config: ModelConfig):
        self.weight = declare(
            (config.dim, config.n_routed_experts), ("router_embed", "norm"), Normal(config.init_std)
        )
        if config.router_bias:
            self.bias = declare((config.n_routed_experts,), ("norm",), Constant(0.0), RouterState)
        self.config = config

    @jax.named_scope("router")
    def __call__(self, x_MD: jax.Array, experts_MK: jax.Array | None = None) -> Routing:
        logits_ME = checkpoint_name(float32_matmul(x_MD, self.weight[...]), "routing")
        return route(logits_ME, self._bias, self.config, experts_MK)

    @jax.named_scope("router")
    def extend(
        self, x_MD: jax.Array, target: Target, experts_MK: jax.Array | None = None
    ) -> Routing:
        """Routes tokens that are added to a cache, where the machine has one by a kernel."""
        config = self.config
        if experts_MK is not None or not self._by_kernel(target):
            return self(x_MD, experts_MK)
        logits_ME = float32_matmul(x_MD, self.weight[...])
        bias_1E = None if self._bias is None else self._bias[None]
        chosen = expert_choice(logits_ME[None], bias_1E, jnp.int32(0), rule_of(config))
        overruled_M = jnp.zeros(len(x_MD), bool)
        return Routing(*chosen, scores(logits_ME, config.score_func), overruled_M)

    @jax.named_scope("router")
    def choose(
        self, logits_XME: jax.Array, layer: jax.Array, target: Target
    ) -> tuple[jax.Array, jax.Array]:
        """Chooses by the router of one layer, in few kernels: int32 and float32 [M, K].

        Must be called on the stack of all layers.

        Args:
          logits_XME: float32, parts of the logits, to be summed.
        """
        config = self.config
        if self._by_kernel(target):
            return expert_choice(logits_XME, self._bias, layer, rule_of(config))
        bias_E = None if self._bias is None else self._bias[layer]
        routing = route(logits_XME.sum(axis=0), bias_E, config)
        return routing.experts_MK, routing.weights_MK

    def _by_kernel(self, target: Target) -> bool:
        config = self.config
        return config.score_func == "sigmoid" and fits(config.n_routed_experts, target)

    @property
    def _bias(self) -> jax.Array | None:
        return self.bias[...] if self.config.router_bias else None
