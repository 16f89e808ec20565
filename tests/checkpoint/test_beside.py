import dataclasses

import numpy as np
import pytest

from dsjax.checkpoint import families
from dsjax.checkpoint.beside import beside
from dsjax.checkpoint.families import multi_modality
from dsjax.checkpoint.hf_config import to_hf
from dsjax.checkpoint.tensor_files import open_folder
from dsjax.config.vision import SiglipConfig, VisionConfig, VqConfig
from tests.vision import toy

FLOAT32 = np.dtype(np.float32)


@pytest.fixture
def folder(tmp_path):
    return open_folder(toy.write(tmp_path))


def config():
    return to_hf(toy.LANGUAGE, "janus", dtype="float32", vision=toy.VISION)


def test_every_part_of_a_whole_folder_is_found(folder):
    found = beside(config(), "janus", folder.tensors)
    assert found and found.vision == toy.VISION
    assert not found.missing and not found.wrong
    language = set(folder.tensors) - found.names
    assert len(language) == 2 * 9 + 3


def test_a_language_model_has_nothing_beside_it(folder):
    assert beside({"model_type": "llama"}, "llama", folder.tensors) is None


def test_what_is_missing_or_wrong_is_named(folder):
    tensors = dict(folder.tensors)
    gone, other = "model.aligner.fc1.bias", "model.vqmodel.quant_conv.weight"
    del tensors[gone]
    tensors[other] = tensors[other]._replace(shape=(1, 2))
    found = beside(config(), "janus", tensors)
    assert found and found.missing == [f"missing {gone} [32]"]
    assert found.wrong == [
        f"{other} is float32[1, 2], config.json gives [4, 8, 1, 1] of float32, bfloat16 or float16"
    ]


class Info:
    """A tensor of a folder, as far as `beside` looks at it."""

    def __init__(self, shape):
        self.shape, self.dtype = shape, FLOAT32


def test_what_no_model_reads_may_be_left_out():
    vision = VisionConfig(
        dim=16, tower=SiglipConfig(n_layers=1, pool=True), vq=VqConfig(usage=65_536), head_dim=16
    )
    sight = families.find("multi_modality").sight
    assert sight
    said = to_hf(
        dataclasses.replace(toy.LANGUAGE, dim=16), "multi_modality", dtype="float32", vision=vision
    )
    every = {part.name: Info(part.shape) for part in multi_modality.parts(vision)}
    whole = beside(said, "multi_modality", every)
    assert whole and whole.vision == vision and not whole.missing
    fewer = {
        name: info
        for name, info in every.items()
        if "attn_pool" not in name and "codebook_used" not in name
    }
    left = beside(said, "multi_modality", fewer)
    assert left and not left.missing and not left.vision.tower.pool
    assert left.vision.vq and not left.vision.vq.usage
