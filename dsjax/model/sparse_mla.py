"""Multi-head latent attention to the keys that an indexer chooses: DeepSeek-V3.2.

Attention itself is MLA's. A query attends to the `index_topk` earlier tokens that the indexer
scores highest, or to all if there are no more; then it is MLA to the bit.

Long sequences, and tokens that are added to a cache, read the entries that they chose and no
others, as latents, which all heads share. Short sequences are masked (`SparseMLA.gathers`).

The indexer learns by itself (`learn`): its inputs are detached, so that its divergence from the
attention trains it and nothing else, and its choice has no gradient.

Papers: V3.2-Exp and V3.2 (arXiv:2512.02556), section 2.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dsjax.config import ModelConfig
from dsjax.kernels.cached_attention import Attended, in_blocks
from dsjax.kernels.query_tiles import over_tiles
from dsjax.kernels.sparse_attention import (
    Index,
    Lesson,
    gathered_at_once,
    gathered_attention,
    scored_at_once,
    scores_in_blocks,
    select,
)
from dsjax.model import rope
from dsjax.model.attention import Angles
from dsjax.model.indexer import Indexer
from dsjax.model.layer_cache import EntryShape, LayerCache
from dsjax.model.mla import MLA
from dsjax.parallel import sharded_sparse_attention, split_cache
from dsjax.parallel.sharding import parts_here
from dsjax.precision.activations import attention_linear
from dsjax.precision.matmul import linear
from dsjax.precision.policy import Policy


class SparseMLA(MLA):
    """Caches the indexer's key beside MLA's latent and rotated key."""

    def __init__(self, config: ModelConfig, policy: Policy):
        super().__init__(config, policy)
        self.indexer = Indexer(config, policy)

    @staticmethod
    def cached(config: ModelConfig) -> dict[str, EntryShape]:
        return MLA.cached(config) | {"index_key": EntryShape(1, config.index_head_dim)}

    @staticmethod
    def matmul_parameters(config: ModelConfig) -> int:
        return MLA.matmul_parameters(config) + Indexer.matmul_parameters(config)

    @staticmethod
    def context_flops(config: ModelConfig, length: int, causal: bool) -> int:
        """Counts scores of all keys, and attention to the chosen ones with keys expanded."""
        kept = min(config.index_topk, length)
        # Summed over a sequence, the first `kept` queries see half of that many keys on average.
        seen = (length, kept) if not causal else (length / 2, kept - kept**2 / (2 * length))
        per_key = 2 * config.n_heads * (config.qk_head_dim + config.value_head_dim)
        return int(Indexer.score_flops(config) * seen[0] + per_key * seen[1])

    def __call__(
        self, x_BTD: jax.Array, angles: Angles, segment_ids_BT: jax.Array | None = None
    ) -> jax.Array:
        if x_BTD.shape[1] <= self.config.index_topk:
            return super().__call__(x_BTD, angles, segment_ids_BT)
        return self.learn(x_BTD, angles, segment_ids_BT, None)[0]

    def gathers(self, length: int) -> bool:
        """Whether a whole sequence takes fewer multiplications if each query gathers the latents
        that it chose than if all keys are expanded and masked.
        """
        config = self.config
        C, R = config.kv_lora_rank, config.qk_rope_head_dim
        expanded = (config.qk_head_dim + config.value_head_dim) * length / 2
        return config.index_topk * (C + R + C) < expanded

    @jax.named_scope("attention")
    def learn(
        self,
        x_BTD: jax.Array,
        angles: Angles,
        segment_ids_BT: jax.Array | None,
        lesson: Lesson | None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Attends as `__call__` does and, with a lesson, measures the indexer.

        Returns:
          [B, T, D]; and float32 [B, T], the divergence of each query in nats.
        """
        latent_BTQ = self.query_latent(x_BTD)
        q_BTNH = self.queries_of(latent_BTQ, self.wq_b[...], angles)
        entries = super().entries(x_BTD, angles)
        detached_BTD = lax.stop_gradient(x_BTD)
        index = Index(
            self.indexer.queries(lax.stop_gradient(latent_BTQ), angles),
            self.indexer.weights(detached_BTD),
            self.indexer.keys(detached_BTD, angles),
        )
        weights = self.expansion()
        common: Any = {
            "count": self.config.index_topk,
            "scale": rope.attention_scale(self.config),
            "lesson": lesson,
        }
        if lesson != "warmup" and self.gathers(x_BTD.shape[1]):
            q_nope, q_rope = jnp.split(q_BTNH, [self.config.qk_nope_head_dim], axis=-1)
            out_BTNC, divergence_BT = sharded_sparse_attention.gathered(
                jnp.concatenate([self.absorbed(q_nope, weights), q_rope], axis=-1),
                jnp.concatenate([*entries.values()], axis=-1),
                index,
                segment_ids_BT,
                width=self.config.kv_lora_rank,
                target=self.policy.target,
                **common,
            )
            out_BTNW = self.projected(out_BTNC, weights)
        else:
            out_BTNW, divergence_BT = sharded_sparse_attention.expanded(
                q_BTNH,
                tuple(entries.values()),
                weights,
                index,
                segment_ids_BT,
                expand=self.expand,
                **common,
            )
        out_BTX = out_BTNW.reshape(*x_BTD.shape[:2], -1)
        return attention_linear(out_BTX, self.wo[...], self.policy), divergence_BT

    def extend(
        self, x_BTD: jax.Array, angles: Angles, cache: LayerCache, positions_BT: jax.Array
    ) -> tuple[jax.Array, LayerCache]:
        latent_BTQ = self.query_latent(x_BTD)
        q_BTNH = self.queries_of(latent_BTQ, self.wq_b[...], angles)
        entries = self.entries(x_BTD, angles) | {"index_key": self.indexer.keys(x_BTD, angles)}
        cache = cache.append(positions_BT[:, 0], **entries)

        def dense() -> jax.Array:
            return cache.attend(self.attend, q_BTNH, positions_BT, self.expansion())

        def sparse() -> jax.Array:
            index = self.indexer.queries(latent_BTQ, angles), self.indexer.weights(x_BTD)
            weights = self.expansion()
            return cache.attend(self.attend_chosen, q_BTNH, *index, positions_BT, weights)

        if cache.length <= self.config.index_topk:
            out_BTNW = dense()
        elif self.absorbs(self.config, x_BTD.shape[1]):
            out_BTNW = sparse()
        else:
            # Long chunks at the start of a text choose all that there is.
            chooses = positions_BT.max() >= self.config.index_topk
            out_BTNW = lax.cond(chooses, sparse, dense)
        out_BTX = out_BTNW.reshape(*x_BTD.shape[:2], -1)
        return linear(out_BTX, self.wo[...], self.policy), cache

    def attend_chosen(
        self,
        cache: LayerCache,
        q_BTNH: jax.Array,
        index_q_BTIY: jax.Array,
        w_BTI: jax.Array,
        positions_BT: jax.Array,
        weights: Any,
    ) -> Attended:
        """Attends to the cached positions that the indexer chooses up to each query's own; the
        arguments are those of `attend` and of `Index`.
        """
        config = self.config
        (B, T), S, part = positions_BT.shape, cache.length, split_cache.part()
        q_nope, q_rope = jnp.split(q_BTNH, [config.qk_nope_head_dim], axis=-1)
        positions_11S = part.position(lax.broadcasted_iota(jnp.int32, (1, 1, S), 2))

        def attend(of_queries: Any) -> Attended:
            q_BtNC, q_rope_BtNR, indices_BtJ, valid_BtJ = of_queries
            return self._attend_first((q_BtNC, q_rope_BtNR), cache, indices_BtJ, valid_BtJ)

        rows = max(B // parts_here("batch"), 1)
        gathered = rows * config.index_topk * (config.kv_lora_rank + config.qk_rope_head_dim)
        few = gathered_at_once(self.policy.target, gathered)
        scored = scored_at_once(self.policy.target, rows * config.index_n_heads, T, S)
        # Equally many on all devices that hold parts: keys may be gathered from others.
        n_blocks = positions_BT.max() // (part.n_parts * scored.keys) + 1

        def tile(of_queries: Any) -> Attended:
            q_BtNC, q_rope_BtNR, index_q, w, positions_Bt = of_queries
            scores_BtS = scores_in_blocks(
                index_q,
                w,
                lambda start, size: cache.read(start, size)["index_key"][:, 0],
                S,
                size=scored.keys,
                n_blocks=n_blocks,
            )
            visible_BtS = positions_11S <= positions_Bt[..., None]
            selection = select(scores_BtS, visible_BtS, config.index_topk)
            indices_BtJ = selection.indices_BTJ
            scores_BtJ = jnp.take_along_axis(scores_BtS, indices_BtJ, axis=2)
            found_BtJ = part.position(indices_BtJ)
            valid_BtJ = split_cache.chosen(
                scores_BtJ, found_BtJ, selection.valid_BTJ, config.index_topk
            )
            return over_tiles(attend, (q_BtNC, q_rope_BtNR, indices_BtJ, valid_BtJ), most=few)

        queries = (self.absorbed(q_nope, weights), q_rope, index_q_BTIY, w_BTI, positions_BT)
        attended: Attended = over_tiles(tile, queries, most=scored.queries)
        return attended._replace(out_BTNW=self.projected(attended.out_BTNW, weights))

    def _attend_first(
        self,
        queries: tuple[jax.Array, jax.Array],
        cache: LayerCache,
        indices_BTJ: jax.Array,
        valid_BTJ: jax.Array,
    ) -> Attended:
        """Attends from each query to latents and rope keys of its own, of which the valid ones come
        first: where devices have a part of the cache each, those are few of the J.
        """
        n_parts, J = split_cache.part().n_parts, indices_BTJ.shape[2]
        # Half of an even share, so that little more is read than the largest share.
        size = J if n_parts == 1 else min(-(-self.config.index_topk // (2 * n_parts)), J)

        def block(number: jax.Array) -> Attended:
            # The last block is moved back to end where the keys do; what it repeats is left out.
            start = jnp.minimum(number * size, J - size)
            place_11X = start + lax.broadcasted_iota(jnp.int32, (1, 1, size), 2)
            indices_BTX, valid_BTX = (
                lax.dynamic_slice_in_dim(x, start, size, axis=2) for x in (indices_BTJ, valid_BTJ)
            )
            entries = cache.gather(indices_BTX)
            latents, rope_keys = (entries[name][:, :, :, 0] for name in ("latent", "rope_key"))
            return gathered_attention(
                queries,
                (latents, rope_keys),
                latents,
                valid_BTX & (place_11X >= number * size),
                scale=rope.attention_scale(self.config),
            )

        if n_parts == 1:
            return block(jnp.int32(0))
        # As many on all devices, should the compiler gather anything inside.
        longest = split_cache.most(valid_BTJ.sum(axis=-1, dtype=jnp.int32).max())
        return in_blocks(block, jnp.maximum(-(-longest // size), 1))
