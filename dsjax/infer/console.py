"""Implements tools/generate.py: continue a text, answer a prompt, chat, or continue token ids.

If the checkpoint can chat, a prompt is a turn of a conversation; with a base model, or with --raw,
it is text to be continued. The reply is streamed to standard output, its speed goes to standard
error. A terminal shows the thought of a reply dim; elsewhere it stands between <think> and
</think>.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from jax.sharding import Mesh
from rich.console import Console

from dsjax.checkpoint import load
from dsjax.generate.engine import Engine, Statistics
from dsjax.generate.request import Given
from dsjax.generate.sampling import Sampling
from dsjax.generate.speculative import check as check_drafting
from dsjax.infer import places, token_files
from dsjax.infer.answers import (
    MOST_NEW_TOKENS,
    Generator,
    Settings,
    continue_tokens,
    default_sampling,
)
from dsjax.infer.looking import Looking, open_looking
from dsjax.infer.pictured import PICTURES
from dsjax.infer.weights import load_weights
from dsjax.model.cache import check_split
from dsjax.parallel.mesh import submesh
from dsjax.text.chat import ChatFormat, Message, find_format
from dsjax.text.reply import Piece
from dsjax.text.vocabulary import END_THINK, THINK, Vocabulary, open_vocabulary
from dsjax.vision.grounding import Box
from dsjax.vision.pictures import Picture

_HELP = "/reset forgets the conversation; /exit or Ctrl-D ends it; Ctrl-C stops a reply"
_IMAGE = "/image"
_HELP_PICTURES = "/image PATH shows a picture with your next message; " + _HELP
AnyFormat = ChatFormat | Looking
# Control characters in a reply could move the cursor, rename the window, or worse.
_UNSAFE = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def run(arguments: argparse.Namespace) -> None:
    """Runs tools/generate.py with its parsed arguments.

    Raises:
      ValueError: the checkpoint, its tokenizer or the tokens cannot be used, the prompt is too
        long, a base model should chat, the mesh would split a cache that stays whole, or the model
        has nothing to draft with. All of this is checked before the weights are read.
    """
    checkpoint = load.open_checkpoint(arguments.checkpoint, dict(arguments.override))
    named = {key: getattr(arguments, key) for key in ("temperature", "top_k", "top_p", "min_p")}
    given = {key: value for key, value in named.items() if value is not None}
    defaults = default_sampling(checkpoint.tokenizer_folder)
    sampling = dataclasses.replace(defaults, seed=arguments.seed, **given)
    mesh = submesh(arguments.mesh)
    check_split(checkpoint.model, mesh)
    if arguments.speculative:
        check_drafting(checkpoint.model)

    def open_engine() -> Engine:
        model = load_weights(checkpoint, mesh, arguments.dtype)
        return Engine(model, speculative=arguments.speculative)

    if arguments.tokens is not None:
        _run_tokens(arguments, checkpoint, sampling, open_engine)
    else:
        _run_text(arguments, checkpoint, sampling, mesh, open_engine)


def _run_tokens(
    arguments: argparse.Namespace,
    checkpoint: load.Checkpoint,
    sampling: Sampling,
    open_engine: Callable[[], Engine],
) -> None:
    config = checkpoint.model
    prompts_BT = token_files.read_tokens(
        arguments.tokens, config.vocab_size, max_length=config.max_seq_len
    )
    token_files.check_outputs([arguments.out], arguments.tokens)
    length = prompts_BT.shape[1]
    room = config.max_seq_len - length
    n_tokens = arguments.max_new_tokens or min(MOST_NEW_TOKENS, max(room, 1))
    if n_tokens > room:
        raise ValueError(
            f"{arguments.tokens}: rows of {length} tokens and --max-new-tokens {n_tokens} exceed "
            f"the model's context of {config.max_seq_len} (model.max_seq_len); shorten the rows or "
            "ask for fewer tokens"
        )
    engine = open_engine()
    new_BT = continue_tokens(engine, prompts_BT, max_new_tokens=n_tokens, sampling=sampling)
    with token_files.ArrayWriter(arguments.out, new_BT.shape, new_BT.dtype) as writer:
        writer.write(new_BT)
    print(describe(engine.statistics), file=sys.stderr)


def _run_text(
    arguments: argparse.Namespace,
    checkpoint: load.Checkpoint,
    sampling: Sampling,
    mesh: Mesh | None,
    open_engine: Callable[[], Engine],
) -> None:
    folder = checkpoint.tokenizer_folder
    vocabulary = open_vocabulary(folder, checkpoint.model.vocab_size)
    form = None
    if not arguments.raw:
        form = open_looking(checkpoint, mesh, arguments.dtype) or find_format(folder, vocabulary)
    shown = _read_pictures(arguments.image or (), form)
    if arguments.boxes:
        _check_boxes(arguments, form)
    if arguments.no_bos:
        if form is not None:
            raise ValueError("--no-bos applies to continued text, and this is a chat; add --raw")
        vocabulary = dataclasses.replace(vocabulary, begins=False)
    settings = Settings(
        vocabulary,
        context=checkpoint.model.max_seq_len,
        sampling=sampling,
        max_new_tokens=arguments.max_new_tokens or MOST_NEW_TOKENS,
        stops=tuple(arguments.stop or ()),
    )
    if arguments.prompt is not None:
        turn = _turn(arguments.prompt, shown)
        prompt = first_prompt(turn, vocabulary, form, thinking=arguments.thinking)
        settings.request(prompt)  # raises before the weights are read
        generator = Generator(open_engine(), settings)
        given = form.given([turn], prompt) if isinstance(form, Looking) else None
        boxes = _show_places([turn], answer(generator, prompt, given))
        if arguments.boxes:
            places.save(arguments.boxes, arguments.image[-1], boxes)
    elif form is not None:
        chat(Generator(open_engine(), settings), form, thinking=arguments.thinking, shown=shown)
    else:
        raise ValueError(
            f"{folder} has no chat template and its tokenizer no tokens for the two roles, as a "
            "base model's; give a --prompt to continue"
        )


def _check_boxes(arguments: argparse.Namespace, form: AnyFormat | None) -> None:
    places.check_target(arguments.boxes, (arguments.prompt and arguments.image) or ())
    if not isinstance(form, Looking) or not form.names_places:
        raise ValueError(
            f"{arguments.checkpoint} does not say where things are, so --boxes has nothing to "
            "draw; name a checkpoint of DeepSeek-VL2"
        )


def _show_places(turns: Sequence[Message], reply: str) -> list[Box]:
    """Prints the places that a reply names in the last picture of a conversation."""
    shown: list[Picture] = [each for turn in turns for each in turn.fields.get(PICTURES, ())]
    return places.show(reply, shown[-1].size, Console(stderr=True)) if shown else []


def _read_pictures(paths: Sequence[Path], form: AnyFormat | None) -> list[Picture]:
    """Reads the pictures for a message.

    Raises:
      ValueError: one cannot be read, or the model does not see.
    """
    if not paths:
        return []
    if not isinstance(form, Looking):
        raise ValueError(
            f"{paths[0]} cannot be shown: only a conversation (no --raw) with a model that sees, "
            "such as Janus-Pro, in the folder that it was published in, has pictures"
        )
    return form.read(paths)


def _turn(text: str, shown: Sequence[Picture]) -> Message:
    return Message("user", text, {PICTURES: list(shown)} if shown else {})


def first_prompt(
    turn: Message, vocabulary: Vocabulary, form: AnyFormat | None, *, thinking: bool | None
) -> list[int]:
    """Encodes `--prompt` as the first turn of a conversation, or as text to be continued.

    Raises:
      ValueError: the text is not valid Unicode, is empty without a begin token, or the chat format
        fails.
    """
    if form is not None:
        return form.encode([turn], thinking=thinking)
    if thinking:
        raise ValueError("--thinking needs a chat format, but this prompt is continued as text")
    return vocabulary.plain_prompt(turn.content)


class Screen:
    """Shows a reply, its thought set off from its answer."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        marks = ("\x1b[2m", "\x1b[0m\n") if self._terminal else (f"{THINK}\n", f"\n{END_THINK}\n")
        self._open, self._close = marks
        self._thought = False  # inside the thought
        self._blank = False  # at the start of a part, before any of its text

    def show(self, piece: Piece) -> None:
        if piece.thought != self._thought:
            self._switch()
        # Models put line breaks around a thought; our own are already there.
        text = piece.text.lstrip("\n") if self._blank else piece.text
        if text:
            self._blank = False
            self._write(text.translate(_UNSAFE) if self._terminal else text)

    def end(self) -> None:
        """Ends the reply, complete or interrupted, with a line break."""
        if self._thought:
            self._switch()
        self._write("\n")
        self._blank = False

    def _switch(self) -> None:
        self._write(self._close if self._thought else self._open)
        self._thought, self._blank = not self._thought, True

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def answer(generator: Generator, prompt: Sequence[int], given: Given | None = None) -> str:
    """Prints the reply to a prompt, then its speed; returns it without its thought.

    Args:
      given: embeddings of some of its tokens.
    """
    screen = Screen(sys.stdout)
    said = ""
    try:
        for piece in generator.reply(prompt, given):
            screen.show(piece)
            said += "" if piece.thought else piece.text
    finally:
        screen.end()
    print(describe(generator.engine.statistics), file=sys.stderr)
    return said


def chat(
    generator: Generator,
    form: AnyFormat,
    *,
    thinking: bool | None = None,
    shown: Sequence[Picture] = (),
) -> None:
    """Chats with the user until the input ends; one line is one turn.

    Ctrl-C stops a reply, and the part already shown stays in the conversation; between replies it
    raises KeyboardInterrupt. The conversation keeps the answer of a reply, not the thought.

    Args:
      shown: pictures that go with the first message; `/image PATH` adds one to the next.
    """
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        print(_HELP_PICTURES if isinstance(form, Looking) else _HELP, file=sys.stderr)
    read, screen = _reader(interactive), Screen(sys.stdout)
    messages: list[Message] = []
    pending = list(shown)
    while (line := read()) is not None and line != "/exit":
        if line == "/reset":
            messages, pending = [], []
        if not line or line == "/reset":
            continue
        turn = [*messages, _turn(line, pending)]
        said: list[str] = []
        try:
            command, _, path = line.partition(" ")
            if command == _IMAGE:
                pending += _read_pictures([_named(path)], form)
                continue
            prompt = form.encode(turn, thinking=thinking)
            given = form.given(turn, prompt) if isinstance(form, Looking) else None
            for piece in generator.reply(prompt, given):
                screen.show(piece)
                said += [] if piece.thought else [piece.text]
        except KeyboardInterrupt:
            if not interactive:
                raise
        except ValueError as error:
            if not interactive:
                raise
            print(f"error: {error}", file=sys.stderr)
            continue
        screen.end()
        print(describe(generator.engine.statistics), file=sys.stderr)
        _show_places(turn, "".join(said))
        if said:
            messages, pending = [*turn, Message("assistant", "".join(said))], []


def _named(path: str) -> Path:
    """Returns the file that `/image PATH` names, where no shell expands `~`.

    Raises:
      ValueError: it names none.
    """
    if not path.strip():
        raise ValueError(f"{_IMAGE} names no picture; write {_IMAGE} PATH")
    return Path(os.path.expanduser(path.strip()))


def describe(statistics: Statistics) -> str:
    """Summarises the speed, and the drafts if there were any, in one line."""
    decoded = statistics.decode_steps + statistics.accepted  # first tokens count as prefill
    parts = [
        f"prompt: {statistics.prompt_tokens} tokens"
        + _speed(statistics.prompt_tokens, statistics.prefill_seconds),
        f"reply: {statistics.new_tokens} tokens" + _speed(decoded, statistics.decode_seconds),
    ]
    if statistics.drafted:
        accepted = statistics.accepted / statistics.drafted
        per_step = decoded / statistics.decode_steps
        parts.append(f"{accepted:.0%} of drafts accepted, {per_step:.2f} tokens per step")
    return "; ".join(parts)


def _speed(tokens: int, seconds: float) -> str:
    return f" ({tokens / seconds:.1f}/s)" if seconds else ""


def _reader(interactive: bool) -> Callable[[], str | None]:
    """Returns a function that reads the user's next line; None at the end of the input."""
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  importing it gives input() history and editing

    def read() -> str | None:
        if interactive:
            try:
                return input(">>> ").strip()
            except EOFError:
                return None
        line = sys.stdin.readline()
        return line.strip() if line else None

    return read
