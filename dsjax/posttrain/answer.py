"""The parts of a reply: the thought, the answer after it, and what the answer puts in a box."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

THINK, END_THINK = "<think>", "</think>"
MOST_BOXED = 2000  # characters; what is longer is no answer
MOST_BOXES = 100
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=[{\s\d])")
_DRESS = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}|[\s$]|\\[,;! ]|\\left|\\right")
_FENCE = re.compile(r"^[ \t]*```([^\n`]*)\n(.*?)^[ \t]*```[ \t]*$", re.MULTILINE | re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def opened(problem: Mapping[str, Any]) -> bool | None:
    """Tells whether the prompt opened the thought: as `problem["opened"]` says, else as the end of
    a prompt of text shows; None if neither is there.
    """
    if (said := problem.get("opened")) is not None:
        return bool(said)
    prompt = problem.get("prompt")
    return prompt.rstrip().endswith(THINK) if isinstance(prompt, str) else None


def split(completion: str, problem: Mapping[str, Any]) -> tuple[str, str | None]:
    """Returns the thought and the answer, "" for no thought, None for an answer that never comes.

    Only what follows the last </think> is the answer. A thought that was opened, by the prompt or
    by the completion, and never ends leaves no answer; so does one that is opened again.
    """
    thought, mark, answer = completion.rpartition(END_THINK)
    if THINK in answer or (not mark and opened(problem)):
        return completion.replace(THINK, ""), None
    return thought.replace(THINK, "").replace(END_THINK, ""), answer


def last_box(text: str) -> str | None:
    """Returns what the last \\boxed{...} or \\fbox{...} of a text holds, as "\\boxed 5" does; None
    without one or if its brace is never closed.
    """
    *_, last = [None, *_BOX.finditer(text)]
    return None if last is None else _held(text[last.end() : last.end() + MOST_BOXED + 3])


def all_boxes(text: str) -> list[str]:
    """Returns what the boxes of a text hold, in order; at most MOST_BOXES of the last."""
    starts = [found.end() for found in _BOX.finditer(text)][-MOST_BOXES:]
    held = [_held(text[start : start + MOST_BOXED + 3]) for start in starts]
    return [box for box in held if box is not None]


def _held(text: str) -> str | None:
    """Returns what the brace at the start of a text holds, or its first word."""
    text = text.lstrip()
    if not text.startswith("{"):
        return text.split(maxsplit=1)[0].rstrip(".,$") if text else None
    depth, escaped = 0, False
    for index, character in enumerate(text):
        if not escaped and character in "{}":
            depth += 1 if character == "{" else -1
            if not depth:
                return text[1:index]
        escaped = character == "\\" and not escaped
    return None


def final(completion: str, problem: Mapping[str, Any]) -> str | None:
    """Returns what a completion gives as its answer, by itself and without dress, to be compared as
    text: what its last box holds, else its last <answer>...</answer>; None without either.
    """
    answer = split(completion, problem)[1]
    if answer is None:
        return None
    inside = tagged(answer)
    box = last_box(answer if inside is None else inside)
    found = inside if box is None else box
    return None if found is None else undressed(found) or None


def undressed(text: str) -> str:
    """Removes what does not change what is written: spaces, dollars, \\text, a final stop."""
    while (less := _DRESS.sub(lambda found: found[1] or "", text)) != text:
        text = less
    text = text.rstrip(".")
    # The letter of a choice.
    return text[1] if re.fullmatch(r"\([A-Za-z]\)", text) else text


def last_block(text: str, kinds: Collection[str] | None = None) -> str | None:
    """Returns the last fenced block of a text; None without one.

    Args:
      kinds: names after the fence, in lower case, that count; None: all.
    """
    found = [
        block
        for kind, block in _FENCE.findall(text)
        if kinds is None or kind.strip().lower() in kinds
    ]
    return found[-1] if found else None


def tagged(answer: str) -> str | None:
    """Returns what the last <answer>...</answer> holds; None without one."""
    found = _ANSWER.findall(answer)
    return found[-1] if found else None
