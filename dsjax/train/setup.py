"""What a run needs before its first step: data, mesh, new or restored state, programs."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsjax import settings
from dsjax.checkpoint import store
from dsjax.config import Config
from dsjax.data.corpus import Corpus, Progress, prepare_corpus
from dsjax.data.loader import Loader
from dsjax.data.packing import HeldoutSequences, PackedSequences, heldout_sequences
from dsjax.display import Display
from dsjax.kernels.target import Target, tokamax
from dsjax.model.flops import train_flops_per_token
from dsjax.parallel import processes
from dsjax.parallel.compilation import Compiled, compiler_options
from dsjax.parallel.context import check_length
from dsjax.parallel.mesh import make_mesh
from dsjax.train import pipelined_step, workdir
from dsjax.train.batches import batch_sharding, held_rows, place_all, place_held
from dsjax.train.evaluate import scorer
from dsjax.train.expert_load import ExpertLoad
from dsjax.train.faults import Faults
from dsjax.train.loss import pretraining
from dsjax.train.optimizer import adamw
from dsjax.train.report import Metrics
from dsjax.train.signals import StopRequest
from dsjax.train.step import (
    TrainState,
    abstract_state,
    declared_model,
    initial_state,
    train_step,
)
from dsjax.train.throughput import Meter, Peak, peak_flops


@dataclasses.dataclass
class Run:
    """A run under way."""

    config: Config
    folder: Path
    display: Display
    stop: StopRequest
    corpus: Corpus
    loader: Loader
    heldout: HeldoutSequences
    mesh: Mesh
    state: TrainState
    step: int  # optimizer steps done
    seconds_before: float  # of earlier sessions
    train_step: Compiled
    score: Compiled
    checkpoints: store.Store
    metrics: Metrics | None  # the first process's; the others write nothing
    faults: Faults
    meter: Meter
    peak: Peak
    exit_code: int = 0  # of the signal that all processes know of
    expert_load: ExpertLoad = dataclasses.field(default_factory=ExpertLoad)
    started: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Wall time of the whole run, earlier sessions included."""
        return self.seconds_before + time.monotonic() - self.started

    def take_batch(self, n: int) -> dict[str, jax.Array]:
        """The next n training rows on the devices, [micro-batches, sequences, T + 1]."""
        return place_held(self.loader.take(n), _batch_shape(n, self.config), self.mesh)

    def place(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Puts a batch [sequences, T + 1] on the devices, its sequences split over them."""
        return place_all(batch, self.mesh)


def _batch_shape(n: int, config: Config) -> tuple[int, int, int]:
    rows = config.micro_batch_size
    return n // rows, rows, config.data.sequence_length + 1


def prepare(config: Config, folder: Path, display: Display, stop: StopRequest) -> Run:
    """Sets a run up, or takes it up again where its newest checkpoint is.

    Raises:
      ValueError: config, data, mesh, workdir or checkpoint do not fit; says what to do.
      OSError: a file cannot be read or written.
    """
    started = time.monotonic()
    mesh = make_mesh(config.mesh.sizes)
    length = config.data.sequence_length
    # These refuse before anything is made.
    batch_sharding((config.micro_batch_size, length + 1), mesh)
    check_length(length, mesh)
    pipelined_step.check(config, mesh)
    declared = declared_model(config.model, config.precision)
    optimizer = adamw(config.optim)
    abstract = abstract_state(declared, optimizer, mesh)
    placement = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    corpus = corpus_of(config, display.counting("preparing the text"))
    display.say(
        f"text: {corpus.train.total_tokens:,} tokens in {len(corpus.train):,} documents, "
        f"{corpus.heldout.total_tokens:,} in {len(corpus.heldout):,} held out"
    )
    target = Target.here()
    own_kernels = target.is_hopper and config.precision.compute == "bfloat16"
    if target.kind == "gpu" and not own_kernels and not tokamax():
        display.say(
            "experts and attention run without kernels of their own, slowly: on an H100 or H200 "
            "set precision.compute=bfloat16; on other GPUs, with Python 3.12: "
            "pip install -e '.[kernels]'"
        )
    rows = training_rows(config, corpus)
    processes.check_same({"the config": settings.content_hash(config), "the text": rows.identity})
    loader = Loader(rows, share=lambda n: held_rows(_batch_shape(n, config), mesh))
    heldout = heldout_sequences(corpus.heldout, corpus.tokenizer.special, sequence_length=length)
    if processes.is_first():
        corpus.tokenizer.save(str(folder))
    state, record = _restore_or_make(config, folder, mesh, abstract, display)
    if record:
        loader.restore(record["data"])
    checkpoints = store.Store(folder / "checkpoints", keep=config.train.keep)
    peak = peak_flops(list(mesh.devices.flat))
    score = scorer(declared, isolate=config.data.isolate_documents, chunk=config.train.loss_chunk)
    return Run(
        config=config,
        folder=folder,
        display=display,
        stop=stop,
        corpus=corpus,
        loader=loader,
        heldout=heldout,
        mesh=mesh,
        state=state,
        step=record.get("step", 0),
        seconds_before=record.get("seconds", 0.0),
        train_step=_compiled_step(config, mesh, placement, display),
        score=Compiled(jax.jit(score, out_shardings=_everywhere(mesh)), mesh),
        checkpoints=checkpoints,
        metrics=Metrics(folder, config, first_step=record.get("step", 0))
        if processes.is_first()
        else None,
        faults=Faults(
            folder, skipped=record.get("skipped_steps", 0), silent=not processes.is_first()
        ),
        meter=Meter(flops_per_token=train_flops_per_token(config.model, length), peak=peak),
        peak=peak,
        started=started,
    )


def corpus_of(config: Config, progress: Progress | None = None) -> Corpus:
    """The text that a config trains on and is scored on, tokenized or from the cache."""
    data = config.data
    return prepare_corpus(
        files=data.files,
        heldout_files=data.heldout_files,
        heldout_fraction=data.heldout_fraction,
        text_field=data.text_field,
        tokenizer_path=data.tokenizer,
        vocab_size=config.model.vocab_size,
        cache_dir=data.cache_dir,
        progress=progress,
    )


def training_rows(config: Config, corpus: Corpus) -> PackedSequences:
    """The rows that a config's steps take, in order."""
    return PackedSequences(
        corpus.train,
        corpus.tokenizer.special,
        sequence_length=config.data.sequence_length,
        seed=config.data.seed,
        fim_rate=config.data.fim_rate,
    )


def _restore_or_make(
    config: Config, folder: Path, mesh: Mesh, abstract: TrainState, display: Display
) -> tuple[TrainState, dict[str, Any]]:
    """State and record of the newest checkpoint that is whole, or a new state and no record."""
    directory = folder / "checkpoints"
    step = store.newest_whole(directory, set_aside=True, say=display.say)
    if step is None:
        optimizer = adamw(config.optim)
        declared = declared_model(config.model, config.precision)
        return initial_state(declared, optimizer, mesh, config.train.seed), {}
    record = store.read_record(directory, step)
    state = store.restore(directory, step, abstract)
    display.say(f"resuming {folder} after step {step} of {config.train.steps}")
    changed = workdir.changed_versions(record["versions"])
    if changed:
        display.say(
            f"since then changed: {', '.join(changed)}; the run goes on, perhaps not bit for bit"
        )
    return state, record


def _compiled_step(config: Config, mesh: Mesh, placement: TrainState, display: Display) -> Compiled:
    # Without out_shardings the compiler may place the new state where the next step cannot take it.
    declared = declared_model(config.model, config.precision)
    step = jax.jit(
        train_step(
            declared, adamw(config.optim), pretraining(config), schedule=config.mesh.schedule
        ),
        donate_argnums=0,
        out_shardings=(placement, _everywhere(mesh)),
        compiler_options=compiler_options(Target.here(), mesh.size),
    )
    return Compiled(step, mesh, announce=lambda: display.say("compiling the training step"))


def _everywhere(mesh: Mesh) -> NamedSharding:
    """The placement of numbers that each process reads."""
    return NamedSharding(mesh, PartitionSpec())
