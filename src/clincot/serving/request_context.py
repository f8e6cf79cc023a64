"""One request's right to be worked on: until its deadline, and while its client is there."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar

from clincot.serving.api_errors import RequestCancelled, build_deadline_error

_ARRIVAL_NUMBERS = itertools.count()


class RequestContext:
    """Shared by the event loop (which cancels) and the thread that answers (which checks)."""

    def __init__(self, deadline_s: float) -> None:
        self.number = next(_ARRIVAL_NUMBERS)  # order of arrival
        self.deadline = time.monotonic() + deadline_s
        self._lock = threading.Lock()
        self._cancelled = False
        self._on_cancel: list[Callable[[], None]] = []

    @property
    def remaining_s(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def live(self) -> bool:
        return not self._cancelled and self.remaining_s > 0

    def check_alive(self) -> None:
        """Raises Cancelled, or Refused (504) past the deadline."""
        if self._cancelled:
            raise RequestCancelled
        if self.remaining_s <= 0:
            raise build_deadline_error()

    def cancel(self) -> None:
        with self._lock:
            self._cancelled = True
            waiting, self._on_cancel = self._on_cancel, []
        for wake in waiting:
            wake()

    def add_cancel_callback(self, wake: Callable[[], None]) -> None:
        """Calls `wake` once when the request is cancelled; at once where it is already."""
        with self._lock:
            if not self._cancelled:
                self._on_cancel.append(wake)
                return
        wake()

    def remove_cancel_callback(self, wake: Callable[[], None]) -> None:
        with self._lock:
            if wake in self._on_cancel:
                self._on_cancel.remove(wake)


current_request: ContextVar[RequestContext] = ContextVar("ticket")  # of the request that a coroutine works for
