"""Implements tools/examine.py: how many questions about pictures a model answers rightly."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from rich.console import Console

from dsjax import tables
from dsjax.checkpoint import load
from dsjax.display import Display
from dsjax.files import write_json
from dsjax.generate.engine import Engine, Request
from dsjax.generate.sampling import Sampling
from dsjax.infer.looking import look_by, open_format
from dsjax.infer.pictured import PICTURES
from dsjax.infer.weights import load_weights
from dsjax.janus.questions import Asked, Question, read_questions
from dsjax.model.cache import check_split
from dsjax.parallel.mesh import submesh
from dsjax.posttrain.evaluation import measure
from dsjax.text.chat import Message
from dsjax.vision import pictures

_AT_ONCE = 64  # questions whose pictures are in memory together


class Examinee:
    """A model that answers questions about pictures, greedily."""

    def __init__(
        self, checkpoint: load.Checkpoint, mesh: Mesh | None, dtype: str | None, max_batch: int
    ) -> None:
        """Loads the model.

        Raises:
          ValueError: it does not see.
        """
        form = open_format(checkpoint)
        if form is None:
            raise ValueError(
                f"{checkpoint.path} is a language model alone, which does not see; name a "
                "checkpoint of Janus, Janus-Pro, JanusFlow, DeepSeek-VL or VL2"
            )
        self._form, self._vocabulary = form, form.vocabulary
        self._context = checkpoint.model.max_seq_len
        self._looking = look_by(form, checkpoint, mesh, dtype)
        self._engine = Engine(
            load_weights(checkpoint, mesh, dtype), max_batch=max_batch, streaming=False
        )

    def answers(
        self,
        asked: Sequence[Asked],
        max_new_tokens: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[str]:
        """Answers questions, in their order.

        Raises:
          ValueError: a picture cannot be decoded, or a question has no room; names it.
        """
        found = []
        for first in range(0, len(asked), _AT_ONCE):
            progress(first, len(asked))
            requests = []
            for each in asked[first : first + _AT_ONCE]:
                shown = [self._form.decode(data, each.place) for data in each.pictures]
                message = Message("user", each.text, {PICTURES: shown})
                prompt = self._encoded(message, each.place, max_new_tokens)
                requests.append(
                    Request(
                        tuple(prompt),
                        max_new_tokens,
                        Sampling(temperature=0.0),
                        self._vocabulary.stop_ids,
                        given=self._looking.given([message], prompt),
                    )
                )
            for output in self._engine.complete(requests):
                kept = [token for token in output.tokens if token not in self._vocabulary.stop_ids]
                found.append(self._vocabulary.coder.decode(kept).strip())
        progress(len(asked), len(asked))
        return found

    def _encoded(self, message: Message, place: str, max_new_tokens: int) -> list[int]:
        try:
            prompt = self._form.encode([message])
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        if len(prompt) + max_new_tokens > self._context:
            raise ValueError(
                f"{place} takes {len(prompt):,} tokens with its pictures, and a reply of "
                f"{max_new_tokens:,} more exceeds model.max_seq_len={self._context:,}; lower "
                "--max-new-tokens, or shorten the question or leave it out"
            )
        return prompt


def run(arguments: argparse.Namespace) -> None:
    """Runs tools/examine.py with its parsed arguments.

    Raises:
      ValueError: the checkpoint does not see, or a question or a picture cannot be read.
    """
    pictures.require_package()
    tables.check(arguments.json)
    questions = read_questions(arguments.questions, arguments.images)
    checkpoint = load.open_checkpoint(arguments.checkpoint, dict(arguments.override))
    mesh = submesh(arguments.mesh)
    check_split(checkpoint.model, mesh)
    examinee = Examinee(checkpoint, mesh, arguments.dtype, arguments.max_batch)
    with Display(Console(stderr=True)) as display:
        progress = display.counting(f"answering {len(questions):,} questions")
        asked = [each.asked for each in questions]
        replies = examinee.answers(asked, arguments.max_new_tokens, progress)
    report = marked(questions, replies)
    if arguments.json == "-":
        json.dump(report, sys.stdout, indent=1)
        return
    if arguments.json:
        write_json(Path(arguments.json), report)
    low, high = report["low"], report["high"]
    print(
        f"{report['right']:,} of {report['questions']:,} right: {report['accuracy']:.1%} "
        f"(95 %: {low:.1%} to {high:.1%})"
    )


def marked(questions: Sequence[Question], replies: Sequence[str]) -> Mapping[str, Any]:
    """Marks replies; returns accuracy with its 95 % interval, and every reply."""
    right = [each.is_right(reply) for each, reply in zip(questions, replies, strict=True)]
    found = measure([float(each) for each in right])
    return {
        "questions": len(questions),
        "right": sum(right),
        "accuracy": found.value,
        "low": found.low,
        "high": found.high,
        "replies": [
            {"place": each.place, "answers": list(each.answers), "reply": reply, "right": ok}
            for each, reply, ok in zip(questions, replies, right, strict=True)
        ],
    }
