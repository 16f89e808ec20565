"""A model that sees, from one layout to the other and back."""

import dataclasses

import jax
import numpy as np
import pytest
from rich.console import Console

from dsjax.checkpoint import load
from dsjax.checkpoint.exporting import export_checkpoint
from dsjax.checkpoint.eyes import load_eyes
from dsjax.checkpoint.importing import import_checkpoint
from dsjax.checkpoint.tensor_files import open_folder
from dsjax.display import Transfer
from dsjax.files import read_json, write_json
from dsjax.infer.looking import open_format
from dsjax.text.chat import Message
from dsjax.vision.pictures import RULES_FILE, read_rules
from tests.golden import vl7b
from tests.vision import toy


def export(source, target):
    with Transfer(Console(quiet=True)) as progress:
        export_checkpoint(source, target, dtype="keep", progress=progress)
    return target


@pytest.fixture
def deepseeks(tmp_path, monkeypatch):
    toy.shrink_deepseeks(monkeypatch)
    return toy.write(tmp_path / "deepseek", "multi_modality", toy.deepseeks())


def seen(folder):
    """What the weights compute, the language model's and what is beside it."""
    checkpoint = load.open_checkpoint(folder)
    eyes, model = load_eyes(checkpoint), load.load(checkpoint)
    pixels = np.random.default_rng(0).uniform(-1, 1, (1, 9, 9, 3)).astype(np.float32)
    codes = np.arange(4, dtype=np.int32).reshape(1, 2, 2)
    logits = model(np.arange(8, dtype=np.int32)[None])
    pencil = eyes.pencil
    return [eyes(pixels), pencil.vq.decode(codes), pencil.vq.encode(pixels[:, :8, :8]), logits,
            pencil.head(pencil.embeddings(codes))]  # fmt: skip


def test_the_other_layout_computes_the_same_to_the_bit(deepseeks, tmp_path):
    janus = export(deepseeks, tmp_path / "janus")
    assert read_json(janus / "config.json")["image_token_id"] == toy.PLACEHOLDER
    again = export(janus, tmp_path / "again")
    wanted = jax.device_get(seen(deepseeks))
    for folder in (janus, again):
        for got, want in zip(jax.device_get(seen(folder)), wanted, strict=True):
            np.testing.assert_array_equal(got, want)


def test_there_and_back_gives_every_tensor_that_is_read(deepseeks, tmp_path):
    janus = export(deepseeks, tmp_path / "janus")
    names = set(open_folder(janus).tensors)
    assert "model.vision_model.encoder.layers.1.self_attn.k_proj.bias" in names
    first, again = open_folder(deepseeks), open_folder(export(janus, tmp_path / "again"))
    lost = {name for name in first.tensors if "attn_pool" in name or "codebook_used" in name}
    assert len(lost) == 14 and set(again.tensors) == set(first.tensors) - lost
    for name in again.tensors:
        np.testing.assert_array_equal(again.read(name), first.read(name), err_msg=name)


def test_files_beside_the_weights_come_along(deepseeks, tmp_path):
    janus = export(deepseeks, tmp_path / "janus")
    rules = read_rules(deepseeks)
    assert rules.cut and read_rules(janus) == dataclasses.replace(rules, cut=False)
    turn = [Message("user", "x")]
    old, new = (open_format(load.open_checkpoint(each)) for each in (deepseeks, janus))
    assert old and new and old.encode(turn) == new.encode(turn)
    assert old.image_token == new.image_token == toy.PLACEHOLDER


@pytest.fixture
def two_towers(tmp_path, monkeypatch):
    vl7b.shrink(monkeypatch)
    return vl7b.write(tmp_path / "vl7b")


def test_two_towers_are_written_in_the_other_layout_and_back(two_towers, tmp_path):
    theirs = export(two_towers, tmp_path / "transformers")
    assert read_json(theirs / "config.json")["model_type"] == "deepseek_vl_hybrid"
    first, again = open_folder(two_towers), open_folder(export(theirs, tmp_path / "again"))
    lost = {name for name in first.tensors if "attn_pool" in name or "_layer_norm" in name}
    assert len(lost) == 17 and set(again.tensors) == set(first.tensors) - lost
    for name in again.tensors:
        np.testing.assert_array_equal(again.read(name), first.read(name), err_msg=name)
    assert all(
        load.open_checkpoint(folder).hf.beside.vision.idle_norms == there
        for folder, there in ((two_towers, True), (theirs, False), (tmp_path / "again", False))
    )
    own, other, back = (
        read_rules(each, low=vl7b.LOW) for each in (two_towers, theirs, tmp_path / "again")
    )
    assert own == back and own.high and other.high
    assert other == dataclasses.replace(
        own,
        cut=False,
        resampling="bicubic",
        high=dataclasses.replace(own.high, cut=False, fill=None),
    )
    image_token = read_json(theirs / "config.json")["image_token_id"]
    assert image_token == vl7b.CONTROL["<image_placeholder>"]


def test_rules_that_the_other_layout_cannot_say_are_refused(two_towers, tmp_path):
    file = two_towers / RULES_FILE
    write_json(file, vl7b.PROCESSOR | {"image_mean": [0.5] * 3})
    with pytest.raises(ValueError, match="is the colour of the border"):
        export(two_towers, tmp_path / "transformers")
    write_json(file, vl7b.PROCESSOR)
    theirs = export(two_towers, tmp_path / "transformers")
    write_json(theirs / RULES_FILE, read_json(theirs / RULES_FILE) | {"image_mean": [0.25] * 3})
    with pytest.raises(ValueError, match="the only ones that its layout says"):
        export(theirs, tmp_path / "again")
    said = read_json(theirs / RULES_FILE)
    write_json(theirs / RULES_FILE, {k: v for k, v in said.items() if k != "high_res_size"})
    with pytest.raises(ValueError, match=r"preprocessor_config\.json has no high_res_size, the"):
        export(theirs, tmp_path / "again")


def test_a_shape_that_deepseeks_code_has_not_is_refused(tmp_path):
    with pytest.raises(ValueError, match="multi_modality cannot hold this model"):
        export(toy.write(tmp_path / "janus"), tmp_path / "other")


def test_janusflow_has_no_other_layout(tmp_path, monkeypatch):
    toy.shrink_deepseeks(monkeypatch)
    folder = toy.write(tmp_path / "flow", "multi_modality", toy.flowing())
    with pytest.raises(ValueError, match="is the only layout that dsjax has of this model"):
        export(folder, tmp_path / "other")


def test_it_is_not_imported(tmp_path):
    folder = toy.write(tmp_path / "janus")
    with (
        pytest.raises(ValueError, match="is used as it was published"),
        Transfer(Console(quiet=True)) as progress,
    ):
        import_checkpoint(folder, tmp_path / "ours", dtype="keep", progress=progress)
