import io
import json
import math
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from rich.console import Console

from dsjax import settings
from dsjax.checkpoint.hf_config import from_hf, to_hf
from dsjax.checkpoint.importing import import_checkpoint
from dsjax.checkpoint.inspection import implied_by, print_summary, summarize
from dsjax.display import Transfer
from dsjax.files import write_json
from tests.checkpoint.families.test_janusflow import RELEASED
from tests.checkpoint.hf_files import in_fp8, plain, quantization, write
from tests.checkpoint.runs import write_run
from tests.checkpoint.test_hf_config import CONFIGS, PUBLISHED
from tests.golden.cases import CASES, ORACLE_CASES

V3, MTP, LLAMA = CASES["v3"], ORACLE_CASES["v3_mtp"], CASES["llama"]
BF16 = np.dtype(ml_dtypes.bfloat16)
# What MTP's layers repeat of the main model.
COPIES = ("1.embed_tokens.weight", "2.embed_tokens.weight", "shared_head.head.weight")


def expected(folder, config):
    write_json(folder / "config.json", config)
    summary = summarize(folder / "config.json", expect=True)
    assert summary == summarize(folder, expect=True) | {"path": summary["path"]}
    return summary


def printed(summary):
    console = Console(file=io.StringIO(), width=150)
    print_summary(summary, console)
    return console.file.getvalue()


def test_published_v3_is_counted_without_weights(tmp_path):
    """The Hub's own count of deepseek-ai/DeepSeek-V3, by dtype; its 163 files have 688,586,727,753
    bytes, 73 KB a file more than their tensors: the headers.
    """
    summary = expected(tmp_path, PUBLISHED["v3_671b"])
    assert summary["tensor_count"] == 91_991
    assert summary["total_bytes"] == 688_574_839_360
    dtypes = {name: held["values"] for name, held in summary["expected"]["dtypes"].items()}
    assert dtypes == {
        "bfloat16": 3_918_786_560, "float8_e4m3fn": 680_571_043_840, "float32": 41_555_600
    }  # fmt: skip
    assert summary["expected"]["scale_tensors"] == 45_808
    assert (summary["total_params"], summary["mtp_params"]) == (671_026_419_200, 11_610_068_224)
    assert (summary["family"], summary["block"], summary["found"]) == (
        "deepseek_v3",
        [128, 128],
        None,
    )
    json.dumps(summary)
    text = printed(summary)
    for part in ("91,991", "688,574,839,360", "n_layers=61", "found"):
        assert (part in text) == (part != "found"), part


@pytest.mark.parametrize(
    ("name", "total_bytes"),
    [
        ("v2_lite", 31_412_968_448),
        ("moe_16b", 32_751_456_256),
        ("r1_distill_llama_8b", 16_060_522_496),
    ],
)
def test_published_bfloat16_models_are_two_bytes_a_parameter(tmp_path, name, total_bytes):
    summary = expected(tmp_path, PUBLISHED[name] | {"torch_dtype": "bfloat16"})
    assert summary["total_bytes"] == total_bytes == 2 * summary["total_params"]
    assert list(summary["expected"]["dtypes"]) == ["bfloat16"]


def test_published_janusflow_is_counted_from_its_config_alone(tmp_path):
    summary = expected(tmp_path, RELEASED)
    assert (summary["tensor_count"], summary["total_params"]) == (587, 2_046_367_504)


@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        ({"torch_dtype": "float32"}, "float32"),
        ({"torch_dtype": None, "dtype": "float16"}, "float16"),
        ({"dtype": "torch.bfloat16"}, "bfloat16"),
        ({}, "bfloat16"),
    ],
)
def test_dtype_of_the_config_is_counted(tmp_path, change, dtype):
    summary = expected(tmp_path, LLAMA.config | change)
    assert summary["dtype"] == dtype and list(summary["expected"]["dtypes"]) == [dtype]


@pytest.mark.parametrize("junk", ["int8", "__import__('os')", 16, ["bfloat16"]])
def test_dtype_that_is_none_is_refused(tmp_path, junk):
    write_json(tmp_path / "config.json", LLAMA.config | {"torch_dtype": junk})
    with pytest.raises(
        ValueError, match=r"torch_dtype=.* is not one of float32, bfloat16, float16"
    ):
        implied_by(tmp_path)


@pytest.mark.parametrize("name", [*CASES, *ORACLE_CASES])
def test_whole_folder_is_found_as_expected(tmp_path, name):
    case = (CASES | ORACLE_CASES)[name]
    tensors = plain(case, BF16)
    summary = summarize(write(tmp_path, case.config, tensors, 10**5), expect=False)
    found = summary["found"]
    assert {key: found[key] for key in summary["expected"]} == summary["expected"]
    assert summary["tensor_count"] == len(tensors)
    assert summary["total_bytes"] == sum(array.nbytes for array in tensors.values())
    assert found["files"] == len(list(tmp_path.glob("*.safetensors"))) > 1
    assert found["file_bytes"] > found["total_bytes"]
    assert summary["missing"] == summary["wrong"] == summary["unexpected"] == []


def test_fp8_folder_is_found_as_expected(tmp_path):
    tensors = in_fp8(MTP)
    config = MTP.config | {"quantization_config": quantization(), "torch_dtype": "bfloat16"}
    summary = summarize(write(tmp_path, config, tensors), expect=False)
    assert {key: summary["found"][key] for key in summary["expected"]} == summary["expected"]
    assert summary["found"]["scale_tensors"] == sum("_scale_inv" in name for name in tensors) > 100
    pattern = "model.layers.*.mlp.experts.*.up_proj.weight"
    rows = {row["name"]: row for row in summary["tensors"]}
    assert rows[pattern] == {
        "name": pattern, "dtype": "float8_e4m3fn", "shape": [32, 64], "count": 96,
        "bytes": 96 * 32 * 64,
    }  # fmt: skip
    assert rows[pattern + "_scale_inv"]["shape"] == [2, 4]
    assert sum(row["count"] for row in summary["tensors"]) == summary["tensor_count"]
    assert sum(row["bytes"] for row in summary["tensors"]) == summary["total_bytes"]


def test_disagreements_are_listed_and_not_raised(tmp_path):
    tensors = plain(V3, BF16)
    removed = [name for name in tensors if ".experts." in name]
    for name in removed:
        del tensors[name]
    tensors |= {"surprise": np.zeros(3, np.int8), "model.norm.weight": np.zeros(3, BF16)}
    summary = summarize(write(tmp_path, V3.config, tensors), expect=False)
    assert len(summary["missing"]) == len(removed) == 192
    assert summary["wrong"] == ["model.norm.weight is bfloat16[3], config.json gives [64]"]
    assert summary["unexpected"] == ["unexpected 'surprise' int8[3]"]
    text = printed(summary)
    for part in ("missing: 192", "and 172 more; --json has them all", "'surprise' int8[3]"):
        assert part in text


def test_absent_mtp_is_told(tmp_path):
    tensors = {
        name: array
        for name, array in plain(MTP, BF16).items()
        if not name.startswith(("model.layers.1.", "model.layers.2."))
    }
    summary = summarize(write(tmp_path, MTP.config, tensors), expect=False)
    assert (summary["expected"]["mtp_layers"], summary["found"]["mtp_layers"]) == (2, 0)
    assert summary["missing"] == [] and summary["model"]["n_mtp"] == 2
    assert summary["expected"]["tensor_count"] == len(tensors)


def test_config_alone_points_to_expect(tmp_path):
    write_json(tmp_path / "config.json", V3.config)
    with pytest.raises(ValueError, match=r"config.json has no weights to count; add --expect"):
        summarize(tmp_path / "config.json", expect=False)


def test_folder_without_weights_points_to_expect(tmp_path):
    write_json(tmp_path / "config.json", V3.config)
    with pytest.raises(
        ValueError, match=r"no \.safetensors files.*; with --expect the config alone"
    ):
        summarize(tmp_path, expect=False)
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        summarize(tmp_path / "nowhere" / "config.json", expect=True)


@pytest.mark.parametrize("fp8", [False, True])
def test_converted_folder_is_counted_as_published(tmp_path, fp8):
    tensors = in_fp8(MTP) if fp8 else plain(MTP, BF16)
    config = MTP.config | ({"quantization_config": quantization()} if fp8 else {})
    source = write(tmp_path / "hf", config, tensors)
    progress = Transfer(Console(file=io.StringIO()))
    import_checkpoint(source, tmp_path / "ours", dtype="keep", progress=progress)
    summary = summarize(tmp_path / "ours", expect=False)
    kept = [array for name, array in tensors.items() if not name.endswith(COPIES)]
    assert len(tensors) - len(kept) == 4
    assert summary["tensor_count"] == len(kept)
    assert summary["total_bytes"] == sum(array.nbytes for array in kept)
    assert {key: summary["found"][key] for key in summary["expected"]} == summary["expected"]
    alone = summarize(tmp_path / "ours", expect=True)
    assert alone["tensor_count"] == len(tensors)
    assert alone["total_bytes"] == sum(array.nbytes for array in tensors.values())
    assert "found" in printed(summary)


def test_checkpoint_of_a_run_is_counted_as_published(tmp_path):
    write_run(tmp_path, MTP, 4)
    tensors = plain(MTP)
    kept = [array for name, array in tensors.items() if not name.endswith(COPIES)]
    for path in (tmp_path, tmp_path / "checkpoints" / "4"):
        summary = summarize(path, expect=False)
        assert (summary["tensor_count"], summary["dtype"]) == (len(kept), "float32")
        assert summary["total_bytes"] == sum(array.nbytes for array in kept)
        assert {key: summary["found"][key] for key in summary["expected"]} == summary["expected"]


def test_run_is_expected_in_bfloat16(tmp_path):
    config = settings.load_config(CONFIGS / "tiny.py")
    write_json(tmp_path / "config.json", settings.to_dict(config))
    summary = summarize(tmp_path, expect=True)
    assert (summary["family"], summary["dtype"]) == ("deepseek_v3", "bfloat16")
    written = to_hf(config.model, "deepseek_v3")
    (tmp_path / "hf").mkdir()
    as_published = expected(tmp_path / "hf", written)
    assert as_published["total_bytes"] == summary["total_bytes"]
    assert from_hf(written).n_mtp == config.model.n_mtp


def test_expectation_needs_no_jax(tmp_path):
    write_json(tmp_path / "config.json", PUBLISHED["v2_lite"])
    code = (
        "import sys, pathlib; from dsjax.checkpoint.inspection import summarize;"
        f"summarize(pathlib.Path({str(tmp_path)!r}), True); print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_parameters_are_counted_without_scales_and_copies(tmp_path):
    tensors = in_fp8(MTP)
    config = MTP.config | {"quantization_config": quantization()}
    summary = summarize(write(tmp_path, config, tensors), expect=False)
    values = {name: a for name, a in tensors.items() if not name.endswith("_scale_inv")}
    main = [
        a
        for name, a in values.items()
        if not name.startswith(("model.layers.1.", "model.layers.2."))
    ]
    assert summary["total_params"] == sum(math.prod(a.shape) for a in main)
