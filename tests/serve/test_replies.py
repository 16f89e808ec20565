"""The choices of one HTTP request: what is yielded, counted and dropped."""

import asyncio

import pytest

from dsjax.generate.request import Output, Request
from dsjax.serve.choice import CUT, Choice
from dsjax.serve.errors import ApiError
from dsjax.serve.metrics import Metrics
from dsjax.serve.replies import Limits, Replies
from dsjax.serve.worker import Cut


class Worker:
    """Delivers what the test tells it to."""

    def submit(self, tickets):
        self.tickets, self.cancelled = list(tickets), []

    def cancel(self, tickets):
        self.cancelled += [ticket.index for ticket in tickets]

    def deliver(self, index, event):
        ticket = self.tickets[index]
        ticket.deliver(ticket, event)


@pytest.fixture
def metrics():
    metrics = Metrics()
    yield metrics
    metrics.close()


def run(vocabulary, metrics, script, *, count=2, n=0, stops=(), every=None):
    """Runs a script of events; returns the deltas, the worker and the replies."""
    worker = Worker()

    async def talk():
        choices = [
            Choice(vocabulary.coder, prompt=(1,), stop_ids=frozenset({1}), stops=stops)
            for _ in range(count)
        ]
        requests = [Request((1, 2, 3), 9) for _ in range(count)]
        replies = Replies(worker, metrics, Limits(), requests, choices, n=n or count, user="me")
        found = []
        with replies:
            for index, event in script:
                worker.deliver(index, event)
            async for item in replies.deltas(every):
                found.append(item)
                if item is None:
                    break
        return found, replies

    return *asyncio.run(talk()), worker


def test_deltas_come_with_their_choice_and_are_counted(vocabulary, metrics):
    a, b = vocabulary.coder.encode("a"), vocabulary.coder.encode("b")
    script = [
        (0, Output(a, cached_tokens=2)), (1, Output([*b, 1], "stop", cached_tokens=2)),
        (0, Output(a, "length")),
    ]  # fmt: skip
    found, replies, worker = run(vocabulary, metrics, script)
    assert [(index, delta.content) for index, delta in found] == [(0, "a"), (1, "b"), (0, "a")]
    assert worker.cancelled == []
    usage = replies.usage()
    assert usage["prompt_tokens"] == 3 and usage["completion_tokens"] == 4
    # The two share their prompt.
    assert usage["prompt_cache_hit_tokens"] == 2 and usage["prompt_cache_miss_tokens"] == 1
    assert replies.first_seconds >= 0


def test_equal_prompts_are_counted_each_and_choices_of_one_are_not(vocabulary, metrics):
    (a,) = vocabulary.coder.encode("a")
    known = [0, 0, 1, 2]
    script = [(at, Output([a], "length", cached_tokens=n)) for at, n in enumerate(known)]
    usage = run(vocabulary, metrics, script, count=4, n=2)[1].usage()
    assert usage["prompt_tokens"] == 2 * 3 and usage["completion_tokens"] == 4
    assert usage["prompt_cache_hit_tokens"] == 2 and usage["prompt_cache_miss_tokens"] == 4


def test_choice_that_ends_itself_is_dropped_at_the_engine(vocabulary, metrics):
    text = vocabulary.coder.encode("axb")
    script = [(0, Output(text)), (0, Output(text))]
    found, _, worker = run(vocabulary, metrics, script, count=1, stops=["x"])
    assert worker.cancelled == [0] and found[0][1].content == "a"


def test_cut_reply_ends_and_one_that_has_not_begun_fails(vocabulary, metrics):
    a = vocabulary.coder.encode("a")
    found, _, _ = run(vocabulary, metrics, [(0, Output(a)), (0, Cut("late"))], count=1)
    assert found[-1][1].finish == CUT
    with pytest.raises(ApiError, match="late") as caught:
        run(vocabulary, metrics, [(0, Cut("late"))], count=1)
    assert caught.value.status == 503


def test_failure_drops_the_other_choices(vocabulary, metrics):
    worker = Worker()

    async def talk():
        choices = [Choice(vocabulary.coder, prompt=(1,), stop_ids=frozenset()) for _ in range(2)]
        replies = Replies(
            worker, metrics, Limits(), [Request((1,), 9)] * 2, choices, n=2, user="me"
        )
        with replies:
            worker.deliver(1, ApiError(500, "broken"))
            async for _ in replies.deltas():
                pass

    with pytest.raises(ApiError, match="broken"):
        asyncio.run(talk())
    assert worker.cancelled == [0, 1]


def test_nothing_new_is_told_after_a_while(vocabulary, metrics):
    found, _, worker = run(vocabulary, metrics, [], every=0.01)
    assert found == [None] and worker.cancelled == [0, 1]
