"""What all routes share: the model as text, the worker, limits and names."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsjax import __version__
from dsjax.generate.request import Given, Request
from dsjax.generate.sampling import Sampling
from dsjax.infer.looking import Looking
from dsjax.infer.pictured import PicturedFormat
from dsjax.serve.choice import TokenReport
from dsjax.serve.errors import ApiError
from dsjax.serve.fields import Fields
from dsjax.serve.grammar import Grammars
from dsjax.serve.metrics import Metrics
from dsjax.serve.options import MOST_TOP, Options
from dsjax.serve.replies import Limits
from dsjax.serve.scoring import PromptScorer
from dsjax.serve.steering import Grammar, Rules
from dsjax.serve.worker import Worker
from dsjax.text.chat import ChatFormat
from dsjax.text.reply import opens_thought
from dsjax.text.token_bytes import TokenBytes
from dsjax.text.vocabulary import Vocabulary

AnyFormat = ChatFormat | PicturedFormat
FINGERPRINT = f"dsjax-{__version__}"
# Names of DeepSeek's API that clients have built in, and whether the model is to think.
ALIASES = {"deepseek-chat": False, "deepseek-reasoner": True}


@dataclasses.dataclass
class Service:
    """A model that is served.

    Attributes:
      name: what /v1/models calls it.
      context: tokens of a prompt and its reply together.
      form: how a conversation becomes tokens; None for a base model.
      scorer: None while the server starts.
      looking: turns pictures into embeddings; None while the server starts, or for a model that
        does not see.
    """

    name: str
    vocabulary: Vocabulary
    form: AnyFormat | None
    context: int
    vocab_size: int
    defaults: Sampling
    worker: Worker
    metrics: Metrics
    limits: Limits
    scorer: PromptScorer | None = None
    looking: Looking | None = None
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.token_bytes = TokenBytes(self.vocabulary.coder)
        self.grammars = Grammars(self.vocabulary.coder, self.vocab_size, self.vocabulary.stop_ids)

    @property
    def names(self) -> list[str]:
        """Returns what clients may call the model."""
        return list(dict.fromkeys([self.name, *(ALIASES if self.form else ())]))

    def models(self) -> dict[str, Any]:
        """Returns the answer of /v1/models."""
        models = [
            {
                "id": name,
                "object": "model",
                "created": self.created,
                "owned_by": "dsjax",
                "max_model_len": self.context,
            }
            for name in self.names
        ]
        return {"object": "list", "data": models}

    def check_model(self, fields: Fields) -> str:
        """Returns the model's name as the request gives it.

        Raises:
          ApiError: 404, there is no such model.
        """
        name = fields.text("model", self.name)
        if name not in self.names:
            raise ApiError(
                404,
                f"there is no model {name[:100]!r}; this server has {', '.join(self.names)}",
                param="model",
                code="model_not_found",
            )
        return name

    def requests(
        self,
        prompt: Sequence[int],
        options: Options,
        *,
        default_tokens: int | None,
        report: bool,
        grammars: Sequence[Grammar | None],
        given: Given | None = None,
    ) -> list[Request]:
        """Returns the requests of a prompt's choices for the engine.

        Args:
          default_tokens: how many new ones if the request sets no limit; None: all that fit.
          report: whether log-probabilities are wanted.
          grammars: one per choice, since each follows its own text.
          given: the prompt's pictures.

        Raises:
          ApiError: 400, the prompt leaves no room for a token.
        """
        asked = options.max_tokens if options.max_tokens is not None else default_tokens
        room = self.context - len(prompt)
        if room < (1 if asked != 0 else 0):
            raise ApiError(
                400,
                f"the prompt has {len(prompt)} tokens, and the model's context has "
                f"{self.context}, the reply included; shorten the prompt",
                code="context_length_exceeded",
            )
        rules = [self._rules(prompt, options, grammar) for grammar in grammars]
        # Two kinds of programs, one with reports and steering: each kind is compiled at start.
        top = min(MOST_TOP, self.vocab_size)
        return [
            Request(
                tuple(prompt),
                room if asked is None else min(asked, room),
                dataclasses.replace(options.sampling, seed=seed),
                self.vocabulary.stop_ids,
                owner=options.user,
                logprobs=report or rule is not None,
                top_logprobs=top if report or rule is not None else 0,
                steering=rule or (Rules(self.vocab_size) if report else None),
                given=given,
            )
            for seed, rule in zip(options.seeds, rules, strict=True)
        ]

    def _rules(
        self, prompt: Sequence[int], options: Options, grammar: Grammar | None
    ) -> Rules | None:
        penalties = (options.frequency_penalty, options.presence_penalty)
        if not (grammar or options.logit_bias or any(penalties)):
            return None
        think_ids = self.vocabulary.think_ids
        return Rules(
            self.vocab_size,
            grammar=grammar,
            logit_bias=options.logit_bias,
            frequency_penalty=options.frequency_penalty,
            presence_penalty=options.presence_penalty,
            thought=opens_thought(prompt, think_ids),
            think_ids=think_ids,
        )

    def examples(self) -> list[Request]:
        """Returns one request per kind of program that occurs, for the engine's warm-up."""
        given = None
        if isinstance(self.form, PicturedFormat):
            values = np.zeros((1, self.form.vision.dim), np.float32)
            given = Given(np.zeros(1, np.int32), values)
        plain = Request((0,), 1, Sampling(), self.vocabulary.stop_ids, given=given)
        top = min(MOST_TOP, self.vocab_size)
        rules = Rules(self.vocab_size)
        full = dataclasses.replace(plain, logprobs=True, top_logprobs=top, steering=rules)
        return [plain, full]

    def spelled(self, token: int) -> tuple[str, bytes]:
        """Returns a token as text, U+FFFD for half a character, and its bytes."""
        data = self.token_bytes.of(token)
        return data.decode(errors="replace"), data

    def logprob_entries(self, reports: Sequence[TokenReport]) -> list[dict[str, Any]]:
        """Returns the reports on tokens as a chat's `logprobs` lists them."""

        def entry(token: int, logprob: float) -> dict[str, Any]:
            text, data = self.spelled(token)
            return {"token": text, "logprob": logprob, "bytes": list(data)}

        return [
            entry(each.token, each.logprob)
            | {"top_logprobs": [entry(*likely) for likely in each.top]}
            for each in reports
        ]
