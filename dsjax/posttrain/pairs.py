"""Preferences from files, in the forms in which they are published, as rows of tokens.

A file is JSON lines or parquet (`dsjax.data.documents`), one example per line or row. A pair is

  prompt, chosen, rejected   each a text or messages [{"role", "content"}, ...] (TRL, OpenAI)
  chosen, rejected           messages that hold the prompt themselves, as their common beginning
                             (TRL's implicit form; a `prompt` beside them is ignored), or texts, of
                             which the prompt is the common beginning up to a space

and an answer that is judged by itself is

  prompt, completion, label  label true or 1 for a good answer, false or 0 for a bad one (TRL).
                             Also `response` and `is_safe` (BeaverTails).

Only the answer counts, its end token included; what a message may hold is decided in
`dsjax.posttrain.messages`. An example of which an answer does not fit into a row is dropped whole.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dsjax.data.documents import find_sources, read_records
from dsjax.data.packing import stack
from dsjax.files import shown
from dsjax.posttrain.messages import parse
from dsjax.text.chat import ChatFormat
from dsjax.text.conversation import Conversation, encode_conversations
from dsjax.text.vocabulary import Vocabulary

_AT_ONCE = 256  # examples that are encoded together
_LABELS = ("label", "is_safe")
_COMPLETIONS = ("completion", "response")


class Examples(NamedTuple):
    """Answers with their prompts as tokens, one after the other; a pair has two, chosen first.

    Attributes:
      ids, counted: int32 and bool, of all rows; tokens of the answer count.
      offsets: int64 [rows + 1], where each begins.
      labels: float32 [rows], 1 or 0; of pairs all 0.
      per_example: rows of an example, 1 or 2.
      dropped: examples that are longer than a row.
    """

    ids: np.ndarray
    counted: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    per_example: int
    dropped: int

    def __len__(self) -> int:
        return (len(self.offsets) - 1) // self.per_example

    def row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns a row's tokens, and which of them count."""
        span = slice(self.offsets[number], self.offsets[number + 1])
        return self.ids[span], self.counted[span]

    def prompt_digests(self) -> np.ndarray:
        """Returns a 64-bit hash of each example's prompt, uint64 [examples]."""
        found = []
        for example in range(len(self)):
            ids, counted = self.row(example * self.per_example)
            prompt = ids[: int(np.argmax(counted))].tobytes()
            found.append(hashlib.blake2b(prompt, digest_size=8).digest())
        return np.frombuffer(b"".join(found), "<u8")


def read_examples(
    files: str,
    vocabulary: Vocabulary,
    form: ChatFormat | None,
    *,
    labelled: bool,
    longest: int,
    key: str = "preference.files",
    progress: Callable[[int], None] = lambda done: None,
) -> Examples:
    """Reads and encodes all examples of the files that globs match, in the order of their paths.

    Args:
      form: None for a base model.
      labelled: whether they are single answers with a label.
      longest: most tokens of a prompt with its answer.
      key: the setting that messages name.
      progress: called with the number of examples read so far.

    Raises:
      ValueError: no file or example is there, none has room, or a line is none of the forms above
        or compares an answer with itself; names the file and the line.
    """
    records = read_records(find_sources(files, key=key))
    ids: list[np.ndarray] = []
    counted: list[np.ndarray] = []
    labels: list[float] = []
    read, dropped, per_example = 0, 0, 1 if labelled else 2
    judge = label_of if labelled else pair_of
    while batch := [judge(record, place) for place, record in itertools.islice(records, _AT_ONCE)]:
        conversations = [conversation for answers, _ in batch for conversation in answers]
        encoded = encode_conversations(conversations, vocabulary, form)
        for number, (answers, label) in enumerate(batch):
            rows = encoded[number * per_example : (number + 1) * per_example]
            if any(len(row.ids) > longest for row in rows):
                dropped += 1
                continue
            _check(rows, answers[0].place)
            ids += [row.ids for row in rows]
            counted += [row.trained for row in rows]
            labels += [label] * per_example
        read += len(batch)
        progress(read)
    if not read:
        raise ValueError(f"{key}={files!r} holds no example; give a file with a line at least")
    if not ids:
        raise ValueError(
            f"none of the {read:,} examples of {key}={files!r} fits: all have an answer that with "
            f"its prompt is longer than preference.sequence_length={longest}; raise it"
        )
    return Examples(
        np.concatenate(ids),
        np.concatenate(counted),
        np.cumsum([0, *map(len, ids)], dtype=np.int64),
        np.asarray(labels, np.float32),
        per_example,
        dropped,
    )


def _check(rows: Sequence[Any], place: str) -> None:
    """Refuses what a loss cannot tell apart."""
    if not all(row.trained[1:].any() for row in rows):
        raise ValueError(f"{place} has an answer without a token; leave the line out")
    if len(rows) == 2 and np.array_equal(rows[0].ids, rows[1].ids):
        raise ValueError(
            f"{place}: 'chosen' and 'rejected' are the same to the model, so there is nothing to "
            "prefer; leave the line out"
        )


def pair_of(record: Mapping[str, Any], place: str) -> tuple[tuple[Conversation, ...], float]:
    """Returns the conversations of a pair, chosen first, and the label 0, which is not used.

    Raises:
      ValueError: the line is no pair; names the place and what is nearest.
    """
    fields = {key: value for key, value in record.items() if value is not None}
    for name in ("chosen", "rejected"):
        if name not in fields:
            raise ValueError(_lacks(name, fields, place, '"prompt", "chosen", "rejected"'))
    chosen, rejected = fields["chosen"], fields["rejected"]
    if chosen == rejected:
        raise ValueError(
            f"{place}: 'chosen' and 'rejected' are equal, so there is nothing to prefer; leave the "
            "line out"
        )
    inside = _begins_with_prompt(chosen) and _begins_with_prompt(rejected)
    if inside or "prompt" not in fields:
        prompt, chosen, rejected = _split(chosen, rejected, place)
    else:
        prompt = fields["prompt"]
    tools = {"tools": fields["tools"]} if "tools" in fields else {}
    both = [
        _conversation({"prompt": prompt, "completion": answer, **tools}, place, name)
        for name, answer in (("chosen", chosen), ("rejected", rejected))
    ]
    return tuple(both), 0.0


def label_of(record: Mapping[str, Any], place: str) -> tuple[tuple[Conversation, ...], float]:
    """Returns the conversation of a labelled answer, and 1 or 0.

    Raises:
      ValueError: the line is no labelled answer; names the place and what is nearest.
    """
    fields = {key: value for key, value in record.items() if value is not None}
    wanted = '"prompt", "completion", "label"'
    if "prompt" not in fields:
        raise ValueError(_lacks("prompt", fields, place, wanted))
    for names in (_COMPLETIONS, _LABELS):
        if not set(names) & fields.keys():
            raise ValueError(_lacks(names[0], fields, place, wanted))
    name = next(name for name in _LABELS if name in fields)
    label = fields[name]
    if label not in (0, 1):  # True and False are equal to them
        raise ValueError(
            f"{place}: {name!r} is {shown(str(label))}; it is true or 1 for a good answer, false "
            "or 0 for a bad one"
        )
    completion = next(fields[name] for name in _COMPLETIONS if name in fields)
    tools = {"tools": fields["tools"]} if "tools" in fields else {}
    answer = {"prompt": fields["prompt"], "completion": completion, **tools}
    return (_conversation(answer, place, "completion"),), float(label)


def _conversation(record: Mapping[str, Any], place: str, name: str) -> Conversation:
    try:
        return parse(record, place)
    except ValueError as error:
        raise ValueError(str(error).replace("'completion'", repr(name))) from None


def _lacks(name: str, fields: Mapping[str, Any], place: str, wanted: str) -> str:
    near = difflib.get_close_matches(name, fields, n=1)
    has = ", ".join(map(shown, sorted(fields)[:20])) or "nothing"
    meant = f"; did you mean {shown(near[0])}?" if near else f"; a line is {{{wanted}}}"
    return f"{place} has no {name!r} but {has}{meant}"


def _begins_with_prompt(answer: Any) -> bool:
    first = answer[0] if isinstance(answer, list) and answer else None
    return isinstance(first, Mapping) and first.get("role") in ("system", "user")


def _split(chosen: Any, rejected: Any, place: str) -> tuple[Any, Any, Any]:
    """Returns the prompt that two answers begin with, and what follows it in each."""
    if not isinstance(chosen, str | list) or type(chosen) is not type(rejected):
        raise ValueError(
            f"{place} has no 'prompt', and 'chosen' and 'rejected' are not both texts or messages "
            "that begin with it"
        )
    pairs = zip(chosen, rejected, strict=False)
    common = next(
        (at for at, (a, b) in enumerate(pairs) if a != b), min(map(len, (chosen, rejected)))
    )
    if isinstance(chosen, str):
        # Words stay whole: the first that differs belongs to the answers.
        common = 1 + max((chosen.rfind(gap, 0, common) for gap in " \n"), default=-1)
    if not common:
        raise ValueError(
            f"{place} has no 'prompt', and 'chosen' and 'rejected' do not begin with one that they "
            "share; give it as 'prompt'"
        )
    if common in (len(chosen), len(rejected)):
        raise ValueError(
            f"{place}: one of 'chosen' and 'rejected' is only the beginning of the other, so there "
            "is no answer to compare; give the prompt as 'prompt'"
        )
    return chosen[:common], chosen[common:], rejected[common:]


class ExampleRows:
    """Some examples as rows of one length, in a fixed order.

    `rows[i]` is {"tokens", "segment_ids", "counted": int32 [T + 1]} of row i % per_example of
    example i // per_example, with a float32 more, `reference` or `label`. A row ends in padding, of
    segment id 0; its last position is always padding, since an answer's last token, too, is read.

    Attributes:
      reference: float32 [rows], once it is known.
    """

    def __init__(
        self, examples: Examples, numbers: np.ndarray, *, sequence_length: int, pad: int
    ) -> None:
        """
        Args:
          numbers: of the examples.
          pad: any id.
        """
        self.sequence_length, self.per_example = sequence_length, examples.per_example
        self.reference: np.ndarray | None = None
        self._examples, self._pad = examples, pad
        starts = np.asarray(numbers)[:, None] * examples.per_example
        self._rows = (starts + np.arange(examples.per_example)).reshape(-1)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def examples(self) -> int:
        return len(self._rows) // self.per_example

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        number = int(self._rows[row])
        ids, counted = self._examples.row(number)
        arrays: dict[str, Any] = {
            name: np.full(self.sequence_length + 1, value, np.int32)
            for name, value in (("tokens", self._pad), ("segment_ids", 0), ("counted", 0))
        }
        for name, values in (("tokens", ids), ("segment_ids", 1), ("counted", counted)):
            arrays[name][: len(ids)] = values
        if self.reference is not None:
            arrays["reference"] = np.float32(self.reference[row])
        arrays["label"] = np.float32(self._examples.labels[number])
        return arrays

    @property
    def fingerprint(self) -> str:
        """A hash of all rows, but for the reference."""
        digest = hashlib.blake2b(f"{self.sequence_length} {self._pad}".encode(), digest_size=16)
        for number in self._rows:
            for array in self._examples.row(int(number)):
                digest.update(array.tobytes())
            digest.update(b"%d|" % self._examples.labels[number])
        return digest.hexdigest()

    def batch(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Returns the given rows, stacked."""
        return stack([self[row] for row in rows])

    def spread(self, count: int) -> list[int]:
        """Returns the rows of at most `count` evenly spaced examples, the same ones every time."""
        count = min(count, self.examples)
        chosen = [index * self.examples // count for index in range(count)]
        return [
            example * self.per_example + side
            for example in chosen
            for side in range(self.per_example)
        ]
