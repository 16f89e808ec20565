"""Generation: prompts in chunks, then token by token on a cache, for requests that come and go.

Requests wait in a queue until a row is free. Newcomers run their prompts together in a cache of
their own, one chunk per step, while the rows that already run go on in between; a row joins these
when its prompt is done. A row that finishes, or is cancelled, is free for the next request. Where
nothing else runs, the newcomers' cache becomes the running one: a closed batch is never copied.

Shapes are few, so that programs are: a cache is as long as a power of two, prompts run in chunks of
one size and a last one of a power of two, and the rows of a batch differ in numbers only (lengths,
limits, stop ids, sampling). Each program is compiled once for a batch size and a length. The cache
is donated from program to program and changes in place.

A decoding program runs several steps before it returns to the host, which takes longer than a small
model's step. How many is a number it is given, so that tokens still come many times a second. It
returns early when no row is left, and while requests wait as soon as one row is free.
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
    """What a generation has taken so far. Compilation is not in the seconds."""

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0  # up to each row's first token
    new_tokens: int = 0
    decode_seconds: float = 0.0
    decode_steps: int = 0  # of the rows that still ran, added up
    drafted: int = 0
    accepted: int = 0  # drafts that the main model kept


class Engine:
    """Generates with one model, on the devices that hold it. One thread may use it at a time.

    Attributes:
      statistics: of the latest `generate` or `complete`, or of all requests that were added.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        speculative: bool = False,
        prefill_chunk: int = 512,
        max_batch: int | None = None,
    ) -> None:
        """
        Args:
          speculative: whether the model's MTP modules draft tokens (`dsjax.generate.speculative`).
          prefill_chunk: tokens of each row's prompt that run at once, a power of two from 16 on.
          max_batch: how many requests run together; further ones wait. None: no limit.

        Raises:
          ValueError: the chunk or the batch is another number, or the model has nothing to draft
            with.
        """
        if prefill_chunk < _MIN_CHUNK or prefill_chunk != power_of_two(prefill_chunk):
            raise ValueError(
                f"prefill_chunk={prefill_chunk} must be a power of two from {_MIN_CHUNK} on, such "
                f"as {max(power_of_two(prefill_chunk), _MIN_CHUNK)}"
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
        self._incoming: Rows | None = None  # their prompts run, up to `_start`
        self._running: Rows | None = None
        self._start = 0
        self._n_steps = 1  # of the next call of the decoding program
        self._decoded_last = False
        self._next_id = 0

    @property
    def busy(self) -> bool:
        """Whether any request is not finished."""
        return bool(self._waiting or self._incoming or self._running)

    def load(self, model: Transformer) -> None:
        """Replaces the weights; every program stays compiled.

        Raises:
          ValueError: the model is of another shape, dtype or placement, or requests run: what is in
            their caches comes from the old weights.
        """
        if self._incoming or self._running:
            raise ValueError("weights are replaced between requests; finish or cancel them first")
        self._programs.load(model)

    def add(self, request: Request) -> int:
        """Queues a request and returns the id that `step` and `cancel` know it by.

        Raises:
          ValueError: the prompt is empty, has ids outside the vocabulary, or is too long together
            with `max_new_tokens`; all such faults at once.
        """
        if found := list(problems(request, self._programs.model.config)):
            raise ValueError("\n".join(found))
        self._next_id += 1
        self._waiting.append(Open(self._next_id, request))
        return self._next_id

    def cancel(self, id: int) -> None:
        """Drops a request, wherever it stands; an id that is not open is ignored."""
        self._waiting = deque(open_ for open_ in self._waiting if open_.id != id)
        for rows in filter(None, (self._incoming, self._running)):
            for row, slot in enumerate(rows.slots):
                if slot and slot.id == id:
                    rows.release(row)
        self._drop_empty()

    def step(self) -> dict[int, Output]:
        """Runs one program, a chunk of the newcomers' prompts or some steps of decoding, in turn.

        Returns:
          what is new, by the requests' ids; requests of which nothing is new are left out.
        """
        if self._incoming is None and self._waiting:
            self._admit()
        if self._incoming and (self._decoded_last or not self._running):
            self._decoded_last = False
            return self._prefill(self._incoming)
        self._decoded_last = True
        return self._decode(self._running) if self._running else {}

    def generate(self, requests: Sequence[Request]) -> Iterator[list[list[int]]]:
        """Generates for all requests together.

        Yields:
          each request's tokens since the last item, none for one that waits or is finished; a stop
          id is the last token of its request.

        Raises:
          ValueError: see `add`; or requests that were added are not finished.
        """
        self._check(requests)
        return (
            [new[index].tokens if index in new else [] for index in range(len(requests))]
            for new in self._run(requests)
        )

    def complete(self, requests: Sequence[Request]) -> list[Output]:
        """Generates for all requests together and returns each one's whole output, with the
        reports that it asks for.

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
            raise ValueError("requests that were added are not finished; step or cancel them first")
        self.statistics = Statistics()
        # A closed batch has as many rows as it needs, no power of two.
        self._most_rows = self._max_batch or len(requests)
        index_of = {self.add(request): index for index, request in enumerate(requests)}
        try:
            while self.busy:
                if new := self.step():
                    yield {index_of[id]: part for id, part in new.items()}
        finally:  # the caller may have left early
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
        """Gives the requests that have waited longest a cache to run their prompts in."""
        room = self._most_rows - (self._running.n_open if self._running else 0)
        admitted = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
        if not admitted:
            return
        requests = [open_.request for open_ in admitted]
        longest = max(len(each.prompt) + each.max_new_tokens for each in requests)
        config = self._programs.model.config
        length = cache_length(config, longest, chunk=self._chunk, n_drafts=self._n_drafts)
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
        """Runs a chunk of the prompts."""
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
            if report.experts_BTLK is not None and n_own > 0:
                slot.experts.append(report.experts_BTLK[row, :n_own])
            if 0 < n_own <= size:
                new[slot.id] = self._first(rows, row, slot, int(drawn_B[row]), report)
        self._join(rows, [row for row, slot in enumerate(rows.slots) if slot and slot.id in new])
        return new

    def _first(self, rows: Rows, row: int, slot: Open, token: int, report: Record) -> Output:
        """The first new token of a row, with which its prompt ends."""
        tokens = [token] if slot.request.max_new_tokens else []
        rows.begin(row, token)
        self.statistics.new_tokens += len(tokens)
        report = jax.tree.map(lambda array: array[row, : len(tokens)], report)
        if slot.experts:
            report = report._replace(experts_BTLK=np.concatenate(slot.experts))
            slot.experts.clear()
        return output(slot.request, tokens, left=int(rows.left_B[row]), report=report)

    def _join(self, rows: Rows, ended: Sequence[int]) -> None:
        """Lets newcomers whose prompts have ended run with the others."""
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
        moved = dict(zip(which, into.free(), strict=False))
        slots_X = np.full(len(rows.slots), len(into.slots), np.int32)
        slots_X[list(moved)] = list(moved.values())
        into.carry = self._programs.compiled(decoding.insert, into.carry, rows.carry, slots_X)()
        into.take(rows, moved)

    def _decode(self, rows: Rows) -> dict[int, Output]:
        """Runs some steps of decoding."""
        run = self._programs.compiled(
            decoding.decode, rows.carry, rows.position_B, rows.recent_BW, rows.left_B,
            rows.stop_ids_BX, rows.knobs, np.int32(self._n_steps), np.bool_(bool(self._waiting)),
            wanted=rows.wanted,
        )  # fmt: skip
        began = time.perf_counter()
        rows.carry, decoded = run()
        decoded = Decoded(*jax.device_get(decoded))
        seconds = time.perf_counter() - began
        rows.position_B, rows.recent_BW, rows.left_B = decoded[:3]
        self.statistics.decode_seconds += seconds
        self._count_steps(decoded)
        # The clocks of several processes would tell each another number.
        if jax.process_count() == 1:
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
