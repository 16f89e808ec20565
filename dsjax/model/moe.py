"""DeepSeekMoE: shared experts that process every token, and routed experts that a router chooses.
No token is dropped.

Paper: DeepSeekMoE (arXiv:2401.06066) section 3; V3 (arXiv:2412.19437) section 2.1.2.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec
from jax.tree_util import Partial

from dsjax.config import ModelConfig
from dsjax.kernels import grouped_mixture, mixture_step
from dsjax.kernels.chosen_experts import chosen_experts, grouped_in_place, is_faster
from dsjax.kernels.grouped_matmul import grouped_matmul
from dsjax.kernels.mixture_step import Matrices
from dsjax.kernels.varying import agreed, varies_over, vary_as
from dsjax.model.balance import BalanceWeights, balance_loss
from dsjax.model.layers import FeedForward, Normal, RMSNorm, declare
from dsjax.model.parameters import partition_specs
from dsjax.model.router import Router, Routing
from dsjax.parallel import expert_parallel
from dsjax.parallel.expert_parallel import gather_weight
from dsjax.parallel.expert_slots import replicas
from dsjax.parallel.routing_plan import count
from dsjax.parallel.sharding import partition_spec, parts_here, split_axes
from dsjax.parallel.shards import Specs, on_shards
from dsjax.precision.activations import limited, swiglu, swiglu_grouped_linear, weighted_swiglu
from dsjax.precision.bands import as_factor
from dsjax.precision.matmul import grouped_linear
from dsjax.precision.policy import Policy
from dsjax.precision.small_weights import Weight, at_use


class RoutingStatistics(NamedTuple):
    """What a layer reports of its routing; the scan stacks it over layers."""

    counts_E: jax.Array  # int32, tokens of each expert, without padding
    balance_loss: jax.Array  # float32 scalar, weighted
    dropped_tokens: jax.Array  # int32 scalar, assignments that no expert computed
    overruled_BT: jax.Array  # bool, whether the router would not have chosen what was replayed


class ReplicaSlots(nnx.Variable):
    """The slots that hold each expert's replicas, int32 [E, X], then -1."""


class Experts(nnx.Module):
    """The routed experts' weights, stacked.

    Attributes:
      slots: with redundant experts, which `dsjax.model.redundant_experts` sets up: the leading
        dimension of the weights counts slots then. None: expert e is number e.
    """

    slots: ReplicaSlots | None = None

    def __init__(self, config: ModelConfig, policy: Policy):
        init = Normal(config.init_std)
        E, D, F = config.n_routed_experts, config.dim, config.moe_inter_dim
        self.w_gate = declare((E, D, F), ("experts", "expert_embed", "ffn"), init)
        self.w_up = declare((E, D, F), ("experts", "expert_embed", "ffn"), init)
        self.w_down = declare((E, F, D), ("experts", "ffn", "expert_embed"), init)
        self.policy = policy
        self.limit = config.swiglu_limit

    def at_use(self, like: jax.Array) -> Partial:
        """Returns the experts as a function of rows sorted by expert, [A, D], of the number of rows
        of each expert, and of the weight of each row's output, float32 [A].

        Inside `shard_map` these are the device's own experts, with their widths gathered from the
        devices that split them.

        Args:
          like: an array that differs between devices along the same mesh axes as the rows.
        """
        policy, limit, axes = self.policy, self.limit, split_axes("expert_embed")

        def gathered(variable: nnx.Variable, dim: int) -> Weight:
            def gather(leaf: jax.Array) -> jax.Array:
                return vary_as(gather_weight(leaf, dim, axes, policy.travels(leaf.dtype)), like)

            return jax.tree.map(gather, variable[...])

        def experts(
            w_gate: Weight,
            w_up: Weight,
            w_down: Weight,
            x_AD: jax.Array,
            sizes_E: jax.Array,
            weights_A: jax.Array,
        ) -> jax.Array:
            # With tensor parallelism outputs are partial sums, and so are the inputs' gradients:
            # marked as varying, they are summed over the devices.
            split = jax.tree.leaves(w_gate)[0]
            x_AD, weights_A = vary_as(x_AD, split), vary_as(weights_A, split)
            gate, up = (grouped_linear(x_AD, w, sizes_E, policy) for w in (w_gate, w_up))
            gate, up = limited(gate, up, limit)
            return swiglu_grouped_linear(gate, up, weights_A, w_down, sizes_E, policy)

        w_gate, w_up = gathered(self.w_gate, 1), gathered(self.w_up, 1)
        return Partial(experts, w_gate, w_up, gathered(self.w_down, 2))

    @property
    def stays_stacked(self) -> bool:
        """Tells whether `in_stack` suits these weights, the current mesh and the target."""
        plain = isinstance(self.w_gate[...], jax.Array) and not self.policy.fp8
        whole = parts_here("expert_embed") == 1 and self.slots is None
        return plain and whole and self.policy.target.kind == "tpu"

    def in_stack(self, layer: jax.Array) -> Partial:
        """Returns what `at_use` returns for one layer of the stack of all layers, without taking
        its weights out of the stack; no width of them may be split. Has no gradient.
        """
        policy, limit = self.policy, self.limit

        def experts(
            layer: jax.Array,
            w_gate: jax.Array,
            w_up: jax.Array,
            w_down: jax.Array,
            x_AD: jax.Array,
            sizes_E: jax.Array,
            weights_A: jax.Array,
        ) -> jax.Array:
            def product(x_AX: jax.Array, w_LEXX: jax.Array) -> jax.Array:
                n_layers, E, *widths = w_LEXX.shape
                w = vary_as(w_LEXX.reshape(n_layers * E, *widths), x_AX)
                x_AX = vary_as(x_AX, w)
                return grouped_matmul(x_AX, w, sizes_E, policy.target, first=layer * E)

            gate, up = product(x_AD, w_gate), product(x_AD, w_up)
            return product(weighted_swiglu(*limited(gate, up, limit), weights_A), w_down)

        return Partial(experts, layer, self.w_gate[...], self.w_up[...], self.w_down[...])

    def chosen(self, x_MD: jax.Array, routing: Routing, layer: jax.Array) -> jax.Array:
        """Runs the chosen experts of one layer: [M, D] -> [M, D].

        Must be called on the stack of all layers.
        """
        n_layers, E = self.w_gate.shape[:2]

        # The layer is selected by the experts' numbers: slicing it out would read all its experts.
        def flat(variable: nnx.Variable) -> Weight:
            return jax.tree.map(
                lambda leaf: leaf.reshape(n_layers * E, *leaf.shape[2:]), variable[...]
            )

        return chosen_experts(
            x_MD,
            flat(self.w_gate),
            flat(self.w_up),
            flat(self.w_down),
            routing.experts_MK + layer * E,
            routing.weights_MK,
            self.policy.target,
            as_factor if self.policy.target.kind == "cpu" else at_use,
            lambda gate, up: swiglu(*limited(gate, up, self.limit)),
            n_experts=E,
        )


class MoE(nnx.Module):
    def __init__(self, config: ModelConfig, policy: Policy):
        self.gate = Router(config)
        self.experts = Experts(config, policy)
        if config.n_shared_experts:
            hidden = config.n_shared_experts * config.moe_inter_dim
            self.shared = FeedForward(
                config.dim, hidden, config.init_std, policy, config.swiglu_limit
            )
        self.config = config

    @jax.named_scope("experts")
    def __call__(
        self,
        x_BTD: jax.Array,
        documents_BT: jax.Array,
        balance: BalanceWeights | None,
        experts_BTK: jax.Array | None = None,
        *,
        length: str = "length",
        stack: tuple[Experts, jax.Array] | None = None,
        recomputed: bool = False,
    ) -> tuple[jax.Array, RoutingStatistics, jax.Array]:
        """Routes whole sequences.

        Args:
          experts_BTK: int32, choices to replay; None: the router chooses.
          length: logical name of the tokens' dimension; "tokens" if sequences must stay whole.
          stack: the experts of all layers, and which of them these are, to use them where they lie.
          recomputed: whether the backward pass computes the layer again and keeps nothing of it.

        Returns:
          the output, the statistics, and the chosen experts, int32 [B, T, K].
        """
        config = self.config
        experts, layer = stack or (self.experts, None)
        # Inside a pipeline `on_shards` computes the layer again already.
        recomputed &= not jax.sharding.get_abstract_mesh().manual_axes
        y_BTD, routing, counts_E, dropped_tokens = on_shards(
            partial(self._routed, length=length, recomputed=recomputed),
            (self.gate, experts, layer, x_BTD, documents_BT, experts_BTK),
            self._specs(experts, x_BTD, length),
        )
        if config.n_shared_experts:
            y_BTD = y_BTD + self.shared(x_BTD)
        loss = balance_loss(routing, documents_BT, balance, config) if balance else jnp.float32(0)
        overruled_BT = routing.overruled_M.reshape(x_BTD.shape[:2])
        statistics = RoutingStatistics(counts_E, loss, dropped_tokens, overruled_BT)
        return y_BTD, statistics, routing.experts_MK.reshape(*x_BTD.shape[:2], -1)

    def _specs(
        self, experts: Experts, x_BTD: jax.Array, length: str
    ) -> Callable[[AbstractMesh], Specs]:
        def specs(mesh: AbstractMesh) -> Specs:
            tokens = partition_spec(("batch", length, "width"), x_BTD.shape, mesh, "tokens")
            rows = partition_spec(("batch", length), x_BTD.shape[:2], mesh, "tokens")
            everywhere = PartitionSpec()
            return (
                (everywhere, partition_specs(experts, mesh), everywhere, tokens, rows, tokens),
                (tokens, tokens, everywhere, everywhere),
            )

        return specs

    def _routed(
        self,
        gate: Router,
        experts: Experts,
        layer: jax.Array | None,
        x_btD: jax.Array,
        documents_bt: jax.Array,
        experts_btK: jax.Array | None,
        *,
        length: str,
        recomputed: bool,
    ) -> tuple[jax.Array, Routing, jax.Array, jax.Array]:
        """Routes a device's tokens and runs the routed experts on them.

        Returns:
          the output, and the routing as [b, t, ...]; for the whole batch, the tokens of each expert
          without padding, and the number of assignments that no expert computed.
        """
        config, policy = self.config, experts.policy
        x_mD = x_btD.reshape(-1, x_btD.shape[-1])
        replayed = experts_btK is not None
        routing = gate(x_mD, experts_btK.reshape(len(x_mD), -1) if replayed else None)
        E, n_ranks = config.n_routed_experts, parts_here("experts")
        K, slots_mK, n_slots = config.n_activated_experts, routing.experts_MK, E
        max_ranks = expert_parallel.max_ranks_per_token(
            E, n_ranks, K, config.n_expert_groups, config.n_limited_groups
        )
        if experts.slots is not None:
            slots_mK = replicas(routing.experts_MK, experts.slots[...], n_ranks)
            n_slots, max_ranks = experts.w_gate.shape[0] * n_ranks, min(K, n_ranks)
        y_mD, computed = expert_parallel.mixture(
            experts.at_use(x_mD) if layer is None else experts.in_stack(layer),
            x_mD,
            slots_mK,
            routing.weights_MK,
            n_experts=n_slots,
            n_ranks=n_ranks,
            transport=expert_parallel.choose_transport(n_ranks, max_ranks, policy.target),
            max_ranks=max_ranks,
            fp8=policy.fp8 is not None,
            recomputed=recomputed,
        )
        y_mD = jax.lax.psum(y_mD, split_axes("ffn"))
        # Where sequences stay whole, devices along `context` have the same tokens and sums.
        y_mD = agreed(y_mD, varies_over(y_mD) - varies_over(x_mD))
        counted = jnp.where(documents_bt.reshape(-1, 1) > 0, routing.experts_MK, E)
        counts_E = count(counted, E)
        missing = routing.experts_MK.size - computed
        everywhere = split_axes("batch", length)
        return (
            y_mD.reshape(x_btD.shape),
            jax.tree.map(lambda x: x.reshape(*x_btD.shape[:2], -1), routing),
            jax.lax.psum(counts_E, everywhere),
            jax.lax.psum(missing, everywhere),
        )

    def steps(self, x_BTD: jax.Array) -> bool:
        """Tells whether `step` takes these tokens, here.

        Must be called on the stack of all layers.
        """
        experts, config = self.experts, self.config
        M = x_BTD.shape[0] * x_BTD.shape[1]
        matrices = [*_matrices(experts), *(self._shared_matrices or ())]
        return (
            experts.policy.fp8 is None
            and experts.slots is None
            and _on_one_device()
            and mixture_step.fits(
                jax.ShapeDtypeStruct((M, config.dim), x_BTD.dtype),
                self.gate.weight[...],
                matrices,
                experts.policy.target,
            )
        )

    def step(
        self, x_BTD: jax.Array, norm: RMSNorm, layer: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Does what is left of a layer after its attention, in a few kernels that read the layer's
        weights where they lie.

        Must be called on the stack of all layers.

        Args:
          x_BTD: the residual after attention.
          norm: the layers' norms before their experts.

        Returns:
          the residual, and the chosen experts, int32 [B, T, K].
        """
        x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
        policy, limit = self.experts.policy, self.experts.limit
        normed_MD, logits_XME = mixture_step.normed_logits(
            x_MD, norm.weight[...], self.gate.weight[...], layer, eps=norm.eps
        )
        experts_MK, weights_MK = self.gate.choose(logits_XME, layer, policy.target)
        matrices = _matrices(self.experts), self._shared_matrices
        chosen = mixture_step.Chosen(*matrices, experts_MK, weights_MK, layer)
        # Beyond as many choices as there are experts, each is read once for all rows.
        many = experts_MK.size > self.config.n_routed_experts
        kernels = grouped_mixture if many else mixture_step
        hidden_MX = kernels.hidden_states(
            normed_MD, chosen, lambda gate, up: swiglu(*limited(gate, up, limit))
        )
        y_MD = kernels.mixed(x_MD, hidden_MX, chosen)
        return y_MD.reshape(x_BTD.shape), experts_MK.reshape(*x_BTD.shape[:2], -1)

    @property
    def _shared_matrices(self) -> Matrices | None:
        return _matrices(self.shared) if self.config.n_shared_experts else None

    def extend(
        self,
        x_BTD: jax.Array,
        stack: Experts,
        layer: jax.Array,
        experts_BTK: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Routes tokens that are added to a cache.

        Args:
          stack: the experts of all layers, of which this is number `layer`.
          experts_BTK: int32, choices that are made already; None: the router chooses.

        Returns:
          the output, and the chosen experts, int32 [B, T, K].
        """
        config, policy = self.config, stack.policy
        n_tokens = x_BTD.shape[0] * x_BTD.shape[1]
        E, K = config.n_routed_experts, config.n_activated_experts
        stacks = stack.w_gate[...], stack.w_up[...], stack.w_down[...]
        reads = grouped_in_place(x_BTD.dtype, stacks, policy.target)
        in_place = is_faster(n_tokens, K, E, policy.target, in_place=reads)
        if not (in_place and _on_one_device()) or policy.fp8:
            documents_BT = jnp.ones(x_BTD.shape[:2], jnp.int32)
            y_BTD, _, experts_BTK = self(
                x_BTD,
                documents_BT,
                None,
                experts_BTK,
                length="tokens",
                stack=(stack, layer) if stack.stays_stacked else None,
            )
            return y_BTD, experts_BTK
        x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
        made = experts_BTK is not None
        replayed_MK = experts_BTK.reshape(len(x_MD), -1) if made else None
        routing = self.gate.extend(x_MD, policy.target, replayed_MK)
        y_BTD = stack.chosen(x_MD, routing, layer).reshape(x_BTD.shape)
        if config.n_shared_experts:
            y_BTD = y_BTD + self.shared(x_BTD)
        return y_BTD, routing.experts_MK.reshape(*x_BTD.shape[:2], -1)


def _on_one_device() -> bool:
    return parts_here("experts") == parts_here("expert_embed") == parts_here("ffn") == 1


def _matrices(module: Experts | FeedForward) -> Matrices:
    return Matrices(module.w_gate[...], module.w_up[...], module.w_down[...])
