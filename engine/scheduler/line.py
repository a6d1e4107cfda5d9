"""Who is next, of many whose turn changes."""

import heapq
import itertools
from collections.abc import Hashable
from typing import Any, Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class Line(Generic[T]):
    """Items in the order of their keys, each once; every operation takes O(log n)."""

    def __init__(self) -> None:
        self._heap: list[tuple[Any, int, T]] = []
        self._numbers = itertools.count()
        self._entered: dict[T, int] = {}

    def put(self, item: T, key: Any) -> None:
        """Let an item stand in line, or change its place. Of equal keys the earlier comes first."""
        number = self._entered[item] = next(self._numbers)
        heapq.heappush(self._heap, (key, number, item))

    def remove(self, item: T) -> None:
        """Take an item out, if it is there."""
        self._entered.pop(item, None)

    def first(self) -> T | None:
        """The item of the least key, which stays; None where there is none."""
        while self._heap:
            _, number, item = self._heap[0]
            if self._entered.get(item) == number:
                return item
            heapq.heappop(self._heap)  # it has left, or stands elsewhere
        return None
