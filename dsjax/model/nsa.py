"""Native sparse attention (NSA): grouped queries that read compressed, selected and recent keys.

Each of three branches has keys and values of its own; the queries are shared. A learned network
compresses the keys of a run of tokens to one, and their values likewise. The sum of the branches is
weighted by gates, one per head and branch, that depend on the token alone.
`dsjax.kernels.native_sparse` has the attention itself.

The paper leaves open: the network, here one hidden layer as wide as a head, SiLU, over the
concatenated tokens plus a learned position inside the run, one network for all key heads; and rope,
here on queries, on the keys of the selected and window branches at their own place, and on a
compressed key, which is made of keys without rope, at the place of its first token.

Decoding caches all three branches' keys and values per token, and one compressed entry per stride.

Paper: NSA (arXiv:2502.11089), section 3.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from dsjax.config import ModelConfig
from dsjax.kernels import native_sparse
from dsjax.kernels.native_sparse import Branch, Pattern, Queries, Stack
from dsjax.model import rope
from dsjax.model.attention import Angles, Attention
from dsjax.model.layer_cache import EntryShape, LayerCache
from dsjax.model.layers import Constant, Normal, declare
from dsjax.parallel import context
from dsjax.parallel.sharding import parts_here
from dsjax.precision.activations import attention_linear
from dsjax.precision.matmul import linear
from dsjax.precision.policy import Policy

_BRANCHES = ("compress", "select", "window")


def pattern(config: ModelConfig) -> Pattern:
    """Returns the sizes that the attention works with."""
    return Pattern(
        config.nsa_length, config.nsa_stride, config.nsa_block, config.nsa_count, config.nsa_window
    )


class Compressor(nnx.Module):
    """Makes one vector of the keys, or values, of `length` tokens; every head has it alike."""

    def __init__(self, length: int, width: int, init_std: float, policy: Policy):
        # Scaled by fan-in, not by init_std: the first layer sums length * width inputs.
        self.position = declare((length, width), ("norm", "latent"), Normal(init_std))
        self.w_in = declare(
            (length * width, width), ("latent", "latent"), Normal((length * width) ** -0.5)
        )
        self.b_in = declare((width,), ("latent",), Constant(0.0))
        self.w_out = declare((width, width), ("latent", "latent"), Normal(width**-0.5))
        self.policy = policy

    def __call__(self, x_XUH: jax.Array) -> jax.Array:
        """Compresses runs of tokens, [..., length, H], to [..., H]."""
        position = jnp.broadcast_to(self.position[...].astype(x_XUH.dtype), x_XUH.shape)
        placed = x_XUH + position
        flat = placed.reshape(*placed.shape[:-2], -1)
        hidden = linear(flat, self.w_in[...], self.policy)
        bias = self.b_in[...].astype(hidden.dtype)
        hidden = jax.nn.silu(hidden + jnp.broadcast_to(bias, hidden.shape))
        return linear(hidden, self.w_out[...], self.policy)


class NSA(Attention):
    """Each of P key heads serves N / P consecutive query heads, which share a choice of blocks."""

    splits = False

    def __init__(self, config: ModelConfig, policy: Policy):
        init = Normal(config.init_std)
        D, N, P = config.dim, config.n_heads, config.kv_heads
        H, W = config.qk_head_dim, config.value_head_dim
        self.wq = declare((D, N * H), ("embed", "heads"), init)
        for branch in _BRANCHES:
            setattr(self, f"wk_{branch}", declare((D, P * H), ("embed", "heads"), init))
            setattr(self, f"wv_{branch}", declare((D, P * W), ("embed", "heads"), init))
        self.compress_key = Compressor(config.nsa_length, H, config.init_std, policy)
        self.compress_value = Compressor(config.nsa_length, W, config.init_std, policy)
        self.w_gate = declare((D, N * 3), ("embed", "heads"), init)
        self.wo = declare((N * W, D), ("heads", "embed"), init)
        self.config = config
        self.policy = policy

    @staticmethod
    def cached(config: ModelConfig) -> dict[str, EntryShape]:
        key = EntryShape(config.kv_heads, config.qk_head_dim)
        value = EntryShape(config.kv_heads, config.value_head_dim)
        every = {"every": config.nsa_stride}
        entries = {"entry_key": key._replace(**every), "entry_value": value._replace(**every)}
        for branch in _BRANCHES:
            entries |= {f"{branch}_key": key, f"{branch}_value": value}
        return entries

    @staticmethod
    def matmul_parameters(config: ModelConfig) -> int:
        N, P = config.n_heads, config.kv_heads
        H, W = config.qk_head_dim, config.value_head_dim
        projections = config.dim * (N * (H + W + 3) + 3 * P * (H + W))
        # Run once per stride and key head, not once per token.
        network = (config.nsa_length + 1) * (H * H + W * W)
        return projections + P * network // config.nsa_stride

    @staticmethod
    def context_flops(config: ModelConfig, length: int, causal: bool) -> int:
        sizes = pattern(config)
        chosen = sizes.blocks * sizes.size
        share = 0.5 if causal else 1.0
        keys = share * length / sizes.stride
        for most in (chosen, sizes.window):
            # The mean of min(most, number of earlier keys) over the sequence.
            short = min(most, length)
            keys += (length - short * share) * short / length if causal else short
        width = config.n_heads * (config.qk_head_dim + config.value_head_dim)
        return round(2 * keys * width)

    def _heads(self, x_BTD: jax.Array, name: str, width: int) -> jax.Array:
        """Projects to heads: [B, T, heads, width]."""
        out = linear(x_BTD, getattr(self, name)[...], self.policy)
        return out.reshape(*x_BTD.shape[:2], -1, width)

    def queries(self, x_BTD: jax.Array, angles: Angles) -> jax.Array:
        return rope.rotate_halves(self._heads(x_BTD, "wq", self.config.qk_head_dim), *angles)

    def entries(self, x_BTD: jax.Array, angles: Angles) -> dict[str, jax.Array]:
        config, entries = self.config, {}
        for branch in _BRANCHES:
            key = self._heads(x_BTD, f"wk_{branch}", config.qk_head_dim)
            # Compressed keys are rotated after they are compressed.
            key = key if branch == "compress" else rope.rotate_halves(key, *angles)
            value = self._heads(x_BTD, f"wv_{branch}", config.value_head_dim)
            entries |= {f"{branch}_key": key, f"{branch}_value": value}
        return entries

    def _gates(self, x_BTD: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(self._heads(x_BTD, "w_gate", 3).astype(jnp.float32))

    def _compress(
        self, key: Stack, value: Stack, begins_BZ: jax.Array, positions_BZ: jax.Array
    ) -> dict[str, jax.Array]:
        """Compresses the runs of tokens that begin at some places: [B, Z, P, X].

        Args:
          begins_BZ: int32; a run that ends after the stack holds what is there, and is never seen.
          positions_BZ: int32, of the first token of each run, in its document.
        """
        run_U = lax.iota(jnp.int32, self.config.nsa_length)
        places_BZU = jnp.clip(begins_BZ[..., None] + run_U[None, None], 0, key.length - 1)
        P = self.config.kv_heads
        places_BPZU = jnp.broadcast_to(
            places_BZU[:, None], (begins_BZ.shape[0], P, *places_BZU.shape[1:])
        )
        key_BPZH = self.compress_key(key.take(places_BPZU))
        key_BZPH = rope.rotate_halves(
            key_BPZH.swapaxes(1, 2), *rope.angles(positions_BZ, self.config)
        )
        value_BPZW = self.compress_value(value.take(places_BPZU))
        return {"entry_key": key_BZPH, "entry_value": value_BPZW.swapaxes(1, 2)}

    @jax.named_scope("attention")
    def __call__(
        self, x_BTD: jax.Array, angles: Angles, segment_ids_BT: jax.Array | None = None
    ) -> jax.Array:
        B, T, _ = x_BTD.shape
        # Devices of `mesh.context` hold the queries in an order of their own, and all of the keys.
        whole = {name: context.restore(x) for name, x in self.entries(x_BTD, angles).items()}
        stacks = {name: Stack(x.swapaxes(1, 2)[None], 0) for name, x in whole.items()}
        segments = jnp.ones((B, T), jnp.int32)
        if segment_ids_BT is not None:
            segments = context.restore(segment_ids_BT)
        positions_BS = rope.positions_in_segments(segments)
        begins_BZ, begins_at_BZ = entry_places(
            segments, positions_BS, self.config.nsa_length, self.config.nsa_stride
        )
        made = self._compress(
            stacks["compress_key"], stacks["compress_value"], begins_BZ, begins_at_BZ
        )
        stacks |= {name: Stack(x.swapaxes(1, 2)[None], 0) for name, x in made.items()}
        places_BT = lax.broadcasted_iota(jnp.int32, (B, T), 1)
        n_parts = parts_here("length")
        out_BTNW = native_sparse.attend(
            Queries(
                self.queries(x_BTD, angles),
                context.arrange(places_BT),
                context.arrange(places_BT - positions_BS),
                self._gates(x_BTD),
            ),
            *_branches(stacks, begins_BZ),
            pattern=pattern(self.config),
            scale=rope.attention_scale(self.config),
            target=self.policy.target,
            part=T // (2 * n_parts) if n_parts > 1 else None,
            aligned=segment_ids_BT is None,
        )
        return attention_linear(out_BTNW.reshape(B, T, -1), self.wo[...], self.policy)

    def extend(
        self, x_BTD: jax.Array, angles: Angles, cache: LayerCache, positions_BT: jax.Array
    ) -> tuple[jax.Array, LayerCache]:
        B, T, _ = x_BTD.shape
        sizes, start_B = pattern(self.config), positions_BT[:, 0]
        cache = cache.append(start_B, **self.entries(x_BTD, angles))
        stacks = {name: Stack(stack, cache.layer) for name, stack in cache.entries.items()}
        # Every entry that a new token completes, and perhaps one that a later token will.
        first_B = jnp.maximum((start_B - sizes.length) // sizes.stride + 1, 0)
        index_BZ = first_B[:, None] + lax.iota(jnp.int32, -(-T // sizes.stride))[None]
        begins_BZ = index_BZ * sizes.stride
        made = self._compress(
            stacks["compress_key"], stacks["compress_value"], begins_BZ, begins_BZ
        )
        cache = cache.append(first_B, **made)
        stacks = {name: Stack(stack, cache.layer) for name, stack in cache.entries.items()}
        all_Z = lax.iota(jnp.int32, stacks["entry_key"].length) * sizes.stride
        out_BTNW = native_sparse.attend(
            Queries(
                self.queries(x_BTD, angles),
                positions_BT,
                jnp.zeros_like(positions_BT),
                self._gates(x_BTD),
            ),
            *_branches(stacks, jnp.broadcast_to(all_Z[None], (B, len(all_Z)))),
            pattern=sizes,
            scale=rope.attention_scale(self.config),
            target=self.policy.target,
            aligned=True,
        )
        return linear(out_BTNW.reshape(B, T, -1), self.wo[...], self.policy), cache


def _branches(
    stacks: dict[str, Stack], begins_BZ: jax.Array
) -> tuple[Branch, jax.Array, Branch, Branch]:
    """Names what `native_sparse.attend` attends to, in its order."""
    entry, select, window = (
        Branch(stacks[f"{name}_key"], stacks[f"{name}_value"])
        for name in ("entry", "select", "window")
    )
    return entry, begins_BZ, select, window


def entry_places(
    segments_BS: jax.Array, positions_BS: jax.Array, length: int, stride: int
) -> tuple[jax.Array, jax.Array]:
    """Finds where the compressed entries of packed documents begin: every stride from the beginning
    of each document on, as long as the document holds all of their tokens.

    Since an entry is at least as long as a stride, at most one begins in any stride of the row, so
    entry number z of the result begins in row places [z stride, (z + 1) stride).

    Returns:
      int32 [B, Z], the place of the first token, -1 where no entry begins; and its position in its
      document.
    """
    B, S = segments_BS.shape
    count = -(-S // stride)
    reach = length - 1
    last_BS = jnp.pad(segments_BS, ((0, 0), (0, reach)), constant_values=-1)[:, reach:]
    begins_BS = (positions_BS % stride == 0) & (last_BS == segments_BS)
    fill = ((0, 0), (0, count * stride - S))
    places_BS = jnp.where(begins_BS, lax.broadcasted_iota(jnp.int32, (B, S), 1), -1)
    places_BZ = jnp.pad(places_BS, fill, constant_values=-1).reshape(B, count, stride).max(axis=-1)
    positions_BZ = jnp.take_along_axis(positions_BS, jnp.maximum(places_BZ, 0), axis=1)
    return places_BZ, positions_BZ
