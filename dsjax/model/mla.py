"""Multi-head latent attention (MLA).

Keys and values are projected up, per head, from one normed latent per token; one rotated key is
shared by all heads. Decoding caches only the latent and that key. Queries come from a latent of
their own, or straight from the hidden state (V2-Lite).

`attend` attends to a cache in one of two ways that differ only in cost. Expanded: keys and values
are computed from the cached latents, as in training. Absorbed (V2 section 2.1.2): the projection of
the keys moves to the queries and that of the values to the output, so that all heads share one key
and one value per position, the latent itself. `absorbs` picks the cheaper.

Paper: DeepSeek-V2 (arXiv:2405.04434) section 2.1, equations 9 to 19; V3 (arXiv:2412.19437) section
2.1.1.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dsjax.config import ModelConfig
from dsjax.kernels import few_rows, latent_attention, latent_queries
from dsjax.kernels.cached_attention import Attended, Block, cached_attention
from dsjax.model import rope
from dsjax.model.attention import Angles, Attention
from dsjax.model.layer_cache import EntryShape, LayerCache
from dsjax.model.layers import Normal, RMSNorm, declare
from dsjax.parallel import split_cache
from dsjax.parallel.sharding import constrain, parts_here
from dsjax.precision.matmul import linear
from dsjax.precision.policy import Policy

# DeepSeek's code and transformers give the latents' norms this epsilon, whatever `norm_eps` says.
LATENT_NORM_EPS = 1e-6


class PerHead(NamedTuple):
    """`wkv_b` as absorbed attention multiplies by it: the halves apart, of which it needs one at a
    time, and each head's in the order in which it is read.
    """

    keys_NHC: jax.Array
    values_NCW: jax.Array


class MLA(Attention):
    """Caches the normed latent and the rotated key that all heads share.

    Attributes:
      w_keys, w_values: `wkv_b` again, as `PerHead`, once it is laid out for decoding.
    """

    w_keys: nnx.Variable | None = None
    w_values: nnx.Variable | None = None

    def __init__(self, config: ModelConfig, policy: Policy):
        init = Normal(config.init_std)
        D, N, C = config.dim, config.n_heads, config.kv_lora_rank
        query_width = N * config.qk_head_dim
        if config.q_lora_rank:
            self.wq_a = declare((D, config.q_lora_rank), ("embed", "latent"), init)
            self.q_norm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS, policy)
            self.wq_b = declare((config.q_lora_rank, query_width), ("latent", "latent_heads"), init)
        else:
            self.wq = declare((D, query_width), ("embed", "heads"), init)
        self.wkv_a = declare((D, C + config.qk_rope_head_dim), ("embed", "latent"), init)
        self.kv_norm = RMSNorm(C, LATENT_NORM_EPS, policy)
        kv_width = N * (config.qk_nope_head_dim + config.v_head_dim)
        self.wkv_b = declare((C, kv_width), ("latent", "latent_heads"), init)
        self.wo = declare((N * config.v_head_dim, D), ("heads", "embed"), init)
        self.config = config
        self.policy = policy

    @staticmethod
    def cached(config: ModelConfig) -> dict[str, EntryShape]:
        return {
            "latent": EntryShape(1, config.kv_lora_rank),
            "rope_key": EntryShape(1, config.qk_rope_head_dim),
        }

    @staticmethod
    def matmul_parameters(config: ModelConfig) -> int:
        queries = config.n_heads * config.qk_head_dim
        rank = config.q_lora_rank
        query = rank * (config.dim + queries) if rank else config.dim * queries
        latent = config.dim * (config.kv_lora_rank + config.qk_rope_head_dim)
        keys_values = config.n_heads * (config.qk_nope_head_dim + config.v_head_dim)
        out = config.n_heads * config.v_head_dim * config.dim
        return query + latent + config.kv_lora_rank * keys_values + out

    @staticmethod
    def latent_values(config: ModelConfig) -> int:
        return config.q_lora_rank + config.kv_lora_rank + config.qk_rope_head_dim

    @staticmethod
    def absorbs(config: ModelConfig, n_queries: int) -> bool:
        """Whether absorbed attention takes fewer multiplications for that many queries per row."""
        C, R = config.kv_lora_rank, config.qk_rope_head_dim
        H, W = config.qk_nope_head_dim, config.v_head_dim
        # Per head and cached position. Expanded, each position's key and value are computed first.
        return n_queries * (C + R + C) < C * (H + W) + n_queries * (H + R + W)

    def queries(self, x_BTD: jax.Array, angles: Angles) -> jax.Array:
        """Returns [B, T, N, H + R], the last R channels rotated."""
        if self.config.q_lora_rank:
            return self.queries_of(self.query_latent(x_BTD), self.wq_b[...], angles)
        return self.queries_of(x_BTD, self.wq[...], angles)

    def query_latent(self, x_BTD: jax.Array) -> jax.Array:
        """Returns the normed latent that queries are projected from, [B, T, Q]."""
        return self.q_norm(checkpoint_name(linear(x_BTD, self.wq_a[...], self.policy), "latent"))

    def queries_of(self, x_BTX: jax.Array, w: jax.Array, angles: Angles) -> jax.Array:
        """Projects to queries and rotates them: [B, T, N, H + R]."""
        config = self.config
        q = linear(x_BTX, w, self.policy)
        q = q.reshape(*x_BTX.shape[:2], config.n_heads, config.qk_head_dim)
        q_nope, q_rope = jnp.split(q, [config.qk_nope_head_dim], axis=-1)
        return jnp.concatenate([q_nope, rope.rotate_pairs(q_rope, *angles)], axis=-1)

    def entries(self, x_BTD: jax.Array, angles: Angles) -> dict[str, jax.Array]:
        kv = checkpoint_name(linear(x_BTD, self.wkv_a[...], self.policy), "latent")
        c_BTC, k_rope_BTR = jnp.split(kv, [self.config.kv_lora_rank], axis=-1)
        k_rope_BTR = rope.rotate_pairs(k_rope_BTR[:, :, None], *angles)[:, :, 0]
        return {"latent": self.kv_norm(c_BTC), "rope_key": k_rope_BTR}

    def expansion(self) -> Any:
        if self.w_keys is None or self.w_values is None:
            return self.wkv_b[...]
        return PerHead(self.w_keys[...], self.w_values[...])

    def lay_out_for_decoding(self) -> None:
        # Absorbed attention would copy it to this order in every step.
        wkv_b = self.wkv_b[...]
        w_NCX = self._per_head_weights(wkv_b, wkv_b)
        keys_NCH, values_NCW = jnp.split(w_NCX, [self.config.qk_nope_head_dim], axis=-1)
        self.w_keys = self.wkv_b.copy(keys_NCH.swapaxes(1, 2))
        self.w_values = self.wkv_b.copy(values_NCW)

    def steps(self, x_BTD: jax.Array, cache: LayerCache) -> bool:
        """Tells whether `step` takes these tokens, here.

        Must be called on the stack of all layers.
        """
        config, policy = self.config, self.policy
        B, T, _ = x_BTD.shape
        H, W = config.qk_nope_head_dim, config.v_head_dim
        C, R = config.kv_lora_rank, config.qk_rope_head_dim
        query = jax.ShapeDtypeStruct((B, T, config.n_heads, C), x_BTD.dtype)
        stacks = cache.entries["latent"], cache.entries["rope_key"]
        return (
            type(self) is MLA  # with an index there is more to do
            and policy.fp8 is None
            and parts_here("length") == 1  # the cache is whole
            and self.absorbs(config, T)
            and few_rows.fits(B, self._matrices, x_BTD.dtype, policy.target)
            and latent_queries.fits(H, W, C, R)
            and latent_attention.fits(query, *stacks, policy.target)
        )

    @property
    def _matrices(self) -> list[Any]:
        queries = [self.wq_a, self.wq_b] if self.config.q_lora_rank else [self.wq]
        return [each[...] for each in (*queries, self.wkv_a, self.wkv_b, self.wo)]

    @jax.named_scope("attention")
    def step(
        self,
        x_BTD: jax.Array,
        norm: RMSNorm,
        angles: Angles,
        cache: LayerCache,
        positions_BT: jax.Array,
    ) -> tuple[jax.Array, LayerCache]:
        """Does what a layer does up to its feed-forward half, for one token per row, in a few
        kernels that read the layer's weights where they lie.

        Must be called on the stack of all layers.

        Args:
          x_BTD: the residual.
          norm: the layers' norms before their attention.

        Returns:
          the residual, and the cache with the tokens' entries.
        """
        config, target = self.config, self.policy.target
        products = functools.partial(
            few_rows.few_row_products, layer=cache.layer, multiprocessors=target.multiprocessors
        )
        x_MD, positions_M = x_BTD[:, 0], positions_BT[:, 0]
        cos_BTR, sin_BTR = angles
        first = self.wq_a if config.q_lora_rank else self.wq
        q_MX, kv_MX = products(x_MD, [first[...], self.wkv_a[...]], norm=_norm(norm))
        if config.q_lora_rank:
            (q_MX,) = products(q_MX, [self.wq_b[...]], norm=_norm(self.q_norm))
        q_MNC, q_MNR, latents, keys = latent_queries.latent_queries(
            q_MX,
            kv_MX,
            (cos_BTR[:, 0], sin_BTR[:, 0]),
            positions_M,
            self.wkv_b[...],
            _norm(self.kv_norm),
            (cache.entries["latent"], cache.entries["rope_key"]),
            cache.layer,
            n_heads=config.n_heads,
        )
        attended = latent_attention.latent_attention(
            q_MNC[:, None],
            q_MNR[:, None],
            latents,
            keys,
            cache.layer,
            positions_BT,
            scale=rope.attention_scale(config),
            multiprocessors=target.multiprocessors,
        )
        out_MX = latent_queries.head_values(
            attended.out_BTNW[:, 0], self.wkv_b[...], cache.layer, value_width=config.v_head_dim
        )
        (x_MD,) = products(out_MX, [self.wo[...]], residual_MF=x_MD)
        return x_MD[:, None], cache._replace(entries={"latent": latents, "rope_key": keys})

    def expand(self, c_BSC, k_rope_BSR, wkv_b) -> tuple[jax.Array, jax.Array]:  # type: ignore
        """Returns keys [B, S, N, H + R], each head's ending with the shared rotated key, and values
        [B, S, N, W].
        """
        k_nope, v_BSNW = self._up(c_BSC, wkv_b)
        k_rope = jnp.broadcast_to(k_rope_BSR[:, :, None], (*k_nope.shape[:3], k_rope_BSR.shape[-1]))
        return jnp.concatenate([k_nope, k_rope], axis=-1), v_BSNW

    def _up(self, c_BSC: jax.Array, wkv_b: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Projects latents up to keys without position, [B, S, N, H], and values [B, S, N, W]."""
        H, W = self.config.qk_nope_head_dim, self.config.v_head_dim
        if isinstance(wkv_b, PerHead):
            w_NCX = jnp.concatenate([wkv_b.keys_NHC.swapaxes(1, 2), wkv_b.values_NCW], axis=-1)
            wkv_b = w_NCX.swapaxes(0, 1).reshape(self.config.kv_lora_rank, -1)
        expanded = linear(c_BSC, wkv_b, self.policy).reshape(*c_BSC.shape[:2], -1, H + W)
        return expanded[..., :H], expanded[..., H:]

    def attend(
        self, cache: LayerCache, q_BTNH: jax.Array, positions_BT: jax.Array, weights: Any
    ) -> Attended:
        options: Any = {
            "scale": rope.attention_scale(self.config),
            "target": self.policy.target,
            "part": split_cache.part(),
        }
        q_nope, q_rope = jnp.split(q_BTNH, [self.config.qk_nope_head_dim], axis=-1)

        def expanded_block(start: jax.Array | int, size: int) -> Block:
            entries = cache.read(start, size)
            k_BSNH, v_BSNW = self._up(entries["latent"][:, 0], weights)
            return Block((k_BSNH.swapaxes(1, 2), entries["rope_key"]), v_BSNW.swapaxes(1, 2))

        def latent_block(start: jax.Array | int, size: int) -> Block:
            entries = cache.read(start, size)
            c_B1SC = entries["latent"]
            return Block((c_B1SC, entries["rope_key"]), c_B1SC)

        if not self.absorbs(self.config, q_BTNH.shape[1]):
            queries = q_nope, q_rope
            return cached_attention(queries, expanded_block, cache.length, positions_BT, **options)
        queries = self.absorbed(q_nope, weights), q_rope
        stacks = cache.entries["latent"], cache.entries["rope_key"]
        target = self.policy.target
        if options["part"].n_parts == 1 and latent_attention.fits(queries[0], *stacks, target):
            attended = latent_attention.latent_attention(
                *queries,
                *stacks,
                cache.layer,
                positions_BT,
                scale=options["scale"],
                multiprocessors=target.multiprocessors,
            )
        else:
            attended = cached_attention(
                queries, latent_block, cache.length, positions_BT, **options
            )
        return attended._replace(out_BTNW=self.projected(attended.out_BTNW, weights))

    def absorbed(self, q_BTNH: jax.Array, weights: Any) -> jax.Array:
        """Returns queries of latents, [B, T, N, C], for queries without position, [B, T, N, H] of
        keys that are projected from latents.
        """
        if isinstance(weights, PerHead):
            return _per_head(q_BTNH, weights.keys_NHC.astype(q_BTNH.dtype), 1)
        # Zeros where the weight holds values: taking it apart would cost more than they do.
        q_BTNX = jnp.pad(q_BTNH, ((0, 0), (0, 0), (0, 0), (0, self.config.v_head_dim)))
        return _per_head(q_BTNX, self._per_head_weights(weights, q_BTNH), 2)

    def projected(self, out_BTNC: jax.Array, weights: Any) -> jax.Array:
        """Projects latents that were summed by weight to values, [B, T, N, W]."""
        if isinstance(weights, PerHead):
            return _per_head(out_BTNC, weights.values_NCW.astype(out_BTNC.dtype), 1)
        out_BTNX = _per_head(out_BTNC, self._per_head_weights(weights, out_BTNC), 1)
        return out_BTNX[..., self.config.qk_nope_head_dim :]

    def _per_head_weights(self, wkv_b: Any, like: jax.Array) -> jax.Array:
        """Returns `wkv_b` as a matrix per head, [N, C, H + W]."""
        config = self.config
        # Whole heads on each device first. If `tensor` gives a device several heads, of which other
        # axes hold parts, XLA (jax 0.10.2) returns zeros as the gradient of all but the first.
        wkv_b = constrain(wkv_b.astype(like.dtype), "latent", "heads")
        return jnp.reshape(wkv_b, (config.kv_lora_rank, config.n_heads, -1)).swapaxes(0, 1)


def _norm(norm: RMSNorm) -> few_rows.Norm:
    return few_rows.Norm(norm.weight[...], norm.eps)


def _per_head(x_BTNY: jax.Array, w_NXY: jax.Array, contracted: int) -> jax.Array:
    """Multiplies each head by a matrix of its own, along the matrix's dimension `contracted`."""
    # The matrices stay as they are: a product that wants them transposed copies them first, which
    # takes longer than the product when decoding. B and T may be split over devices, each on its
    # own, so they are not flattened.
    out_NBTX = jax.lax.dot_general(x_BTNY, w_NXY, (((3,), (contracted,)), ((2,), (0,))))
    return jnp.moveaxis(out_NBTX, 0, 2)
