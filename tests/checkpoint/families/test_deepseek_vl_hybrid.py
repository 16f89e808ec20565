import copy
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.checkpoint import load
from dsjax.checkpoint.eyes import load_eyes, published
from dsjax.checkpoint.families.deepseek_vl_hybrid import parts
from dsjax.checkpoint.hf_config import from_hf, to_hf, vision_of
from dsjax.config.vision import SamConfig, SiglipConfig, VisionConfig
from dsjax.model.parameters import declarations
from dsjax.precision.policy import Policy
from dsjax.vision.eyes import Eyes
from tests.checkpoint import hf_files
from tests.checkpoint.broken_rules import refused
from tests.vision import toy
from tests.vision.test_sam import CONFIG as HIGH

VISION = dataclasses.replace(toy.VISION, vq=None, head_dim=0, high=HIGH)
CONFIG = to_hf(toy.LANGUAGE, "deepseek_vl_hybrid", dtype="float32", vision=VISION)


def test_config_is_written_and_read_again():
    assert from_hf(CONFIG) == toy.LANGUAGE and vision_of(CONFIG) == VISION


def test_broken_rules_name_the_fields_of_the_file():
    wanted = {"hidden_size", "num_attention_heads", "mlp_dim", "window_size", "image_size"}
    found = refused(CONFIG)
    assert {f"high_res_vision_config.{name}" for name in wanted} <= found
    assert {"text_config.hidden_size", "vision_config.intermediate_size"} <= found


def test_totals_of_the_release_are_exact():
    """Without the tower's pooling head and two norms that nothing reads."""
    released = VisionConfig(dim=4096, tower=SiglipConfig(), high=SamConfig())
    named = list(parts(released))
    assert (
        sum(part.n_parameters for part in named)
        == 7_343_990_017 - 6_910_365_696 - 12_595_200 - 4_096
    )
    declared = declarations(Eyes(released, Policy(jnp.float32)))
    assert sum(part.n_parameters for part in named) == sum(each.count for each in declared)
    assert {".".join(part.path) for part in named} == {each.path for each in declared}


def test_published_tensors_come_back_to_the_bit(tmp_path):
    wanted = toy.tensors("deepseek_vl_hybrid", VISION)
    checkpoint = load.open_checkpoint(hf_files.write(tmp_path, CONFIG, wanted))
    assert checkpoint.hf and checkpoint.hf.beside
    for name, tensor in published(load_eyes(checkpoint), checkpoint.hf.beside.parts).items():
        np.testing.assert_array_equal(tensor, wanted[name], err_msg=name)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("use_rel_pos", False, "use_rel_pos=False is not supported"),
        ("hidden_act", "relu", "hidden_act='relu'"),
        ("global_attn_indexes", 3, "is not a list of integers"),
        ("shifted", 4, "has shifted"),
    ],
)
def test_another_tower_is_refused_by_name(name, value, said):
    config = copy.deepcopy(CONFIG)
    config["high_res_vision_config"][name] = value
    with pytest.raises(ValueError) as caught:
        from_hf(config)
    assert said in str(caught.value)
