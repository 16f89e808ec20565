"""A stage's ratio divides its micro-batches, and what does not fit is refused by name."""

import pytest

from dsjax.config.janus import Janus, JanusConfig
from dsjax.config.mesh import MeshConfig
from dsjax.config.posttraining import TuningConfig


def make(ratio, **train):
    return Janus(name="x", janus=JanusConfig(ratio=ratio), train=TuningConfig(**train))


@pytest.mark.parametrize(
    ("ratio", "train", "counts"),
    [
        ((1, 0, 3), {"batch_size": 16, "micro_batch_size": 8}, (2, 0, 6)),
        ((2, 3, 5), {"batch_size": 20}, (4, 6, 10)),
        ((4, 2, 2), {"batch_size": 8, "micro_batch_size": 4}, (2, 1, 1)),
        ((0, 5, 0), {"batch_size": 3}, (0, 3, 0)),
    ],
)
def test_every_micro_batch_has_the_ratio(ratio, train, counts):
    config = make(ratio, **train)
    assert config.counts == counts and sum(counts) == config.micro_batch_size


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: make((2, 1, 1), batch_size=6),
            r"micro-batch of 6 rows.*2:1:1; choose a multiple of 4",
        ),
        (lambda: JanusConfig(ratio=(0, 0, 0)), r"janus.ratio=\(0, 0, 0\) must be three"),
        (lambda: JanusConfig(ratio=(1, 3)), r"janus.ratio=\(1, 3\) must be three"),
        (lambda: JanusConfig(trains=("eyes",)), r"janus.trains=eyes must name some of language"),
        (lambda: JanusConfig(trains=()), r"janus.trains= must name some of language"),
        (lambda: JanusConfig(blank=1.5), r"janus.blank=1.5"),
        (lambda: JanusConfig(heldout_fraction=1.0), r"janus.heldout_fraction=1.0 must lie in"),
        (lambda: JanusConfig(question=" "), r"janus.question is empty"),
        (
            lambda: Janus(name="x", mesh=MeshConfig(pipe=2, microbatches=2)),
            r"mesh.pipe=2: models that see train with mesh.pipe=1",
        ),
    ],
)
def test_what_does_not_fit_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
