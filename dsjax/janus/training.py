"""A stage of the training of a model that sees and draws.

A stage begins with a published folder (Janus, Janus-Pro, JanusFlow; DeepSeek-VL and VL2, which see
and do not draw) and ends with another, `model/` in the run's folder, in the same layout: what the
next stage begins with, and what tools/generate.py and tools/draw.py take.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from dsjax.checkpoint import alignment, store
from dsjax.checkpoint.eyes import load_eyes
from dsjax.checkpoint.importing import copy_side_files, side_files
from dsjax.checkpoint.load import Checkpoint, open_checkpoint
from dsjax.checkpoint.sighted import load_masters, write_sighted
from dsjax.checkpoint.vae import WEIGHTS, load_vae
from dsjax.config.janus import KINDS, Janus
from dsjax.config.vision import PATCH, VisionConfig
from dsjax.data.packing import stack
from dsjax.files import cache_folder, publish
from dsjax.infer.drawing import vae_of
from dsjax.infer.looking import open_format
from dsjax.infer.pictured import PicturedFormat
from dsjax.janus.examples import read_examples
from dsjax.janus.objective import seeing_and_drawing
from dsjax.janus.rows import ExampleRows, MixedKinds, Shape
from dsjax.kernels.target import Target
from dsjax.model.flops import train_flops_per_token
from dsjax.parallel import processes
from dsjax.parallel.compilation import Compiled
from dsjax.parallel.mesh import make_mesh
from dsjax.posttrain.rows import hold_out
from dsjax.precision.policy import advice
from dsjax.train import header, hyperparameters, loop, session
from dsjax.train.batches import batch_sharding, place_all
from dsjax.train.evaluate import batch_sums
from dsjax.train.initial import new_values
from dsjax.train.optimizer import Optimizer, Trains, adamw
from dsjax.train.session import Session
from dsjax.train.source import RowSource
from dsjax.train.step import (
    TrainState,
    abstract_state,
    compile_step,
    declared_model,
    restored_model,
    train_step,
)
from dsjax.vision import pictures
from dsjax.vision.sighted import Sighted
from dsjax.vision.vae import Vae
from dsjax.vision.vq import Vq

MODEL = "model"  # the folder of the result, in the run's
_PARTS = {  # of `janus.trains`, by the names below `eyes`
    "tower": ("tower", "high"),
    "aligner": ("aligner", "hybrid", "begin", "newline", "separator"),
    "drawing": ("pencil", "brush"),
}


class Data(NamedTuple):
    """The rows of a run."""

    training: MixedKinds
    heldout: MixedKinds | None
    micro_batches: int  # of held-out rows


def train(config: Janus, folder: Path, *, command: str, console: Console | None = None) -> int:
    """Trains the checkpoint `config.init` in `folder`; arguments, result and errors are those of
    `session.run`.
    """
    console = console or Console(quiet=not processes.is_first())
    checkpoint, form = _opened(config, folder)
    config = _filled(config, checkpoint)
    say = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
    data = read_data(config, checkpoint, form, say)

    def recipe(under_way: Session) -> None:
        run = JanusRun(config, checkpoint, form, data, under_way)
        loop.run_steps(
            under_way,
            run.train_step,
            batch_size=lambda step: hyperparameters.batch_size(config.train, step),
            knobs=lambda step: _knobs(config, step),
            evaluate=run.evaluate,
        )
        if not under_way.exit_code:
            run.finish()

    return session.run(config, folder, recipe, command=command, console=console)


def _opened(config: Janus, folder: Path) -> tuple[Checkpoint, PicturedFormat]:
    """Returns what `open_initial` does; an error says why a run that resumes needs it too."""
    try:
        return open_initial(config)
    except ValueError as error:
        if store.latest(folder / "checkpoints") is None:
            raise
        raise ValueError(
            f"{error}. To go on with its own weights, {folder} still reads how pictures are "
            f"prepared, the tokenizers and the layout of {MODEL}/ from what it began with, "
            f"{config.init}; put that folder, or a link to it, back in its place"
        ) from error


def open_initial(config: Janus) -> tuple[Checkpoint, PicturedFormat]:
    """Opens the folder that a run begins with.

    Raises:
      ValueError: it is no model that sees, cannot draw what `janus.ratio` asks for, or has no
        `janus.trains`.
    """
    pictures.require_package()
    checkpoint = open_checkpoint(config.init)
    form = open_format(checkpoint)
    if form is None:
        raise ValueError(
            f"{config.init} is a language model alone; begin with a published folder of Janus, "
            "Janus-Pro, JanusFlow, DeepSeek-VL or VL2, or with model/ of an earlier stage"
        )
    check_sight(config, form.vision)
    if config.janus.alignment and not Path(config.janus.alignment).is_file():
        raise ValueError(
            f"janus.alignment={config.janus.alignment} is not a file; name {alignment.FILE} in the "
            "folder of the run of an earlier stage, or leave it out to begin anew"
        )
    if config.counts[KINDS.index("draw")] and form.vision.flow and not config.janus.vae:
        raise ValueError(
            f"{config.init} draws latents, and the VAE that makes them of pictures is not in its "
            f"folder; download config.json and {WEIGHTS} of stabilityai/sdxl-vae, and set "
            "janus.vae=FOLDER"
        )
    if config.janus.vae and not form.vision.flow:
        raise ValueError(
            f"janus.vae={config.janus.vae} is for JanusFlow, and {config.init} is not one; leave "
            "it out"
        )
    return checkpoint, form


def check_sight(config: Janus, vision: VisionConfig) -> None:
    """Raises ValueError if a model cannot draw what `janus.ratio` asks for, has no `janus.trains`,
    or nothing that `janus.align` aligns.
    """
    n_draw = config.counts[KINDS.index("draw")]
    if (n_draw or "drawing" in config.janus.trains) and not vision.draws:
        raise ValueError(
            f"{config.init} sees and does not draw; set janus.ratio=1,0,0 or 1,1,0, and leave "
            "drawing out of janus.trains"
        )
    if config.janus.align and not vision.flow:
        raise ValueError(
            f"janus.align={config.janus.align} is for JanusFlow, and {config.init} is not one; set "
            "janus.align=0"
        )


def _filled(config: Janus, checkpoint: Checkpoint) -> Janus:
    return dataclasses.replace(config, init=str(checkpoint.path), model=checkpoint.model)


def _knobs(config: Janus, step: int) -> dict[str, float]:
    share = hyperparameters.progress(config.train, step)
    return {
        "learning_rate": hyperparameters.learning_rate(config.optim, step, share),
        "bias_update_speed": hyperparameters.bias_update_speed(config.train, share),
    }


def read_data(
    config: Janus, checkpoint: Checkpoint, form: PicturedFormat, say: Callable[[str], None]
) -> Data:
    """Reads, encodes, divides and packs the examples of a run, and makes codes or latents.

    Raises:
      ValueError: see `examples.read_examples`.
    """
    own, cache = config.janus, cache_folder(config.janus.cache_dir) / "janus"
    cache.mkdir(parents=True, exist_ok=True)
    found = read_examples(
        config,
        form,
        functools.partial(_open_autoencoder, config, checkpoint, form.vision),
        cache,
        say,
        progress=lambda done, total: say(f"encoding {total:,} pictures") if not done else None,
    )
    length = config.sequence_length + 1
    training: list[ExampleRows | None] = []
    heldout: list[ExampleRows | None] = []
    for kind in KINDS:
        examples = found.get(kind)
        if examples is None:
            training.append(None)
            heldout.append(None)
            continue
        kept, held = hold_out(examples.digests(), own.heldout_fraction)
        rows = functools.partial(ExampleRows, examples, form=form, length=length)
        training.append(rows(numbers=kept, blank=own.blank, seed=own.seed))
        heldout.append(rows(numbers=held) if len(held) else None)
        n_rows = len(training[-1] or ())
        say(f"janus.{kind}: {len(kept):,} in {n_rows:,} rows, {len(held):,} held out")
    every = [part for part in (*training, *heldout) if part]
    shape = _shape(config, form, every)
    mixed = functools.partial(MixedKinds, counts=config.counts, shape=shape, seed=own.seed)
    whole = all(
        part is not None for part, count in zip(heldout, config.counts, strict=True) if count
    )
    if not whole:
        return Data(mixed(training, blank=own.blank), None, 0)
    needed = max(
        -(-len(part) // count) for part, count in zip(heldout, config.counts, strict=True) if part
    )
    return Data(mixed(training, blank=own.blank), mixed(heldout, blank=0.0), needed)


def _open_autoencoder(config: Janus, checkpoint: Checkpoint, vision: VisionConfig) -> Vq | Vae:
    if vision.flow:
        return load_vae(vae_of(Path(config.janus.vae), vision.flow))
    return load_eyes(checkpoint, dtype=np.float32).pencil.vq


def _shape(config: Janus, form: PicturedFormat, parts: Sequence[ExampleRows]) -> Shape:
    vision, side = form.vision, PATCH * form.vision.code_grid
    n_drawings = max(part.most_drawings for part in parts)
    return Shape(
        config.sequence_length + 1,
        n_pictures=max(part.most_pictures for part in parts),
        size=vision.tower.image_size,
        large=vision.high.image_size if vision.high else 0,
        n_drawings=n_drawings,
        latents=(side, side, vision.flow.latent_channels) if n_drawings and vision.flow else (),
        drawn=vision.tower.image_size if config.janus.align else 0,
    )


def trained_parts(parts: tuple[str, ...]) -> Trains:
    """Says which parameters `janus.trains` names, for `optimizer.adamw`. What aligns drawings
    always trains. The VQ tokenizer, a tower's pooling head, which nothing reads, and MTP modules
    never do.
    """
    named = {name for part in parts for name in _PARTS.get(part, ())}

    def trains(path: tuple[Any, ...]) -> bool:
        if path[0] == "alignment":
            return True
        if path[0] != "eyes":
            return "language" in parts and path[0] != "mtp"
        return path[1] in named and path[1:3] not in (("pencil", "vq"), ("tower", "pool"))

    return trains


class JanusRun:
    """What the training of a model that sees and draws adds to a session."""

    def __init__(
        self,
        config: Janus,
        checkpoint: Checkpoint,
        form: PicturedFormat,
        data: Data,
        run: Session,
    ) -> None:
        """Prepares the programs, and begins the session.

        Raises:
          ValueError: config, checkpoint, mesh or workdir do not fit; says what to do.
          OSError: a file cannot be read or written.
        """
        self.config, self.checkpoint, self.data, self.session = config, checkpoint, data, run
        mesh, length = make_mesh(config.mesh.sizes), config.sequence_length
        batch_sharding((config.micro_batch_size, length + 1), mesh)  # fails early
        self.declared = declared_sighted(config, form.vision)
        if slow := advice(config.precision.compute, Target.here()):
            run.display.say(slow)
        optimizer = adamw(config.optim, trained_parts(config.janus.trains))
        abstract = abstract_state(self.declared, optimizer, mesh)
        flops = train_flops_per_token(config.shape, length)
        run.display.console.print(
            header.table(
                config, self.declared, abstract, mesh, optimizer=optimizer, folder=run.folder,
                tokens=length * hyperparameters.sequences_before(config.train, config.train.steps),
                takes=header.sequences(config, length), flops_per_token=flops,
            )
        )  # fmt: skip
        size = config.micro_batch_size
        run.begin(
            RowSource(data.training, mesh, micro_batch_size=size, length=length + 1),
            abstract,
            lambda: first_state(config, checkpoint, self.declared, optimizer, abstract, mesh),
            mesh=mesh,
            flops_per_token=flops,
        )
        objective = seeing_and_drawing(config, form.rules)
        step = train_step(self.declared, optimizer, objective)
        self.train_step = compile_step(step, abstract, mesh, display=run.display)
        everywhere = NamedSharding(mesh, PartitionSpec())  # for numbers that each process reads
        sums = jax.jit(batch_sums(self.declared, objective), out_shardings=everywhere)
        self.sums = Compiled(sums, mesh, what="the score", display=run.display)
        self._metrics = objective.metrics

    def evaluate(self) -> dict[str, float]:
        """Scores held-out rows, at most `train.eval_sequences`, the same ones every time."""
        rows, size = self.data.heldout, self.config.micro_batch_size
        if rows is None:
            return {}
        asked = max(self.config.train.eval_sequences // size, 1)
        total: dict[str, Any] = {}
        for number in range(min(asked, self.data.micro_batches)):
            batch = stack([rows[number * size + place] for place in range(size)])
            placed = place_all(batch, self.session.mesh)
            found = self.sums(self.session.state, placed, {})
            total = {name: total.get(name, 0.0) + float(value) for name, value in found.items()}
        return {f"eval_{name}": float(value) for name, value in self._metrics(total).items()}

    def finish(self) -> None:
        """Scores held-out rows, writes the model, and writes summary.json."""
        run = self.session
        run.settle()
        found = self.evaluate()
        if run.interrupted():
            return
        run.display.say(f"writing {run.folder / MODEL}")
        self._write_model(run.folder / MODEL)
        if run.metrics is None:
            return
        if found and "eval_loss" not in run.metrics.lines()[-1]:
            run.log_evaluation(found)
        last = [line for line in run.metrics.lines() if "loss" in line][-1]
        losses = {name: value for name, value in last.items() if name.endswith("loss")}
        seconds = self.train_step.seconds + self.sums.seconds
        run.finish(
            {"init": self.config.init, **losses, **found, **run.throughput()},
            compile_seconds=seconds,
        )

    def _write_model(self, target: Path) -> None:
        """Writes the folder that the next stage begins with, in the layout of the first."""
        hf, mesh, first = self.checkpoint.hf, self.session.mesh, processes.is_first()
        assert hf is not None and hf.beside is not None
        partial = target.with_name(f"{MODEL}.partial")
        if first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            text = self.checkpoint.tokenizer_folder
            copy_side_files([f for f in side_files(text) if f.name != "config.json"], partial)
        whole = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))

        def gather(array: jax.Array) -> np.ndarray:
            return np.asarray(whole(array))

        model = cast(Sighted, restored_model(self.declared, self.session.state))
        write_sighted(
            partial,
            model,
            hf.family,
            hf.beside.parts,
            hf.config,
            np.dtype(self.checkpoint.dtype),
            gather,
            writes=first,
        )
        if self.config.janus.align:
            projects = jax.tree.map(gather, model.alignment)
            if first:
                alignment.write_alignment(target.parent, projects)
        if first:
            shutil.rmtree(target, ignore_errors=True)
            publish(partial, target)


def declared_sighted(config: Janus, vision: VisionConfig, target: Target | None = None) -> Sighted:
    """Declares the model of a run, without values.

    Args:
      target: the machine to compile for; None: JAX's own devices.
    """
    policy = declared_model(config.shape, config.precision, target).policy
    return Sighted(config.shape, vision, policy, aligns=config.janus.align > 0)


def first_state(
    config: Janus,
    checkpoint: Checkpoint,
    declared: Sighted,
    optimizer: Optimizer,
    abstract: TrainState,
    mesh: Mesh,
) -> TrainState:
    """Returns the state before the first step: the checkpoint's weights, new moments and, with
    `janus.align`, the projection of `janus.alignment` or a new one.

    Raises:
      ValueError: files are damaged, or they do not fit the model or the mesh.
    """
    params, router = load_masters(checkpoint, mesh)
    if config.janus.alignment:
        found = alignment.load_alignment(Path(config.janus.alignment), declared.alignment, mesh)
        _, own, _ = nnx.split(found, nnx.Param, ...)
        params = nnx.merge_state(params, nnx.State({"alignment": own}))
    elif config.janus.align:
        paths = [path for path, _ in nnx.to_flat_state(abstract.params) if path[0] == "alignment"]
        new = new_values(declared, abstract, paths, config.janus.seed)
        params = nnx.merge_state(params, nnx.from_flat_state(new))
    placement = jax.tree.map(lambda leaf: leaf.sharding, abstract.optimizer)
    moments = jax.jit(optimizer.init, out_shardings=placement)(params)
    return TrainState(params, router, moments)
