"""Serves a checkpoint to the clients of OpenAI's and DeepSeek's APIs, with a page to chat at /.

CKPT is a Hugging Face folder, a folder imported by tools/convert.py, or the folder of a run.

  # then open http://127.0.0.1:8000, or give clients the base http://127.0.0.1:8000/v1
  python tools/serve.py DeepSeek-V2-Lite-Chat
  # for other machines, with a key, on eight devices
  DSJAX_API_KEY=secret python tools/serve.py DeepSeek-V3 --host 0.0.0.0 --mesh tensor=8
  # eight devices of which four run the prompts, so that decoding never waits for one
  python tools/serve.py DeepSeek-V2 --mesh expert=4 --prefill-mesh tensor=4

Prints `ready http://HOST:PORT` on standard output once it answers; the log, one JSON object per
request, goes to standard error, without texts unless --log-texts. SIGTERM lets running requests
end, for --grace seconds. Routes, fields and examples for systemd, Docker and Kubernetes:
docs/serving.md. Exit codes: 1 failed, 2 wrong usage, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dsjax import command


def parser() -> argparse.ArgumentParser:
    result = command.make_parser(__doc__)
    command.add_checkpoint(result)
    command.add_prefill_mesh(result)
    add = result.add_argument

    def count(name: str, default: int, what: str, metavar: str = "N") -> None:
        text = f"{what} (default: %(default)s)"
        add(name, metavar=metavar, type=int, default=default, help=text)

    add("--host", metavar="H", default="127.0.0.1", help="address (default: %(default)s)")
    count("--port", 8000, "0 takes a free one", "P")
    add("--api-key", metavar="K", action="append", help="needed by clients; repeatable")
    add("--model-name", metavar="NAME", help="what clients call it (default: the folder's name)")
    count("--max-batch", 16, "replies at a time; more wait")
    count("--max-waiting", 256, "replies that may wait; more get 429")
    add("--context", metavar="N", type=int, help="tokens per request (default: at most 8192)")
    count("--prefill-chunk", 256, "prompt tokens per step, a power of two")
    count("--prefix-tokens", 16384, "tokens of past prompts and replies kept for new ones; 0: none")
    count("--redundant-experts", 0, "slots per layer for replicas; needs --mesh expert=N")
    count("--eplb-every", 2000, "steps between two looks at the loads of experts")
    add("--context-cache", metavar="DIR", type=Path, help="keep these on disk too, over restarts")
    count("--context-cache-gb", 10, "GB there, at most; the least recently used go")
    count("--max-wait", 600, "seconds until a reply begins, at most")
    count("--max-seconds", 3600, "seconds until it ends, at most")
    count("--max-body", 8, "MB of a request, at most")
    count("--grace", 30, "seconds for running replies on SIGTERM")
    warm = argparse.BooleanOptionalAction
    add("--warm", action=warm, default=True, help="compile everything before the first request")
    add("--speculative", action="store_true", help="draft with the model's own MTP modules")
    add("--open", action="store_true", help="open the page in a browser")
    add("--log-texts", action="store_true", help="write prompts and replies to the log")
    return result


def execute(arguments: argparse.Namespace) -> int:
    for name in "max_batch max_wait max_seconds max_body eplb_every context_cache_gb".split():
        if getattr(arguments, name) < 1:
            parser().error(f"--{name.replace('_', '-')} is at least 1")
    if not 0 <= arguments.port < 65536 or arguments.max_waiting < 0 or arguments.grace < 0:
        parser().error("--port is below 65536, and no number is negative")
    # Imported here, so that --help and wrong usage need not wait for jax.
    from dsjax.parallel import compilation

    try:
        from dsjax.serve import server
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}: install the extra: pip install 'dsjax[serve]'") from error
    compilation.use_persistent_cache("")
    return server.run(arguments)


if __name__ == "__main__":
    sys.exit(command.run(parser(), execute))
