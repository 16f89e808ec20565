"""Questions about pictures with short answers, from files as benchmarks publish them.

  MMMU      parquet or JSON lines: `question` with <image 1> in it, `image_1` to `image_7`,
            `options` as a list or as Python prints one, `answer` a letter, or without options a
            text or a list of right ones, also as Python prints one
  GQA       JSON, an object of questions by their ids: `imageId`, `question`, `answer`; or a list
  plain     `image`, `question`, `answer` (a text or a list of right ones), and perhaps `options`

A picture is a path from the file's folder or from another one, or bytes in a table. An `imageId`
has .jpg added.

Marking is by rule. A chosen option is the first letter of an option that stands alone, or else an
option's own text; a short answer must be one of the right ones, without regard to case, punctuation
and articles. What belongs to a number is no punctuation: 3.5, -5, 24/7, 9:30.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import json
import re
import string
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dsjax.data.documents import find_sources, read_records
from dsjax.files import read_regular
from dsjax.vision.pictures import MAX_BYTES, size_of

CHOOSE = "Answer with the option's letter from the given choices directly."
SHORT = "Answer the question using a single word or phrase."
LETTERS = string.ascii_uppercase
_IMAGE = ("image", "imageId", "image_path", "file_name")
_MMMU = tuple(f"image_{number}" for number in range(1, 8))
_MARK = re.compile(r"<image \d+>")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_IN_NUMBERS = r"\.(?=\d)|(?<=\d)[:/](?=\d)|(?<!\w)-(?=\.?\d)"
_PUNCTUATION = re.compile(rf"(?!{_IN_NUMBERS})[{re.escape(string.punctuation)}]")
_MAX_FILE = 1 << 30  # bytes of a JSON file, which is read whole


class Asked(NamedTuple):
    """What a model is given: encoded pictures in their order, and a text."""

    place: str
    pictures: tuple[bytes, ...]
    text: str


@dataclasses.dataclass(frozen=True)
class Question:
    """A question, its encoded pictures in their order, and what counts as right."""

    place: str
    pictures: tuple[bytes, ...]
    text: str
    options: tuple[str, ...]
    answers: tuple[str, ...]  # letters where there are options

    @property
    def asked(self) -> Asked:
        """What a model is given."""
        lines = [f"({LETTERS[i]}) {option}" for i, option in enumerate(self.options)]
        text = "\n".join([self.text, *lines, CHOOSE if self.options else SHORT])
        return Asked(self.place, self.pictures, text)

    def is_right(self, reply: str) -> bool:
        """Marks a reply."""
        if self.options:
            return chosen(reply, self.options) in self.answers
        return plain(reply) in {plain(answer) for answer in self.answers}


def plain(text: str) -> str:
    """Returns a text without case, punctuation, superfluous space and, unless it has nothing else,
    articles.
    """
    kept = _PUNCTUATION.sub("", text.lower())
    return " ".join((_ARTICLES.sub(" ", kept).strip() or kept).split())


def chosen(reply: str, options: tuple[str, ...]) -> str | None:
    """Returns the letter of the option that a reply chooses; None: it chooses none."""
    letters = LETTERS[: len(options)]
    text = reply.strip()
    # A lone A may be an article, I the speaker; at the beginning or in brackets it is a letter.
    alone = "".join(letter for letter in letters if letter not in "AI")
    found = re.match(rf"\(?([{letters}])(?:[).:,]|\s*$)", text)
    found = found or re.search(
        rf"\(([{letters}])\)" + (rf"|\b([{alone}])\b" if alone else ""), text
    )
    if found:
        return next(group for group in found.groups() if group)
    same = [i for i, option in enumerate(options) if plain(option) == plain(text)]
    return LETTERS[same[0]] if len(same) == 1 else None


def read_questions(files: str, folder: Path | None = None) -> list[Question]:
    """Reads the questions of files, globs or folders, separated by commas.

    Args:
      folder: of pictures; None: that of each file.

    Raises:
      ValueError: there are none, or one of them is incomplete or has a picture that is none;
        names it.
    """
    found = []
    # GQA asks some thirty questions about a picture, which is in memory once.
    read = functools.cache(functools.partial(read_regular, max_bytes=MAX_BYTES))
    for source in find_sources(files, key="--questions"):
        path = Path(source.path)
        for place, record in _records(path):
            found.append(_question(record, place, folder or path.parent, read))
    if not found:
        raise ValueError(f"--questions {files} holds no question")
    return found


def _records(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the objects of a file, each with its place."""
    if path.suffix.lower() != ".json":
        yield from read_records(find_sources([str(path)], key="--questions"))
        return
    try:
        content = json.loads(read_regular(path, _MAX_FILE))
    except ValueError:  # not one value: perhaps an object per line
        yield from read_records(find_sources([str(path)], key="--questions"))
        return
    if isinstance(content, Mapping) and "question" in content:
        content = [content]
    if isinstance(content, Mapping):
        named = [(f"{path}:{key}", value) for key, value in content.items()]
    elif not isinstance(content, list):
        raise ValueError(f"{path} is {content!r:.40}; give an object or a list of questions")
    else:
        named = [(f"{path}:{number}", value) for number, value in enumerate(content, 1)]
    for place, record in named:
        if not isinstance(record, Mapping):
            raise ValueError(f"{place} is not an object with a question")
        yield place, record


def _question(
    record: Mapping[str, Any], place: str, folder: Path, read: Callable[[Path], bytes]
) -> Question:
    text, answer, options = record.get("question"), record.get("answer"), record.get("options")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{place} has no question; its fields are {', '.join(record)}")
    if isinstance(options, str):  # as MMMU's tables have it
        with contextlib.suppress(ValueError, SyntaxError):
            options = ast.literal_eval(options)
    options = options or ()
    if not isinstance(options, list | tuple) or len(options) > len(LETTERS):
        raise ValueError(f"{place}: options={options!r} is not a list of at most {len(LETTERS)}")
    options = tuple(map(str, options))
    answers = _answers(answer)
    if (
        not answers
        or not all(each.strip() for each in answers)
        or (options and not set(answers) <= {*LETTERS[: len(options)]})
    ):
        wanted = (
            f"a letter of its {len(options)} options" if options else "a text or a list of them"
        )
        raise ValueError(f"{place}: answer={answer!r} is not {wanted}")
    shown = tuple(_bytes(value, place, folder, read) for value in _pictures(record))
    if not shown:
        raise ValueError(f"{place} has no picture; its fields are {', '.join(record)}")
    for data in shown:
        size_of(data, place)  # what is no picture at all is named before anything is answered
    return Question(place, shown, _MARK.sub("", text).strip(), options, answers)


def _answers(answer: Any) -> tuple[str, ...]:
    """Returns the right answers: a text, a list, or a list of texts as Python prints it, which
    MMMU's tables have. A printed list of numbers is a text, such as an interval.
    """
    if isinstance(answer, str):
        with contextlib.suppress(ValueError, SyntaxError):
            printed = ast.literal_eval(answer)
            if isinstance(printed, list) and all(isinstance(each, str) for each in printed):
                answer = printed
    found = answer if isinstance(answer, list | tuple) else [answer]
    return tuple(str(each) if isinstance(each, str | int | float) else "" for each in found)


def _pictures(record: Mapping[str, Any]) -> Iterator[Any]:
    """Yields what a record says of its pictures, in their order."""
    for name in (*_IMAGE, *_MMMU):
        value = record.get(name)
        if value is not None:
            yield f"{value}.jpg" if name == "imageId" else value


def _bytes(value: Any, place: str, folder: Path, read: Callable[[Path], bytes]) -> bytes:
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not (folder / value).is_file():
        raise ValueError(f"{place}: there is no picture {folder / str(value)}; name --images DIR")
    return read(folder / value)
