"""For tests of waits: a clock that a sleep moves on at once, and a call that fails a few times."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class FastClock:
    """The time of this machine plus all sleeps. at: {seconds from the start: what happens then, once}."""

    slept: list[float] = field(default_factory=list)
    at: dict[float, Callable[[], None]] = field(default_factory=dict)
    on_sleep: Callable[[], None] | None = None  # called after every sleep
    _ahead: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self) -> float:
        return time.monotonic() + self._ahead

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self.slept.append(seconds)
            self._ahead += seconds
            due = [moment for moment in self.at if moment <= sum(self.slept)]
            events = [self.at.pop(moment) for moment in sorted(due)]
        for event in events:
            event()
        if self.on_sleep is not None:
            self.on_sleep()


def failing(*errors: Exception) -> Callable[[], str]:
    """A call that raises the errors in turn and then returns "done"."""
    left = list(errors)

    def call() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return call
