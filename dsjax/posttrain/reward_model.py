"""Reward models: a language model's body with one number per answer in place of a vocabulary.

The score of an answer is read at its last token, the end token, by a head of shape [D, 1]. The
output head stays with the weights and rests, so the body can be told from the checkpoint that it
came from; a reward model writes no text.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dsjax.checkpoint.load import Checkpoint, load, open_checkpoint
from dsjax.config import ModelConfig
from dsjax.model.layers import Normal, declare
from dsjax.model.parameters import initialize, shardings
from dsjax.model.transformer import Transformer
from dsjax.parallel.context import arrange
from dsjax.parallel.sharding import parts
from dsjax.precision.policy import Policy
from dsjax.text.chat import ChatFormat, find_format
from dsjax.text.vocabulary import Vocabulary, open_vocabulary

_SHORTEST = 64  # positions of a program; longer ones double, so that few are compiled


class RewardHead(nnx.Module):
    """A linear map from the width to a score, in float32.

    Its initial values have the deviation 1 / sqrt(D + 1), as in Stiennon et al. (arXiv:2009.01325).
    """

    def __init__(self, dim: int):
        self.weight = declare((dim, 1), ("embed", "norm"), Normal(1 / math.sqrt(dim + 1)))

    def __call__(self, hidden_BD: jax.Array) -> jax.Array:
        """Returns float32 [B]."""
        return (hidden_BD.astype(jnp.float32) * self.weight[...].T).sum(axis=-1)


class RewardModel(Transformer):
    """A transformer with a reward head beside its output head, which rests."""

    def __init__(self, config: ModelConfig, policy: Policy):
        super().__init__(config, policy)
        self.reward = RewardHead(config.dim)

    def scores(self, hidden_BTD: jax.Array, last_BT: jax.Array) -> jax.Array:
        """Scores rows by their normed hidden state at one position each; float32 [B].

        Args:
          last_BT: float32, 1 at that position and 0 elsewhere.
        """
        # A sum, not a lookup: the positions may be split over devices.
        at_last = jnp.where(last_BT[..., None] > 0, hidden_BTD, jnp.zeros((), hidden_BTD.dtype))
        return self.reward(at_last.sum(axis=1))


def trains(path: tuple[Any, ...]) -> bool:
    """Says which parameters of a reward model train: all but output head and MTP modules, which
    have no gradient and would only decay.
    """
    return path[0] not in ("head", "mtp")


def new_head(config: ModelConfig, mesh: Mesh, seed: int) -> nnx.State:
    """Returns the parameters that a language model lacks to be a reward model, at
    `RewardModel`'s paths.
    """
    make = functools.partial(initialize, RewardHead(config.dim))
    placement = shardings(jax.eval_shape(make, jax.random.key(0)), mesh)
    head = jax.jit(make, out_shardings=placement)(jax.random.key(seed))
    return nnx.State({"reward": nnx.state(head).raw_mapping})


class Scorer:
    """A reward model that judges answers, one or many at a time.

    Attributes:
      chat: None for a base model, whose tokenizer has no tokens for turns.
    """

    def __init__(self, checkpoint: Checkpoint, model: RewardModel, mesh: Mesh | None) -> None:
        folder = checkpoint.tokenizer_folder
        self.vocabulary: Vocabulary = open_vocabulary(folder, checkpoint.model.vocab_size)
        self.chat: ChatFormat | None = find_format(folder, self.vocabulary)
        self._model, self._mesh = model, mesh

    @property
    def longest(self) -> int:
        """The most tokens that it judges, the prompt's included."""
        return self._model.config.max_seq_len

    def __call__(self, ids: Sequence[int]) -> float:
        """Scores a prompt with its answer, the end token included.

        Raises:
          ValueError: there is no token, or more than the model has positions for.
        """
        return self.many([ids])[0]

    def many(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Scores several; the same values as one at a time, up to rounding."""
        if not rows:
            return []
        lengths = [len(ids) for ids in rows]
        most = self._model.config.max_seq_len
        if not all(0 < length <= most for length in lengths):
            raise ValueError(
                f"answers of {min(lengths)} to {max(lengths)} tokens, prompt "
                f"included; the reward model judges 1 to {most} (max_seq_len)"
            )
        length = min(max(_SHORTEST, 1 << (max(lengths) - 1).bit_length()), most)
        # Rows of nothing fill what the devices share out.
        share = 1 if self._mesh is None else parts("batch", self._mesh)
        shape = (-(-len(rows) // share) * share, length)
        tokens, last = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        for row, ids in enumerate(rows):
            tokens[row, : len(ids)] = ids
            last[row, len(ids) - 1] = 1
        with contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh):
            scores = np.asarray(_score(self._model, tokens, last))
        return scores[: len(rows)].tolist()


@jax.jit
def _score(model: RewardModel, tokens_BT: jax.Array, last_BT: jax.Array) -> jax.Array:
    # Padding comes after the answer, where causal attention keeps it from being seen.
    hidden = model.hidden(tokens_BT, mtp=False).main_BTD
    return model.scores(hidden, arrange(last_BT))


def load_reward_model(
    path: str | os.PathLike[str], *, mesh: Mesh | None = None, dtype: Any = None
) -> Scorer:
    """Loads the run of a reward model, as `tools/prefer.py` makes it; it takes the ids of a prompt
    with its answer, and returns a score.

    The arguments are those of `dsjax.load`. Without a mesh this process loads it alone, whatever
    other processes there are.

    Raises:
      ValueError: the folder is no run of a reward model, or is damaged.
    """
    checkpoint = open_checkpoint(path, kind=RewardModel, together=mesh is not None)
    if checkpoint.kind is not RewardModel:
        raise ValueError(
            f"{path} is not the run of a reward model; train one from it with tools/prefer.py "
            "--set preference.kind=bradley_terry"
        )
    model = load(checkpoint, mesh=mesh, dtype=dtype)
    assert isinstance(model, RewardModel)
    return Scorer(checkpoint, model, mesh)
