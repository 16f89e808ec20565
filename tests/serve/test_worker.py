"""The thread of the engine: order, bounds, deadlines, failures and its end."""

import queue
import time

import pytest

from dsjax.generate.request import Output, Request
from dsjax.serve.errors import ApiError
from dsjax.serve.worker import Cut, Ticket, Worker
from tests.serve.scripted import ScriptedEngine

SOON = 20.0


@pytest.fixture
def start():
    workers = []

    def start(script=lambda request: [5] * 40, *, closed=False, **sizes):
        engine = ScriptedEngine(script)
        if closed:
            engine.gate.clear()
        worker = Worker(**{"max_batch": 2, "max_waiting": 3} | sizes)
        worker.start(engine)
        workers.append((worker, engine))
        return worker, engine

    yield start
    for worker, engine in workers:
        engine.gate.set()
        worker.stop()


def ticket(events, *, prompt=(1,), most=3, user="me", begin=SOON, end=SOON, index=0):
    def deliver(ticket, event):
        events.put((ticket.index, event))

    now = time.monotonic()
    return Ticket(Request(prompt, most), user, deliver, now + begin, now + end, index)


def gather(events, count):
    return [events.get(timeout=SOON) for _ in range(count)]


def until(holds):
    end = time.monotonic() + SOON
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_outputs_are_delivered_to_their_tickets(start):
    worker, _ = start(lambda request: list(request.prompt) * 3)
    events = queue.SimpleQueue()
    worker.submit([ticket(events, prompt=(4,), index=0), ticket(events, prompt=(6,), index=1)])
    found = gather(events, 6)
    assert [event.tokens for index, event in found if index == 0] == [[4]] * 3
    assert [event.finish for index, event in found if index == 1] == [None, None, "length"]


def test_full_queue_takes_all_of_a_request_or_nothing(start):
    worker, engine = start(closed=True)
    events = queue.SimpleQueue()
    worker.submit([ticket(events) for _ in range(5)])
    until(lambda: worker.n_running == 3)
    with pytest.raises(ApiError, match="requests wait already") as caught:
        worker.submit([ticket(events) for _ in range(2)])
    assert caught.value.status == 429 and caught.value.retry_after
    assert worker.n_waiting == 2
    engine.gate.set()
    assert len(gather(events, 15)) == 15


def test_request_that_no_empty_queue_has_room_for_is_not_asked_to_come_again(start):
    worker, _ = start(max_batch=2, max_waiting=3)
    events = queue.SimpleQueue()
    with pytest.raises(ApiError, match="is 6; this server takes at most 5 replies") as caught:
        worker.submit([ticket(events, most=1) for _ in range(6)])
    assert caught.value.status == 422 and caught.value.retry_after is None
    worker.submit([ticket(events, most=1) for _ in range(5)])
    assert len(gather(events, 5)) == 5


def test_users_take_turns(start):
    worker, engine = start(closed=True, max_batch=1, max_waiting=9)
    events = queue.SimpleQueue()
    for number in range(4):
        worker.submit([ticket(events, prompt=(10 + number,), user="greedy", most=1)])
    until(lambda: worker.n_running == 2)
    worker.submit([ticket(events, prompt=(99,), user="other", most=1)])
    engine.gate.set()
    gather(events, 5)
    assert [request.prompt[0] for request in engine.requests] == [10, 11, 12, 99, 13]


def test_cancelled_requests_end_wherever_they_are(start):
    worker, engine = start(closed=True, max_batch=1)
    events = queue.SimpleQueue()
    tickets = [ticket(events, index=index) for index in range(4)]
    worker.submit(tickets)
    until(lambda: worker.n_running == 2)
    worker.cancel([tickets[0], tickets[3]])
    until(lambda: engine.cancelled == [1] and worker.n_waiting == 0)
    engine.gate.set()
    assert {index for index, _ in gather(events, 6)} == {1, 2}
    worker.cancel(tickets)


def test_deadlines_end_the_wait_and_the_reply(start):
    worker, engine = start(closed=True, max_batch=1)
    events = queue.SimpleQueue()
    worker.submit([ticket(events, index=0, end=0.1)])
    worker.submit([ticket(events, index=1)])
    until(lambda: worker.n_running == 2)
    worker.submit([ticket(events, index=2, begin=0.1)])
    found = dict(gather(events, 2))
    assert isinstance(found[0], Cut) and "longer than the server allows" in str(found[0])
    assert found[2].status == 503 and "waited too long" in found[2].message
    engine.gate.set()
    assert all(index == 1 for index, _ in gather(events, 3))


def test_request_that_the_engine_does_not_begin_is_given_up(start):
    worker, _ = start(closed=True)
    events = queue.SimpleQueue()
    worker.submit([ticket(events, begin=0.1)])
    ((_, error),) = gather(events, 1)
    assert error.status == 503 and worker.n_running == 0


def test_failing_step_ends_its_requests_and_not_the_worker(start, caplog):
    worker, _ = start(lambda request: RuntimeError("boom") if request.prompt == (7,) else [5])
    events = queue.SimpleQueue()
    worker.submit([ticket(events, prompt=(7,))])
    (_, error), *_ = gather(events, 1)
    assert error.status == 500 and "boom" not in error.message and "boom" in caplog.text
    worker.submit([ticket(events, prompt=(8,), most=1)])
    assert gather(events, 1)[0][1] == Output([5], "length")


def test_request_that_the_engine_refuses_is_told(start):
    worker, _ = start()
    events = queue.SimpleQueue()
    worker.submit([ticket(events, prompt=(1,) * 13), ticket(events, most=1, index=1)])
    found = dict(gather(events, 2))
    assert found[0].status == 400 and "thirteen" in found[0].message
    assert found[1].tokens == [5]


def test_calls_run_between_steps(start):
    worker, _ = start()
    assert worker.call(lambda: 3).result(SOON) == 3
    with pytest.raises(ZeroDivisionError):
        worker.call(lambda: 1 / 0).result(SOON)


def test_stopping_cuts_off_what_is_left(start):
    worker, engine = start(closed=True, max_batch=1)
    events = queue.SimpleQueue()
    worker.submit([ticket(events, index=index) for index in range(4)])
    until(lambda: worker.n_running == 2)
    worker.stop()
    assert not worker.alive
    found = gather(events, 4)
    assert sorted(index for index, _ in found) == [0, 1, 2, 3]
    assert all(isinstance(event, Cut) for _, event in found) and not engine.open
    with pytest.raises(ApiError, match="shutting down") as caught:
        worker.submit([ticket(events)])
    assert caught.value.status == 503


def test_what_is_to_be_done_meanwhile_waits_for_requests():
    done, engine = [], ScriptedEngine(lambda request: [5] * 3)
    worker = Worker(max_batch=2, max_waiting=3)
    events = queue.SimpleQueue()

    def meanwhile():
        worker.submit([ticket(events)])
        for item in range(3):
            done.append((item, engine.busy, events.qsize()))
            yield

    worker.start(engine, meanwhile())
    until(lambda: len(done) == 3)
    worker.submit([ticket(events)])
    assert len(gather(events, 6)) == 6
    worker.stop()
    # The first item came before the request, the second after all of its tokens.
    assert done == [(0, False, 0), (1, False, 3), (2, False, 3)]
