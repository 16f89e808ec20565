"""Text in, text out: a model that answers, for console, evaluation, server and rollouts alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dsjax import files
from dsjax.generate.engine import Engine, Request
from dsjax.generate.sampling import Sampling
from dsjax.text.reply import Piece, ReplyReader, StopStrings
from dsjax.text.vocabulary import Vocabulary

MOST_NEW_TOKENS = 2048  # where the user names no limit

_SAMPLING_FIELDS = {"temperature": float, "top_k": int, "top_p": float, "min_p": float}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What every reply of a session has in common.

    Raises:
      ValueError: a stop string is empty.
    """

    vocabulary: Vocabulary
    context: int  # tokens that the model can see
    sampling: Sampling
    max_new_tokens: int = MOST_NEW_TOKENS
    stops: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        StopStrings(self.stops)

    def request(self, prompt: Sequence[int]) -> Request:
        """Asks for as many tokens as are wanted and the model's context has room for.

        Raises:
          ValueError: the prompt fills the context.
        """
        room = self.context - len(prompt)
        if room < 1:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, which fill the {self.context} that the "
                "model can see (model.max_seq_len); shorten it, or /reset the conversation"
            )
        return Request(
            prompt=tuple(prompt),
            max_new_tokens=min(self.max_new_tokens, room),
            sampling=self.sampling,
            stop_ids=self.vocabulary.stop_ids,
        )


@dataclasses.dataclass(frozen=True)
class Generator:
    """A model that answers in text."""

    engine: Engine
    settings: Settings

    def reply(self, prompt: Sequence[int]) -> Iterator[Piece]:
        """Yields the text that follows the prompt's tokens, as it becomes certain.

        Raises:
          ValueError: the prompt fills the model's context.
        """
        vocabulary, request = self.settings.vocabulary, self.settings.request(prompt)
        reader = ReplyReader(
            vocabulary.coder, vocabulary.think_ids, prompt, stops=self.settings.stops
        )
        for (new,) in self.engine.generate([request]):
            yield from reader.push([i for i in new if i not in vocabulary.stop_ids])
            if reader.stopped:
                return
        yield from reader.flush()


def continue_tokens(
    engine: Engine, prompts_BT: np.ndarray, *, max_new_tokens: int, sampling: Sampling
) -> np.ndarray:
    """Continues each row by exactly `max_new_tokens` tokens, int32 [B, max_new_tokens]; no token
    ends a row. Row b draws with seed `sampling.seed + b`.
    """
    requests = [
        Request(
            prompt=tuple(row.tolist()),
            max_new_tokens=max_new_tokens,
            sampling=dataclasses.replace(sampling, seed=(sampling.seed + index) % (1 << 32)),
        )
        for index, row in enumerate(prompts_BT)
    ]
    rows: list[list[int]] = [[] for _ in requests]
    for step in engine.generate(requests):
        for row, new in zip(rows, step, strict=True):
            row += new
    return np.asarray(rows, np.int32)


def default_sampling(folder: Path) -> Sampling:
    """How generation_config.json wants tokens drawn: greedily where it says `"do_sample": false`,
    else with those of its settings that `Sampling` has.

    Raises:
      ValueError: a setting is not a number, or out of its range.
    """
    path = folder / "generation_config.json"
    config = files.read_json(path) if path.is_file() else {}
    if config.get("do_sample") is False:
        return Sampling(temperature=0.0)
    found = {key: config[key] for key in _SAMPLING_FIELDS if config.get(key) is not None}
    for key, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | _SAMPLING_FIELDS[key]):
            raise ValueError(f"{path}: {key}={value!r} is not a number; repair it or remove it")
    try:
        return Sampling(**found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
