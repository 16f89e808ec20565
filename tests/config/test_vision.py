import dataclasses

import pytest

from dsjax.config.vision import (
    FlowConfig,
    SamConfig,
    SiglipConfig,
    TilesConfig,
    VaeConfig,
    VisionConfig,
    VqConfig,
)


def test_defaults_are_those_of_janus():
    tower, vq = SiglipConfig(), VqConfig()
    assert (tower.grid, tower.n_tokens, vq.scale) == (24, 576, 16)
    assert VaeConfig().scale == 8
    assert VisionConfig(dim=8, tower=tower, vq=vq, head_dim=8).code_grid == 24
    assert VisionConfig(dim=8, tower=tower, vq=vq, head_dim=8, drawn=6).code_grid == 6


def test_pixels_that_fill_no_patch_are_not_counted():
    tower = SiglipConfig(image_size=384, patch_size=14)
    assert (tower.grid, tower.n_tokens) == (27, 729)


@pytest.mark.parametrize(
    ("make", "changes", "said"),
    [
        (SiglipConfig, {"n_heads": 3}, "tower.dim=1024 does not divide by tower.n_heads=3"),
        (SiglipConfig, {"patch_size": 400}, "tower.patch_size=400 exceeds tower.image_size=384"),
        (SiglipConfig, {"n_layers": 0}, "tower.n_layers=0 must be greater than 0"),
        (SiglipConfig, {"n_layers": 10_001}, "tower.n_layers=10001 exceeds 10,000, more layers"),
        (SamConfig, {"n_layers": 10_001}, "sam.n_layers=10001 exceeds 10,000, more layers"),
        (VqConfig, {"n_blocks": 10_001}, "vq.n_blocks=10001 exceeds 10,000, more layers"),
        (FlowConfig, {"encoder_blocks": 10_001}, "flow.encoder_blocks=10001 exceeds 10,000"),
        (SamConfig, {"n_heads": 5}, "sam.dim=768 does not divide by sam.n_heads=5"),
        (SamConfig, {"image_size": 1000}, "does not divide by sam.patch_size=16"),
        (SamConfig, {"global_layers": (5, 2)}, "sam.global_layers=(5, 2) must be numbers"),
        (SamConfig, {"global_layers": (12,)}, "of some of the 12 layers, ascending"),
        (VqConfig, {"channels": 48}, "widths of 48, 96, 192, which must divide into 32 groups"),
        (VqConfig, {"multipliers": ()}, "vq.multipliers=() must be numbers above 0"),
        (VqConfig, {"n_codes": 0}, "vq.n_codes=0 must be greater than 0"),
        (VqConfig, {"channels": 12, "n_groups": 8}, "choose vq.channels from 8, 16, 24, ..."),
        (VaeConfig, {"channels": 48}, "vae.multipliers=(1, 2, 4, 4) give widths of 48, 96, 192"),
        (VaeConfig, {"scaling": 0.0}, "vae.scaling=0.0 must be greater than 0"),
        (FlowConfig, {"encoder_blocks": 0}, "flow.encoder_blocks=0 must be greater than 0"),
        (FlowConfig, {"channels": 7}, "flow.channels=7 is odd"),
    ],
)
def test_impossible_shapes_are_refused(make, changes, said):
    with pytest.raises(ValueError) as caught:
        make(**changes)
    assert said in str(caught.value)


def test_a_model_that_draws_needs_a_head():
    seeing = VisionConfig(dim=8, tower=SiglipConfig())
    with pytest.raises(ValueError, match=r"vision\.head_dim=0"):
        dataclasses.replace(seeing, vq=VqConfig())


def test_a_model_without_a_tokenizer_draws_no_codes():
    with pytest.raises(ValueError, match=r"vision\.drawn: a model without vision\.vq"):
        VisionConfig(dim=8, tower=SiglipConfig(), drawn=6)


def test_a_model_draws_in_one_way():
    tower = SiglipConfig()
    seeing = VisionConfig(dim=8, tower=tower)
    flowing = dataclasses.replace(seeing, flow=FlowConfig())
    assert flowing.draws and not seeing.draws
    with pytest.raises(ValueError, match="draws in one way only"):
        dataclasses.replace(flowing, vq=VqConfig(), head_dim=8)


def test_two_towers_share_the_width():
    with pytest.raises(ValueError, match=r"vision\.dim=7 is odd"):
        VisionConfig(dim=7, tower=SiglipConfig(), high=SamConfig())


def test_views_are_as_wide_as_what_the_projector_leaves():
    so400m = SiglipConfig(image_size=384, patch_size=14, dim=1152)
    cut = VisionConfig(dim=8, tower=so400m, tiles=TilesConfig(resolutions=((768, 384),)))
    assert (cut.view_side, dataclasses.replace(cut, tiles=None).view_side) == (14, 27)


@pytest.mark.parametrize("sizes", [(), ((384, 300),), ((384, 384), (0, 384))])
def test_tiles_are_whole(sizes):
    with pytest.raises(ValueError, match="must be widths and heights of whole tiles of 384 pixels"):
        VisionConfig(dim=8, tower=SiglipConfig(), tiles=TilesConfig(resolutions=sizes))
    with pytest.raises(ValueError, match=r"tiles\.downsample=0 must be greater than 0"):
        TilesConfig(resolutions=((384, 384),), downsample=0)
