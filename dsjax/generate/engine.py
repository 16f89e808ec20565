"""Generation as a service: requests are added, step by step decoded, and leave when they finish.

Requests wait in a queue for a free row of the running batch. Newcomers run their prompts together
in a separate cache, one chunk per step, alternating with decoding of the running batch, so that
running requests never wait for more than one chunk. When a prompt is done, its row is inserted into
the running batch. If nothing runs, the newcomers' cache becomes the running one without a copy;
a closed batch therefore never copies its cache.

Few shapes occur, so few programs are compiled: a cache has a power of two as its length, prompts
run in chunks of one size followed by one chunk of a power of two, a growing batch has a power of
two of rows, and requests differ in values only (lengths, limits, stop ids, sampling).

One call of the decoding program runs several steps, because a round trip to the host can take
longer than a small model's step. The number of steps is an argument, chosen such that tokens arrive
several times per second. A call returns early when no row is left, or when a row finishes while
another request waits. If tokens are not read as they come (`streaming=False`), a call runs all the
steps that it has room for, and newcomers take the rows that became free meanwhile together.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from dsjax.generate import decoding
from dsjax.generate.decoding import Decoded
from dsjax.generate.programs import Programs
from dsjax.generate.record import Record
from dsjax.generate.request import Output, Request, join, output, problems
from dsjax.generate.rows import Open, Rows, cache_length, power_of_two
from dsjax.generate.speculative import check as check_drafting
from dsjax.model.transformer import Transformer

_MIN_CHUNK = 16
_SECONDS_BETWEEN_ITEMS = 0.05
_NO_LIMIT = 1 << 30


@dataclasses.dataclass
class Statistics:
    """What generation has cost so far. Seconds exclude compilation."""

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0  # prompts, including each request's first token
    new_tokens: int = 0
    decode_seconds: float = 0.0
    decode_steps: int = 0  # summed over unfinished rows
    drafted: int = 0
    accepted: int = 0  # drafts that the main model accepted


class Engine:
    """Generates with one model on the devices that hold it. Not thread-safe.

    A service calls `add`, `step` and `cancel`; `generate` and `complete` run a closed batch on top
    of them. A request's greedy tokens are the same alone and in any company, up to rounding; drawn
    tokens depend only on its own logits, seed and positions.

    Attributes:
      statistics: of the latest closed batch, else of all requests added since the engine was made.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        speculative: bool = False,
        prefill_chunk: int = 512,
        max_batch: int | None = None,
        streaming: bool = True,
    ) -> None:
        """
        Args:
          speculative: whether the model's MTP modules draft tokens (`dsjax.generate.speculative`).
          prefill_chunk: prompt tokens per row and step, a power of two and at least 16.
          max_batch: how many requests run together at most; the others wait. None: no limit.
          streaming: whether tokens are wanted as they come; if not, all are there sooner.

        Raises:
          ValueError: `prefill_chunk` or `max_batch` is out of range, or the model has no MTP
            modules to draft with.
        """
        if prefill_chunk < _MIN_CHUNK or prefill_chunk != power_of_two(prefill_chunk):
            raise ValueError(
                f"prefill_chunk={prefill_chunk} must be a power of two of at least {_MIN_CHUNK}, "
                f"such as {max(power_of_two(prefill_chunk), _MIN_CHUNK)}"
            )
        if max_batch is not None and max_batch < 1:
            raise ValueError(f"max_batch={max_batch} must be at least 1; None sets no limit")
        if speculative:
            check_drafting(model.config)
        self.statistics = Statistics()
        self._programs = Programs(model)
        self._n_drafts = model.config.n_mtp if speculative else 0
        self._chunk = prefill_chunk
        self._max_batch = max_batch
        self._most_rows = max_batch or _NO_LIMIT
        self._waiting: deque[Open] = deque()
        self._incoming: Rows | None = None  # newcomers, whose prompts have run up to `_start`
        self._running: Rows | None = None
        self._start = 0
        self._streaming = streaming
        # in the next call of the decoding program
        self._n_steps = 1 if streaming else decoding.MAX_STEPS
        self._decoded_last = False
        self._next_id = 0

    @property
    def busy(self) -> bool:
        """Tells whether any request is unfinished."""
        return bool(self._waiting or self._incoming or self._running)

    def load(self, model: Transformer) -> None:
        """Replaces the weights without recompiling anything. Waiting requests stay in the queue.

        Raises:
          ValueError: the model differs in config, precision, dtype or placement, or requests are
            running, whose caches were computed with the old weights.
        """
        if self._incoming or self._running:
            raise ValueError(
                "weights cannot change while requests run: their caches belong to the old ones; "
                "finish or cancel the requests first"
            )
        self._programs.load(model)

    def add(self, request: Request) -> int:
        """Queues a request and returns its id, for `step` and `cancel`.

        Raises:
          ValueError: the prompt is empty, has ids outside the vocabulary, or exceeds the model's
            length together with `max_new_tokens`; all faults are listed.
        """
        if found := list(problems(request, self._programs.model.config)):
            raise ValueError("\n".join(found))
        self._next_id += 1
        self._waiting.append(Open(self._next_id, request))
        return self._next_id

    def cancel(self, id: int) -> None:
        """Drops a request, waiting or running; the id of a finished one is ignored."""
        self._waiting = deque(open_ for open_ in self._waiting if open_.id != id)
        for rows in filter(None, (self._incoming, self._running)):
            for row, slot in enumerate(rows.slots):
                if slot and slot.id == id:
                    rows.release(row)
        self._drop_empty()

    def step(self) -> dict[int, Output]:
        """Runs a chunk of the newcomers' prompts or some decoding steps, alternating.

        Returns:
          new outputs by request id; requests without new tokens are absent.
        """
        if self._incoming is None and self._waiting:
            self._admit()
        if self._incoming and (self._decoded_last or not self._running):
            self._decoded_last = False
            return self._prefill(self._incoming)
        self._decoded_last = True
        return self._decode(self._running) if self._running else {}

    def generate(self, requests: Sequence[Request]) -> Iterator[list[list[int]]]:
        """Runs a closed batch and streams its tokens.

        Yields:
          one list per request with its tokens since the last item, empty while it waits and after
          it has finished; a stop id is included as the last token.

        Raises:
          ValueError: see `add`; or other requests are unfinished.
        """
        self._check(requests)
        return (
            [new[index].tokens if index in new else [] for index in range(len(requests))]
            for new in self._run(requests)
        )

    def complete(self, requests: Sequence[Request]) -> list[Output]:
        """Runs a closed batch and returns each request's whole output, reports included.

        Raises:
          ValueError: see `generate`.
        """
        self._check(requests)
        outputs: list[list[Output]] = [[] for _ in requests]
        for new in self._run(requests):
            for index, part in new.items():
                outputs[index].append(part)
        return [join(each) for each in outputs]

    def _run(self, requests: Sequence[Request]) -> Iterator[dict[int, Output]]:
        if self.busy:
            raise ValueError("other requests are unfinished; step or cancel them first")
        self.statistics = Statistics()
        # A closed batch gets exactly the rows it needs, not a power of two.
        self._most_rows = self._max_batch or len(requests)
        index_of = {self.add(request): index for index, request in enumerate(requests)}
        try:
            while self.busy:
                if new := self.step():
                    yield {index_of[id]: part for id, part in new.items()}
        finally:  # the caller may stop iterating early
            self._waiting.clear()
            self._incoming = self._running = None
            self._most_rows = self._max_batch or _NO_LIMIT

    def _check(self, requests: Sequence[Request]) -> None:
        found = [
            f"request {index}: {problem}"
            for index, each in enumerate(requests)
            for problem in problems(each, self._programs.model.config)
        ]
        if found:
            raise ValueError("\n".join(found))

    def _admit(self) -> None:
        """Gives the requests that have waited longest a cache for their prompts."""
        room = self._most_rows - (self._running.n_open if self._running else 0)
        admitted = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
        if not admitted:
            return
        requests = [open_.request for open_ in admitted]
        longest = max(len(each.prompt) + each.max_new_tokens for each in requests)
        config = self._programs.model.config
        length = cache_length(
            config,
            longest,
            chunk=self._chunk,
            n_drafts=self._n_drafts,
            streaming=self._streaming,
        )
        if self._running:
            length = max(length, self._running.length)
        self._incoming = self._make_rows(admitted, length)
        self._start = 0
        self.statistics.prompt_tokens += sum(len(each.prompt) for each in requests)

    def _make_rows(self, slots: Sequence[Open | None], length: int) -> Rows:
        n_rows = min(power_of_two(len(slots)), self._most_rows)
        n_rows += -n_rows % self._programs.batch_parts
        carry = self._programs.compiled(
            decoding.empty_carry, batch=n_rows, length=length, n_drafts=self._n_drafts
        )()
        return Rows([*slots, *[None] * (n_rows - len(slots))], carry, length)

    def _prefill(self, rows: Rows) -> dict[int, Output]:
        """Runs a chunk of the newcomers' prompts."""
        start = self._start
        longest = max(len(slot.request.prompt) for slot in rows.slots if slot)
        size = min(max(power_of_two(longest - start), _MIN_CHUNK), self._chunk)
        tokens_BX = np.zeros((len(rows.slots), size + self._n_drafts), np.int32)
        for row, slot in enumerate(rows.slots):
            part = slot.request.prompt[start : start + tokens_BX.shape[1]] if slot else ()
            tokens_BX[row, : len(part)] = part
        run = self._programs.compiled(
            decoding.prefill, rows.carry, tokens_BX, np.int32(start), rows.position_B, rows.knobs,
            wanted=rows.wanted,
        )  # fmt: skip
        began = time.perf_counter()
        rows.carry, drawn = run()
        drawn_B, report = jax.device_get(drawn)
        self.statistics.prefill_seconds += time.perf_counter() - began
        self._start += size
        new: dict[int, Output] = {}
        for row, slot in enumerate(rows.slots):
            if slot is None:
                continue
            n_own = len(slot.request.prompt) - start
            if report.experts is not None and n_own > 0:
                slot.experts.append(report.experts[row, :n_own])
            if 0 < n_own <= size:
                new[slot.id] = self._first(rows, row, slot, int(drawn_B[row]), report)
        self._join(rows, [row for row, slot in enumerate(rows.slots) if slot and slot.id in new])
        return new

    def _first(self, rows: Rows, row: int, slot: Open, token: int, report: Record) -> Output:
        """Records and returns the first new token of a row whose prompt has ended."""
        tokens = [token] if slot.request.max_new_tokens else []
        rows.begin(row, token)
        self.statistics.new_tokens += len(tokens)
        report = jax.tree.map(lambda array: array[row, : len(tokens)], report)
        if slot.experts:
            report = report._replace(experts=np.concatenate(slot.experts))
            slot.experts.clear()
        return output(slot.request, tokens, left=int(rows.left_B[row]), report=report)

    def _join(self, rows: Rows, ended: Sequence[int]) -> None:
        """Moves newcomers whose prompts have ended into the running batch."""
        for row in ended:
            if not rows.left_B[row]:
                rows.release(row)
        going = [row for row in ended if rows.slots[row]]
        if self._running and going:
            into = self._running
            if len(into.free()) < len(going) or into.length < rows.length:
                wider = self._make_rows([None] * (into.n_open + len(going)), rows.length)
                open_ = [row for row, slot in enumerate(into.slots) if slot]
                self._move(into, wider, open_)
                self._running = into = wider
            self._move(rows, into, going)
        longest = max((len(slot.request.prompt) for slot in rows.slots if slot), default=0)
        if not self._running and self._start >= longest:
            self._running, self._incoming = rows, None
        self._drop_empty()

    def _move(self, rows: Rows, into: Rows, which: Sequence[int]) -> None:
        """Moves some rows into free rows of another batch."""
        moved = dict(zip(which, into.free(), strict=False))
        slots_X = len(into.slots) + np.arange(len(rows.slots), dtype=np.int32)  # outside: dropped
        slots_X[list(moved)] = list(moved.values())
        into.carry = self._programs.compiled(decoding.insert, into.carry, rows.carry, slots_X)()
        into.take(rows, moved)

    def _decode(self, rows: Rows) -> dict[int, Output]:
        """Runs some decoding steps."""
        run = self._programs.compiled(
            decoding.decode, rows.carry, rows.position_B, rows.recent_BW, rows.left_B,
            rows.stop_ids_BX, rows.knobs, np.int32(self._n_steps),
            np.bool_(self._streaming and bool(self._waiting)),
            wanted=rows.wanted,
        )  # fmt: skip
        began = time.perf_counter()
        rows.carry, decoded = run()
        decoded = Decoded(*jax.device_get(decoded))
        seconds = time.perf_counter() - began
        rows.position_B, rows.recent_BW, rows.left_B = decoded[:3]
        self.statistics.decode_seconds += seconds
        self._count_steps(decoded)
        # All processes must run the same number of steps, and their clocks differ.
        if self._streaming and jax.process_count() == 1:
            n_steps = int(_SECONDS_BETWEEN_ITEMS * decoded.n_steps / seconds)
            self._n_steps = min(max(n_steps, 1), decoding.MAX_STEPS)
        new: dict[int, Output] = {}
        for row, (slot, tokens) in enumerate(zip(rows.slots, decoded.tokens(), strict=True)):
            if slot and tokens:
                left, report = int(rows.left_B[row]), decoded.report(row)
                new[slot.id] = output(slot.request, tokens, left=left, report=report)
                if not left:
                    rows.release(row)
        self.statistics.new_tokens += sum(len(part.tokens) for part in new.values())
        self._drop_empty()
        return new

    def _count_steps(self, decoded: Decoded) -> None:
        ran = int(decoded.ran_NB[: decoded.n_steps].sum())
        self.statistics.decode_steps += ran
        self.statistics.drafted += ran * self._n_drafts
        self.statistics.accepted += int(decoded.n_kept_NB[: decoded.n_steps].sum())

    def _drop_empty(self) -> None:
        if self._incoming and not self._incoming.n_open:
            self._incoming = None
        if self._running and not self._running.n_open:
            self._running = None
