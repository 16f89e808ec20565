"""DeepSeekMoE: shared experts that see every token, and routed experts that a router chooses. No
token is dropped.

Paper: DeepSeekMoE (arXiv:2401.06066) section 3; V3 (arXiv:2412.19437) section 2.1.2.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.config import ModelConfig
from dsjax.kernels.chosen_experts import chosen_experts
from dsjax.model.balance import BalanceWeights, balance_loss
from dsjax.model.layers import FeedForward, Normal, declare
from dsjax.model.router import Router, Routing
from dsjax.parallel import expert
from dsjax.precision.activations import swiglu_grouped_linear
from dsjax.precision.matmul import grouped_linear
from dsjax.precision.policy import Policy

# As many rows as the grouped product gives an expert at least.
_FEW_TOKENS = 32


class RoutingStatistics(NamedTuple):
    """What a layer reports of its routing, as values; stacked over layers by the scan."""

    counts_E: jax.Array  # int32, tokens of each expert, padding left out
    balance_loss: jax.Array  # float32 scalar, weighted
    dropped_tokens: jax.Array  # int32 scalar, assignments that no expert computed


class Experts(nnx.Module):
    """The routed experts' weights, stacked."""

    def __init__(self, config: ModelConfig, policy: Policy):
        init = Normal(config.init_std)
        E, D, F = config.n_routed_experts, config.dim, config.moe_inter_dim
        self.w_gate = declare((E, D, F), ("experts", "embed", "ffn"), init)
        self.w_up = declare((E, D, F), ("experts", "embed", "ffn"), init)
        self.w_down = declare((E, F, D), ("experts", "ffn", "embed"), init)
        self.policy = policy

    def __call__(self, x_AD: jax.Array, sizes_E: jax.Array) -> jax.Array:
        """Rows sorted by expert, `sizes_E` rows each: [A, D] -> [A, D]."""
        gate, up = (
            grouped_linear(x_AD, w[...], sizes_E, self.policy) for w in (self.w_gate, self.w_up)
        )
        return swiglu_grouped_linear(gate, up, self.w_down[...], sizes_E, self.policy)

    def few(self, x_MD: jax.Array, routing: Routing, layer: jax.Array) -> jax.Array:
        """Dispatch, experts and combine for a few tokens of one layer, this being the stack of all
        layers: [M, D] -> [M, D]. To slice the layer out would read all its experts.
        """
        n_layers, E = self.w_gate.shape[:2]

        def flat(variable: nnx.Variable) -> jax.Array:
            return variable[...].reshape(n_layers * E, *variable.shape[2:])

        return chosen_experts(
            x_MD,
            flat(self.w_gate),
            flat(self.w_up),
            flat(self.w_down),
            routing.experts_MK + layer * E,
            routing.weights_MK,
        )


class MoE(nnx.Module):
    def __init__(self, config: ModelConfig, policy: Policy):
        self.gate = Router(config)
        self.experts = Experts(config, policy)
        if config.n_shared_experts:
            hidden = config.n_shared_experts * config.moe_inter_dim
            self.shared = FeedForward(config.dim, hidden, config.init_std, policy)
        self.config = config

    def __call__(
        self, x_BTD: jax.Array, documents_BT: jax.Array, balance: BalanceWeights | None
    ) -> tuple[jax.Array, RoutingStatistics]:
        config = self.config
        x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
        routing = self.gate(x_MD)
        plan = expert.plan(routing.experts_MK, config.n_routed_experts)
        y_AD = self.experts(expert.dispatch(x_MD, plan), plan.sizes_E)
        y_BTD = expert.combine(y_AD, routing.weights_MK, plan).reshape(x_BTD.shape)
        if config.n_shared_experts:
            y_BTD = y_BTD + self.shared(x_BTD)
        counted = jnp.where(
            documents_BT.reshape(-1, 1) > 0, routing.experts_MK, config.n_routed_experts
        )
        statistics = RoutingStatistics(
            # One bin more than experts takes the padding.
            jnp.bincount(counted.reshape(-1), length=config.n_routed_experts + 1)[:-1].astype(
                jnp.int32
            ),
            balance_loss(routing, documents_BT, balance, config) if balance else jnp.float32(0),
            routing.experts_MK.size - plan.sizes_E.sum(),
        )
        return y_BTD, statistics

    def extend(self, x_BTD: jax.Array, stack: Experts, layer: jax.Array) -> jax.Array:
        """The output alone, for tokens that are added to a cache.

        Args:
          stack: the experts of all layers, of which this is number `layer`.
        """
        few = x_BTD.shape[0] * x_BTD.shape[1] <= _FEW_TOKENS
        if not few or stack.policy.platform != "cpu" or stack.policy.fp8:
            documents_BT = jnp.ones(x_BTD.shape[:2], jnp.int32)
            return self(x_BTD, documents_BT, None)[0]
        x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
        y_BTD = stack.few(x_MD, self.gate(x_MD), layer).reshape(x_BTD.shape)
        return y_BTD + self.shared(x_BTD) if self.config.n_shared_experts else y_BTD
