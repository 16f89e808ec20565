"""What all routes share: names, limits and requests for the engine."""

import numpy as np
import pytest

from dsjax.generate.sampling import Sampling
from dsjax.serve.errors import ApiError
from dsjax.serve.fields import Fields
from dsjax.serve.options import Options
from tests.serve.scripted import make_service


@pytest.fixture(scope="module")
def service(folders):
    service = make_service(folders["V3.1"])
    yield service
    service.metrics.close()


def options(**changes):
    values = {
        "sampling": Sampling(seed=2**32 - 1), "max_tokens": None, "stops": (), "n": 1,
        "stream": False, "include_usage": False, "frequency_penalty": 0.0,
        "presence_penalty": 0.0, "logit_bias": {}, "user": "me",
    }  # fmt: skip
    return Options(**values | changes)


def make(service, prompt, report=False, default=None, **changes):
    chosen = options(**changes)
    return service.requests(
        prompt, chosen, default_tokens=default, report=report, grammars=[None] * chosen.n
    )


def test_model_has_a_name_and_deepseeks(service, folders):
    assert service.check_model(Fields({})) == "tiny"
    assert service.check_model(Fields({"model": "deepseek-chat"})) == "deepseek-chat"
    with pytest.raises(ApiError, match="there is no model 'x'; this server has tiny") as caught:
        service.check_model(Fields({"model": "x"}))
    assert caught.value.status == 404 and caught.value.param == "model"
    base = make_service(folders["base"])
    base.metrics.close()
    assert [model["id"] for model in base.models()["data"]] == ["tiny"]
    with pytest.raises(ApiError):
        base.check_model(Fields({"model": "deepseek-chat"}))


def test_limit_is_the_least_of_what_is_asked_and_fits(service):
    for asked, default, wanted in [(None, None, 60), (None, 16, 16), (7, 16, 7), (99, 16, 60)]:
        (request,) = make(service, [5] * 40, default=default, max_tokens=asked)
        assert request.max_new_tokens == wanted
    with pytest.raises(
        ApiError, match="the prompt has 100 tokens, and the model's context has 100"
    ):
        make(service, [5] * 100)
    assert make(service, [5] * 100, max_tokens=0)[0].max_new_tokens == 0


def test_choices_have_their_own_seeds_and_rules(service):
    first, second = make(service, [5], n=2, frequency_penalty=1.0)
    assert (first.sampling.seed, second.sampling.seed) == (2**32 - 1, 0)
    assert first.steering is not second.steering
    first.steering.push(7)
    assert first.steering.bias()[7] == -1 and second.steering.bias()[7] == 0


def test_there_are_two_kinds_of_programs(service):
    """Whatever is asked for: that is what the warm-up compiles."""

    def kind(request):
        return request.wanted, request.steering is not None, len(request.stop_ids)

    kinds = {kind(example) for example in service.examples()}
    asked = [{}, {"report": True}, {"logit_bias": {3: 1.0}}, {"presence_penalty": 1.0}]
    found = {kind(make(service, [5], **changes)[0]) for changes in asked}
    assert found == kinds and len(kinds) == 2


def test_tokens_are_spelled_with_half_characters(service):
    ids = service.vocabulary.coder.encode("\u4e2d")
    assert len(ids) > 1
    assert b"".join(service.spelled(token)[1] for token in ids) == "\u4e2d".encode()
    assert service.spelled(ids[0])[0] == "\ufffd"


def test_rules_begin_inside_an_opened_thought(service):
    think, end_think = service.vocabulary.think_ids

    class Nothing:
        def allowed(self):
            return np.zeros(service.vocab_size, bool)

    for prompt, ruled in [([5], True), ([5, think], False), ([think, end_think], True)]:
        (request,) = service.requests(
            prompt, options(), default_tokens=1, report=False, grammars=[Nothing()]
        )
        assert np.isneginf(request.steering.bias()).all() == ruled
