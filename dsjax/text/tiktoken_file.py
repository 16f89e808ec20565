"""Converts `tiktoken.model`, the only tokenizer file of Moonlight and Kimi-K2, to tokenizer.json.

The file lists byte strings and their ranks, which are also their ids. tiktoken repeatedly merges
the adjacent pair whose concatenation has the lowest rank. A BPE of the `tokenizers` library does
the same if its merges are all pairs that form a listed byte string, in order of that string's rank.
Both encode a pre-tokenized word that is itself listed as that one token.

Releases keep the split pattern and the number of reserved tokens in Python code, which is not
executed; both are written here as in tokenization_kimi.py of Kimi-K2. tokenizer_config.json names
the control tokens.
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any

from dsjax.files import disguise

FILE_NAME = "tiktoken.model"
_CLASS = "TikTokenTokenizer"
_N_RESERVED = 256  # control tokens, after the byte strings
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def to_json(data: bytes, config: dict[str, Any], *, name: str) -> bytes:
    """Returns the tokenizer.json of a tiktoken.model.

    Args:
      config: tokenizer_config.json beside it.

    Raises:
      ValueError: the file is damaged, or it belongs to a tokenizer with other rules.
    """
    if what := disguise(data):
        raise ValueError(f"{name} is {what}")
    if config.get("tokenizer_class") != _CLASS:
        raise ValueError(
            f"{name}: tokenizer_config.json beside it says tokenizer_class="
            f"{config.get('tokenizer_class')!r}; only Moonlight's and Kimi-K2's {_CLASS} can be "
            "read; convert the tokenizer to tokenizer.json"
        )
    ranks = _read_ranks(data, name)
    text = _byte_characters()
    vocab = {"".join(map(text.__getitem__, word)): rank for word, rank in ranks.items()}
    merges = [
        ["".join(map(text.__getitem__, part)) for part in (word[:cut], word[cut:])]
        for word in ranks  # in the order of their ranks
        for cut in range(1, len(word))
        if word[:cut] in ranks and word[cut:] in ranks
    ]
    split = {
        "type": "Split",
        "pattern": {"Regex": PATTERN},
        "behavior": "Isolated",
        "invert": False,
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    byte_level["use_regex"] = False
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": _control_tokens(len(ranks), config),
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "decoder": byte_level,
            "model": {"type": "BPE", "ignore_merges": True, "vocab": vocab, "merges": merges},
        }
    ).encode()


def _read_ranks(data: bytes, name: str) -> dict[bytes, int]:
    """Returns the byte strings in order of their ranks 0, 1, 2 ..."""
    ranks: dict[bytes, int] = {}
    try:
        for line in data.splitlines():
            if line:
                word, rank = line.split()
                ranks[base64.b64decode(word, validate=True)] = int(rank)
    except (ValueError, binascii.Error) as error:
        raise ValueError(
            f"{name} is not a list of byte strings and ranks ({error}); copy it again from the "
            "release"
        ) from error
    ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
    whole = list(ranks.values()) == list(range(len(ranks)))
    if not whole or not all(bytes([byte]) in ranks for byte in range(256)):
        raise ValueError(
            f"{name} lacks ranks or single bytes ({len(ranks)} entries); copy it again from the "
            "release"
        )
    return ranks


def _control_tokens(first: int, config: dict[str, Any]) -> list[dict[str, Any]]:
    """Lists the reserved tokens from id `first` on, named and flagged as the config says."""
    named = config.get("added_tokens_decoder") or {}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokens = []
    for number in range(first, first + _N_RESERVED):
        found = named.get(str(number), {})
        content = found.get("content", f"<|reserved_token_{number}|>")
        special = found.get("special", True)
        tokens.append({"id": number, "content": content, "special": special, **plain})
    return tokens


def _byte_characters() -> dict[int, str]:
    """Maps each byte to the character that stands for it in byte-level BPE files, as in GPT-2: its
    Latin-1 character if printable, else the next one from U+0100 on.
    """
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {
        byte: chr(256 + index) for index, byte in enumerate(hidden)
    }
