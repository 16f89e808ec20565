"""The attention of DeepSeek-V4: one key-value head over recent tokens and compressed entries.

Queries come from a latent and are normalised per head, without weights. Keys and values are the
same vectors, of which the last channels are rotated. So a value carries the rotation of its own
position: the output is turned back by the query's, which leaves the distance. Heads are projected
to the width in two steps, first by groups.

Of the three kinds of layers, "window" layers see recent tokens only. "heavy" layers also see
entries of many tokens each, all of them; "sparse" layers see entries of few tokens each, of which
an indexer with entries of its own chooses some (`dsjax.kernels.compressed_attention`). Window
layers have another rope than the others.

Decoding caches per token its key and what entries are made of, and the entries. The entries alone
would do for finished runs. Caching all tokens keeps places fixed, so that prompts can be padded, a
row can begin with pages of another, and no order of calls matters.

V4 report section 2.3, as transformers 5.24 computes it.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from dsjax.config import ModelConfig
from dsjax.kernels import compressed_attention
from dsjax.kernels.compressed_attention import Entries, IndexQueries, Places
from dsjax.kernels.native_sparse import Stack
from dsjax.model import rope
from dsjax.model.attention import Angles, Attention
from dsjax.model.compressor import Compressor, Runs
from dsjax.model.layer_cache import EntryShape, LayerCache
from dsjax.model.layer_kinds import Kind, kinds
from dsjax.model.layers import Constant, Float32, Normal, RMSNorm, declare
from dsjax.model.nsa import entry_places
from dsjax.precision.matmul import float32_matmul, linear
from dsjax.precision.policy import Policy
from dsjax.precision.small_weights import at_use


class Row(NamedTuple):
    """Where the tokens of whole sequences are, and the runs to compress, by the kind of layer."""

    places: Places
    angles: dict[Kind, Angles]
    runs: dict[Kind, Runs]


def ratio_of(kind: Kind, config: ModelConfig) -> int:
    """Returns the tokens of an entry."""
    return config.sparse_ratio if kind == "sparse" else config.heavy_ratio


def angles_of(kind: Kind, positions: jax.Array, config: ModelConfig) -> Angles:
    """Returns cosine and sine of positions [B, T]: plain in window layers, scaled in others."""
    if kind == "window":
        own = dataclasses.replace(config, rope_scaling="none")
    else:
        own = dataclasses.replace(config, rope_theta=config.compress_rope_theta)
    return rope.angles(positions, own)


def place_row(segments_BT: jax.Array | None, like_BT: jax.Array, config: ModelConfig) -> Row:
    """Finds positions and runs of whole sequences, or of their segments."""
    segments = jnp.zeros_like(like_BT) if segments_BT is None else segments_BT
    positions = rope.positions_in_segments(segments)
    own_BT = lax.broadcasted_iota(jnp.int32, segments.shape, 1)
    present: list[Kind] = sorted(set(config.layer_types))
    runs = {}
    for kind in present:
        if kind == "window":
            continue
        ratio = ratio_of(kind, config)
        begins_BZ, positions_BZ = entry_places(segments, positions, ratio, ratio)
        runs[kind] = Runs(begins_BZ, positions_BZ, angles_of(kind, positions_BZ, config))
    return Row(
        Places(own_BT, own_BT - positions),
        {kind: angles_of(kind, positions, config) for kind in present},
        runs,
    )


class EntryIndexer(nnx.Module):
    """Scores entries: its own compressor makes their keys, the query latent its queries."""

    def __init__(self, config: ModelConfig, policy: Policy):
        init, heads, width = Normal(config.init_std), config.index_n_heads, config.index_head_dim
        self.wq_b = declare((config.q_lora_rank, heads * width), ("latent", "index_heads"), init)
        self.weights_proj = declare((config.dim, heads), ("router_embed", "norm"), init, Float32)
        self.compressor = Compressor(
            config, policy, ratio=config.sparse_ratio, width=width, overlaps=True
        )
        self.config = config
        self.policy = policy

    def queries(self, x_BTD: jax.Array, latent_BTQ: jax.Array, angles: Angles) -> IndexQueries:
        config = self.config
        q = linear(latent_BTQ, self.wq_b[...], self.policy)
        q_BTIY = q.reshape(*q.shape[:2], config.index_n_heads, config.index_head_dim)
        scale = (config.index_n_heads * config.index_head_dim) ** -0.5
        return IndexQueries(
            rope.rotate_last(q_BTIY, config.qk_rope_head_dim, *angles),
            float32_matmul(x_BTD, self.weights_proj[...]) * scale,
        )


class CompressedAttention(Attention):
    splits = False

    def __init__(self, config: ModelConfig, policy: Policy, kind: Kind):
        init = Normal(config.init_std)
        D, Q, H = config.dim, config.q_lora_rank, config.head_dim
        heads, grouped = config.n_heads * H, config.o_groups * config.o_lora_rank
        self.wq_a = declare((D, Q), ("embed", "latent"), init)
        self.q_norm = RMSNorm(Q, config.norm_eps)
        self.wq_b = declare((Q, heads), ("latent", "latent_heads"), init)
        self.wkv = declare((D, H), ("embed", "latent"), init)
        self.kv_norm = RMSNorm(H, config.norm_eps)
        self.sink = declare((config.n_heads,), ("norm",), Constant(0.0), Float32)
        self.wo_a = declare((heads // config.o_groups, grouped), ("latent", "latent_heads"), init)
        self.wo_b = declare((grouped, D), ("heads", "embed"), init)
        if kind != "window":
            self.compressor = Compressor(
                config, policy, ratio=ratio_of(kind, config), width=H, overlaps=kind == "sparse"
            )
        if kind == "sparse":
            self.indexer = EntryIndexer(config, policy)
        self.kind: Kind = kind
        self.config = config
        self.policy = policy

    @staticmethod
    def cached_by(config: ModelConfig, kind: Kind) -> dict[str, EntryShape]:
        """Names what decoding caches in a layer of this kind."""
        shapes = {"key": EntryShape(1, config.head_dim)}
        if kind == "window":
            return shapes
        widths = {"": config.head_dim}
        if kind == "sparse":
            widths["index_"] = config.index_head_dim
        for name, width in widths.items():
            of_tokens = Compressor.token_width(width, overlaps=kind == "sparse")
            shapes[f"{name}tokens"] = EntryShape(1, of_tokens)
            shapes[f"{name}entry"] = EntryShape(1, width, ratio_of(kind, config))
        return shapes

    @staticmethod
    def cached(config: ModelConfig) -> dict[str, EntryShape]:
        layers = kinds(config)
        return {
            f"{kind.stack}.{name}": shape._replace(layers=layers.count(kind))
            for kind in sorted(set(layers))
            for name, shape in CompressedAttention.cached_by(config, kind.attention).items()
        }

    @staticmethod
    def matmul_parameters(config: ModelConfig) -> int:
        """Counts the mean over the layers."""
        D, Q, N, H = config.dim, config.q_lora_rank, config.n_heads, config.head_dim
        each = D * (Q + H) + Q * N * H + config.o_lora_rank * (N * H + config.o_groups * D)
        streams = 2 * config.hc_mult**2 * (2 + config.hc_mult) * D
        heads, width = config.index_n_heads, config.index_head_dim
        sparse = 4 * D * (H + width) + Q * heads * width + D * heads
        total = config.layer_types.count("sparse") * sparse
        total += config.layer_types.count("heavy") * 2 * D * H
        return each + streams + total // config.n_layers

    @staticmethod
    def context_flops(config: ModelConfig, length: int, causal: bool) -> int:
        """Counts the mean over the layers."""
        share, keys, scored = (0.5 if causal else 1.0), 0.0, 0.0
        for kind in config.layer_types:
            keys += min(config.window_size, length)
            if kind == "heavy":
                keys += share * length / config.heavy_ratio
            if kind == "sparse":
                entries = share * length / config.sparse_ratio
                keys += min(entries, config.index_topk)
                scored += entries
        per_key = 4 * config.n_heads * config.head_dim
        per_score = 2 * config.index_n_heads * (config.index_head_dim + 1)
        return round((keys * per_key + scored * per_score) / config.n_layers)

    def _queries(self, latent_BTQ: jax.Array, angles: Angles) -> jax.Array:
        """Returns rotated queries, [B, T, N, H]."""
        config = self.config
        q = linear(latent_BTQ, self.wq_b[...], self.policy)
        q32 = q.reshape(*q.shape[:2], config.n_heads, config.head_dim).astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(q32), axis=-1, keepdims=True)
        normed = (q32 * lax.rsqrt(mean_square + config.norm_eps)).astype(q.dtype)
        return rope.rotate_last(normed, config.qk_rope_head_dim, *angles)

    def _of_tokens(self, x_BTD: jax.Array, angles: Angles) -> dict[str, jax.Array]:
        """Returns what is cached per token, [B, T, X] each."""
        key = self.kv_norm(linear(x_BTD, self.wkv[...], self.policy))[:, :, None]
        key = rope.rotate_last(key, self.config.qk_rope_head_dim, *angles)
        found = {"key": key[:, :, 0]}
        for name, compressor in self._compressors().items():
            found[f"{name}tokens"] = compressor.of_tokens(x_BTD)
        return found

    def _compressors(self) -> dict[str, Compressor]:
        if self.kind == "window":
            return {}
        own = {"": self.compressor}
        return own | {"index_": self.indexer.compressor} if self.kind == "sparse" else own

    def _compress(self, stacks: dict[str, Stack], runs: Runs) -> dict[str, jax.Array]:
        """Returns the entries of some runs, [B, Z, X] each."""
        return {
            f"{name}entry": compressor(stacks[f"{name}tokens"], runs)
            for name, compressor in self._compressors().items()
        }

    @jax.named_scope("attention")
    def of_row(self, x_BTD: jax.Array, row: Row) -> jax.Array:
        """Attends within whole sequences, or within their segments: [B, T, D]."""
        angles = row.angles[self.kind]
        of_tokens = self._of_tokens(x_BTD, angles)
        stacks = {name: _stack(x) for name, x in of_tokens.items()}
        begins_BZ = None
        if runs := row.runs.get(self.kind):
            begins_BZ = runs.begins_BZ
            stacks |= {name: _stack(x) for name, x in self._compress(stacks, runs).items()}
        return self._attend(x_BTD, angles, row.places, stacks, begins_BZ)

    @jax.named_scope("attention")
    def add(
        self, x_BTD: jax.Array, angles: Angles, cache: LayerCache, positions_BT: jax.Array
    ) -> tuple[jax.Array, LayerCache]:
        """Adds tokens at consecutive positions to the cache and attends from them to it."""
        start_B, begins_BZ = positions_BT[:, 0], None
        cache = cache.append(start_B, **self._of_tokens(x_BTD, angles))
        if self.kind != "window":
            cache = self._complete(cache, start_B, x_BTD.shape[1])
            ratio = ratio_of(self.kind, self.config)
            all_Z = lax.iota(jnp.int32, cache.entries["entry"].shape[3]) * ratio
            begins_BZ = jnp.broadcast_to(all_Z[None], (len(start_B), len(all_Z)))
        places = Places(positions_BT, jnp.zeros_like(positions_BT))
        out_BTD = self._attend(x_BTD, angles, places, _stacks(cache), begins_BZ)
        return out_BTD, cache

    def _complete(self, cache: LayerCache, start_B: jax.Array, count: int) -> LayerCache:
        """Makes every entry that `count` new tokens complete, and perhaps one that later tokens
        will complete, and make again.
        """
        ratio = ratio_of(self.kind, self.config)
        first_B = start_B // ratio
        index_BZ = first_B[:, None] + lax.iota(jnp.int32, -(-count // ratio))[None]
        begins_BZ = index_BZ * ratio
        runs = Runs(begins_BZ, begins_BZ, angles_of(self.kind, begins_BZ, self.config))
        return cache.append(first_B, **self._compress(_stacks(cache), runs))

    def _attend(
        self,
        x_BTD: jax.Array,
        angles: Angles,
        places: Places,
        stacks: dict[str, Stack],
        begins_BZ: jax.Array | None,
    ) -> jax.Array:
        """Attends to tokens and entries, and projects to the width: [B, T, D]."""
        config = self.config
        latent_BTQ = self.q_norm(linear(x_BTD, self.wq_a[...], self.policy))
        entries, index = None, None
        if begins_BZ is not None:
            entries = Entries(stacks["entry"], begins_BZ, ratio_of(self.kind, config))
        if self.kind == "sparse":
            assert entries is not None
            entries = entries._replace(keys=stacks["index_entry"], topk=config.index_topk)
            index = self.indexer.queries(x_BTD, latent_BTQ, angles)
        out_BTNH = compressed_attention.attend(
            self._queries(latent_BTQ, angles),
            places,
            stacks["key"],
            entries,
            index,
            self.sink[...],
            window=config.window_size,
            scale=config.head_dim**-0.5,
        )
        cos, sin = angles
        return self._project(rope.rotate_last(out_BTNH, config.qk_rope_head_dim, cos, -sin))

    def _project(self, out_BTNH: jax.Array) -> jax.Array:
        """Projects each group of heads to channels, and those of all groups to the width."""
        G = self.config.o_groups
        grouped_BTGX = out_BTNH.reshape(*out_BTNH.shape[:2], G, -1)
        wo_a = at_use(self.wo_a[...], out_BTNH.dtype)
        w_XGC = wo_a.reshape(wo_a.shape[0], G, -1)
        low_BTGC = jnp.einsum("BTGX,XGC->BTGC", grouped_BTGX, w_XGC)
        return linear(low_BTGC.reshape(*low_BTGC.shape[:2], -1), self.wo_b[...], self.policy)


def _stack(x_BSX: jax.Array) -> Stack:
    """Presents one head of whole sequences as a layer of a stack."""
    return Stack(x_BSX[None, :, None], 0)


def _stacks(cache: LayerCache) -> dict[str, Stack]:
    return {name: Stack(stack, cache.layer) for name, stack in cache.entries.items()}
