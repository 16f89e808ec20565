"""Fine-tuning: conversations in rows, a loss on the replies, and at the end a summary and a sample.

What a run reads besides its folder is decided before the folder is touched: the checkpoint gives
shape and tokenizer, the conversations give rows, and rows and `sft.epochs` give the steps.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from dsjax.checkpoint import store
from dsjax.checkpoint.load import load
from dsjax.config.finetuning import FineTuning
from dsjax.generate.engine import Engine, Request
from dsjax.generate.sampling import Sampling
from dsjax.kernels.target import Target
from dsjax.model.flops import train_flops_per_token
from dsjax.model.transformer import Transformer
from dsjax.parallel import processes
from dsjax.parallel.compilation import Compiled
from dsjax.parallel.context import check_length
from dsjax.parallel.mesh import make_mesh
from dsjax.posttrain import esft
from dsjax.posttrain.epochs import over_epochs
from dsjax.posttrain.initial import Initial, all_but_mtp, open_initial
from dsjax.posttrain.messages import TokenizedConversations, read_conversations
from dsjax.posttrain.rows import ConversationRows, HeldoutRows, hold_out
from dsjax.posttrain.supervised import supervised
from dsjax.posttrain.teaching import lessons
from dsjax.precision.policy import advice
from dsjax.text.chat import ChatFormat, Message
from dsjax.text.conversation import choose_format
from dsjax.train import header, hyperparameters, loop, pipelined_step, session
from dsjax.train.batches import batch_sharding, place_all
from dsjax.train.evaluate import Evaluation, evaluate, scorer
from dsjax.train.optimizer import Trains, adamw
from dsjax.train.session import Session
from dsjax.train.step import (
    abstract_state,
    compile_step,
    declared_model,
    restored_model,
    train_step,
)
from dsjax.train.summary import print_summary

_EVERY = 50_000  # conversations after which reading them says how far it is


class Data(NamedTuple):
    """The conversations of a run."""

    training: ConversationRows
    heldout: ConversationRows | None
    sample: list[int]  # the tokens before the first reply of the first held-out conversation


def train(config: FineTuning, folder: Path, *, command: str, console: Console | None = None) -> int:
    """Fine-tunes the checkpoint `config.init` in `folder`; arguments, result and errors are those
    of `session.run`.
    """
    console = console or Console(quiet=not processes.is_first())
    initial = open_initial(config.init, tokenizer=config.sft.tokenizer, run=folder)
    config = initial.fill(config)
    say = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
    data = read_data(config, initial, say)
    config = with_steps(config, len(data.training), say)

    def recipe(under_way: Session) -> None:
        run = FineTuningRun(config, initial, data, under_way)
        loop.run_steps(
            under_way,
            run.train_step,
            batch_size=lambda step: hyperparameters.batch_size(config.train, step),
            knobs=lambda step: {**hyperparameters.knobs(config, step), **run.knobs},
            evaluate=run.evaluate_sample,
        )
        if not under_way.exit_code:
            run.finish()

    return session.run(config, folder, recipe, command=command, console=console)


def read_data(config: FineTuning, initial: Initial, say: Callable[[str], None]) -> Data:
    """Reads, encodes, divides and packs the conversations of a run.

    Raises:
      ValueError: there are none, or one of them cannot be trained; names file and line.
    """
    sft, vocabulary, form = config.sft, initial.vocabulary, _format(config, initial)
    if not sft.files:
        raise ValueError(
            "sft.files is empty; name the conversations, JSON lines or parquet: "
            "--set sft.files='chats/*.jsonl'"
        )

    def read(files: str, key: str) -> TokenizedConversations:
        found = read_conversations(
            files,
            vocabulary,
            form,
            longest=sft.sequence_length + 1,  # the last token is only predicted
            truncate=sft.longer == "truncate",
            key=key,
            progress=lambda done: say(f"{key}: {done:,} read") if done % _EVERY == 0 else None,
        )
        say(_described(found, key, sft.sequence_length))
        return found

    # Ends a row's padding, which nothing reads.
    pad = min(vocabulary.stop_ids, default=0)
    pack = functools.partial(ConversationRows, sequence_length=sft.sequence_length, pad=pad)
    own = read(sft.files, "sft.files")
    if sft.heldout_files:
        apart = read(sft.heldout_files, "sft.heldout_files")
        training, held = np.arange(len(own)), np.arange(len(apart))
    else:
        apart = own
        training, held = hold_out(own.digests(), sft.heldout_fraction)
    rows, heldout = pack(own, training), pack(apart, held) if len(held) else None
    say(
        f"{len(training):,} conversations to train on, {rows.trained:,} tokens of {rows.tokens:,}, "
        f"in {len(rows):,} rows, {rows.fill:.1%} full; {len(held):,} held out"
    )
    ids, trained = apart.one(int(held[0])) if len(held) else own.one(int(training[0]))
    return Data(rows, heldout, ids[: int(np.argmax(trained))].tolist())


def _format(config: FineTuning, initial: Initial) -> ChatFormat | None:
    """Returns the format of the conversations.

    Raises:
      ValueError: the tokenizer lacks its tokens, or the run would later be asked in another format.
    """
    if config.sft.format == "checkpoint":
        return initial.chat
    form = choose_format(config.sft.format, initial.vocabulary)
    ask = [Message("user", "?")]
    if initial.chat is not None and initial.chat.encode(ask) != form.encode(ask):
        raise ValueError(
            f"sft.format={form.name}: {initial.text_folder} has the format {initial.chat.name}, "
            "whose prompts are others, so the model would not be asked as it was trained; leave "
            f"sft.format out, or name a folder with {form.name}'s tokenizer with sft.tokenizer"
        )
    return form


def _described(found: TokenizedConversations, key: str, length: int) -> str:
    total = len(found) + found.dropped + found.untrained
    text = f"{key}: {total:,} conversations, {len(found.ids):,} tokens"
    for count, what in (
        (found.dropped, f"longer than sft.sequence_length={length}, dropped"),
        (found.truncated, f"longer than sft.sequence_length={length}, cut"),
        (found.untrained, "without a reply to train, left out"),
    ):
        text += f"; {count:,} {what}" if count else ""
    return text


def with_steps(
    config: FineTuning, rows: int, say: Callable[[str], None] = lambda text: None
) -> FineTuning:
    """Returns the config with the steps that `sft.epochs` over so many rows take."""
    if not (epochs := config.sft.epochs):
        return config
    train = over_epochs(config.train, "sft", epochs, rows, say)
    return dataclasses.replace(config, train=train)


class FineTuningRun:
    """What fine-tuning adds to a session: conversations, programs, and a choice of experts."""

    def __init__(self, config: FineTuning, initial: Initial, data: Data, run: Session) -> None:
        """Prepares the programs, and begins the session.

        Raises:
          ValueError: config, checkpoint, mesh or workdir do not fit; says what to do.
          OSError: a file cannot be read or written.
        """
        self.config, self.initial, self.data, self.session = config, initial, data, run
        mesh, length = make_mesh(config.mesh.sizes), config.sft.sequence_length
        # Fail early: these checks allocate nothing.
        batch_sharding((config.micro_batch_size, length + 1), mesh)
        check_length(length, mesh)
        pipelined_step.check(config, mesh)
        self.declared = declared_model(config.shape, config.precision)
        if slow := advice(config.precision.compute, Target.here()):
            run.display.say(slow)
        if processes.is_first():
            initial.keep_files(run.folder)
        optimizer = adamw(config.optim, self._trains(mesh))
        abstract = abstract_state(self.declared, optimizer, mesh)
        learned = lessons(config, initial, data.training, mesh, run)
        flops = train_flops_per_token(config.shape, length, mtp=config.sft.mtp == "on")
        run.display.console.print(
            header.table(
                config, self.declared, abstract, mesh, optimizer=optimizer, folder=run.folder,
                tokens=length * hyperparameters.sequences_before(config.train, config.train.steps),
                takes=header.sequences(config, length), flops_per_token=flops,
            )
        )  # fmt: skip
        run.begin(
            learned.source,
            abstract,
            lambda: initial.state(self.declared, optimizer, mesh),
            mesh=mesh,
            flops_per_token=flops,
        )
        self.knobs = learned.knobs
        step = train_step(
            self.declared, optimizer, learned.objective, schedule=config.mesh.schedule
        )
        self.train_step = compile_step(step, abstract, mesh, display=run.display)
        everywhere = NamedSharding(mesh, PartitionSpec())  # for numbers that each process reads
        # Held-out text is scored as text, whatever the student learns from.
        score = scorer(self.declared, supervised(config), chunk=config.train.loss_chunk)
        self.score = Compiled(
            jax.jit(score, out_shardings=everywhere), mesh, what="the score", display=run.display
        )
        rows = data.heldout
        self.heldout = HeldoutRows(rows, initial.vocabulary.coder) if rows else None

    def _trains(self, mesh: Mesh) -> Trains:
        """Says what trains: everything but resting MTP modules, or the experts of the task."""
        config, folder = self.config, self.session.folder
        if config.esft.score == "off":
            return (lambda path: True) if config.sft.mtp == "on" else all_but_mtp
        begun = store.latest(folder / "checkpoints") is not None
        chosen = esft.read(folder) if begun else self._choose_experts(mesh)
        return esft.trains(chosen, config.shape.n_routed_experts)

    def _choose_experts(self, mesh: Mesh) -> list[list[int]]:
        """Scores the experts on rows of the training conversations, and keeps the choice."""
        config, run, rows = self.config, self.session, self.data.training
        run.display.say(f"scoring experts on {config.esft.sample_rows} rows of conversations")
        model = load(self.initial.checkpoint, mesh=mesh, dtype=config.precision.compute)
        everywhere = NamedSharding(mesh, PartitionSpec())
        count = Compiled(jax.jit(esft.usage, out_shardings=everywhere), mesh)
        size = config.micro_batch_size
        sample = rows.spread(config.esft.sample_rows)

        def batch(first: int) -> dict[str, np.ndarray]:
            part = rows.batch(sample[first : first + size])
            return {
                name: np.pad(part[name][:, :-1], ((0, size - len(part[name])), (0, 0)))
                for name in ("tokens", "segment_ids")
            }

        total = esft.sample_usage(
            lambda batch: count(model, place_all(batch, mesh)),
            map(batch, range(0, len(sample), size)),
        )
        assert config.esft.score != "off"
        scores_LE = esft.scores(total, config.esft.score, config.shape)
        chosen = esft.choose(scores_LE, config.esft.threshold)
        if processes.is_first():
            content = esft.write(run.folder, chosen, scores_LE, config.esft, config.shape)
            run.display.console.print(esft.report(content, config.shape))
        return chosen

    def evaluate_sample(self) -> dict[str, float]:
        """Scores an even sample of the held-out rows, the same one every time."""
        if self.heldout is None:
            return {}
        result = self._evaluate(self.heldout.spread(self.config.train.eval_sequences))
        assert result is not None
        return result.numbers(self.config.sft.sequence_length)

    def _evaluate(
        self, rows: Sequence[int], interrupted: Callable[[], bool] = lambda: False
    ) -> Evaluation | None:
        assert self.heldout is not None
        return evaluate(
            lambda batch: self.score(self.session.state, place_all(batch, self.session.mesh)),
            self.heldout,
            rows,
            batch_size=self.config.micro_batch_size,
            interrupted=interrupted,
        )

    def finish(self) -> None:
        """Scores all held-out conversations, writes a sample, and writes and shows summary.json.

        After a signal it returns early, and the same command finishes later.
        """
        run = self.session
        run.settle()
        result = None
        if self.heldout is not None:
            run.display.say(f"scoring all {len(self.heldout):,} held-out rows")
            result = self._evaluate(range(len(self.heldout)), run.interrupted)
            if result is None:
                return
        sample = self._sample()  # all processes generate it together
        if run.metrics is None:
            return
        if result is not None and "eval_loss" not in run.metrics.lines()[-1]:
            run.log_evaluation(result.numbers(self.config.sft.sequence_length))
        lines = run.metrics.lines()
        found = self._found(result, [line for line in lines if "loss" in line], sample)
        seconds = self.train_step.seconds + self.score.seconds
        print_summary(run.display.console, run.finish(found, compile_seconds=seconds))

    def _found(
        self,
        result: Evaluation | None,
        logged: Sequence[dict[str, Any]],
        sample: dict[str, str] | None,
    ) -> dict[str, Any]:
        run, rows = self.session, self.data.training
        return {
            "init": self.config.init,
            "epochs": hyperparameters.sequences_before(self.config.train, run.step) / len(rows),
            "rows": len(rows),
            "trained_share": rows.trained / rows.tokens,
            "loss": logged[-1]["loss"],
            "mtp_loss": logged[-1]["mtp_loss"] if self.config.sft.mtp == "on" else None,
            "eval_loss": result and result.loss,
            "bits_per_byte": result and result.bits_per_byte,
            "max_violation_first": logged[0]["max_violation"],
            "max_violation_last": logged[-1]["max_violation"],
            "dropped_tokens": max(line["dropped_tokens"] for line in logged),
            **run.throughput(),
            "sample": sample,
        }

    def _sample(self) -> dict[str, str] | None:
        """Lets the model answer the first held-out conversation, or the first of all."""
        prompt, vocabulary = self.data.sample, self.initial.vocabulary
        room = self.config.shape.max_seq_len - len(prompt)
        n_tokens = min(self.config.train.sample_tokens, room)
        if n_tokens < 1 or not prompt:  # without a begin token a prompt may be empty
            return None
        model: Transformer = restored_model(self.declared, self.session.state)
        request = Request(
            prompt=tuple(prompt),
            max_new_tokens=n_tokens,
            sampling=Sampling(temperature=0.7, top_p=0.95, seed=self.config.train.seed % 2**32),
            stop_ids=vocabulary.stop_ids,
        )
        (output,) = Engine(model).complete([request])
        decode = functools.partial(vocabulary.coder.decode, skip_special=False)
        return {"prompt": decode(prompt), "completion": decode(output.tokens)}
