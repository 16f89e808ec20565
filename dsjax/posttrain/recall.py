"""Implements tools/recall.py: how well a model finds a fact, by length of the text and depth.

The model continues each question greedily, as plain text. Recall is the share of answers that begin
as they should, with Wilson's 95 % interval.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from rich.console import Console

from dsjax import display, tables
from dsjax.checkpoint.load import Checkpoint, open_checkpoint
from dsjax.data import documents
from dsjax.files import check_writable
from dsjax.generate.engine import Engine
from dsjax.generate.prefixes import PAGE
from dsjax.generate.request import Request
from dsjax.generate.sampling import Sampling
from dsjax.infer.weights import load_weights
from dsjax.parallel.mesh import submesh
from dsjax.parallel.sharding import parts
from dsjax.posttrain.evaluation import Measured, measure
from dsjax.posttrain.haystacks import Haystack, Kind, Maker, Question, lines_of
from dsjax.text import tokenizer
from dsjax.text.vocabulary import Vocabulary, open_vocabulary
from dsjax.train.plots import new_figure

_MOST_CHARACTERS = 8  # of text per token that a haystack needs, at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """What tools/recall.py is asked for; the fields are its arguments.

    Attributes:
      n: haystacks of each length.
      text: files or globs of the text around needles; none: the standard library's source code.
      max_batch: prompts that run together.
      json: file of the figures; "-" prints them.
      png: file of the heat map.
    """

    checkpoint: Path
    task: Kind = "needle"
    lengths: Sequence[int] = (1024, 4096)
    depths: int = 9
    n: int = 20
    seed: int = 0
    text: Sequence[str] = ()
    max_batch: int = 8
    json: str | None = None
    png: Path | None = None
    dtype: str | None = None
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
    override: Sequence[tuple[str, Any]] = ()

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Self:
        """Takes a tool's parsed arguments."""
        return cls(
            **{field.name: getattr(arguments, field.name) for field in dataclasses.fields(cls)}
        )


@dataclasses.dataclass(frozen=True)
class Found:
    """Which answers were right: bool [lengths, depths, haystacks]."""

    lengths: Sequence[int]
    depths: Sequence[float]
    right_LDN: np.ndarray

    @property
    def recall(self) -> np.ndarray:
        """The share of right answers, float64 [lengths, depths]."""
        return self.right_LDN.mean(axis=-1)

    def of_length(self, place: int) -> Measured:
        """Returns the recall of a length over all depths."""
        return measure(self.right_LDN[place].ravel().astype(float).tolist())


def run(asked: Search) -> None:
    """Searches with a checkpoint and shows what it found.

    Raises:
      ValueError: the checkpoint, a length or the text cannot be used; all of this is checked before
        the weights are read.
    """
    tables.check(asked.json)
    if asked.png:
        check_writable(asked.png)
        picture_format(asked.png)  # fails where it cannot be drawn
    checkpoint = open_checkpoint(asked.checkpoint, dict(asked.override))
    vocabulary = _vocabulary(checkpoint, asked)
    check(asked, checkpoint.model.max_seq_len)
    maker = Maker(
        asked.task, vocabulary, checkpoint.model.vocab_size, asked.depths, asked.seed, _lines(asked)
    )
    for length in asked.lengths:
        maker.haystack(length, 0)  # fails where the facts do not fit
    mesh = submesh(asked.mesh)
    with display.Display(Console(stderr=True)) as screen:
        model = load_weights(checkpoint, mesh, asked.dtype)
        # What the texts of a batch take, and two pages for the end of each question.
        known = max(asked.max_batch, parts("batch", mesh) if mesh else 1) * (
            max(asked.lengths) + 2 * PAGE * asked.depths
        )
        engine = Engine(model, max_batch=asked.max_batch, streaming=False, prefix_tokens=known)
        found = search(engine, maker, asked, screen.counting("questions"))
    if asked.png:
        draw(asked.png, found, f"{asked.task}, {asked.checkpoint}")
    tables.show(_summary(asked, found), _print, asked.json)


def check(asked: Search, limit: int) -> None:
    """Checks what does not depend on the tokenizer.

    Args:
      limit: the model's most positions.

    Raises:
      ValueError: a number is out of range.
    """
    for name in ("depths", "n", "max_batch"):
        if getattr(asked, name) < 1:
            value = getattr(asked, name)
            raise ValueError(f"--{name.replace('_', '-')} {value} is not at least 1")
    if asked.seed < 0:
        raise ValueError(f"--seed {asked.seed} is negative")
    if asked.text and asked.task != "needle":
        raise ValueError(f"--text is what surrounds needles: not together with --task {asked.task}")
    for length in asked.lengths:
        if not 1 <= length <= limit:
            raise ValueError(
                f"--lengths {length} is not between 1 and the model's limit of {limit} positions "
                "(model.max_seq_len, max_position_embeddings); ask for shorter texts, or give a "
                "Hugging Face folder other rope by --override"
            )


def search(
    engine: Engine,
    maker: Maker,
    asked: Search,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Found:
    """Asks all questions of all haystacks; lengths, n and max_batch are those of `asked`."""
    total, done = len(asked.lengths) * asked.n * maker.n_depths, 0
    right_LDN = np.zeros((len(asked.lengths), maker.n_depths, asked.n), bool)
    for place, length in enumerate(asked.lengths):
        for start in range(0, asked.n, asked.max_batch):
            numbers = range(start, min(start + asked.max_batch, asked.n))
            for number, depth, is_right in _answers(engine, maker, length, numbers):
                right_LDN[place, depth, number] = is_right
                done += 1
                progress(done, total)
    return Found(asked.lengths, maker.depths, right_LDN)


def _answers(
    engine: Engine, maker: Maker, length: int, numbers: Sequence[int]
) -> Iterator[tuple[int, int, bool]]:
    """Yields (haystack, depth, whether the answer is right)."""
    haystacks = [maker.haystack(length, number) for number in numbers]
    # The first questions run the haystacks, whose tokens are known to the others.
    first = [(place, 0) for place in range(len(haystacks))]
    others = [(place, depth) for place, _ in first for depth in range(1, maker.n_depths)]
    for group in (first, others):
        open_ = {
            engine.add(_request(haystacks[place], depth, maker.vocabulary)): (place, depth, [])
            for place, depth in group
        }
        while open_:
            for id, output in engine.step().items():
                place, depth, tokens = open_[id]
                tokens += output.tokens
                if output.finish is not None:
                    del open_[id]
                    question = haystacks[place].questions[depth]
                    yield numbers[place], depth, question.is_right(tokens, maker.vocabulary)


def _request(haystack: Haystack, depth: int, vocabulary: Vocabulary | None) -> Request:
    question: Question = haystack.questions[depth]
    return Request(
        prompt=haystack.prompt(question),
        max_new_tokens=haystack.new_tokens,
        sampling=Sampling(temperature=0.0),
        stop_ids=vocabulary.stop_ids if vocabulary else frozenset(),
    )


def _vocabulary(checkpoint: Checkpoint, asked: Search) -> Vocabulary | None:
    folder = checkpoint.tokenizer_folder
    if asked.task == "tokens" and not any(
        (folder / name).is_file() for name in tokenizer.FILE_NAMES
    ):
        return None
    return open_vocabulary(folder, checkpoint.model.vocab_size)


def _lines(asked: Search) -> list[str]:
    if asked.task != "needle":
        return []
    if asked.text:
        sources = documents.find_sources(asked.text, key="--text")
    else:
        sources = documents.embedded_sources()
    texts = (each.text for each in documents.read_documents(sources, text_field="text"))
    lines = lines_of(texts, _MOST_CHARACTERS * max(asked.lengths))
    if not lines:
        raise ValueError(f"--text {' '.join(asked.text)}: there is no text in it")
    return lines


def picture_format(path: Path) -> str:
    """Returns the format that a file's suffix names, PNG without one.

    Raises:
      ValueError: matplotlib cannot write it.
    """
    known = new_figure(1, 1).canvas.get_supported_filetypes()
    picture = path.suffix[1:].lower() or "png"
    if picture not in known:
        raise ValueError(f"{path}: cannot draw a .{picture}; use one of {', '.join(known)}")
    return picture


def draw(path: Path, found: Found, title: str) -> None:
    """Draws recall over length and depth."""
    figure = new_figure(2.5 + 0.9 * len(found.lengths), 1.8 + 0.4 * len(found.depths))
    axes = figure.add_subplot()
    image = axes.imshow(found.recall.T, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    axes.set(xlabel="tokens of the text", ylabel="depth of the fact", title=title)
    axes.set_xticks(range(len(found.lengths)), [f"{length:,}" for length in found.lengths])
    axes.set_yticks(range(len(found.depths)), [f"{depth:.0%}" for depth in found.depths])
    for (place, depth), share in np.ndenumerate(found.recall):
        axes.text(place, depth, f"{share:.0%}", ha="center", va="center", fontsize=8)
    figure.colorbar(image, ax=axes, label="recall")
    figure.savefig(path, dpi=120, format=picture_format(path))


def _summary(asked: Search, found: Found) -> dict[str, Any]:
    by_length = [found.of_length(place) for place in range(len(found.lengths))]
    return {
        "checkpoint": str(asked.checkpoint),
        "task": asked.task,
        "n": asked.n,
        "seed": asked.seed,
        "lengths": list(found.lengths),
        "depths": list(found.depths),
        "recall": [each.value for each in by_length],
        "intervals": [{"low": each.low, "high": each.high} for each in by_length],
        "recall_by_depth": found.recall.tolist(),
    }


def _print(summary: dict[str, Any], console: Console) -> None:
    by_depth = np.asarray(summary["recall_by_depth"])
    rows = [
        (f"{depth:.0%}", *(f"{100 * share:.0f} %" for share in shares))
        for depth, shares in zip(summary["depths"], by_depth.T, strict=True)
    ]
    rows.append(("all", *(f"{100 * share:.1f} %" for share in summary["recall"])))
    intervals = (
        f"{100 * each['low']:.1f} to {100 * each['high']:.1f} %" for each in summary["intervals"]
    )
    rows.append(("95 % interval", *intervals))
    title = f"recall: {summary['task']}, {summary['n']} texts of each length"
    console.print(tables.table(title, ("depth", *(f">{x:,}" for x in summary["lengths"])), rows))
