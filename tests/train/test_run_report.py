"""The page about a run, made from its files."""

import json

import pytest

from dsjax.train import run_report

CONFIG = {"name": "tiny", "train": {"steps": 40}}
LINES = [
    {"step": 1, "tokens": 10, "loss": 3.0, "step_seconds": 0.5, "data_seconds": 0.125, "mfu": 0.25,
     "tokens_per_second": 20.0, "memory_bytes": 2_000_000, "wall_seconds": 75.0},
    *({"step": step, "tokens": 10 * step, "eval_loss": 3 - step / 20, "eval_loss_0_31": 1.0}
      for step in range(1, 31)),
]  # fmt: skip
SUMMARY = {
    "name": "tiny", "steps": 40, "loss": 1.5, "eval_loss": 1.25, "tokens_per_second": 40.0,
    "median_step_seconds": 0.375, "mfu": 0.5, "peak": "made up", "wall_seconds": 90.0,
    "compile_seconds": 61.0, "sample": {"prompt": "```a|b", "completion": "c"},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return tmp_path


def written(folder):
    run_report.write_report(folder)
    return (folder / "report.md").read_text()


def test_report_of_a_run_under_way_has_its_newest_numbers(folder):
    (folder / "loss.png").write_bytes(b"")
    text = written(folder)
    assert "# tiny\n\nNot finished: 30 of 40 steps are done." in text
    assert "| eval_loss | 1.5 |" in text and "eval_loss_0_31" not in text
    assert "![Losses](loss.png)" in text and "reward.png" not in text
    assert "| seconds per step | 0.5 |" in text and "| of them waiting for data | 0.125 |" in text
    assert "| memory at most | 2 MB |" in text and "| wall time | 1:15 |" in text
    assert "## Sample" not in text and '"steps": 40' in text


def test_evaluations_are_thinned_out_and_the_newest_stays(folder):
    table = written(folder).partition("## Evaluations\n\n")[2].partition("\n\n")[0].splitlines()
    assert table[0] == "| step | tokens | eval_loss |" and len(table) == 2 + 20
    assert table[-1] == "| 30 | 300 | 1.5 |" and table[2].startswith(("| 1 |", "| 2 |"))
    assert len(set(table)) == 22


def test_report_bears_numbers_that_were_not_finite(folder):
    line = {"step": 31, "tokens": 310, "eval_loss": None, "eval_loss_0_31": None}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    (folder / "summary.json").write_text(json.dumps(SUMMARY | {"eval_loss": None, "mfu": None}))
    text = written(folder)
    assert "| 31 | 310 |  |" in text and "| eval_loss |  |" in text and "| MFU |" not in text


def test_report_of_a_finished_run_has_its_summary(folder):
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    text = written(folder)
    assert "Finished after 40 steps." in text and "| eval_loss | 1.25 |" in text
    assert "| seconds per step | 0.375 |" in text and "| of it compiling | 1:01 |" in text
    assert "````\n```a|b[...]c\n````" in text  # a longer fence than the sample's own


def test_report_of_rewards_shows_the_newest_answer(folder):
    answers = [{"step": 2, "prompt": "p", "text": f"t{n}", "reward": n / 2} for n in range(2)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in answers))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"rl": {}}))
    assert "Step 2, reward 0.5:\n\n```\np[...]t1\n```" in written(folder)


def test_report_of_a_run_that_learns_from_samples_is_not_about_them(folder):
    """A stage of tools/r1.py has a file of that name, in a form of its own."""
    line = {"prompt": "p", "completion": "c", "reward": 1.0, "source": "f:1"}
    (folder / "samples.jsonl").write_text(json.dumps(line) + "\n")
    assert "## Sample" not in written(folder)


def test_sessions_are_listed_with_what_changed_between_them(folder):
    run_report.add_session(folder, 0)
    run_report.add_session(folder, 12)
    path = folder / run_report.SESSIONS
    first, second = map(json.loads, path.read_text().splitlines())
    assert first["step"] == 0 and second["step"] == 12 and first["jax"] == second["jax"]
    path.write_text(json.dumps(first | {"jax": "0.0"}) + "\n" + json.dumps(second) + "\n")
    text = written(folder)
    assert f"| {first['started']} | 0 |  |" in text
    assert f"| {second['started']} | 12 | jax 0.0 -> {first['jax']} |" in text
    assert f"| jax | {first['jax']} |" in text
