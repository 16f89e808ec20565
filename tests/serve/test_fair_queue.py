"""Turns of users in the queue."""

from dsjax.serve.fair_queue import FairQueue


def test_users_take_turns_and_keep_their_own_order():
    queue = FairQueue(10)
    for user, item in [("a", 1), ("a", 2), ("a", 3), ("b", 4), ("c", 5), ("b", 6)]:
        queue.push(user, item)
    assert len(queue) == 6 and queue.room() == 4 and sorted(queue) == [1, 2, 3, 4, 5, 6]
    assert [queue.pop() for _ in range(6)] == [1, 4, 5, 2, 6, 3]
    assert len(queue) == 0


def test_removed_items_do_not_come_up():
    queue = FairQueue(2)
    queue.push("a", 1)
    queue.push("b", 2)
    assert queue.room() == 0
    assert queue.remove(1) and not queue.remove(1) and not queue.remove(9)
    assert queue.room() == 1 and queue.pop() == 2
    queue.push("a", 3)
    queue.push("b", 4)
    queue.push("b", 5)
    assert queue.room() == -1
