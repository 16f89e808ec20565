"""Generation as a service: requests are added, step by step decoded, and leave when they finish.

Requests wait in a queue for a free row of the running batch. Newcomers run their prompts together
in a separate cache, one chunk per step, alternating with decoding of the running batch, so that
running requests never wait for more than one chunk. When a prompt is done, its row is inserted into
the running batch, once for every request that continues it: equal prompts of newcomers run once.
If nothing runs and no prompt is shared, the newcomers' cache becomes the running one without a
copy. Where prompts have devices of their own (`dsjax.generate.prefill`), a chunk and decoding run
beside each other.

Few shapes occur, so few programs are compiled: a cache has a power of two as its length, prompts
run in chunks of one size followed by one chunk of a power of two, a growing batch has a power of
two of rows, and requests differ in values only (lengths, limits, stop ids, sampling). A service has
still fewer (`dsjax.generate.shapes.Shapes`), so that all its programs are compiled at its start.

One call of the decoding program runs several steps, because a round trip to the host can take
longer than a small model's step. The number of steps is an argument, chosen such that tokens arrive
several times per second. A call returns early when no row is left, or when a row finishes while
another request waits. If tokens are not read as they come (`streaming=False`), a call runs all the
steps that it has room for, and newcomers take the rows that became free meanwhile together; when
nobody waits any more, the rest of the batch goes on in fewer rows, a quarter or a third at a time.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import time
from collections import deque
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from dsjax.generate import decoding
from dsjax.generate.balancing import Balance, Balancer
from dsjax.generate.decoding import Carry, Decoded
from dsjax.generate.page_files import PageFiles
from dsjax.generate.prefill import Prefill
from dsjax.generate.programs import Programs
from dsjax.generate.prompts import MIN_CHUNK, Prompts, Started, distinct
from dsjax.generate.record import Record
from dsjax.generate.request import Output, Request, join, output, problems
from dsjax.generate.rows import ROWS_AT_A_TIME, Open, Rows, steer
from dsjax.generate.sampling import Knobs
from dsjax.generate.shapes import (
    Shapes,
    cache_length,
    few_shapes,
    fewer_rows,
    fit,
    power_of_two,
)
from dsjax.generate.speculative import check as check_drafting
from dsjax.generate.warming import Warming
from dsjax.model.transformer import Transformer

_SECONDS_BETWEEN_ITEMS = 0.1  # smooth to read; more items cost the event loop and clients time
_NO_LIMIT = 1 << 30
_FEWER_STEPS = 4  # as many times fewer where newcomers wait for the next chunk of their prompts


@dataclasses.dataclass
class Statistics:
    """What generation has cost so far. Seconds exclude compilation."""

    prompt_tokens: int = 0  # that were run; a prompt that several requests share counts once
    cached_tokens: int = 0  # of prompts, that were known and not run
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
        prefix_tokens: int = 0,
        examples: Sequence[Request] = (),
        balancer: Balancer | None = None,
        page_files: PageFiles | None = None,
        prompt_model: Transformer | None = None,
    ) -> None:
        """
        Args:
          speculative: whether the model's MTP modules draft tokens (`dsjax.generate.speculative`).
          prefill_chunk: prompt tokens per row and step, a power of two and at least 16.
          max_batch: how many requests run together at most; the others wait. None: no limit.
          streaming: whether tokens are wanted as they come; if not, all are there sooner.
          prefix_tokens: how many tokens of past prompts and replies are kept on the devices, so
            that a later prompt that begins in the same way runs the rest only; 0: none.
          examples: one request per kind of report and steering that occurs, with its stop ids.
            Batches and caches then have so few sizes that `warm` can compile every program;
            `max_batch` is required.
          balancer: of the model's experts, where these are redundant.
          page_files: where these prefixes are kept on disk besides, for as long as the weights
            are not replaced.
          prompt_model: the same model on other devices, which run the prompts; None: the model's
            own do.

        Raises:
          ValueError: `prefill_chunk`, `max_batch` or `prefix_tokens` is out of range, the model has
            no MTP modules to draft with, its mesh would split a cache that stays whole, or
            `prompt_model` is not the same model on other devices.
        """
        if prefill_chunk < MIN_CHUNK or prefill_chunk != power_of_two(prefill_chunk):
            raise ValueError(
                f"prefill_chunk={prefill_chunk} must be a power of two of at least {MIN_CHUNK}, "
                f"such as {max(power_of_two(prefill_chunk), MIN_CHUNK)}"
            )
        if max_batch is not None and max_batch < 1:
            raise ValueError(f"max_batch={max_batch} must be at least 1; None sets no limit")
        if examples and max_batch is None:
            raise ValueError("examples need max_batch, the most rows of a batch")
        if page_files and (not prefix_tokens or jax.process_count() > 1):
            raise ValueError("page_files need prefix_tokens above 0, and a single process")
        if speculative:
            check_drafting(model.config)
        self.statistics = Statistics()
        self._programs = Programs(model)
        self._n_drafts = model.config.n_mtp if speculative else 0
        self._prompting = Prefill(
            self._programs, prompt_model, chunk=prefill_chunk, n_drafts=self._n_drafts
        )
        self._balancer = balancer
        self._vocab_size = model.config.vocab_size
        self._chunk = prefill_chunk
        self._examples = tuple(examples)
        self._shapes: Shapes | None = None
        if examples and max_batch:
            self._shapes = few_shapes(
                model.config,
                max_batch=max_batch,
                batch_parts=self._prompting.batch_parts,
                chunk=prefill_chunk,
                n_drafts=self._n_drafts,
            )
        if prefix_tokens:
            smallest = self._shapes.chunks[0] if self._shapes else MIN_CHUNK
            self._prompting.keep_prefixes(prefix_tokens, smallest, page_files)
        self._max_batch = max_batch
        self._closed = 0  # requests of the closed batch that runs; 0: any number may come
        self._waiting: deque[Open] = deque()
        self._incoming: Prompts | None = None
        self._running: Rows | None = None
        self._streaming = streaming
        self._n_steps = 1 if streaming else decoding.MAX_STEPS  # of the next decoding call
        self._decoded_last = False
        self._next_id = 0

    @property
    def busy(self) -> bool:
        """Tells whether any request is unfinished."""
        return bool(self._waiting or self._incoming or self._running)

    @property
    def balance(self) -> Balance | None:
        """How even the loads of redundant experts are; None without any."""
        return self._balancer.balance if self._balancer else None

    def load(self, model: Transformer) -> None:
        """Replaces the weights without recompiling anything. Waiting requests stay in the queue.

        Raises:
          ValueError: the model differs in config, precision, dtype or placement, requests are
            running, whose caches were computed with the old weights, or a balancer moves experts.
        """
        self._check_replaceable()
        self._programs.load(model)
        if self._prompting.apart:
            self._prompting.programs.load(self._prompting.programs.placed(model))
        if self._prompting.prefixes:
            self._prompting.prefixes.clear()

    def release(self) -> None:
        """Lets go of the weights, so that their memory is free until others are loaded; what is
        compiled stays.

        Raises:
          ValueError: requests are running, or a balancer moves experts.
        """
        self._check_replaceable()
        self._programs.release()
        self._prompting.programs.release()

    def _check_replaceable(self) -> None:
        if self._balancer:
            raise ValueError(
                "this engine's balancer moves the experts of the weights that it was made with, so "
                "others cannot take their place; make a new Engine and Balancer for them, or an "
                "Engine without one"
            )
        if self._incoming or self._running:
            raise ValueError(
                "weights cannot change while requests run: their caches belong to the old ones; "
                "finish or cancel the requests first"
            )

    def add(self, request: Request) -> int:
        """Queues a request and returns its id, for `step` and `cancel`.

        Raises:
          ValueError: the prompt is empty, has ids outside the vocabulary, or exceeds the model's
            length together with `max_new_tokens`; all faults are listed.
        """
        if found := list(problems(request, self._programs.model.config)):
            raise ValueError("\n".join(found))
        self._next_id += 1
        fetched = None
        if self._prompting.prefixes:
            fetched = self._prompting.prefixes.fetch(request.prompt, request.scope)
        self._waiting.append(Open(self._next_id, request, fetched))
        return self._next_id

    def cancel(self, id: int) -> None:
        """Drops a request, waiting or running; the id of a finished one is ignored."""
        self._waiting = deque(open_ for open_ in self._waiting if open_.id != id)
        for batch in filter(None, (self._incoming, self._running)):
            for place, slot in enumerate(batch.slots):
                if slot and slot.id == id:
                    self._prompting.keep(batch, place)
                    batch.release(place)
        self._drop_empty()

    def abandon(self) -> None:
        """Drops all requests after a step has failed. Nothing of past prompts is known any more:
        what the step was writing, known prefixes among it, may be anything.
        """
        self._waiting.clear()
        self._incoming = self._running = None
        if self._prompting.prefixes:
            self._prompting.prefixes.forget()

    @property
    def shapes(self) -> Shapes | None:
        """The sizes that occur, with `examples`."""
        return self._shapes

    def warm(self) -> Iterator[tuple[int, int]]:
        """Compiles every program that requests like the examples may need, one for each item. In
        between requests may be served, which compile what they need before its turn.

        Yields:
          how many programs are done and how many there are, before the first and after each.
        """
        assert self._shapes is not None
        return Warming(
            self._programs, self._prompting, self._shapes, self._examples, self._n_drafts
        ).run()

    def step(self) -> dict[int, Output]:
        """Runs a chunk of the newcomers' prompts or some decoding steps, alternating; where prompts
        have devices of their own, decodes while the chunk runs.

        Returns:
          new outputs by request id; requests without new tokens are absent.
        """
        if self._incoming is None and self._waiting:
            self._admit()
        turn, newcomers = self._decoded_last or not self._running, self._incoming
        if newcomers and (turn or self._prompting.apart):
            chunk = newcomers.started or self._start(newcomers)
            if turn and (not (self._prompting.apart and self._running) or chunk.ended):
                self._decoded_last = False
                return self._end(newcomers, chunk)
        self._decoded_last = True
        if self._running is None:
            return {}
        self._running = self._shrunk(self._running)
        return self._decode(self._running)

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
        self._closed = len(requests)
        index_of = {self.add(request): index for index, request in enumerate(requests)}
        try:
            while self.busy:
                if new := self.step():
                    yield {index_of[id]: part for id, part in new.items()}
        finally:  # the caller may stop iterating early
            self._waiting.clear()
            self._incoming = self._running = None
            self._closed = 0

    def _check(self, requests: Sequence[Request]) -> None:
        found = [
            f"request {index}: {problem}"
            for index, each in enumerate(requests)
            for problem in problems(each, self._programs.model.config)
        ]
        if found:
            raise ValueError("\n".join(found))

    def _admit(self) -> None:
        """Gives the requests that have waited longest a cache for their prompts; those that the
        disk is read for wait until it is.
        """
        room = self._most_rows - (self._running.n_open if self._running else 0)
        if self._shapes:
            room = min(room, self._shapes.newcomers[-1])
        ready = [each for each in self._waiting if not each.fetched or each.fetched.pages.done()]
        admitted = ready[: max(room, 0)]
        if not admitted:
            if room > 0 and self._running is None and (fetched := self._waiting[0].fetched):
                concurrent.futures.wait([fetched.pages], _SECONDS_BETWEEN_ITEMS)
            return
        taken = {each.id for each in admitted}
        self._waiting = deque(each for each in self._waiting if each.id not in taken)
        requests = [open_.request for open_ in admitted]
        longest = max(len(each.prompt) + each.max_new_tokens for each in requests)
        if self._shapes:
            length = fit(longest + self._n_drafts, self._shapes.lengths)
        else:
            length = cache_length(
                self._programs.model.config,
                longest,
                chunk=self._chunk,
                n_drafts=self._n_drafts,
                streaming=self._streaming,
            )
            length = max(length, self._running.length if self._running else 0)
        slots = [*admitted, *[None] * (self._n_rows(len(admitted)) - len(admitted))]
        prompts = distinct(slots)
        n_rows = len(slots) if self._shapes else self._n_rows(len(prompts))
        carry = self._prompting.empty_carry(n_rows, length)
        self._incoming = Prompts(
            slots, carry, length, n_drafts=self._n_drafts, examples=self._examples
        )
        known = self._prompting.recall(self._incoming)
        self.statistics.cached_tokens += known
        self.statistics.prompt_tokens += sum(len(prompt) for _, prompt in prompts) - known

    @property
    def _most_rows(self) -> int:
        # A closed batch gets exactly the rows it needs, not a power of two.
        return self._max_batch or self._closed or _NO_LIMIT

    def _n_rows(self, at_least: int) -> int:
        """Returns how many rows a cache gets."""
        if self._shapes:
            return fit(at_least, self._shapes.rows)
        n_rows = min(power_of_two(at_least), self._most_rows)
        return n_rows + -n_rows % self._prompting.batch_parts

    def _empty_carry(self, n_rows: int, length: int) -> Carry:
        return self._programs.compiled(
            decoding.empty_carry, batch=n_rows, length=length, n_drafts=self._n_drafts
        )()

    def _start(self, newcomers: Prompts) -> Started:
        """Starts the next chunk of the newcomers' prompts."""
        chunk = newcomers.chunk(self._chunk, self._shapes.chunks if self._shapes else ())
        return self._prompting.start(newcomers, chunk, self._knobs(newcomers))

    def _end(self, newcomers: Prompts, started: Started) -> dict[int, Output]:
        """Takes over what a chunk of the newcomers' prompts gives, once it has run."""
        chunk, newcomers.started = started.chunk, None
        drawn_X, report, load_LE = jax.device_get(started.drawn)
        self.statistics.prefill_seconds += time.perf_counter() - started.began
        if self._balancer and load_LE is not None:
            self._balancer.add(load_LE)
        counts, ready = newcomers.advance(chunk), set(newcomers.ready())
        new: dict[int, Output] = {}
        for i, count in counts.items():
            slot = newcomers.slots[i]
            assert slot
            if report.experts is not None:
                slot.experts.append(report.experts[newcomers.rows_X[i], :count])
            if i in ready:
                self._prompting.keep(newcomers, i)
                known = int(newcomers.known_B[newcomers.rows_X[i]])
                own = jax.tree.map(lambda array, i=i: array[i], report._replace(experts=None))
                new[slot.id] = self._first(slot, int(drawn_X[i]), own, known)
                if not slot.left:
                    newcomers.release(i)
        self._join(newcomers)
        return new

    def _knobs(self, batch: Prompts | Rows) -> Knobs:
        """Returns the sampling settings of the next token."""
        return steer(batch.knobs, batch.slots, self._vocab_size) if batch.steered else batch.knobs

    def _first(self, slot: Open, token: int, report: Record, known: int) -> Output:
        """Records and returns the first new token of a request whose prompt has ended."""
        tokens = [token] if slot.left else []
        slot.add(tokens)
        self.statistics.new_tokens += len(tokens)
        report = jax.tree.map(lambda array: array[: len(tokens)], report)
        if slot.experts:
            report = report._replace(experts=np.concatenate(slot.experts))
            slot.experts.clear()
        return output(slot.request, tokens, left=slot.left, report=report, cached_tokens=known)

    def _join(self, newcomers: Prompts) -> None:
        """Moves newcomers whose prompts have ended into the running batch."""
        ready = newcomers.ready()
        # A closed batch may as well begin together, without a copy.
        together = self._closed or not self._streaming
        whole = newcomers.done and not newcomers.shared and not self._prompting.apart
        if self._running is None and whole:
            self._running = Rows(newcomers.slots, newcomers.carry, newcomers.length)
            self._incoming = None
        elif ready and (self._running or newcomers.done or not together):
            n_free = len(ready) if self._running else newcomers.n_open
            self._running = self._with_room(self._running, n_free, newcomers.length)
            self._move(newcomers, ready, self._running)
        self._drop_empty()

    def _with_room(self, rows: Rows | None, n_free: int, length: int) -> Rows:
        """Returns a running batch with this many free rows of at least this length."""
        if rows and len(rows.free()) >= n_free and rows.length >= length:
            return rows
        open_ = rows.open() if rows else []
        n_rows = self._n_rows(len(open_) + n_free)
        length = max(length, rows.length if rows else 0)
        wider = Rows([None] * n_rows, self._empty_carry(n_rows, length), length)
        if rows:
            self._move(rows, open_, wider)
        return wider

    def _move(self, other: Prompts | Rows, slots: list[int], into: Rows) -> None:
        """Moves some slots into free rows of the running batch."""
        free = into.free()[: len(slots)]
        if self._prompting.apart and isinstance(other, Prompts):
            self._prompting.hand_over(other, slots, into, free)
        else:
            self._insert(other, slots, into, free)
        into.put({row: other.slots[i] for row, i in zip(free, slots, strict=True)})
        for i in slots:
            other.release(i)

    def _insert(self, other: Prompts | Rows, slots: list[int], into: Rows, free: list[int]) -> None:
        """Copies the cache of some slots into free rows."""
        # On a mesh every device sees the rows of one call.
        n = min(len(other.slots), len(into.slots), ROWS_AT_A_TIME)
        for first in range(0, len(slots), n):
            places = free[first : first + n]
            others_X = np.zeros(n, np.int32)
            others_X[: len(places)] = other.rows_X[slots[first : first + n]]
            rows_X = len(into.slots) + np.arange(n, dtype=np.int32)  # outside: dropped
            rows_X[: len(places)] = places
            into.carry = self._programs.compiled(
                decoding.insert, into.carry, other.carry, others_X, rows_X
            )()

    def _decode(self, rows: Rows) -> dict[int, Output]:
        """Runs some decoding steps; one if a request is steered."""
        steered_B = np.array([bool(slot and slot.request.steering) for slot in rows.slots])
        # A drafted token would escape the steering, so a steered row adds one token at a time.
        most_B = np.where(steered_B, np.minimum(rows.left_B, 1), rows.left_B)
        n_steps = 1 if steered_B.any() else self._n_steps
        if self._shapes and self._incoming:
            n_steps = -(-n_steps // _FEWER_STEPS)
        most_steps = None if self._runs_unattended(rows, n_steps) else np.int32(n_steps)
        run = self._programs.compiled(
            decoding.decode, rows.carry, rows.position_B, rows.recent_BW, most_B.astype(np.int32),
            rows.stop_ids_BX, self._knobs(rows), most_steps, np.int32(self._enough(rows)),
            wanted=rows.wanted,
        )  # fmt: skip
        began = time.perf_counter()
        rows.carry, decoded = run()
        decoded = Decoded(*jax.device_get(decoded))
        seconds = time.perf_counter() - began
        rows.position_B, rows.recent_BW, rows.left_B = decoded[:3]
        self.statistics.decode_seconds += seconds
        self._count_steps(decoded)
        if self._balancer:
            self._balancer.add(decoded.load_LE)
        # All processes must run the same number of steps, and their clocks differ.
        if self._streaming and jax.process_count() == 1 and not steered_B.any():
            n_steps = int(_SECONDS_BETWEEN_ITEMS * decoded.n_steps / seconds)
            self._n_steps = min(max(n_steps, 1), decoding.MAX_STEPS)
        new: dict[int, Output] = {}
        for row, (slot, (tokens, report)) in enumerate(
            zip(rows.slots, decoded.rows(), strict=True)
        ):
            if slot and tokens:
                slot.add(tokens)
                if steered_B[row]:
                    rows.left_B = np.array(rows.left_B)  # what a program returns is read-only
                    rows.left_B[row] = slot.left
                new[slot.id] = output(slot.request, tokens, left=slot.left, report=report)
                if not slot.left:
                    self._prompting.keep(rows, row)
                    rows.release(row)
        self.statistics.new_tokens += sum(len(part.tokens) for part in new.values())
        self._drop_empty()
        return new

    def _runs_unattended(self, rows: Rows, n_steps: int) -> bool:
        """Tells whether to run steps that need no host: on a GPU, while nobody waits for a row."""
        tokens = decoding.MAX_STEPS * rows.recent_BW.shape[1]
        return (
            self._programs.on_gpu
            and rows.likeliest
            and n_steps == decoding.MAX_STEPS
            and not self._waiting
            and int(rows.left_B.max()) >= tokens
        )

    def _enough(self, rows: Rows) -> int:
        """Returns at how many unfinished rows a call of the decoding program returns."""
        if self._streaming:
            return rows.n_open - 1 if self._waiting else 0
        return self._fewer(rows, len(rows.slots))

    def _fewer(self, rows: Rows, n_rows: int) -> int:
        """Returns the next number of rows below `n_rows` that the running batch may go on with, or
        0. What is left of the batch decides, never a clock: a run that is repeated does the same.
        """
        if self._streaming or self._waiting or self._incoming:
            return 0
        goes_on = rows.left_B.max() > decoding.MAX_STEPS
        return fewer_rows(n_rows, self._prompting.batch_parts) if goes_on else 0

    def _shrunk(self, rows: Rows) -> Rows:
        """Returns the running batch, with fewer rows if many have finished."""
        n_rows = len(rows.slots)
        if self._shapes and not (self._waiting or self._incoming):
            n_rows = self._shapes.shrunk(n_rows, rows.n_open)
        while rows.n_open <= (fewer := self._fewer(rows, n_rows)):
            n_rows = fewer
        if n_rows == len(rows.slots):
            return rows
        narrow = Rows([None] * n_rows, self._empty_carry(n_rows, rows.length), rows.length)
        self._move(rows, rows.open(), narrow)
        return narrow

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
