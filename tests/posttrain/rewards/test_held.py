"""Rules that judge in this process: how the grader keeps and calls them."""

import inspect

import pytest

from dsjax.files import write_json
from dsjax.posttrain.rewards import Grader, held, judge, model
from dsjax.posttrain.verify import Outcome


@pytest.mark.parametrize("module", [judge, model])
def test_modules_of_held_rules_have_what_the_grader_calls(module):
    for name in ("require", "complaint", "hold"):
        wanted = list(inspect.signature(getattr(held.Holder, name)).parameters)[1:]
        assert list(inspect.signature(getattr(module, name)).parameters) == wanted


def test_held_judge_is_opened_once_and_sees_all_completions_together(tmp_path, monkeypatch):
    calls = []

    class Keeper:
        def grade(self, completions, problems):
            calls.append(len(completions))
            return [Outcome(error="no"), *[Outcome(2.5)] * (len(completions) - 1)]

    def hold(argument, mesh):
        calls.append((argument, mesh))
        return Keeper()

    write_json(tmp_path / "config.json", {"preference": {"kind": "pointwise"}})
    monkeypatch.setattr(model, "hold", hold)
    name = f"model:{tmp_path}"
    with Grader([name, "format"], workers=1, mesh="the mesh") as grader:
        for _ in range(2):
            rewards = grader.grade(["a", "b", "c"], [{"prompt": "q"}] * 3)
            assert [each[name] for each in rewards] == [None, 2.5, 2.5]
            assert [each["format"] for each in rewards] == [0.0] * 3
        assert grader.counts.failures == {name: 2}
    assert calls == [(str(tmp_path), "the mesh"), 3, 3]
