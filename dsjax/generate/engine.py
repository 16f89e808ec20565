"""Generation for a batch of requests: prompts in chunks, then token by token on a cache.

Shapes are few, so that programs are: a cache is as long as a power of two, prompts run in chunks of
one size and a last one of a power of two, and the rows of a batch differ in numbers only (lengths,
limits, stop ids, sampling). Each program is compiled once for a batch size and a length. The cache
is donated from program to program and changes in place.

A decoding program runs several steps before it returns to the host, which takes longer than a small
model's step. How many is a number it is given, so that tokens still come many times a second. It
returns early when no row is left. A row that is finished stands still until all are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsjax.generate import decoding, speculative
from dsjax.generate.decoding import Carry, Decoded
from dsjax.generate.sampling import Knobs, Sampling, knobs
from dsjax.model.transformer import Transformer
from dsjax.parallel.sharding import parts

_MIN_LENGTH = 256  # of a cache
_MIN_CHUNK = 16
_SECONDS_BETWEEN_ITEMS = 0.05


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Raises:
      ValueError: `max_new_tokens` is negative.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()  # the first of them that is drawn ends the row

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must not be negative")


@dataclasses.dataclass
class Statistics:
    """What a generation has taken so far. Compilation is not in the seconds."""

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0  # up to each row's first token
    new_tokens: int = 0
    decode_seconds: float = 0.0
    decode_steps: int = 0  # of the rows that still ran, added up
    drafted: int = 0
    accepted: int = 0  # drafts that the main model kept


class _Batch(NamedTuple):
    """The requests as arrays; rows without a request fill the batch up."""

    prompts: list[tuple[int, ...]]
    lengths_B: np.ndarray  # int32
    most_B: np.ndarray  # int32, tokens to generate
    stop_ids_BX: np.ndarray  # int32
    knobs: Knobs


class Engine:
    """Generates with one model, on the devices that hold it.

    Attributes:
      statistics: of the latest generation.
    """

    def __init__(
        self, model: Transformer, *, speculative: bool = False, prefill_chunk: int = 512
    ) -> None:
        """
        Args:
          speculative: whether the model's MTP modules draft tokens (`dsjax.generate.speculative`).
          prefill_chunk: tokens of each row's prompt that run at once, a power of two from 16 on.

        Raises:
          ValueError: the chunk is another number, or the model has nothing to draft with.
        """
        if prefill_chunk < _MIN_CHUNK or prefill_chunk != _power_of_two(prefill_chunk):
            raise ValueError(
                f"prefill_chunk={prefill_chunk} must be a power of two from {_MIN_CHUNK} on, such "
                f"as {max(_power_of_two(prefill_chunk), _MIN_CHUNK)}"
            )
        if speculative:
            _check_drafting(model)
        self.statistics = Statistics()
        self._model = model
        self._n_drafts = model.config.n_mtp if speculative else 0
        self._chunk = prefill_chunk
        self._mesh = _mesh(model)
        self._programs: dict[Any, Any] = {}

    def generate(self, requests: Sequence[Request]) -> Iterator[list[list[int]]]:
        """Generates for all requests together.

        Yields:
          each row's tokens since the last item, none for a row that is finished; a stop id is its
          row's last token.

        Raises:
          ValueError: a prompt is empty, has ids outside the vocabulary, or is too long together
            with `max_new_tokens`; all such faults at once.
        """
        problems = [
            f"request {index}: {problem}"
            for index, request in enumerate(requests)
            for problem in _problems(request, self._model)
        ]
        if problems:
            raise ValueError("\n".join(problems))
        self.statistics = Statistics(prompt_tokens=sum(len(r.prompt) for r in requests))
        return self._generate(requests) if requests else iter(())

    def _generate(self, requests: Sequence[Request]) -> Iterator[list[list[int]]]:
        batch = self._batch(requests)
        carry, first_B = self._prefill(batch)
        new = [
            [token] if most else []
            for token, most in zip(first_B.tolist(), batch.most_B.tolist(), strict=True)
        ]
        yield self._count(new, len(requests))
        stopped_B = (first_B[:, None] == batch.stop_ids_BX).any(axis=1)
        left_B = np.where(stopped_B, 0, np.maximum(batch.most_B - 1, 0)).astype(np.int32)
        position_B, recent_BW = batch.lengths_B, _newest(batch, first_B, self._n_drafts + 1)
        n_steps = 1
        while left_B.any():
            arguments = (
                carry, position_B, recent_BW, left_B, batch.stop_ids_BX, batch.knobs,
                np.int32(n_steps),
            )  # fmt: skip
            program = self._program(decoding.decode, arguments)
            start = time.perf_counter()
            carry, decoded = program(self._model, *arguments)
            decoded = Decoded(*jax.device_get(decoded))
            seconds = time.perf_counter() - start
            position_B, recent_BW, left_B = decoded.position_B, decoded.recent_BW, decoded.left_B
            self.statistics.decode_seconds += seconds
            self._count_steps(decoded)
            # The clocks of several processes would tell each another number.
            if jax.process_count() == 1:
                n_steps = int(_SECONDS_BETWEEN_ITEMS * decoded.n_steps / seconds)
                n_steps = min(max(n_steps, 1), decoding.MAX_STEPS)
            yield self._count(decoded.tokens(), len(requests))

    def _prefill(self, batch: _Batch) -> tuple[Carry, np.ndarray]:
        """Runs the prompts; returns what decoding goes on with, and each row's first new token."""
        longest = int(batch.lengths_B.max())
        length = self._cache_length(int((batch.lengths_B + batch.most_B).max()))
        tokens_BS = np.zeros((len(batch.prompts), length + self._n_drafts), np.int32)
        for row, prompt in zip(tokens_BS, batch.prompts, strict=True):
            row[: len(prompt)] = prompt
        carry = self._empty_carry(len(batch.prompts), length)
        first_B = np.zeros(len(batch.prompts), np.int32)
        start = 0
        while start < longest:
            size = min(max(_power_of_two(longest - start), _MIN_CHUNK), self._chunk)
            arguments = (
                carry, tokens_BS[:, start : start + size + self._n_drafts], np.int32(start),
                batch.lengths_B, first_B, batch.knobs,
            )  # fmt: skip
            program = self._program(decoding.prefill, arguments)
            began = time.perf_counter()
            carry, first_B = program(self._model, *arguments)
            first_B = np.asarray(first_B)
            self.statistics.prefill_seconds += time.perf_counter() - began
            start += size
        return carry, first_B

    def _batch(self, requests: Sequence[Request]) -> _Batch:
        rows = list(requests)
        rows += [Request((0,), 0)] * (
            -len(rows) % (parts("batch", self._mesh) if self._mesh else 1)
        )
        width = _power_of_two(max(len(request.stop_ids) for request in rows))
        stop_ids = [
            [*request.stop_ids, *[-1] * (width - len(request.stop_ids))] for request in rows
        ]
        return _Batch(
            [request.prompt for request in rows],
            np.array([len(request.prompt) for request in rows], np.int32),
            np.array([request.max_new_tokens for request in rows], np.int32),
            np.array(stop_ids, np.int32),
            knobs([request.sampling for request in rows]),
        )

    def _cache_length(self, needed: int) -> int:
        """A power of two, or what the longest text that the model allows needs if that is less;
        either way room for whole chunks, and for drafts beyond the end.
        """
        most = self._model.config.max_seq_len + self._n_drafts
        whole_chunks = -(-most // self._chunk) * self._chunk
        return min(max(_power_of_two(needed + self._n_drafts), _MIN_LENGTH), whole_chunks)

    def _empty_carry(self, batch: int, length: int) -> Carry:
        def make(model: Transformer) -> Carry:
            return decoding.empty_carry(model, batch, length, self._n_drafts)

        key = ("empty", batch, length)
        if key not in self._programs:
            with self._under_mesh():
                self._programs[key] = jax.jit(make).lower(self._model).compile()
        return self._programs[key](self._model)

    def _program(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """The function, compiled for the model and the arguments' shapes; it takes over the first
        argument, the carry.
        """
        key = (function, *(leaf.shape for leaf in jax.tree.leaves(arguments)))
        if key not in self._programs:
            # Each process reads all that comes beside the carry.
            read = NamedSharding(self._mesh, PartitionSpec()) if self._mesh else None
            with self._under_mesh():
                jitted = jax.jit(function, donate_argnums=1, out_shardings=(None, read))
                self._programs[key] = jitted.lower(self._model, *arguments).compile()
        return self._programs[key]

    def _under_mesh(self) -> contextlib.AbstractContextManager[Any]:
        return jax.set_mesh(self._mesh) if self._mesh else contextlib.nullcontext()

    def _count(self, new: list[list[int]], n_requests: int) -> list[list[int]]:
        self.statistics.new_tokens += sum(map(len, new))
        return new[:n_requests]

    def _count_steps(self, decoded: Decoded) -> None:
        ran = int(decoded.ran_NB[: decoded.n_steps].sum())
        self.statistics.decode_steps += ran
        self.statistics.drafted += ran * self._n_drafts
        self.statistics.accepted += int(decoded.n_kept_NB[: decoded.n_steps].sum())


def _check_drafting(model: Transformer) -> None:
    speculative.check(model.config)


def _problems(request: Request, model: Transformer) -> Iterator[str]:
    """What is wrong with a request for this model."""
    config, n_tokens = model.config, len(request.prompt)
    if not n_tokens:
        yield ("an empty prompt has no next token; start with the beginning-of-sequence token")
    if n_tokens + request.max_new_tokens > config.max_seq_len:
        yield (
            f"a prompt of {n_tokens} tokens and max_new_tokens={request.max_new_tokens} exceed "
            f"model.max_seq_len={config.max_seq_len}; shorten the prompt or ask for fewer tokens"
        )
    for place, token in enumerate(request.prompt):
        if not 0 <= token < config.vocab_size:
            yield (
                f"token {token} at place {place} of the prompt is not in the vocabulary of "
                f"{config.vocab_size}; use the tokenizer that belongs to this model"
            )
            return


def _newest(batch: _Batch, first_B: np.ndarray, width: int) -> np.ndarray:
    """The last tokens of each row, the first new one included: int32 [B, W]; zeros before the
    beginning.
    """
    rows = [
        [*[0] * width, *prompt[-width:], token][-width:]
        for prompt, token in zip(batch.prompts, first_B.tolist(), strict=True)
    ]
    return np.array(rows, np.int32)


def _mesh(model: Transformer) -> Mesh | None:
    """The mesh that the model is spread over, None if it lies on one device."""
    sharding = jax.tree.leaves(model)[0].sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None


def _power_of_two(at_least: int) -> int:
    return 1 << max(at_least - 1, 0).bit_length()
