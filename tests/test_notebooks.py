"""The notebooks of notebooks/ run from top to bottom, as someone runs them who has installed the
package: as they are, which takes minutes (slow), and with smaller parameters.

Parameters are what the cell tagged `parameters` sets, as papermill calls it; others stand in a cell
behind it.
"""

import ast
import os
import re
import shutil
import stat
import sys
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def run(notebook, folder, parameters=None, flags=""):
    """Executes a notebook in `folder`; returns it with its outputs.

    Args:
      parameters: values in place of the notebook's own, by name.
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
        "XLA_FLAGS": flags,
        "IPYTHONDIR": str(folder),
        "JUPYTER_RUNTIME_DIR": str(folder),
    }
    done = nbformat.read(notebook, as_version=4)
    if parameters:
        place = place_of_parameters(done)
        assert parameters.keys() <= assigned(done.cells[place].source), parameters
        text = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
        done.cells.insert(place + 1, nbformat.v4.new_code_cell(text))
    client = NotebookClient(done, timeout=None, resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment)
    return done


def place_of_parameters(notebook):
    (place,) = (
        place
        for place, cell in enumerate(notebook.cells)
        if "parameters" in cell.metadata.get("tags", ())
    )
    return place


def assigned(source):
    """The names that a cell sets."""
    return {target.id for node in ast.parse(source).body for target in node.targets}


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
MODEL = (
    "dim=32 n_layers=2 n_heads=2 inter_dim=48 q_lora_rank=16 kv_lora_rank=16 qk_nope_head_dim=8 "
    "qk_rope_head_dim=8 v_head_dim=8 moe_inter_dim=16"
).split()
SMALL = {
    "quickstart": {
        "STEPS": 5,
        "SETTINGS": " ".join(f"model.{key}" for key in MODEL)
        + " model.vocab_size=512 data.files=text/* data.sequence_length=64 train.eval_sequences=8",
    },
    "r1": {
        "STEPS": {"base": 2, "cold_start": 2, "reasoning": 1},
        "GAME": {"n_texts": 500, "n_cold": 200, "n_held_out": 4},
        "SETTINGS": " ".join(f"base.model.{key}" for key in MODEL)
        + " reasoning.rl.prompts=2 reasoning.rl.group_size=4 reasoning.train.batch_size=8",
    },
}


@pytest.mark.heavy
@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_in_small(path, tmp_path):
    (tmp_path / "text").mkdir()
    for name in ("documented", "test_notebooks", "conftest"):
        shutil.copy(Path(__file__).with_name(f"{name}.py"), tmp_path / "text")
    quick = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    CHECKS[path.stem](run(path, tmp_path, SMALL[path.stem], quick))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_whole(path, tmp_path):
    CHECKS[path.stem](run(path, tmp_path))
