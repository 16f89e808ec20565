"""Pre-training: text in rows, a score on held-out text, and at the end a summary and a sample."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from dsjax.checkpoint.load import Checkpoint
from dsjax.config import Config
from dsjax.data.corpus import REJECTED
from dsjax.data.packing import heldout_sequences
from dsjax.generate.engine import Engine
from dsjax.generate.sampling import Sampling
from dsjax.infer.answers import continue_tokens
from dsjax.kernels.target import Target
from dsjax.model.flops import train_flops_per_token
from dsjax.model.transformer import Transformer
from dsjax.parallel import processes
from dsjax.parallel.compilation import Compiled
from dsjax.parallel.context import check_length
from dsjax.parallel.mesh import make_mesh
from dsjax.precision.policy import advice
from dsjax.train import header, hyperparameters, loop, pipelined_step, session, text
from dsjax.train.batches import batch_sharding, place_all
from dsjax.train.evaluate import Evaluation, evaluate, scorer
from dsjax.train.initial import open_initial, state_of, with_kept_tokenizer
from dsjax.train.loss import pretraining
from dsjax.train.optimizer import Optimizer, Trains, adamw
from dsjax.train.session import Session
from dsjax.train.source import RowSource
from dsjax.train.step import (
    TrainState,
    abstract_state,
    compile_step,
    declared_model,
    initial_state,
    restored_model,
    train_step,
)
from dsjax.train.summary import compressed_bits_per_byte, print_summary

_PROMPT_TOKENS = 32  # of a held-out document, for the sample at the end


def train(config: Config, folder: Path, *, command: str, console: Console | None = None) -> int:
    """Pre-trains in `folder`; arguments, result and errors are those of `session.run`."""

    config, checkpoint = open_initial(config, folder)

    def recipe(under_way: Session) -> None:
        run = Pretraining(config, under_way, checkpoint)
        loop.run_steps(
            under_way,
            run.train_step,
            batch_size=lambda step: hyperparameters.batch_size(config.train, step),
            knobs=lambda step: hyperparameters.knobs(config, step),
            evaluate=run.evaluate_sample,
        )
        if not under_way.exit_code:
            run.finish()

    return session.run(config, folder, recipe, command=command, console=console)


class Pretraining:
    """What pre-training adds to a session: text and programs."""

    def __init__(self, config: Config, run: Session, checkpoint: Checkpoint | None = None) -> None:
        """Prepares data and programs, and begins the session.

        Args:
          checkpoint: what the run begins with; None: random weights, or the run's own checkpoint.

        Raises:
          ValueError: config, data, mesh, workdir or checkpoint do not fit; says what to do.
          OSError: a file cannot be read or written.
        """
        self.config, self.session = config, run
        mesh, length = make_mesh(config.mesh.sizes), config.data.sequence_length
        # Fail early: these checks allocate nothing.
        batch_sharding((config.micro_batch_size, length + 1), mesh)
        check_length(length, mesh)
        pipelined_step.check(config, mesh)
        declared = declared_model(config.model, config.precision)
        optimizer = adamw(config.optim, trained_by(config))
        abstract = abstract_state(declared, optimizer, mesh)
        if slow := advice(config.precision.compute, Target.here()):
            run.display.say(slow)
        corpus = text.corpus_of(
            with_kept_tokenizer(config, run.folder), run.display.counting("preparing the text")
        )
        rows, special = text.training_rows(config, corpus), corpus.tokenizer.special
        sequences = hyperparameters.sequences_before(config.train, config.train.steps)
        text.show(run.display.console, config, corpus, rows, sequences)
        if processes.is_first():
            corpus.tokenizer.save(str(run.folder))
            if corpus.rejected:
                shutil.copy(Path(corpus.folder, REJECTED), run.folder)
        flops = train_flops_per_token(config.model, length)
        run.display.console.print(
            header.table(
                config, declared, abstract, mesh, optimizer=optimizer, folder=run.folder,
                tokens=length * sequences, takes=header.sequences(config, length),
                flops_per_token=flops,
            )
        )  # fmt: skip
        run.begin(
            RowSource(rows, mesh, micro_batch_size=config.micro_batch_size, length=length + 1),
            abstract,
            lambda: _begin(config, declared, optimizer, mesh, checkpoint),
            mesh=mesh,
            flops_per_token=flops,
        )
        self.declared, self.corpus = declared, corpus
        self.heldout = heldout_sequences(corpus.heldout, special, sequence_length=length)
        objective = pretraining(config)
        step = train_step(declared, optimizer, objective, schedule=config.mesh.schedule)
        score = scorer(declared, objective, chunk=config.train.loss_chunk)
        everywhere = NamedSharding(mesh, PartitionSpec())  # for numbers that each process reads
        self.train_step = compile_step(step, abstract, mesh, display=run.display)
        self.score = Compiled(
            jax.jit(score, out_shardings=everywhere), mesh, what="the score", display=run.display
        )

    def evaluate_sample(self) -> dict[str, float]:
        """Scores an even sample of the held-out rows, the same one every time."""
        result = self._evaluate(self.heldout.spread(self.config.train.eval_sequences))
        assert result is not None
        return result.numbers(self.config.data.sequence_length)

    def _evaluate(
        self, rows: Sequence[int], interrupted: Callable[[], bool] = lambda: False
    ) -> Evaluation | None:
        return evaluate(
            lambda batch: self.score(self.session.state, place_all(batch, self.session.mesh)),
            self.heldout,
            rows,
            batch_size=self.config.micro_batch_size,
            interrupted=interrupted,
        )

    def finish(self) -> None:
        """Scores all held-out text, writes a sample, and writes and shows summary.json.

        After a signal it returns early, and the same command finishes later.
        """
        run = self.session
        run.settle()
        run.display.say(f"scoring all {len(self.heldout):,} held-out sequences")
        result = self._evaluate(range(len(self.heldout)), run.interrupted)
        if result is None:
            return
        sample = self._sample()  # all processes generate it together
        if run.metrics is None:
            return
        if "eval_loss" not in run.metrics.lines()[-1]:
            run.log_evaluation(result.numbers(self.config.data.sequence_length))
        lines = run.metrics.lines()
        found = self._found(result, [line for line in lines if "loss" in line], sample)
        seconds = self.train_step.seconds + self.score.seconds
        print_summary(run.display.console, run.finish(found, compile_seconds=seconds))

    def _found(
        self, result: Evaluation, logged: Sequence[dict[str, Any]], sample: dict[str, str] | None
    ) -> dict[str, Any]:
        return {
            "loss": logged[-1]["loss"],
            "mtp_loss": logged[-1]["mtp_loss"],
            **result.numbers(self.config.data.sequence_length),
            **compressed_bits_per_byte(words for _, words in self.corpus.heldout_texts()),
            "max_violation_first": logged[0]["max_violation"],
            "max_violation_last": logged[-1]["max_violation"],
            "dropped_tokens": max(line["dropped_tokens"] for line in logged),
            "rejected_records": self.corpus.rejected,
            **self.session.throughput(),
            "sample": sample,
        }

    def _sample(self) -> dict[str, str] | None:
        """Lets the model continue the first tokens of the first held-out document."""
        n_tokens, most = self.config.train.sample_tokens, self.config.model.max_seq_len
        if not n_tokens:
            return None
        tokenizer = self.corpus.tokenizer
        prompt = [tokenizer.special.bos, *self.corpus.heldout[0][:_PROMPT_TOKENS].tolist()]
        prompt = prompt[: most // 2]
        (new,) = continue_tokens(
            Engine(restored_model(self.declared, self.session.state)),
            [prompt],
            max_new_tokens=min(n_tokens, most - len(prompt)),
            sampling=Sampling(temperature=0.7, top_p=0.95, seed=self.config.train.seed % 2**32),
        )
        return {"prompt": tokenizer.decode(prompt), "completion": tokenizer.decode(new.tolist())}


def _begin(
    config: Config,
    declared: Transformer,
    optimizer: Optimizer,
    mesh: Mesh,
    checkpoint: Checkpoint | None,
) -> TrainState:
    seed = config.train.seed
    if checkpoint is None:
        assert not config.init, "a run that began with a checkpoint has one of its own by now"
        return initial_state(declared, optimizer, mesh, seed)
    return state_of(checkpoint, declared, optimizer, mesh, seed)


def trained_by(config: Config) -> Trains:
    """Says which parameters a config trains: all, or in its warm-up the indexers."""
    return _indexers if config.train.indexer == "warmup" else _all


def _all(path: tuple[Any, ...]) -> bool:
    return True


def _indexers(path: tuple[Any, ...]) -> bool:
    return "indexer" in path
