"""The format of a reply: R1's `<think>...</think><answer>...</answer>`.

1 if the whole reply is a thought and then an answer, each tag there once and in this order, with
nothing but white space before, between and after, and both not empty; else 0. Where the prompt ends
inside the thought, as R1's does, the completion begins without the opening tag; having it twice is
wrong. `problem["opened"]` says so, else the end of a prompt of text; where neither is known, a
completion may begin either way.

Source: DeepSeek-R1 (arXiv:2501.12948), section 2.2.2 and table 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dsjax.posttrain.answer import END_THINK, THINK, opened

SECONDS, WALL_SECONDS = 5.0, 30.0
_TAGS = (THINK, END_THINK, "<answer>", "</answer>")
_WHOLE = re.compile(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", re.DOTALL)


def score(completion: str, problem: Mapping[str, Any]) -> float:
    begun = opened(problem)
    if begun is None:
        begun = not completion.lstrip().startswith(THINK)
    whole = THINK + completion if begun else completion
    if any(whole.count(tag) != 1 for tag in _TAGS):
        return 0.0
    found = _WHOLE.fullmatch(whole)
    return float(found is not None and all(part.strip() for part in found.groups()))


def complaint(problem: Mapping[str, Any]) -> str | None:
    """Says why the rule cannot judge answers to a problem; None if it can: always."""
    del problem
    return None
