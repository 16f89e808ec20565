"""Language consistency: the share of a thought's words that are in the language asked for.

From 0 to 1; None for a thought without words. `language` of the problem is a code such as "en",
"zh" or "pt-BR". Languages are told apart by script, so that French counts as English does, both
being written in Latin letters. A word is a run of letters; each Chinese or Japanese character
counts as one. Left out are LaTeX, code, addresses, and single Latin or Greek letters, which are
variables in any language.

Source: DeepSeek-R1 (arXiv:2501.12948), section 2.3.2, which counts "the proportion of target
language words in the CoT" and does not say how.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

from dsjax.posttrain.answer import split

SECONDS, WALL_SECONDS = 5.0, 30.0
_CODES = {
    "CJK": "zh ja",
    "HIRAGANA": "ja",
    "KATAKANA": "ja",
    "HANGUL": "ko",
    "CYRILLIC": "ru uk be bg sr mk kk mn",
    "ARABIC": "ar fa ur",
    "DEVANAGARI": "hi mr ne",
    "LATIN": "en de fr es it pt nl sv da no fi pl cs sk hu ro hr sl lt lv et tr vi id ms tl sw ca",
    "GREEK": "el",
    "HEBREW": "he",
    "THAI": "th",
    "BENGALI": "bn",
    "TAMIL": "ta",
    "TELUGU": "te",
    "GEORGIAN": "ka",
    "ARMENIAN": "hy",
}
_SCRIPTS = {
    code: {script for script, codes in _CODES.items() if code in codes.split()}
    for code in sorted({code for codes in _CODES.values() for code in codes.split()})
}
_KIN = {"IDEOGRAPHIC": "CJK"}  # the sign that repeats a character is one
_EACH_A_WORD = {"CJK", "HIRAGANA", "KATAKANA"}
_VARIABLES = {"LATIN", "GREEK"}
_LEFT_OUT = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$[^$]*\$\$|\$[^$\n]*\$|\\\[.{0,2000}?\\\]"
    r"|\\\(.{0,2000}?\\\)|\\begin\{(\w{1,20}\*?)\}.{0,2000}?\\end\{\1\}"
    r"|\\[A-Za-z]+|https?://\S+",
    re.DOTALL,
)


def score(completion: str, problem: Mapping[str, Any]) -> float | None:
    wanted = _SCRIPTS[_code(problem["language"])]
    words = list(word_scripts(split(completion, problem)[0]))
    return sum(script in wanted for script in words) / len(words) if words else None


def complaint(problem: Mapping[str, Any]) -> str | None:
    """Says why the rule cannot judge answers to a problem; None if it can."""
    language = problem.get("language")
    if not isinstance(language, str) or _code(language) not in _SCRIPTS:
        return f"'language' is {language!r:.80}, none of {', '.join(sorted(_SCRIPTS))}"
    return None


def _code(language: str) -> str:
    return re.split("[-_]", language.strip().lower())[0]


def word_scripts(text: str) -> Iterator[str]:
    """Yields the script of each word of a text, as Unicode names it: LATIN, CJK, CYRILLIC."""
    text = unicodedata.normalize("NFKC", _LEFT_OUT.sub(" ", text))
    script, length = "", 0
    for character in [*text, " "]:
        found = _script(character)
        if found == "mark" and script:  # belongs to the letter before
            continue
        if script and (found != script or script in _EACH_A_WORD):
            if not (script in _VARIABLES and length == 1):
                yield script
            script = ""
        length = length + 1 if script else 1
        script = "" if found == "mark" else found


@functools.lru_cache(1 << 14)
def _script(character: str) -> str:
    """Returns the script of a letter, "mark" for what modifies one, "" for anything else."""
    kind = unicodedata.category(character)
    if kind.startswith("M"):
        return "mark"
    if not kind.startswith("L"):
        return ""
    script = unicodedata.name(character, "").partition(" ")[0].partition("-")[0]
    return _KIN.get(script, script)
