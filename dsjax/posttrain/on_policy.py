"""On-policy distillation: the source whose batches the student writes itself.

Each step draws prompts, lets the student answer them with its weights of the moment, and packs the
answers into rows. The teacher then says what it thinks of every token (`posttrain.teacher.beside`
with the reverse KL), so the student learns on the mistakes that it makes, not on those that the
author of a file might have made (arXiv:2306.13649). No gradient flows through the drawing.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from dsjax.config.finetuning import FineTuning
from dsjax.data.shuffling import permute, stream_key
from dsjax.generate.sampling import Sampling
from dsjax.model.transformer import Transformer
from dsjax.posttrain.experience import row_length
from dsjax.posttrain.minibatches import Layout, Sample, pack
from dsjax.posttrain.rollout import Rollouts, casting, seeds
from dsjax.text.vocabulary import Vocabulary
from dsjax.train.batches import place_all
from dsjax.train.source import Taken
from dsjax.train.step import TrainState


class OnPolicy:
    """Hands out the student's answers to prompts; a `dsjax.train.source.Source`.

    Attributes:
      identity: of the prompts and of what decides their order.
    """

    def __init__(
        self,
        config: FineTuning,
        prompts: Sequence[tuple[int, ...]],
        vocabulary: Vocabulary,
        declared: Transformer,
        mesh: Mesh,
    ) -> None:
        """
        Args:
          declared: the student without values.

        Raises:
          ValueError: a prompt leaves no room for an answer.
        """
        longest = max(map(len, prompts)) + config.distill.max_new_tokens
        if longest > config.shape.max_seq_len:
            raise ValueError(
                f"the longest prompt and distill.max_new_tokens={config.distill.max_new_tokens} "
                f"make {longest} tokens, more than the student's max_seq_len="
                f"{config.shape.max_seq_len}; lower distill.max_new_tokens or sft.sequence_length"
            )
        self._config, self._prompts, self._mesh = config, prompts, mesh
        self._cast = casting(declared, mesh)
        self._rollouts = Rollouts(
            declared,
            stop_ids=vocabulary.stop_ids,
            max_batch=0,
            speculative=False,
            replay=False,
        )
        self._layout = Layout(
            length=row_length(longest, mesh) + 1,
            unit=config.micro_batch_size,
            micro_batch=config.micro_batch_size,
            pad=min(vocabulary.stop_ids, default=0),
            n_experts=config.shape.n_routed_experts,
        )
        fingerprint = hashlib.blake2b(repr(prompts).encode(), digest_size=16).hexdigest()
        self.identity = {"prompts": fingerprint, "seed": config.sft.seed}
        self._taken = 0

    def state(self) -> dict[str, Any]:
        return {"taken": self._taken, **self.identity}

    def restore(self, record: Mapping[str, Any]) -> None:
        found = {key: record.get(key) for key in self.identity}
        if found != self.identity:
            raise ValueError(
                f"the checkpoint was trained on prompts {found} and these are {self.identity}; "
                "restore sft.files and sft.seed, or use another --workdir"
            )
        self._taken = record["taken"]

    def close(self) -> None:
        """Has no thread to stop."""

    def take(self, n: int, state: TrainState) -> Taken:
        """Answers the next `n` prompts and packs them."""
        own, most = self._config.sft.seed, self._config.distill.max_new_tokens
        prompts = [self._prompt(number) for number in range(self._taken, self._taken + n)]
        began = time.perf_counter()
        answers = self._rollouts.answer(
            self._cast(state.params),
            state.router,
            prompts,
            Sampling(temperature=1.0),
            # An answer follows from its place in the stream, so a resumed run draws it again.
            seeds("on-policy", own, self._taken, n),
            most,
        )
        seconds = time.perf_counter() - began
        samples = [
            Sample(prompt, answer, 0.0) for prompt, answer in zip(prompts, answers, strict=True)
        ]
        packed = pack([samples], self._layout, "token", most)
        batch = {name: packed[name][0] for name in ("tokens", "segment_ids", "weights")}
        lengths = [len(answer.tokens) for answer in answers]
        rows = range(self._taken, self._taken + n)
        self._taken += n
        metrics = {
            "length": float(np.mean(lengths)),
            "cut_off": float(np.mean([not answer.ended for answer in answers])),
            "rollout_tokens_per_second": sum(lengths) / seconds,
        }
        return Taken(place_all(batch, self._mesh), sum(lengths), rows, metrics)

    def _prompt(self, number: int) -> tuple[int, ...]:
        """Returns a prompt of an endless stream: all once per epoch, in an order of its own."""
        epoch, place = divmod(number, len(self._prompts))
        key = stream_key("prompts", self._config.sft.seed, epoch)
        return self._prompts[permute(place, len(self._prompts), key)]
