"""The layers of DeepSeek-V4, which are of several kinds and share several residual streams.

Layers differ in their attention (window, sparse, heavy) and in how experts are chosen: by a router,
or in the first layers by a table of tokens, whose weights still come from the router. Layers of one
kind are a stack. A program has one copy of each pattern that repeats along the depth, such as
sparse, heavy, sparse, heavy, and runs it in a scan; the layers' numbers in their stacks are counted
there.

The streams begin as copies of the embedding, and are summed by weight after the last layer
(`dsjax.model.hyper_connections`), so that outside of here the model is like any other.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.config import ModelConfig
from dsjax.model.attention import Angles
from dsjax.model.compressed_attention import CompressedAttention, Row, angles_of, place_row
from dsjax.model.hyper_connections import HyperConnection, HyperHead, expand
from dsjax.model.layer_cache import Entries, LayerCache
from dsjax.model.layer_kinds import LayerKind, Run, kinds, runs
from dsjax.model.layers import RMSNorm, RouterState, declare, stack
from dsjax.model.moe import Experts, MoE
from dsjax.model.parameters import pinned
from dsjax.parallel.sharding import constrain, parts_here
from dsjax.precision.policy import Policy


@dataclasses.dataclass(frozen=True)
class Spread:
    """Initial values of a table: each token's experts are different, and all are used alike."""

    n_experts: int

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        K, V = shape[-2:]
        token = jax.lax.broadcasted_iota(jnp.int32, (K, V), 1)
        choice = jax.lax.broadcasted_iota(jnp.int32, (K, V), 0)
        return jnp.broadcast_to((token * K + choice) % self.n_experts, shape).astype(dtype)


def check_parts(config: ModelConfig, n_parts: int) -> None:
    """Raises ValueError if a mesh of `n_parts` along `context` would split sequences that stay
    whole.
    """
    if config.attention == "compressed" and n_parts > 1:
        raise ValueError(
            "model.attention=compressed keeps sequences whole: an entry is made of tokens that "
            f"mesh.context={n_parts} devices would share out; set mesh.context=1 and split over "
            "data, fsdp, expert or tensor"
        )


class HyperBlock(nnx.Module):
    """One layer: attention and experts, each connected to the residual streams."""

    def __init__(self, config: ModelConfig, policy: Policy, kind: LayerKind):
        self.hc_attn = HyperConnection(config)
        self.attn_norm = RMSNorm(config.dim, config.norm_eps)
        self.attn = CompressedAttention(config, policy, kind.attention)
        self.hc_ffn = HyperConnection(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        # The table has the last word, so there is nothing for a bias to select.
        biased = config.router_bias and not kind.hashed
        self.ffn = MoE(dataclasses.replace(config, router_bias=biased), policy)
        if kind.hashed:
            # The numbers of experts, which float32 holds exactly.
            self.tid2eid = declare(
                (config.n_activated_experts, config.vocab_size),
                ("norm", "norm"),
                Spread(config.n_routed_experts),  # type: ignore
                RouterState,
            )
        self.hashed, self.policy = kind.hashed, policy

    def experts_of(self, tokens_BT: jax.Array) -> jax.Array | None:
        """Looks up the experts of tokens, int32 [B, T, K]; None where the router chooses. Of ids
        outside the vocabulary, whose embedding is NaN, any will do.
        """
        if not self.hashed:
            return None
        chosen_KBT = self.tid2eid[...].at[:, tokens_BT].get(mode="clip")
        return jnp.moveaxis(chosen_KBT, 0, -1).astype(jnp.int32)

    def __call__(self, streams_BTXD: jax.Array, tokens_BT: jax.Array, row: Row) -> jax.Array:
        """Runs the layer on whole sequences."""
        streams_BTXD = constrain(streams_BTXD, "batch", "length", "width", "width")
        x_BTD, mix = self.hc_attn(streams_BTXD)
        y_BTD = self.attn.of_row(self.attn_norm(x_BTD), row)
        streams_BTXD = expand(streams_BTXD, y_BTD, mix)
        x_BTD, mix = self.hc_ffn(streams_BTXD)
        chosen, counted_BT = self.experts_of(tokens_BT), jnp.ones_like(tokens_BT)
        y_BTD, _, _ = self.ffn(self.ffn_norm(x_BTD), counted_BT, None, chosen)
        return expand(streams_BTXD, y_BTD, mix)

    def extend(
        self,
        streams_BTXD: jax.Array,
        tokens_BT: jax.Array,
        angles: Angles,
        cache: LayerCache,
        positions_BT: jax.Array,
        stack: Experts,
    ) -> tuple[jax.Array, LayerCache, jax.Array]:
        """Adds tokens to the layer's cache.

        Args:
          stack: the experts of all layers of this kind, of which this is number `cache.layer`.

        Returns:
          the streams, the cache, and the chosen experts, int32 [B, T, K].
        """
        streams_BTXD = constrain(streams_BTXD, "batch", "tokens", "width", "width")
        x_BTD, mix = self.hc_attn(streams_BTXD)
        y_BTD, cache = self.attn.add(self.attn_norm(x_BTD), angles, cache, positions_BT)
        streams_BTXD = expand(streams_BTXD, y_BTD, mix)
        x_BTD, mix = self.hc_ffn(streams_BTXD)
        chosen = self.experts_of(tokens_BT)
        y_BTD, chosen = self.ffn.extend(self.ffn_norm(x_BTD), stack, cache.layer, chosen)
        return expand(streams_BTXD, y_BTD, mix), cache, chosen


class MixedLayers(nnx.Module):
    """All layers, in stacks of one kind each, named as `LayerKind.stack` says."""

    routed_experts = None  # there is no one stack of them

    def __init__(self, config: ModelConfig, policy: Policy):
        layers = kinds(config)
        for kind in sorted(set(layers)):
            block = HyperBlock(config, policy, kind)
            setattr(self, kind.stack, stack(block, layers.count(kind)))
        self.hc_head = HyperHead(config)
        self.config = config
        self.policy = policy

    def __call__(
        self, x_BTD: jax.Array, tokens_BT: jax.Array, segments_BT: jax.Array | None
    ) -> jax.Array:
        """Runs all layers on whole sequences, or on their segments: [B, T, D].

        Raises:
          ValueError: the mesh splits sequences.
        """
        check_parts(self.config, parts_here("length"))
        row = place_row(segments_BT, tokens_BT, self.config)

        def layer(streams_BTXD: Any, layers: HyperBlock, kind: LayerKind, number: jax.Array):
            del kind
            block = pinned(_layer(layers, number), self.policy)
            return block(streams_BTXD, tokens_BT, row), None

        streams_BTXD, _ = self._over_layers(layer, self._streams(x_BTD))
        return self.hc_head(streams_BTXD)

    def extend(
        self,
        x_BTD: jax.Array,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        entries: Entries,
        *,
        routing: bool = False,
    ) -> tuple[jax.Array, Entries, jax.Array | None]:
        """Runs all layers on tokens that they add to the cache entries.

        Args:
          routing: whether to return the chosen experts, int32 [L, B, T, K].
        """
        angles = {
            kind: angles_of(kind, positions_BT, self.config)
            for kind in sorted(set(self.config.layer_types))
        }

        def layer(carry: Any, layers: HyperBlock, kind: LayerKind, number: jax.Array):
            streams_BTXD, entries = carry
            streams_BTXD, cache, experts_BTK = _layer(layers, number).extend(
                streams_BTXD,
                tokens_BT,
                angles[kind.attention],
                LayerCache(_of(entries, kind), number),
                positions_BT,
                layers.ffn.experts,
            )
            new = {f"{kind.stack}.{name}": entry for name, entry in cache.entries.items()}
            return (streams_BTXD, entries | new), experts_BTK if routing else None

        # The entries are carried whole; scanned over, each layer's would be copied out and back in.
        carry = (self._streams(x_BTD), entries)
        (streams_BTXD, entries), experts_LBTK = self._over_layers(layer, carry)
        return self.hc_head(streams_BTXD), entries, experts_LBTK

    def _streams(self, x_BTD: jax.Array) -> jax.Array:
        """Begins all residual streams with the same."""
        B, T, D = x_BTD.shape
        return jnp.broadcast_to(x_BTD[:, :, None], (B, T, self.config.hc_mult, D))

    def _over_layers(
        self,
        function: Callable[[Any, HyperBlock, LayerKind, jax.Array], tuple[Any, Any]],
        carry: Any,
    ) -> tuple[Any, Any]:
        """Calls function(carry, stack, its kind, number in the stack) -> (carry, out) for all
        layers, in order; returns the last carry and all `out`, with a leading dimension of layers.
        """
        before: Counter[LayerKind] = Counter()
        found = []
        for run in runs(kinds(self.config)):
            first = [
                before[kind] + run.pattern[:i].count(kind) for i, kind in enumerate(run.pattern)
            ]
            step = functools.partial(self._repeat, function, run, first)
            carry, outs = jax.lax.scan(step, carry, jnp.arange(run.repeats, dtype=jnp.int32))
            found.append(jax.tree.map(_in_order, *outs))
            before.update({kind: n * run.repeats for kind, n in Counter(run.pattern).items()})
        return carry, jax.tree.map(lambda *each: jnp.concatenate(each), *found)

    def _repeat(
        self, function: Any, run: Run, first: list[int], carry: Any, repeat: jax.Array
    ) -> tuple[Any, list[Any]]:
        """Runs the layers of a pattern once."""
        outs = []
        for kind, number in zip(run.pattern, first, strict=True):
            number = number + repeat * run.pattern.count(kind)
            carry, out = function(carry, getattr(self, kind.stack), kind, number)
            outs.append(out)
        return carry, outs


def _layer(layers: HyperBlock, number: jax.Array) -> HyperBlock:
    return jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False), layers
    )


def _of(entries: Entries, kind: LayerKind) -> Entries:
    """Returns the entries of one kind of layers, under the names that its attention gives them."""
    prefix = f"{kind.stack}."
    return {
        name.removeprefix(prefix): entry
        for name, entry in entries.items()
        if name.startswith(prefix)
    }


def _in_order(*of_pattern: jax.Array) -> jax.Array:
    """Joins [repeats, ...] of each layer of a pattern to [layers, ...]."""
    joined = jnp.stack(of_pattern, axis=1)
    return joined.reshape(-1, *joined.shape[2:])
