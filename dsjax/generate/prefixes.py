"""Known beginnings of prompts: cache entries that are kept in pages and found by their tokens.

A page holds the entries of PAGE tokens that begin at a multiple of PAGE. Its entries depend on all
tokens before it, so pages form a tree: the parent of a page holds the tokens before its own, and a
prompt's known prefix is a path from the root. Children are looked up by their tokens, which are
hashed and then compared, so a collision of hashes cannot find another text's page.

When the pages are used up, the least recently used one goes. Use of a page counts as use of those
before it, so it is never one that another page continues. Nothing here depends on clocks: processes
that serve the same requests keep the same pages.

With page files (dsjax/generate/page_files.py) each page is also written to disk, and what a prompt
finds there comes back into memory before its row is filled.

With drafts the last tokens of a known prefix are run again. An entry of the MTP modules depends on
the next tokens too, and these may lie beyond the prefix, where texts differ.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dsjax.generate import pages
from dsjax.generate.decoding import Carry
from dsjax.generate.page_files import Fetched, PageFiles
from dsjax.generate.pages import AT_A_TIME, Sent
from dsjax.generate.programs import Programs
from dsjax.generate.prompts import MIN_CHUNK
from dsjax.model.cache import Cache
from dsjax.parallel.sharding import parts

PAGE = 64  # tokens, unless the engine's chunks are shorter


class Page:
    """A page of the tree.

    Attributes:
      key: whose text it is, and its tokens.
      parent: the page before it; None at the beginning of a text.
      number: its place in the pool.
    """

    def __init__(self, key: tuple[str, tuple[int, ...]], parent: Page | None, number: int) -> None:
        self.key, self.parent, self.number = key, parent, number
        self.children: dict[tuple[str, tuple[int, ...]], Page] = {}


class Tree:
    """Which pages hold which texts.

    Attributes:
      n_pages: how many there are at most.
      page: tokens of a page.
    """

    def __init__(self, n_pages: int, page: int) -> None:
        self.n_pages, self.page = n_pages, page
        self._first: dict[tuple[str, tuple[int, ...]], Page] = {}
        self._by_use: OrderedDict[int, Page] = OrderedDict()  # the least recently used one first

    def __len__(self) -> int:
        return len(self._by_use)

    def find(self, tokens: Sequence[int], owner: str = "") -> list[int]:
        """Returns the numbers of the pages that hold a text's longest known prefix."""
        path = self._path(tokens, owner)
        self._use(path)
        return [page.number for page in path]

    def add(self, tokens: Sequence[int], owner: str = "") -> dict[int, int]:
        """Makes room for the whole pages of a text that are not known, as many as there are.

        Returns:
          for each new page its place in the text, counted in pages, and its number, in order. What
          it holds must be written at once.
        """
        path = self._path(tokens, owner)
        self._use(path)  # what is looked at last is not what makes room
        new: dict[int, int] = {}
        for place in range(len(path), len(tokens) // self.page):
            number = self._free(path)
            if number is None:
                break
            key = self._key(tokens, place, owner)
            page = Page(key, path[-1] if path else None, number)
            self._siblings(page)[key] = page
            self._by_use[number] = page
            path.append(page)
            new[place] = number
        self._use(path)
        return new

    def clear(self) -> None:
        """Forgets everything."""
        self._first.clear()
        self._by_use.clear()

    def _path(self, tokens: Sequence[int], owner: str) -> list[Page]:
        path: list[Page] = []
        children = self._first
        for place in range(len(tokens) // self.page):
            page = children.get(self._key(tokens, place, owner))
            if page is None:
                break
            path.append(page)
            children = page.children
        return path

    def _key(self, tokens: Sequence[int], place: int, owner: str) -> tuple[str, tuple[int, ...]]:
        return owner, tuple(tokens[place * self.page : (place + 1) * self.page])

    def _use(self, path: Sequence[Page]) -> None:
        for page in reversed(path):
            self._by_use.move_to_end(page.number)

    def _free(self, path: Sequence[Page]) -> int | None:
        """Returns the number of a page that may be written; None if the path takes all of them."""
        if len(self._by_use) < self.n_pages:
            return len(self._by_use)
        number, page = next(iter(self._by_use.items()))
        if page in path:
            return None
        del self._by_use[number], self._siblings(page)[page.key]
        return number

    def _siblings(self, page: Page) -> dict[tuple[str, tuple[int, ...]], Page]:
        return page.parent.children if page.parent else self._first


class Prefixes:
    """The known prefixes of an engine, with their entries on its devices."""

    def __init__(
        self,
        programs: Programs,
        *,
        n_tokens: int,
        page: int,
        n_drafts: int,
        smallest: int = MIN_CHUNK,
        files: PageFiles | None = None,
    ) -> None:
        """
        Args:
          n_tokens: how many tokens are kept at most.
          page: tokens of a page, a power of two.
          smallest: tokens of the smallest chunk of a prompt, which divides a page.
          files: where pages are kept besides, if anywhere.

        Raises:
          ValueError: there is no room for a page, or see `pages.check`.
        """
        if n_tokens < (least := page * programs.batch_parts):
            raise ValueError(
                f"prefix_tokens={n_tokens} must be at least {least}, a page of {page} "
                "tokens for each part of a batch; 0 keeps none"
            )
        n_pages = n_tokens // page
        n_pages -= n_pages % programs.batch_parts  # each part of the devices holds as many
        self._programs, self._n_drafts, self._smallest = programs, n_drafts, smallest
        self._tree = Tree(n_pages, page)
        self._pool = self._empty_pool()
        self._files = files
        # A page's tokens lie in the order of the cache's parts (`dsjax.parallel.split_cache`).
        self._n_parts = parts("length", programs.mesh) if programs.mesh else 1
        # Of a page outside the pool, per entry: shape [L, P, U, .] and type.
        stacked = jax.eval_shape(Cache.stacked, self._pool)
        self._forms = [((x.shape[0], *x.shape[2:]), x.dtype) for x in jax.tree.leaves(stacked)]
        self._structure = jax.tree.structure(stacked)

    def fetch(self, prompt: Sequence[int], owner: str) -> Fetched | None:
        """Begins to read what of a prompt the disk has and memory has not; None: nothing."""
        if self._files is None:
            return None
        names = self._names(prompt[:-1], owner)
        first = len(self._tree.find(prompt[:-1], owner))
        self._files.known(names[:first])
        count = min(self._files.known(names[first:]), self._tree.n_pages - first)
        if count <= 0:
            return None
        return Fetched(first, self._files.read(names[first : first + count]))

    def fill(
        self,
        carry: Carry,
        row: int,
        prompt: Sequence[int],
        owner: str,
        fetched: Fetched | None = None,
    ) -> tuple[Carry, int]:
        """Copies the longest known prefix of a prompt into a row.

        Args:
          fetched: what `fetch` has returned, read by now.

        Returns:
          the carry, and from which token on the prompt must run, a multiple of the smallest chunk;
          at least its last token must.
        """
        if fetched:
            self._restore(prompt, owner, fetched)
        numbers = self._tree.find(prompt[:-1], owner)
        carry = self._copy(pages.fill, carry, self._pool, row, dict(enumerate(numbers)))
        again = self._n_drafts + 1 if self._n_drafts else 0
        again += -again % self._smallest
        return carry, max(len(numbers) * self._tree.page - again, 0)

    def save(self, carry: Carry, row: int, tokens: Sequence[int], owner: str) -> None:
        """Keeps the whole pages of a text that has run in a row."""
        new = self._tree.add(tokens, owner)
        self._pool = self._copy(pages.save, self._pool, carry, row, new)
        if self._files is not None:
            self._write(self._files, tokens, owner)

    def receive(
        self, send: Callable[[Sequence[int]], Sent], tokens: Sequence[int], owner: str
    ) -> None:
        """Keeps the whole pages of a text that has run on other devices.

        Args:
          send: given places in the text, counted in pages, returns these pages on the devices here.
        """
        every = list(self._tree.add(tokens, owner).items())
        for first in range(0, len(every), AT_A_TIME):
            places, numbers = zip(*every[first : first + AT_A_TIME], strict=True)
            self._pool = self._stored(send(places), numbers)()
        if self._files is not None:
            self._write(self._files, tokens, owner)

    def _stored(self, sent: Sent, numbers: Sequence[int]) -> Any:
        return self._programs.compiled(pages.store, self._pool, sent, pages.padded(numbers))

    def _names(self, tokens: Sequence[int], owner: str) -> list[str]:
        assert self._files is not None
        form = f"{self._forms} {self._n_parts}\n{owner}"
        return self._files.names(tokens, form, self._tree.page)

    def _write(self, files: PageFiles, tokens: Sequence[int], owner: str) -> None:
        """Writes what memory holds of a text and the disk does not."""
        numbers = self._tree.find(tokens, owner)
        names = self._names(tokens, owner)[: len(numbers)]
        missing = files.missing(names)
        for first in range(0, len(missing), AT_A_TIME):
            part = missing[first : first + AT_A_TIME]
            self._pool, taken = self._taken([numbers[place] for place in part])()
            written = [names[place] for place in part]
            files.write(written, functools.partial(_as_bytes, taken, len(part)))

    def _taken(self, numbers: Sequence[int]) -> Any:
        numbers_X = np.zeros(AT_A_TIME, np.int32)
        numbers_X[: len(numbers)] = numbers
        return self._programs.compiled(pages.take, self._pool, numbers_X)

    def _restore(self, prompt: Sequence[int], owner: str, fetched: Fetched) -> None:
        """Puts pages from disk into memory, unless what comes before them has left it meanwhile."""
        found = fetched.pages.result()
        end = (fetched.first + len(found)) * self._tree.page
        if len(self._tree.find(prompt[:-1], owner)) < fetched.first:
            return
        every = list(self._tree.add(prompt[:end], owner).items())
        for first in range(0, len(every), AT_A_TIME):
            part = every[first : first + AT_A_TIME]
            data = [found[place - fetched.first] for place, _ in part]
            self._pool = self._restored(data, [number for _, number in part])()

    def _restored(self, data: Sequence[bytes], numbers: Sequence[int]) -> Any:
        new = [
            np.zeros((layers, AT_A_TIME, *form), dtype) for (layers, *form), dtype in self._forms
        ]
        for place, page in enumerate(data):
            start = 0
            for array, (form, dtype) in zip(new, self._forms, strict=True):
                part = np.frombuffer(page, dtype, array[:, place].size, start)
                array[:, place] = part.reshape(form)
                start += part.nbytes
        tree = jax.tree.unflatten(self._structure, new)
        return self._programs.compiled(pages.put, self._pool, tree, pages.padded(numbers))

    @property
    def on_disk(self) -> bool:
        """Tells whether pages are kept in files too."""
        return self._files is not None

    def warm_files(self) -> None:
        """Compiles the programs that copy pages to and from files."""
        self._taken([])
        self._restored([], [])

    def warm_receive(self, sent: Sent) -> None:
        """Compiles the program that keeps pages from other devices."""
        self._stored(sent, [])

    def warm_fill(self, carry: Carry) -> None:
        """Compiles the program that copies pages into a carry of this size."""
        nowhere_2X = np.zeros((2, AT_A_TIME), np.int32)
        self._programs.compiled(pages.fill, carry, self._pool, np.int32(0), *nowhere_2X)

    def warm_save(self, carry: Carry) -> None:
        """Compiles the program that copies parts of a carry of this size into pages."""
        nowhere_2X = np.zeros((2, AT_A_TIME), np.int32)
        self._programs.compiled(pages.save, self._pool, carry, np.int32(0), *nowhere_2X)

    def _empty_pool(self) -> Any:
        return self._programs.compiled(
            pages.empty_pool,
            n_pages=self._tree.n_pages,
            page=self._tree.page,
            n_drafts=self._n_drafts,
        )()

    def forget(self) -> None:
        """Forgets what memory holds, as after a failure that has left anything there."""
        self._tree.clear()
        self._pool = None  # gone before there is another
        self._pool = self._empty_pool()

    def clear(self) -> None:
        """Forgets everything, as for new weights; the files are those of the old ones."""
        self._tree.clear()
        self._files = None

    def _copy(self, function: Any, into: Any, source: Any, row: int, which: dict[int, int]) -> Any:
        """Copies pages, given by places in the row and numbers in the pool."""
        every = list(which.items())
        for first in range(0, len(every), AT_A_TIME):
            part = every[first : first + AT_A_TIME]
            both = (pages.padded(some) for some in zip(*part, strict=True))
            into = self._programs.compiled(function, into, source, np.int32(row), *both)()
        return into


def _as_bytes(taken: Cache, count: int) -> list[bytes]:
    """Returns the bytes of the first pages of a copy, each page's entries one after another."""
    entries = jax.tree.leaves(jax.device_get(taken))
    return [b"".join(entry[:, place].tobytes() for entry in entries) for place in range(count)]
