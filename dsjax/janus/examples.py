"""Examples of the three kinds as tokens: to see, to read, to draw.

  see   a conversation about a picture (`dsjax.infer.pictured`); the answer and its end are trained
  text  a document, all of it trained; a longer one is cut into pieces
  draw  a prompt up to the token that begins a picture, and a placeholder for each code, or each
        position of latents

Prompts are those that tools/generate.py and tools/draw.py make, so a model is asked as it learned.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsjax.config.janus import Janus
from dsjax.data.documents import find_sources, read_documents
from dsjax.infer.drawing import prompt_of
from dsjax.infer.pictured import PICTURES, PicturedFormat
from dsjax.janus.codes import codes_of
from dsjax.janus.encodings import Progress
from dsjax.janus.latents import latents_of
from dsjax.janus.pairs import Pair, Picture, read_pairs
from dsjax.posttrain.messages import TokenizedConversations
from dsjax.text.chat import Message
from dsjax.vision import pictures


@dataclasses.dataclass(frozen=True)
class Examples:
    """Examples of one kind.

    Attributes:
      tokens: their ids, and which are trained.
      pictures: of each, if they are to see or are drawn by a flow; else empty.
      n_squares: of each picture that is seen, int [n]; None if none is.
      codes: of each, int32 [n, codes], if they are drawn by codes; else None.
      latents: of each, as `latents_of` returns them, if they are drawn by a flow; else None.
    """

    tokens: TokenizedConversations
    pictures: Sequence[Picture] = ()
    n_squares: np.ndarray | None = None
    codes: np.ndarray | None = None
    latents: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def room(self, length: int) -> int:
        """Returns how many tokens of examples a row of T + 1 tokens has room for."""
        # The last token is not run, only predicted, and where latents move is said where they are.
        return length if self.latents is None else length - 1

    def digests(self) -> np.ndarray:
        """Returns a 64-bit hash of each one's tokens and picture, uint64 [n]."""
        found = self.tokens.digests().copy()
        shown = self.pictures if self.codes is None else [each.tobytes() for each in self.codes]
        for number, picture in enumerate(shown):
            said = picture if isinstance(picture, bytes) else str(picture[:3]).encode()
            digest = hashlib.blake2b(said, digest_size=8).digest()
            found[number] ^= np.frombuffer(digest, "<u8")[0]
        return found


class Encoded(NamedTuple):
    """One example."""

    ids: list[int]
    n_read: int  # its first tokens, which are not predicted


def see_example(
    form: PicturedFormat, question: str, answer: str, outline: pictures.Picture
) -> Encoded:
    """Encodes a question about one picture, and the answer."""
    prompt = form.encode([Message("user", question, fields={PICTURES: (outline,)})])
    said = form.vocabulary.coder.encode(f"{form.gap}{answer}")
    return Encoded([*prompt, *said, *_end(form)], len(prompt))


def _seen(form: PicturedFormat, pair: Pair, question: str, outline: pictures.Picture) -> Encoded:
    try:
        return see_example(form, question, pair.text, outline)
    except ValueError as error:
        raise ValueError(f"{pair.place}: {error}") from error


def draw_example(form: PicturedFormat, text: str) -> Encoded:
    """Encodes what to draw; a placeholder stands for each code or position of latents."""
    prompt = prompt_of(form, text)
    ids = [*prompt, *[form.image_token] * form.vision.code_grid**2]
    return Encoded(ids, len(ids))  # no token is predicted


def text_examples(form: PicturedFormat, text: str, longest: int) -> Iterator[Encoded]:
    """Encodes a document, in pieces of at most `longest` tokens."""
    vocabulary = form.vocabulary
    begin = [] if vocabulary.bos is None else [vocabulary.coder.control[vocabulary.bos]]
    ids = [*begin, *vocabulary.coder.encode(text), *_end(form)]
    for first in range(0, len(ids), longest):
        yield Encoded(ids[first : first + longest], 0)


def _end(form: PicturedFormat) -> list[int]:
    vocabulary = form.vocabulary
    return [] if vocabulary.eos is None else [vocabulary.coder.control[vocabulary.eos]]


def read_examples(
    config: Janus,
    form: PicturedFormat,
    autoencoder: Callable[[], Any],
    cache: Path,
    say: Callable[[str], None],
    progress: Progress,
) -> dict[str, Examples]:
    """Reads the examples of the kinds that `janus.ratio` asks for.

    Args:
      autoencoder: opens the VQ tokenizer that codes are made with, or the VAE that makes latents.
      progress: of making them.

    Raises:
      ValueError: a kind has no files, or no example with room in a row; a file or a picture cannot
        be read; names it.
    """
    own, longest = config.janus, config.sequence_length + 1
    n_see, n_text, n_draw = config.counts
    found = {}
    if n_see:
        pairs = _pairs(config, "see", cache)
        outlines = [form.outline(pair.picture.read, str(pair.picture)) for pair in pairs]
        encoded = [
            _seen(form, pair, pair.question or own.question, outline)
            for pair, outline in zip(pairs, outlines, strict=True)
        ]
        tokens, kept = _packed(encoded, "see", config, longest, say)
        squares = np.array([len(outlines[number].squares) for number in kept])
        found["see"] = Examples(tokens, [pairs[number].picture for number in kept], squares)
    if n_text:
        sources = find_sources(own.text, key="janus.text")
        texts = (document.text for document in read_documents(sources))
        pieces = itertools.chain.from_iterable(text_examples(form, each, longest) for each in texts)
        found["text"] = Examples(_packed(pieces, "text", config, longest, say)[0])
    if n_draw:
        pairs, flows = _pairs(config, "draw", cache), form.vision.flow is not None
        encoded = [draw_example(form, pair.text) for pair in pairs]
        tokens, kept = _packed(encoded, "draw", config, longest - flows, say)
        shown = [pairs[number].picture for number in kept]
        grid = form.vision.code_grid
        if flows:
            latents = latents_of(shown, autoencoder(), grid, cache, progress)
            found["draw"] = Examples(tokens, shown, latents=latents)
        else:
            codes = codes_of(shown, autoencoder(), grid, cache, progress)
            found["draw"] = Examples(tokens, codes=codes)
    return found


def _pairs(config: Janus, kind: str, cache: Path) -> list[Pair]:
    files, key = getattr(config.janus, kind), f"janus.{kind}"
    if not files:
        raise ValueError(
            f"janus.ratio={config.janus.ratio} asks for rows that {kind}, and {key} is empty; name "
            f"pairs of pictures and texts: --set {key}=pairs/"
        )
    return list(read_pairs(files, cache, key=key))


def _packed(
    encoded: Iterable[Encoded],
    kind: str,
    config: Janus,
    room: int,
    say: Callable[[str], None],
) -> tuple[TokenizedConversations, list[int]]:
    """Joins the examples of at most `room` tokens; returns them, and which of all they are."""
    length = config.sequence_length
    ids: list[np.ndarray] = []
    trained: list[np.ndarray] = []
    kept: list[int] = []
    dropped = 0
    for number, each in enumerate(encoded):
        if len(each.ids) > room:
            dropped += 1
            continue
        kept.append(number)
        ids.append(np.asarray(each.ids, np.int32))
        trained.append(np.arange(len(each.ids)) >= each.n_read)
    if not kept and not dropped:
        files = getattr(config.janus, kind)
        raise ValueError(f"janus.{kind}={files!r} holds no example; name files that are not empty")
    if not kept:
        raise ValueError(
            f"none of the {dropped:,} examples of janus.{kind} has room in a row of "
            f"janus.sequence_length={length} tokens; raise it, or give more files"
        )
    offsets = np.cumsum([0, *map(len, ids)])
    said = f"janus.{kind}: {len(kept):,} examples, {offsets[-1]:,} tokens"
    if dropped:
        said += f"; {dropped:,} longer than janus.sequence_length={length}, dropped"
    say(said)
    joined = np.concatenate(ids), np.concatenate(trained)
    return TokenizedConversations(*joined, offsets, dropped, 0, 0), kept
