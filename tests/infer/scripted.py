"""An engine that replies as scripted, for the tests of what is made of its tokens."""

from dsjax.generate.engine import Statistics
from dsjax.generate.request import Output
from dsjax.text.tokenizer import Coder
from tests.text import released
from tests.text.released import R1

CODER = Coder(released.make_tokenizer(R1))
SPEED = Statistics(
    prompt_tokens=10, prefill_seconds=0.5, new_tokens=7, decode_seconds=2.0, decode_steps=6,
    drafted=0, accepted=0,
)  # fmt: skip


class ScriptedEngine:
    """Replies with the given lists of tokens, one per request, token by token; an exception in a
    list is raised when its turn comes.
    """

    def __init__(self, *replies):
        self.replies, self.requests, self.open = list(replies), [], {}
        self.cancelled = []

    @property
    def statistics(self):
        return SPEED

    @statistics.setter
    def statistics(self, fresh):
        assert fresh == Statistics()

    def add(self, request):
        self.requests.append(request)
        self.open[len(self.requests)] = list(self.replies.pop(0))
        return len(self.requests)

    def cancel(self, id):
        self.cancelled.append(id)
        del self.open[id]

    def step(self):
        new = {}
        for id, reply in list(self.open.items()):
            token = reply.pop(0) if reply else None
            if isinstance(token, BaseException):
                raise token
            new[id] = Output([] if token is None else [token], None if reply else "length")
        return new

    def complete(self, requests):
        self.requests += requests
        return [Output(self.replies.pop(0), "length") for _ in requests]


def ids(text):
    return CODER.encode_control(text)
