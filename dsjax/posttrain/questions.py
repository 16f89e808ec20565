"""Questions: problems as the model reads them, in an order that seed and epoch decide."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from dsjax.config.reinforcement import RlConfig
from dsjax.data.shuffling import shuffled, stream_key
from dsjax.files import listed
from dsjax.posttrain.problems import Problem
from dsjax.posttrain.prompts import Prompting
from dsjax.text.chat import ChatFormat
from dsjax.text.vocabulary import Vocabulary


class Questions:
    """Problems by number.

    Attributes:
      problems: as they were read.
      prompts: of each, the token ids that an answer follows.
      facts: of each, what rewards judge by.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        vocabulary: Vocabulary,
        chat: ChatFormat | None,
        rl: RlConfig,
        *,
        context: int,
    ) -> None:
        """
        Args:
          chat: the format of a model that chats; None: a base model continues the text.
          context: the most tokens of prompt and answer together.

        Raises:
          ValueError: a prompt leaves no room for an answer, or a base model is given messages; all
            such problems are named.
        """
        self.problems = list(problems)
        self.prompts: list[tuple[int, ...]] = []
        self.facts: list[dict[str, Any]] = []
        prompting = Prompting(
            vocabulary,
            chat,
            rl.system,
            rl.template,
            raw=rl.raw,
            named=("rl.system", "rl.template", "rl.raw=on"),
        )
        refused = []
        for problem in problems:
            try:
                prompt = prompting.encode(problem)
            except ValueError as error:
                refused.append(f"{problem.place}: {error}")
                continue
            if len(prompt) + rl.max_new_tokens > context:
                refused.append(
                    f"{problem.place}: the prompt of {len(prompt)} tokens and "
                    f"rl.max_new_tokens={rl.max_new_tokens} exceed the model's context of "
                    f"{context}; shorten it or lower rl.max_new_tokens"
                )
            self.prompts.append(tuple(prompt))
            self.facts.append(problem.facts(opened=prompting.opens_thought(prompt)))
        if refused:
            raise ValueError(listed(refused))

    def __len__(self) -> int:
        return len(self.problems)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.prompts))

    @property
    def fingerprint(self) -> str:
        """A digest of all prompts and facts, in their order."""
        text = json.dumps([self.prompts, self.facts], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def drawn(self, first: int, count: int, seed: int) -> list[int]:
        """Returns the numbers of questions `first` to `first + count - 1` of an endless stream in
        which each epoch has a random order of its own.
        """
        numbers, total = [], len(self)
        for epoch in range(first // total, (first + count - 1) // total + 1):
            order = shuffled(total, stream_key("questions", seed, epoch))
            start, end = first - epoch * total, first + count - epoch * total
            numbers += order[max(start, 0) : max(end, 0)].tolist()
        return numbers
