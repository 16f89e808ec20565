"""The text of a run: its corpus and its rows, as the config says, and what to tell of them."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from dsjax import tables
from dsjax.config import Config
from dsjax.data.corpus import REJECTED, Corpus, Progress, prepare_corpus
from dsjax.data.documents import find_parts
from dsjax.data.mixture import MixedRows
from dsjax.data.packing import PackedSequences


def corpus_of(config: Config, progress: Progress | None = None) -> Corpus:
    """Returns the text that a config trains on and is scored on, tokenized now or cached."""
    data = config.data
    return prepare_corpus(
        files=data.files,
        heldout_files=data.heldout_files,
        heldout_fraction=data.heldout_fraction,
        text_field=data.text_field,
        apart=bool(data.weights),
        skip=data.on_bad_record == "skip",
        tokenizer_path=data.tokenizer,
        vocab_size=config.model.vocab_size,
        cache_dir=data.cache_dir,
        progress=progress,
    )


def training_rows(config: Config, corpus: Corpus) -> PackedSequences | MixedRows:
    """Returns the rows that a config's steps take, in order.

    Raises:
      ValueError: a part of the text is shorter than a row, or weights and parts differ in number.
    """
    data, n = config.data, len(config.data.weights)
    parts = corpus.train_parts() if n else [corpus.train]
    if n and n != len(parts):
        raise ValueError(
            f"data.weights has {n} numbers and data.files={data.files!r} {len(parts)} globs; give "
            "one weight for each"
        )
    rows = [
        PackedSequences(
            part,
            corpus.tokenizer.special,
            sequence_length=data.sequence_length,
            seed=data.seed,
            fim_rate=data.fim_rate,
        )
        for part in parts
    ]
    return MixedRows(rows, data.weights, seed=data.seed) if n else rows[0]


def show(
    console: Console,
    config: Config,
    corpus: Corpus,
    rows: PackedSequences | MixedRows,
    sequences: int,
) -> None:
    """Prints what the corpus is, what it does without, and of a mixture how much of each part the
    run reads with `sequences` rows.
    """
    lines = [
        f"text: {corpus.train.total_tokens:,} tokens in {len(corpus.train):,} documents, "
        f"{corpus.heldout.total_tokens:,} in {len(corpus.heldout):,} held out"
    ]
    if corpus.copies:
        left = f"; {corpus.left_out:,} of held-out ones are left out" if corpus.left_out else ""
        lines.append(f"{corpus.copies:,} documents are copies of others{left}")
    if corpus.rejected:
        lines.append(f"{corpus.rejected:,} records or files could not be read: see {REJECTED}")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if isinstance(rows, MixedRows):
        console.print(_mixture(config, rows, sequences))


def _mixture(config: Config, rows: MixedRows, sequences: int) -> Table:
    patterns = [pattern for pattern, _ in find_parts(config.data.files)]
    each = zip(patterns, rows.shares, rows.counts(sequences), rows.parts, strict=True)
    parts = [
        (pattern, f"{share:.1%}", count, f"{part.epochs(count):.2f}")
        for pattern, share, count, part in each
    ]
    return tables.table("mixture", ("files", ">share", ">rows", ">epochs"), parts, wraps="files")
