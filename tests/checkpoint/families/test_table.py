"""Kinds of rows, each read and written on a few fields."""

import pytest

from dsjax.checkpoint.families.table import Fields, Values, field, fixed
from dsjax.config import ModelConfig

MODEL = ModelConfig(
    vocab_size=9, dim=8, n_layers=2, n_dense_layers=2, n_heads=2, inter_dim=8, attention="gqa"
)


def read(row, config, **before):
    values, problems = Values(before), []
    fields = Fields(config, "config.json", problems)
    row.read(fields, values)
    return values, problems, fields.seen


def test_field_is_read_and_written_in_its_type():
    row = field("hidden_size", "dim")
    assert read(row, {"hidden_size": 4}) == ({"dim": 4}, [], {"hidden_size"})
    assert row.write(MODEL) == {"hidden_size": 8}
    assert read(field("eps", "norm_eps"), {"eps": 1})[0] == {"norm_eps": 1.0}
    assert read(row, {})[1] == ["config.json lacks hidden_size"]
    assert read(row, {"hidden_size": True})[1] == ["config.json.hidden_size=True is not an integer"]
    assert read(row, {"hidden_size": 4.0})[1] == ["config.json.hidden_size=4.0 is not an integer"]
    assert "is not finite" in read(field("eps", "norm_eps"), {"eps": 10**400})[1][0]


def test_factor_is_read_times_a_size_and_rounded_down():
    problems = []
    fields = Fields({"ratio": 3.7362, "wild": -1e308}, "config.json", problems)
    assert (fields.times("ratio", 1152, 4.0), fields.times("absent", 6, 0.25)) == (4304, 1)
    assert not problems and fields.seen == {"ratio", "absent"}
    assert fields.times("wild", 1152, 4.0) == 0
    assert problems == ["config.json.wild times 1152 exceeds 2,147,483,647"]


def test_default_may_be_made_of_what_was_read_before():
    row = field("kv", "n_kv_heads", lambda values: values["n_heads"], value=lambda m: m.kv_heads)
    assert read(row, {}, n_heads=6)[0]["n_kv_heads"] == 6
    assert read(row, {"kv": None}, n_heads=6)[0]["n_kv_heads"] == 6
    assert row.write(MODEL) == {"kv": 2}


def test_two_names_of_a_field_must_agree():
    row = field("old", "n_mtp", 0, alias="new")
    assert read(row, {"new": 2}) == ({"n_mtp": 2}, [], {"old", "new"})
    assert read(row, {"new": 2, "old": 2})[:2] == ({"n_mtp": 2}, [])
    assert read(row, {"new": None, "old": 1})[0] == {"n_mtp": 1}
    assert read(row, {"new": 2, "old": 1})[1] == ["config.json.old=1 is not supported, only 2"]
    assert row.write(MODEL) == {"old": 0}


def test_fixed_field_is_one_of_few_values():
    row = fixed("freq", 1)
    assert read(row, {"freq": 1.0})[1] == read(row, {})[1] == read(row, {"freq": None})[1] == []
    assert read(row, {"freq": True})[1] == ["config.json.freq=True is not supported, only 1"]
    assert row.write(MODEL) == {"freq": 1}
    assert fixed("freq", 1, written=False).write(MODEL) == {}
    assert fixed("eps", 1, ours="norm_eps").write(MODEL) == {"eps": 1e-6}
    heads = fixed("heads", lambda values: values["n_heads"])
    assert read(heads, {"heads": 3}, n_heads=2)[1] == [
        "config.json.heads=3 is not supported, only 2"
    ]
    assert heads.write(MODEL) == {"heads": 2}


@pytest.mark.parametrize("off", [None, False, [], {}, ""])
def test_unknown_field_that_is_off_is_passed_over(off):
    problems = []
    Fields({"surprise": off}, "config.json", problems).refuse_rest()
    assert problems == []


@pytest.mark.parametrize("on", [True, 0, 1, 0.5, "x", [0], {"a": None}])
def test_unknown_field_that_is_on_is_refused_by_name(on):
    problems = []
    Fields({"surprise": on, "known": 3}, "config.json", problems).refuse_rest(frozenset({"known"}))
    assert problems == [
        "config.json has surprise, unknown here, which may change what the model computes"
    ]
