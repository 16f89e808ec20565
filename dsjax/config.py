"""Every hyper-parameter of an experiment, as frozen dataclasses that check themselves.

Field names follow DeepSeek's inference code (`q_lora_rank`, `n_routed_experts`). A group checks its
own fields when it is made, `Config` checks what spans groups. Nothing here imports jax, so that a
command can answer `--help` and refuse bad input at once. Reading files and `--set` overrides is in
`dsjax.settings`.
"""

from __future__ import annotations

import dataclasses
from typing import Literal


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_positive(group: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value > 0, f"{group}.{name}={value} must be greater than 0")


def _require_not_negative(group: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value >= 0, f"{group}.{name}={value} must not be negative")


def _require_fraction(group: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(0 <= value <= 1, f"{group}.{name}={value} must lie between 0 and 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a model: all that changes its mathematics, and nothing else.

    One config covers the dense family (DeepSeek LLM and the R1 distills: `attention="gqa"`, no
    routed experts), DeepSeekMoE (`gqa` with experts), V2 and V3/R1 (`mla` with experts). `n_layers`
    counts the main stack; `n_mtp` multi-token prediction modules come on top of it.
    """

    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    inter_dim: int  # hidden width of a dense feed-forward layer
    # leading layers with a dense feed-forward; all of them when there are no routed experts
    n_dense_layers: int = 0
    norm_eps: float = 1e-6
    tie_embed: bool = False  # the output head is the embedding, transposed
    init_std: float = 0.006  # V3 section 4.2
    max_seq_len: int = 4096

    attention: Literal["mla", "gqa"] = "mla"
    # mla
    q_lora_rank: int = 0  # 0: queries are projected directly (V2-Lite)
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    # gqa
    n_kv_heads: int = 0  # 0: as many as n_heads (multi-head attention)
    head_dim: int = 0  # 0: dim / n_heads
    qkv_bias: bool = False  # Qwen2

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
    n_activated_experts: int = 0  # routed experts a token
    moe_inter_dim: int = 0  # hidden width of one expert
    n_expert_groups: int = 1
    n_limited_groups: int = 1  # groups a token may choose from
    score_func: Literal["sigmoid", "softmax"] = "sigmoid"
    group_score: Literal["top2", "max"] = "top2"  # V3: sum of a group's two best; V2: its best
    # V3: a bias per expert steers selection (auxiliary-loss-free balancing)
    router_bias: bool = False
    norm_topk: bool = False  # the chosen experts' weights are normalised to sum to route_scale
    route_scale: float = 1.0

    n_mtp: int = 0
    # the MTP module reads the main model's hidden state after its final norm
    mtp_after_final_norm: bool = True

    def __post_init__(self) -> None:
        _require_positive(
            "model", self, "vocab_size", "dim", "n_layers", "n_heads", "inter_dim", "norm_eps",
            "max_seq_len", "rope_theta", "rope_factor", "original_seq_len", "init_std",
            "route_scale",
        )  # fmt: skip
        _require_not_negative(
            "model", self, "n_dense_layers", "n_routed_experts", "n_shared_experts",
            "n_activated_experts", "n_mtp", "q_lora_rank", "n_kv_heads", "head_dim",
        )  # fmt: skip
        self._check_attention()
        self._check_experts()

    def _check_attention(self) -> None:
        if self.attention == "mla":
            _require_positive(
                "model", self, "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"
            )
        elif not self.head_dim:
            _require(
                self.dim % self.n_heads == 0,
                f"model.dim={self.dim} does not divide by model.n_heads={self.n_heads}; set "
                "model.head_dim",
            )
        _require(
            self.n_heads % self.kv_heads == 0,
            f"model.n_heads={self.n_heads} does not divide by model.n_kv_heads={self.n_kv_heads}",
        )
        _require(
            self.rope_dim % 2 == 0,
            f"rope rotates pairs, so its head dim must be even, not {self.rope_dim}",
        )
        _require(
            self.beta_slow < self.beta_fast,
            f"model.beta_slow={self.beta_slow} must be below model.beta_fast={self.beta_fast}",
        )
        if self.rope_scaling == "llama3":
            _require(
                self.low_freq_factor < self.high_freq_factor,
                f"model.low_freq_factor={self.low_freq_factor} must be below "
                f"model.high_freq_factor={self.high_freq_factor}",
            )

    def _check_experts(self) -> None:
        _require(
            self.n_dense_layers <= self.n_layers,
            f"model.n_dense_layers={self.n_dense_layers} exceeds model.n_layers={self.n_layers}",
        )
        if not self.n_routed_experts:
            _require(
                self.n_dense_layers == self.n_layers,
                "model.n_routed_experts=0, so all layers are dense: set "
                f"model.n_dense_layers={self.n_layers}",
            )
            return
        _require_positive(
            "model",
            self,
            "moe_inter_dim",
            "n_activated_experts",
            "n_expert_groups",
            "n_limited_groups",
        )
        _require(
            self.n_routed_experts % self.n_expert_groups == 0,
            f"model.n_routed_experts={self.n_routed_experts} does not divide into "
            f"model.n_expert_groups={self.n_expert_groups} equal groups",
        )
        _require(
            self.n_limited_groups <= self.n_expert_groups,
            f"model.n_limited_groups={self.n_limited_groups} exceeds "
            f"model.n_expert_groups={self.n_expert_groups}",
        )
        experts_per_group = self.n_routed_experts // self.n_expert_groups
        selectable = self.n_limited_groups * experts_per_group
        _require(
            self.n_activated_experts <= selectable,
            f"model.n_activated_experts={self.n_activated_experts} exceeds the {selectable} "
            "experts of "
            f"{self.n_limited_groups} groups of {experts_per_group}; raise model.n_limited_groups",
        )
        _require(
            self.group_score == "max" or self.n_expert_groups == 1 or experts_per_group >= 2,
            "model.group_score=top2 needs at least two experts a group",
        )

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def qk_head_dim(self) -> int:
        """Width of one head's query and key."""
        if self.attention == "mla":
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.head_dim or self.dim // self.n_heads

    @property
    def value_head_dim(self) -> int:
        return self.v_head_dim if self.attention == "mla" else self.qk_head_dim

    @property
    def rope_dim(self) -> int:
        """Channels of a head that are rotated."""
        return self.qk_rope_head_dim if self.attention == "mla" else self.qk_head_dim

    @property
    def n_moe_layers(self) -> int:
        """Mixture-of-experts layers of the main stack."""
        return self.n_layers - self.n_dense_layers

    @property
    def cache_values_per_token(self) -> int:
        """Values a token and layer that decoding keeps: latent and rope key, or keys and values."""
        if self.attention == "mla":
            return self.kv_lora_rank + self.qk_rope_head_dim
        return 2 * self.kv_heads * self.qk_head_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text comes from and how it becomes sequences."""

    # glob of text, .jsonl(.gz|.zst), .parquet; empty: the standard library's source on this machine
    files: str = ""
    heldout_files: str = ""  # glob of held-out text; empty: heldout_fraction of the documents
    heldout_fraction: float = 0.05
    text_field: str = "text"  # the column of JSON lines and parquet that holds the text
    # path of a tokenizer.json; empty: byte-level BPE trained on the corpus, cached with it
    tokenizer: str = ""
    sequence_length: int = 4096  # tokens a sequence
    fim_rate: float = 0.1  # share of documents rearranged as prefix-suffix-middle (V3 section 4.1)
    # attention stays inside a document; V3 pre-training leaves this off
    isolate_documents: bool = False
    cache_dir: str = ""  # token cache; empty: $XDG_CACHE_HOME/dsjax or ~/.cache/dsjax
    seed: int = 0

    def __post_init__(self) -> None:
        _require(
            self.sequence_length >= 2,
            f"data.sequence_length={self.sequence_length} must be at least 2",
        )
        _require_not_negative("data", self, "seed")
        _require_fraction("data", self, "fim_rate")
        _require(
            0 < self.heldout_fraction < 1,
            f"data.heldout_fraction={self.heldout_fraction} must lie strictly between 0 and 1",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batches, balancing and bookkeeping of a run. An `_every` of 0 turns it off."""

    steps: int = 1000
    batch_size: int = 8  # sequences an optimizer step, over all devices
    batch_size_start: int = 0  # first batch size of the ramp; 0: no ramp
    batch_ramp_fraction: float = 0.0  # share of the run's steps over which the batch grows
    # sequences a forward pass; smaller than the batch: gradients accumulate; 0: the batch
    micro_batch_size: int = 0
    seed: int = 0

    mtp_weight: float = 0.3  # lambda of V3 equation 25
    mtp_weight_final: float = 0.1
    mtp_switch: float = 10.0 / 14.8  # share of the run's tokens after which mtp_weight_final holds
    bias_update_speed: float = 0.001  # gamma of V3 section 2.1.2
    bias_update_until: float = 14.3 / 14.8  # share of the run's tokens after which the bias rests
    sequence_balance: float = 0.0001  # V3's sequence-wise loss
    expert_balance: float = 0.0  # V1 and V2's expert-level loss
    device_balance: float = 0.0  # V1 and V2's device-level loss, a device being an expert group
    communication_balance: float = 0.0  # V2's communication loss
    n_balance_devices: int = 0  # expert groups of the two losses above; 0: model.n_expert_groups

    # what the backward pass computes again
    remat: Literal["none", "selective", "full"] = "selective"
    loss_chunk: int = 1024  # tokens whose logits exist at one time on a device

    log_every: int = 10
    eval_every: int = 100
    # held-out sequences of an evaluation during the run; the last one takes all
    eval_sequences: int = 64
    checkpoint_every: int = 100
    keep: int = 3  # newest checkpoints kept
    # compare the copies that several devices hold of the state; also done before each checkpoint
    compare_every: int = 100
    sample_tokens: int = 128  # length of the sample written at the end; 0: none
    tensorboard: bool = True
    wandb_project: str = ""  # empty: no Weights & Biases

    def __post_init__(self) -> None:
        _require_positive(
            "train", self, "steps", "batch_size", "loss_chunk", "keep", "eval_sequences"
        )
        _require_not_negative(
            "train", self, "batch_size_start", "micro_batch_size", "log_every", "eval_every",
            "checkpoint_every", "compare_every", "sample_tokens", "mtp_weight", "mtp_weight_final",
            "bias_update_speed", "sequence_balance", "expert_balance", "device_balance",
            "communication_balance", "n_balance_devices", "seed",
        )  # fmt: skip
        _require_fraction("train", self, "batch_ramp_fraction", "mtp_switch", "bias_update_until")
        micro = self.micro_batch_size or self.batch_size
        for name in ("batch_size", "batch_size_start"):
            size = getattr(self, name)
            _require(
                size % micro == 0 if self.micro_batch_size or name == "batch_size" else True,
                f"train.{name}={size} does not divide into micro-batches of "
                f"train.micro_batch_size={micro}",
            )
        _require(
            self.batch_size_start <= self.batch_size,
            f"train.batch_size_start={self.batch_size_start} exceeds "
            f"train.batch_size={self.batch_size}",
        )
        _require(
            not self.batch_size_start or self.micro_batch_size > 0,
            "a batch ramp grows by whole micro-batches: set train.micro_batch_size",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its learning-rate schedule; defaults are V3's (section 4.2)."""

    learning_rate: float = 2.2e-4  # the highest
    schedule: Literal["v3", "multistep", "constant"] = "v3"
    warmup_steps: int = 2000
    # Shares of the run's tokens where the rate changes. v3: start of the cosine, its end, start of
    # the last tail.
    decay_points: tuple[float, ...] = (10.0 / 14.8, 14.3 / 14.8, 14.633 / 14.8)
    # Rate after each point as a share of the highest. v3: the cosine's end and first tail, then the
    # last tail.
    decay_ratios: tuple[float, ...] = (0.1, 7.3e-6 / 2.2e-4)
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip_norm: float = 1.0  # 0: no clipping
    moment_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        _require_positive("optim", self, "learning_rate", "epsilon")
        _require_not_negative("optim", self, "warmup_steps", "weight_decay", "clip_norm")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"optim.{name}={value} must lie in [0, 1)")
        if self.schedule == "constant":
            return
        _require(
            list(self.decay_points) == sorted(self.decay_points)
            and all(0 <= p <= 1 for p in self.decay_points),
            f"optim.decay_points={self.decay_points} must ascend between 0 and 1",
        )
        _require(
            all(ratio >= 0 for ratio in self.decay_ratios),
            f"optim.decay_ratios={self.decay_ratios} must not be negative",
        )
        wanted = (3, 2) if self.schedule == "v3" else (len(self.decay_points),) * 2
        _require(
            (len(self.decay_points), len(self.decay_ratios)) == wanted,
            f"optim.schedule={self.schedule} takes {wanted[0]} optim.decay_points and {wanted[1]} "
            "optim.decay_ratios, "
            f"not {len(self.decay_points)} and {len(self.decay_ratios)}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Element types: of masters, and (`compute`) of activations and of weights at use."""

    compute: Literal["bfloat16", "float32"] = "bfloat16"
    params: Literal["float32"] = "float32"  # master weights and gradients
    # linear layers and experts multiply in E4M3: natively where the device can, else emulated
    fp8: Literal["on", "off"] = "off"
    fp8_scale: Literal["fp32", "pow2"] = (
        "fp32"  # the report's, or powers of two: cheaper to emulate
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; one size may be -1 and takes all the devices that are left."""

    data: int = -1  # copies of the model
    fsdp: int = 1  # weights and optimizer state split, gathered at use
    expert: int = 1  # routed experts split, tokens sent to them
    tensor: int = 1  # heads, feed-forward width and vocabulary split
    context: int = 1  # sequences split along their length
    pipe: int = 1  # layers split into stages

    # The order in which the stages of a pipeline work (dsjax.parallel.schedules)
    schedule: Literal["gpipe", "1f1b", "interleaved", "zb1p", "dualpipe", "dualpipev"] = "1f1b"
    # micro-batches that a batch is cut into; 0: into those of train.micro_batch_size
    microbatches: int = 0

    def __post_init__(self) -> None:
        sizes = self.sizes
        for name, size in sizes.items():
            _require(
                size > 0 or size == -1,
                f"mesh.{name}={size} must be greater than 0, or -1 for what is left",
            )
        unknown = [name for name, size in sizes.items() if size == -1]
        _require(len(unknown) <= 1, f"only one mesh axis may be -1, not {' and '.join(unknown)}")
        _require_not_negative("mesh", self, "microbatches")

    @property
    def sizes(self) -> dict[str, int]:
        """Devices along each axis, what `dsjax.parallel.mesh.make_mesh` takes."""
        axes = ("data", "fsdp", "expert", "tensor", "context", "pipe")
        return {axis: getattr(self, axis) for axis in axes}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One experiment."""

    name: str
    model: ModelConfig
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    precision: PrecisionConfig = dataclasses.field(default_factory=PrecisionConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        length, limit = self.data.sequence_length, self.model.max_seq_len
        _require(
            length <= limit,
            f"data.sequence_length={length} exceeds model.max_seq_len={limit}; lower the one or "
            "raise the other",
        )
        _require(
            length > self.model.n_mtp + 1,
            f"data.sequence_length={length} leaves nothing to predict for "
            f"model.n_mtp={self.model.n_mtp}",
        )
        self._check_microbatches()
        groups = self.train.n_balance_devices or self.model.n_expert_groups
        _require(
            not self.model.n_routed_experts or self.model.n_routed_experts % groups == 0,
            f"model.n_routed_experts={self.model.n_routed_experts} does not divide over "
            f"train.n_balance_devices={groups}",
        )

    def _check_microbatches(self) -> None:
        count, size = self.mesh.microbatches, self.train.micro_batch_size
        batch = self.train.batch_size
        _require(
            not count or batch % count == 0,
            f"train.batch_size={batch} does not divide into mesh.microbatches={count}",
        )
        _require(
            not (count and size) or batch == count * size,
            f"mesh.microbatches={count} of train.micro_batch_size={size} do not make up "
            f"train.batch_size={batch}; set one of the two to 0",
        )

    @property
    def micro_batch_size(self) -> int:
        """Sequences of one forward pass."""
        train = self.train
        return train.micro_batch_size or train.batch_size // (self.mesh.microbatches or 1)
