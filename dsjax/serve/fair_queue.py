"""A bounded queue in which users take turns: one who asks for much waits behind their own work."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """Items in the order of arrival for each user, and user after user.

    Args:
      most: items that may wait.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._of_user: OrderedDict[str, deque[Item]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Item]:
        return (item for items in self._of_user.values() for item in items)

    def room(self) -> int:
        """Returns how many more items may wait; negative if more do than may."""
        return self._most - self._count

    def push(self, user: str, item: Item) -> None:
        """Adds an item, room or not: the caller asks first."""
        self._of_user.setdefault(user, deque()).append(item)
        self._count += 1

    def pop(self) -> Item:
        """Removes the next item; its user's next one comes after those of all others."""
        user, items = self._of_user.popitem(last=False)
        item = items.popleft()
        if items:
            self._of_user[user] = items
        self._count -= 1
        return item

    def remove(self, item: Item) -> bool:
        """Removes an item, if it still waits."""
        for user, items in self._of_user.items():
            if item in items:
                items.remove(item)
                if not items:
                    del self._of_user[user]
                self._count -= 1
                return True
        return False
