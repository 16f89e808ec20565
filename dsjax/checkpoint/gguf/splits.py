"""The pre-tokenizers that llama.cpp knows by name: how each cuts a text into words before merging.

A GGUF file names its pre-tokenizer and cannot describe one. So a tokenizer.json's is recognized by
what it does: it is the one whose cuts of a long probe text are the same. The patterns are those of
the published tokenizers, in the syntax of the library `tokenizers`.
"""

from __future__ import annotations

import functools
import random
from typing import Any

from tokenizers import Regex, pre_tokenizers

from dsjax.text.tiktoken_file import PATTERN as KIMI
from dsjax.text.tokenizer import PATTERNS as OWN

# Latin, Greek, Cyrillic and other cased letters, by their code points.
_CASED = """
    b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376 377 37b-37d 37f 386 388-38a 38c
    38e-3a1 3a3-3f5 3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd 1c90-1cba 1cbd-1cbf
    1d00-1d2b 1d6b-1d77 1d79-1d9a 1e00-1f15 1f18-1f1d 1f20-1f45 1f48-1f4d 1f50-1f57 1f59 1f5b 1f5d
    1f5f-1f7d 1f80-1fb4 1fb6-1fbc 1fbe 1fc2-1fc4 1fc6-1fcc 1fd0-1fd3 1fd6-1fdb 1fe0-1fec 1ff2-1ff4
    1ff6-1ffc 2102 2107 210a-2113 2115 2119-211d 2124 2126 2128 212a-212d 212f-2134 2139 213c-213f
    2145-2149 214e 2183 2184 2c00-2c7b 2c7e-2ce4 2ceb-2cee 2cf2 2cf3 a640-a66d a680-a69b a722-a76f
    a771-a787 a78b-a78e ab70-abbf fb00-fb06 fb13-fb17 ff21-ff3a ff41-ff5a 10400-1044f 104b0-104d3
    104d8-104fb 10c80-10cb2 10cc0-10cf2 118a0-118df 1e900-1e943
"""
_LETTERS = "A-Za-z" + "".join(
    "-".join(chr(int(end, 16)) for end in part.split("-")) for part in _CASED.split()
)
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# In the order of the tests; each pattern cuts the pieces that the one before it has left.
_PATTERNS: dict[str, tuple[str, ...]] = {
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
        r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
    ),
    "deepseek-llm": (
        "[\r\n]",
        rf"\s?[{_LETTERS}]+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        _CJK,
        r"\p{N}+",
    ),
    "deepseek-coder": ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}"),
    "llama-bpe": (_WORDS % r"\p{N}{1,3}",),
    "qwen2": (_WORDS % r"\p{N}",),
    "gpt-2": (),  # the library's own ByteLevel
    "kimi-k2": (KIMI,),
}
# The tokenizer that dsjax trains. It cuts like DeepSeek-V3's, but a line break takes the
# indentation after it, and runs of Chinese and Japanese are words like others.
_NEAREST = {OWN: "deepseek-v3"}


def named(name: str) -> pre_tokenizers.PreTokenizer:
    """Returns the pre-tokenizer that llama.cpp knows by this name.

    Raises:
      ValueError: the name is not one of those that can be read here.
    """
    # The distills from Qwen cut like Qwen.
    name = {"deepseek-r1-qwen": "qwen2", "llama3": "llama-bpe"}.get(name, name)
    if name not in _PATTERNS:
        raise ValueError(
            f"the pre-tokenizer {name!r} is not one of {', '.join(_PATTERNS)}, so its tokenizer "
            "cannot be rebuilt"
        )
    return _sequence(_PATTERNS[name])


def _sequence(patterns: tuple[str, ...]) -> pre_tokenizers.PreTokenizer:
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not patterns)
    return pre_tokenizers.Sequence([*splits, to_bytes]) if splits else to_bytes


def recognize(splitter: pre_tokenizers.PreTokenizer) -> tuple[str | None, bool]:
    """Finds the name of a pre-tokenizer.

    Returns:
      its name, and True if it cuts every text like that; for the tokenizer that dsjax trains, the
      name of the nearest one and False; None if llama.cpp knows none that is like it.
    """
    cuts = _cuts(splitter)
    for name, patterns in _PATTERNS.items():
        if cuts == _known_cuts(patterns):
            return name, True
    for patterns, name in _NEAREST.items():
        if cuts == _known_cuts(patterns):
            return name, False
    return None, False


@functools.cache
def _known_cuts(patterns: tuple[str, ...]) -> list[Any]:
    return _cuts(_sequence(patterns))


def _cuts(splitter: pre_tokenizers.PreTokenizer) -> list[Any]:
    return [splitter.pre_tokenize_str(text) for text in _probe()]


@functools.cache
def _probe() -> tuple[str, ...]:
    """Returns texts that mix letters of several scripts, digits, marks, punctuation, symbols, kinds
    of space and contractions in random order.
    """
    parts = [
        *"aZ\u00e9\u0436\u4e2d\u3042\u30ab\ud55c\u0639\u0e01\u01bb7\u0664\u00bd\u2167",
        *"\u0301\u0e31'\".,;:!?-_/\\()[]{}<>|@#$%&*+=^~`\uff01\u3002\u201c\u2014",
        *"\u20ac\u00a9\u2192\U0001f600\u00a0\u3000\t\n\r",
        *("'s", "'T", "'re", "'LL", "word", "Wort ", "12", "3456", "\r\n", "    ", "\n    x", " "),
        *("\u4e2d\u6587", "\u3072\u3089", " (", "):", "\n\n", " \n", "''", "--", "// ", "0x"),
    ]
    draw = random.Random(0)
    return tuple("".join(draw.choices(parts, k=100)) for _ in range(60))
