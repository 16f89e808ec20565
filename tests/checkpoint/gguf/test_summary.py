import io

from rich.console import Console

from dsjax.checkpoint import inspection
from dsjax.checkpoint.gguf import summary
from tests.checkpoint.gguf.files import checkpoint, exported


def test_summary_counts_types_and_bytes(tmp_path):
    folder = checkpoint(tmp_path / "hf", "v3")
    exported(folder, tmp_path / "m.gguf", "experts=Q4_0,*=F32")
    found = inspection.summarize(tmp_path / "m.gguf", expect=False)
    values = 2 * 3 * 32 * 32 * 64  # layers, matrices, experts, in and out
    q4 = {"tensors": 6, "values": values, "bytes": values // 32 * 18, "bits_per_weight": 4.5}
    assert found["types"]["Q4_0"] == q4
    assert found["total_bytes"] == sum(kind["bytes"] for kind in found["types"].values())
    assert found["total_params"] == sum(kind["values"] for kind in found["types"].values())
    assert found["file_bytes"] == (tmp_path / "m.gguf").stat().st_size
    assert found["keys"]["deepseek2.expert_count"] == 32
    (row,) = [row for row in found["tensors"] if row["name"] == "blk.*.ffn_up_exps.weight"]
    assert row["count"] == 2 and row["shape"] == [32, 32, 64]
    screen = io.StringIO()
    inspection.print_summary(found, Console(file=screen, width=200))
    assert "blk.*.ffn_up_exps.weight" in screen.getvalue()
    assert "deepseek2.expert_gating_func=2" in screen.getvalue()


def test_long_values_are_cut(tmp_path):
    folder = checkpoint(tmp_path / "hf", "qwen2")
    exported(folder, tmp_path / "m.gguf")
    found = summary.summarize(tmp_path / "m.gguf")
    assert found["architecture"] == "qwen2" and found["format"] == "gguf"
