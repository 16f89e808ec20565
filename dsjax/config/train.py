"""How a model trains: the run, the optimizer and the element types."""

from __future__ import annotations

import dataclasses
from typing import Literal

from dsjax.config.rules import (
    require,
    require_at_most,
    require_fraction,
    require_not_negative,
    require_positive,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batches, balancing and bookkeeping of a run. An `_every` of 0 turns that off."""

    steps: int = 1000
    batch_size: int = 8  # sequences per optimizer step, over all devices
    batch_size_start: int = 0  # batch size at the start of a ramp; 0: no ramp
    batch_ramp_fraction: float = 0.0  # fraction of the run's steps over which the batch grows
    # sequences per forward pass; gradients accumulate over the batch; 0: the whole batch at once
    micro_batch_size: int = 0
    seed: int = 0

    mtp_weight: float = 0.3  # lambda of V3 equation 25
    mtp_weight_final: float = 0.1
    mtp_switch: float = 10.0 / 14.8  # fraction of the run's tokens before mtp_weight_final applies
    bias_update_speed: float = 0.001  # gamma of V3 section 2.1.2
    bias_update_until: float = 14.3 / 14.8  # fraction of the run's tokens; then the bias is fixed
    sequence_balance: float = 0.0001  # V3's sequence-wise loss
    expert_balance: float = 0.0  # V1 and V2's expert-level loss
    device_balance: float = 0.0  # V1 and V2's device-level loss; a device is an expert group
    communication_balance: float = 0.0  # V2's communication loss
    n_balance_devices: int = 0  # expert groups of the two losses above; 0: model.n_expert_groups

    # of a model with an indexer: warmup trains it alone, to predict dense attention; sparse trains
    # all, the indexer to predict attention to the keys that it chose (V3.2 section 2.1)
    indexer: Literal["warmup", "sparse"] = "sparse"
    # which activations the backward pass recomputes
    remat: Literal["none", "selective", "full"] = "selective"
    loss_chunk: int = 1024  # tokens per device whose logits exist at the same time

    log_every: int = 10
    eval_every: int = 100
    # held-out sequences per evaluation during the run; the final evaluation uses all
    eval_sequences: int = 64
    checkpoint_every: int = 100
    keep: int = 3  # newest checkpoints to keep
    # compares the copies of the state on different devices; each checkpoint does so too
    compare_every: int = 100
    sample_tokens: int = 128  # length of the sample generated at the end; 0: none
    tensorboard: bool = True
    wandb_project: str = ""  # empty: no Weights & Biases

    def __post_init__(self) -> None:
        require_positive(
            "train", self, "steps", "batch_size", "loss_chunk", "keep", "eval_sequences"
        )
        require_not_negative(
            "train", self, "batch_size_start", "micro_batch_size", "log_every", "eval_every",
            "checkpoint_every", "compare_every", "sample_tokens", "mtp_weight", "mtp_weight_final",
            "bias_update_speed", "sequence_balance", "expert_balance", "device_balance",
            "communication_balance", "n_balance_devices", "seed",
        )  # fmt: skip
        require_fraction("train", self, "batch_ramp_fraction", "mtp_switch", "bias_update_until")
        for name in ("batch_size", "batch_size_start") if self.micro_batch_size else ():
            size = getattr(self, name)
            require(
                size % self.micro_batch_size == 0,
                f"train.{name}={size} does not divide into micro-batches of "
                f"train.micro_batch_size={self.micro_batch_size}",
            )
        require_at_most("train", self, "batch_size_start", "batch_size")
        require(
            not self.batch_size_start or self.micro_batch_size > 0,
            "a batch ramp grows by whole micro-batches: set train.micro_batch_size",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its learning-rate schedule. The defaults are V3's (section 4.2)."""

    learning_rate: float = 2.2e-4  # the peak
    schedule: Literal["v3", "multistep", "cosine", "constant"] = "v3"
    warmup_steps: int = 2000
    # Fractions of the run's tokens at which the rate changes. v3: start of the cosine, its end, and
    # the last drop.
    decay_points: tuple[float, ...] = (10.0 / 14.8, 14.3 / 14.8, 14.633 / 14.8)
    # Rate after each point, relative to the peak. v3: after the cosine, then after the last drop.
    decay_ratios: tuple[float, ...] = (0.1, 7.3e-6 / 2.2e-4)
    final_ratio: float = 0.1  # cosine: rate at the end of the run, relative to the peak
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip_norm: float = 1.0  # 0: no clipping
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    # Share of the old value in a step of the weights' exponential moving average, which is then
    # what is scored and written; 0: no average
    ema: float = 0.0

    def __post_init__(self) -> None:
        require_positive("optim", self, "learning_rate", "epsilon")
        require_not_negative("optim", self, "warmup_steps", "weight_decay", "clip_norm")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optim.{name}={value} must lie in [0, 1)")
        require(
            0 <= self.ema < 1,
            f"optim.ema={self.ema} must lie in [0, 1): 0.99 averages about 100 steps, 0 none",
        )
        require_fraction("optim", self, "final_ratio")
        if self.schedule in ("cosine", "constant"):
            return
        require(
            list(self.decay_points) == sorted(self.decay_points)
            and all(0 <= p <= 1 for p in self.decay_points),
            f"optim.decay_points={self.decay_points} must ascend between 0 and 1",
        )
        require(
            all(ratio >= 0 for ratio in self.decay_ratios),
            f"optim.decay_ratios={self.decay_ratios} must not be negative",
        )
        wanted = (3, 2) if self.schedule == "v3" else (len(self.decay_points),) * 2
        require(
            (len(self.decay_points), len(self.decay_ratios)) == wanted,
            f"optim.schedule={self.schedule} takes {wanted[0]} optim.decay_points and {wanted[1]} "
            f"optim.decay_ratios, not {len(self.decay_points)} and {len(self.decay_ratios)}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Element types of a run."""

    compute: Literal["bfloat16", "float32"] = "bfloat16"  # activations, and weights at use
    params: Literal["float32"] = "float32"  # master weights and gradients
    # E4M3 products in linear layers and experts, emulated on devices without such matrix units
    fp8: Literal["on", "off"] = "off"
    # fp32 as in the V3 report; powers of two are cheaper to emulate
    fp8_scale: Literal["fp32", "pow2"] = "fp32"
