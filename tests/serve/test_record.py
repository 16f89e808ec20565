"""The line of the log for one request."""

import json

from dsjax.serve.record import Entry
from dsjax.text.chat import Message


class Choice:
    finish = "stop"


class Replies:
    first_seconds = 0.25
    choices = (Choice(),)

    def __init__(self):
        self.accounted, self.left = 0, 0

    def usage(self):
        return {"prompt_tokens": 3, "completion_tokens": 2}

    def account(self, seconds):
        self.accounted += 1

    def __exit__(self, *exception):
        self.left += 1


def test_line_tells_what_was_served(caplog):
    caplog.set_level("INFO")
    replies = Replies()
    for texts in (False, True):
        entry = Entry("POST", "/v1/completions", "me", texts=texts)
        entry.begin(replies, [Message("user", "private"), "words"])
        entry.text = ["answer"]
        entry.end(replies, "late" if texts else "")
    assert replies.accounted == replies.left == 2
    plain, full = (json.loads(message) for message in caplog.messages)
    assert plain["prompt_tokens"] == 3 and plain["completion_tokens"] == 2
    assert plain["first_token_seconds"] == 0.25 and plain["finish"] == ["stop"]
    assert not {"prompt", "text", "error"} & plain.keys() and full["error"] == "late"
    assert full["prompt"] == ["private", "words"] and full["text"] == ["answer"]


def test_failure_is_one_line_with_its_reason(caplog):
    caplog.set_level("INFO")
    Entry("POST", "/v1/completions", "me", texts=True).write(422, "n is\nwrong")
    (message,) = caplog.messages
    assert json.loads(message)["error"] == "n is\nwrong" and "\n" not in message
