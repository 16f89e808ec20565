"""A tiny checkpoint that can chat, think and call tools, and servers of it in processes."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.checkpoint import hf_files
from tests.golden.cases import LLAMA, Case
from tests.serve.formats import V3_1, VOCAB_SIZE, write_tokenizer

ROOT = Path(__file__).parents[2]
CONFIG = LLAMA | {
    "vocab_size": VOCAB_SIZE,
    "num_hidden_layers": 1,
    "max_position_embeddings": 512,
}
# One cache, two sizes of batch, one of prompts.
FEW = ("--max-batch", "2", "--prefill-chunk", "64", "--dtype", "float32", "--port", "0")


def write_checkpoint(folder, control=V3_1, config=CONFIG):
    """Writes random weights and a trained tokenizer."""
    hf_files.write(folder, config, hf_files.plain(Case(config, seed=5)))
    return write_tokenizer(folder, control)


@contextlib.contextmanager
def serve(folder, *arguments, few=FEW, environment=None):
    """Context of a server in a process of its own; yields its address and the process, and ends it
    with SIGTERM. `process.read_log()` is what it has written to standard error.
    """
    # A file, since a pipe that nobody reads would stop the server.
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "tools/serve.py", str(folder), *few, *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )

        def read_log():
            log.seek(0)
            return log.read()

        process.read_log = read_log
        try:
            line = process.stdout.readline()
            if not line.startswith("ready "):
                process.kill()
                process.wait()
                raise AssertionError(read_log())
            yield line.split()[1], process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
            text = read_log()
            process.read_log = lambda: text  # the file is gone after this
