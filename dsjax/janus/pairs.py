"""Pairs of a picture and a text, from the forms in which they are published.

  folders       each picture beside a text of the same name: cat.png and cat.txt
  records       JSON lines, CSV, parquet or Arrow: `image` is a path from the file's folder, or, in
                a table, bytes or the library datasets' {"bytes", "path"}
  webdataset    .tar, not compressed: members of one name and several endings are one pair, such as
                a/7.jpg with a/7.txt, a/7.caption, or a/7.json, an object as in records

The text of a record is in `question` and `answer`, or in `caption`, `text` or `answer` alone.

A picture is where it lies: a file and a span of its bytes, so that any one can be read alone, in
any order. Bytes inside a table have no such place; they are copied into one file of the cache.
Pictures are not decoded here.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dsjax import files
from dsjax.data.documents import Source, files_of, find_sources, patterns, read_records
from dsjax.vision.pictures import MAX_BYTES

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
RECORDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
_PACKED = (".gz", ".bz2", ".xz", ".zst")
_IMAGE = ("image", "picture", "image_path", "file_name")
_TEXT = ("caption", "text", "answer")
_MAX_TEXT = 1 << 20  # bytes of a text beside a picture


class Picture(NamedTuple):
    """Bytes of an encoded picture: a span of a file; a size of -1 is the whole file."""

    path: str
    offset: int = 0
    size: int = -1
    place: str = ""  # for messages, if it is not the path

    def read(self) -> bytes:
        """Reads the bytes.

        Raises:
          ValueError: the file is not there any more, not a regular one, or too large.
        """
        if self.size < 0:
            return files.read_regular(Path(self.path), MAX_BYTES)
        if self.size > MAX_BYTES:
            raise ValueError(f"{self} has {self.size:,} bytes, more than {MAX_BYTES:,}")
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise ValueError(f"cannot read {self}: {error.strerror or error}") from error
        if len(data) < self.size:
            raise ValueError(f"{self} is cut short; copy {self.path} again")
        return data

    def __str__(self) -> str:
        return self.place or self.path


class Pair(NamedTuple):
    """A picture, and what is said about it."""

    place: str
    picture: Picture
    text: str  # the answer, or the caption
    question: str | None


def read_pairs(globs: str, cache: Path, *, key: str) -> Iterator[Pair]:
    """Yields the pairs of all files that globs and folders match, in the order of their paths.

    Args:
      globs: separated by commas.
      cache: folder for the pictures of tables.
      key: the setting that messages name.

    Raises:
      ValueError: nothing matches, a picture has no text or a text no picture, or a file cannot be
        read; names it.
    """
    found = sorted({path for pattern in patterns(globs) if pattern for path in files_of(pattern)})
    if not found:
        raise ValueError(f"{key}={globs!r} matches no file; name a folder or a glob of pairs")
    has_records = any(_ending(path) in (*RECORDS, ".tar") for path in found)
    shown = {os.path.splitext(path)[0] for path in found if _ending(path) in PICTURES}
    for path in found:
        ending = _ending(path)
        if ending == ".tar":
            yield from _members(path)
        elif ending in RECORDS:
            yield from _of_records(path, cache, key)
        elif ending in PICTURES:
            beside = Path(path).with_suffix(".txt")
            if beside.is_file():
                text = _decoded(files.read_regular(beside, _MAX_TEXT), str(beside))
                yield Pair(path, Picture(path), text, None)
            elif not has_records:  # else it is most likely a picture that a record names
                raise ValueError(f"{path} has no text beside it; write {beside}, or remove it")
        elif path.endswith(".txt"):
            if os.path.splitext(path)[0] not in shown and not has_records:
                raise ValueError(
                    f"{path} has no picture of its name among the files of {key}; name their "
                    "folder, and add the picture, or remove the text"
                )
        else:
            raise ValueError(
                f"{path} is no picture, text, {', '.join(RECORDS)} or .tar; name the other files "
                f"with a glob in {key}"
            )


def _ending(path: str) -> str:
    stem, suffix = os.path.splitext(path.lower())
    return os.path.splitext(stem)[1] if suffix in _PACKED else suffix


def _decoded(data: bytes, place: str) -> str:
    try:
        text = data.decode().strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not UTF-8 ({error}); save it again") from error
    if not text:
        raise ValueError(f"{place} is empty; write what the picture shows, or remove the pair")
    return text


def _of_records(path: str, cache: Path, key: str) -> Iterator[Pair]:
    (source,) = find_sources([path], key=key)
    with _Embedded(source, cache) as store:
        for place, record in read_records([source]):
            image = _first(record, _IMAGE)
            if isinstance(image, Mapping):  # as the library datasets writes pictures
                image = image.get("bytes") or image.get("path")
            if isinstance(image, bytes):
                picture = store.keep(image, place)
            elif isinstance(image, str) and image:
                named = Path(path).parent / image
                if not named.is_file():
                    raise ValueError(f"{place}: there is no picture {named}; correct the path")
                picture = Picture(str(named))
            else:
                raise ValueError(
                    f"{place} has no picture: {', '.join(_IMAGE)} is a path, or in a table bytes; "
                    f"its fields are {', '.join(record)}"
                )
            question, text = _said(record, place)
            yield Pair(place, picture, text, question)


def _said(record: Mapping[str, Any], place: str) -> tuple[str | None, str]:
    """Returns the question, if there is one, and the text of a record."""
    question = record.get("question")
    text = record.get("answer") if question is not None else _first(record, _TEXT)
    for value in (text, *([] if question is None else [question])):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(
                f"{place} has no text: give question and answer, or one of {', '.join(_TEXT)}; "
                f"its fields are {', '.join(record)}"
            )
    assert isinstance(text, str)
    return question, text.strip()


def _first(record: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


class _Embedded:
    """The pictures inside a table, one after the other in a file of the cache.

    The file is named after the table, its size and its time, and written once. Of a table that was
    not read to its end nothing is left.
    """

    def __init__(self, source: Source, cache: Path) -> None:
        known = f"{source.path} {source.size} {source.mtime_ns}"
        digest = hashlib.blake2b(known.encode(), digest_size=16).hexdigest()
        self._path, self._offset = cache / f"pictures-{digest}.bin", 0
        self._partial = cache / f"pictures-{digest}.{os.getpid()}.partial"
        self._file: Any = None
        self._there = self._path.is_file()

    def keep(self, data: bytes, place: str) -> Picture:
        if not self._there:
            if self._file is None:
                self._partial.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._partial.open("wb")
            self._file.write(data)
        picture = Picture(str(self._path), self._offset, len(data), place)
        self._offset += len(data)
        return picture

    def __enter__(self) -> _Embedded:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._file is None:
            return
        self._file.close()
        if kind is None:
            self._partial.replace(self._path)
        else:
            self._partial.unlink()


def _members(path: str) -> Iterator[Pair]:
    """Yields the pairs of a webdataset tar, whose members follow one another by name."""
    group: dict[str, tarfile.TarInfo] = {}
    name = ""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, file = os.path.split(member.name)
                stem, _, ending = file.partition(".")
                own = os.path.join(folder, stem)
                if own != name and group:
                    yield _of_members(path, name, group, tar)
                    group = {}
                name = own
                group[f".{ending.lower()}"] = member
            if group:
                yield _of_members(path, name, group, tar)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(
            f"{path} is damaged, cut short or not a plain .tar ({error}); copy it again, or unpack "
            "its compression"
        ) from error


def _of_members(
    path: str, name: str, group: Mapping[str, tarfile.TarInfo], tar: tarfile.TarFile
) -> Pair:
    place = f"{path}:{name}"
    shown = [ending for ending in PICTURES if ending in group]
    if len(shown) != 1:
        raise ValueError(
            f"{place} has {len(shown)} pictures among {', '.join(group)}, not 1; pack it again"
        )
    member = group[shown[0]]
    picture = Picture(path, member.offset_data, member.size, f"{place}{shown[0]}")

    def content(ending: str) -> bytes:
        if group[ending].size > _MAX_TEXT:
            raise ValueError(f"{place}{ending} has {group[ending].size:,} bytes, too many")
        file = tar.extractfile(group[ending])
        assert file is not None
        return file.read()

    for ending in (".txt", ".caption"):
        if ending in group:
            return Pair(place, picture, _decoded(content(ending), f"{place}{ending}"), None)
    if ".json" not in group:
        raise ValueError(
            f"{place} has no .txt, .caption or .json beside its picture; pack it again"
        )
    try:
        record = json.loads(content(".json"))
    except ValueError as error:
        raise ValueError(f"{place}.json is not JSON ({error}); pack it again") from error
    if not isinstance(record, dict):
        raise ValueError(f"{place}.json is not an object; pack it again")
    question, text = _said(record, f"{place}.json")
    return Pair(place, picture, text, question)
