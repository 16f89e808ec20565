"""Conversations from files, in the forms in which they are published, as tokens.

A file is JSON lines or parquet (`dsjax.data.documents`), one conversation per line or row:

  messages        [{"role", "content"}, ...], roles system, user, assistant, tool (OpenAI, TRL).
                  `"weight": 0` leaves an assistant's message out of the loss (OpenAI). `tools`,
                  `tool_calls` and messages of tools are OpenAI's, for checkpoints whose template
                  takes them. A `content` of parts is joined if all are texts. A thought may be in
                  `reasoning_content` (DeepSeek's API).
  prompt,         each a text or messages (TRL); what is in the prompt is not trained. Two texts are
  completion      a user's and an assistant's message for a model that has a chat format, and as
                  they stand for one that has none.
  conversations   the same as `messages`; `from` and `value` may name role and content, `human` and
                  `gpt` the roles (ShareGPT, which TRL reads too)

Other fields are ignored. What counts as trained is decided in `dsjax.text.conversation`.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dsjax.data.documents import find_sources, read_records
from dsjax.files import shown
from dsjax.text.chat import ChatFormat
from dsjax.text.conversation import ROLES, Conversation, Turn, encode_conversations
from dsjax.text.vocabulary import Vocabulary

_KEYS = ("messages", "prompt", "completion", "conversations")
_SHAREGPT = {"human": "user", "gpt": "assistant"}
_AT_ONCE = 256  # conversations that are encoded together


@dataclasses.dataclass(frozen=True)
class TokenizedConversations:
    """Conversations as tokens, one after the other.

    Attributes:
      ids, trained: int32 and bool, of all conversations.
      offsets: int64 [n + 1], where each begins.
      dropped, truncated: longer than a row.
      untrained: left out, since no token of theirs is trained.
    """

    ids: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray
    dropped: int
    truncated: int
    untrained: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def one(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens of a conversation, and which are trained."""
        span = slice(self.offsets[number], self.offsets[number + 1])
        return self.ids[span], self.trained[span]

    def digests(self) -> np.ndarray:
        """Returns a 64-bit hash of each one's content, uint64 [n]."""
        found = [
            hashlib.blake2b(ids.tobytes() + trained.tobytes(), digest_size=8).digest()
            for ids, trained in map(self.one, range(len(self)))
        ]
        return np.frombuffer(b"".join(found), "<u8")


def read_conversations(
    files: str,
    vocabulary: Vocabulary,
    form: ChatFormat | None,
    *,
    longest: int,
    truncate: bool,
    key: str = "sft.files",
    progress: Callable[[int], None] = lambda done: None,
) -> TokenizedConversations:
    """Reads and encodes all conversations of the files that globs match, in the order of their
    paths.

    Args:
      form: None for a base model.
      longest: most tokens of a conversation; longer ones are dropped, or cut at their end.
      key: the setting that messages name.
      progress: called with the number of conversations read so far.

    Raises:
      ValueError: no file or conversation is there, none has room, or a line is none of the forms
        above or does not suit the format; names the file and the line.
    """
    records = read_records(find_sources(files, key=key))
    ids: list[np.ndarray] = []
    trained: list[np.ndarray] = []
    read = dropped = truncated = untrained = 0
    while batch := [parse(record, place) for place, record in itertools.islice(records, _AT_ONCE)]:
        for encoded in encode_conversations(batch, vocabulary, form):
            if len(encoded.ids) > longest and not truncate:
                dropped += 1
            elif not encoded.trained[1:longest].any():  # the first token is never predicted
                untrained += 1
            else:
                truncated += len(encoded.ids) > longest
                ids.append(encoded.ids[:longest])
                trained.append(encoded.trained[:longest])
        read += len(batch)
        progress(read)
    if not read:
        raise ValueError(f"{key}={files!r} holds no conversation; give a file with a line at least")
    if not ids:
        raise ValueError(
            f"none of the {read:,} conversations of {key}={files!r} can be trained: {dropped:,} "
            f"have more than the {longest:,} tokens of a row (raise sft.sequence_length, or set "
            f"sft.longer=truncate), {untrained:,} have no reply to train within them"
        )
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    return TokenizedConversations(
        np.concatenate(ids), np.concatenate(trained), offsets, dropped, truncated, untrained
    )


def parse(record: Mapping[str, Any], place: str) -> Conversation:
    """Returns the conversation of one line.

    Raises:
      ValueError: it is none of the forms above; names the place and what is nearest.
    """
    fields = {key: value for key, value in record.items() if value is not None}
    tools = _tools(fields.get("tools"), place)
    for key in ("messages", "conversations"):
        if key in fields:
            return Conversation(tuple(_turns(fields[key], f"{place}: {key!r}")), place, tools)
    missing = [key for key in ("prompt", "completion") if key not in fields]
    if missing:
        raise ValueError(_nothing_to_train(missing, fields, place))
    prompt, completion = fields["prompt"], fields["completion"]
    plain = isinstance(prompt, str) and isinstance(completion, str)
    before = [
        Turn(turn.role, turn.content, False, turn.fields)
        for turn in _side(prompt, "user", f"{place}: 'prompt'")
    ]
    after = _side(completion, "assistant", f"{place}: 'completion'")
    return Conversation((*before, *after), place, tools, plain)


def _nothing_to_train(missing: Sequence[str], fields: Mapping[str, Any], place: str) -> str:
    if len(missing) == 1:
        near = difflib.get_close_matches(missing[0], fields, n=1)
        meant = f"; did you mean {shown(near[0])}?" if near else ""
        there = "prompt" if missing == ["completion"] else "completion"
        return f"{place} has a {there} and no {missing[0]}{meant}"
    has = ", ".join(map(shown, sorted(fields)[:20])) or "nothing"
    pairs = [(key, name) for key in fields for name in difflib.get_close_matches(key, _KEYS, n=1)]
    meant = f" (is {shown(pairs[0][0])} meant as {pairs[0][1]!r}?)" if pairs else ""
    return (
        f"{place} has neither 'messages' nor 'prompt' and 'completion' but {has}{meant}; a line is "
        '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]} or '
        '{"prompt": "...", "completion": "..."}'
    )


def _side(value: Any, role: str, where: str) -> list[Turn]:
    """Reads a prompt or a completion: a text, or messages."""
    if isinstance(value, str):
        return [Turn(role, _checked(value, where))]
    return list(_turns(value, where))


def _turns(value: Any, where: str) -> Iterator[Turn]:
    if not isinstance(value, list) or not value:
        raise ValueError(
            f'{where} is {type(value).__name__}, not a list of messages, {{"role", "content"}}'
            if not isinstance(value, list)
            else f"{where} is empty; leave the line out"
        )
    for number, message in enumerate(value, 1):
        at = f"{where}: message {number}"
        if not isinstance(message, Mapping):
            raise ValueError(f"{at} is {type(message).__name__}, not an object")
        yield _turn({key: inner for key, inner in message.items() if inner is not None}, at)


def _turn(message: dict[str, Any], at: str) -> Turn:
    if "role" not in message and "from" in message:
        role = message.pop("from")
        named = _SHAREGPT.get(role, role) if isinstance(role, str) else role
        message |= {"role": named, "content": message.pop("value", None)}
    role = message.get("role")
    if role not in ROLES:
        near = difflib.get_close_matches(str(role), ROLES, n=1)
        said = "no role" if role is None else f"the role {shown(str(role))}"
        raise ValueError(
            f"{at} has {said}, none of {', '.join(ROLES)}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    if message.get("function_call"):
        raise ValueError(
            f"{at} has 'function_call', OpenAI's older form of a tool call; write 'tool_calls'"
        )
    weight = message.pop("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise ValueError(f"{at} has weight={weight!r}; it is 1, or 0 to leave a reply out")
    given = message.pop("content", None)
    calls = message.get("tool_calls")
    if given is None and not calls:
        near = difflib.get_close_matches("content", message, n=1)
        meant = f"; did you mean {shown(near[0])}?" if near else ""
        raise ValueError(f"{at} has no 'content'{meant}")
    text = "" if given is None else _content(given, at)
    fields = {key: inner for key, inner in message.items() if key != "role"}
    # A template may tell a call without text from a text.
    fields |= {"content": None} if given is None else {}
    return Turn(role, text, weight == 1, fields)


def _content(value: Any, at: str) -> str:
    """Returns a message's text; of parts, theirs together."""
    if isinstance(value, str):
        return _checked(value, at)
    if not isinstance(value, list):
        raise ValueError(f"{at}: 'content' is {type(value).__name__}, not text")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"{at}: 'content' has a part {shown(str(kind))}; only texts are read")
        texts.append(_checked(part["text"], at))
    return "".join(texts)


def _tools(value: Any, place: str) -> tuple[dict[str, Any], ...]:
    if isinstance(value, str):  # parquet files keep such nested values as JSON
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"{place}: 'tools' is a text that is not JSON ({error})") from error
    if value is None or value == []:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise ValueError(f"{place}: 'tools' is not a list of objects, as OpenAI's")
    return tuple(map(dict, value))


def _checked(text: str, at: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{at} holds half of a surrogate pair at character {error.start}; repair it"
        ) from error
    return text
