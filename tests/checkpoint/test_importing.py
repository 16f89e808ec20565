"""Imports: every number in its place, nothing half-written ever loadable, bad input refused."""

import json
import os
import resource
import shutil
import signal
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dsjax.checkpoint import importing, names
from dsjax.checkpoint.hf_config import from_hf
from dsjax.checkpoint.hf_folder import FP8, open_hf, scale_name
from dsjax.checkpoint.load import open_checkpoint
from dsjax.checkpoint.weights import Weights, leaf_name, scales_name
from tests import closeness
from tests.checkpoint.conversions import bring_in, hashes, read
from tests.checkpoint.hf_files import BLOCK, in_fp8, plain, quantization, write
from tests.checkpoint.kill_points import kill_at
from tests.golden.cases import CASES, ORACLE_CASES

V3, LLAMA, MTP = CASES["v3"], CASES["llama"], ORACLE_CASES["v3_mtp"]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
UP = "model.layers.1.mlp.experts.3.up_proj.weight"
BIAS_PATH = ("moe_layers", "ffn", "gate", "bias")
TENSORS = in_fp8(MTP)
COPY = "model.layers.2.shared_head.head.weight"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A V3 with MTP layers in FP8, in several files, with what else a release has."""
    folder = tmp_path_factory.mktemp("import") / "v3"
    config = MTP.config | {"quantization_config": quantization()}
    write(folder, config, TENSORS, max_bytes=100_000)
    (folder / "tokenizer.json").write_text('{"model": {}}')
    (folder / "LICENSE-MODEL").write_text("MIT")
    (folder / "modeling_deepseek.py").write_text("raise SystemExit")
    (folder / "figures").mkdir()
    return folder


def expected(stored, scales, dtype):
    """A published tensor as an import with --dtype `dtype` has it, in plain NumPy."""
    if scales is None or dtype == "keep":
        return stored if dtype == "keep" else stored.astype(dtype)
    spread = np.repeat(np.repeat(scales, BLOCK[0], 0), BLOCK[1], 1)
    return (stored.astype(np.float32) * spread[: len(stored), : stored.shape[1]]).astype(dtype)


@pytest.mark.parametrize("dtype", ["keep", "bfloat16", "float32"])
def test_import_puts_every_tensor_into_its_slot(published, tmp_path, dtype):
    done = bring_in(published, tmp_path / "out", dtype)
    weights, tensors = Weights(tmp_path / "out" / "weights"), TENSORS
    rows = [row for row in names.tensors(from_hf(MTP.config), "deepseek_v3") if not row.is_copy]
    assert done.tensors == len(rows)
    assert weights.block == (BLOCK if dtype == "keep" else None)
    for row in rows:
        name, scales = leaf_name(row), tensors.get(scale_name(row.name))
        got = weights.read_published(name, row.slot, row.transpose)
        wanted = np.float32 if row.keep_float32 else dtype if dtype == "keep" else np.dtype(dtype)
        want = expected(tensors[row.name], scales, wanted)
        assert got.dtype == want.dtype and got.tobytes() == want.tobytes(), row.name
        assert (scales_name(name) in weights.leaves) == (dtype == "keep" and row.quantized)
        if dtype == "keep" and row.quantized:
            kept = weights.read_published(scales_name(name), row.slot, row.transpose)
            assert kept.tobytes() == scales.tobytes(), row.name
    used = {leaf_name(row) for row in rows}
    assert {name for name in weights.leaves if name[0] != "scales"} == used


def test_import_in_fp8_quantizes_what_is_published_in_fp8(tmp_path):
    tensors = plain(V3)
    write(tmp_path / "v3", V3.config, tensors)
    bring_in(tmp_path / "v3", tmp_path / "out", "fp8")
    weights = Weights(tmp_path / "out" / "weights")
    assert weights.block == (128, 128)
    for row in names.tensors(from_hf(V3.config), "deepseek_v3"):
        name, want = leaf_name(row), tensors[row.name]
        stored = FP8 if row.quantized else np.float32 if row.keep_float32 else BFLOAT16
        assert weights.leaves[name].dtype == stored, row.name
        everything = (*row.slot, *(slice(None) for _ in row.shape))
        got = read(weights, name, everything, np.dtype(np.float32))
        level = closeness.FP8 if row.quantized else closeness.BF16
        closeness.assert_close(got, want.T if row.transpose else want, level, row.name)


def test_import_stores_the_routers_bias_in_float32(tmp_path):
    tensors = {name: value.astype(BFLOAT16) for name, value in plain(V3).items()}
    write(tmp_path / "v3", V3.config, tensors)
    bring_in(tmp_path / "v3", tmp_path / "out")
    leaf = Weights(tmp_path / "out" / "weights").leaves["router", *BIAS_PATH]
    assert leaf.dtype == np.float32


def test_import_leaves_a_checkpoint_that_opens(published, tmp_path):
    bring_in(published, tmp_path / "out")
    ours, theirs = open_checkpoint(tmp_path / "out"), open_checkpoint(published)
    assert (ours.model, ours.family, ours.dtype) == (theirs.model, theirs.family, theirs.dtype)
    assert sorted(path.name for path in ours.tokenizer_folder.iterdir()) == [
        "LICENSE-MODEL",
        "config.json",
        "tokenizer.json",
    ]
    index = (0, 3, slice(8, 40), slice(3, 30))
    for path in (("mtp", "layer", "ffn", "experts", "w_up"),):
        np.testing.assert_array_equal(ours.read(path, index), theirs.read(path, index))
    with pytest.raises(ValueError, match="is a converted folder or a run already"):
        bring_in(tmp_path / "out", tmp_path / "again")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_import_holds_little_at_a_time(published, tmp_path, monkeypatch):
    """What `stream` is told of a part covers what reading and converting it takes."""
    told = []

    def stream(work, items, n_bytes):
        for item in items:
            told.append((item.row.tensor.name, n_bytes(item)))
            yield work(item)

    monkeypatch.setattr(importing, "stream", stream)
    bring_in(published, tmp_path / "out", "float32")
    assert dict(told)[UP] == 32 * 64 * (1 + 4)
    tensors = open_hf(published).files.tensors
    offsets = [tensors[name] for name, _ in told]
    assert offsets == sorted(offsets, key=lambda info: (info.file, info.offset))


@pytest.mark.heavy
def test_killed_import_goes_on_to_the_same_bytes(tmp_path):
    """Power cuts at the first and last acts on the disk and some in between."""
    source = write(tmp_path / "llama", LLAMA.config, plain(LLAMA, BFLOAT16), max_bytes=50_000)
    (source / "tokenizer.json").write_text("{}")
    points = [1, 2, 20, 33, -20, *range(-12, 0)]
    kill_at(importing.import_checkpoint, source, tmp_path / "out", points)
    undisturbed = hashes(tmp_path / "out0")
    assert len(undisturbed) > 30
    for point in points:
        target = tmp_path / f"out{point}"
        partial = tmp_path / f"out{point}.partial"
        if target.exists():  # killed while it tidied up
            assert hashes(target) == undisturbed
            continue
        with pytest.raises(ValueError, match="does not exist"):
            open_checkpoint(target)
        content = partial / "content"
        if content.exists() and hashes(content) != undisturbed:
            with pytest.raises(ValueError, match=r"no checkpoint|does not exist|is missing"):
                open_checkpoint(content)
        bring_in(source, target)
        assert hashes(target) == undisturbed, point
        assert not partial.exists()


def test_interrupted_import_does_not_read_again_what_it_has(published, tmp_path, monkeypatch):
    writer = importing.WeightsWriter
    count = 0

    class Full(writer):
        def write(self, name, slot, tensor):
            nonlocal count
            count += 1
            if count > 200:
                raise OSError(28, "No space left on device")
            return super().write(name, slot, tensor)

    monkeypatch.setattr(importing, "WeightsWriter", Full)
    with pytest.raises(OSError, match="No space") as error:
        bring_in(published, tmp_path / "out")
    assert error.value.filename == str(tmp_path / "out.partial" / "content")
    monkeypatch.setattr(importing, "WeightsWriter", writer)
    done = bring_in(published, tmp_path / "out")
    assert 150 < done.tensors < 300 and open_checkpoint(tmp_path / "out")


def test_import_refuses_to_go_on_when_the_source_has_changed(tmp_path):
    source = write(tmp_path / "llama", LLAMA.config, plain(LLAMA))
    begin_and_stop(source, tmp_path / "out")
    os.utime(source / "model.safetensors", ns=(1, 1))
    with pytest.raises(ValueError, match=r"of something else: the state of its files was .* now"):
        bring_in(source, tmp_path / "out")
    with pytest.raises(ValueError, match="--dtype was keep, now float32; delete it to start over"):
        bring_in(source, tmp_path / "out", "float32")


def test_import_that_lacks_only_its_end_goes_on(published, tmp_path):
    begin_and_stop(published, tmp_path / "out")
    assert bring_in(published, tmp_path / "out").tensors == 0
    bring_in(published, tmp_path / "at once")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "at once")


def begin_and_stop(source, target):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importing, "copy_side_files", interrupt)
        with pytest.raises(KeyboardInterrupt):
            bring_in(source, target)


def interrupt(*arguments):
    raise KeyboardInterrupt


def test_import_of_nan_names_the_tensors(tmp_path):
    tensors = plain(V3, BFLOAT16)
    config = V3.config | {"quantization_config": quantization()}
    tensors |= {name: value for name, value in in_fp8(V3).items() if ".mlp." in name}
    tensors["model.norm.weight"][5] = np.nan
    tensors["lm_head.weight"][159, 63] = -np.inf
    tensors[UP].view(np.uint8)[31, 63] = 0xFF
    tensors[scale_name(UP.replace("up_", "down_"))][3, 1] = np.inf
    tensors[scale_name(UP.replace("up_", "gate_"))][1, 2] = 0.0
    write(tmp_path / "v3", config, tensors, max_bytes=100_000)
    for dtype in ("keep", "bfloat16"):
        with pytest.raises(ValueError, match="NaN or infinity, or with FP8 scales that") as error:
            bring_in(tmp_path / "v3", tmp_path / "out", dtype)
        message = str(error.value)
        experts = (UP.replace("up_", kind) for kind in ("up_", "down_", "gate_"))
        damaged = ("model.norm.weight", "lm_head.weight", *experts)
        assert sum(f"{name} in model-0000" in message for name in damaged) == 3
        assert message.count(" in model-0000") == 3 and "(5 in all)" in message
        assert [path.name for path in tmp_path.iterdir()] == ["v3"]


def test_import_of_mtp_copies_that_differ_names_both(published, tmp_path):
    tensors = TENSORS | {COPY: TENSORS[COPY].copy()}
    tensors[COPY].view(np.uint16)[100, 3] ^= 1
    config = MTP.config | {"quantization_config": quantization()}
    write(tmp_path / "v3", config, tensors)
    with pytest.raises(
        ValueError, match=rf"{COPY} differs from lm_head\.weight, of which it should be a copy"
    ):
        bring_in(tmp_path / "v3", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["v3"]


def test_import_compares_copies_of_another_dtype(tmp_path):
    tensors = plain(MTP, BFLOAT16)
    tensors[COPY] = tensors[COPY].view(np.float16)
    write(tmp_path / "v3", MTP.config, tensors)
    with pytest.raises(ValueError, match=f"{COPY} differs"):
        bring_in(tmp_path / "v3", tmp_path / "out")


def test_import_of_mixed_dtypes_is_refused_unless_cast(tmp_path):
    tensors = plain(V3, BFLOAT16)
    tensors[UP] = tensors[UP].astype(np.float32)
    write(tmp_path / "v3", V3.config, tensors)
    with pytest.raises(
        ValueError,
        match=r"experts\.0\.up_proj\.weight in bfloat16 and .*experts\.3\.up_proj\.weight in "
        "float32. So dtypes cannot be kept: use --dtype bfloat16, float32 or fp8",
    ):
        bring_in(tmp_path / "v3", tmp_path / "out")
    bring_in(tmp_path / "v3", tmp_path / "out", "bfloat16")


def test_import_refuses_wrong_usage_before_it_writes(published, tmp_path):
    with pytest.raises(ValueError, match="--dtype int8 is not one of keep"):
        bring_in(published, tmp_path / "out", "int8")
    with pytest.raises(ValueError, match=r"is not a folder|does not exist"):
        bring_in(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        bring_in(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(ValueError, match="is inside"):
        bring_in(published, published / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("")
    with pytest.raises(ValueError, match="is not empty; name a new or an empty folder"):
        bring_in(published, tmp_path / "full")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]


def test_import_without_room_is_refused_before_it_writes(published, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"out needs [\d,]+ bytes and there is room for 1,000"):
        bring_in(published, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_import_to_a_full_disk_says_where_and_can_go_on(published, tmp_path):
    """A limit on the size of files makes the kernel refuse to write, as a full disk does."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, limits[1]))
        with pytest.raises(OSError, match="File too large") as error:
            bring_in(published, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "out.partial" in error.value.filename
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    bring_in(published, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_import_to_a_read_only_folder_says_where(published):
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(published, Path(folder) / "v3")
        os.chmod(folder, 0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # to whom the mode means something
        try:
            with pytest.raises(PermissionError) as error:
                bring_in(Path(folder) / "v3", Path(folder) / "out")
        finally:
            os.seteuid(user)
            os.chmod(folder, 0o755)
    assert error.value.filename.endswith("out.partial")


def test_import_takes_no_large_side_file(published, tmp_path, monkeypatch):
    monkeypatch.setattr(importing, "_LARGEST_SIDE_FILE", 10)
    found = {path.name for path in importing.side_files(published)}
    assert found == {"LICENSE-MODEL"}


def test_converted_config_names_version_family_and_model(published, tmp_path):
    bring_in(published, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "config.json").read_text())
    assert record.keys() == {"dsjax", "family", "model"}
    assert record["family"] == "deepseek_v3" and record["model"]["n_mtp"] == 2
