"""GGUF files, loaded and imported as checkpoints."""

import json

import gguf
import jax
import numpy as np
import pytest

from dsjax.checkpoint import load as loading
from dsjax.checkpoint.exporting import export
from dsjax.checkpoint.gguf.reading import open_gguf
from dsjax.checkpoint.importing import import_checkpoint
from dsjax.checkpoint.inspection import summarize
from dsjax.checkpoint.tensor_files import open_folder
from dsjax.parallel.mesh import make_mesh
from dsjax.text.vocabulary import open_vocabulary
from tests.checkpoint.conversions import bring_in, quiet, send_out
from tests.checkpoint.gguf.files import (
    ARCHITECTURES,
    case_of,
    checkpoint,
    expected,
    exported,
    write_tokenizer,
)
from tests.checkpoint.hf_files import plain


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_float32_comes_back_bit_for_bit(tmp_path, name):
    exported(checkpoint(tmp_path / "hf", name), tmp_path / "m.gguf")
    bring_in(tmp_path / "m.gguf", tmp_path / "ours")
    send_out(tmp_path / "ours", tmp_path / "back")
    files, wanted = open_folder(tmp_path / "back"), plain(case_of(name))
    assert files.tensors.keys() == wanted.keys()
    for key, value in wanted.items():
        np.testing.assert_array_equal(files.read(key), value, key)


@pytest.mark.parametrize(
    "command",
    [
        lambda path, given: import_checkpoint(
            path, path.with_suffix(""), dtype="keep", progress=quiet(), overrides=given
        ),
        lambda path, given: summarize(path, False, given),
        lambda path, given: summarize(path, True, given),
        loading.open_checkpoint,
    ],
    ids=["import", "inspect", "inspect_expect", "load"],
)
def test_fields_of_a_config_it_does_not_have_are_refused(tmp_path, command):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"--override rope_theta, x: .*m\.gguf is a GGUF file"):
        command(path, {"rope_theta": 5e4, "x": None})
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


def test_tokenizer_and_template_come_back(tmp_path):
    folder = checkpoint(tmp_path / "hf", "llama", vocab_size=310)
    inner = write_tokenizer(folder, add_bos_token=False)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    exported(folder, tmp_path / "m.gguf")
    bring_in(tmp_path / "m.gguf", tmp_path / "ours")
    for beside in (
        tmp_path / "ours" / "hf",
        loading.open_checkpoint(tmp_path / "m.gguf").tokenizer_folder,
    ):
        found = open_vocabulary(beside, 310)
        text = "the theory, they're 12 <think>"
        assert found.coder.inner.get_vocab() == inner.get_vocab()
        assert found.plain_prompt(text) == open_vocabulary(folder, 310).plain_prompt(text)
        assert (beside / "chat_template.jinja").read_text() == "{{ messages }}"
    config = json.loads((tmp_path / "ours" / "hf" / "config.json").read_text())
    assert config["model_type"] == "llama" and config["bos_token_id"] == 0


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1", "MXFP4"])
def test_quantized_weights_are_the_packages(tmp_path, kind):
    exported(checkpoint(tmp_path / "hf", "deepseek_moe"), tmp_path / "m.gguf", kind)
    folder = open_gguf(tmp_path / "m.gguf")
    name = "model.layers.1.mlp.experts.7.up_proj.weight"
    values = expected("deepseek_moe")["blk.1.ffn_up_exps.weight"][7]
    number = gguf.GGMLQuantizationType[kind]
    wanted = gguf.dequantize(gguf.quantize(values, number), number)
    found = folder.files.read(name)
    assert found.dtype == {"F16": "float16", "BF16": "bfloat16"}.get(kind, "float32")
    np.testing.assert_array_equal(found.astype(np.float32), wanted)
    np.testing.assert_array_equal(folder.files.read(name, slice(3, 9)), found[3:9])


def test_model_loads_on_a_mesh(tmp_path):
    folder = checkpoint(tmp_path / "hf", "v3")
    exported(folder, tmp_path / "m.gguf")
    mesh = make_mesh({"expert": 2, "tensor": 2, "fsdp": 2})
    found = loading.load(tmp_path / "m.gguf", mesh=mesh)
    wanted = loading.load(folder)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_file_can_be_exported_again(tmp_path):
    first = exported(checkpoint(tmp_path / "hf", "v3"), tmp_path / "m.gguf")
    export(tmp_path / "m.gguf", tmp_path / "n.gguf", dtype="keep", choice=None, progress=quiet())
    again = gguf.GGUFReader(tmp_path / "n.gguf")
    for one, other in zip(first.tensors, again.tensors, strict=True):
        np.testing.assert_array_equal(one.data, other.data, one.name)


def test_main_model_without_its_announced_modules_is_read(tmp_path):
    """As llama.cpp's own converter writes them: copies of the embedding, or no module at all."""
    reader = exported(checkpoint(tmp_path / "hf", "v3_mtp"), tmp_path / "m.gguf")
    rewrite(reader, tmp_path / "trunk.gguf", lambda name: not name.startswith("blk.1."))
    assert open_gguf(tmp_path / "trunk.gguf").model.n_mtp == 0
    assert open_gguf(tmp_path / "m.gguf").model.n_mtp == 1


def rewrite(reader, path, keep, **more):
    """Writes a file anew with some of its tensors, and more whole numbers as keys."""
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for name, value in more.items():
        writer.add_uint32(name, value)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        writer.add_key_value(name, field.contents(), field.types[0])
    for tensor in reader.tensors:
        if keep(tensor.name):
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_part_of_a_file_is_named(tmp_path):
    reader = exported(checkpoint(tmp_path / "hf", "qwen2"), tmp_path / "m.gguf")
    rewrite(reader, tmp_path / "part.gguf", lambda name: True, **{"split.count": 3})
    with pytest.raises(ValueError, match=r"one of '3' parts of a file.*llama-gguf-split"):
        open_gguf(tmp_path / "part.gguf")


def test_missing_tensors_are_named(tmp_path):
    reader = exported(checkpoint(tmp_path / "hf", "qwen2"), tmp_path / "m.gguf")
    rewrite(reader, tmp_path / "bad.gguf", lambda name: name != "blk.1.ffn_up.weight")
    with pytest.raises(ValueError, match=r"missing blk\.1\.ffn_up\.weight \[112, 64\]"):
        open_gguf(tmp_path / "bad.gguf")


@pytest.mark.parametrize(
    "use", [loading.open_checkpoint, lambda path: bring_in(path, path.with_name("x"))]
)
def test_what_is_no_gguf_file_is_named(tmp_path, use):
    path = tmp_path / "m.gguf"
    path.write_text("not one")
    with pytest.raises(ValueError, match=r"m\.gguf is not a GGUF file"):
        use(path)


def test_choices_for_the_other_kind_of_target_are_refused(tmp_path):
    folder = checkpoint(tmp_path / "hf", "qwen2")
    with pytest.raises(ValueError, match=r"--type Q8_0 is for GGUF files"):
        export(folder, tmp_path / "x", dtype="keep", choice="Q8_0", progress=quiet())
    with pytest.raises(ValueError, match="--dtype bfloat16 is for folders"):
        export(folder, tmp_path / "x.gguf", dtype="bfloat16", choice=None, progress=quiet())


def test_export_of_a_file_to_a_folder_names_the_way_through_import(tmp_path):
    exported(checkpoint(tmp_path / "hf", "llama"), tmp_path / "m.gguf")
    with pytest.raises(ValueError, match=r"m.gguf is a GGUF file; import it, then export"):
        send_out(tmp_path / "m.gguf", tmp_path / "out")
    bring_in(tmp_path / "m.gguf", tmp_path / "ours")
    send_out(tmp_path / "ours", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()
