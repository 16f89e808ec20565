"""Runs untrusted parts of a checkpoint: Jinja templates and tokenizers.

Jinja's own sandbox denies a template access to Python's attributes, files and modules, but does not
bound time or memory: `{{ 'a' * 3000000000 }}` takes 5.7 GB, and two nested loops run forever. A
template therefore runs in a child process (this file as a program) with kernel limits on memory and
processor time, and its parent enforces a wall-clock limit.

A tokenizer.json is a program too: its patterns can take exponential time, and its replacements can
inflate a text until the process aborts. Before this process loads one, a child process with the
same kind of limits loads it and tries it on a text. Replacements that could make text much longer
are refused.

Templates can use what Hugging Face transformers offers them: `raise_exception`, `strftime_now`, the
filter `tojson`, break and continue, `{% generation %}`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

MAX_TEMPLATE = 1 << 20  # characters; the longest released ones have 20,000
MAX_RENDERED = 1 << 24  # characters
MEMORY = 512 << 20  # bytes
PROCESSOR_SECONDS = 2
RENDERED_PER_SECOND = 50  # further time for many contexts; real templates render 1,000 and more
# V3's tokenizer (7.8 MB) takes a second and 200 MB. The limit is on address space, of which the
# library's threads reserve far more than they use.
TOKENIZER_MEMORY = 4 << 30
TOKENIZER_SECONDS = 30
MAX_GROWTH = 64  # characters that a tokenizer's replacements may make of one
CLOCK_SECONDS = 60.0  # generous, for a busy machine

_tried: set[bytes] = set()


def render(template: str, *contexts: dict[str, Any]) -> list[str]:
    """Renders a template for each context, which hold JSON values, in one child process.

    Raises:
      ValueError: the template is too long, has an error, raises one, or exceeds a limit.
    """
    if len(template) > MAX_TEMPLATE:
        raise ValueError(
            f"the template has {len(template)} characters; at most {MAX_TEMPLATE} are allowed"
        )
    given = json.dumps({"template": template, "contexts": contexts}).encode()
    seconds = PROCESSOR_SECONDS + len(contexts) // RENDERED_PER_SECOND
    return _ask("template", given, MEMORY, seconds)["texts"]


def try_tokenizer(data: bytes) -> None:
    """Loads a tokenizer.json in a child process and tries it on a text, once per content.

    Raises:
      ValueError: it cannot be loaded, fails, exceeds a limit, or could make text much longer.
    """
    digest = hashlib.sha256(data).digest()
    if digest not in _tried:
        _ask("tokenizer", data, TOKENIZER_MEMORY, TOKENIZER_SECONDS)
        _tried.add(digest)


def _ask(what: str, given: bytes, memory: int, seconds: int) -> dict[str, Any]:
    """Returns the answer of a child process with limits; `what` is "template" or "tokenizer"."""
    # -P keeps this folder off the module search path, where reply.py and others would shadow
    # modules of the same names.
    command = [sys.executable, "-P", __file__, what, str(memory), str(seconds)]
    try:
        done = subprocess.run(command, input=given, capture_output=True, timeout=CLOCK_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"the {what} ran for more than {CLOCK_SECONDS:g} seconds") from error
    if done.returncode == -signal.SIGXCPU or done.returncode == -signal.SIGKILL:
        raise ValueError(f"the {what} ran for more than {seconds} seconds")
    try:
        answer = json.loads(done.stdout)
    except ValueError as error:
        trace = done.stderr.decode(errors="replace").strip()
        detail = trace.rpartition("\n")[2] or f"exit code {done.returncode}"
        raise ValueError(f"the {what} ended its process: {detail}") from error
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer


def _limit_resources(memory: int, seconds: int) -> None:
    import resource

    for what, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(ValueError, OSError):  # macOS has no limit of address space
            resource.setrlimit(what, (limit, limit))


def _answer(template: str, contexts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the child's answer: the rendered texts, or an error."""
    import jinja2

    try:
        compiled = _environment().from_string(template)
        texts = [compiled.render(context) for context in contexts]
    except MemoryError:
        return {"error": f"the template needs more than {MEMORY >> 20} MB of memory"}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"the template has an error in line {error.lineno}: {error.message}"}
    except RecursionError:
        return {"error": "the template calls itself without end"}
    except Exception as error:  # a template can raise anything
        return {"error": f"the template failed: {error or type(error).__name__}"}
    longest = max(map(len, texts), default=0)
    if longest > MAX_RENDERED:
        return {"error": f"the template made a text of {longest} characters"}
    return {"texts": texts}


def _environment() -> Any:
    from datetime import datetime

    import jinja2
    from jinja2 import ext, nodes, sandbox

    class Generation(ext.Extension):
        """Accepts `{% generation %}`, which marks assistant text for training, and ignores it."""

        tags = {"generation"}  # noqa: RUF012, as in the base class

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes HTML characters.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _try(data: bytes) -> dict[str, str]:
    """Returns the child's verdict on a tokenizer: {} or an error."""
    import os

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import tokenizers

    words = (
        "".join(map(chr, range(32, 127))) + "\n\t\u4e2d\u6587 \u00e9\u0301 \U0001f600 \uff21\u200d"
    )
    text = words + "a" * 1000 + " " * 1000 + "0" * 1000 + words[::-1]
    try:
        growth = _growth(json.loads(data))
        if growth > MAX_GROWTH:
            return {
                "error": f"its replacements can make {growth:.0f} characters of one, and more than "
                f"{MAX_GROWTH} are refused"
            }
        inner = tokenizers.Tokenizer.from_buffer(data)
        inner.no_padding()
        inner.no_truncation()
        inner.decode(inner.encode(text, add_special_tokens=False).ids)
    except MemoryError:
        return {"error": f"the tokenizer needs more than {TOKENIZER_MEMORY >> 20} MB of memory"}
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # Rust panics are BaseExceptions
        return {"error": f"the tokenizer failed: {error or type(error).__name__}"}
    return {}


def _growth(tokenizer: Any) -> float:
    """Bounds how many characters the replacements of a tokenizer, in sequence, can make of one."""
    total = 1.0
    parts = [tokenizer.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")]
    while parts:
        part = parts.pop()
        if not isinstance(part, dict):
            continue
        for value in part.values():
            parts += (
                [item for item in value if isinstance(item, dict)]
                if isinstance(value, list)
                else []
            )
        if part.get("type") == "Replace":
            pattern, content = part["pattern"], part["content"]
            # A regular expression may match the empty string between any two characters.
            replaced = len(pattern.get("String", "")) if isinstance(pattern, dict) else len(pattern)
            total *= max(1.0, len(content) / replaced if replaced else 1 + len(content))
    return total


if __name__ == "__main__":
    _limit_resources(int(sys.argv[2]), int(sys.argv[3]))
    if sys.argv[1] == "template":
        sys.stdout.write(json.dumps(_answer(**json.load(sys.stdin))))
    else:
        sys.stdout.write(json.dumps(_try(sys.stdin.buffer.read())))
