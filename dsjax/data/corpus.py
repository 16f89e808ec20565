"""Documents split into train and held-out, tokenized once, and mapped from a cache afterwards.

A cache entry is a folder named by a fingerprint of everything that determines its content: files
(by content if small, else by size and time), split, tokenizer and format. It is written under
another name and renamed when complete, so an interrupted preparation leaves no entry. Of several
processes that share a cache, one prepares while the others wait. On a file system without locks all
of them prepare, and one entry stays.

  <cache_dir>/<fingerprint>/
    meta.json                  sizes, element type, fingerprints, names of the held-out documents
    tokenizer(_config).json    only if the tokenizer was trained here
    {train,heldout}.tokens     uint16, or uint32 for a large vocabulary; no begin or end tokens
    {train,heldout}.offsets    int64 [documents + 1]
    {train,heldout}.bytes      int64 [documents], UTF-8 bytes of each document's text
    heldout.text               the held-out documents, UTF-8, concatenated
    rejected.jsonl             what could not be read and was left out, if that is allowed

`dsjax.data.splitting` decides the side of each document; neither side is ever empty. The files are
read once for their sizes, once to train a tokenizer, and once to tokenize.
"""

from __future__ import annotations

import array
import collections
import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsjax.data import documents, splitting
from dsjax.data.documents import Document, Source
from dsjax.files import cache_folder, publish
from dsjax.text import tokenizer
from dsjax.text.tokenizer import Tokenizer

_FORMAT = 2
HASH_CONTENT_BELOW = 64 << 20  # bytes of all files together, read at every start
TOKENIZER_BYTES = 256 << 20  # more text hardly changes a vocabulary
BATCH_BYTES = 4 << 20
BATCH_DOCUMENTS = 2048
_STALE_SECONDS = 24 * 3600
_LOSSLESS_BYTES = 1 << 20  # of text that a tokenizer must give back
REJECTED = "rejected.jsonl"

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class TokenizedDocuments:
    """Documents as concatenated token ids, usually mapped from the cache."""

    tokens: np.ndarray  # uint16 or uint32 [n]
    offsets: np.ndarray  # int64 [documents + 1]
    byte_counts: np.ndarray  # int64 [documents], of the UTF-8 text
    fingerprint: str  # of the tokens and the tokenizer

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each document, int64."""
        return np.diff(self.offsets)

    @property
    def total_tokens(self) -> int:
        return int(self.offsets[-1] - self.offsets[0])

    @property
    def total_bytes(self) -> int:
        return int(self.byte_counts.sum())

    def part(self, first: int, end: int) -> TokenizedDocuments:
        """Returns the documents `first` to `end` - 1, of the same arrays."""
        fingerprint = f"{self.fingerprint}[{first}:{end}]"
        offsets, sizes = self.offsets[first : end + 1], self.byte_counts[first:end]
        return TokenizedDocuments(self.tokens, offsets, sizes, fingerprint)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The result of `prepare_corpus`."""

    tokenizer: Tokenizer
    train: TokenizedDocuments
    heldout: TokenizedDocuments
    heldout_names: tuple[str, ...]
    parts: tuple[int, ...]  # train documents of each glob, one after the other; else of all
    copies: int  # documents whose text another one has too, beside the first
    left_out: int  # train documents that are copies of held-out ones
    rejected: int  # records that could not be read
    folder: str  # the cache entry

    def train_parts(self) -> list[TokenizedDocuments]:
        """Returns the train documents of each glob."""
        ends = np.cumsum(self.parts).tolist()
        return [
            self.train.part(end - count, end) for count, end in zip(self.parts, ends, strict=True)
        ]

    def heldout_texts(self) -> Iterator[tuple[str, str]]:
        """Yields name and text of each held-out document, in order."""
        with open(os.path.join(self.folder, "heldout.text"), "rb") as stream:
            sizes = self.heldout.byte_counts.tolist()
            for name, size in zip(self.heldout_names, sizes, strict=True):
                yield name, stream.read(size).decode("utf-8")


def prepare_corpus(
    *,
    files: str = "",
    heldout_files: str = "",
    heldout_fraction: float = 0.05,
    text_field: str = "text",
    apart: bool = False,
    skip: bool = False,
    tokenizer_path: str = "",
    vocab_size: int,
    cache_dir: str = "",
    progress: Progress | None = None,
) -> Corpus:
    """Tokenizes the corpus, or maps it from the cache of an earlier call.

    Args:
      files, heldout_files: globs (see documents.py). Empty `files` means the embedded default;
        empty `heldout_files` holds out `heldout_fraction` of the documents. A file that matches
        both is held out.
      apart: keeps the documents of each glob of `files` together, for a mixture.
      skip: leaves out records and files that cannot be read, and notes them.
      tokenizer_path: a tokenizer.json; empty trains one of `vocab_size` on the train documents.
      vocab_size: number of ids that the model can embed.
      cache_dir: empty means $XDG_CACHE_HOME/dsjax, else ~/.cache/dsjax.
      progress: called with bytes done and bytes in all; never if the corpus is cached.

    Raises:
      ValueError: files, split or tokenizer cannot be used; says which and what to do.
      OSError: the cache cannot be written.
    """
    parts, heldout_sources = _find(files, heldout_files, apart)
    loaded = tokenizer.load_tokenizer(tokenizer_path) if tokenizer_path else None
    if loaded is not None:
        tokenizer.check_vocab(loaded, vocab_size)
    training = [vocab_size, *tokenizer.PATTERNS, *tokenizer.SPECIAL_TOKENS]
    recipe = {
        "format": _FORMAT,
        "files": [_identity(sources) for sources in parts],
        "split": _identity(heldout_sources) or heldout_fraction,
        "text_field": text_field,
        "skip": skip,
        "tokenizer": loaded.fingerprint if loaded else training,
    }
    key = hashlib.blake2b(json.dumps(recipe).encode(), digest_size=16).hexdigest()
    root = str(cache_folder(cache_dir) / "corpus")
    folder = os.path.join(root, key)
    corpus = _open(folder, loaded)
    if corpus is None:
        job = _Preparation(parts, heldout_sources, heldout_fraction, text_field, skip, progress)
        with _write_failures(root), _turn(root, key):
            if _open(folder, loaded) is None:  # no other process was faster
                with _temporary_folder(root) as temporary:
                    job.write(temporary, loaded, vocab_size)
                    _publish(temporary, folder, loaded)
        corpus = _open(folder, loaded)
        if corpus is None:
            message = "the token cache lost what was just written; run again"
            raise OSError(errno.ENOENT, message, folder)
    return corpus


def _find(files: str, heldout_files: str, apart: bool) -> tuple[list[list[Source]], list[Source]]:
    """Finds the files to train on, of each glob or together, and the held-out ones."""
    if not files:
        parts = [documents.embedded_sources()]
    elif apart:
        parts = [sources for _, sources in documents.find_parts(files)]
        counts = collections.Counter(source.path for sources in parts for source in sources)
        twice = next((path for path, count in counts.items() if count > 1), None)
        if twice is not None:
            raise ValueError(
                f"{twice} is in two parts of the mixture data.files={files!r}; leave it out of one"
            )
    else:
        parts = [documents.find_sources(files)]
    if not heldout_files:
        return parts, []
    heldout = documents.find_sources(heldout_files, key="data.heldout_files")
    taken = {source.path for source in heldout}
    parts = [[source for source in sources if source.path not in taken] for sources in parts]
    if not all(parts):
        raise ValueError(
            f"data.heldout_files={heldout_files!r} takes every file of data.files={files!r}"
            f"{', or of a part of it' if apart else ''}; name other files"
        )
    return parts, heldout


def _identity(sources: Sequence[Source]) -> list[list[object]]:
    """Identifies the state of the files, wherever their folder is."""
    by_content = sum(source.size for source in sources) <= HASH_CONTENT_BELOW
    identity: list[list[object]] = []
    for source in sources:
        state: object = source.mtime_ns
        if by_content:
            state = hashlib.blake2b(documents.read_bytes(source), digest_size=16).hexdigest()
        identity.append([source.name, source.kind, source.size, state])
    return identity


class _Preparation:
    """One tokenization, from files to a folder."""

    def __init__(
        self,
        parts: Sequence[Sequence[Source]],
        heldout_sources: Sequence[Source],
        heldout_fraction: float,
        text_field: str,
        skip: bool,
        progress: Progress | None,
    ) -> None:
        self._parts = parts
        self._sources = [*itertools.chain.from_iterable(parts), *heldout_sources]
        self._heldout_paths = {source.path for source in heldout_sources}
        self._fraction = heldout_fraction
        self._text_field, self._skip = text_field, skip
        self._progress = progress or (lambda done, total: None)
        self._done = 0
        self._copies = self._n_rejected = self._train_bytes = self._total_bytes = 0
        self._sides = np.zeros(0, np.uint8)  # of the documents, as they are read

    def write(self, folder: str, loaded: Tokenizer | None, vocab_size: int) -> None:
        self._scan(folder)
        self._work = self._total_bytes if loaded else self._total_bytes + self._train_bytes
        if loaded is None:
            used = tokenizer.train_tokenizer(self._training_texts(), vocab_size=vocab_size)
            used.save(folder)
        else:
            used = loaded
        self._tokenize(folder, used)
        documents.check_unchanged(self._sources)

    def _read(self, rejected: documents.Rejected | None) -> Iterator[tuple[Document, int]]:
        found = documents.read_documents(
            self._sources, text_field=self._text_field, rejected=rejected
        )
        for document in found:
            yield document, len(document.text.encode("utf-8"))

    def _divided(self) -> Iterator[tuple[Document, int, int]]:
        """Yields each document with its bytes and its side, once the sides are known."""
        found = self._read(lambda source, problem: None)  # the scan has noted them
        # Where the numbers differ, a file has changed, which `write` finds in the end.
        for (document, size), side in zip(found, self._sides.tolist(), strict=False):
            yield document, size, side

    def _scan(self, folder: str) -> None:
        """Reads everything once: finds broken files before hours of work, settles the split."""
        positions, digests, sizes = array.array("Q"), array.array("Q"), array.array("Q")
        held = bytearray()
        with open(os.path.join(folder, REJECTED), "w", encoding="utf-8") as stream:

            def reject(source: Source, problem: str) -> None:
                self._n_rejected += 1
                stream.write(json.dumps({"file": source.path, "problem": problem}) + "\n")

            try:
                for document, size in self._read(reject if self._skip else None):
                    positions.append(document.position)
                    digests.append(splitting.digest(document.text))
                    sizes.append(size)
                    held.append(document.source.path in self._heldout_paths)
            except ValueError as error:
                raise ValueError(f"{error}; or go on without: data.on_bad_record=skip") from error
        self._split(np.array(positions, np.uint64), np.array(digests, np.uint64), held)
        counted = np.array(sizes, np.int64)
        self._total_bytes = int(counted.sum())
        self._train_bytes = int(counted[self._sides == splitting.TRAIN].sum())

    def _split(self, positions: np.ndarray, digests: np.ndarray, held: bytearray) -> None:
        distinct = len(np.unique(digests))
        self._copies = len(digests) - distinct
        if self._heldout_paths:
            self._sides = splitting.by_file(np.frombuffer(held, np.uint8) > 0, digests)
            for key, side in (
                ("data.heldout_files", splitting.HELDOUT), ("data.files", splitting.TRAIN)
            ):  # fmt: skip
                if not (self._sides == side).any():
                    copies = (self._sides == splitting.LEFT_OUT).any()
                    what = "no text that is not held out" if copies else "no text"
                    raise ValueError(f"the files of {key} hold {what}; check what they match")
        elif distinct < 2:
            alike = ", all of one text," if self._copies else ""
            raise ValueError(
                f"the corpus has {len(digests)} document(s){alike} in {len(self._sources)} "
                "file(s), and needs 2 to hold one out; add files, cut the text into several, or "
                "set data.heldout_files"
            )
        else:
            self._sides = splitting.by_fraction(positions, digests, self._fraction)

    def _training_texts(self) -> Iterator[str]:
        """Yields the train documents or, if they are many, an even sample of them."""
        share = min(1.0, TOKENIZER_BYTES / self._train_bytes)
        seen = taken = 0
        for document, size, side in self._divided():
            if side != splitting.TRAIN:
                continue
            if taken <= share * seen:
                taken += size
                yield document.text
            seen += size
            self._advance(size)

    def _tokenize(self, folder: str, used: Tokenizer) -> None:
        dtype = np.dtype(np.uint16 if used.vocab_size <= 65536 else np.uint32)
        names: list[str] = []
        counts = dict.fromkeys((source.path for source in self._sources), 0)
        checked = 0
        with contextlib.ExitStack() as stack:
            writers = [_Writer(folder, name, dtype, used, stack) for name in ("train", "heldout")]
            heldout_text = stack.enter_context(open(os.path.join(folder, "heldout.text"), "wb"))
            for batch in self._batches():
                encoded = used.encode_batch([document.text for document, _, _ in batch])
                for (document, size, side), ids in zip(batch, encoded, strict=True):
                    if checked < _LOSSLESS_BYTES:
                        _check_lossless(used, ids, document)
                        checked += size
                    writers[side].add(ids, size)
                    if side == splitting.HELDOUT:
                        names.append(document.name)
                        heldout_text.write(document.text.encode("utf-8"))
                    else:
                        counts[document.source.path] += 1
                self._advance(sum(size for _, size, _ in batch))
        self._write_meta(folder, dtype, names, counts, writers)

    def _write_meta(
        self,
        folder: str,
        dtype: np.dtype,
        heldout_names: list[str],
        counts: dict[str, int],
        writers: Sequence[_Writer],
    ) -> None:
        """Writes meta.json; `counts` are the train documents of each file."""
        meta = {
            "dtype": dtype.name,
            "heldout_names": heldout_names,
            "heldout_text": os.path.getsize(os.path.join(folder, "heldout.text")),
            "parts": [sum(counts[source.path] for source in part) for part in self._parts],
            "copies": self._copies,
            "left_out": int((self._sides == splitting.LEFT_OUT).sum()),
            "rejected": self._n_rejected,
            **{writer.name: writer.summary() for writer in writers},
        }
        for writer in writers:
            if not writer.tokens:
                raise ValueError(
                    f"the tokenizer makes no token of the {writer.name} text; choose another "
                    "data.tokenizer"
                )
        with open(os.path.join(folder, "meta.json"), "w", encoding="utf-8") as stream:
            json.dump(meta, stream)

    def _batches(self) -> Iterator[list[tuple[Document, int, int]]]:
        batch: list[tuple[Document, int, int]] = []
        size_of_batch = 0
        for document, size, side in self._divided():
            if side == splitting.LEFT_OUT:
                self._advance(size)
                continue
            batch.append((document, size, side))
            size_of_batch += size
            if size_of_batch >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
                yield batch
                batch, size_of_batch = [], 0
        if batch:
            yield batch

    def _advance(self, size: int) -> None:
        self._done += size
        self._progress(self._done, self._work)


def _check_lossless(used: Tokenizer, ids: np.ndarray, document: Document) -> None:
    lost = tokenizer.what_is_lost(used, ids, document.text)
    if lost is not None:
        raise ValueError(
            f"the tokenizer does not give the text of {document.name} back: {lost}, so bits per "
            "byte would mean nothing; choose another data.tokenizer"
        )


class _Writer:
    """Writes the three files of one side of the split."""

    def __init__(
        self,
        folder: str,
        name: str,
        dtype: np.dtype,
        used: Tokenizer,
        stack: contextlib.ExitStack,
    ) -> None:
        """`stack` closes the files."""
        self.name = name
        self._dtype = dtype
        paths = [os.path.join(folder, f"{name}.{part}") for part in ("tokens", "offsets", "bytes")]
        self._files = [stack.enter_context(open(path, "wb")) for path in paths]
        self._files[1].write(np.int64(0).tobytes())
        self._digest = hashlib.blake2b(used.fingerprint.encode(), digest_size=16)
        self.tokens = 0
        self._documents = 0

    def add(self, ids: np.ndarray, size: int) -> None:
        self.tokens += len(ids)
        self._documents += 1
        tokens, end = ids.astype(self._dtype).tobytes(), np.int64(self.tokens).tobytes()
        for stream, data in zip(self._files, (tokens, end, np.int64(size).tobytes()), strict=True):
            stream.write(data)
        self._digest.update(tokens)
        self._digest.update(end)

    def summary(self) -> dict[str, object]:
        return {
            "tokens": self.tokens,
            "documents": self._documents,
            "fingerprint": self._digest.hexdigest(),
        }


def _open(folder: str, loaded: Tokenizer | None) -> Corpus | None:
    """Opens the entry in `folder`; None if there is none or it is incomplete."""
    try:
        with open(os.path.join(folder, "meta.json"), encoding="utf-8") as stream:
            meta: dict[str, Any] = json.load(stream)
        if os.path.getsize(os.path.join(folder, "heldout.text")) != meta["heldout_text"]:
            return None
        sides = [_map(folder, name, meta) for name in ("train", "heldout")]
        used = loaded or tokenizer.load_tokenizer(folder)
    except (OSError, ValueError, KeyError):
        return None
    return Corpus(
        used,
        *sides,
        heldout_names=tuple(meta["heldout_names"]),
        parts=tuple(meta["parts"]),
        copies=meta["copies"],
        left_out=meta["left_out"],
        rejected=meta["rejected"],
        folder=folder,
    )


def _map(folder: str, name: str, meta: dict[str, Any]) -> TokenizedDocuments:
    side = meta[name]
    parts = {
        "tokens": (meta["dtype"], side["tokens"]),
        "offsets": ("int64", side["documents"] + 1),
        "bytes": ("int64", side["documents"]),
    }
    arrays = []
    for part, (dtype, length) in parts.items():
        # Raises ValueError if the file is too short. The view is a plain array, since slicing
        # NumPy's memmap class costs several times as much.
        mapped = np.memmap(os.path.join(folder, f"{name}.{part}"), dtype, "r", shape=(length,))
        arrays.append(mapped.view(np.ndarray))
    return TokenizedDocuments(*arrays, fingerprint=side["fingerprint"])


@contextlib.contextmanager
def _turn(root: str, key: str) -> Iterator[None]:
    """Waits while another process prepares the same entry; a process that dies loses its lock."""
    os.makedirs(root, exist_ok=True)
    with open(os.path.join(root, f".lock-{key}"), "w") as stream:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _temporary_folder(root: str) -> Iterator[str]:
    os.makedirs(root, exist_ok=True)
    _sweep(root)
    folder = os.path.join(root, f".writing-{uuid.uuid4().hex}")
    os.mkdir(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(root: str) -> None:
    """Removes what killed preparations left, if nothing was written there for a day."""
    for name in os.listdir(root):
        folder = os.path.join(root, name)
        if not name.startswith(".writing-"):
            continue
        with contextlib.suppress(OSError):
            times = [entry.stat().st_mtime for entry in os.scandir(folder)]
            newest = max(times, default=os.stat(folder).st_mtime)
            if time.time() - newest > _STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _publish(temporary: str, folder: str, loaded: Tokenizer | None) -> None:
    """Renames `temporary` to `folder`; if another process was faster, its entry stays."""
    for entry in os.scandir(temporary):
        # Otherwise the rename may reach the disk before the content.
        with open(entry.path, "rb") as stream:
            os.fsync(stream.fileno())
    if os.path.isdir(folder) and _open(folder, loaded) is None:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        publish(Path(temporary), Path(folder))
    except OSError:
        if not os.path.isdir(folder):
            raise


@contextlib.contextmanager
def _write_failures(root: str) -> Iterator[None]:
    """Adds a remedy to failures to write the cache (disk full, no permission)."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        message = f"cannot write the token cache ({reason}); make room there or set data.cache_dir"
        raise OSError(error.errno, message, root) from error
