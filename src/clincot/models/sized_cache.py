"""A cache whose limit is the size of its values together, not their number."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class SizedCache(Generic[T]):
    """Values by key, the most recently used last; for threads. measure: the size of a value, in any unit."""

    def __init__(self, measure: Callable[[T], int]) -> None:
        self._measure = measure
        self._values: OrderedDict[str, T] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def add(self, key: str, value: T) -> None:
        """Add a value, or replace it; shrink() keeps the limit."""
        with self._lock:
            if key in self._values:
                self._size -= self._measure(self._values.pop(key))
            self._values[key] = value
            self._size += self._measure(value)

    def __getitem__(self, key: str) -> T:
        """The value, which counts as used."""
        with self._lock:
            self._values.move_to_end(key)
            return self._values[key]

    def get(self, key: str) -> T | None:
        """The same; None if it is not there."""
        try:
            return self[key]
        except KeyError:
            return None

    def shrink(self, limit: int) -> None:
        """Drop what was used longest ago; the last one stays, however large it is."""
        with self._lock:
            while self._size > limit and len(self._values) > 1:
                self._size -= self._measure(self._values.popitem(last=False)[1])

    def clear(self) -> None:
        """Drop all values."""
        with self._lock:
            self._values.clear()
            self._size = 0
