"""Reinforcement learning with rewards: what is asked, how it is judged, and the policy's loss."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from dsjax.config.mesh import RolloutMeshConfig
from dsjax.config.posttraining import PostTraining
from dsjax.config.rules import require, require_not_negative, require_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class RlConfig:
    """Group-relative policy optimization. The defaults are DeepSeekMath's (arXiv:2402.03300).

    A step draws `prompts` questions, lets the model answer each `group_size` times, judges the
    answers, and updates the model `minibatches` times, each time with another part of them.
    """

    problems: str = ""  # files of questions, JSON lines or parquet; see docs/rewards.md
    heldout: str = ""  # files of questions to evaluate on; empty: none
    # what a question's text becomes before the chat format is applied; {prompt} stands for it
    template: str = ""
    system: str = ""  # a system message, for chat models
    # whether the question is given as plain text although the checkpoint's tokenizer has a chat
    # format, as that of a base model may
    raw: bool = False

    prompts: int = 32  # questions per step
    group_size: int = 16  # answers per question
    minibatches: int = 1  # optimizer updates per step
    temperature: float = 1.0
    # Filters of what is drawn; 0 and 1 are off. Where they cut, training renormalizes over the ids
    # that were kept: a bit per id and token, so 16 KB per token, 0.5 GB per 32k, of 129,280 ids.
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 1024  # per answer
    max_batch: int = 0  # answers that are generated at the same time; 0: all
    speculative: bool = False  # whether the MTP modules draft answers
    # whether training takes the experts that generation chose, instead of choosing again
    replay: bool = True
    sequence_length: int = 0  # tokens per packed row of answers; 0: what the longest needs

    rewards: tuple[str, ...] = ("math", "format")  # their sum is an answer's reward
    # what a group's rewards are divided by once their mean is subtracted; sample adds 1e-4
    scale: Literal["population", "sample", "none"] = "population"
    average: Literal["sequence", "token", "constant"] = "sequence"
    epsilon: float = 0.2  # clips the ratio of new and old probability below 1
    epsilon_high: float = 0.0  # and above; 0: as below
    ratio: Literal["token", "sequence"] = "token"  # sequence: GSPO
    beta: float = 0.04  # weight of the KL divergence from the reference; 0: no reference is kept
    kl: Literal["k3", "rho_k3"] = "k3"  # rho_k3: V3.2's, whose gradient is that of KL(new, ref)
    reference_every: int = 0  # steps after which the model becomes its own reference; 0: never
    truncate: float = 0.0  # most weight of truncated importance sampling; 0: off
    # lowest and highest ratio of trainer's and engine's probability, outside of which a token has
    # no weight (IcePop); empty: off
    keep: tuple[float, ...] = ()
    off_policy: float = 0.0  # V3.2's mask of worse answers that the model has left; 0: off

    eval_samples: int = 8  # answers per held-out question
    log_samples: int = 64  # answers of each step that go to samples.jsonl; -1: all
    flat_after: int = 20  # steps in a row without any group to learn from, after which it is said

    def __post_init__(self) -> None:
        require_positive(
            "rl", self, "prompts", "minibatches", "temperature", "max_new_tokens", "epsilon",
            "eval_samples",
        )  # fmt: skip
        require_not_negative(
            "rl", self, "max_batch", "sequence_length", "epsilon_high", "beta", "reference_every",
            "truncate", "off_policy", "flat_after",
        )  # fmt: skip
        require(
            self.group_size >= 2,
            f"rl.group_size={self.group_size} must be at least 2: an answer is judged against the "
            "others to its question",
        )
        require(
            0 < self.top_p <= 1, f"rl.top_p={self.top_p} must lie in (0, 1]; 1 keeps every token"
        )
        require(
            self.top_k >= 0 and self.top_k != 1,
            f"rl.top_k={self.top_k} must be at least 2, or 0, which keeps every token: with one to "
            "choose from all answers to a question are the same",
        )
        answers = self.prompts * self.group_size
        require(
            answers % self.minibatches == 0,
            f"the {answers} answers of rl.prompts={self.prompts} times rl.group_size="
            f"{self.group_size} do not divide into rl.minibatches={self.minibatches}",
        )
        require(len(self.rewards) > 0, "rl.rewards is empty; name one, such as rl.rewards=math")
        require(
            len(set(self.rewards)) == len(self.rewards),
            f"rl.rewards={','.join(self.rewards)} names one twice; use reward.weights instead",
        )
        require(
            not self.template or "{prompt}" in self.template,
            f"rl.template={self.template!r} has no {{prompt}}, which stands for the question",
        )
        require(
            len(self.keep) in (0, 2) and list(self.keep) == sorted(self.keep),
            f"rl.keep={self.keep} must be empty or a lower and an upper limit, such as 0.5,2",
        )
        require(
            not (self.keep and self.truncate),
            f"rl.keep={self.keep} and rl.truncate={self.truncate} correct the same thing; set one",
        )
        require(
            self.beta > 0 or not self.reference_every,
            f"rl.reference_every={self.reference_every} replaces a reference that rl.beta=0 does "
            "not keep; set rl.beta above 0, or rl.reference_every=0",
        )
        require(self.log_samples >= -1, f"rl.log_samples={self.log_samples} must be -1 or more")

    @property
    def filters(self) -> bool:
        """Whether answers are drawn among some of the vocabulary's ids only."""
        return self.top_k > 0 or self.top_p < 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """How answers are judged."""

    weights: tuple[float, ...] = ()  # of rl.rewards, in their order; empty: 1 each


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reinforcement(PostTraining):
    """A reinforcement-learning experiment.

    `train.steps` counts rollouts. `train.batch_size` is the number of packed rows that a minibatch
    is a multiple of, `train.micro_batch_size` that of a forward pass.
    """

    tool: ClassVar[str] = "tools/grpo.py"

    rl: RlConfig = dataclasses.field(default_factory=RlConfig)
    reward: RewardConfig = dataclasses.field(default_factory=RewardConfig)
    rollout_mesh: RolloutMeshConfig = dataclasses.field(default_factory=RolloutMeshConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        weights, names = self.reward.weights, self.rl.rewards
        require(
            len(weights) in (0, len(names)),
            f"reward.weights={weights} are {len(weights)} for the {len(names)} of "
            f"rl.rewards={','.join(names)}; give one each, or none",
        )
        require(
            not self.train.batch_size_start,
            f"train.batch_size_start={self.train.batch_size_start}: a step's batch is made of "
            "rl.prompts questions and does not grow; set it to 0",
        )
        if self.model is None:
            return
        new, limit = self.rl.max_new_tokens, self.model.max_seq_len
        require(
            new < limit,
            f"rl.max_new_tokens={new} leaves no room for a question below the checkpoint's "
            f"max_seq_len={limit}; lower it",
        )
        require(
            not self.rl.speculative or self.model.n_mtp > 0,
            "rl.speculative=on drafts with MTP modules, and the checkpoint has none; turn it off",
        )
        require(
            not self.replays or self.mesh.pipe in (-1, 1),
            f"rl.replay=on, and a pipeline (mesh.pipe={self.mesh.pipe}) cannot replay the experts "
            "that generation chose; set rl.replay=off, or mesh.pipe=1 and mesh.expert higher",
        )

    @property
    def sequence_length(self) -> int:
        """Tokens per row; where the config leaves it open, those of the longest answer, to which a
        run adds the longest question.
        """
        return self.rl.sequence_length or self.rl.max_new_tokens

    @property
    def replays(self) -> bool:
        """Whether there are experts to replay."""
        return self.rl.replay and self.shape.n_moe_layers > 0
