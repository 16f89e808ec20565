"""Renders the Jinja templates of checkpoints, which are programs that strangers wrote.

Jinja's own sandbox keeps a template from Python's attributes, files and modules. It does not bound
time and memory: `{{ 'a' * 3000000000 }}` takes 5.7 GB, two nested loops run for ever. So a template
runs in a process of its own, this file as a program, which the kernel stops at a limit of memory
and of processor time, and its parent at a time on the clock.

What a template can use is what Hugging Face transformers gives it: `raise_exception`,
`strftime_now`, the filter `tojson`, break and continue, `{% generation %}`.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from typing import Any

MAX_TEMPLATE = 1 << 20  # characters; the longest that were released have 20,000
MAX_RENDERED = 1 << 24  # characters
MEMORY = 512 << 20  # bytes
PROCESSOR_SECONDS = 2
CLOCK_SECONDS = 60.0  # of a machine that is busy with other things


def render(template: str, context: dict[str, Any]) -> str:
    """Renders a template; `context` holds JSON values.

    Raises:
      ValueError: the template is too long, has an error, raises one itself, or exceeds a limit.
    """
    if len(template) > MAX_TEMPLATE:
        raise ValueError(
            f"the template has {len(template)} characters; more than {MAX_TEMPLATE} are refused"
        )
    # -P: a program's own folder would come first where Python looks for modules.
    command = [sys.executable, "-P", __file__]
    given = json.dumps({"template": template, "context": context}).encode()
    try:
        done = subprocess.run(command, input=given, capture_output=True, timeout=CLOCK_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"the template ran for more than {CLOCK_SECONDS:g} seconds") from error
    if done.returncode == -signal.SIGXCPU or done.returncode == -signal.SIGKILL:
        raise ValueError(f"the template ran for more than {PROCESSOR_SECONDS} seconds")
    try:
        answer = json.loads(done.stdout)
    except ValueError as error:
        trace = done.stderr.decode(errors="replace").strip()
        detail = trace.rpartition("\n")[2] or f"exit code {done.returncode}"
        raise ValueError(f"the template ended its process: {detail}") from error
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["text"]


def _limit_resources() -> None:
    import resource

    for what, limit in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_CPU, PROCESSOR_SECONDS),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(ValueError, OSError):  # macOS has no limit of address space
            resource.setrlimit(what, (limit, limit))


def _answer(template: str, context: dict[str, Any]) -> dict[str, str]:
    """What the child says: the text, or what went wrong."""
    import jinja2

    try:
        text = _environment().from_string(template).render(context)
    except MemoryError:
        return {"error": f"the template needs more than {MEMORY >> 20} MB of memory"}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"the template has an error in line {error.lineno}: {error.message}"}
    except RecursionError:
        return {"error": "the template calls itself without end"}
    except Exception as error:  # whatever the template made Python do
        return {"error": f"the template failed: {error or type(error).__name__}"}
    if len(text) > MAX_RENDERED:
        return {"error": f"the template made a text of {len(text)} characters"}
    return {"text": text}


def _environment() -> Any:
    from datetime import datetime

    import jinja2
    from jinja2 import ext, nodes, sandbox

    class Generation(ext.Extension):
        """`{% generation %}` marks an assistant's words for training; here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012, as in the class it derives from

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
        # Jinja's own escapes what is special in HTML.
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


if __name__ == "__main__":
    _limit_resources()
    sys.stdout.write(json.dumps(_answer(**json.load(sys.stdin))))
