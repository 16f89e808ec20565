"""What both routes let a request choose."""

import pytest

from dsjax.generate.sampling import Sampling
from dsjax.serve.errors import ApiError
from dsjax.serve.fields import Fields
from dsjax.serve.options import read_options

DEFAULTS = Sampling(0.6, top_p=0.9)


def read(**values):
    fields = Fields(values)
    options = read_options(fields, DEFAULTS, vocab_size=50, user="here")
    fields.finish()
    return options


def test_defaults_are_the_checkpoints():
    options = read()
    assert (options.sampling.temperature, options.sampling.top_p) == (0.6, 0.9)
    assert options.max_tokens is None and options.stops == () and options.n == 1
    assert not options.stream and not options.include_usage and options.user == "here"
    # No two requests without a seed draw alike.
    assert read().sampling.seed != read().sampling.seed


def test_choices_of_a_request_are_read():
    options = read(
        temperature=0, top_p=0, top_k=4, min_p=0.1, seed=-1, n=3, stop="x", max_tokens=5,
        max_completion_tokens=6, stream=True, stream_options={"include_usage": True},
        logit_bias={"49": -100}, user_id="me-2", frequency_penalty=1, presence_penalty=-1.5,
    )  # fmt: skip
    assert options.sampling.temperature == 0 and 0 < options.sampling.top_p < 1e-6
    assert (options.sampling.top_k, options.sampling.min_p) == (4, 0.1)
    assert options.seeds == [2**32 - 1, 0, 1]
    assert options.stops == ("x",) and options.max_tokens == 6
    assert options.stream and options.include_usage and options.user == "me-2"
    assert options.logit_bias == {49: -100.0}
    assert (options.frequency_penalty, options.presence_penalty) == (1.0, -1.5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 2.1}, "temperature must be a number between 0 and 2"),
        ({"top_p": -0.1}, "top_p must be a number between 0 and 1"),
        ({"n": 0}, "n must be a whole number between 1 and 32"),
        ({"max_tokens": -1}, "max_tokens must be a whole number of at least 0"),
        ({"stop": ["a", 1]}, "stop must be a text or a list of texts"),
        ({"stop": [""]}, "stop must have texts of 1 to 256 characters"),
        ({"stop": ["a"] * 17}, "stop has 17 texts; at most 16 may be"),
        ({"stream_options": {}}, "stream_options is for streams"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x is not a field"),
        ({"logit_bias": {"50": 1}}, "logit_bias has the key '50', not an id from 0 to 49"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias has the key '99999"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5 must be a number between -100 and 100"),
        ({"frequency_penalty": 3}, "frequency_penalty must be a number between -2 and 2"),
        ({"user_id": "a b"}, "user_id must be 1 to 512 letters"),
    ],
)
def test_option_out_of_range_is_refused(values, message):
    with pytest.raises(ApiError, match=message) as caught:
        read(**values)
    assert caught.value.status == 422
