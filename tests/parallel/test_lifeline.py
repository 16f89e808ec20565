"""A line breaks when its process ends without having said so, and everyone hears of it."""

import queue
import socket
import time

import pytest

from dsjax.parallel import lifeline


@pytest.fixture
def lines():
    """The first process's side and those of processes 1 and 2, each with a queue of its losses."""
    losses = [queue.Queue() for _ in range(3)]
    first = lifeline.First(losses[0].put)
    others = [
        lifeline.Other(("localhost", first.port), first.token, number, losses[number].put)
        for number in (1, 2)
    ]
    while len(first._lines) < 2:
        time.sleep(0.01)
    yield [first, *others], losses
    for line in (*others, first):
        line.close()


def cut(line):
    """What the system does when the process dies."""
    line._line.shutdown(socket.SHUT_RDWR)


def test_loss_of_a_process_is_told_to_all_others(lines):
    (_, one, _), losses = lines
    cut(one)
    assert losses[0].get(timeout=20) == 1
    assert losses[2].get(timeout=20) == 1


def test_loss_of_the_first_process_is_noticed(lines):
    (first, *_), losses = lines
    first.close()
    assert losses[1].get(timeout=20) == 0 and losses[2].get(timeout=20) == 0


def test_released_processes_may_end(lines):
    (first, one, two), losses = lines
    for line in (first, one, two):
        line.release()
    cut(one)
    first._lines[2].shutdown(socket.SHUT_RDWR)
    for side in losses:
        with pytest.raises(queue.Empty):
            side.get(timeout=0.3)


def test_stranger_is_no_process(lines):
    (first, *_), losses = lines
    stranger = lifeline.Other(("localhost", first.port), b"?" * 16, 2, losses[1].put)
    assert losses[1].get(timeout=20) == 0  # it is hung up on
    stranger.close()
    with pytest.raises(queue.Empty):
        losses[0].get(timeout=0.3)
