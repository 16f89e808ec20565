"""Preference training: pairs of answers in rows, the reference's pass, and accuracy held out.

What a run reads besides its folder is decided before the folder is touched: the checkpoint gives
shape and tokenizer, the examples give rows, and their number and `preference.epochs` give the
steps. DPO's reference then runs over all rows once, on the weights that the run begins with, and
what it says is kept in the run's folder (`reference/`), so that a resumed run does not need it.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from dsjax import tables
from dsjax.config.preference import Preference
from dsjax.display import duration
from dsjax.kernels.target import Target
from dsjax.model.flops import train_flops_per_token
from dsjax.parallel import processes
from dsjax.parallel.compilation import Compiled
from dsjax.parallel.context import check_length
from dsjax.parallel.mesh import make_mesh
from dsjax.posttrain.epochs import over_epochs
from dsjax.posttrain.initial import Initial, all_but_mtp, open_initial
from dsjax.posttrain.pairs import ExampleRows, Examples, read_examples
from dsjax.posttrain.preference import answer_logp, preference
from dsjax.posttrain.reward_model import RewardModel, new_head, trains
from dsjax.posttrain.row_store import Field, RowStore, weights_digest
from dsjax.posttrain.rows import ShuffledRows, hold_out
from dsjax.precision.policy import advice
from dsjax.train import header, hyperparameters, loop, pipelined_step, session
from dsjax.train.batches import batch_sharding, place_all
from dsjax.train.evaluate import batch_sums
from dsjax.train.objective import Objective
from dsjax.train.optimizer import adamw
from dsjax.train.session import Interrupted, Session
from dsjax.train.source import RowSource
from dsjax.train.step import TrainState, abstract_state, compile_step, declared_model, train_step

_EVERY = 50_000  # examples after which reading them says how far it is
_FLUSH_SECONDS = 10.0  # between writes of the reference's pass


class Data(NamedTuple):
    """The examples of a run."""

    training: ExampleRows
    heldout: ExampleRows | None


def train(config: Preference, folder: Path, *, command: str, console: Console | None = None) -> int:
    """Trains a policy or a reward model from the checkpoint `config.init` in `folder`; arguments,
    result and errors are those of `session.run`.
    """
    console = console or Console(quiet=not processes.is_first())
    initial = open_initial(config.init, run=folder)
    config = initial.fill(config)
    say = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
    data = read_data(config, initial, say)
    config = with_steps(config, data.training.examples, say)

    def recipe(under_way: Session) -> None:
        run = PreferenceRun(config, initial, data, under_way)
        per_example = config.preference.rows_per_example
        loop.run_steps(
            under_way,
            run.train_step,
            batch_size=lambda step: per_example * config.train.batch_size,
            knobs=lambda step: hyperparameters.knobs(config, step),
            evaluate=run.evaluate_sample,
        )
        if not under_way.exit_code:
            run.finish()

    return session.run(config, folder, recipe, command=command, console=console)


def read_data(config: Preference, initial: Initial, say: Callable[[str], None]) -> Data:
    """Reads, encodes and divides the examples of a run.

    Raises:
      ValueError: there are none, or one of them cannot be trained; names file and line.
    """
    group, vocabulary = config.preference, initial.vocabulary
    if not group.files:
        raise ValueError(
            "preference.files is empty; name the examples, JSON lines or parquet: "
            "--set preference.files='pairs/*.jsonl'"
        )

    def read(files: str, key: str) -> Examples:
        found = read_examples(
            files,
            vocabulary,
            initial.chat,
            labelled=group.kind == "pointwise",
            longest=group.sequence_length,
            key=key,
            progress=lambda done: say(f"{key}: {done:,} read") if done % _EVERY == 0 else None,
        )
        if found.dropped:
            say(
                f"{key}: {found.dropped:,} of {len(found) + found.dropped:,} examples have an "
                f"answer longer than preference.sequence_length={group.sequence_length}; dropped"
            )
        return found

    pad = min(vocabulary.stop_ids, default=0)  # which nothing reads
    cut = functools.partial(ExampleRows, sequence_length=group.sequence_length, pad=pad)
    own = read(group.files, "preference.files")
    if group.heldout_files:
        apart = read(group.heldout_files, "preference.heldout_files")
        training, held = np.arange(len(own)), np.arange(len(apart))
    else:
        # By prompt, so that no prompt is on both sides.
        apart, (training, held) = own, hold_out(own.prompt_digests(), group.heldout_fraction)
    what = "labelled answers" if group.kind == "pointwise" else "pairs"
    say(f"{len(training):,} {what} to train on, {len(held):,} held out")
    if len(training) < config.train.batch_size:
        raise ValueError(
            f"train.batch_size={config.train.batch_size} is more than the {len(training):,} {what} "
            "to train on; lower it"
        )
    return Data(cut(own, training), cut(apart, held) if len(held) else None)


def with_steps(
    config: Preference, examples: int, say: Callable[[str], None] = lambda text: None
) -> Preference:
    """Returns the config with the steps that `preference.epochs` over so many examples take."""
    if not (epochs := config.preference.epochs):
        return config
    train = over_epochs(config.train, "preference", epochs, examples, say)
    return dataclasses.replace(config, train=train)


class PreferenceRun:
    """What preference training adds to a session: examples, programs, and the reference."""

    def __init__(self, config: Preference, initial: Initial, data: Data, run: Session) -> None:
        """Prepares the programs, begins the session and, for DPO, asks the reference.

        Raises:
          ValueError: config, checkpoint, mesh or workdir do not fit; says what to do.
          OSError: a file cannot be read or written.
          Interrupted: a signal came while the reference was asked.
        """
        self.config, self.data, self.session = config, data, run
        mesh, length = make_mesh(config.mesh.sizes), config.preference.sequence_length
        self.rows_at_once = config.preference.rows_per_example * config.micro_batch_size
        # Fail early: these checks allocate nothing.
        batch_sharding((self.rows_at_once, length + 1), mesh)
        check_length(length, mesh)
        pipelined_step.check(config, mesh)
        declared = declared_model(config.shape, config.precision)
        scores = config.preference.kind != "dpo"
        if scores:
            declared = RewardModel(config.shape, declared.policy)
        optimizer = adamw(config.optim, trains if scores else all_but_mtp)
        if slow := advice(config.precision.compute, Target.here()):
            run.display.say(slow)
        if processes.is_first():
            initial.keep_files(run.folder)
        abstract = abstract_state(declared, optimizer, mesh)

        flops = train_flops_per_token(config.shape, length, mtp=False)
        rows = config.preference.rows_per_example * config.train.batch_size
        run.display.console.print(
            header.table(
                config, declared, abstract, mesh, optimizer=optimizer, folder=run.folder,
                flops_per_token=flops, tokens=rows * length * config.train.steps,
                takes=f"{config.train.batch_size} examples, {rows} sequences of {length:,}",
            )
        )  # fmt: skip

        def begun() -> TrainState:
            new = new_head(config.shape, mesh, config.train.seed) if scores else None
            return initial.state(declared, optimizer, mesh, new)

        run.begin(
            RowSource(
                ShuffledRows(
                    data.training,
                    seed=config.preference.seed,
                    together=data.training.per_example,
                ),
                mesh,
                micro_batch_size=self.rows_at_once,
                length=length + 1,
            ),
            abstract,
            begun,
            mesh=mesh,
            flops_per_token=flops,
        )
        self.declared, objective = declared, preference(config)
        if not scores:
            self._ask_reference(lambda: run.state if not run.step else begun())
        step = train_step(declared, optimizer, objective, schedule=config.mesh.schedule)
        self.train_step = compile_step(step, abstract, mesh, display=run.display)
        self.sums = self._compiled_sums(objective)

    def _compiled_sums(self, objective: Objective) -> Compiled:
        everywhere = NamedSharding(self.session.mesh, PartitionSpec())  # each process reads them
        sums = batch_sums(self.declared, objective)
        return Compiled(jax.jit(sums, out_shardings=everywhere), self.session.mesh)

    def _ask_reference(self, state: Callable[[], TrainState]) -> None:
        """Gives all rows their log-probability under the weights that the run begins with, from
        disk as far as an earlier session has got.

        Args:
          state: makes those weights, if they are needed.
        """
        run, parts = self.session, [part for part in self.data if part is not None]
        identity = {
            "rows_of": [part.fingerprint for part in parts],
            "weights": None if run.step else weights_digest(run.state.params),
            "compute": self.config.precision.compute,
        }
        fields = {"logp": Field((), "float32")}
        kept = RowStore(run.folder / "reference", sum(map(len, parts)), fields, identity)
        if processes.is_first():
            kept.claim(begun=run.step > 0)
        done = processes.from_first(kept.done)
        if done < kept.rows:
            self._write_reference(kept, done, state())
        processes.wait("the reference is written")
        logp = kept.read()["logp"]
        for part in parts:
            part.reference, logp = logp[: len(part)], logp[len(part) :]

    def _write_reference(self, kept: RowStore, done: int, state: TrainState) -> None:
        run, size = self.session, self.rows_at_once
        logp = self._compiled_sums(answer_logp(self.config))
        show = run.display.counting("the reference's log-probabilities")
        waiting: list[np.ndarray] = []
        numbers = [(part, row) for part in self.data if part for row in range(len(part))]

        def placed(first: int) -> tuple[dict[str, jax.Array], int]:
            batch = [part[row] for part, row in numbers[first : first + size]]
            rows = {name: np.stack([row[name] for row in batch]) for name in batch[0]}
            return place_all(_filled(rows, size), run.mesh), len(batch)

        logp.compile(state, placed(done)[0], {})
        written = time.monotonic()
        with run.stop.deferred():
            for first in range(done, len(numbers), size):
                show(first, len(numbers))
                batch, count = placed(first)
                waiting.append(np.asarray(logp(state, batch, {})["logp"])[:count])
                stops = run.interrupted()
                last = stops or first + size >= len(numbers)
                if processes.is_first() and (last or time.monotonic() - written > _FLUSH_SECONDS):
                    kept.append({"logp": np.concatenate(waiting)})
                    waiting, written = [], time.monotonic()
                if stops:
                    raise Interrupted
        show(len(numbers), len(numbers))

    def evaluate_sample(self) -> dict[str, float]:
        """Judges an even sample of the held-out examples, the same one every time."""
        heldout = self.data.heldout
        if heldout is None:
            return {}
        result = self._evaluate(heldout, heldout.spread(self.config.train.eval_sequences))
        assert result is not None
        return result

    def _evaluate(
        self,
        heldout: ExampleRows,
        rows: Sequence[int],
        interrupted: Callable[[], bool] = lambda: False,
    ) -> dict[str, float] | None:
        """Returns the objective's metrics on held-out rows; None if interrupted."""
        totals: dict[str, float] = {}
        for first in range(0, len(rows), self.rows_at_once):
            if interrupted():
                return None
            batch = heldout.batch(rows[first : first + self.rows_at_once])
            placed = place_all(_filled(batch, self.rows_at_once), self.session.mesh)
            for name, value in self.sums(self.session.state, placed, {}).items():
                totals[name] = totals.get(name, 0.0) + float(value)
        means = preference(self.config).metrics(jax.tree.map(np.float32, totals))
        return {f"eval_{name}": float(value) for name, value in means.items()}

    def finish(self) -> None:
        """Judges all held-out examples, and writes and shows summary.json.

        After a signal it returns early, and the same command finishes later.
        """
        run, heldout, result = self.session, self.data.heldout, None
        run.settle()
        if heldout is not None:
            run.display.say(f"judging all {heldout.examples:,} held-out examples")
            result = self._evaluate(heldout, range(len(heldout)), run.interrupted)
            if result is None:
                return
        if run.metrics is None:
            return
        if result is not None and "eval_loss" not in run.metrics.lines()[-1]:
            run.log_evaluation(result)
        lines = run.metrics.lines()
        found = self._found(result or {}, [line for line in lines if "loss" in line][-1])
        seconds = self.train_step.seconds + self.sums.seconds
        summary = run.finish(found, compile_seconds=seconds)
        run.display.console.print(
            tables.figures(f"{summary['name']}: {summary['steps']} steps", _shown(summary))
        )

    def _found(self, result: dict[str, float], last: dict[str, Any]) -> dict[str, Any]:
        run, config = self.session, self.config
        return {
            "kind": config.preference.kind,
            "init": config.init,
            "examples": self.data.training.examples,
            "epochs": run.step * config.train.batch_size / self.data.training.examples,
            "loss": last["loss"],
            "accuracy": last["accuracy"],
            "margin": last.get("margin"),
            "eval_loss": result.get("eval_loss"),
            "eval_accuracy": result.get("eval_accuracy"),
            "eval_margin": result.get("eval_margin"),
            **run.throughput(),
        }


def _filled(batch: dict[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
    """Appends rows of zeros, which count nothing, so that one compiled program serves all."""
    missing = rows - len(batch["tokens"])
    return {
        name: np.pad(array, ((0, missing), *((0, 0),) * (array.ndim - 1)))
        for name, array in batch.items()
    }


def _shown(summary: dict[str, Any]) -> Iterable[tuple[str, str]]:
    for when, prefix in (("held-out", "eval_"), ("last batch", "")):
        if summary[f"{prefix}loss"] is not None:
            margin = summary[f"{prefix}margin"]
            more = "" if margin is None else f", margin {margin:.3f}"
            accuracy = f"{summary[f'{prefix}accuracy']:.1%}{more}"
            yield f"{when} accuracy", f"{accuracy}, loss {summary[f'{prefix}loss']:.4f}"
    yield "epochs", f"{summary['epochs']:.2f} of {summary['examples']:,} examples"
    compiling = f"{summary['compile_seconds']:.0f} s of it compiling"
    yield "wall time", f"{duration(summary['wall_seconds'])}, {compiling}"
    if summary["tokens_per_second"] is not None:
        yield "tokens per second", f"{summary['tokens_per_second']:,.0f}, padding included"
