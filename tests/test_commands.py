"""The commands of README and docs are run, page by page and in order, in a folder with what a
reader has at hand (`tests.reader`), in small: checkpoints of a few thousand parameters under the
published names, and two training steps.

What is not run: commands that need what no test has (`# needs ...` in the pages), and those of
`NOT_HERE`.
"""

import collections
import itertools
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import documented, reader
from tests.test_documented import tool_of

ROOT = Path(__file__).parents[1]
# Why commands with these words are not run.
NOT_HERE = {
    "make": "installs a virtual environment from a package registry",
    "pip": "installs from a package registry",
    "source": "enters what make installed",
    "--boxes": "a model of random weights names no place in a picture",
    "JanusFlow-1.3B": "its config.json leaves the sizes of its towers out: none of it is small",
}
MODEL = (
    "model.vocab_size=512 model.dim=32 model.n_layers=2 model.n_dense_layers=1 model.inter_dim=48 "
    "model.n_heads=2 data.sequence_length=64 train.batch_size=8 train.micro_batch_size=8 "
    "train.sample_tokens=0"
)
MLA = (
    "model.q_lora_rank=16 model.kv_lora_rank=16 model.qk_nope_head_dim=8 model.qk_rope_head_dim=8 "
    "model.v_head_dim=8 model.n_routed_experts=8 model.n_expert_groups=4 "
    "model.n_limited_groups=2 model.moe_inter_dim=16 model.n_activated_experts=2"
)
SPARSE = "model.index_n_heads=2 model.index_head_dim=16 model.index_topk=16"
NSA = (
    "model.n_dense_layers=2 model.n_kv_heads=1 model.head_dim=16 model.nsa_length=8 "
    "model.nsa_stride=4 model.nsa_block=8 model.nsa_count=3 model.nsa_window=16"
)
SHORT = "train.steps=2 train.eval_every=0 train.checkpoint_every=0"
TUNED = f"{SHORT} train.batch_size=8 train.micro_batch_size=8 train.eval_sequences=8"
# What makes a command of a tool small, behind its own arguments.
SMALL = {
    "train": f"--set {SHORT} train.eval_sequences=8 {MODEL}",
    "sft": f"--set {TUNED} sft.epochs=0 sft.sequence_length=64 sft.heldout_fraction=0.2",
    "prefer": f"--set {SHORT} train.batch_size=8 preference.epochs=0 preference.sequence_length=64",
    "grpo": "--set train.steps=1 train.eval_every=0 train.checkpoint_every=0 rl.prompts=4 "
    "rl.group_size=4 rl.minibatches=2 train.batch_size=4 train.micro_batch_size=4 "
    "train.eval_sequences=8 rl.max_new_tokens=8 rl.sequence_length=64",
    "generate": "--max-new-tokens 8",
    "evaluate": "--max-new-tokens 8 --n 2",
    "sample": "--max-new-tokens 8 --n 2",
    "paint": f"--set {SHORT} train.batch_size=20 train.micro_batch_size=20 train.eval_sequences=20 "
    "janus.sequence_length=256",
    "examine": "--max-new-tokens 8",
    "recall": "--lengths 600,1000 --depths 2 --n 1",
    "draw": "--n 1",
    "prepare": "--workers 1",
    "mine": "--workers 1",
    "serve": "--context 128 --max-batch 2 --prefix-tokens 256 --prefill-chunk 32 --port",
}
OWN = {"sparse_tiny": f"{MLA} {SPARSE}", "nsa_tiny": NSA}  # of configs, beside MODEL; else MLA
WRITTEN = ("--workdir", "--out", "--png", "--json")  # flags before what a command writes
ELSEWHERE = {"/usr/share/doc": "doc", "/usr/lib/python3": "python"}  # the reader's own files
# Pages whose commands compile little.
QUICK = ("docs/plan.md", "docs/gguf.md")


# Quick compilation, as in all tests, whatever the number of devices.
COMPILER = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])


@dataclass(frozen=True)
class Running:
    """A command that was started, and the file with all that it prints."""

    process: subprocess.Popen[bytes]
    output: Path

    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def end(self) -> str:
        """Waits for the end; returns what is wrong."""
        code = self.process.wait()
        return "" if code == 0 else f"exit code {code}: {self.said()[-1500:]}"


class Reader:
    """Types the commands of a page, in a folder of the reader."""

    def __init__(self, folder: Path, run: Path, cache: Path) -> None:
        self.folder = folder
        self._run = run
        self._behind: list[Running] = []
        self._served: Running | None = None
        self._started = itertools.count()
        self._ports = {place: free_port() for place in ("127.0.0.1:8000", "localhost:9876")}
        self._whole: tuple[str, ...] = ()  # the last command without "..."
        self._environment = {key: os.environ[key] for key in os.environ if key != "XLA_FLAGS"} | {
            "PYTHONPATH": str(ROOT),
            "XDG_CACHE_HOME": str(cache),
            "NO_PROXY": "127.0.0.1",
        }

    def type(self, command: documented.Command) -> str:
        """Runs a command; returns what is wrong, with the end of what it printed, or nothing."""
        words = self._complete(command)
        if words[0] == "export":
            self._environment |= dict(word.split("=", 1) for word in words[1:])
            return ""
        if words[0] == "curl":
            words = (words[0], "--silent", "--show-error", "--fail-with-body", *words[1:])
        reader.provide(self.folder, read_by(words), self._run)
        if words[1] == "tools/serve.py":
            return self._serve(words)
        self._behind.append(self._start(words))
        if command.behind:
            return ""
        running, self._behind = self._behind, []
        return "".join(each.end() for each in running)

    def close(self) -> None:
        """Ends what still runs."""
        for running in [*self._behind, *filter(None, [self._served])]:
            running.process.kill()
            running.process.wait()
        self._behind, self._served = [], None

    def at_hand(self, text: str) -> str:
        """Returns a text with the folders and ports that the reader has."""
        for place, own in ELSEWHERE.items():
            text = text.replace(place, own)
        for place, port in self._ports.items():
            text = text.replace(place, f"{place.partition(':')[0]}:{port}")
        return text

    def _complete(self, command: documented.Command) -> tuple[str, ...]:
        """Returns the words with what "..." stands for, with files' contents, and made small."""
        words = command.words
        if command.elided:
            words = (*self._whole, *words[2:])
        else:
            self._whole = words
        words = tuple(self._expanded(word) for word in words)
        tool = tool_of(words)
        return with_flags(words, small(*tool).split()) if tool else words

    def _expanded(self, word: str) -> str:
        word = self.at_hand(word)
        return re.sub(r"\$\(cat (\S+)\)", lambda m: (self.folder / m[1]).read_text(), word)

    def _start(self, words: tuple[str, ...]) -> Running:
        for path in overwritten(words):
            target = self.folder / path
            shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        program = sys.executable if words[0] == "python" else words[0]
        devices = 8 if {"--mesh", "--prefill-mesh"} & set(words) else 1
        flags = {"XLA_FLAGS": f"{COMPILER} --xla_force_host_platform_device_count={devices}"}
        output = self.folder / f".output-{next(self._started)}"
        with output.open("wb") as stream:
            process = subprocess.Popen(
                [program, *words[1:]],
                cwd=self.folder,
                env=flags | self._environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
        return Running(process, output)

    def _serve(self, words: tuple[str, ...]) -> str:
        """Starts a server in place of the last one, and waits until it says that it answers."""
        self.close()
        self._served = self._start((*words, str(self._ports["127.0.0.1:8000"])))
        while self._served.process.poll() is None:
            if "\nready http" in self._served.said():
                return ""
            time.sleep(0.2)
        served, self._served = self._served, None
        return f"the server ended: {served.said()[-1500:]}"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def small(tool: str, arguments: list[str]) -> str:
    """Returns the arguments that make a command small; the default text, Python's standard library,
    is not.
    """
    if tool != "train":
        return SMALL.get(tool, "")
    name = Path(arguments[0]).stem
    text = "" if any("data.files=" in word for word in arguments) else "data.files=books/*"
    return f"{SMALL['train']} {OWN.get(name, MLA)} {text}"


def with_flags(words: tuple[str, ...], added: list[str]) -> tuple[str, ...]:
    """Returns a command with flags added, in the place of its own: a list given twice is both."""
    replaced = {flag for flag in added if flag.startswith("--")} - {"--set"}
    own = [
        word for before, word in itertools.pairwise(("", *words)) if not replaced & {before, word}
    ]
    return (*own, *added)


def written_by(words: tuple[str, ...]) -> set[str]:
    """Returns what a command writes."""
    found = {path for flag, path in itertools.pairwise(words) if flag in WRITTEN}
    if words[1:2] == ("tools/convert.py",) and words[2] != "inspect":
        found.add(words[4])
    return found


def read_by(words: tuple[str, ...]) -> list[str]:
    return [word for word in words if word not in written_by(words)]


def overwritten(words: tuple[str, ...]) -> set[str]:
    """Returns what must not be there: pages show alternatives under one name."""
    resumed = words[1:2] == ("tools/prepare.py",) or "--process-id" in words
    return set() if resumed else written_by(words) - set(read_by(words))


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def run(tmp_path_factory, cache):
    """The folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("run")
    reader.furnish(folder)
    typist = Reader(folder, folder / "runs/tiny", cache)
    words = ("python", "tools/train.py", "--workdir", "runs/tiny", "--set", "data.files=text/*")
    assert not typist.type(documented.Command("", words))
    return folder / "runs/tiny"


def pages():
    """The commands that are run, by page, as the parameters of a test."""
    found = collections.defaultdict(list)
    for command in documented.in_pages():
        if not command.needs and not NOT_HERE.keys() & {*command.words}:
            found[command.place.partition(":")[0]].append(command)
    for page, commands in found.items():
        mark = pytest.mark.heavy if page in QUICK else pytest.mark.slow
        yield pytest.param(page, commands, id=page, marks=mark)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("page", "commands"), [*pages()])
def test_commands_of_a_page_run_in_order(page, commands, tmp_path, run, cache):
    reader.furnish(tmp_path)
    typist, wrong = Reader(tmp_path, run, cache), []
    for name, text in documented.files(ROOT / page):
        (tmp_path / name).write_text(typist.at_hand(text))
    try:
        for command in commands:
            if problem := typist.type(command):
                wrong.append(f"{command}\n{problem}")
    finally:
        typist.close()
    assert not wrong, "\n\n".join(wrong)
