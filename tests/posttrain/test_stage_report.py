"""What a pipeline tells of its stages."""

import io
import json

from rich.console import Console

from dsjax.posttrain.stage_report import print_stages, write_report


def test_report_is_a_list_and_a_picture(tmp_path):
    report = {
        "name": "base", "accuracy": 0.25, "accuracy_low": 0.2, "accuracy_high": 0.3,
        "pass_at_k": {"1": 0.25, "8": 0.5}, "format": 1.0, "length": 20.0, "entropy": 0.5,
        "seconds": 3.0, "samples": [{"prompt": "1 2 3:6\n", "text": "<answer>1+2+3</answer>"}],
    }  # fmt: skip
    (tmp_path / "base").mkdir()
    lines = [
        {"step": step, "reward": step, "right": step / 10, "length": 20 + step}
        for step in range(1, 5)
    ]
    text = "".join(json.dumps(line) + "\n" for line in [{"step": 0, "loss": 1.0}, *lines])
    (tmp_path / "base" / "metrics.jsonl").write_text(text)
    write_report(tmp_path, [report, report | {"name": "cold_start"}], "game")
    assert [each["name"] for each in json.loads((tmp_path / "r1.json").read_text())] == [
        "base", "cold_start",
    ]  # fmt: skip
    assert (tmp_path / "r1.png").stat().st_size > 10_000
    console = Console(record=True, width=120, file=io.StringIO())
    print_stages([report], console)
    shown = console.export_text()
    assert "25.0%" in shown and "50.0%" in shown and "1 2 3:6" in shown
