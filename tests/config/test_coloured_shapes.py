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


def test_stages_train_what_they_train_in_janus_pro(config):
    assert {stage.name: {*stage.config.janus.trains} for stage in config.stages[1:]} == {
        "adaptors": {"aligner", "drawing"},
        "unified": {"language", "aligner", "drawing"},
        "fine_tuned": {"language", "tower", "aligner", "drawing"},
    }


@pytest.mark.parametrize("name", ["autoencoder", "tokenizer", "tower"])
def test_a_runs_config_is_read_back(config, name):
    own = getattr(config, name)
    assert settings.from_dict(settings.to_dict(own), kind=type(own)) == own


def other(vq):
    return dataclasses.replace(vq, n_codes=9)


def larger(tower):
    return dataclasses.replace(tower, image_size=96)


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
        (
            lambda c: {"stages": (dataclasses.replace(c.stages[0], name="tower"),)},
            r"the stages tower are folders beside data, autoencoder, tokenizer, tower, start",
        ),
        (
            lambda c: {"tower": dataclasses.replace(c.tower, tower=larger(c.vision.tower))},
            r"vision.tower and tower.tower differ",
        ),
        (
            lambda c: {"tower": dataclasses.replace(c.tower, vocab_size=0)},
            r"tower.vocab_size=0 must be greater than 0",
        ),
    ],
)
def test_what_does_not_fit_is_named(config, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **change(config))
