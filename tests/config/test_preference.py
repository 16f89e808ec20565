"""What a preference experiment may not be."""

import dataclasses

import pytest

from dsjax import settings
from dsjax.config.posttraining import TuningConfig
from dsjax.config.preference import Preference, PreferenceConfig
from tests.config.test_pretraining import model


def test_values_out_of_range_are_refused():
    for values, says in (
        ({"beta": 0.0}, r"preference\.beta=0\.0 must be greater"),
        ({"epochs": -1.0}, r"preference\.epochs=-1\.0 must not be negative"),
        ({"sequence_length": 1}, r"preference\.sequence_length=1 must be at least 2"),
        ({"heldout_fraction": 1.0}, r"preference\.heldout_fraction=1\.0 must lie in \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=says):
            PreferenceConfig(**values)


def test_answers_must_fit_the_checkpoint():
    config = Preference(name="p", preference=PreferenceConfig(sequence_length=10**6))
    with pytest.raises(ValueError, match=r"sequence_length=1000000 exceeds the checkpoint's"):
        dataclasses.replace(config, model=model())


def test_a_batch_has_no_ramp():
    train = TuningConfig(batch_size=8, batch_size_start=4, micro_batch_size=4)
    with pytest.raises(ValueError, match="preference training has no batch ramp"):
        Preference(name="p", train=train)


def test_a_pair_takes_two_rows_and_a_label_one():
    rows = {kind: PreferenceConfig(kind=kind).rows_per_example for kind in ("dpo", "pointwise")}
    assert rows == {"dpo": 2, "pointwise": 1}


def test_keys_are_set_by_name():
    config = settings.override(
        Preference(name="p"), ["preference.kind=bradley_terry", "preference.beta=0.2"]
    )
    assert (config.preference.kind, config.preference.beta) == ("bradley_terry", 0.2)
    with pytest.raises(ValueError, match=r"must be one of dpo, bradley_terry, pointwise"):
        settings.override(config, ["preference.kind=ppo"])
