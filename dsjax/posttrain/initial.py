"""The checkpoint that post-training begins with: its shape, tokenizer, chat format and weights.

    initial = open_initial(arguments.init)
    config = initial.fill(config)                        # config.model is the checkpoint's
    optimizer = adamw(config.optim, all_but_mtp)
    state = initial.state(declared, optimizer, mesh)     # a new state with its weights
    initial.keep_files(run.folder)                       # so that the run can be used alone

A run that resumes when this checkpoint is gone makes do with what it has kept of it: its weights
are needed no more.

MTP modules come along and rest, if the objective's forward pass has `mtp=False` and the optimizer
leaves them out. Speculation with them stays correct, though fewer drafts are accepted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dsjax import settings
from dsjax.checkpoint import store
from dsjax.checkpoint.importing import copy_side_files, side_files
from dsjax.checkpoint.load import Checkpoint, load, open_checkpoint
from dsjax.config import ModelConfig
from dsjax.config.posttraining import PostTraining
from dsjax.files import read_json
from dsjax.model.transformer import Transformer
from dsjax.text import tokenizer
from dsjax.text.chat import ChatFormat, find_format
from dsjax.text.vocabulary import Vocabulary, open_vocabulary
from dsjax.train.optimizer import Optimizer
from dsjax.train.step import TrainState, abstract_state, split

AnyPostTraining = TypeVar("AnyPostTraining", bound=PostTraining)

# What a pre-training run keeps of its tokenizer, at the top of its folder.
_OF_A_RUN = (*tokenizer.FILE_NAMES, "tokenizer_config.json", "generation_config.json")


@dataclasses.dataclass(frozen=True)
class Initial:
    """A checkpoint, open for reading, or what a run has kept of one that is gone.

    Attributes:
      text_folder: where the tokenizer and the chat template come from.
      chat: None for a base model, whose tokenizer has no tokens for turns.
    """

    path: Path
    model: ModelConfig
    text_folder: Path
    vocabulary: Vocabulary
    chat: ChatFormat | None
    _opened: Checkpoint | None  # None: it is gone

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint itself.

        Raises:
          ValueError: it is gone.
        """
        if self._opened is None:
            raise ValueError(
                f"{self.path}, which the run began with, is gone, and its weights are needed once "
                "more; put it back, or begin anew in another --workdir"
            )
        return self._opened

    def fill(self, config: AnyPostTraining) -> AnyPostTraining:
        """Returns the config with this checkpoint's path and shape.

        Raises:
          ValueError: they break a rule of the config.
        """
        return dataclasses.replace(config, init=str(self.path), model=self.model)

    def state(
        self,
        declared: Transformer,
        optimizer: Optimizer,
        mesh: Mesh,
        new: nnx.State | None = None,
    ) -> TrainState:
        """Returns the state before the first step, each device its own part: the checkpoint's
        weights as float32 masters, its router biases, and new moments.

        Args:
          declared: the model without values, of this checkpoint's shape.
          new: parameters that the checkpoint lacks, such as a reward model's head.

        Raises:
          ValueError: files are damaged, or the model does not fit the mesh.
        """
        abstract = abstract_state(declared, optimizer, mesh)
        loaded = load(self.checkpoint, mesh=mesh, dtype=np.float32)
        _, params, router = split(loaded)
        if new is not None:
            params = nnx.merge_state(params, new)
        placement = jax.tree.map(lambda leaf: leaf.sharding, abstract.optimizer)
        moments = jax.jit(optimizer.init, out_shardings=placement)(params)
        return TrainState(params, router, moments)

    def keep_files(self, folder: Path) -> None:
        """Copies the tokenizer, the chat template and the published config into a run's folder.

        What Hugging Face published goes to `hf/`, as in a converted folder, from where it is
        exported unchanged; a pre-training run's tokenizer goes to the top, as that run has it.
        """
        if self._opened is None:
            return  # it has them
        if _is_run(self.text_folder):
            found = [self.text_folder / name for name in _OF_A_RUN]
            copy_side_files([file for file in found if file.is_file()], folder)
            return
        files = [file for file in side_files(self.text_folder) if file.name != "config.json"]
        published = self._opened.tokenizer_folder / "config.json"
        if published.is_file() and not _is_run(published.parent):
            files.append(published)
        (folder / "hf").mkdir(exist_ok=True)
        copy_side_files(files, folder / "hf")


def _is_run(folder: Path) -> bool:
    return (folder / "checkpoints").is_dir()


def all_but_mtp(path: tuple[Any, ...]) -> bool:
    """Says that all parameters train but the MTP modules', for `optimizer.adamw`: without a
    gradient they would still decay.
    """
    return path[0] != "mtp"


def open_initial(
    path: str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    tokenizer: str = "",
    run: Path | None = None,
) -> Initial:
    """Opens a Hugging Face folder, a converted folder, or a run of any kind.

    Args:
      overrides: fields of a Hugging Face config.json, see `dsjax.load`.
      tokenizer: folder of a tokenizer and a chat template to use instead of the checkpoint's; ids
        must be within its vocabulary.
      run: folder of the run that begins with it. If that has a checkpoint of its own, this one may
        be gone.

    Raises:
      ValueError: there is no whole checkpoint with a tokenizer; says what is missing.
    """
    checkpoint = None
    if run is not None and (model := _kept_model(path, run)) is not None:
        path, kept = Path(path), run / "hf" if (run / "hf").is_dir() else run
    else:
        checkpoint = open_checkpoint(path, overrides)
        path, model, kept = checkpoint.path, checkpoint.model, checkpoint.tokenizer_folder
    folder = Path(tokenizer) if tokenizer else kept
    vocabulary = open_vocabulary(folder, model.vocab_size)
    return Initial(path, model, folder, vocabulary, find_format(folder, vocabulary), checkpoint)


def _kept_model(path: str | Path, run: Path) -> ModelConfig | None:
    """Returns the model of a run that has a checkpoint of its own and began with `path`, which is
    gone; None for any other.
    """
    config = run / "config.json"
    begun = store.latest(run / "checkpoints") is not None and config.is_file()
    if Path(path).exists() or not begun or (values := read_json(config)).get("init") != str(path):
        return None
    return settings.from_dict(values["model"], f"{config}: model", ModelConfig)
