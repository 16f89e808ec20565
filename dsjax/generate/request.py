"""The requests that an engine serves and the outputs that it returns."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import jax
import numpy as np

from dsjax.config import ModelConfig
from dsjax.generate.record import Record, Wanted
from dsjax.generate.sampling import Sampling


class Steering(Protocol):
    """Says before each token of one request what may be drawn: a grammar, penalties, a bias.

    It belongs to the request, which therefore runs only once. While one runs, the engine decodes
    token by token.
    """

    def bias(self) -> np.ndarray | None:
        """Returns what is added to the logits of the next token, float32 [V]; -inf forbids a token.
        None: nothing.
        """
        ...

    def push(self, token: int) -> None:
        """Takes note of a token that was drawn."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
    """Embeddings that replace those of some tokens of a prompt, for example a picture's.

    Attributes:
      places: int32 [n], which tokens, ascending.
      values: float32 [n, D].
    """

    places: np.ndarray
    values: np.ndarray

    @functools.cached_property
    def digest(self) -> str:
        """Tells apart what is given; equal ids with another picture are another prompt."""
        found = hashlib.blake2b(digest_size=16)
        for array in (self.places, self.values):
            found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Raises:
      ValueError: `max_new_tokens` is negative.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()  # drawing any of these ends the reply
    logprobs: bool = False  # report the log-probabilities of the drawn tokens
    experts: bool = False  # report the experts chosen for every token, prompt included
    kept: bool = False  # report the ids among which each token was drawn
    owner: str = ""  # whose it is; known prefixes are not shared between owners
    top_logprobs: int = 0  # report the most likely tokens at each place, this many
    steering: Steering | None = None
    given: Given | None = None  # embeddings of some tokens of the prompt

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must not be negative")

    @property
    def scope(self) -> str:
        """Says among which prompts equal ids mean the same: the owner's, with the same pictures."""
        return f"{self.owner}\n{self.given.digest}" if self.given else self.owner

    @property
    def wanted(self) -> Wanted:
        return Wanted(self.logprobs, self.experts, self.kept, self.top_logprobs)


@dataclasses.dataclass(frozen=True)
class Output:
    """New tokens of a request, with the reports that it asked for.

    Attributes:
      finish: "stop" (the last token is a stop id) or "length"; None: more to come.
      report: NumPy arrays; log-probabilities [n] and sets of ids [n, X], one per new token, and the
        most likely tokens [n, top], where `top` is the most that any request of the batch asks for.
        Experts [tokens run, L, K]: the prompt's tokens come with the first output; after that, each
        new token brings the experts of its predecessor. The last new token is never run.
      cached_tokens: how many tokens of the prompt did not run, because they were known; comes with
        the first output.
    """

    tokens: list[int]
    finish: str | None = None
    report: Record = dataclasses.field(default_factory=Record)
    cached_tokens: int = 0


def output(
    request: Request, tokens: list[int], *, left: int, report: Record, cached_tokens: int = 0
) -> Output:
    """Builds the output of a request that may still add `left` tokens.

    Args:
      report: arrays as in `Output`; those that the request did not ask for are dropped.
    """
    stopped = bool(tokens) and tokens[-1] in request.stop_ids
    logprobs, top = request.logprobs, bool(request.top_logprobs)
    asked = (logprobs, logprobs, request.experts, request.kept, top, top)
    kept = (array if wanted else None for array, wanted in zip(report, asked, strict=True))
    finish = None if left else "stop" if stopped else "length"
    return Output(tokens, finish, Record(*kept), cached_tokens)


def join(outputs: Sequence[Output]) -> Output:
    """Concatenates all outputs of a request."""
    tokens = [token for output in outputs for token in output.tokens]
    report = jax.tree.map(lambda *parts: np.concatenate(parts), *(each.report for each in outputs))
    cached_tokens = sum(each.cached_tokens for each in outputs)
    return Output(tokens, outputs[-1].finish, report, cached_tokens)


def problems(request: Request, config: ModelConfig) -> Iterator[str]:
    """Yields the reasons why the model cannot serve a request."""
    n_tokens = len(request.prompt)
    if not n_tokens:
        yield "an empty prompt has no next token; start with the beginning-of-sequence token"
    if n_tokens + request.max_new_tokens > config.max_seq_len:
        yield (
            f"a prompt of {n_tokens} tokens and max_new_tokens={request.max_new_tokens} exceed "
            f"model.max_seq_len={config.max_seq_len}; shorten the prompt or ask for fewer tokens"
        )
    if (given := request.given) is not None:
        shape, places = (len(given.places), config.dim), given.places
        if given.values.shape != shape:
            yield (
                f"embeddings of shape {list(given.values.shape)} are given for {list(shape)}: "
                f"{shape[0]} tokens of a model with model.dim={config.dim}; load both from one "
                "checkpoint"
            )
        if len(places) and not 0 <= places[0] <= places[-1] < n_tokens:
            yield f"embeddings are given for tokens outside the prompt of {n_tokens}"
        if config.n_mtp:
            yield "embeddings are given, and MTP modules read ids alone; set model.n_mtp=0"
    if request.experts and not config.n_moe_layers:
        yield "experts=True, and the model has none; leave it out"
    for place, token in enumerate(request.prompt):
        if not 0 <= token < config.vocab_size:
            yield (
                f"token {token} at place {place} of the prompt is not in the vocabulary of "
                f"{config.vocab_size}; use the tokenizer that belongs to this model"
            )
            return
