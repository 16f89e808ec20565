import dataclasses

import pytest

from dsjax.checkpoint import load, names
from dsjax.checkpoint.families.deepseek_vl import parts
from dsjax.checkpoint.hf_config import from_hf, to_hf, vision_of
from dsjax.config.vision import SiglipConfig
from dsjax.files import read_json, write_json
from tests.checkpoint import hf_files
from tests.vision import toy

VISION = dataclasses.replace(toy.VISION, vq=None, head_dim=0)
CONFIG = to_hf(toy.LANGUAGE, "deepseek_vl", dtype="float32", vision=VISION)


def test_config_is_written_and_read_again():
    assert from_hf(CONFIG) == toy.LANGUAGE and vision_of(CONFIG) == VISION


def test_defaults_are_another_towers():
    """transformers' defaults, not DeepSeek's: an absent field means SigLIP base."""
    config = CONFIG | {"vision_config": {"model_type": "siglip_vision_model"}}
    vision = vision_of(config)
    assert vision and vision.tower == SiglipConfig(
        image_size=224, dim=768, n_layers=12, n_heads=12, inter_dim=3072, activation="gelu_tanh"
    )
    assert vision.aligner_activation == "gelu"


def test_every_tensor_of_the_release_is_named():
    released = dataclasses.replace(VISION, dim=2048, tower=SiglipConfig())
    assert len(list(parts(released))) == 529 - 219 - 13 + 4 * 24


def test_a_pooling_head_in_the_files_is_left_out(tmp_path):
    tensors = toy.tensors("deepseek_vl", VISION)
    tensors["model.vision_model.head.probe"] = tensors["model.aligner.linear1.bias"]
    folder = hf_files.write(tmp_path, CONFIG, tensors)
    opened = load.open_checkpoint(folder)
    assert opened.hf and opened.hf.beside and opened.hf.beside.vision == VISION
    assert len(opened.hf.rows) == len(list(names.tensors(toy.LANGUAGE, "deepseek_vl")))


@pytest.mark.parametrize("section", ["model_type", "attention_bias"])
def test_another_tower_is_refused_by_name(tmp_path, section):
    config = CONFIG | {"vision_config": CONFIG["vision_config"] | {section: "clip"}}
    write_json(tmp_path / "config.json", config)
    with pytest.raises(ValueError, match=section):
        from_hf(read_json(tmp_path / "config.json"))
