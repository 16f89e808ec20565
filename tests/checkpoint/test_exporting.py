"""Exports: what comes out is what went in, in the published layout, and nothing half-written."""

import io
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from rich.console import Console

from dsjax.checkpoint import exporting, names
from dsjax.checkpoint.exporting import export_checkpoint
from dsjax.checkpoint.hf_config import from_hf
from dsjax.checkpoint.hf_folder import FP8, open_hf, scale_name
from dsjax.checkpoint.load import open_checkpoint
from dsjax.checkpoint.tensor_files import MAX_SHARD_BYTES, open_folder, plan_shards
from dsjax.display import Transfer
from dsjax.files import write_json
from dsjax.text.tokenizer import BOS, EOS, PAD, load_tokenizer, train_tokenizer
from tests import closeness
from tests.checkpoint.conversions import bring_in, hashes, seal, send_out
from tests.checkpoint.hf_files import BLOCK, in_fp8, plain, quantization, write
from tests.checkpoint.kill_points import kill_at
from tests.checkpoint.runs import write_run
from tests.golden.cases import CASES, ORACLE_CASES

ALL_CASES = CASES | ORACLE_CASES
LLAMA, MTP = CASES["llama"], ORACLE_CASES["v3_mtp"]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FP8_CONFIG = MTP.config | {
    "quantization_config": quantization() | {"scale_fmt": "ue8m0"},
    "torch_dtype": "bfloat16",
    "auto_map": {"AutoModel": "modeling_deepseek.DeepseekV3Model"},
    "bos_token_id": 0,
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A V3 with MTP layers, imported in FP8, with the files beside it."""
    root = tmp_path_factory.mktemp("export")
    source = write(root / "v3", FP8_CONFIG, in_fp8(MTP))
    (source / "tokenizer.json").write_text('{"model": {}}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    bring_in(source, root / "converted")
    return root / "converted"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, MTP, 3)
    train_tokenizer(["the quick brown fox"] * 9, vocab_size=300).save(str(folder))
    return folder


def assert_same_tensors(folder, tensors):
    files = open_folder(folder)
    assert files.tensors.keys() == tensors.keys()
    for name, want in tensors.items():
        got = files.read(name)
        assert got.dtype == want.dtype and got.tobytes() == want.tobytes(), name


@pytest.mark.parametrize("name", ALL_CASES)
def test_bfloat16_comes_back_bitwise(tmp_path, name):
    case = ALL_CASES[name]
    tensors = plain(case, BFLOAT16)
    write(tmp_path / "hf", case.config, tensors)
    bring_in(tmp_path / "hf", tmp_path / "ours")
    send_out(tmp_path / "ours", tmp_path / "back")
    assert_same_tensors(tmp_path / "back", tensors)
    assert open_hf(tmp_path / "back").config == case.config | {"torch_dtype": "bfloat16"}


def test_fp8_comes_back_bitwise_with_its_scales(converted, tmp_path):
    send_out(converted, tmp_path / "back")
    assert_same_tensors(tmp_path / "back", in_fp8(MTP))
    folder = open_hf(tmp_path / "back")
    assert folder.config == {key: FP8_CONFIG[key] for key in FP8_CONFIG if key != "auto_map"}
    assert folder.block == BLOCK and folder.model.n_mtp == 2
    beside = {path.name for path in (tmp_path / "back").iterdir()}
    assert beside == {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "README.md",
    }


def test_import_and_export_in_float32_lose_nothing(tmp_path):
    tensors = plain(LLAMA, BFLOAT16)
    write(tmp_path / "hf", LLAMA.config, tensors)
    bring_in(tmp_path / "hf", tmp_path / "ours", "float32")
    send_out(tmp_path / "ours", tmp_path / "back", "bfloat16")
    assert_same_tensors(tmp_path / "back", tensors)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_fp8_is_exported_as_numbers(converted, tmp_path, dtype):
    send_out(converted, tmp_path / "back", dtype)
    folder, tensors = open_hf(tmp_path / "back"), in_fp8(MTP)
    assert folder.block is None and folder.config["torch_dtype"] == dtype
    for row in folder.rows:
        name = row.tensor.name
        assert row.dtype == ("float32" if row.tensor.keep_float32 else dtype), name
        want = tensors[name].astype(np.float32)
        if row.tensor.quantized:
            scales = tensors[scale_name(name)]
            spread = np.repeat(np.repeat(scales, BLOCK[0], 0), BLOCK[1], 1)
            want = want * spread[: want.shape[0], : want.shape[1]]
        got = folder.files.read(name)
        assert got.tobytes() == want.astype(row.dtype).tobytes(), name


def test_run_is_exported_in_fp8_as_deepseek_publishes(run, tmp_path):
    send_out(run, tmp_path / "back", "fp8")
    folder, want = open_hf(tmp_path / "back"), plain(MTP)
    assert folder.block == (128, 128) and folder.config["torch_dtype"] == "bfloat16"
    ours = open_checkpoint(tmp_path / "back")
    for row in folder.rows:
        tensor = row.tensor
        wanted = FP8 if tensor.quantized else "float32" if tensor.keep_float32 else BFLOAT16
        assert row.dtype == wanted, tensor.name
        everything = (*tensor.slot, *(slice(None) for _ in tensor.shape))
        got = ours.read(tensor.path, everything, np.dtype(np.float32))
        level = closeness.FP8 if tensor.quantized else closeness.BF16
        published = want[tensor.name]
        closeness.assert_close(
            got, published.T if tensor.transpose else published, level, tensor.name
        )


def test_run_is_exported_in_float32_with_mtp_copies(run, tmp_path):
    send_out(run, tmp_path / "back")
    assert_same_tensors(tmp_path / "back", plain(MTP))
    config = open_hf(tmp_path / "back").config
    assert from_hf(config) == open_checkpoint(run).model
    assert config["torch_dtype"] == "float32" and config["num_nextn_predict_layers"] == 2


def test_run_is_exported_with_its_tokenizer(run, tmp_path):
    send_out(run, tmp_path / "back", "bfloat16")
    back = tmp_path / "back"
    assert load_tokenizer(str(back)).fingerprint == load_tokenizer(str(run)).fingerprint
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    assert json.loads((back / "generation_config.json").read_text()) == ids
    config = json.loads((back / "config.json").read_text())
    assert {key: config[key] for key in ids} == ids
    settings = json.loads((back / "tokenizer_config.json").read_text())
    assert settings == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 2560,
        "clean_up_tokenization_spaces": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
    }


def test_run_without_a_tokenizer_is_exported_without_one(tmp_path):
    write_run(tmp_path / "run", LLAMA, 1)
    console = Console(file=io.StringIO(), width=500)
    source, target = tmp_path / "run", tmp_path / "back"
    export_checkpoint(source, target, dtype="keep", progress=Transfer(console))
    assert "run has no tokenizer.json; neither has the export" in console.file.getvalue()
    names = {path.name for path in target.iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors"}


def test_absent_mtp_layers_are_not_announced(tmp_path):
    tensors = {
        name: value
        for name, value in plain(MTP, BFLOAT16).items()
        if not name.startswith(("model.layers.1.", "model.layers.2."))
    }
    write(tmp_path / "hf", MTP.config, tensors)
    bring_in(tmp_path / "hf", tmp_path / "ours")
    send_out(tmp_path / "ours", tmp_path / "back")
    assert_same_tensors(tmp_path / "back", tensors)
    assert open_hf(tmp_path / "back").config["num_nextn_predict_layers"] == 0


def test_export_is_in_layer_order_in_shards_of_5_gb(converted, tmp_path, monkeypatch):
    limits = []

    def plan(tensors, max_bytes=MAX_SHARD_BYTES):
        limits.append(max_bytes)
        return plan_shards(tensors, 100_000)

    monkeypatch.setattr(exporting, "plan_shards", plan)
    send_out(converted, tmp_path / "back")
    assert limits == [5_000_000_000]
    files = open_folder(tmp_path / "back")
    assert len(files.files) > 5
    order = [tensor.name for tensor in names.tensors(from_hf(MTP.config), "deepseek_v3")]
    in_files = [files.tensors[name].file for name in order]
    assert in_files == sorted(in_files)
    assert_same_tensors(tmp_path / "back", in_fp8(MTP))


def all_but_the_card(folder):
    """Hashes; the card, written last, has the name of its folder."""
    return {name: found for name, found in hashes(folder).items() if "README.md" not in name}


@pytest.mark.heavy
def test_killed_export_goes_on_to_the_same_bytes(tmp_path):
    """Power cuts at every act on the disk."""
    write_run(tmp_path / "run", LLAMA, 1)
    points = list(range(1, 11))
    kill_at(exporting.export_checkpoint, tmp_path / "run", tmp_path / "out", points)
    undisturbed = all_but_the_card(tmp_path / "out0")
    assert undisturbed.keys() == {"config.json", "model.safetensors"}
    for point in points:
        target = tmp_path / f"out{point}"
        partial = tmp_path / f"out{point}.partial"
        if target.exists():  # killed while it tidied up
            assert all_but_the_card(target) == undisturbed
            continue
        content = partial / "content"
        if content.exists() and all_but_the_card(content) != undisturbed:
            with pytest.raises(ValueError, match=r"no checkpoint|does not exist"):
                open_checkpoint(content)
        send_out(tmp_path / "run", target)
        assert all_but_the_card(target) == undisturbed, point
        assert (target / "README.md").is_file() and not partial.exists()


def test_interrupted_export_goes_on_after_the_last_whole_shard(converted, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "plan_shards", lambda tensors: plan_shards(tensors, 100_000))
    send_out(converted, tmp_path / "whole")
    write_shard = exporting.write_shard

    def stop_at_four(folder, shard, produce):
        if "model-00004" in shard.file_name:
            raise KeyboardInterrupt
        write_shard(folder, shard, produce)

    monkeypatch.setattr(exporting, "write_shard", stop_at_four)
    with pytest.raises(KeyboardInterrupt):
        send_out(converted, tmp_path / "back")
    written = sorted((tmp_path / "back.partial" / "content").iterdir())
    times = [path.stat().st_mtime_ns for path in written]
    assert len(written) == 3
    monkeypatch.setattr(exporting, "write_shard", write_shard)
    done = send_out(converted, tmp_path / "back")
    assert all_but_the_card(tmp_path / "back") == all_but_the_card(tmp_path / "whole")
    assert [(tmp_path / "back" / path.name).stat().st_mtime_ns for path in written] == times
    assert 0 < done.tensors < len(in_fp8(MTP))


def test_export_refuses_to_go_on_from_another_step(tmp_path, monkeypatch):
    write_run(tmp_path / "run", LLAMA, 1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "write_index", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            send_out(tmp_path / "run", tmp_path / "back")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    with pytest.raises(ValueError, match=r"of something else: the source was .*2/state, now .*1/s"):
        send_out(tmp_path / "run", tmp_path / "back")


def test_export_of_nan_names_the_array(tmp_path):
    tensors = plain(LLAMA)
    write(tmp_path / "hf", LLAMA.config, tensors)
    bring_in(tmp_path / "hf", tmp_path / "ours")
    chunk = tmp_path / "ours" / "weights" / "params.dense_layers.ffn.w_up" / "1.0.0"
    damaged = np.fromfile(chunk, np.float32)
    damaged[77] = np.nan
    damaged.tofile(chunk)
    seal(tmp_path / "ours")
    with pytest.raises(
        ValueError,
        match=r"params\.dense_layers\.ffn\.w_up contains NaN or infinity in the part for "
        r"model\.layers\.1\.mlp\.up_proj\.weight; export an earlier",
    ):
        send_out(tmp_path / "ours", tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "ours"]


def test_export_refuses_wrong_usage_before_it_writes(converted, tmp_path):
    with pytest.raises(ValueError, match="--dtype int8 is not one of keep"):
        send_out(converted, tmp_path / "back", "int8")
    with pytest.raises(ValueError, match="is inside"):
        send_out(converted, converted / "back")
    with pytest.raises(ValueError, match="does not exist; name the folder of a checkpoint"):
        send_out(tmp_path / "nothing", tmp_path / "back")
    write(tmp_path / "hf", LLAMA.config, plain(LLAMA))
    with pytest.raises(ValueError, match="is a Hugging Face folder already; import it"):
        send_out(tmp_path / "hf", tmp_path / "back")
    with pytest.raises(ValueError, match="is not empty; name a new or an empty folder"):
        send_out(converted, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_export_without_room_is_refused_before_it_writes(converted, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"back needs [\d,]+ bytes and there is room for 1,000"):
        send_out(converted, tmp_path / "back")
    assert list(tmp_path.iterdir()) == []


def test_export_of_a_shape_without_a_published_form_is_refused(tmp_path):
    write_run(tmp_path / "run", MTP, 1)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["model"]["mtp_after_final_norm"] = False
    write_json(tmp_path / "run" / "config.json", config)
    with pytest.raises(ValueError, match="mtp_after_final_norm"):
        send_out(tmp_path / "run", tmp_path / "back")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_export_is_pushed_when_it_is_whole(run, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(
        exporting.hub, "push", lambda made, name: pushed.append((made, name)) or "the page"
    )
    output = io.StringIO()
    more = {"dtype": "float32", "choice": None, "progress": Transfer(Console(file=output))}
    with pytest.raises(ValueError, match="--push tiny is not the name of a repository"):
        exporting.export(run, tmp_path / "out", push="tiny", **more)
    assert not (tmp_path / "out").exists()
    exporting.export(run, tmp_path / "out", push="me/tiny", **more)
    assert pushed == [(tmp_path / "out", "me/tiny")] and "pushed: the page" in output.getvalue()
    assert (tmp_path / "out" / "README.md").is_file()
