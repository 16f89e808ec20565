"""What README, docs, and the docstrings of tools and configs tell people to type is valid: each
command's program, flags, config and keys.
"""

import ast
import collections
import configparser
import contextlib
import functools
import io
import re
import runpy
from pathlib import Path

import pytest

from dsjax import program, settings
from dsjax.config import Config
from dsjax.config.finetuning import FineTuning
from dsjax.config.janus import Janus
from dsjax.config.preference import Preference
from dsjax.config.reinforcement import Reinforcement
from dsjax.config.roots import PLANNED, ROOTS
from dsjax.curate import prepare
from dsjax.janus import from_nothing
from dsjax.posttrain import stages
from tests import documented
from tests.test_repository import FLAGS

ROOT = Path(__file__).parents[1]
KINDS = {
    "train": (Config,),
    "sft": (FineTuning,),
    "prefer": (Preference,),
    "grpo": (Reinforcement,),
    "paint": (Janus,),
    "show": ROOTS,
    "plan": PLANNED,
}
TOOLS = {*program.TOOLS, "NAME"}
# What commands may need that no test has (`documented`).
NEEDS = {
    "a network",
    "a TPU slice",
    "the TPU compiler",
    "several hosts",
    "Slurm",
    "Ray",
    "half an hour",
    "an hour",
    "token ids",
    "llama.cpp",
    "ollama",
}
# Programs that are not ours, of which only the files of this repository are checked.
OTHERS = {"pip", "source", "export", "curl", "llama-cli", "ollama", "sbatch", "kubectl"}


@functools.cache
def parser(tool):
    return runpy.run_path(str(ROOT / "tools" / f"{tool}.py"))["parser"]()


def tool_of(words):
    """The tool that a command runs and its arguments; None for another program."""
    if words[0] == "dsjax":
        return words[1], list(words[2:])
    path = Path(words[1]) if words[0] == "python" else Path()
    if path.parent.name == "tools" and path.suffix == ".py":
        return path.stem, list(words[2:])
    return None


def check(words, folder):
    """Raises ValueError, FileNotFoundError or AssertionError if a command is wrong.

    Args:
      folder: where the page's own files are.
    """
    tool = tool_of(words)
    if tool:
        check_tool(*tool, folder)
        return
    for word in words:
        if re.match(r"(docs|tools|configs|tests)/", word):
            assert (ROOT / word).exists(), word
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        for word in words[1:]:
            assert "=" in word or re.search(rf"^{word}:", makefile, re.MULTILINE), f"make {word}"
    elif words[:2] == ("python", "-m"):
        assert Path(ROOT, *words[2].split(".")).with_suffix(".py").is_file(), words[2]
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file() or (folder / words[1]).is_file(), words[1]
    else:
        assert words[0] in OTHERS, words[0]


def check_tool(tool, argv, folder):
    assert tool in (*program.TOOLS, "completion"), tool
    if tool == "completion":
        return
    # N and I stand for numbers.
    argv = ["1" if re.fullmatch("[A-Z]", word) else word for word in argv]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            given = parser(tool).parse_args(argv)
    except SystemExit:
        raise ValueError(said.getvalue().splitlines()[-1]) from None
    if tool == "r1":
        stages.load(given.config, given.set)
    elif tool == "shapes":
        from_nothing.load_config(given.config)
    elif tool == "prepare":
        recipe = given.recipe and str(folder / given.recipe)
        prepare.recipe_of(recipe, given.input, given.kind or "plain", given.set)
    elif getattr(given, "config", None):
        config = given.config
        if config == "CONFIG" or config.startswith("runs/"):  # the reader's own
            config = parser(tool).get_default("config") or "configs/tiny.py"
        settings.override(settings.load_any(config, KINDS[tool]), given.set)


def test_what_a_command_needs_is_one_of_these():
    assert {command.needs for command in documented.in_pages()} == {"", *NEEDS}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By page, a folder with the files that it tells its reader to write."""
    found = collections.defaultdict(lambda: ROOT)
    for page in documented.pages():
        folder = found[page.relative_to(ROOT).as_posix()] = tmp_path_factory.mktemp(page.stem)
        for name, text in documented.files(page):
            (folder / name).write_text(text)
    return found


@pytest.mark.parametrize("where", ["in_pages", "in_docstrings"])
def test_every_command_is_valid(where, folders, monkeypatch):
    monkeypatch.chdir(ROOT)
    commands, wrong = getattr(documented, where)(), []
    assert len(commands) > 90
    for command in commands:
        page = command.place.partition(":")[0]
        try:
            check(command.words, folders[re.sub(r"^tools/(.*)py$", r"docs/\1md", page)])
        except (ValueError, FileNotFoundError, AssertionError) as error:
            wrong.append(f"{command}\n  {error}")
    assert not wrong, "\n".join(wrong)


def test_every_command_in_prose_names_what_exists():
    wrong = []
    for command in documented.in_prose():
        tool = tool_of(command.words)
        flags = {word for word in command.words if word.startswith("--")}
        if tool and tool[0] != "completion":
            known = set().union(
                *(flags for name, flags in FLAGS.items() if name.split()[0] == f"{tool[0]}.py")
            )
            wrong += [f"{command}: {flag}" for flag in (flags - known) | ({tool[0]} - TOOLS)]
            continue
        try:
            check(command.words, ROOT)
        except AssertionError as error:
            wrong.append(f"{command}: {error}")
    assert not wrong, "\n".join(wrong)


def test_commands_stand_in_fenced_blocks():
    """Of which the tests above know."""
    wrong = []
    for page in documented.pages():
        text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        wrong += [f"{page.name}: {row}" for row in re.findall(r"^ {4,}python .*", text, re.M)]
    assert not wrong


def test_every_extra_named_exists():
    parsed = configparser.ConfigParser()
    parsed.read(ROOT / "setup.cfg")
    extras = set(parsed["options.extras_require"])
    for page in documented.pages():
        named = re.findall(r"(?:dsjax|'\.)\[([\w,]+)\]|extras? `(\w+)`", page.read_text())
        for name in {part for pair in named for part in ",".join(pair).split(",") if part}:
            assert name in extras, f"{page.name}: {name}"


def test_python_in_pages_parses_and_imports_what_exists():
    for page in documented.pages():
        for language, line, text in documented.blocks(page):
            if language != "python":
                continue
            for node in ast.walk(ast.parse(text, f"{page.name} from line {line}")):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dsjax"):
                    path = Path(ROOT, *str(node.module).split("."))
                    there = path.with_suffix(".py").is_file() or path.is_dir()
                    assert there, f"{page.name}: {node.module}"
