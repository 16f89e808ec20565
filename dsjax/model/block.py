"""One transformer layer, and scans over stacks of layers.

A stack is one `Block` whose parameters have a leading layer dimension. `run_layers` scans over it
with whole sequences, `extend_layers` with tokens that are added to a cache. Layers that are arrays
of their own run one after the other (`dsjax.model.separate_layers`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.config import ModelConfig
from dsjax.kernels.sparse_attention import Lesson
from dsjax.model.attention import Attention
from dsjax.model.balance import BalanceWeights
from dsjax.model.compressed_attention import CompressedAttention
from dsjax.model.gqa import GQA
from dsjax.model.layer_cache import Entries, LayerCache, StackEntries
from dsjax.model.layers import FeedForward, RMSNorm
from dsjax.model.mla import MLA
from dsjax.model.moe import Experts, MoE, RoutingStatistics
from dsjax.model.nsa import NSA
from dsjax.model.parameters import pinned
from dsjax.model.separate_layers import SeparateLayers
from dsjax.model.sparse_mla import SparseMLA
from dsjax.parallel.sharding import constrain
from dsjax.precision.policy import Policy

_REMAT_POLICIES = {
    # As V3 (section 3.2.3), norms, MLA up-projections and the SwiGLU product are recomputed; so is
    # the attention core. Routing is kept: it is small, and sorting takes time. So is an index's
    # choice, which reads all pairs of tokens, or what its warm-up needs of the attention.
    "selective": jax.checkpoint_policies.save_only_these_names(
        "latent", "attention", "routing", "swiglu_input", "index"
    ),
    "full": jax.checkpoint_policies.save_only_these_names("index"),
}
_MOST_WITHOUT_LOOP = 32  # layers


class Context(NamedTuple):
    """What every layer needs besides the hidden states, in their order."""

    angles: tuple[jax.Array, jax.Array]  # rope cosine and sine, float32 [B, T, R/2]
    segment_ids_BT: jax.Array | None  # attention stays within a segment; None: within the row
    documents_BT: jax.Array  # int32, sequences of the balance losses; 0 is padding
    # What a layer's backward pass recomputes: "none", "selective" or "full"; None: there is none.
    remat: str | None = None


class Statistics(NamedTuple):
    """What training reads of a layer, or of each layer of a stack; None for what it lacks."""

    routing: RoutingStatistics | None
    # float32, the indexer's divergence from the attention, averaged over the tokens, in nats
    index_loss: jax.Array | None


class Extension(NamedTuple):
    """What every layer needs besides the hidden states when tokens are added to a cache."""

    positions_BT: jax.Array  # int32, consecutive within a row
    angles: tuple[jax.Array, jax.Array]  # rope cosine and sine, float32 [B, T, R/2]


def attention_class(config: ModelConfig) -> type[Attention]:
    """Returns the class that `model.attention` names, with an indexer if the model has one."""
    if config.attention == "compressed":
        return CompressedAttention
    if config.index_topk:
        return SparseMLA
    return {"mla": MLA, "gqa": GQA, "nsa": NSA}[config.attention]


class Block(nnx.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: ModelConfig, policy: Policy, *, moe: bool):
        self.attn_norm = RMSNorm(config.dim, config.norm_eps, policy)
        self.attn = attention_class(config)(config, policy)  # type: ignore
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps, policy)
        self.ffn = (
            MoE(config, policy)
            if moe
            else FeedForward(config.dim, config.inter_dim, config.init_std, policy)
        )

    def __call__(
        self,
        x_BTD: jax.Array,
        context: Context,
        balance: BalanceWeights | None,
        experts_BTK: jax.Array | None = None,
        lesson: Lesson | None = None,
    ) -> tuple[jax.Array, Statistics]:
        """Runs the layer on whole sequences.

        Args:
          experts_BTK: int32, a MoE layer's choices to replay; None: its router chooses.
          lesson: what an indexer learns from; None: nothing.
        """
        x_BTD = constrain(x_BTD, "batch", "length", "width")
        y_BTD, index_loss = self._attend(self.attn_norm(x_BTD), context, lesson)
        x_BTD = x_BTD + y_BTD
        normed_BTD = self.ffn_norm(x_BTD)
        if isinstance(self.ffn, FeedForward):
            return x_BTD + self.ffn(normed_BTD), Statistics(None, index_loss)
        y_BTD, routing, _ = self.ffn(
            normed_BTD,
            context.documents_BT,
            balance,
            experts_BTK,
            recomputed=context.remat == "full",
        )
        return x_BTD + y_BTD, Statistics(routing, index_loss)

    def _attend(
        self, x_BTD: jax.Array, context: Context, lesson: Lesson | None
    ) -> tuple[jax.Array, jax.Array | None]:
        if lesson is None or not isinstance(self.attn, SparseMLA):
            return self.attn(x_BTD, context.angles, context.segment_ids_BT), None
        y_BTD, divergence_BT = self.attn.learn(
            x_BTD, context.angles, context.segment_ids_BT, lesson
        )
        assert divergence_BT is not None
        counted_BT = (context.documents_BT > 0).astype(jnp.float32)
        total = (divergence_BT * counted_BT).sum()
        return y_BTD, total / jnp.maximum(counted_BT.sum(), 1.0)

    @property
    def routed_experts(self) -> Experts | None:
        """Returns the routed experts' weights; None for a dense layer."""
        return self.ffn.experts if isinstance(self.ffn, MoE) else None

    def extend(
        self,
        x_BTD: jax.Array,
        cache: LayerCache,
        extension: Extension,
        stack: Block,
    ) -> tuple[jax.Array, LayerCache, jax.Array | None]:
        """Adds tokens to the layer's cache.

        Args:
          stack: the whole stack, in which this is layer `cache.layer`.

        Returns:
          the hidden states, the cache, and the chosen experts, int32 [B, T, K]; None if dense.
        """
        x_BTD = constrain(x_BTD, "batch", "tokens", "width")
        angles, positions_BT = extension.angles, extension.positions_BT
        if isinstance(stack.attn, MLA) and stack.attn.steps(x_BTD, cache):
            x_BTD, cache = stack.attn.step(x_BTD, stack.attn_norm, angles, cache, positions_BT)
        else:
            y_BTD, cache = self.attn.extend(self.attn_norm(x_BTD), angles, cache, positions_BT)
            x_BTD = x_BTD + y_BTD
        if isinstance(self.ffn, FeedForward):
            assert isinstance(stack.ffn, FeedForward)
            if stack.ffn.steps(x_BTD):
                return stack.ffn.step(x_BTD, stack.ffn_norm, cache.layer), cache, None
            return x_BTD + self.ffn(self.ffn_norm(x_BTD)), cache, None
        assert isinstance(stack.ffn, MoE)
        if stack.ffn.steps(x_BTD):
            x_BTD, experts_BTK = stack.ffn.step(x_BTD, stack.ffn_norm, cache.layer)
            return x_BTD, cache, experts_BTK
        normed_BTD = self.ffn_norm(x_BTD)
        y_BTD, experts_BTK = self.ffn.extend(normed_BTD, stack.ffn.experts, cache.layer)
        return x_BTD + y_BTD, cache, experts_BTK


def run_layers(
    layers: Block,
    x_BTD: jax.Array,
    context: Context,
    balance: BalanceWeights | None,
    experts_LBTK: jax.Array | None = None,
    present_L: jax.Array | None = None,
    lesson: Lesson | None = None,
    inner: int | None = None,
) -> tuple[jax.Array, Statistics, jax.Array | None]:
    """Runs a stack of layers on whole sequences.

    Args:
      experts_LBTK: int32, the layers' choices to replay; None: their routers choose.
      lesson: what indexers learn from; None: nothing.
      present_L: bool; an absent layer runs, but changes and counts nothing. None: all are present.
      inner: the layer, counted from 1, whose output is wanted too; None: none is.

    Returns:
      the last layer's output, the layers' statistics, and the inner layer's output.
    """

    def layer(x_BTD: jax.Array, row: tuple[Block, jax.Array | None, jax.Array | None]):
        block, experts_BTK, present = row
        run = pinned(block, block.attn.policy)
        y_BTD, statistics = run(x_BTD, context, balance, experts_BTK, lesson)
        if present is None:
            return y_BTD, statistics
        statistics = jax.tree.map(lambda x: jnp.where(present, x, jnp.zeros_like(x)), statistics)
        return jnp.where(present, y_BTD, x_BTD), statistics

    rows, run = (layers, experts_LBTK, present_L), rematerialized(layer, context.remat)
    scan = partial(jax.lax.scan, unroll=context.remat == "none" and _runs_without_loop(layers))
    if inner is None:
        x_BTD, statistics = scan(run, x_BTD, rows)
        return x_BTD, statistics, None

    # Carried, since outputs of a scan would be kept of every layer.
    def noting(carry: tuple[jax.Array, jax.Array, jax.Array], row: Any):
        x_BTD, noted_BTD, number = carry
        x_BTD, statistics = run(x_BTD, row)
        return (x_BTD, jnp.where(number == inner, x_BTD, noted_BTD), number + 1), statistics

    start = (x_BTD, jnp.zeros_like(x_BTD), jnp.int32(1))
    (x_BTD, noted_BTD, _), statistics = scan(noting, start, rows)
    return x_BTD, statistics, noted_BTD


def _runs_without_loop(layers: Block) -> bool:
    """Tells whether training that keeps everything for the backward pass runs layers one after the
    other instead of in a loop: on one GPU, for up to `_MOST_WITHOUT_LOOP` layers, whose program
    still compiles soon; in FP8 only on a Hopper, whose kernels keep a layer's program short.

    In a loop, all that is kept is copied into stacks that were filled with zeros, and out of them;
    so are gradients; and weights are cast once per pass. That is a third of a step's bytes.
    """
    policy, n_layers = layers.attn.policy, len(layers.attn_norm.weight[...])
    on_one_gpu = (
        policy.target.kind == "gpu"
        and jax.sharding.get_abstract_mesh().size <= 1  # 0: there is no mesh
    )
    short = policy.fp8 is None or policy.target.is_hopper
    return on_one_gpu and short and n_layers <= _MOST_WITHOUT_LOOP


def rematerialized(function: Callable[..., Any], remat: str | None) -> Callable[..., Any]:
    """Returns the function with a backward pass that recomputes what `remat` does not keep."""
    if remat in (None, "none"):
        return function
    return jax.checkpoint(function, policy=_REMAT_POLICIES[remat])


def extend_layers(
    layers: Block | SeparateLayers[Block],
    x_BTD: jax.Array,
    entries: StackEntries,
    extension: Extension,
    *,
    routing: bool = False,
) -> tuple[jax.Array, StackEntries, jax.Array | None]:
    """Runs a stack of layers on tokens that it adds to the cache entries.

    Args:
      entries: separate layers have separate ones.
      routing: whether to return the chosen experts, int32 [L, B, T, K].
    """
    if isinstance(layers, SeparateLayers):
        assert isinstance(entries, tuple)
        return _extend_separate(layers, x_BTD, entries, extension, routing=routing)
    assert isinstance(entries, dict)

    def layer(carry: tuple[jax.Array, Entries, jax.Array], block: Block):
        x_BTD, entries, index = carry
        own = LayerCache(entries, index)
        x_BTD, own, experts_BTK = block.extend(x_BTD, own, extension, layers)
        return (x_BTD, own.entries, index + 1), experts_BTK if routing else None

    # The entries are carried whole; scanned over, each layer's would be copied out and back in.
    start = (x_BTD, entries, jnp.int32(0))
    (x_BTD, entries, _), experts_LBTK = jax.lax.scan(layer, start, layers)
    return x_BTD, entries, experts_LBTK


def _extend_separate(
    layers: SeparateLayers[Block],
    x_BTD: jax.Array,
    entries: tuple[Entries, ...],
    extension: Extension,
    *,
    routing: bool,
) -> tuple[jax.Array, tuple[Entries, ...], jax.Array | None]:
    """Runs layers that are arrays of their own, each as a stack of one."""
    extended, experts = [], []
    for block, own in zip(layers.layers, entries, strict=True):
        x_BTD, cache, experts_BTK = block.extend(
            x_BTD,
            LayerCache(own, jnp.int32(0)),
            extension,
            jax.tree.map(lambda leaf: leaf[None], block),
        )
        extended.append(cache.entries)
        experts.append(experts_BTK)
    return x_BTD, tuple(extended), jnp.stack(experts) if routing else None
