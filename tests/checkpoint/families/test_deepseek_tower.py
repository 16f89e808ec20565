import dataclasses

import pytest

from dsjax.checkpoint.families.deepseek_tower import (
    TOWER,
    read_tower,
    section,
    tower_parts,
    written_tower,
)


def test_a_section_is_its_params():
    problems = []
    fields = section({"a": {"cls": "X", "params": {"n": 3}}}, "a", problems, "X")
    assert fields.read("n", "int") == 3 and not problems


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (None, "a=None is not an object with params"),
        ({"cls": "X"}, "is not an object with params"),
        ({"cls": "Y", "params": {}}, "a.cls='Y' is not supported, only 'X'"),
        ({"cls": "X", "params": {}, "more": 1}, "has more"),
    ],
)
def test_other_sections_are_problems(values, said):
    problems = []
    section({"a": values}, "a", problems, "X")
    assert len(problems) == 1 and said in problems[0]


@pytest.mark.parametrize(("layers", "chosen"), [(24, -1), (23, 23)])
def test_a_tower_is_written_and_read_again(layers, chosen):
    tower, problems = dataclasses.replace(TOWER, n_layers=layers), []
    written = written_tower(tower, "vision")
    assert written["params"]["select_layer"] == chosen
    assert read_tower({"v": written}, "v", problems) == tower and not problems


def test_a_tower_has_its_parameters():
    parts = list(tower_parts("", TOWER))
    assert len(parts) == 306 and sum(part.n_parameters for part in parts) == 316_283_904
