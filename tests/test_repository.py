"""Ratchets that hold the code base in shape: sizes, names, mirrored tests, frozen interfaces."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "dsjax").rglob("*.py"))
TOOLS = sorted((ROOT / "tools").glob("*.py"))
SOURCES = PACKAGE + TOOLS + sorted((ROOT / "configs").glob("*.py"))
EVERYTHING = SOURCES + sorted((ROOT / "tests").rglob("*.py"))

MAX_FILE, MAX_FUNCTION, MAX_PARAMETERS, MAX_TOOL = 600, 80, 10, 80
BANNED = {"utils", "util", "common", "helpers", "helper", "misc", "manager", "base", "lib"}

# What scripts and people type. Adding is free; removing breaks them and needs a line in
# CHANGELOG.md.
FLAGS = {
    "checkpoint.py": {"--debug", "--help"},
    "checkpoint.py compare": {"--help", "--json"},
    "checkpoint.py list": {"--help", "--json"},
    "checkpoint.py verify": {"--help", "--json"},
    "convert.py": {"--debug", "--help"},
    "convert.py export": {"--dtype", "--help", "--push", "--type"},
    "convert.py import": {"--dtype", "--help", "--override"},
    "convert.py inspect": {"--expect", "--help", "--json", "--override"},
    "draw.py": {
        "--codes",
        "--debug",
        "--dtype",
        "--guidance",
        "--help",
        "--max-batch",
        "--mesh",
        "--n",
        "--out",
        "--override",
        "--prompt",
        "--seed",
        "--steps",
        "--temperature",
        "--tokens",
        "--vae",
    },
    "evaluate.py": {
        "--debug",
        "--dtype",
        "--help",
        "--json",
        "--k",
        "--max-batch",
        "--max-new-tokens",
        "--mesh",
        "--n",
        "--override",
        "--problems",
        "--raw",
        "--reward",
        "--seed",
        "--system",
        "--temperature",
        "--template",
        "--top-p",
    },
    "generate.py": {
        "--boxes",
        "--debug",
        "--dtype",
        "--help",
        "--image",
        "--max-new-tokens",
        "--mesh",
        "--min-p",
        "--no-bos",
        "--out",
        "--override",
        "--prompt",
        "--raw",
        "--seed",
        "--speculative",
        "--stop",
        "--temperature",
        "--thinking",
        "--tokens",
        "--top-k",
        "--top-p",
    },
    "grpo.py": {
        "--coordinator",
        "--debug",
        "--help",
        "--init",
        "--num-processes",
        "--process-id",
        "--set",
        "--workdir",
    },
    "examine.py": {
        "--debug",
        "--dtype",
        "--help",
        "--images",
        "--json",
        "--max-batch",
        "--max-new-tokens",
        "--mesh",
        "--override",
        "--questions",
    },
    "paint.py": {
        "--coordinator",
        "--debug",
        "--help",
        "--init",
        "--num-processes",
        "--process-id",
        "--set",
        "--workdir",
    },
    "plan.py": {
        "--debug",
        "--help",
        "--init",
        "--json",
        "--microbatches",
        "--no-compile",
        "--out",
        "--schedule",
        "--set",
        "--stages",
        "--step",
        "--topology",
    },
    "mine.py": {
        "--debug",
        "--examples",
        "--help",
        "--json",
        "--keep",
        "--out",
        "--pool",
        "--rounds",
        "--seed",
        "--text-field",
        "--url-field",
        "--workers",
    },
    "prefer.py": {
        "--coordinator",
        "--debug",
        "--help",
        "--init",
        "--num-processes",
        "--process-id",
        "--set",
        "--workdir",
    },
    "prepare.py": {
        "--debug",
        "--help",
        "--input",
        "--json",
        "--kind",
        "--num-processes",
        "--out",
        "--process-id",
        "--set",
        "--workers",
    },
    "r1.py": {
        "--coordinator",
        "--debug",
        "--help",
        "--num-processes",
        "--process-id",
        "--seed",
        "--set",
        "--workdir",
    },
    "recall.py": {
        "--debug",
        "--depths",
        "--dtype",
        "--help",
        "--json",
        "--lengths",
        "--max-batch",
        "--mesh",
        "--n",
        "--override",
        "--png",
        "--seed",
        "--task",
        "--text",
    },
    "sample.py": {
        "--debug",
        "--dtype",
        "--help",
        "--keep",
        "--max-batch",
        "--max-new-tokens",
        "--mesh",
        "--n",
        "--out",
        "--override",
        "--prompts",
        "--raw",
        "--reward",
        "--seed",
        "--system",
        "--temperature",
        "--template",
        "--top-p",
    },
    "score.py": {
        "--debug",
        "--dtype",
        "--help",
        "--high-pixels",
        "--image",
        "--json",
        "--logits",
        "--mesh",
        "--mtp-logits",
        "--no-bos",
        "--override",
        "--pixels",
        "--sequence-length",
        "--text",
        "--text-field",
        "--tokens",
    },
    "serve.py": {
        "--api-key",
        "--context",
        "--debug",
        "--dtype",
        "--eplb-every",
        "--grace",
        "--help",
        "--host",
        "--log-texts",
        "--max-batch",
        "--max-body",
        "--max-seconds",
        "--max-wait",
        "--max-waiting",
        "--mesh",
        "--model-name",
        "--open",
        "--override",
        "--port",
        "--prefill-chunk",
        "--prefill-mesh",
        "--prefix-tokens",
        "--redundant-experts",
        "--context-cache",
        "--context-cache-gb",
        "--speculative",
        "--warm",
    },
    "sft.py": {
        "--coordinator",
        "--debug",
        "--help",
        "--init",
        "--num-processes",
        "--process-id",
        "--set",
        "--workdir",
    },
    "shapes.py": {"--debug", "--help", "--seed", "--workdir"},
    "show.py": {"--debug", "--help", "--init", "--json", "--mesh", "--set"},
    "train.py": {
        "--coordinator",
        "--debug",
        "--help",
        "--init",
        "--num-processes",
        "--process-id",
        "--set",
        "--workdir",
    },
}
PUBLIC_NAMES = {"__version__", "load"}


def name(path):
    return str(path.relative_to(ROOT))


def functions(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def parameters(node):
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]


def test_files_are_short():
    long = [name(path) for path in EVERYTHING if len(path.read_text().splitlines()) > MAX_FILE]
    assert long == []


def test_functions_are_short():
    long = [
        f"{name(path)}: {node.name}"
        for path in SOURCES
        for node in functions(path)
        if (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION
    ]
    assert long == []


def test_functions_take_few_parameters():
    many = [
        f"{name(path)}: {node.name}"
        for path in SOURCES
        for node in functions(path)
        if len(parameters(node)) > MAX_PARAMETERS
    ]
    assert many == []


def test_tools_are_short():
    assert [name(path) for path in TOOLS if len(path.read_text().splitlines()) > MAX_TOOL] == []


def test_file_names_say_what_is_inside():
    vague = [name(path) for path in EVERYTHING if BANNED & set(path.stem.split("_"))]
    assert vague == []


def test_every_module_has_its_test_file():
    missing = []
    for path in PACKAGE:
        inside = path.relative_to(ROOT / "dsjax")
        test = ROOT / "tests" / inside.parent / f"test_{inside.name}"
        if path.name != "__init__.py" and not test.is_file():
            missing.append(name(test))
    assert missing == []


def test_sources_are_ascii_without_leftovers():
    mark = re.compile(r"\b(" + "TO" + "DO|FIX" + "ME|X" + "XX)" + r"\b")
    for path in EVERYTHING:
        text = path.read_text(encoding="utf-8")
        assert text.isascii(), name(path)
        assert not mark.search(text), f"{name(path)}: {mark.search(text)}"


def test_no_data_is_run_as_code():
    """No pickle, no eval, no shell; a config file is Python, which its author runs."""
    risky = {"eval", "exec", "pickle", "marshal", "shelve", "dill", "yaml", "system", "popen"}
    found = []
    for path in PACKAGE + TOOLS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name.split(".")[0] for alias in node.names}
                names |= {(getattr(node, "module", None) or "").split(".")[0]}
            elif isinstance(node, ast.Call):
                names = {getattr(node.func, "id", getattr(node.func, "attr", ""))}
                names |= {"shell"} & {keyword.arg for keyword in node.keywords}
            else:
                continue
            found += [f"{name(path)}: {what}" for what in names & (risky | {"shell"})]
    assert found == ["dsjax/settings.py: exec"]


def usage(command):
    """What `command --help` prints; `command` is a tool, or one of its commands."""
    tool, *words = command.split()
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / tool), *words, "--help"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", FLAGS)
def test_tool_has_frozen_flags(command):
    arguments, _, options = usage(command).partition("\noptions:\n")
    flags = set(re.findall(r"^ +(?:-h, )?(--[\w-]+)", options, re.M))
    assert flags == FLAGS[command]
    listed = arguments.partition("\n  COMMAND\n")[2]
    commands = set(re.findall(r"^    (\w+)", listed, re.M))
    below = {other.split()[1] for other in FLAGS if other.startswith(f"{command} ")}
    assert commands == below


def test_every_tool_shows_an_example():
    assert {path.name for path in TOOLS} == {command.split()[0] for command in FLAGS}
    for path in TOOLS:
        assert f"  python tools/{path.name} " in usage(path.name), path.name


def test_package_has_frozen_public_names():
    code = "import types, dsjax; print(*(k for k, v in vars(dsjax).items()"
    code += " if not isinstance(v, types.ModuleType) and (k == '__version__' or k[0] != '_')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert set(done.stdout.split()) == PUBLIC_NAMES, done.stderr


def test_readme_names_files_that_exist():
    text = (ROOT / "README.md").read_text()
    paths = set(re.findall(r"(?<![\w/])(?:dsjax|tools|configs|tests)/[\w/]+\.(?:py|npz)", text))
    assert paths and [path for path in sorted(paths) if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize(
    "path", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", ".ci/run"]
)
def test_repository_has(path):
    assert (ROOT / path).read_text().strip()
    assert path != ".ci/run" or os.access(ROOT / path, os.X_OK)
