"""Text to token ids and back: a Hugging Face tokenizer.json, or a byte-level BPE trained here.

The trained tokenizer follows DeepSeek-V3's (tokenizer.json of the release; V3 section 4.1 calls it
a byte-level BPE): digits in groups of up to three, words together with one character before them,
runs of punctuation together with the line breaks after them. Departures:
  1. A line break also takes the next line's indentation except its last space, which goes with the
     word. On Python source this saves 5 % of the tokens.
  2. Chinese and Japanese have no group of their own: a vocabulary trained on a single corpus does
     not need one.
  3. Ids 0 to 5 are begin, end, pad and the three fill-in-the-middle tokens, in DeepSeek's spelling.

Control tokens spelled out in a text are encoded as ordinary characters: a document cannot end
itself, and a user's message cannot begin a reply. The library protects only tokens that the file
marks as special, and releases mark <think> and the role tokens `"special": false`; here all control
tokens are protected. Truncation and padding requested by a tokenizer.json are turned off, because
both would silently change documents.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from dsjax.files import disguise, write
from dsjax.text import tiktoken_file

FILE_NAMES = ("tokenizer.json", tiktoken_file.FILE_NAME)
BOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
EOS = "<\uff5cend\u2581of\u2581sentence\uff5c>"
PAD = "<\uff5c\u2581pad\u2581\uff5c>"
FIM_BEGIN = "<\uff5cfim\u2581begin\uff5c>"
FIM_HOLE = "<\uff5cfim\u2581hole\uff5c>"
FIM_END = "<\uff5cfim\u2581end\uff5c>"
SPECIAL_TOKENS = (BOS, EOS, PAD, FIM_BEGIN, FIM_HOLE, FIM_END)

# A line break and the indentation after it, except its last space.
_BREAK = r"[\r\n]+(?:[ \t]+(?=[ \t]))?"
PATTERNS = (
    r"\p{N}{1,3}",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+(?:{_BREAK})?"
    rf"|\s*{_BREAK}"
    r"|\s+(?!\S)"
    r"|\s+",
)
SMALLEST_VOCAB = 256 + len(SPECIAL_TOKENS)

# Longer texts are encoded in pieces, some at a time: the library needs about 50 bytes of memory per
# byte of text. Its trainer needs as much of the longest text alone, so that one has shorter pieces.
_PIECE_CHARACTERS = 1 << 20
_TRAINED_CHARACTERS = 1 << 16
_AT_ONCE = 1 << 23  # characters


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens that packing adds."""

    bos: int
    eos: int
    pad: int  # eos if the tokenizer has no padding token; segment ids mark padding anyway
    fim: tuple[int, int, int] | None = None  # begin, hole, end


class Coder:
    """Turns text into ids and back with a `tokenizers.Tokenizer`."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True
        self.inner = inner
        # Ids may have gaps, so the size is not the number of entries.
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        added = inner.get_added_tokens_decoder()
        control = {token.content: i for i, token in added.items() if _is_control(token)}
        self.control = control  # control tokens by name
        self._control = _any_of(control)
        self._control_at = re.compile(f"(?={self._control.pattern})(.)", re.DOTALL)
        parsed = _any_of(name for name in control if not added[control[name]].special)
        self._parsed_at = re.compile(f"(?={parsed.pattern})")

    def encode(self, text: str) -> list[int]:
        """Encodes a text, without begin and end tokens."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encodes several texts on all cores, each to uint32 ids.

        A text of more than two million characters is cut before a line that does not start with a
        space; tokens of the trained tokenizer never cross such a place.
        """
        pieces = [
            [part for piece in _pieces(text, _PIECE_CHARACTERS) for part in self._cut(piece)]
            for text in texts
        ]
        ids: list[np.ndarray] = []
        for some in _batches(itertools.chain.from_iterable(pieces)):
            with _library_failures("cannot encode a text"):
                encodings = self.inner.encode_batch_fast(some, add_special_tokens=False)
            ids += [np.asarray(encoding.ids, np.uint32) for encoding in encodings]
        each = iter(ids)
        return [np.concatenate([next(each) for _ in text]) for text in pieces]

    def encode_control(self, text: str) -> list[int]:
        """Encodes a text in which control tokens are recognised, such as a rendered template."""
        ids: list[int] = []
        for part, is_control in self.split_control(text):
            ids += [self.control[part]] if is_control else self.encode(part)
        return ids

    def split_control(self, text: str) -> Iterator[tuple[str, bool]]:
        """Yields the parts of a text in order, each with whether it is a control token."""
        end = 0
        for match in self._control.finditer(text):
            yield text[end : match.start()], False
            yield match.group(), True
            end = match.end()
        yield text[end:], False

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special: bool = True) -> str:
        """Decodes ids; invalid UTF-8, such as a character cut in half, becomes U+FFFD."""
        with _library_failures("cannot decode"):
            return self.inner.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def break_control(self, text: str, mark: str) -> str:
        """Inserts `mark` into every control token spelled out in the text."""
        return self._control_at.sub(lambda match: match.group() + mark, text)

    def _cut(self, text: str) -> list[str]:
        """Cuts the text inside every control token that the library would recognise."""
        cuts = [match.start() + 1 for match in self._parsed_at.finditer(text)]
        return [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]


class Tokenizer(Coder):
    """A coder with the special ids that packing adds, and a fingerprint."""

    def __init__(self, inner: tokenizers.Tokenizer, special: SpecialTokens) -> None:
        super().__init__(inner)
        self.special = special
        content = f"{inner.to_str()}\0{special}"
        self.fingerprint = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    def save(self, folder: str) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which `load_tokenizer` reads."""
        # The library's own save raises bare Exceptions; a full disk should be an OSError.
        write(Path(folder, "tokenizer.json"), self.inner.to_str(pretty=True))
        special = self.special
        ids = {"bos_token": special.bos, "eos_token": special.eos, "pad_token": special.pad}
        config = {key: self.inner.id_to_token(i) for key, i in ids.items()}
        write(Path(folder, "tokenizer_config.json"), json.dumps(config, indent=2))


def load_tokenizer(path: str) -> Tokenizer:
    """Loads a tokenizer.json or tiktoken.model, given its path or its folder.

    The begin and end tokens have DeepSeek's names, or those that `bos_token` and `eos_token` of the
    tokenizer_config.json beside the file give.

    Raises:
      ValueError: there is no such file, it is not a tokenizer, or it lacks a begin or end token.
    """
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        there = [os.path.join(path, name) for name in FILE_NAMES]
        path = next(filter(os.path.isfile, there), there[0])
    if not os.path.isfile(path):
        raise ValueError(
            f"data.tokenizer={path!r} is not a file; give a {' or a '.join(FILE_NAMES)}, or leave "
            "it empty to train one"
        )
    inner = read_file(path, name=f"data.tokenizer={path!r}")
    return Tokenizer(inner, _find_special(inner, path))


def read_file(path: str, *, name: str) -> tokenizers.Tokenizer:
    """Reads a tokenizer.json or tiktoken.model; error messages begin with `name`.

    Raises:
      ValueError: the file is not a tokenizer, or has no tokens.
    """
    try:
        with open(path, "rb") as stream:
            data = stream.read()
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}") from error
    if os.path.basename(path) == tiktoken_file.FILE_NAME:
        config = _read_config(os.path.join(os.path.dirname(path), "tokenizer_config.json"))
        data = tiktoken_file.to_json(data, config, name=name)
    return from_bytes(data, name=name)


def from_bytes(data: bytes, *, name: str) -> tokenizers.Tokenizer:
    """Reads the contents of a tokenizer.json like `read_file`."""
    if what := disguise(data):
        raise ValueError(f"{name} is {what}")
    message = f"{name} is not a tokenizer.json that can be read"
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{message}: {error}") from error
    with _library_failures(message):
        inner = tokenizers.Tokenizer.from_str(text)
    if not inner.get_vocab_size():
        raise ValueError(f"{name} has an empty vocabulary")
    return inner


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE of `vocab_size` tokens, or fewer if the texts offer no more merges.

    The result depends only on the texts, not on the number of cores.

    Raises:
      ValueError: `vocab_size` is too small for the 256 bytes and the special tokens.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise ValueError(
            f"model.vocab_size={vocab_size} cannot hold the 256 bytes and {len(SPECIAL_TOKENS)} "
            f"special tokens; set at least {SMALLEST_VOCAB}, or give data.tokenizer"
        )
    inner = tokenizers.Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in PATTERNS]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # The library's stubs do not declare these attributes as writable.
    parts = cast(Any, inner)
    parts.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    parts.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL_TOKENS),
    )
    pieces = (piece for text in texts for piece in _pieces(text, _TRAINED_CHARACTERS))
    with _library_failures("cannot train a tokenizer on the corpus"):
        inner.train_from_iterator(pieces, trainer)
    return Tokenizer(inner, _find_special(inner, "trained"))


def check_vocab(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises ValueError if the tokenizer has ids beyond a model's `vocab_size`: jax would silently
    clamp them to the last embedding."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, too many for "
            f"model.vocab_size={vocab_size}; set model.vocab_size={tokenizer.vocab_size} or more, "
            "or another data.tokenizer"
        )


def what_is_lost(coder: Coder, ids: np.ndarray, text: str) -> str | None:
    """Says where the ids of a text do not give it back, up to Unicode's canonical forms and white
    space at its ends; None if they do.

    Bits per byte of such a text mean nothing: they count bytes that no token stands for.
    """
    back = coder.decode(ids, skip_special=False)
    if back == text:
        return None
    want, got = (unicodedata.normalize("NFC", each).strip() for each in (text, back))
    if got == want:
        return None
    pairs = enumerate(zip(want, got, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(want), len(got)))
    return f"{want[at : at + 20]!r} becomes {got[at : at + 20]!r} at character {at}"


def _find_special(inner: tokenizers.Tokenizer, path: str) -> SpecialTokens:
    config = _read_config(os.path.join(os.path.dirname(path), "tokenizer_config.json"))
    found: dict[str, int | None] = {}
    for key, name in {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}.items():
        found[key] = inner.token_to_id(name)
        if found[key] is None and isinstance(config.get(key), str):
            found[key] = inner.token_to_id(config[key])
    for key, name in {"bos_token": BOS, "eos_token": EOS}.items():
        if found[key] is None:
            raise ValueError(
                f"data.tokenizer={path!r} has no token {name!r}, and the tokenizer_config.json "
                f'beside it names none as {key}; write {{"{key}": "..."}} there'
            )
    ids = [inner.token_to_id(name) for name in (FIM_BEGIN, FIM_HOLE, FIM_END)]
    fim = [i for i in ids if i is not None]
    bos, eos, pad = (found[key] for key in ("bos_token", "eos_token", "pad_token"))
    return SpecialTokens(
        bos=cast(int, bos),
        eos=cast(int, eos),
        pad=cast(int, eos if pad is None else pad),
        fim=(fim[0], fim[1], fim[2]) if len(fim) == 3 else None,
    )


def _read_config(path: str) -> dict[str, Any]:
    """Reads tokenizer_config.json with its tokens as strings (some releases wrap them in objects);
    {} if there is none."""
    if not os.path.isfile(path):
        return {}
    try:
        with open(path, encoding="utf-8") as stream:
            config = json.load(stream)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {error}; repair it or remove it") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no JSON object; repair it or remove it")
    unwrapped = {key: value["content"] for key, value in config.items() if _is_wrapped(value)}
    return {**config, **unwrapped}


def _is_control(token: tokenizers.AddedToken) -> bool:
    # Names begin with "<", but that of V3.2's markup begins with the bar that others have inside.
    return token.special or (token.content[:1] in "<\uff5c" and len(token.content) > 1)


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Compiles a pattern for any of the names, preferring the longest; no names match nothing."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _is_wrapped(value: object) -> bool:
    return isinstance(value, dict) and "content" in value


def _pieces(text: str, characters: int) -> Iterator[str]:
    """Cuts a text of more than twice as many `characters` after a line break that no space follows,
    or else by length.
    """
    start = 0
    while len(text) - start > 2 * characters:
        end = start + characters
        limit = end + characters
        cut = text.find("\n", end, limit)
        while cut >= 0 and text[cut + 1].isspace():
            cut = text.find("\n", cut + 1, limit)
        end = cut + 1 if cut >= 0 else limit
        yield text[start:end]
        start = end
    yield text[start:]


def _batches(pieces: Iterable[str]) -> Iterator[list[str]]:
    """Groups texts of at most _AT_ONCE characters together, or one that is longer."""
    batch: list[str] = []
    size = 0
    for piece in pieces:
        if batch and size + len(piece) > _AT_ONCE:
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += len(piece)
    if batch:
        yield batch


@contextlib.contextmanager
def _library_failures(message: str) -> Iterator[None]:
    """Turns the library's failures into ValueErrors: bare Exceptions, and Rust panics, which are
    BaseExceptions."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, ValueError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{message}: {error}") from error
