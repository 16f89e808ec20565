"""The tokenizer of a checkpoint's folder, and the tokens that begin and end a text.

Reads tokenizer.json or tiktoken.model, and tokenizer_config.json, generation_config.json,
config.json and processor_config.json beside it where they exist.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from dsjax import files
from dsjax.text import sandbox, tiktoken_file, tokenizer
from dsjax.text.added_tokens import added_tokens, show_marks
from dsjax.text.tokenizer import BOS, EOS, Coder

MAX_TOKENIZER = 256 << 20  # bytes; the largest released files have 20 million
THINK, END_THINK = "<think>", "</think>"


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A tokenizer and what a checkpoint says about its tokens."""

    coder: Coder
    bos: str | None  # names of the begin and end tokens
    eos: str | None
    begins: bool  # whether plain text starts with the begin token
    stop_ids: frozenset[int]  # tokens that end a reply
    config: dict[str, Any]  # tokenizer_config.json

    @property
    def think_ids(self) -> tuple[int, int] | None:
        """The ids of <think> and </think>, if the tokenizer has both."""
        control = self.coder.control
        both = THINK in control and END_THINK in control
        return (control[THINK], control[END_THINK]) if both else None

    def plain_prompt(self, text: str) -> list[int]:
        """Encodes a text to be continued.

        It starts with the begin token unless tokenizer_config.json says `"add_bos_token": false`,
        as models see texts in training. (transformers 5 adds none where the key is absent.)

        Raises:
          ValueError: the text is empty and there is no begin token to start from.
        """
        first = [self.coder.control[self.bos]] if self.begins and self.bos else []
        ids = [*first, *self.coder.encode(text)]
        if not ids:
            raise ValueError(
                "the prompt is empty and there is no begin token to start from; give some text"
            )
        return ids


def open_vocabulary(folder: Path, vocab_size: int) -> Vocabulary:
    """Reads the tokenizer in a checkpoint's folder.

    Args:
      vocab_size: the model's. A tokenizer may have fewer tokens, since releases round the embedding
        up, but not more.

    Raises:
      ValueError: there is no tokenizer file, or it cannot be read; it has ids that the model lacks;
        a config is damaged or names a token that does not exist.
    """
    path = next(filter(Path.exists, (folder / name for name in tokenizer.FILE_NAMES)), None)
    if path is None:
        raise ValueError(
            f"{folder} has neither {' nor '.join(tokenizer.FILE_NAMES)}, so text cannot become "
            "tokens; copy the one that the release has"
        )
    config = _read(folder / "tokenizer_config.json")
    data = files.read_regular(path, MAX_TOKENIZER)
    if what := files.disguise(data):
        raise ValueError(f"{path} is {what}")
    if path.name == tiktoken_file.FILE_NAME:
        data = tiktoken_file.to_json(data, config, name=str(path))
    try:
        sandbox.try_tokenizer(data)
    except ValueError as error:
        raise ValueError(
            f"{path} is not a tokenizer that can be used: {error}; copy it again from the release"
        ) from error
    added = added_tokens(folder, config)
    inner = tokenizer.from_bytes(show_marks(data) if added else data, name=str(path))
    bos = _name(inner, config, "bos_token", BOS, folder)
    eos = _name(inner, config, "eos_token", EOS, folder)
    # In some releases only the config says that these two are control tokens.
    inner.add_special_tokens([name for name in (bos, eos) if name is not None])
    for token in added:  # one by one: each has the next free id
        inner.add_tokens([token])
    coder = Coder(inner)
    if coder.vocab_size > vocab_size:
        raise ValueError(
            f"{path} has ids up to {coder.vocab_size - 1}, and the model has {vocab_size} tokens "
            f"(0 to {vocab_size - 1}); use the tokenizer that the checkpoint was trained with"
        )
    wanted = config.get("add_bos_token")
    if wanted is not None and not isinstance(wanted, bool):
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: add_bos_token={wanted!r} is not true or false; "
            "correct it, or remove it: texts then start with the begin token, if there is one"
        )
    stop_ids = set(_eos_ids(folder))
    if eos is not None:
        stop_ids.add(coder.control[eos])
    begins = bos is not None if wanted is None else wanted
    return Vocabulary(coder, bos, eos, begins, frozenset(stop_ids), config)


def _name(
    inner: tokenizers.Tokenizer, config: dict[str, Any], key: str, deepseeks: str, folder: Path
) -> str | None:
    """Returns the token that tokenizer_config.json names as `key`, else DeepSeek's if it exists."""
    name = config.get(key)
    if isinstance(name, dict):  # some releases wrap a token in an object
        name = name.get("content")
    if name is None:
        return deepseeks if inner.token_to_id(deepseeks) is not None else None
    if not isinstance(name, str) or inner.token_to_id(name) is None:
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: {key} is {name!r}, which tokenizer.json does not "
            "have; the two files belong to different checkpoints"
        )
    return name


def _eos_ids(folder: Path) -> Sequence[int]:
    """Returns the end-of-text ids of generation_config.json, else of config.json."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        found = _read(path).get("eos_token_id")
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        if not all(type(i) is int for i in ids):
            raise ValueError(f"{path}: eos_token_id={found!r} is neither an id nor a list of ids")
        return ids
    return []


def _read(path: Path) -> dict[str, Any]:
    return files.read_json(path) if path.is_file() else {}
