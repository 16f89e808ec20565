"""Order, bounds and ends of work in threads."""

import threading
import time

import pytest

from dsjax.checkpoint.streaming import stream


class Meter:
    """Work that notes how many bytes were under way at once."""

    def __init__(self, seconds=0.002):
        self.lock, self.held, self.most, self.begun = threading.Lock(), 0, 0, []
        self.seconds = seconds

    def __call__(self, item):
        with self.lock:
            self.begun.append(item)
            self.held += item
            self.most = max(self.most, self.held)
        time.sleep(self.seconds)
        return item


def test_stream_keeps_the_order_and_the_limit():
    meter, items, consumed = Meter(), [3, 1, 4, 1, 5, 9, 2, 6] * 5, []
    for item in stream(meter, items, int, limit=12):
        consumed.append(item)
        with meter.lock:
            meter.held -= item  # it was held until here
    assert consumed == items
    assert 9 < meter.most <= 12


def test_stream_works_on_several_items_at_once():
    barrier = threading.Barrier(4, timeout=30)
    assert len(list(stream(lambda item: barrier.wait(), range(8), lambda item: 1))) == 8


def test_stream_works_on_what_exceeds_the_limit_alone():
    meter, alone = Meter(), []

    def work(item):
        meter(item)
        if item == 100:
            alone.append(meter.held)
        return item

    for item in stream(work, [2, 2, 100, 2, 2], int, limit=10):
        with meter.lock:
            meter.held -= item
    assert alone == [100]


def test_stream_begins_nothing_after_a_failure():
    meter = Meter()

    def work(item):
        if item == 3:
            raise OSError("full")
        return meter(item)

    consumed = []
    with pytest.raises(OSError, match="full"):
        for item in stream(work, range(5000), lambda item: 1, limit=1000):
            consumed.append(item)
    assert consumed == [0, 1, 2]
    begun = len(meter.begun)
    time.sleep(0.05)
    assert begun == len(meter.begun) < 1000


def test_stream_ends_with_its_consumer():
    meter = Meter()
    for item in stream(meter, range(1000), lambda item: 1, limit=8):
        if item == 5:
            break
    begun = len(meter.begun)
    time.sleep(0.05)
    assert begun == len(meter.begun) < 30
