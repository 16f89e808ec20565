"""The source of a reinforcement-learning run: questions, answers, verdicts, and batches of them.

One step draws the next questions, answers each several times with the weights of the moment,
judges the answers, compares them within their group, and packs them into minibatches. What a
checkpoint keeps is how many questions were taken: all else follows from the weights and the seed.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dsjax.config.reinforcement import Reinforcement
from dsjax.files import writing
from dsjax.generate.sampling import Sampling
from dsjax.model.transformer import Transformer
from dsjax.parallel import processes
from dsjax.parallel.compilation import Compiled
from dsjax.posttrain import policy
from dsjax.posttrain.minibatches import Layout, Sample, pack, split_samples
from dsjax.posttrain.questions import Questions
from dsjax.posttrain.rewards import Grader
from dsjax.posttrain.rollout import Answer, Rollouts, casting, seeds
from dsjax.posttrain.updates import PolicyState
from dsjax.posttrain.verdicts import Judged
from dsjax.text.vocabulary import Vocabulary
from dsjax.train.batches import place_all
from dsjax.train.report import drop_later
from dsjax.train.source import Taken


class Experience:
    """Hands out minibatches of judged answers; a `dsjax.train.source.Source`.

    Attributes:
      identity: of the questions and of what decides their order.
    """

    def __init__(
        self,
        config: Reinforcement,
        questions: Questions,
        grader: Grader,
        rollouts: Rollouts,
        vocabulary: Vocabulary,
        declared: Transformer,
        mesh: Mesh,
        folder: Path,
        say: Callable[[str], None],
    ) -> None:
        """
        Args:
          grader: of the config's rewards and the format.
          folder: of the run, where samples.jsonl is written.
          say: tells the user something.
        """
        self._config, self._mesh, self._folder, self._say = config, mesh, folder, say
        self._questions, self._grader, self._vocabulary = questions, grader, vocabulary
        self._rollouts, self._cast = rollouts, casting(declared, mesh)
        self._score = Compiled(jax.jit(policy.log_probabilities(config, declared)), mesh)
        pad = next(iter(sorted(vocabulary.stop_ids)), 0)
        longest = questions.longest + config.rl.max_new_tokens
        self._layout = Layout(
            length=(config.rl.sequence_length or row_length(longest, mesh)) + 1,
            unit=config.train.batch_size,
            micro_batch=config.micro_batch_size,
            pad=pad,
            n_experts=config.shape.n_routed_experts,
        )
        self.identity = {"questions": questions.fingerprint, "seed": config.train.seed}
        self._taken = self._flat_steps = 0
        self._kept = False  # whether samples.jsonl holds the lines of earlier steps only

    def state(self) -> dict[str, Any]:
        return {"taken": self._taken, **self.identity}

    def restore(self, record: Mapping[str, Any]) -> None:
        found = {key: record.get(key) for key in self.identity}
        if found != self.identity:
            raise ValueError(
                f"the checkpoint was trained on questions {found} and these are {self.identity}; "
                "restore rl.problems, rl.template and train.seed, or use another --workdir"
            )
        self._taken = record["taken"]

    def close(self) -> None:
        self._grader.close()

    def take(self, n: int, state: PolicyState) -> Taken:
        """Answers, judges and packs the next `n` questions."""
        rl, step = self._config.rl, self._taken // n
        numbers = self._questions.drawn(self._taken, n, self._config.train.seed)
        each = [number for number in numbers for _ in range(rl.group_size)]
        clock = Clock()
        params = self._cast(state.params)
        answers = self._rollouts.answer(
            params,
            state.router,
            [self._questions.prompts[number] for number in each],
            Sampling(rl.temperature, rl.top_k, rl.top_p),
            seeds("answers", self._config.train.seed, step, len(each)),
            rl.max_new_tokens,
            kept=rl.filters,
        )
        clock.lap("rollout_seconds")
        texts = [completion_text(answer, self._vocabulary) for answer in answers]
        facts = [self._questions.facts[number] for number in each]
        judged = Judged(self._config, self._grader, texts, facts, group=rl.group_size)
        clock.lap("grade_seconds")
        decode = functools.partial(self._vocabulary.coder.decode, skip_special=False)
        advantages = judged.advantages(answers, decode)
        batch = self._packed(each, answers, advantages, step)
        batch |= self._scored(params, state, batch)
        clock.lap("old_seconds")
        self._write(step + 1, each, answers, texts, judged, advantages)
        self._warn_flat(step + 1, judged)
        new_tokens = sum(len(answer.tokens) for answer in answers)
        metrics = judged.metrics() | _lengths(answers, judged.right_QG.ravel()) | clock.seconds
        metrics["rollout_tokens_per_second"] = new_tokens / clock.seconds["rollout_seconds"]
        metrics |= self._rollouts.costs | self._graders_counts()
        rows = range(self._taken, self._taken + n)
        self._taken += n
        metrics["epoch"] = self._taken / len(self._questions)
        return Taken(batch, new_tokens, rows, metrics)

    def _packed(
        self,
        each: Sequence[int],
        answers: Sequence[Answer],
        advantages: Sequence[np.ndarray],
        step: int,
    ) -> dict[str, jax.Array]:
        rl, seed = self._config.rl, self._config.train.seed
        samples = [
            Sample(self._questions.prompts[number], answer, own)
            for number, answer, own in zip(each, answers, advantages, strict=True)
        ]
        minibatches = split_samples(samples, rl.minibatches, seed=seed, step=step)
        batch = pack(minibatches, self._layout, rl.average, rl.max_new_tokens)
        return place_all(batch, self._mesh)

    def _scored(
        self, params: nnx.State, state: PolicyState, batch: dict[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """Computes the log-probabilities that the loss compares with."""
        needed = {"ref": state.reference}
        if self._config.rl.minibatches > 1:
            # With a single update, they are those of the update's own forward pass.
            needed["old"] = params
        found = {
            name: self._score((params, state.router), batch)
            for name, params in needed.items()
            if params is not None
        }
        return jax.block_until_ready(found)

    def _write(
        self,
        step: int,
        each: Sequence[int],
        answers: Sequence[Answer],
        texts: Sequence[str],
        judged: Judged,
        advantages: Sequence[np.ndarray],
    ) -> None:
        """Appends some of a step's answers to samples.jsonl."""
        if not processes.is_first():
            return
        path, most = self._folder / "samples.jsonl", self._config.rl.log_samples
        if not self._kept:
            drop_later(path, step - 1)
            self._kept = True
        total = judged.total_QG.ravel()
        with writing(path), path.open("a", encoding="utf-8") as file:
            for index in range(len(each) if most < 0 else min(most, len(each))):
                rewards = {name: _number(v.ravel()[index]) for name, v in judged.rewards.items()}
                line = {
                    "step": step,
                    "question": each[index],
                    "prompt": self._vocabulary.coder.decode(
                        self._questions.prompts[each[index]], skip_special=False
                    ),
                    "text": texts[index],
                    "tokens": len(answers[index].tokens),
                    "ended": answers[index].ended,
                    "reward": _number(total[index]),
                    "rewards": rewards,
                    "advantage": float(advantages[index].mean()),
                }
                if steps := judged.steps(index):
                    line["steps"] = steps
                file.write(json.dumps(line) + "\n")

    def _warn_flat(self, step: int, judged: Judged) -> None:
        self._flat_steps = self._flat_steps + 1 if judged.flat_Q.all() else 0
        after = self._config.rl.flat_after
        if after and self._flat_steps == after:
            right = judged.right_QG.mean()
            way = (
                "all answers are right: give harder questions"
                if right == 1
                else "no answer is right: give easier questions, or begin with fine-tuning on some"
                if right == 0
                else "the answers to each question are worth the same: raise rl.temperature"
            )
            self._say(f"nothing was learned in the {after} steps up to step {step}, since {way}")

    def _graders_counts(self) -> dict[str, float]:
        counts = self._grader.counts
        return {
            "judging_limits": float(sum(counts.limits.values())),
            "judging_failures": float(sum(counts.failures.values())),
        }


class Clock:
    """Seconds of the phases of a step, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now


def row_length(longest: int, mesh: Mesh) -> int:
    """Returns the tokens per row, T, for prompts and answers of at most `longest` tokens."""
    # T + 1 tokens fit into a row; parts of T go to the devices along `context`.
    parts = 2 * mesh.shape.get("context", 1)
    return -(-(longest - 1) // parts) * parts


def completion_text(answer: Answer, vocabulary: Vocabulary) -> str:
    """Returns an answer as rewards judge it: all that follows the prompt, without its end token."""
    tokens = answer.tokens[:-1] if answer.ended else answer.tokens
    return vocabulary.coder.decode(tokens, skip_special=False)


def _lengths(answers: Sequence[Answer], right: np.ndarray) -> dict[str, float]:
    lengths = np.array([len(answer.tokens) for answer in answers], np.float64)

    def mean(of: np.ndarray) -> float:
        return float(of.mean()) if len(of) else 0.0

    return {
        "length": mean(lengths),
        "length_right": mean(lengths[right]),
        "length_wrong": mean(lengths[~right]),
        "cut_off": float(np.mean([not answer.ended for answer in answers])),
    }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
