"""Where prompts run: on the devices that decode, or on devices of their own.

On devices of their own (DeepSeek-V3, arXiv:2412.19437, section 3.4) prompts and decoding do not
wait for each other: a chunk is started, decoding goes on, and what the chunk has given is read once
it is there. These devices have a copy of the weights, in their own layout. Rows whose prompts have
run are sent to the devices that decode.

The pages of known prefixes are where prompts run, because prompts read them: most tokens of a long
conversation are known, and none of them travels twice. What a reply adds to a known prefix is sent
back there, a few pages per reply.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from dsjax.generate import decoding, pages
from dsjax.generate.decoding import Carry, Drawn
from dsjax.generate.page_files import PageFiles
from dsjax.generate.pages import AT_A_TIME, Sent
from dsjax.generate.prefixes import PAGE, Prefixes
from dsjax.generate.programs import Programs
from dsjax.generate.prompts import Chunk, Prompts, Started
from dsjax.generate.rows import Rows
from dsjax.generate.sampling import Knobs
from dsjax.model.transformer import Transformer
from dsjax.parallel.sharding import parts


class Prefill:
    """Runs prompts, knows prefixes, and hands rows over to the devices that decode.

    Attributes:
      apart: whether prompts have devices of their own.
      programs: what runs there.
      prefixes: what is known of past prompts and replies; None: nothing is kept.
    """

    def __init__(
        self, decoder: Programs, model: Transformer | None, *, chunk: int, n_drafts: int
    ) -> None:
        """
        Args:
          decoder: the programs of the devices that decode.
          model: the same model on other devices; None: prompts run where decoding does.
          chunk: prompt tokens per row and step.

        Raises:
          ValueError: the two models differ or share a device, or their devices are those of several
            processes.
        """
        self.apart = model is not None
        self.programs = Programs(model) if model else decoder
        page = min(math.lcm(PAGE, pages.tokens_per_entry(decoder.model.config)), chunk)
        if self.apart:
            _check(decoder, self.programs, page)
        self.prefixes: Prefixes | None = None
        self._decoder, self._page, self._n_drafts = decoder, page, n_drafts

    @property
    def batch_parts(self) -> int:
        """Returns what the rows of a batch must divide by, on either side."""
        return math.lcm(self._decoder.batch_parts, self.programs.batch_parts)

    def keep_prefixes(self, n_tokens: int, smallest: int, files: PageFiles | None) -> None:
        """Makes room for what is kept of past prompts and replies; the arguments and errors are
        those of `Prefixes`.
        """
        self.prefixes = Prefixes(
            self.programs,
            n_tokens=n_tokens,
            page=self._page,
            n_drafts=self._n_drafts,
            smallest=smallest,
            files=files,
        )

    def empty_carry(self, n_rows: int, length: int) -> Carry:
        """Makes room for prompts."""
        return self.programs.compiled(
            decoding.empty_carry, batch=n_rows, length=length, n_drafts=self._n_drafts
        )()

    def start(self, newcomers: Prompts, chunk: Chunk, knobs: Knobs) -> Started:
        """Starts a chunk of the newcomers' prompts, and returns before it has run."""
        run = self.compiled(newcomers, chunk, knobs)
        began = time.perf_counter()
        newcomers.carry, drawn = run()
        newcomers.started = Started(chunk, drawn, began)
        return newcomers.started

    def compiled(
        self, newcomers: Prompts, chunk: Chunk, knobs: Knobs
    ) -> Callable[[], tuple[Carry, Drawn]]:
        """Returns the program for a chunk."""
        *numbers, embeddings = chunk
        given = () if embeddings is None else (embeddings,)
        return self.programs.compiled(
            decoding.prefill, newcomers.carry, *numbers, newcomers.rows_X, knobs, *given,
            wanted=newcomers.wanted,
        )  # fmt: skip

    def recall(self, newcomers: Prompts) -> int:
        """Fills in the known prefixes of the newcomers' prompts, and returns their tokens in all.

        Nothing is known of the experts that past prompts chose. If they are asked for, all runs.
        """
        if self.prefixes is None or newcomers.wanted.experts:
            return 0
        from_disk = {
            (slot.request.scope, tuple(slot.request.prompt)): slot.fetched
            for slot in newcomers.slots
            if slot and slot.fetched
        }
        for row, (scope, prompt) in enumerate(newcomers.prompts):
            newcomers.carry, count = self.prefixes.fill(
                newcomers.carry, row, prompt, scope, from_disk.get((scope, tuple(prompt)))
            )
            newcomers.know(row, count)
        return int(newcomers.known_B.sum())

    def keep(self, batch: Prompts | Rows, place: int) -> None:
        """Keeps what the cache holds of a request, for those to come that begin in the same way."""
        slot = batch.slots[place]
        if not (self.prefixes and slot):
            return
        row, tokens = int(batch.rows_X[place]), batch.in_cache(place)
        if self.apart and isinstance(batch, Rows):
            send = functools.partial(self._sent, batch, row, self._decoder, self.programs)
            self.prefixes.receive(send, tokens, slot.request.scope)
        else:
            self.prefixes.save(batch.carry, row, tokens, slot.request.scope)

    def hand_over(
        self, newcomers: Prompts, slots: Sequence[int], into: Rows, rows: Sequence[int]
    ) -> None:
        """Sends the cache of newcomers to the devices that decode; returns before it is there.

        Args:
          slots: the newcomers, whose prompts have run.
          rows: the row of `into` that each takes.
        """
        takers: dict[int, list[int]] = {}
        for slot, row in zip(slots, rows, strict=True):
            takers.setdefault(int(newcomers.rows_X[slot]), []).append(row)
        for source, targets in takers.items():
            n_pages = -(-len(newcomers.prompts[source][1]) // self._page)
            for first in range(0, n_pages, AT_A_TIME):
                places = range(first, min(first + AT_A_TIME, n_pages))
                sent = self._sent(newcomers, source, self.programs, self._decoder, places)
                for row in targets:
                    into.carry = self._decoder.compiled(
                        pages.receive, into.carry, sent, np.int32(row), pages.padded(places)
                    )()

    def _sent(
        self,
        batch: Prompts | Rows,
        row: int,
        sender: Programs,
        receiver: Programs,
        places: Sequence[int],
    ) -> Sent:
        """Sends pages of a row."""
        batch.carry, sent = sender.compiled(
            pages.send, batch.carry, np.int32(row), pages.padded(places),
            n_pages=batch.length // self._page,
        )()  # fmt: skip
        return receiver.received(sent)

    def warm_sending(self, newcomers: Prompts) -> Sent:
        """Compiles what sends rows of prompts like these, and returns what it would send."""
        return self._sent(newcomers, 0, self.programs, self._decoder, ())

    def warm_taking(self, rows: Rows, sent: Sent) -> None:
        """Compiles what takes rows over into a batch like this one, and what sends replies back."""
        self._decoder.compiled(pages.receive, rows.carry, sent, np.int32(0), pages.padded(()))
        if self.prefixes:
            self.prefixes.warm_receive(self._sent(rows, 0, self._decoder, self.programs, ()))


def _check(decoder: Programs, prompting: Programs, page: int) -> None:
    own, other = decoder.model, prompting.model
    if (own.config, own.policy) != (other.config, other.policy):
        raise ValueError(
            "the model that runs prompts has another config or precision than the one that "
            "decodes; load both from one checkpoint in one dtype"
        )
    both = [jax.tree.leaves(each)[0].sharding.device_set for each in (own, other)]
    if shared := sorted(device.id for device in both[0] & both[1]):
        raise ValueError(
            f"the devices {shared} would run prompts and decode too; give prompts devices of their "
            "own, or no mesh of their own"
        )
    if jax.process_count() > 1:
        raise ValueError(
            f"prompts on devices of their own need a single process, and there are "
            f"{jax.process_count()}; give prompts no mesh of their own"
        )
    for each in (decoder, prompting):
        pages.check(own.config, page, parts("length", each.mesh) if each.mesh else 1)
