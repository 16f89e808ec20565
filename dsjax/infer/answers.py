"""Text in, text out: a model that answers, for console, evaluation, server and rollouts."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dsjax import files
from dsjax.generate.engine import Engine, Request, Statistics
from dsjax.generate.request import Given
from dsjax.generate.sampling import Sampling
from dsjax.text.reply import Piece, ReplyReader, StopStrings
from dsjax.text.vocabulary import Vocabulary

MOST_NEW_TOKENS = 2048  # unless the user sets a limit

_logger = logging.getLogger(__name__)
# Settings of transformers that change which tokens are drawn, unless they are absent or neutral.
_NOT_APPLIED = (
    "repetition_penalty no_repeat_ngram_size typical_p epsilon_cutoff eta_cutoff num_beams "
    "penalty_alpha min_length min_new_tokens bad_words_ids suppress_tokens begin_suppress_tokens "
    "forced_bos_token_id forced_eos_token_id sequence_bias guidance_scale"
).split()
_NEUTRAL = (None, 0, 1, [], {})
_SAMPLING_FIELDS = {"temperature": float, "top_k": int, "top_p": float, "min_p": float}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings that all replies of a session share.

    Raises:
      ValueError: a stop string is empty.
    """

    vocabulary: Vocabulary
    context: int  # the model's maximum of tokens, prompt and reply together
    sampling: Sampling
    max_new_tokens: int = MOST_NEW_TOKENS
    stops: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        StopStrings(self.stops)

    def request(self, prompt: Sequence[int]) -> Request:
        """Builds a request for as many tokens as wanted, or as the context has room for.

        Raises:
          ValueError: the prompt fills the context.
        """
        room = self.context - len(prompt)
        if room < 1:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, which fill the model's context of "
                f"{self.context} (model.max_seq_len); shorten it, or /reset the conversation"
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

    def reply(self, prompt: Sequence[int], given: Given | None = None) -> Iterator[Piece]:
        """Streams the text that follows the prompt.

        Args:
          given: embeddings of some of its tokens.

        Raises:
          ValueError: the prompt fills the model's context.
        """
        vocabulary = self.settings.vocabulary
        request = dataclasses.replace(self.settings.request(prompt), given=given)
        reader = ReplyReader(
            vocabulary.coder, vocabulary.think_ids, prompt, stops=self.settings.stops
        )
        for _, pieces, _ in replies(self.engine, [request], [reader]):
            yield from pieces


def replies(
    engine: Engine, requests: Sequence[Request], readers: Sequence[ReplyReader]
) -> Iterator[tuple[int, list[Piece], bool]]:
    """Answers requests together and streams their text. The engine must not serve anyone else.

    Args:
      readers: one per request; a request is cancelled as soon as its reader meets a stop string.

    Yields:
      the index of a request, new text of its reply, and whether the reply is complete.

    Raises:
      ValueError: the engine cannot serve a request.
    """
    engine.statistics = Statistics()
    ids: dict[int, int] = {}
    try:
        for index, request in enumerate(requests):
            ids[engine.add(request)] = index
        while ids:
            for id, output in engine.step().items():
                index = ids[id]
                stop_ids, reader = requests[index].stop_ids, readers[index]
                pieces = reader.push([token for token in output.tokens if token not in stop_ids])
                done = reader.stopped or output.finish is not None
                if done:
                    pieces += reader.flush()
                    engine.cancel(id)
                    del ids[id]
                yield index, pieces, done
    finally:  # the caller may stop iterating early
        for id in ids:
            engine.cancel(id)


def continue_tokens(
    engine: Engine,
    prompts_BT: np.ndarray | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
) -> np.ndarray:
    """Continues each row by exactly `max_new_tokens` tokens, int32 [B, max_new_tokens]: no stop ids
    apply. Row b draws with seed `sampling.seed + b`.
    """
    requests = [
        Request(
            prompt=tuple(map(int, row)),
            max_new_tokens=max_new_tokens,
            sampling=dataclasses.replace(sampling, seed=(sampling.seed + index) % (1 << 32)),
        )
        for index, row in enumerate(prompts_BT)
    ]
    return np.asarray([output.tokens for output in engine.complete(requests)], np.int32)


def default_sampling(folder: Path) -> Sampling:
    """Reads the sampling settings of generation_config.json: greedy if it says `"do_sample":
    false`, else the settings that `Sampling` knows. A warning names others that would change the
    text.

    Raises:
      ValueError: a setting is not a number, or out of range.
    """
    path = folder / "generation_config.json"
    config = files.read_json(path) if path.is_file() else {}
    ignored = [f"{key}={config[key]!r}" for key in _NOT_APPLIED if config.get(key) not in _NEUTRAL]
    if ignored:
        _logger.warning("%s: dsjax does not apply %s", path, ", ".join(ignored))
    if config.get("do_sample") is False:
        return Sampling(temperature=0.0)
    found = {key: config[key] for key in _SAMPLING_FIELDS if config.get(key) is not None}
    for key, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | _SAMPLING_FIELDS[key]):
            raise ValueError(f"{path}: {key}={value!r} is not a number; correct or remove it")
    try:
        return Sampling(**found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
