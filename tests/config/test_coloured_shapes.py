"""What does not fit together in the toy's config is refused by name."""

import dataclasses

import pytest

from dsjax import settings
from dsjax.janus.from_nothing import load_config


@pytest.fixture(scope="module")
def config():
    return load_config("configs/pipelines/shapes_tiny.py")


def test_janus_pros_ratios_in_its_order(config):
    ratios = {stage.name: stage.config.janus.ratio for stage in config.stages}
    assert list(ratios.items())[1:] == [
        ("adaptors", (1, 0, 3)),
        ("unified", (2, 3, 5)),
        ("fine_tuned", (5, 1, 4)),
    ]


@pytest.mark.parametrize("name", ["autoencoder", "tokenizer"])
def test_a_runs_config_is_read_back(config, name):
    own = getattr(config, name)
    assert settings.from_dict(settings.to_dict(own), kind=type(own)) == own


def other(vq):
    return dataclasses.replace(vq, n_codes=9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"stages": ()}, r"shapes_tiny has no stages"),
        (
            lambda c: {"stages": c.stages[:1] * 2},
            r"the stages words, words are folders beside data",
        ),
        (lambda c: {"guidances": (0.5,)}, r"guidances=\(0.5,\) must be at least 1"),
        (
            lambda c: {"vision": dataclasses.replace(c.vision, vq=other(c.vision.vq))},
            r"vision.vq, tokenizer.vq and autoencoder.vq differ",
        ),
    ],
)
def test_what_does_not_fit_is_named(config, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **change(config))
