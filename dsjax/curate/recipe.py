"""What to prepare: sources, rules and options, checked before anything is read."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import ClassVar, Literal

from dsjax.config.rules import require, require_fraction, require_not_negative

KINDS = ("web", "plain", "code", "math")
LANGUAGES = ("en", "zh")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Files of one origin, to which one set of rules applies."""

    name: str  # begins the id of each document
    files: str  # globs, separated by commas: text, JSON lines or parquet, as in data.files
    # web: pages. plain: books, manuals, articles. code: source files. math: text with formulas.
    kind: Literal["web", "plain", "code", "math"] = "plain"
    text_field: str = "text"  # of JSON lines and parquet files
    # Each folder at the top of `files` is a repository, of which the files become one document:
    # behind those that they import (DeepSeek-Coder), or at random (DeepSeek-Coder-V2).
    repositories: Literal["off", "imports", "random"] = "off"

    def __post_init__(self) -> None:
        require(
            bool(_NAME.fullmatch(self.name)),
            f"the source name {self.name!r} must be letters, digits, '.', '_' and '-', beginning "
            "with a letter or digit",
        )
        require(bool(self.files.strip()), f"source {self.name}: files names none; give a glob")
        require(
            self.kind in KINDS,
            f"source {self.name}: kind={self.kind!r} must be one of {', '.join(KINDS)}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """One preparation."""

    tool: ClassVar[str] = "tools/prepare.py"

    sources: tuple[Source, ...]
    # Of web, plain and math; documents in other languages are removed.
    languages: tuple[str, ...] = LANGUAGES
    # How sure fastText must be of the language, 0..1. Lists, tables and names lower its score.
    language_score: float = 0.65
    # Changes of thresholds: KIND.LANGUAGE.SIGNAL=LOW..HIGH or =off, such as
    # web.en.words=20..100000 or code.any.parses=off (docs/prepare.md lists them).
    rules: tuple[str, ...] = ()
    # A record that cannot be read, or the rest of a file: stop, or go on and write it down.
    on_bad: Literal["stop", "skip"] = "stop"
    # near: of documents that are alike, one stays; exact: of equal ones. Of two, the one of the
    # earlier source stays, then the longer one.
    duplicates: Literal["near", "exact", "off"] = "near"
    jaccard: float = 0.8  # alike is what has this share of five-word shingles in both
    # Passages of this many bytes or more that occurred before in the same shard are cut out of what
    # is kept; 0: none.
    passages: int = 0
    # Globs of evaluation files; documents that quote them are removed.
    decontaminate: str = ""
    # E-mail addresses, public IPv4 addresses and keys in what is kept: replace, or keep.
    personal: Literal["replace", "keep"] = "replace"
    # Share of the Python files in the train text whose local variables get other names: not of
    # DeepSeek's recipes. Their ids end in "#renamed".
    rename: float = 0.0
    heldout_fraction: float = 0.01  # of the kept documents
    shard_bytes: int = 64 << 20  # of text; a worker holds a few times as much
    # A tokenizer.json: the result is tokenized with it into the cache that training reads.
    tokenizer: str = ""
    cache_dir: str = ""  # of tokens; empty: $XDG_CACHE_HOME/dsjax or ~/.cache/dsjax
    samples: int = 10  # kept and removed documents per rule in the report
    seed: int = 0  # of the split and the samples

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        require(bool(names), "the recipe has no sources; add one, or give --input GLOB")
        twice = [name for name in names if names.count(name) > 1]
        require(not twice, f"two sources are called {twice[:1]}; give each its own name")
        unknown = [language for language in self.languages if language not in LANGUAGES]
        require(
            not unknown and bool(self.languages),
            f"languages={','.join(self.languages)!r} must be one or more of "
            f"{', '.join(LANGUAGES)}, for which there are rules",
        )
        require_fraction("recipe", self, "heldout_fraction", "rename", "language_score")
        require(
            0.3 <= self.jaccard <= 1,
            f"jaccard={self.jaccard} must lie between 0.3, where most pairs are alike, and 1",
        )
        require_not_negative("recipe", self, "seed", "samples")
        require(
            self.shard_bytes >= 1 << 10,
            f"shard_bytes={self.shard_bytes} must be at least 1024",
        )
        require(
            self.passages == 0 or self.passages >= 50,
            f"passages={self.passages} must be 0, or at least 50 bytes: shorter ones are phrases",
        )
        require(
            self.passages == 0 or self.shard_bytes <= 1 << 30,
            f"passages needs shards of at most 1 GiB; shard_bytes={self.shard_bytes}",
        )
        require(
            not self.tokenizer or self.heldout_fraction > 0,
            "tokenizer needs held-out text beside the train text; set heldout_fraction above 0",
        )
        for change in self.rules:
            parse_change(change)


def parse_change(text: str) -> tuple[str, str, str, tuple[float, float] | None]:
    """Reads a change of a threshold: kind, language, signal, and the bounds between which documents
    are kept; None turns the rule off.

    Raises:
      ValueError: the text is not of the form KIND.LANGUAGE.SIGNAL=LOW..HIGH.
    """
    key, _, value = text.partition("=")
    parts = key.strip().split(".")
    form = "write KIND.LANGUAGE.SIGNAL=LOW..HIGH or =off, such as web.en.words=20..100000"
    require(len(parts) == 3 and bool(value), f"rules: {text!r} is no rule; {form}")
    kind, language, signal = parts
    if value.strip() == "off":
        return kind, language, signal, None
    low, dots, high = value.partition("..")
    try:
        bounds = float(low or -math.inf), float(high or math.inf)
    except ValueError:
        bounds = math.nan, math.nan
    require(
        bool(dots) and bounds[0] <= bounds[1],
        f"rules: {value!r} of {text!r} is no range of numbers; {form}",
    )
    return kind, language, signal, bounds
