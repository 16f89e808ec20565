"""Answers of a checkpoint to problems, drawn by the engine as one stream of requests.

A draw depends on its seed and its problem alone, and the seed on (seed, problem, sample), so the
answers are the same however many are drawn together, in whatever order, and after an interruption.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from dsjax.checkpoint.load import Checkpoint
from dsjax.data.shuffling import mix, stream_key
from dsjax.files import listed
from dsjax.generate.engine import Engine, Statistics
from dsjax.generate.request import Output, Request, join
from dsjax.generate.sampling import Sampling
from dsjax.infer.answers import MOST_NEW_TOKENS, default_sampling
from dsjax.infer.weights import load_weights
from dsjax.parallel.mesh import submesh
from dsjax.posttrain.initial import Initial, open_initial
from dsjax.posttrain.problems import Problem
from dsjax.posttrain.prompts import Prompting


@dataclasses.dataclass(frozen=True)
class Wanted:
    """How to ask and to draw.

    Attributes:
      sampling: `seed` is the seed of all.
      max_new_tokens: of each answer; None: MOST_NEW_TOKENS, or what the context has room for.
      system: instructions that come before each prompt.
      template: a text around each prompt that is a text, in place of its {prompt}.
      max_batch: answers that are drawn at the same time.
      raw: whether the model is given plain text although it chats.
    """

    sampling: Sampling
    max_new_tokens: int | None = None
    system: str = ""
    template: str = ""
    max_batch: int = 64
    raw: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens {self.max_new_tokens} is not at least 1")
        if self.max_batch < 1:
            raise ValueError(f"--max-batch {self.max_batch} is not at least 1")
        if self.template and "{prompt}" not in self.template:
            raise ValueError(
                f"--template {self.template!r:.80} has no place for the prompt; "
                "write {prompt} in it"
            )


class Response(NamedTuple):
    """An answer.

    Attributes:
      key: what it was asked for under.
      text: all that followed the prompt, control tokens spelled out, without the end token.
      tokens: how many there are, the end token included.
      ended: whether the model ended it; else it was cut off.
      nats: the sum of -log p of its tokens, by the distributions that they were drawn from.
    """

    key: tuple[int, int]
    text: str
    tokens: int
    ended: bool
    nats: float


class Respondent:
    """A checkpoint that answers problems. The weights are read at the first answer.

    Attributes:
      prompting: how problems are put to it.
      prompts: of each problem, the ids that an answer follows.
      facts: of each problem, what rewards judge by.
    """

    def __init__(
        self,
        initial: Initial,
        problems: Sequence[Problem],
        wanted: Wanted,
        *,
        dtype: str | None = None,
        mesh: Mapping[str, int] | None = None,
    ) -> None:
        """
        Args:
          dtype, mesh: as `command.add_checkpoint` gives them.

        Raises:
          ValueError: a prompt leaves no room for an answer, or a base model is given messages; all
            such problems are named.
        """
        self._initial, self._wanted, self._dtype = initial, wanted, dtype
        self.prompting = Prompting(
            initial.vocabulary, initial.chat, wanted.system, wanted.template, wanted.raw
        )
        self._mesh = submesh(mesh or {})
        self._engine: Engine | None = None
        self.prompts: list[tuple[int, ...]] = []
        self.facts: list[dict[str, Any]] = []
        refused = []
        for problem in problems:
            try:
                prompt = self._checked(problem)
            except ValueError as error:
                refused.append(f"{problem.place}: {error}")
                continue
            self.prompts.append(tuple(prompt))
            self.facts.append(problem.facts(opened=self.prompting.opens_thought(prompt)))
        if refused:
            raise ValueError(listed(refused))

    @property
    def checkpoint(self) -> Checkpoint:
        """What answers."""
        return self._initial.checkpoint

    @property
    def sampling(self) -> Sampling:
        """How answers are drawn."""
        return self._wanted.sampling

    @property
    def statistics(self) -> Statistics:
        """What the answers since the last call of `answers` cost."""
        return self._engine.statistics if self._engine else Statistics()

    def answers(
        self, keys: Sequence[tuple[int, int]], *, greedy: bool = False
    ) -> Iterator[Response]:
        """Yields the answers to (problem, sample) pairs, each as it is finished.

        Args:
          greedy: whether to take the most likely tokens instead of drawing.
        """
        if self._engine is None:
            model = load_weights(self._initial.checkpoint, self._mesh, self._dtype)
            self._engine = Engine(model, max_batch=self._wanted.max_batch, streaming=False)
        engine = self._engine
        engine.statistics = Statistics()
        open_: dict[int, tuple[tuple[int, int], list[Output]]] = {}
        try:
            for key in keys:
                open_[engine.add(self._request(key, greedy))] = (key, [])
            while open_:
                for id, output in engine.step().items():
                    key, outputs = open_[id]
                    outputs.append(output)
                    if output.finish is not None:
                        del open_[id]
                        yield self._response(key, join(outputs))
        finally:  # the caller may stop iterating early
            for id in open_:
                engine.cancel(id)

    def _request(self, key: tuple[int, int], greedy: bool) -> Request:
        number, sample = key
        stream = stream_key("responses", self._wanted.sampling.seed, number)
        seed = int(mix(stream, np.array([sample], np.uint64))[0] >> np.uint64(32))
        change = {"temperature": 0.0} if greedy else {}
        return Request(
            prompt=self.prompts[number],
            max_new_tokens=self._most_new(self.prompts[number]),
            sampling=dataclasses.replace(self._wanted.sampling, seed=seed, **change),
            stop_ids=self._initial.vocabulary.stop_ids,
            logprobs=True,
        )

    def _most_new(self, prompt: Sequence[int]) -> int:
        room = self._initial.model.max_seq_len - len(prompt)
        return self._wanted.max_new_tokens or min(MOST_NEW_TOKENS, room)

    def _response(self, key: tuple[int, int], output: Output) -> Response:
        ended = output.finish == "stop"
        shown = output.tokens[:-1] if ended else output.tokens
        text = self._initial.vocabulary.coder.decode(shown, skip_special=False)
        assert output.report.sampled_logprobs is not None
        nats = -float(np.sum(output.report.sampled_logprobs, dtype=np.float64))
        return Response(key, text, len(output.tokens), ended, nats)

    def _checked(self, problem: Problem) -> list[int]:
        """Returns a problem's prompt, if it leaves room for an answer."""
        ids = self.prompting.encode(problem)
        context, new = self._initial.model.max_seq_len, self._wanted.max_new_tokens or 1
        if len(ids) + new > context:
            raise ValueError(
                f"the prompt of {len(ids)} tokens and --max-new-tokens {new} exceed the model's "
                f"context of {context}; shorten it, or ask for fewer tokens"
            )
        return ids


def open_respondent(
    path: str | Path,
    problems: Sequence[Problem],
    wanted: Wanted,
    given: Mapping[str, Any],
    *,
    overrides: Mapping[str, Any] | None = None,
    **placement: Any,
) -> Respondent:
    """Opens a checkpoint to answer problems.

    Args:
      wanted: its sampling is that of the checkpoint's generation_config.json where `given` has
        none of its own.
      given: settings of `Sampling`; None for those not given.
      placement: dtype and mesh, see `Respondent`.

    Raises:
      ValueError: there is no whole checkpoint with a tokenizer; or see `Respondent`.
    """
    initial = open_initial(path, overrides)
    known = default_sampling(initial.checkpoint.tokenizer_folder)
    own = {key: value for key, value in given.items() if value is not None}
    sampling = dataclasses.replace(known, seed=wanted.sampling.seed, **own)
    return Respondent(
        initial, problems, dataclasses.replace(wanted, sampling=sampling), **placement
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answering:
    """What the commands that let a checkpoint answer are asked alike (tools/evaluate.py and
    tools/sample.py).

    The fields are their arguments; None leaves a setting to the checkpoint.
    """

    checkpoint: Path
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    max_batch: int = 64
    system: str = ""
    template: str = ""
    raw: bool = False
    dtype: str | None = None
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
    override: Sequence[tuple[str, Any]] = ()

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Self:
        """Takes a tool's parsed arguments."""
        return cls(**{field.name: getattr(arguments, field.name) for field in fields(cls)})

    def respondent(self, problems: Sequence[Problem]) -> Respondent:
        """Opens the checkpoint to answer problems; errors are those of `open_respondent`."""
        wanted = Wanted(
            Sampling(seed=self.seed), self.max_new_tokens, self.system, self.template,
            self.max_batch, self.raw,
        )  # fmt: skip
        given = {"temperature": self.temperature, "top_p": self.top_p}
        return open_respondent(
            self.checkpoint, problems, wanted, given,
            dtype=self.dtype, mesh=self.mesh, overrides=dict(self.override),
        )  # fmt: skip
