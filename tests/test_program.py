"""The command `dsjax`, which runs the tools."""

import subprocess
import sys
from pathlib import Path

import pytest

from dsjax import __version__, program

ROOT = Path(__file__).parents[1]


def dsjax(*arguments, folder):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from dsjax.program import main; "
    return subprocess.run(
        [sys.executable, "-c", f"{code} sys.argv[0] = 'bin/dsjax'; sys.exit(main())", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
    )


def test_every_tool_is_a_command(tmp_path):
    assert set(program.TOOLS) == {path.stem for path in (ROOT / "tools").glob("*.py")}
    done = dsjax("--help", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(f"\n    {name}" in done.stdout for name in (*program.TOOLS, "completion"))
    assert dsjax("--version", folder=tmp_path).stdout == f"dsjax {__version__}\n"


def test_command_runs_its_tool_in_any_folder_and_takes_configs_by_name(tmp_path):
    done = dsjax("show", "v2_lite", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert '"total_params": 15706484224' in done.stdout
    done = dsjax("convert", "inspect", "nowhere", folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("dsjax convert: error: ")


def test_examples_are_those_of_the_command(tmp_path):
    text = dsjax("convert", "--help", folder=tmp_path).stdout
    assert text.startswith("usage: dsjax convert [-h]")
    assert "\n  dsjax convert import deepseek-ai/DeepSeek-V3 converted/v3\n" in text
    assert "tools/" not in text
    assert dsjax("convert", "import", "--help", folder=tmp_path).stdout.startswith(
        "usage: dsjax convert import "
    )


@pytest.mark.parametrize("arguments", [(), ("trian",), ("completion", "cmd.exe")])
def test_wrong_usage_is_said(arguments, tmp_path):
    done = dsjax(*arguments, folder=tmp_path)
    assert done.returncode == 2
    assert "usage: dsjax" in done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_the_arguments_of_each_command(shell, tmp_path):
    done = dsjax("completion", shell, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in ("train", "--workdir", "--max-new-tokens", "--topology"):
        assert word in done.stdout
