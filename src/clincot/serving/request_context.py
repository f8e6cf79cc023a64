"""The life of a request, until its deadline or its client's disconnection."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar

from clincot.serving.api_errors import RequestCancelled, build_deadline_error

_ARRIVAL_NUMBERS = itertools.count()


class RequestContext:
    """Deadline and cancellation of a request.

    The event loop and the thread that answers the request share it. on_parsed: called by the code that has read the
    request out of its body, in the event loop.
    """

    def __init__(self, deadline_s: float, on_parsed: Callable[[], None] = lambda: None) -> None:
        self.on_parsed = on_parsed
        self.number = next(_ARRIVAL_NUMBERS)  # order of arrival
        self.deadline = time.monotonic() + deadline_s
        self._lock = threading.Lock()
        self._cancelled = False
        self._on_cancel: list[Callable[[], None]] = []

    @property
    def remaining_s(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self.deadline - time.monotonic()

    @property
    def live(self) -> bool:
        """Whether the request is neither cancelled nor past its deadline."""
        return not self._cancelled and self.remaining_s > 0

    def check_alive(self) -> None:
        """Raise an error if the request is no longer alive.

        Raises RequestCancelled if it was cancelled, ApiError (504) if it is past its deadline.
        """
        if self._cancelled:
            raise RequestCancelled
        if self.remaining_s <= 0:
            raise build_deadline_error()

    def cancel(self) -> None:
        """Cancel the request and call the callbacks; safe to call again."""
        with self._lock:
            self._cancelled = True
            waiting, self._on_cancel = self._on_cancel, []
        for wake in waiting:
            wake()

    def add_cancel_callback(self, wake: Callable[[], None]) -> None:
        """Call `wake` once the request is cancelled; now if it was cancelled already."""
        with self._lock:
            if not self._cancelled:
                self._on_cancel.append(wake)
                return
        wake()

    def remove_cancel_callback(self, wake: Callable[[], None]) -> None:
        """Remove a callback, if it is still registered."""
        with self._lock:
            if wake in self._on_cancel:
                self._on_cancel.remove(wake)


current_request: ContextVar[RequestContext] = ContextVar("current_request")  # of the running coroutine
