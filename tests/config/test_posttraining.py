"""What the roots of post-training share: a checkpoint to begin with, and its shape."""

import dataclasses

import pytest

from dsjax import settings
from dsjax.config import MeshConfig, TrainConfig
from dsjax.config.posttraining import PostTraining
from tests.config.test_pretraining import model


def test_the_model_is_kept_with_the_run():
    bare = PostTraining(name="example")
    assert bare.model is None and settings.from_dict(settings.to_dict(bare), kind=PostTraining) == (
        bare
    )
    filled = dataclasses.replace(bare, init="runs/base", model=model())
    assert settings.from_dict(settings.to_dict(filled), kind=PostTraining) == filled
    assert filled.shape == model()


def test_micro_batches_must_agree():
    with pytest.raises(ValueError, match=r"does not divide into mesh\.microbatches=3"):
        PostTraining(
            name="example", train=TrainConfig(batch_size=8), mesh=MeshConfig(microbatches=3)
        )
    config = PostTraining(name="example", train=TrainConfig(batch_size=8, micro_batch_size=2))
    assert config.micro_batch_size == 2
