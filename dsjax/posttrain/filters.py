"""Which sampled answers become training data, and why the others do not. Pure functions.

R1's authors kept, of the samples for a prompt, those that are right, and dropped thoughts with
mixed languages, long paragraphs and code blocks, since they read badly (arXiv:2501.12948, section
2.3.3). They give no figures; those below are ours, and repetitions are dropped too.

  cut off         the model did not end it within the tokens that it had
  not judged      the rule could not tell what it is worth
  wrong           it is worth less than 1 (only where right ones are to be kept)
  mixed language  less than 0.9 of its words are in one script, see `rewards.language`
  repeated        a passage of 40 characters occurs in it three times, without overlap
  duplicate       another answer to the same prompt has the same text, but for white space
  not the best    another answer to the same prompt is worth more, or as much and came before (only
                  where the best is to be kept)
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from dsjax.posttrain.rewards.language import word_scripts

Keep = Literal["right", "best", "all"]
REASONS = (
    "cut off", "not judged", "wrong", "mixed language", "repeated", "duplicate", "not the best",
)  # fmt: skip
RIGHT = 1.0
ONE_LANGUAGE = 0.9
PASSAGE, MOST_PASSAGES = 40, 2
_KIN = {"HIRAGANA": "CJK", "KATAKANA": "CJK"}  # Japanese mixes them with Chinese characters


@dataclasses.dataclass(frozen=True)
class Judged:
    """An answer with what it is worth; see `responses.Response`."""

    key: tuple[int, int]
    text: str
    tokens: int
    ended: bool
    worth: float | None


def sift(answers: Sequence[Judged], keep: Keep) -> tuple[list[Judged], dict[str, int]]:
    """Returns the answers to one prompt that are kept, in order, and how many are dropped by
    reason.
    """
    dropped = Counter[str]()
    kept: list[Judged] = []
    seen = set[str]()
    for answer in answers:
        reason = fault(answer, keep)
        spelled = " ".join(answer.text.split())
        if reason is None and spelled in seen:
            reason = "duplicate"
        if reason is None:
            seen.add(spelled)
            kept.append(answer)
        else:
            dropped[reason] += 1
    if keep == "best" and kept:
        best = max(kept, key=lambda answer: answer.worth or 0.0)  # the first of equals
        dropped["not the best"] += len(kept) - 1
        kept = [best]
    return kept, {reason: dropped[reason] for reason in REASONS if dropped[reason]}


def fault(answer: Judged, keep: Keep) -> str | None:
    """Returns why an answer is dropped, for reasons of its own; None if it has none."""
    if not answer.ended:
        return "cut off"
    if answer.worth is None and keep != "all":
        return "not judged"
    if keep == "right" and (answer.worth or 0.0) < RIGHT:
        return "wrong"
    if mixes_languages(answer.text):
        return "mixed language"
    return "repeated" if repeats(answer.text) else None


def mixes_languages(text: str) -> bool:
    """Tells whether less than ONE_LANGUAGE of a text's words are in one script."""
    scripts = Counter(_KIN.get(script, script) for script in word_scripts(text))
    return bool(scripts) and max(scripts.values()) < ONE_LANGUAGE * sum(scripts.values())


def repeats(text: str) -> bool:
    """Tells whether a passage of PASSAGE characters occurs more than MOST_PASSAGES times."""
    last: dict[str, int] = {}
    counts = Counter[str]()
    for start in range(len(text) - PASSAGE + 1):
        passage = text[start : start + PASSAGE]
        if start - last.get(passage, -PASSAGE) >= PASSAGE:
            last[passage] = start
            counts[passage] += 1
            if counts[passage] > MOST_PASSAGES and passage.strip():
                return True
    return False
