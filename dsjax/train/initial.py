"""The checkpoint that a pre-training run may begin with, in place of random weights: to extend the
context, or to train an indexer for a dense model and then the whole.

    config, checkpoint = open_initial(config, folder)      # None without `init`
    state = state_of(checkpoint, declared, optimizer, mesh, seed)

A run that has a checkpoint of its own goes on with that, and needs nothing of the one that it began
with, which may be gone by then.

The model is the config's. Its parameters have the shapes of the checkpoint's, except for an indexer
that the checkpoint lacks, which begins with random values. What has no shape (rope, the number of
experts per token) is the config's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dsjax import settings
from dsjax.checkpoint import store
from dsjax.checkpoint.load import Checkpoint, load, open_checkpoint
from dsjax.config import Config
from dsjax.files import listed
from dsjax.model.parameters import declarations, initialize
from dsjax.model.transformer import Transformer
from dsjax.precision.policy import Policy
from dsjax.text.tokenizer import FILE_NAMES
from dsjax.train.optimizer import Optimizer
from dsjax.train.step import TrainState, abstract_state, split


def open_initial(config: Config, folder: Path) -> tuple[Config, Checkpoint | None]:
    """Opens the checkpoint that a run in `folder` begins with, if any, and checks that its
    parameters are the model's.

    Returns:
      the config with the checkpoint's tokenizer, unless it names one; and the checkpoint, None
      where the run goes on with its own.

    Raises:
      ValueError: there is no whole checkpoint, or its parameters are others; names them.
    """
    if not config.init:
        return config, None
    if _has_own(folder):
        return _resumed(config, folder), None
    checkpoint = open_checkpoint(config.init)
    wanted, there = _shapes(config.model), _shapes(checkpoint.model)
    wrong = [
        f"{path} {list(shape)}" + (f", there {list(there[path])}" if path in there else " is new")
        for path, shape in wanted.items()
        if there.get(path) != shape and (path in there or not _may_be_new(path))
    ]
    wrong += [f"{path} {list(there[path])} is left over" for path in there.keys() - wanted.keys()]
    if wrong:
        raise ValueError(
            f"init={config.init}: its parameters are not those of {config.name}: {listed(wrong)}. "
            "Begin with a checkpoint of the config's shape, or change the model.* keys"
        )
    there = (checkpoint.tokenizer_folder / name for name in FILE_NAMES)
    found = next(filter(Path.is_file, there), None)
    if found and not config.data.tokenizer:
        config = _with_tokenizer(config, str(found))
    return config, checkpoint


def _resumed(config: Config, folder: Path) -> Config:
    """Returns the config with the tokenizer that the run's own config names, unless it names one
    itself.
    """
    path = folder / "config.json"
    if config.data.tokenizer or not path.is_file():  # `workdir.claim` says what is missing
        return config
    return _with_tokenizer(config, settings.load_config(path).data.tokenizer)


def with_kept_tokenizer(config: Config, folder: Path) -> Config:
    """Returns the config that names the tokenizer which a run in `folder` has kept, if the run has
    begun and the one that its config names is gone.
    """
    named, kept = config.data.tokenizer, folder / FILE_NAMES[0]
    gone = bool(named) and not Path(named).expanduser().exists()
    return _with_tokenizer(config, str(kept)) if gone and _has_own(folder) else config


def _has_own(folder: Path) -> bool:
    return store.latest(folder / "checkpoints") is not None


def _with_tokenizer(config: Config, path: str) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=path))


def state_of(
    checkpoint: Checkpoint, declared: Transformer, optimizer: Optimizer, mesh: Mesh, seed: int
) -> TrainState:
    """Returns the state before the first step, each device its own part: the checkpoint's weights
    as float32 masters, its router biases, new moments, and random values for what it lacks.

    Raises:
      ValueError: files are damaged, or the model does not fit the mesh.
    """
    abstract = abstract_state(declared, optimizer, mesh)
    _, loaded, router = split(load(checkpoint, mesh=mesh, dtype=np.float32))
    known = dict(nnx.to_flat_state(loaded))
    lacking = [path for path, _ in nnx.to_flat_state(abstract.params) if path not in known]
    params = nnx.from_flat_state(known | new_values(declared, abstract, lacking, seed))
    placement = jax.tree.map(lambda leaf: leaf.sharding, abstract.optimizer)
    moments = jax.jit(optimizer.init, out_shardings=placement)(params)
    return TrainState(params, router, moments)


def new_values(
    declared: Transformer, abstract: TrainState, paths: Collection[Any], seed: int
) -> dict[Any, Any]:
    """Returns random values of some parameters by their paths, each device its own part."""
    placement = {
        path: jax.tree.map(lambda leaf: leaf.sharding, variable)
        for path, variable in nnx.to_flat_state(abstract.params)
        if path in paths
    }

    def new(key: jax.Array) -> dict[Any, Any]:
        values = dict(nnx.to_flat_state(split(initialize(declared, key))[1]))
        return {path: values[path] for path in placement}

    if not placement:
        return {}
    return jax.jit(new, out_shardings=placement)(jax.random.key(seed))


def _may_be_new(path: str) -> bool:
    return ".indexer." in path


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {each.path: each.shape for each in declarations(Transformer(model, Policy()))}
