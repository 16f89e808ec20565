"""The notebooks of notebooks/ run from top to bottom, as someone runs them who has installed the
package: in the default settings, and in a small part of their time, which is minutes (both slow).
"""

import os
import re
import stat
import sys
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def run(notebook, folder, scale, flags=""):
    """Executes a notebook in `folder`; returns it with its outputs.

    Args:
      flags: of XLA.
    """
    from nbclient import NotebookClient

    command = folder / "bin" / "dsjax"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dsjax.program "$@"\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    environment = os.environ | {
        "PATH": f"{command.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "DSJAX_SCALE": str(scale),
        "XLA_FLAGS": flags,
        "IPYTHONDIR": str(folder),
        "JUPYTER_RUNTIME_DIR": str(folder),
    }
    done = nbformat.read(notebook, as_version=4)
    client = NotebookClient(done, timeout=None, resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment)
    return done


def printed(notebook):
    """All text that the cells printed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output.get("text", "") for output in outputs)


def pictures(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_kept_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells and all(not cell.outputs and cell.execution_count is None for cell in cells)


def check_quickstart(notebook):
    text = printed(notebook)
    assert "parameters, of which a token uses" in text
    assert text.count("def main(") == 2 and text.count("%  ") >= 5
    assert pictures(notebook) == 2


def check_r1(notebook):
    text = printed(notebook)
    assert re.search(r"\nright +1\.0\nwrong +0\.1\n", text)
    assert all(f"\n{stage:11} right " in text for stage in ("cold_start", "reasoning"))
    assert pictures(notebook) == 2


CHECKS = {"quickstart": check_quickstart, "r1": check_r1}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_in_small(path, tmp_path):
    quick = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    CHECKS[path.stem](run(path, tmp_path, 0.01, quick))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_whole(path, tmp_path):
    CHECKS[path.stem](run(path, tmp_path, 1))
