"""Problems as the model reads them: turns, token ids, and whether a thought has begun."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from dsjax.posttrain.problems import Problem
from dsjax.text import reply
from dsjax.text.chat import ChatFormat, Message
from dsjax.text.vocabulary import THINK, Vocabulary


@dataclasses.dataclass(frozen=True)
class Prompting:
    """How problems are put to a model.

    Attributes:
      chat: the format of a model that chats; None: a base model continues the text.
      system: instructions that come before each prompt.
      template: a text around each prompt that is a text, in place of its {prompt}; "" is the prompt
        alone.
      raw: whether the model is given plain text although it chats.
      named: what messages call the settings of `system`, `template` and `raw`.
    """

    vocabulary: Vocabulary
    chat: ChatFormat | None
    system: str = ""
    template: str = ""
    raw: bool = False
    named: tuple[str, str, str] = ("--system", "--template", "--raw")

    @property
    def plain(self) -> bool:
        """Tells whether the model is given a text to continue, and no turns."""
        return self.chat is None or self.raw

    def shown(self, problem: Problem) -> str | list[dict[str, str]]:
        """Returns what the model is given: a text to continue, or turns."""
        given = problem.prompt
        if isinstance(given, str) and self.template:
            given = self.template.replace("{prompt}", given)
        if self.plain:
            return given
        turns = given if not isinstance(given, str) else [{"role": "user", "content": given}]
        return [*([{"role": "system", "content": self.system}] if self.system else []), *turns]

    def encode(self, problem: Problem) -> list[int]:
        """Returns the ids that an answer follows.

        Raises:
          ValueError: a base model is given messages, or the chat format cannot express the turns.
        """
        given = self.shown(problem)
        if self.plain:
            if not isinstance(given, str) or self.system:
                system, template, raw = self.named
                why = f"{raw} gives plain text" if self.raw else "the tokenizer has no chat format"
                raise ValueError(
                    f"{why}, so the model cannot be given messages or {system}; give 'prompt' as a "
                    f"text, with {template} around it"
                )
            return self.vocabulary.plain_prompt(given)
        assert self.chat is not None and not isinstance(given, str)
        return self.chat.encode([Message(turn["role"], turn["content"]) for turn in given])

    def opens_thought(self, prompt: Sequence[int]) -> bool:
        """Tells whether a prompt ends inside a thought."""
        vocabulary = self.vocabulary
        if vocabulary.think_ids is not None:
            return reply.opens_thought(prompt, vocabulary.think_ids)
        return vocabulary.coder.decode(prompt, skip_special=False).rstrip().endswith(THINK)
