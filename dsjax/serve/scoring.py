"""Log-probabilities of given tokens and of the most likely ones at their places, for `echo`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.generate.record import top
from dsjax.infer.score import Scorer
from dsjax.model.transformer import Transformer
from dsjax.precision.matmul import vocabulary_logits
from dsjax.serve.options import MOST_TOP

_CHUNK = 256
_SHORTEST = 512


class Scored(NamedTuple):
    """Reports on tokens 1, 2, ... of a text; the first is not predicted."""

    logprobs: np.ndarray  # float32 [n - 1]
    top_ids: np.ndarray  # int32 [n - 1, MOST_TOP]
    top_logprobs: np.ndarray  # float32 [n - 1, MOST_TOP]


class PromptScorer:
    """Scores prompts, padded to one of a few lengths so that all programs are compiled at start.

    Args:
      longest: prompt, in tokens.
    """

    def __init__(self, scorer: Scorer, longest: int) -> None:
        self._scorer = scorer
        lengths = {_SHORTEST * 4**power for power in range(longest.bit_length())}
        self._lengths = sorted({min(length, longest) for length in lengths})

    def warm(self) -> Iterator[None]:
        """Compiles one program after the other, and yields after each."""
        for length in self._lengths:
            self.score([0] * length)
            yield

    def score(self, ids: Sequence[int]) -> Scored:
        """Scores one prompt."""
        n_tokens = len(ids)
        length = next(size for size in self._lengths if size >= n_tokens)
        tokens_1T = np.zeros((1, length), np.int32)
        tokens_1T[0, :n_tokens] = ids
        ((hidden_TD, *_),) = self._scorer.hidden(tokens_1T, mtp=False)
        targets = np.concatenate([tokens_1T[0, 1:], [0]]).astype(np.int32)
        parts = []
        for start in range(0, max(n_tokens - 1, 1), _CHUNK):
            piece = slice(start, start + _CHUNK)
            parts.append(_report(self._scorer.model, hidden_TD[piece], targets[piece]))
        joined = (np.concatenate(arrays)[: n_tokens - 1] for arrays in zip(*parts, strict=True))
        return Scored(*joined)


@jax.jit
def _report(
    model: Transformer, hidden_TD: jax.Array, targets_T: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    logits_TV = vocabulary_logits(hidden_TD, model.head_weight(), model.policy)
    # One array for both, so that clients may compare a token's with the greatest by equality.
    logprobs_TV = jax.nn.log_softmax(logits_TV, axis=-1)
    top_logprobs, top_ids = top(logprobs_TV, MOST_TOP)
    own_T1 = jnp.take_along_axis(logprobs_TV, targets_T[:, None], axis=-1)
    return own_T1[:, 0], top_ids, top_logprobs
