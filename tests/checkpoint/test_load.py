"""Loading: every kind of checkpoint gives the same model, on any mesh, and what is not whole is
refused."""

import dataclasses
import io
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

import dsjax
from dsjax.checkpoint import load, manifest, names
from dsjax.checkpoint.hf_folder import scale_name
from dsjax.checkpoint.importing import import_checkpoint
from dsjax.checkpoint.inspection import summarize
from dsjax.checkpoint.load import open_checkpoint
from dsjax.checkpoint.tensor_files import TensorFolder
from dsjax.display import Transfer
from dsjax.parallel.mesh import make_mesh
from dsjax.parallel.sharding import generation_spec
from tests.checkpoint import hf_files
from tests.checkpoint.conversions import quiet, seal
from tests.checkpoint.runs import write_run
from tests.closeness import EXACT, assert_close
from tests.golden import checkpoint as golden
from tests.golden import ours
from tests.golden.cases import CASES, ORACLE_CASES

FLOAT32 = np.dtype(np.float32)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
ALL = CASES | ORACLE_CASES
MTP = ORACLE_CASES["v3_mtp"]
KINDS = ("hf", "converted", "run")


def leaves(model: nnx.Module) -> dict[str, jax.Array]:
    variables = jax.tree_util.tree_leaves_with_path(
        model, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )
    return {jax.tree_util.keystr(keys): variable.get_value() for keys, variable in variables}


def assert_same_model(got: nnx.Module, want: nnx.Module) -> None:
    got_leaves, want_leaves = leaves(got), leaves(want)
    assert got_leaves.keys() == want_leaves.keys()
    for name, value in want_leaves.items():
        assert_close(got_leaves[name], value, EXACT, name)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The same float32 checkpoint in every form, and as published in FP8."""
    root = tmp_path_factory.mktemp("folders")
    hf = hf_files.write(root / "hf", MTP.config, hf_files.plain(MTP), max_bytes=200_000)
    fp8 = {**MTP.config, "quantization_config": hf_files.quantization()}
    hf_files.write(root / "fp8", fp8, hf_files.in_fp8(MTP))
    for name, source in (("converted", hf), ("converted fp8", root / "fp8")):
        progress = Transfer(Console(file=io.StringIO()))
        import_checkpoint(source, root / name, dtype="keep", progress=progress)
    write_run(root / "run", MTP, 3)
    return {name: root / name for name in (*KINDS, "fp8", "converted fp8")}


@pytest.fixture(scope="module")
def model():
    """The golden tests' own model of MTP."""
    return ours.altered(MTP, {}, None)


@pytest.mark.parametrize("name", ALL)
def test_load_fills_the_model_of_each_family_as_the_golden_tests_do(name, tmp_path):
    case = ALL[name]
    hf_files.write(tmp_path, case.config, hf_files.plain(case))
    assert_same_model(dsjax.load(tmp_path), ours.altered(case, {}, None))


@pytest.mark.parametrize("kind", KINDS)
def test_load_gives_the_same_model_from_every_kind_of_checkpoint(folders, model, kind):
    loaded = dsjax.load(str(folders[kind]))
    assert_same_model(loaded, model)
    assert loaded.config == model.config and loaded.policy == model.policy


def test_load_takes_the_main_models_tensors_where_a_module_has_copies(model, tmp_path):
    tensors = hf_files.plain(MTP)
    copy = "model.layers.2.embed_tokens.weight"
    assert tensors[copy].any()
    hf_files.write(tmp_path, MTP.config, tensors | {copy: np.zeros_like(tensors[copy])})
    assert_same_model(dsjax.load(tmp_path), model)


def test_load_gives_the_logits_of_the_golden_tests(folders, model):
    forward = jax.jit(lambda model, tokens: model(tokens), compiler_options=ours.QUICK)
    tokens = jnp.asarray(golden.tokens(MTP, 20))[None]
    got = forward(dsjax.load(folders["hf"]), tokens)
    assert_close(got, forward(model, tokens), EXACT, "logits")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 4}], ids=str
)
def test_load_gives_each_device_its_slice(folders, model, kind, sizes):
    mesh = make_mesh(sizes, n_devices=int(np.prod(list(sizes.values()))))
    loaded = dsjax.load(folders[kind], mesh=mesh)
    assert_same_model(loaded, model)
    for name, array in leaves(loaded).items():
        assert array.sharding.mesh == mesh
        for shard in array.addressable_shards:
            assert_close(shard.data, np.asarray(leaves(model)[name])[shard.index], EXACT, name)
    w_up = loaded.moe_layers.ffn.experts.w_up[...]
    split = sizes.get("fsdp", 1) * sizes.get("tensor", 1)
    assert w_up.addressable_shards[0].data.size * split == w_up.size


def test_load_leaves_weights_whole_where_generation_wants_them(folders, model):
    mesh = make_mesh({"expert": 4, "tensor": 2})
    loaded = load.load(folders["hf"], mesh=mesh, look_up=generation_spec)
    assert_same_model(loaded, model)
    layers = loaded.moe_layers
    for variable, parts in (
        (layers.attn.wkv_a, 1),
        (layers.attn.wo, 2),
        (layers.ffn.experts.w_up, 8),
    ):
        array = variable[...]
        assert array.addressable_shards[0].data.size * parts == array.size


def test_load_gives_each_device_its_slice_of_an_array_too_large_for_the_host(
    folders, model, monkeypatch
):
    monkeypatch.setattr(load, "HOST_BYTES", 0)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    assert_same_model(dsjax.load(folders["hf"], mesh=mesh), model)


@pytest.fixture
def bytes_read(monkeypatch):
    """The bytes of each read from a Hugging Face folder."""
    sizes, read = [], TensorFolder.read

    def counted(self, name, rows=None):
        tensor = read(self, name, rows)
        sizes.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(TensorFolder, "read", counted)
    return sizes


def test_load_reads_each_tensor_once_for_all_devices(folders, bytes_read):
    opened = open_checkpoint(folders["hf"])
    del bytes_read[:]
    loaded = dsjax.load(folders["hf"], mesh=make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    assert sum(bytes_read) == sum(array.nbytes for array in leaves(loaded).values())
    assert opened.model == loaded.config


def test_checkpoint_reads_only_the_rows_of_a_slice(folders, bytes_read):
    """Our columns are published rows; an expert is a tensor."""
    opened = open_checkpoint(folders["hf"])
    del bytes_read[:]
    got = opened.read(("moe_layers", "ffn", "experts", "w_up"), (0, 3, slice(None), slice(8, 12)))
    assert got.shape == (64, 4) and sum(bytes_read) == got.nbytes


def test_load_dequantizes_in_float32(folders):
    """Value times scale of the value's own block, rounded once."""
    opened = open_checkpoint(folders["fp8"])
    rows = {row.name: row for row in names.tensors(opened.model, "deepseek_v3")}
    tensors = hf_files.in_fp8(MTP)
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    scales = np.repeat(np.repeat(tensors[scale_name(name)], 16, axis=0), 16, axis=1)
    values = tensors[name].astype(np.float32)
    want = (values * scales[: values.shape[0], : values.shape[1]]).T
    path = rows[name].path
    assert tensors[name].dtype == E4M3 and opened.dtype == BFLOAT16
    for columns in (slice(None), slice(20, 70)):
        index = (0, slice(None), columns)
        assert_close(opened.read(path, index, FLOAT32), want[:, columns], EXACT)
        assert_close(opened.read(path, index), want[:, columns].astype(BFLOAT16), EXACT)


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_load_gives_the_same_model_from_fp8_in_both_forms(folders, dtype):
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    want = dsjax.load(folders["fp8"], dtype=dtype)
    assert_same_model(dsjax.load(folders["converted fp8"], dtype=dtype, mesh=mesh), want)
    assert want.policy.compute == (dtype or BFLOAT16)


@pytest.mark.parametrize("kind", KINDS)
def test_load_casts_all_but_the_routers_bias(folders, model, kind):
    loaded = leaves(dsjax.load(folders[kind], dtype=jnp.bfloat16))
    for name, value in leaves(model).items():
        want = np.asarray(value)
        want = want if name.endswith("gate.bias") else want.astype(BFLOAT16)
        assert_close(loaded[name], want, EXACT, name)


@pytest.mark.parametrize("name", ["v3_mtp", "v2_lite", "qwen2", "deepseek_moe"])
def test_model_runs_with_bfloat16_weights(name, tmp_path):
    case = ALL[name]
    hf_files.write(tmp_path, case.config, hf_files.plain(case, BFLOAT16))
    model = dsjax.load(tmp_path)
    hidden = jax.eval_shape(
        lambda model, tokens: model.hidden(tokens), model, jnp.zeros((1, 8), int)
    )
    assert model.policy.compute == BFLOAT16
    assert hidden.main_BTD.dtype == BFLOAT16


def test_load_refuses_other_dtypes(folders):
    for dtype in ("float16", "int16", "a dtype"):
        with pytest.raises(ValueError, match=rf"dtype='{dtype}' .*in bfloat16 or float32"):
            dsjax.load(folders["hf"], dtype=dtype)


def test_load_refuses_a_mesh_that_does_not_fit(tmp_path):
    case = dataclasses.replace(MTP, config={**MTP.config, "vocab_size": 165})
    hf_files.write(tmp_path, case.config, hf_files.plain(case))
    with pytest.raises(ValueError, match=r"head.*vocab=165 .* does not divide"):
        dsjax.load(tmp_path, mesh=make_mesh({"tensor": 8}))


@pytest.mark.parametrize(("kind", "inside"), [("hf", "."), ("converted", "hf"), ("run", ".")])
def test_checkpoint_knows_what_it_is(folders, kind, inside):
    opened = open_checkpoint(folders[kind])
    assert opened.tokenizer_folder == folders[kind] / inside
    assert (opened.family, opened.dtype) == ("deepseek_v3", FLOAT32)


def test_checkpoint_of_a_run_is_the_newest_whole_one_or_the_one_named(tmp_path, model, caplog):
    write_run(tmp_path, MTP, 2, 10)
    newest = tmp_path / "checkpoints" / "10"
    assert_same_model(dsjax.load(tmp_path), model)
    (newest / "state" / "manifest.ocdbt").unlink()
    with caplog.at_level(logging.WARNING):
        older = dsjax.load(tmp_path)
    assert "10/state/manifest.ocdbt is missing" in caplog.text and "step 2" in caplog.text
    assert newest.is_dir()  # a reader renames nothing
    assert_close(older.embed.weight[...], model.embed.weight[...] + 8, EXACT)
    assert_same_model(dsjax.load(tmp_path / "checkpoints" / "2"), older)
    with pytest.raises(ValueError, match=r"10/state/manifest\.ocdbt is missing; copy or convert"):
        open_checkpoint(newest)
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    with pytest.raises(
        ValueError, match=r"every checkpoint in .* is damaged, and training does not start over"
    ):
        open_checkpoint(tmp_path)


def test_a_run_is_hashed_once(tmp_path, monkeypatch):
    write_run(tmp_path, MTP, 2)
    hashed: list[Path] = []
    own = manifest._hash
    monkeypatch.setattr(
        manifest, "_hash", lambda path, **options: hashed.append(path) or own(path, **options)
    )
    for path in (tmp_path, tmp_path / "checkpoints" / "2"):
        hashed.clear()
        open_checkpoint(path)
        files = manifest.read(tmp_path / "checkpoints" / "2").files
        assert sorted(hashed) == sorted(tmp_path / "checkpoints" / "2" / name for name in files)


def test_of_a_run_that_averages_its_weights_the_averages_are_read(tmp_path, model):
    """And what has none, since it does not train, as it is."""
    write_run(tmp_path, MTP, 3, average=0.5)
    found, want = leaves(dsjax.load(tmp_path)), leaves(model)
    apart = [name for name in want if not np.array_equal(found[name], want[name])]
    assert apart == [".embed.weight"] and found.keys() == want.keys()
    assert_close(found[".embed.weight"], want[".embed.weight"] + 0.5, EXACT)


def test_converted_checkpoint_that_is_not_whole_is_refused(folders, tmp_path):
    shutil.copytree(folders["converted"], tmp_path / "copy")
    (tmp_path / "copy" / "weights" / "_METADATA").unlink()
    with pytest.raises(ValueError, match=r"weights/_METADATA is missing; copy or convert"):
        open_checkpoint(tmp_path / "copy")


def test_checkpoint_that_is_still_converted_is_refused(tmp_path):
    (tmp_path / "new.partial").mkdir()
    with pytest.raises(
        ValueError, match=r"new does not exist.*new\.partial is an unfinished conversion to it"
    ):
        open_checkpoint(tmp_path / "new")


def test_a_checkpoint_is_opened_from_inside_its_folder(folders, monkeypatch):
    for place in ("hf", "converted"):
        monkeypatch.chdir(folders[place])
        assert open_checkpoint(".").model == open_checkpoint(folders[place]).model


def test_overrides_stand_in_for_fields_of_config_json(folders, tmp_path):
    overrides = {"rope_theta": 5e4, "num_nextn_predict_layers": None}
    opened = open_checkpoint(folders["hf"], {"rope_theta": 5e4})
    assert opened.model == dataclasses.replace(model_of(folders["hf"]), rope_theta=5e4)
    assert dsjax.load(folders["hf"], overrides={"rope_theta": 5e4}).config.rope_theta == 5e4
    import_checkpoint(
        folders["hf"],
        tmp_path / "new",
        dtype="keep",
        progress=quiet(),
        overrides={"rope_theta": 5e4},
    )
    assert model_of(tmp_path / "new").rope_theta == 5e4
    assert json.loads((tmp_path / "new/hf/config.json").read_text())["rope_theta"] == 5e4
    assert summarize(folders["hf"], False, {"rope_theta": 5e4})["model"]["rope_theta"] == 5e4
    for kind in ("converted", "run"):
        with pytest.raises(
            ValueError, match=r"--override rope_theta, num_next.*: .* has no config"
        ):
            open_checkpoint(folders[kind], overrides)


def model_of(path):
    return open_checkpoint(path).model


def test_folder_without_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"contains no checkpoint: neither config\.json with"):
        open_checkpoint(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file is not a folder; name the folder"):
        open_checkpoint(tmp_path / "file")


def test_config_that_disagrees_with_the_arrays_is_refused(folders, tmp_path):
    """Every disagreement is listed."""
    shutil.copytree(folders["converted"], tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    values = json.loads(path.read_text())
    values["model"] |= {"vocab_size": 161, "tie_embed": True}
    path.write_text(json.dumps(values))
    seal(tmp_path / "copy")
    with pytest.raises(ValueError, match=r"not those that .*config\.json describes") as error:
        open_checkpoint(tmp_path / "copy")
    assert "params.embed.weight is [160, 64], the config gives [161, 64]" in str(error.value)
    assert "unexpected head.weight" in str(error.value)
    values["model"] |= {"vocab_size": 160, "tie_embed": False, "n_layers": 2, "n_dense_layers": 1}
    path.write_text(json.dumps(values))
    seal(tmp_path / "copy")
    with pytest.raises(ValueError, match=r"missing params\.dense_layers\.attn\.kv_norm"):
        open_checkpoint(tmp_path / "copy")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"vocab_size": -1}}, "does not describe a converted checkpoint.*vocab_size"),
        ({"model": {"color": 1}}, "does not describe a converted checkpoint.*color"),
        ({"model": [1]}, "does not describe a converted checkpoint.*must be an object of keys"),
        ({"family": "gpt"}, "model_type='gpt' is not supported, only deepseek, deepseek_v2"),
    ],
    ids=["value", "field", "list", "family"],
)
def test_converted_config_that_is_none_is_refused(folders, tmp_path, change, message):
    (tmp_path / "weights").mkdir()
    values = json.loads((folders["converted"] / "config.json").read_text())
    if isinstance(change.get("model"), dict):
        change = {"model": values["model"] | change["model"]}
    (tmp_path / "config.json").write_text(json.dumps(values | change))
    seal(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path)


def test_converted_config_of_an_older_version_takes_defaults(folders, tmp_path, caplog):
    shutil.copytree(folders["converted"], tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    values = json.loads(path.read_text())
    del values["model"]["mtp_after_final_norm"], values["model"]["qkv_bias"]
    path.write_text(json.dumps(values))
    seal(tmp_path / "copy")
    assert model_of(tmp_path / "copy") == model_of(folders["converted"])
    assert "lacks qkv_bias, mtp_after_final_norm; defaults are used" in caplog.text


def test_run_of_any_kind_is_opened_by_its_model_alone(folders, model, tmp_path):
    shutil.copytree(folders["run"], tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({"name": "x", "rl": {"group_size": 8}, "model": values["model"]}))
    assert_same_model(dsjax.load(tmp_path / "run"), model)
    for wrong, message in (({}, "does not say what the model is"), ({"model": 3}, "not 3")):
        path.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=message):
            open_checkpoint(tmp_path / "run")
    path.unlink()
    with pytest.raises(
        ValueError, match=r"config\.json does not exist; a run's checkpoints need it"
    ):
        open_checkpoint(tmp_path / "run")


def test_importing_the_package_needs_no_jax():
    code = "import sys, dsjax; dsjax.load; sys.exit('jax' in sys.modules)"
    root = Path(dsjax.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
