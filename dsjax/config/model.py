"""The shape of a model."""

from __future__ import annotations

import dataclasses
from typing import Literal

from dsjax.config.rules import (
    require,
    require_at_most,
    require_not_negative,
    require_positive,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a model: everything that changes its mathematics, and nothing else.

    One class covers the dense models (DeepSeek LLM and the R1 distills: `attention="gqa"`, no
    routed experts), DeepSeekMoE (`gqa` with experts), V2, V3 and R1 (`mla` with experts), V3.2
    (`mla` with experts and an indexer), native sparse attention (`nsa`), and V4 (`compressed`).
    `n_layers` counts the main stack; the `n_mtp` multi-token prediction modules are extra.
    """

    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    inter_dim: int  # hidden width of a dense feed-forward layer
    # leading layers with a dense feed-forward; must be n_layers if there are no routed experts
    n_dense_layers: int = 0
    norm_eps: float = 1e-6
    tie_embed: bool = False  # the output head is the transposed embedding
    init_std: float = 0.006  # V3 section 4.2
    max_seq_len: int = 4096

    attention: Literal["mla", "gqa", "nsa", "compressed"] = "mla"
    # mla
    q_lora_rank: int = 0  # 0: queries are projected directly (V2-Lite)
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    # mla with an indexer, which chooses the keys that a query attends to (V3.2); all 0: all
    # earlier. compressed: the indexer of its sparse layers, which chooses compressed entries
    index_n_heads: int = 0
    index_head_dim: int = 0
    index_topk: int = 0  # keys per query
    # gqa, nsa and compressed; nsa's values have v_head_dim, or with 0 head_dim
    n_kv_heads: int = 0  # 0: n_heads, that is, multi-head attention; compressed has one
    head_dim: int = 0  # 0: dim / n_heads
    # gqa
    qkv_bias: bool = False  # biases on queries, keys and values (Qwen2)
    qk_norm: bool = False  # an RMSNorm of each head's query and key, before rope (Qwen3)

    # nsa, in tokens: keys are compressed by `nsa_length`, every `nsa_stride`; of blocks of
    # `nsa_block`, `nsa_count` are selected; and the last `nsa_window` are always seen
    nsa_length: int = 32
    nsa_stride: int = 16
    nsa_block: int = 64
    nsa_count: int = 16
    nsa_window: int = 512

    # compressed: each layer sees the last `window_size` tokens and, unless it is a "window" layer,
    # compressed entries: "heavy" layers all of them, each of `heavy_ratio` tokens, "sparse" layers
    # those that an indexer chooses, each of `sparse_ratio` tokens
    layer_types: tuple[Literal["window", "sparse", "heavy"], ...] = ()
    window_size: int = 128
    sparse_ratio: int = 4
    heavy_ratio: int = 128
    o_groups: int = 0  # heads are projected to o_lora_rank channels a group, then to the width
    o_lora_rank: int = 0
    compress_rope_theta: float = 160000.0  # of layers with entries, whose rope `rope_scaling` is
    hc_mult: int = 4  # residual streams
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    hash_layers: tuple[int, ...] = ()  # numbers of layers whose experts a table of tokens chooses

    rope_theta: float = 10000.0
    rope_scaling: Literal["none", "linear", "yarn", "llama3"] = "none"
    rope_factor: float = 1.0
    original_seq_len: int = 4096
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0

    n_routed_experts: int = 0
    n_shared_experts: int = 0
    n_activated_experts: int = 0  # routed experts per token
    moe_inter_dim: int = 0  # hidden width of one expert
    n_expert_groups: int = 1
    n_limited_groups: int = 1  # groups that a token may choose experts from
    score_func: Literal["sigmoid", "softmax", "sqrtsoftplus"] = "sigmoid"
    group_score: Literal["top2", "max"] = "top2"  # V3: sum of the two best scores; V2: the best
    # a bias per expert that only affects selection (V3's balancing without an auxiliary loss)
    router_bias: bool = False
    norm_topk: bool = False  # normalize the weights of the chosen experts to sum to route_scale
    route_scale: float = 1.0
    # experts' gates are at most this, and what they multiply at most this in size; 0: no limit
    swiglu_limit: float = 0.0

    n_mtp: int = 0
    # the first MTP module reads the main model's hidden state after its final norm, not before it
    mtp_after_final_norm: bool = True

    def __post_init__(self) -> None:
        require_positive(
            "model", self, "vocab_size", "dim", "n_layers", "n_heads", "inter_dim", "norm_eps",
            "max_seq_len", "rope_theta", "rope_factor", "original_seq_len", "init_std",
            "route_scale",
        )  # fmt: skip
        require_not_negative(
            "model", self, "n_dense_layers", "n_routed_experts", "n_shared_experts",
            "n_activated_experts", "n_mtp", "q_lora_rank", "n_kv_heads", "head_dim", "v_head_dim",
            "index_n_heads", "index_head_dim", "index_topk", "swiglu_limit",
        )  # fmt: skip
        self._check_attention()
        self._check_indexer()
        self._check_experts()

    def _check_attention(self) -> None:
        if self.attention == "mla":
            require_positive(
                "model", self, "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"
            )
        elif not self.head_dim:
            require(
                self.dim % self.n_heads == 0,
                f"model.dim={self.dim} does not divide by model.n_heads={self.n_heads}; set "
                "model.head_dim",
            )
        if self.attention == "nsa":
            self._check_nsa()
        if self.attention == "compressed":
            self._check_compressed()
        require(
            self.n_heads % self.kv_heads == 0,
            f"model.n_heads={self.n_heads} does not divide by model.n_kv_heads={self.n_kv_heads}",
        )
        apart = self.attention in ("mla", "compressed")
        own = "model.qk_rope_head_dim" if apart else "a head's width (model.head_dim)"
        require(
            self.rope_dim % 2 == 0,
            f"rope rotates pairs of channels, so {own} must be even, not {self.rope_dim}",
        )
        # Equal is legal: Kimi-K2 has 1 and 1, which leaves a ramp of one channel.
        require_at_most("model", self, "beta_slow", "beta_fast")
        if self.rope_scaling == "llama3":
            require_at_most("model", self, "low_freq_factor", "high_freq_factor")

    def _check_indexer(self) -> None:
        names = ("index_n_heads", "index_head_dim", "index_topk")
        given = {name: getattr(self, name) for name in names}
        if not any(given.values()):
            return
        require(
            all(given.values()),
            f"an indexer needs {', '.join(f'model.{name}' for name in names)} above 0, not "
            f"{', '.join(map(str, given.values()))}; set all three, or all to 0 for none",
        )
        require(
            self.attention in ("mla", "compressed") and self.q_lora_rank > 0,
            f"an indexer (model.index_topk={self.index_topk}) reads the query latent, so it needs "
            f"model.attention=mla and model.q_lora_rank above 0, not {self.attention} and "
            f"{self.q_lora_rank}",
        )
        require(
            self.index_head_dim >= self.qk_rope_head_dim,
            f"model.index_head_dim={self.index_head_dim} has no room for the "
            f"model.qk_rope_head_dim={self.qk_rope_head_dim} channels that rope rotates; raise it",
        )

    def _check_nsa(self) -> None:
        require_positive(
            "model", self, "nsa_length", "nsa_stride", "nsa_block", "nsa_count", "nsa_window"
        )
        for name in ("nsa_length", "nsa_block"):
            value = getattr(self, name)
            require(
                value % self.nsa_stride == 0,
                f"model.{name}={value} does not divide by model.nsa_stride={self.nsa_stride}: "
                "blocks are made of whole strides",
            )
        require(
            self.nsa_count >= 3,
            f"model.nsa_count={self.nsa_count} leaves no room for the first block and the two "
            "nearest, which are always selected; it must be at least 3",
        )
        require(
            not self.qkv_bias and not self.qk_norm,
            f"model.attention=nsa has neither biases nor norms of queries and keys, but "
            f"model.qkv_bias={self.qkv_bias} and model.qk_norm={self.qk_norm}; set both to False",
        )

    def _check_compressed(self) -> None:
        require_positive(
            "model", self, "head_dim", "qk_rope_head_dim", "q_lora_rank", "window_size",
            "sparse_ratio", "heavy_ratio", "o_groups", "o_lora_rank", "compress_rope_theta",
            "hc_mult", "hc_sinkhorn_iters", "hc_eps", "n_routed_experts",
        )  # fmt: skip
        require_at_most("model", self, "qk_rope_head_dim", "head_dim")
        require(
            len(self.layer_types) == self.n_layers,
            f"model.layer_types names {len(self.layer_types)} layers, and model.n_layers="
            f"{self.n_layers}; name the kind of each: window, sparse or heavy",
        )
        require(
            "sparse" not in self.layer_types or self.index_topk > 0,
            "model.layer_types has sparse layers, whose entries an indexer chooses: set "
            "model.index_n_heads, model.index_head_dim and model.index_topk",
        )
        require(
            self.n_heads % self.o_groups == 0,
            f"model.n_heads={self.n_heads} does not divide into model.o_groups={self.o_groups}",
        )
        beyond = [layer for layer in self.hash_layers if not 0 <= layer < self.n_layers]
        require(
            not beyond and len(set(self.hash_layers)) == len(self.hash_layers),
            f"model.hash_layers={self.hash_layers} must be different layers from 0 to "
            f"{self.n_layers - 1}",
        )
        require(
            self.kv_heads == 1 and not self.n_dense_layers and not self.n_mtp,
            "model.attention=compressed has one key head, experts in every layer and no MTP "
            f"modules here, but model.n_kv_heads={self.n_kv_heads}, "
            f"model.n_dense_layers={self.n_dense_layers} and model.n_mtp={self.n_mtp}; set them to "
            "1, 0 and 0",
        )
        require(
            not self.qkv_bias and not self.qk_norm and self.n_expert_groups == 1,
            "model.attention=compressed has no biases, no weighted norms of queries and keys, and "
            f"no groups of experts, but model.qkv_bias={self.qkv_bias}, "
            f"model.qk_norm={self.qk_norm} and model.n_expert_groups={self.n_expert_groups}; set "
            "them to False, False and 1",
        )

    def _check_experts(self) -> None:
        require_at_most("model", self, "n_dense_layers", "n_layers")
        if not self.n_routed_experts:
            require(
                self.n_dense_layers == self.n_layers,
                "model.n_routed_experts=0, so all layers are dense: set "
                f"model.n_dense_layers={self.n_layers}",
            )
            return
        require_positive(
            "model", self, "moe_inter_dim", "n_activated_experts", "n_expert_groups",
            "n_limited_groups",
        )  # fmt: skip
        require(
            self.n_routed_experts % self.n_expert_groups == 0,
            f"model.n_routed_experts={self.n_routed_experts} does not divide into "
            f"model.n_expert_groups={self.n_expert_groups} equal groups",
        )
        require_at_most("model", self, "n_limited_groups", "n_expert_groups")
        experts_per_group = self.n_routed_experts // self.n_expert_groups
        require_at_most("model", self, "n_activated_experts", "n_routed_experts")
        selectable = self.n_limited_groups * experts_per_group
        require(
            self.n_activated_experts <= selectable,
            f"model.n_activated_experts={self.n_activated_experts} exceeds the {selectable} "
            f"experts of {self.n_limited_groups} groups of {experts_per_group}; raise "
            "model.n_limited_groups",
        )
        require(
            self.group_score == "max" or self.n_expert_groups == 1 or experts_per_group >= 2,
            "model.group_score=top2 needs at least two experts per group",
        )

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def _head_widths(self) -> tuple[int, int, int]:
        """One head's widths: query and key, value, and the channels of a key that rope rotates."""
        if self.attention == "mla":
            query_key = self.qk_nope_head_dim + self.qk_rope_head_dim
            return query_key, self.v_head_dim, self.qk_rope_head_dim
        width = self.head_dim or self.dim // self.n_heads
        if self.attention == "compressed":
            return width, width, self.qk_rope_head_dim
        value = (self.attention == "nsa" and self.v_head_dim) or width
        return width, value, width

    @property
    def qk_head_dim(self) -> int:
        """Width of one head's query and key."""
        return self._head_widths[0]

    @property
    def value_head_dim(self) -> int:
        """Width of one head's value."""
        return self._head_widths[1]

    @property
    def rope_dim(self) -> int:
        """Channels per head that are rotated."""
        return self._head_widths[2]

    def check_trains(self) -> None:
        """Raises ValueError if no training step is implemented for this model."""
        require(
            self.attention != "compressed",
            "model.attention=compressed (DeepSeek-V4) is read, scored and generated from here, but "
            "not trained; train a model with model.attention=mla, gqa or nsa",
        )

    @property
    def n_moe_layers(self) -> int:
        """Mixture-of-experts layers of the main stack."""
        return self.n_layers - self.n_dense_layers
