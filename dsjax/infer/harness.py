"""EleutherAI's lm-evaluation-harness on any checkpoint: the model `dsjax`.

  pip install -e '.[eval]'
  python -m dsjax.infer.harness run --model dsjax \\
    --model_args pretrained=runs/tiny,dtype=float32 --tasks lambada_openai

takes the arguments of `lm-eval`. The harness has no plugins for models: importing this module
registers the model. From Python, import it and call `lm_eval.simple_evaluate(model="dsjax", ...)`.

Text is encoded as by the harness's own `hf` model: with the begin token if the tokenizer asks for
one, with control tokens recognised, and with context and continuation encoded together. Departures:
several requests share a row of the model without seeing each other; unsupported generation settings
are refused rather than ignored.
"""

# The harness is optional, and types are checked without it too.
# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsjax.checkpoint.load import open_checkpoint
from dsjax.generate.engine import Engine, Request
from dsjax.generate.sampling import Sampling
from dsjax.infer import windows
from dsjax.infer.answers import replies
from dsjax.infer.score import Scorer
from dsjax.infer.weights import load_weights
from dsjax.infer.windows import Window
from dsjax.parallel.mesh import submesh
from dsjax.text.chat import Message, find_format
from dsjax.text.reply import ReplyReader
from dsjax.text.vocabulary import open_vocabulary

try:
    import lm_eval.models  # noqa: F401 -- registers the harness's models, which ours would hide
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(
        f"dsjax.infer.harness needs lm-evaluation-harness ({error}); install it: "
        "pip install 'lm-eval>=0.4.13'"
    ) from error

_AUTO_BATCH = 8
_SHORTEST_ROW = 1024  # short requests share a row of this many tokens
_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SETTINGS = ("temperature", "top_k", "top_p", "min_p")
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0}


@register_model("dsjax")
class DsjaxLM(LM):
    """A checkpoint as a model of the harness.

    Args:
      pretrained: folder of a checkpoint of any kind that `dsjax.load` takes.
      dtype: bfloat16, float32, fp8, int8 or int4; None: see `weights.choose_dtype`.
      data, fsdp, tensor: devices along the axes of the mesh.
      batch_size: rows of a batch on each part of the mesh; "auto" is 8.
      max_length: tokens that the model sees at once; None: the model's limit.
      max_gen_toks: tokens to generate for tasks that set no number.
      seed: of sampled generation; each request adds its number.
      max_batch_size, device: passed by the harness to every model; unused, since the batch size is
        fixed and JAX chooses the devices.

    Raises:
      ValueError: there is no checkpoint or tokenizer, or a setting is out of range.
    """

    def __init__(
        self,
        pretrained: str,
        dtype: str | None = None,
        data: int = 1,
        fsdp: int = 1,
        tensor: int = 1,
        batch_size: int | str = 1,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
        **unused: Any,
    ) -> None:
        super().__init__()
        if unknown := unused.keys() - {"max_batch_size", "device"}:
            raise ValueError(f"--model_args {', '.join(sorted(unknown))}: unknown to model dsjax")
        checkpoint = open_checkpoint(pretrained)
        folder, limit = checkpoint.tokenizer_folder, checkpoint.model.max_seq_len
        self.max_length = limit if max_length is None else max_length
        if not 2 <= self.max_length <= limit:
            raise ValueError(f"max_length={max_length} is not between 2 and the model's {limit}")
        self.batch_size = _batch_size(batch_size)
        self.max_gen_toks, self.seed = max_gen_toks, seed
        self.vocabulary = open_vocabulary(folder, checkpoint.model.vocab_size)
        self.form = find_format(folder, self.vocabulary)
        self._path = Path(pretrained).resolve()
        sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
        mesh = submesh({axis: size for axis, size in sizes.items() if size != 1})
        model = load_weights(checkpoint, mesh, dtype)
        self.scorer = Scorer(model, mesh, rows=self.batch_size)
        self._engine: Engine | None = None

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Returns the log-likelihood of each continuation of a context, and whether it is the
        greedy one."""
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        given = []
        for number, request in enumerate(requests):
            context, continuation = self.encode_pair(*request.args)
            # Too long a text loses its beginning.
            ids = [*context, *continuation][-(self.max_length + 1) :]
            first = max(len(ids) - 1 - len(continuation), 0)
            if continuation:
                given.append(Window(number, np.array(ids, np.int32), first))
        given.sort(key=lambda window: -window.size)
        length = self._row_length(given)
        scores = self.scorer.score(given, length=length)
        for score in tqdm(scores, total=len(given), desc="loglikelihood", disable=disable_tqdm):
            found[score.owner] = (-score.nats, score.greedy)
            arguments = requests[score.owner].args
            self.cache_hook.add_partial("loglikelihood", arguments, found[score.owner])
        return found

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns the log-likelihood of each text, every token predicted once, in windows of
        `max_length` of which only the last may overlap."""
        found = [0.0] * len(requests)
        begin = [windows.first_token(self.vocabulary)]
        given: list[Window] = []
        for number, request in enumerate(requests):
            text = self.vocabulary.coder.encode_control(request.args[0])
            ids, length = np.array([*begin, *text], np.int32), self.max_length
            given += windows.cut(ids, length=length, stride=length, owner=number)
        scores = self.scorer.score(given, length=self._row_length(given))
        for score in tqdm(scores, total=len(given), desc="rolling", disable=disable_tqdm):
            found[score.owner] -= score.nats
        for request, value in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generates after each context, up to a stop string or the end token.

        Raises:
          ValueError: a task has unsupported settings, or asks for more tokens than there is room.
        """
        found = [""] * len(requests)
        wanted = [self._request(number, *request.args) for number, request in enumerate(requests)]
        wanted.sort(key=lambda item: -len(item[1].prompt))
        if self._engine is None:
            self._engine = Engine(self.scorer.model, max_batch=self.scorer.rows)
        coder = self.vocabulary.coder
        readers = [ReplyReader(coder, stops=stops) for _, _, stops in wanted]
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for index, pieces, done in replies(self._engine, [r for _, r, _ in wanted], readers):
                number = wanted[index][0]
                found[number] += "".join(piece.text for piece in pieces)
                if done:
                    arguments = requests[number].args
                    self.cache_hook.add_partial("generate_until", arguments, found[number])
                    bar.update()
        return found

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Renders a conversation as text with control tokens spelled out, up to where the
        assistant's reply begins; without `add_generation_prompt` the last message begins the reply.

        Raises:
          ValueError: the checkpoint is a base model, or its format cannot express the turns.
        """
        if self.form is None:
            raise ValueError(
                "this checkpoint has no chat template and its tokenizer no tokens for the two "
                "roles, as a base model's; run without --apply_chat_template"
            )
        begun = ""
        if not add_generation_prompt:
            *chat_history, last = chat_history
            begun = last["content"]
        messages = [Message(turn["role"], turn["content"]) for turn in chat_history]
        return self.vocabulary.coder.decode(self.form.encode(messages), skip_special=False) + begun

    @property
    def tokenizer_name(self) -> str:
        """The key of the tokenizer in the harness's cache of requests."""
        return str(self._path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the template's source, or the name of DeepSeek's own format, for records."""
        if not chat_template or self.form is None:
            return None
        return self.form.template.source if self.form.template else self.form.name

    def encode(self, text: str) -> list[int]:
        """Encodes a text, and prepends the begin token if wanted by the tokenizer and missing."""
        vocabulary = self.vocabulary
        ids = vocabulary.coder.encode_control(text)
        bos = vocabulary.coder.control[vocabulary.bos] if vocabulary.bos else None
        return [bos, *ids] if vocabulary.begins and bos is not None and ids[:1] != [bos] else ids

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encodes both texts together and splits the ids, so that tokens are those of running text.
        White space at the end of the context goes to the continuation; if nothing is left, the
        begin token is the context."""
        kept = context.rstrip()
        if not kept:
            ids = self.vocabulary.coder.encode_control(context + continuation)
            begin = [windows.first_token(self.vocabulary)]
            return (ids[:1], ids[1:]) if ids[:1] == begin else (begin, ids)
        ids, n_context = self.encode(context + continuation), len(self.encode(kept))
        return ids[:n_context], ids[n_context:]

    def _row_length(self, given: Iterable[Window]) -> int:
        longest = max((window.size for window in given), default=1)
        return min(max(1 << (longest - 1).bit_length(), _SHORTEST_ROW), self.max_length)

    def _request(
        self, number: int, context: str, settings: Mapping[str, Any]
    ) -> tuple[int, Request, list[str]]:
        until, n_tokens, sampling = read_settings(
            settings, max_gen_toks=self.max_gen_toks, seed=self.seed + number
        )
        room = self.max_length - n_tokens
        if room < 1:
            raise ValueError(
                f"max_gen_toks={n_tokens} leaves no room for a prompt in max_length="
                f"{self.max_length}; lower the one by --gen_kwargs, or raise the other"
            )
        prompt = tuple(self.encode(context)[-room:])
        return number, Request(prompt, n_tokens, sampling, self.vocabulary.stop_ids), until


def read_settings(
    settings: Mapping[str, Any], *, max_gen_toks: int, seed: int
) -> tuple[list[str], int, Sampling]:
    """Reads stop strings, the number of tokens and sampling from a task's generation_kwargs.

    Generation is greedy unless `do_sample` or a temperature says otherwise, as in the harness's
    other models.

    Raises:
      ValueError: a setting is unsupported or out of range.
    """
    left = dict(settings)
    until = left.pop("until", None) or []
    stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
    given = [left.pop(name) for name in _NEW_TOKENS if left.get(name) is not None]
    sampled, temperature = left.pop("do_sample", None), left.pop("temperature", None)
    if sampled is False or (sampled is None and temperature is None):
        temperature = 0.0
    found = {name: left.pop(name) for name in _SETTINGS if left.get(name) is not None}
    unknown = [f"{key}={value!r}" for key, value in left.items() if _NEUTRAL.get(key) != value]
    if unknown:
        raise ValueError(
            f"generation_kwargs {', '.join(unknown)}: dsjax supports {', '.join(_SETTINGS)}, "
            "do_sample, until and max_gen_toks; remove the others from the task, or override them "
            "with --gen_kwargs"
        )
    temperature = 1.0 if temperature is None else float(temperature)
    sampling = Sampling(temperature=temperature, seed=seed, **found)
    return stops, int((given or [max_gen_toks])[0]), sampling


def _batch_size(given: int | str) -> int:
    text = str(given)
    if text.startswith("auto"):
        return _AUTO_BATCH
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"batch_size={given!r} is neither a whole number above 0 nor 'auto'")
    return int(text)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
