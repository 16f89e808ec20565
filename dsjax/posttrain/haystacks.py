"""Texts with facts hidden at given depths, and the questions that ask for them.

A haystack has a fact at every depth, so that all its questions continue the same tokens, which run
once. Three kinds:

  needle   "The secret number of Bazuro is 48213." between the lines of a text
  pairs    one line "bazuro: 48213" after the other; every line could be asked for
  tokens   the same as bare ids, key and value: for any model, also one without a tokenizer that was
           trained on ids alone

Everything follows from (seed, length, number of the haystack).
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from dsjax.text.vocabulary import Vocabulary

Kind = Literal["needle", "pairs", "tokens"]

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_SYLLABLES = 3
_LEAST, _MOST = 10_000, 99_999  # of a number
_LONGEST_LINE = 200  # characters
_ROOM = 4  # tokens beyond the answer's own, as a model may put it another way


class Question(NamedTuple):
    """What is asked after a haystack."""

    depth: float  # of its fact: 0 is the beginning, 1 the end
    ids: tuple[int, ...]
    answer: str | int  # a number in text, or an id

    def is_right(self, new_ids: Sequence[int], vocabulary: Vocabulary | None) -> bool:
        """Tells whether the new tokens begin with the answer."""
        if isinstance(self.answer, int):
            return new_ids[0] == self.answer
        assert vocabulary is not None
        said = vocabulary.coder.decode(new_ids).strip()
        return said.startswith(self.answer) and not said[len(self.answer) :][:1].isdigit()


class Haystack(NamedTuple):
    """A text and its questions. `new_tokens` are needed for an answer."""

    ids: tuple[int, ...]
    questions: tuple[Question, ...]
    new_tokens: int

    def prompt(self, question: Question) -> tuple[int, ...]:
        return self.ids + question.ids


@dataclasses.dataclass(frozen=True)
class Maker:
    """Makes haystacks for one model.

    Attributes:
      vocabulary: None is enough for `tokens`.
      vocab_size: the model's.
      n_depths: facts of a haystack, evenly spread from its beginning to its end.
      lines: of the text around needles.
    """

    kind: Kind
    vocabulary: Vocabulary | None
    vocab_size: int
    n_depths: int
    seed: int = 0
    lines: Sequence[str] = ()

    def haystack(self, length: int, number: int) -> Haystack:
        """Makes a haystack that takes at most `length` tokens with a question and its answer, and
        hardly fewer.

        Raises:
          ValueError: the facts do not fit, or the vocabulary has too few tokens.
        """
        generator = np.random.default_rng([self.seed, length, number])
        if self.kind == "tokens":
            return self._of_ids(length, generator)
        return self._of_text(length, generator)

    @property
    def depths(self) -> list[float]:
        if self.n_depths == 1:
            return [0.5]
        return [place / (self.n_depths - 1) for place in range(self.n_depths)]

    def _of_ids(self, length: int, generator: np.random.Generator) -> Haystack:
        vocabulary = self.vocabulary
        begins = vocabulary and vocabulary.begins and vocabulary.bos
        begin = vocabulary.plain_prompt("") if vocabulary and begins else []
        control = set(vocabulary.coder.control.values()) if vocabulary else set()
        top = vocabulary.coder.vocab_size if vocabulary else self.vocab_size
        ids = generator.permutation([id for id in range(top) if id not in control])
        keys, values = ids[: len(ids) // 2], ids[len(ids) // 2 :]
        count = (length - len(begin) - 2) // 2
        self._check(count, length, "pairs of tokens")
        if len(keys) < self.n_depths + 1:
            raise ValueError(
                f"--depths {self.n_depths} needs as many keys and one more, and half of the "
                f"vocabulary is {len(keys)}; ask for fewer depths"
            )
        places = self._places(count)
        # The keys that are asked for occur once; where the vocabulary is small, others recur.
        others = generator.permutation(np.arange(count - self.n_depths) % (len(keys) - len(places)))
        chosen = np.insert(
            len(places) + others, places - np.arange(len(places)), np.arange(len(places))
        )
        value_of = values[generator.integers(len(values), size=len(keys))]
        pairs = np.stack([keys[chosen], value_of[chosen]], axis=1)
        questions = [
            Question(depth, (int(keys[fact]),), int(value_of[fact]))
            for fact, depth in enumerate(self.depths)
        ]
        return Haystack((*begin, *pairs.ravel().tolist()), tuple(questions), 1)

    def _of_text(self, length: int, generator: np.random.Generator) -> Haystack:
        assert self.vocabulary is not None
        encode = self.vocabulary.coder.encode
        names, is_pairs = _names(generator), self.kind == "pairs"
        facts = [(next(names), _number(generator)) for _ in range(self.n_depths)]
        head, tail = _PAIRS if is_pairs else _NEEDLE
        begin = self.vocabulary.plain_prompt(head)
        planted = [encode((_pair if is_pairs else _fact)(*each)) for each in facts]
        asked = [encode(tail.format(name=name)) for name, _ in facts]
        new_tokens = max(len(encode(f" {number}")) for _, number in facts) + _ROOM
        taken = len(begin) + sum(map(len, planted)) + max(map(len, asked)) + new_tokens
        pieces: list[list[int]] = []
        for line in self._filler(names, generator):
            taken += len(piece := encode(line))
            if taken > length:
                break
            pieces.append(piece)
        self._check(len(pieces) + len(planted), length, "lines between them")
        for place, fact in zip(self._places(len(pieces) + len(planted)), planted, strict=True):
            pieces.insert(place, fact)
        questions = [
            Question(depth, tuple(ids), number)
            for depth, ids, (_, number) in zip(self.depths, asked, facts, strict=True)
        ]
        ids = [*begin, *(id for piece in pieces for id in piece)]
        return Haystack(tuple(ids), tuple(questions), new_tokens)

    def _filler(self, names: Iterator[str], generator: np.random.Generator) -> Iterator[str]:
        if self.kind == "pairs":
            while True:
                yield _pair(next(names), _number(generator))
        start = int(generator.integers(len(self.lines)))
        while True:
            yield self.lines[start]
            start = (start + 1) % len(self.lines)

    def _places(self, count: int) -> np.ndarray:
        """Returns where the facts are among `count` pieces, ascending."""
        return np.asarray([round(depth * (count - 1)) for depth in self.depths])

    def _check(self, count: int, length: int, what: str) -> None:
        if count < 2 * self.n_depths:
            raise ValueError(
                f"--lengths {length} has no room for --depths {self.n_depths} facts and as many "
                f"{what}; ask for longer texts or fewer depths"
            )


_PAIRS = (
    "Each name has a number.\n\n",
    "\nAsked again, each name has the number that it has above.\n\n{name}:",
)
_NEEDLE = (
    "Somewhere in this text are secret numbers. Remember them.\n\n",
    "\n\nQuestion: What is the secret number of {name}?\nAnswer: The secret number of {name} is",
)


def _pair(name: str, number: str) -> str:
    return f"{name}: {number}\n"


def _fact(name: str, number: str) -> str:
    return f"The secret number of {name} is {number}.\n"


def _names(generator: np.random.Generator) -> Iterator[str]:
    """Yields names, each once."""
    syllables = [consonant + vowel for consonant in _CONSONANTS for vowel in _VOWELS]
    for number in generator.permutation(len(syllables) ** _SYLLABLES):
        parts = np.unravel_index(int(number), (len(syllables),) * _SYLLABLES)
        yield "".join(syllables[part] for part in parts)


def _number(generator: np.random.Generator) -> str:
    return str(generator.integers(_LEAST, _MOST + 1))


def lines_of(texts: Iterable[str], most: int) -> list[str]:
    """Returns about the first `most` characters of texts, as lines that are not blank; long ones
    are cut.
    """
    found: list[str] = []
    for text in texts:
        for line in filter(str.strip, text.splitlines()):
            parts = textwrap.wrap(line, _LONGEST_LINE, replace_whitespace=False)
            found += [f"{part}\n" for part in (parts if len(line) > _LONGEST_LINE else [line])]
            most -= len(line)
        if most < 0:
            break
    return found
