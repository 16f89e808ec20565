"""Which kind each layer is, and which patterns repeat."""

import dataclasses

import pytest

from dsjax.model.layer_kinds import LayerKind, Run, kinds, runs
from tests.model.compressed import COMPRESSED

W, S, H = (LayerKind(kind, False) for kind in ("window", "sparse", "heavy"))
HASHED = LayerKind("window", True)


def test_kind_of_each_layer_is_that_of_the_config():
    config = dataclasses.replace(
        COMPRESSED, n_layers=3, layer_types=("window", "window", "heavy"), hash_layers=(1,)
    )
    assert kinds(config) == (W, HASHED, H)
    assert [kind.stack for kind in kinds(config)] == ["window", "window_hash", "heavy"]


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [
        ((W,), [Run((W,), 1)]),
        ((W, W, W), [Run((W,), 3)]),
        ((W, W, S, H, S, H, S), [Run((W,), 2), Run((S, H), 2), Run((S,), 1)]),
        ((HASHED, W, S), [Run((HASHED,), 1), Run((W,), 1), Run((S,), 1)]),
        ((S, S, H, S, S, H), [Run((S, S, H), 2)]),
    ],
)
def test_runs_repeat_the_pattern_that_covers_most(layers, wanted):
    assert runs(layers) == wanted


def test_runs_cover_the_layers_in_order():
    layers = (H, H, *(S, H) * 20, S, W)
    found = runs(layers)
    assert [kind for run in found for kind in run.pattern * run.repeats] == list(layers)
    assert len(found) == 4  # the depth does not matter
