"""Scores given tokens under a model: loss, perplexity, bits per byte, and raw logits.

Long documents are scored in windows that overlap by half: each token is predicted once, with at
least half a window of context, or all that its document has (dsjax/infer/windows.py). Logits are
computed in chunks; those of a whole row never exist at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from dsjax.checkpoint.load import Checkpoint, open_checkpoint
from dsjax.display import Display
from dsjax.files import finite
from dsjax.generate.request import Given
from dsjax.infer import token_files, windows
from dsjax.infer.filled import NO_PICTURES, PictureFiles, fill
from dsjax.infer.token_files import ArrayWriter
from dsjax.infer.weights import load_weights
from dsjax.infer.windows import Text, TextFiles, Window
from dsjax.model.head import predict, token_scores
from dsjax.model.mixed_layers import check_parts
from dsjax.model.transformer import Embeddings, Transformer
from dsjax.parallel.context import arrange, fitting, restore
from dsjax.parallel.mesh import submesh
from dsjax.parallel.sharding import parts, stored_spec

Progress = Callable[[int, int], None]

_LOGITS = 1 << 25  # values at once: 128 MB
_ROW_TOKENS = 4096  # of a batch, where rows are shorter than that
_FLOAT32 = np.dtype(np.float32)


def _no_progress(done: int, total: int) -> None:
    """Shows nothing."""


@dataclasses.dataclass(frozen=True)
class Score:
    """Summed negative log-likelihood of some tokens."""

    nats: float
    tokens: int  # predicted tokens
    bytes: int = 0  # UTF-8 bytes of their text; 0 if unknown

    def figures(self) -> dict[str, float]:
        """Returns by name: loss in nats per token, perplexity, bits per byte of text, counts."""
        figures: dict[str, float] = {}
        if self.tokens:
            loss = self.nats / self.tokens
            figures |= {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
        if self.bytes:
            figures["bits_per_byte"] = self.nats / math.log(2) / self.bytes
        figures["tokens"] = self.tokens
        return figures | ({"bytes": self.bytes} if self.bytes else {})


class Outputs(NamedTuple):
    """Files for raw logits; None writes none."""

    logits: Path | None = None  # float32 [batch, length, vocab]
    # float32 [batch, length - 1, vocab] of the first MTP module: entry i predicts token i + 2 from
    # the hidden state of token i and the embedding of token i + 1.
    mtp_logits: Path | None = None


NO_OUTPUTS = Outputs()


class WindowScore(NamedTuple):
    """The scored tokens of one window."""

    owner: int
    nats: float
    tokens: int
    greedy: bool  # whether each was the most likely token


class Scorer:
    """A model on its mesh. One program is compiled per batch shape.

    Attributes:
      rows: rows of a batch, split over the mesh's batch axes.
    """

    def __init__(self, model: Transformer, mesh: Mesh | None = None, *, rows: int = 1) -> None:
        """
        Args:
          mesh: the mesh that the model was loaded on.
          rows: rows of a batch for each part of the mesh.
        """
        self.model = model
        self.rows = rows * (parts("batch", mesh) if mesh else 1)
        self._mesh = mesh

    def score(self, given: Iterable[Window], *, length: int) -> Iterator[WindowScore]:
        """Scores windows of at most `length` positions, in order, packed into rows of `length`."""
        rows: list[list[Window]] = []
        for row in windows.pack(given, length):
            rows.append(row)
            if len(rows) == self.rows:
                yield from self._score_rows(rows, length)
                rows = []
        if rows:
            yield from self._score_rows(rows, length)

    def _score_rows(self, rows: list[list[Window]], length: int) -> Iterator[WindowScore]:
        batch = windows.stack(rows, n_rows=self.rows, length=length)
        arrays = map(self._padded, (batch.inputs, batch.targets, batch.segment_ids))
        with self._on_mesh():
            scores = _token_scores(self.model, *arrays)
        nats, greedy = np.asarray(scores[0], np.float64), np.asarray(scores[1])
        for window, row, start in batch.places:
            scored = row, slice(start + window.first, start + window.size)
            yield WindowScore(
                window.owner,
                float(nats[scored].sum()),
                window.size - window.first,
                bool(greedy[scored].all()),
            )

    def hidden(
        self, tokens: np.ndarray, given: Sequence[Given | None] = (), *, mtp: bool
    ) -> Iterator[tuple[jax.Array, ...]]:
        """Yields the hidden states of each row of an int32 [batch, length], as the output head
        reads them: [length, D] of the main model and, with `mtp`, of the first MTP module.

        Args:
          given: for each row, embeddings that replace those of some of its tokens.
        """
        batch, length = tokens.shape
        n_rows = self.rows * max(_ROW_TOKENS // (length * self.rows), 1)
        n_rows = min(n_rows, -(-batch // self.rows) * self.rows)
        for start in range(0, batch, n_rows):
            rows = tokens[start : start + n_rows]
            with self._on_mesh():
                # The last batch is padded with rows that are not read, to keep one shape.
                filled = self._padded(np.resize(rows, (n_rows, length)))
                embeddings = self._embeddings(given[start : start + n_rows], filled.shape)
                states = _hidden(self.model, filled, embeddings, mtp=mtp)
            for number in range(len(rows)):
                yield tuple(state[number, :length] for state in states)

    def _embeddings(
        self, given: Sequence[Given | None], shape: tuple[int, ...]
    ) -> Embeddings | None:
        if not any(given):
            return None
        given_BT = np.zeros(shape, bool)
        values_BTD = np.zeros((*shape, self.model.config.dim), np.float32)
        for row, some in enumerate(given):
            if some:
                given_BT[row, some.places] = True
                values_BTD[row, some.places] = some.values
        return Embeddings(given_BT, values_BTD)  # pyright: ignore[reportArgumentType]

    def logits(
        self, hidden_TD: jax.Array, targets: np.ndarray
    ) -> Iterator[tuple[jax.Array, np.ndarray]]:
        """Yields chunks of a row: logits [t, V] and the targets' negative log-likelihoods, float64
        [t], in nats.

        Args:
          targets: the ids that the first positions predict. The last chunk may have fewer.
        """
        width = _chunk(self.model)
        for start in range(0, len(hidden_TD), width):
            piece_TD, known = hidden_TD[start : start + width], targets[start : start + width]
            filled = np.pad(known, (0, len(piece_TD) - len(known)))
            with self._on_mesh():
                logits, nats = _logits(self.model, piece_TD, filled)
            yield logits, np.asarray(nats, np.float64)[: len(known)]

    def _padded(self, x_BT: np.ndarray) -> np.ndarray:
        """Adds zeros, which no earlier token sees, up to a length that divides over the mesh."""
        length = x_BT.shape[1]
        return np.pad(x_BT, ((0, 0), (0, fitting(length, self._mesh) - length)))

    def _on_mesh(self) -> contextlib.AbstractContextManager[object]:
        return jax.set_mesh(self._mesh) if self._mesh else contextlib.nullcontext()


def run(arguments: argparse.Namespace) -> None:
    """Runs tools/score.py with its parsed arguments.

    Raises:
      ValueError: see `score_files`.
    """
    text = None
    if arguments.text:
        field = arguments.text_field or "text"
        text = TextFiles(arguments.text, field, not arguments.no_bos)
    result = score_files(
        open_checkpoint(arguments.checkpoint, dict(arguments.override)),
        text=text,
        tokens=arguments.tokens,
        pictures=PictureFiles(arguments.image or (), arguments.pixels, arguments.high_pixels),
        outputs=Outputs(arguments.logits, arguments.mtp_logits),
        length=arguments.sequence_length,
        dtype=arguments.dtype,
        mesh=submesh(arguments.mesh),
        progress=Display(Console(stderr=True)).counting("scoring"),
    )
    figures = result.figures()
    if arguments.json:
        print(json.dumps(finite(figures), indent=2))
        return
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):<14}{value:{',' if isinstance(value, int) else ',.4f'}}")


def score_files(
    checkpoint: Checkpoint,
    *,
    text: TextFiles | None = None,
    tokens: Path | None = None,
    pictures: PictureFiles = NO_PICTURES,
    outputs: Outputs = NO_OUTPUTS,
    length: int = 0,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    progress: Progress = _no_progress,
) -> Score:
    """Scores text files, or a .npy of token ids, under a checkpoint.

    Args:
      text: files of text; `length` is that of a window, 0 for the default.
      tokens: ids [batch, length], if there is no text; `outputs` and `pictures` apply to these.
      pictures: what fills the placeholders among them.
      dtype: of weights and computation; None: see `weights.choose_dtype`.

    Raises:
      ValueError: the checkpoint, the text or the ids cannot be used, or a file cannot be written,
        all of which is checked before the weights are read; or the logits are not finite.
    """
    model = checkpoint.model
    check_parts(model, parts("length", mesh) if mesh else 1)
    if text:
        length = windows.window_length(length, model.max_seq_len)
        given = windows.read_text(text, checkpoint.tokenizer_folder, model.vocab_size)
        rows = rows_together(given.tokens, length, parts("batch", mesh) if mesh else 1)
        scorer = Scorer(load_weights(checkpoint, mesh, dtype, stored_spec), mesh, rows=rows)
        return score_text(scorer, given, length=length, progress=progress)
    assert tokens is not None
    ids = token_files.read_tokens(tokens, model.vocab_size, max_length=model.max_seq_len)
    token_files.check_outputs(outputs, tokens, *pictures.paths)
    if outputs.mtp_logits:
        check_mtp(model.n_mtp, ids.shape[1])
    given = fill(checkpoint, ids, pictures, mesh, dtype) if any(pictures) else ()
    scorer = Scorer(load_weights(checkpoint, mesh, dtype, stored_spec), mesh)
    return score_tokens(scorer, ids, outputs, given, progress=progress)


def rows_together(n_tokens: int, length: int, n_parts: int = 1) -> int:
    """Returns how many rows of a length to score at once on each of `n_parts` parts of a mesh:
    several short ones, for a batch reads all weights; no more than so many tokens fill.
    """
    return max(min(_ROW_TOKENS, n_tokens) // (length * n_parts), 1)


def score_text(
    scorer: Scorer, text: Text, *, length: int, progress: Progress = _no_progress
) -> Score:
    """Scores documents in windows of `length` tokens, at least 2, that overlap by half.

    Args:
      progress: called with the number of tokens done and in total.

    Raises:
      ValueError: the model's logits are not finite.
    """
    cut = (
        window
        for tokens in text.documents
        for window in windows.cut(tokens, length=length, stride=length // 2)
    )
    nats, tokens, expected = 0.0, 0, text.tokens
    for score in scorer.score(cut, length=length):
        nats, tokens = nats + score.nats, tokens + score.tokens
        progress(tokens, expected)
    assert tokens == expected
    return _checked(Score(nats, tokens, text.bytes))


def score_tokens(
    scorer: Scorer,
    tokens: np.ndarray,
    outputs: Outputs = NO_OUTPUTS,
    given: Sequence[Given | None] = (),
    *,
    progress: Progress = _no_progress,
) -> Score:
    """Scores the rows of an int32 [batch, length], each as a whole, and writes their raw logits.

    The first token of a row is not predicted, nor are those in whose place a picture stands.

    Args:
      given: for each row, what pictures put in the place of some tokens.
      progress: called with the number of rows done and in total.

    Raises:
      ValueError: MTP logits were requested of a model without MTP modules or for rows of one token;
        or the model's logits are not finite.
    """
    (batch, length), vocab = tokens.shape, scorer.model.config.vocab_size
    if outputs.mtp_logits:
        check_mtp(scorer.model.config.n_mtp, length)
    nats, predicted_BT = 0.0, np.ones((batch, length - 1), bool)
    for row, some in enumerate(given):
        if some:
            predicted_BT[row, some.places[some.places > 0] - 1] = False
    with contextlib.ExitStack() as files:

        def open_file(path: Path, positions: int) -> ArrayWriter:
            return files.enter_context(ArrayWriter(path, (batch, positions, vocab), _FLOAT32))

        main = open_file(outputs.logits, length) if outputs.logits else None
        mtp = open_file(outputs.mtp_logits, length - 1) if outputs.mtp_logits else None
        for row, states in enumerate(scorer.hidden(tokens, given, mtp=mtp is not None)):
            done = 0
            for logits, piece_nats in scorer.logits(states[0], tokens[row, 1:]):
                nats += float(piece_nats[predicted_BT[row, done : done + len(piece_nats)]].sum())
                done += len(piece_nats)
                if main:
                    main.write(np.asarray(logits))
            if mtp:
                for logits, _ in scorer.logits(states[1][: length - 1], tokens[row, 2:]):
                    mtp.write(np.asarray(logits))
            progress(row + 1, batch)
    return _checked(Score(nats, int(predicted_BT.sum())))


def check_mtp(n_mtp: int, length: int) -> None:
    """Raises ValueError if rows of this length have no MTP logits."""
    if not n_mtp:
        raise ValueError(
            "--mtp-logits needs a multi-token prediction module, and this checkpoint has none "
            "(model.n_mtp=0); omit it"
        )
    if length < 2:
        raise ValueError(
            f"--mtp-logits needs rows of at least two tokens, not {length}: an MTP module also "
            "reads the next token"
        )


def _checked(score: Score) -> Score:
    if not math.isfinite(score.nats):
        raise ValueError(
            f"the loss of these tokens is {score.nats}: the model's logits are not finite; check "
            "the checkpoint's weights (tools/convert.py import names those that are not finite)"
        )
    return score


def _chunk(model: Transformer) -> int:
    """Returns how many tokens' logits may exist at once."""
    return max(_LOGITS // model.config.vocab_size, 1)


@jax.jit
def _token_scores(
    model: Transformer, inputs_BT: jax.Array, targets_BT: jax.Array, segment_ids_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the negative log-likelihood of each target, float32 [B, T], and whether it is the
    most likely token, bool [B, T].
    """
    hidden_BTD = model.hidden(inputs_BT, segment_ids_BT, mtp=False).main_BTD
    scores = token_scores(
        hidden_BTD, model.head_weight(), arrange(targets_BT), model.policy, _chunk(model)
    )
    return restore(scores[0]), restore(scores[1])


@functools.partial(jax.jit, static_argnames="mtp")
def _hidden(
    model: Transformer, tokens_BT: jax.Array, embeddings: Embeddings | None, *, mtp: bool
) -> tuple[jax.Array, ...]:
    if embeddings is not None:
        values_DBT = arrange(jnp.moveaxis(embeddings.values_BTD, -1, 0))
        embeddings = Embeddings(arrange(embeddings.given_BT), jnp.moveaxis(values_DBT, 0, -1))
    hidden = model.hidden(tokens_BT, mtp=mtp, embeddings=embeddings)
    states = (
        (hidden.main_BTD,) if hidden.mtp_DBTD is None else (hidden.main_BTD, hidden.mtp_DBTD[0])
    )
    return tuple(map(restore, states))


@jax.jit
def _logits(
    model: Transformer, hidden_TD: jax.Array, targets_T: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the logits [T, V] of hidden states and the targets' negative log-likelihoods."""
    return predict(hidden_TD, model.head_weight(), targets_T, model.policy)[:2]
