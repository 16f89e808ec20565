"""DeepSeek-VL 7B in DeepSeek's own layout: totals of the release from config.json alone."""

import copy
import math

import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.checkpoint import inspection, load, names
from dsjax.checkpoint.eyes import load_eyes, published
from dsjax.checkpoint.families.deepseek_towers import parts, sees_with_two
from dsjax.checkpoint.hf_config import from_hf, to_hf, vision_of
from dsjax.config.vision import SamConfig, SiglipConfig, VisionConfig
from dsjax.files import write_json
from dsjax.model.parameters import declarations
from dsjax.precision.policy import Policy
from dsjax.vision.eyes import Eyes
from tests.checkpoint.families.test_multi_modality import VL_1B
from tests.golden import vl7b

SAM_MEAN, SAM_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def tower(name, image_size, mean, std):
    return {
        "ckpt_path": "",
        "image_size": image_size,
        "model_name": name,
        "output_dim": 1024,
        "pixel_mean": mean,
        "pixel_std": std,
        "select_feature": "same",
        "select_layer": -1,
    }


# config.json as DeepSeek publishes it.
RELEASED = {
    "architectures": ["MultiModalityCausalLM"],
    "model_type": "multi_modality",
    "torch_dtype": "float16",
    "transformers_version": "4.38.2",
    "aligner_config": {
        "cls": "MlpProjector",
        "model_type": "aligner",
        "params": {
            "depth": 2,
            "input_dim": 1024,
            "n_embed": 4096,
            "projector_type": "low_high_hybrid_split_mlp_gelu",
        },
    },
    "language_config": {
        "max_position_embeddings": 16384,
        "model_type": "llama",
        "num_hidden_layers": 30,
        "torch_dtype": "float16",
        "vocab_size": 102400,
    },
    "vision_config": {
        "cls": "HybridVisionTower",
        "model_type": "vision",
        "params": {
            "concat_type": "tuple",
            "freeze_high": True,
            "freeze_low": True,
            "high_res_cfg": tower("sam_b_downsample", 1024, SAM_MEAN, SAM_STD),
            "low_res_cfg": tower("siglip_large_patch16_384", 384, [0.5] * 3, [0.5] * 3),
        },
    },
}


def test_it_is_told_by_its_towers():
    assert sees_with_two(RELEASED) and not sees_with_two(VL_1B)
    assert vision_of(RELEASED) == VisionConfig(
        dim=4096, tower=SiglipConfig(pool=True), high=SamConfig(), idle_norms=True
    )


def test_totals_of_the_release_are_exact(tmp_path):
    vision = vision_of(RELEASED)
    assert vision
    beside, language = list(parts(vision)), list(names.tensors(from_hf(RELEASED), "multi_modality"))
    assert len(beside) + len(language) == 775
    assert sum(part.n_parameters for part in beside) == 412_644_609 + 20_979_712
    assert sum(math.prod(row.shape) for row in language) == 6_910_365_696
    write_json(tmp_path / "config.json", RELEASED)
    assert inspection.summarize(tmp_path, expect=True)["total_params"] == 7_343_990_017


def test_the_module_has_the_parameters_that_are_named():
    vision = vision_of(RELEASED)
    assert vision
    declared = {each.path: each.count for each in declarations(Eyes(vision, Policy(jnp.float32)))}
    named = dict.fromkeys(declared, 0)
    for part in parts(vision):
        named[".".join(part.path)] += part.n_parameters
    assert named == declared


def test_config_is_written_and_read_again():
    model, vision = from_hf(RELEASED), vision_of(RELEASED)
    again = to_hf(model, "multi_modality", vision=vision)
    assert from_hf(again) == model and vision_of(again) == vision
    for name in ("high_res_cfg", "low_res_cfg"):
        wrote = again["vision_config"]["params"][name]
        assert wrote == {
            key: value
            for key, value in RELEASED["vision_config"]["params"][name].items()
            if key != "ckpt_path"
        }
    assert again["aligner_config"] == RELEASED["aligner_config"]


def test_published_tensors_come_back_to_the_bit(tmp_path, monkeypatch):
    vl7b.shrink(monkeypatch)
    checkpoint, shapes = load.open_checkpoint(vl7b.write(tmp_path)), vl7b.shapes()
    assert checkpoint.hf and checkpoint.hf.beside
    got = published(load_eyes(checkpoint), checkpoint.hf.beside.parts)
    assert got.keys() == {name for name in shapes if not name.startswith("language_model")}
    for name, tensor in got.items():
        np.testing.assert_array_equal(tensor, vl7b.weight(name, shapes[name]), err_msg=name)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("concat_type",), "add", "concat_type='add' is not supported, only 'tuple'"),
        (("high_res_cfg",), None, "high_res_cfg=None is not an object"),
        (("high_res_cfg", "model_name"), "sam_vit_l", "only 'sam_b_downsample'"),
        (("high_res_cfg", "pixel_mean"), [0.5] * 3, "pixel_mean=[0.5, 0.5, 0.5] is not supported"),
        (("low_res_cfg", "pixel_std"), None, "pixel_std=None is not supported, only [0.5"),
        (("low_res_cfg", "image_size"), 224, "image_size=224 is not supported, only 384"),
        (("low_res_cfg", "output_dim"), 8, "output_dim=8 is not supported, only 1024"),
        (("high_res_cfg", "window"), 8, "has window"),
    ],
)
def test_other_towers_are_refused_by_name(place, value, said):
    config = copy.deepcopy(RELEASED)
    inner = config["vision_config"]["params"]
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    with pytest.raises(ValueError) as caught:
        from_hf(config)
    assert said in str(caught.value)


def test_another_aligner_is_refused_by_name():
    config = copy.deepcopy(RELEASED)
    config["aligner_config"]["params"]["projector_type"] = "mlp_gelu"
    with pytest.raises(ValueError, match="projector_type='mlp_gelu'"):
        from_hf(config)
