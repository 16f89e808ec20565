"""Answers /v1/completions: text continued, with `echo`, and a hole filled, with `suffix`."""

from __future__ import annotations

import asyncio
import codecs
import dataclasses
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from dsjax.serve.answering import Answer, respond
from dsjax.serve.choice import Choice, Delta, Likely, TokenReport, finite_logprob
from dsjax.serve.errors import ApiError
from dsjax.serve.fields import Fields, invalid
from dsjax.serve.options import HARMLESS, MOST_TOP, Options, read_options
from dsjax.serve.record import Entry
from dsjax.serve.replies import Replies
from dsjax.serve.scoring import Scored
from dsjax.serve.service import Service
from dsjax.text.tokenizer import FIM_BEGIN, FIM_END, FIM_HOLE

MOST_PROMPTS = 128
DEFAULT_TOKENS = 16  # OpenAI's


@dataclasses.dataclass(frozen=True)
class CompletionRequest:
    """What a client asks for.

    Attributes:
      prompts: texts or token ids.
      suffix: what follows the text to be filled in; None: the prompt is continued.
      top: likely tokens to report; None: no log-probabilities.
    """

    model: str
    prompts: tuple[str | tuple[int, ...], ...]
    suffix: str | None
    echo: bool
    top: int | None
    options: Options


def read_completion(values: Any, service: Service, *, user: str) -> CompletionRequest:
    """Reads a body that is JSON.

    Raises:
      ApiError: 404 for the model, 422 for any other field.
    """
    fields = Fields(values)
    model = service.check_model(fields)
    prompts = _prompts(fields, service.vocab_size)
    options = read_options(fields, service.defaults, vocab_size=service.vocab_size, user=user)
    best_of = fields.integer("best_of", options.n, 1, None)
    if best_of != options.n:
        raise invalid("best_of", f"must equal n={options.n}; the server ranks no replies")
    suffix = fields.text("suffix", "") if fields.has("suffix") else None
    echo = fields.boolean("echo")
    if suffix is not None and echo:
        raise invalid("echo", "does not go together with suffix")
    request = CompletionRequest(
        model=model,
        prompts=prompts,
        suffix=suffix,
        echo=echo,
        top=fields.integer("logprobs", None, 0, MOST_TOP),
        options=options,
    )
    fields.finish(HARMLESS)
    return request


def _prompts(fields: Fields, vocab_size: int) -> tuple[str | tuple[int, ...], ...]:
    given = fields.take("prompt", "")
    several = isinstance(given, list) and given and not isinstance(given[0], int)
    items = given if several else [given]
    if len(items) > MOST_PROMPTS:
        raise invalid("prompt", f"has {len(items)} texts; at most {MOST_PROMPTS} may be")
    prompts: list[str | tuple[int, ...]] = []
    for item in items:
        if isinstance(item, str):
            prompts.append(item)
            continue
        ids = isinstance(item, list) and all(type(token) is int for token in item)
        if not ids:
            raise invalid("prompt", "must be a text, a list of token ids, or a list of these")
        if not all(0 <= token < vocab_size for token in item):
            raise invalid("prompt", f"has ids outside the vocabulary of {vocab_size}")
        prompts.append(tuple(item))
    return tuple(prompts)


async def complete_text(
    http: HttpRequest, values: Any, service: Service, entry: Entry, *, user: str
) -> Response:
    """Answers one request.

    Raises:
      ApiError: it cannot be served.
      ClientLeft: nobody waits for the answer.
    """
    asked = read_completion(values, service, user=user)
    prompts = await asyncio.to_thread(_encode, asked, service)
    requests, texts = [], []
    for prompt in prompts:
        own = service.requests(
            prompt, asked.options, default_tokens=DEFAULT_TOKENS, report=asked.top is not None,
            grammars=[None] * asked.options.n,
        )  # fmt: skip
        requests += own
        texts += [_Text(service, asked, prompt) for _ in own]
    choices = [
        Choice(
            service.vocabulary.coder,
            prompt=request.prompt,
            stop_ids=service.vocabulary.stop_ids,
            stops=asked.options.stops,
            top=asked.top,
        )
        for request in requests
    ]
    replies = Replies(
        service.worker, service.metrics, service.limits, requests, choices,
        n=asked.options.n, user=asked.options.user,
    )  # fmt: skip
    entry.begin(replies, asked.prompts)
    if asked.echo:
        await _echo(service, asked, prompts, texts)
    answer = Answer("cmpl", "text_completion", asked.model)
    return await respond(http, replies, texts, answer, asked.options, entry)


def _encode(asked: CompletionRequest, service: Service) -> list[list[int]]:
    """Encodes the prompts; slow, so it runs outside the event loop."""
    vocabulary, prompts = service.vocabulary, []
    coder = vocabulary.coder
    for prompt in asked.prompts:
        if asked.suffix is not None:
            prompts.append(_filled(prompt, asked.suffix, service))
        elif isinstance(prompt, str):
            try:
                prompts.append(vocabulary.plain_prompt(prompt))
            except ValueError as error:
                raise invalid("prompt", str(error)) from error
        elif prompt:
            prompts.append(list(prompt))
        else:
            begin = [coder.control[vocabulary.bos]] if vocabulary.bos else []
            if not begin:
                raise invalid("prompt", "is empty, and there is no begin token to start from")
            prompts.append(begin)
    return prompts


def _filled(prompt: str | tuple[int, ...], suffix: str, service: Service) -> list[int]:
    """Returns DeepSeek's prompt for filling in: [begin] before [hole] after [end]."""
    vocabulary = service.vocabulary
    coder = vocabulary.coder
    names = (FIM_BEGIN, FIM_HOLE, FIM_END)
    if not all(name in coder.control for name in names):
        raise invalid(
            "suffix", "needs a model trained to fill in; its tokenizer has no such tokens"
        )
    begin, hole, end = (coder.control[name] for name in names)
    first = [coder.control[vocabulary.bos]] if vocabulary.begins and vocabulary.bos else []
    before = coder.encode(prompt) if isinstance(prompt, str) else list(prompt)
    return [*first, begin, *before, hole, *coder.encode(suffix), end]


async def _echo(
    service: Service,
    asked: CompletionRequest,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[_Text],
) -> None:
    """Puts each prompt before its replies, with its log-probabilities if they are wanted."""
    for number, prompt in enumerate(prompts):
        scored = None
        if asked.top is not None:
            scorer = service.scorer
            if scorer is None:
                raise ApiError(503, "the server is starting; try again", retry_after=1)
            call = service.worker.call(lambda prompt=prompt, scorer=scorer: scorer.score(prompt))
            scored = await asyncio.wrap_future(call)
        for text in texts[number * asked.options.n : (number + 1) * asked.options.n]:
            text.echo(prompt, scored)


class _Text:
    """The text of a choice, and its tokens with their places in it."""

    def __init__(self, service: Service, asked: CompletionRequest, prompt: Sequence[int]) -> None:
        self._service, self._top, self._prompt = service, asked.top, prompt
        self.text = ""
        self._reports: list[TokenReport] = []
        self._sent_text, self._sent_reports, self._offset = 0, 0, 0
        # A character may span several tokens; all of these lie where it begins.
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._begins = False  # whether the prompt has a begin token, which the text leaves out
        self._finish: str | None = None
        self._first: TokenReport | None = None

    def echo(self, prompt: Sequence[int], scored: Scored | None) -> None:
        vocabulary = self._service.vocabulary
        bos = vocabulary.bos
        self._begins = bos is not None and prompt[:1] == [vocabulary.coder.control[bos]]
        shown = prompt[1:] if self._begins else prompt
        self.text = vocabulary.coder.decode(shown, skip_special=False)
        if scored is None or self._top is None:
            return
        self._first = TokenReport(prompt[0], 0.0, [], False)
        for place, token in enumerate(prompt[1:]):
            likely = zip(scored.top_ids[place], scored.top_logprobs[place], strict=True)
            top = [Likely(int(each), finite_logprob(logprob)) for each, logprob in likely][
                : self._top
            ]
            self._reports.append(
                TokenReport(token, finite_logprob(scored.logprobs[place]), top, False)
            )

    def add(self, delta: Delta) -> None:
        self.text += delta.content + delta.thought
        self._reports += delta.reports
        self._finish = delta.finish or self._finish

    def chunks(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        self.add(delta)
        return [self.body(index)]

    def body(self, index: int) -> dict[str, Any]:
        """Returns what has not been returned yet."""
        text, self._sent_text = self.text[self._sent_text :], len(self.text)
        reports, self._sent_reports = self._reports[self._sent_reports :], len(self._reports)
        logprobs = self._logprobs(reports) if self._top is not None else None
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": self._finish,
        }

    def _logprobs(self, reports: Sequence[TokenReport]) -> dict[str, Any]:
        tokens: list[str] = []
        values: list[float | None] = []
        top: list[dict[str, float] | None] = []
        offsets: list[int] = []
        if self._first is not None:  # the first token of a prompt is not predicted
            tokens.append(self._spell(self._first.token, offsets))
            values.append(None)
            top.append(None)
            self._first = None
            self._offset = 0 if self._begins else self._offset
        for report in reports:
            tokens.append(self._spell(report.token, offsets))
            values.append(report.logprob)
            named: dict[str, float] = {}
            for (
                each,
                value,
            ) in report.top:  # halves of characters share a name: the likeliest has it
                named.setdefault(self._service.spelled(each)[0], value)
            top.append(named)
        return {
            "tokens": tokens,
            "token_logprobs": values,
            "top_logprobs": top if self._top else None,
            "text_offset": offsets,
        }

    def _spell(self, token: int, offsets: list[int]) -> str:
        text, data = self._service.spelled(token)
        offsets.append(self._offset)
        self._offset += len(self._characters.decode(data))
        return text
