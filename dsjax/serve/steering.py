"""What the next token of a reply may be: a grammar, penalties and a bias.

Penalties are OpenAI's: from the logit of each token that the reply has already, its count times
`frequency_penalty` and once `presence_penalty` are subtracted. A grammar rules the answer, not the
thought before it, and ends with the reply.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Protocol

import numpy as np


class Grammar(Protocol):
    """What a text may be."""

    def allowed(self) -> np.ndarray | None:
        """Returns which tokens may come next, bool [V]; None: all."""
        ...

    def push(self, token: int) -> None:
        """Takes note of a token that was drawn."""
        ...


class Rules:
    """The steering of one choice.

    Args:
      thought: whether the reply begins inside a thought.
      think_ids: ids of <think> and </think>, if there are such tokens.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        grammar: Grammar | None = None,
        logit_bias: Mapping[int, float] | None = None,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        thought: bool = False,
        think_ids: tuple[int, int] | None = None,
    ) -> None:
        self._grammar = grammar
        self._constant = np.zeros(vocab_size, np.float32)
        for token, bias in (logit_bias or {}).items():
            self._constant[token] = bias
        self._penalties = (frequency_penalty, presence_penalty)
        self._counts: Counter[int] = Counter()
        self._thought = thought
        self._think_ids = think_ids or (-1, -1)

    def bias(self) -> np.ndarray:
        """Returns what is added to the logits of the next token, float32 [V]."""
        bias = self._constant.copy()
        if self._counts and any(self._penalties):
            frequency, presence = self._penalties
            ids = np.fromiter(self._counts.keys(), np.int64, len(self._counts))
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            bias[ids] -= frequency * counts + presence
        if self._grammar and not self._thought:
            allowed = self._grammar.allowed()
            if allowed is not None:
                bias[~allowed] = -np.inf
        return bias

    def push(self, token: int) -> None:
        """Takes note of a token that was drawn."""
        self._counts[token] += 1
        if token in self._think_ids:
            self._thought = token == self._think_ids[0]
        elif self._grammar and not self._thought:
            self._grammar.push(token)
