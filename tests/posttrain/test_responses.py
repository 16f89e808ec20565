"""Answers of a small checkpoint: seeds, order, prompts and what is refused."""

import pytest

from dsjax.generate.sampling import Sampling
from dsjax.posttrain.initial import open_initial
from dsjax.posttrain.problems import Problem
from dsjax.posttrain.responses import Respondent, Wanted, open_respondent
from tests.posttrain import toy

PROBLEMS = [Problem("one", {"answer": "1"}, "f:1"), Problem("a longer one", {}, "f:2")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy.write_hf(tmp_path_factory.mktemp("responses") / "r1", "Qwen2", "R1")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return toy.write_hf(tmp_path_factory.mktemp("responses") / "base", "Qwen2", "base")


def respond(folder, problems=PROBLEMS, **options):
    sampling = Sampling(temperature=20.0, seed=options.pop("seed", 0))
    return Respondent(open_initial(folder), problems, Wanted(sampling, **options), dtype="float32")


def assert_same(found, wanted):
    """The same answers; another batch rounds probabilities otherwise."""
    assert found._replace(nats=0) == wanted._replace(nats=0)
    assert found.nats == pytest.approx(wanted.nats, rel=1e-5)


@pytest.mark.slow
def test_answers_do_not_depend_on_company_or_order(folder):
    keys = [(number, sample) for number in range(2) for sample in range(3)]
    together = respond(folder, max_new_tokens=8, max_batch=4)
    answers = {each.key: each for each in together.answers(keys)}
    assert sorted(answers) == keys
    assert len({each.text for each in answers.values()}) > 4
    assert all(each.tokens == 8 or each.ended for each in answers.values())
    again = list(together.answers(keys[::-1][:2]))
    for answer in again:
        assert_same(answer, answers[answer.key])
    assert sorted(answer.key for answer in again) == keys[-2:]
    assert min(answer.nats for answer in answers.values()) > 1
    greedy = [each.text for each in together.answers([(0, 0), (0, 1)], greedy=True)]
    assert greedy[0] == greedy[1]
    assert together.statistics.new_tokens == 16
    same = respond(folder, PROBLEMS[:1] * 2, max_new_tokens=8)
    first, second = sorted(same.answers([(0, 0), (1, 0)]))
    assert_same(first, answers[0, 0])
    assert second.text != first.text
    other = respond(folder, max_new_tokens=8, max_batch=4, seed=1)
    assert next(iter(other.answers([(0, 0)]))).text != answers[0, 0].text


def test_prompt_of_a_chat_model_opens_the_thought(folder):
    respondent = respond(folder, max_new_tokens=8, system="Be brief.", template="Q: {prompt}")
    prompt = respondent.prompts[0]
    assert prompt[0] == 0 and prompt[-2] == toy.THINK and toy.USER in prompt
    coder = open_initial(folder).vocabulary.coder
    text = coder.decode(prompt, skip_special=False)
    assert "Be brief." in text and "Q: one" in text
    assert respondent.facts[0] == {"answer": "1", "prompt": "one", "opened": True}


def test_prompt_of_a_base_model_is_its_text(base):
    respondent = respond(base, max_new_tokens=8, template="{prompt} <think>")
    assert respondent.prompts[0][0] == 0 and respondent.facts[0]["opened"] is True
    assert respond(base, max_new_tokens=8).facts[0]["opened"] is False


def test_raw_prompt_has_no_turns_though_the_model_chats(folder):
    respondent = respond(folder, max_new_tokens=8, raw=True)
    initial = open_initial(folder)
    assert respondent.prompts[0] == tuple(initial.vocabulary.plain_prompt("one"))
    assert toy.USER not in respondent.prompts[0] and respondent.facts[0]["opened"] is False


@pytest.mark.parametrize(
    ("problem", "options", "message"),
    [
        ([{"role": "user", "content": "x"}], {}, "f:1: the tokenizer has no chat format, so"),
        ("x", {"system": "s"}, "cannot be given messages or --system; give 'prompt' as a text"),
        ("x" * 300, {"max_new_tokens": 8}, "f:1: the prompt of 301 tokens .* context of 256"),
        ("x" * 256, {}, "f:1: the prompt of 257 tokens"),
    ],
)
def test_prompt_that_cannot_be_answered_is_refused(base, problem, options, message):
    with pytest.raises(ValueError, match=message):
        respond(base, [Problem(problem, {}, "f:1")], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens 0 is not at least 1"),
        ({"max_batch": 0}, "--max-batch 0 is not at least 1"),
        ({"template": "Q:"}, "--template 'Q:' has no place for the prompt; write {prompt} in it"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Wanted(Sampling(), **options)


def test_sampling_is_the_checkpoints_unless_given(base):
    (base / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.95}')
    wanted = Wanted(Sampling(seed=3))
    given = {"temperature": None, "top_p": 0.5}
    found = open_respondent(base, PROBLEMS, wanted, given).sampling
    assert found == Sampling(temperature=0.6, top_p=0.5, seed=3)
