"""How many requests to an endpoint are in flight, and how long a reply is waited for: both learnt from its replies."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

_log = logging.getLogger(__name__)

_MIN_WINDOW = 40  # replies over which refusals are counted, or twice the limit if that is more
_REFUSED_SHARE = 0.2  # of a window, above which fewer requests are sent at a time
_REDUCTION = 0.7
_MIN_REPLIES = 20  # from which the times of replies say something about the next one
_RECENT_REPLIES = 100
_PATIENCE_FACTOR = 4.0
_SHORTEST_PATIENCE_S = 2.0


class AdaptiveLimit:
    """A limit of the requests in flight, between 1 and `most`, that threads share.

    A rate limit is hit in bursts, and a refused request counts against it at most providers. So the limit is multiplied
    by 0.7 as soon as more than 20 % of a window of replies are refusals (429), and grows by one, up to `most`, with
    every window that has fewer. Single refusals do not change it: each is waited for on its own. A thread that waits
    before another attempt is not in flight. Of several waiting threads, the one with the lowest priority goes next.
    """

    def __init__(self, most: int, name: str = "") -> None:
        self._most, self._name = most, name
        self._limit = most
        self._in_flight = 0
        self._waiting: list[tuple[tuple[int, int], int, threading.Event]] = []
        self._numbers = itertools.count()
        self._replies = self._refusals = 0  # of the current window
        self._lock = threading.Lock()

    @property
    def limit(self) -> int:
        """The number of requests that may be in flight now."""
        return self._limit

    @contextmanager
    def hold(self, priority: tuple[int, int] = (0, 0)) -> Iterator[None]:
        """Keep one request in flight during the block; wait for a free place before it."""
        admitted = threading.Event()
        with self._lock:
            heapq.heappush(self._waiting, (priority, next(self._numbers), admitted))
            self._admit_waiting()
        admitted.wait()
        try:
            yield
        finally:
            with self._lock:
                self._in_flight -= 1
                self._admit_waiting()

    def record_reply(self, *, refused: bool) -> None:
        """Count a reply; refused: the endpoint asked for fewer requests (429)."""
        with self._lock:
            self._replies += 1
            self._refusals += refused
            window = max(_MIN_WINDOW, 2 * self._limit)
            if self._refusals > _REFUSED_SHARE * window:
                self._change_limit(max(1, int(self._limit * _REDUCTION)))
            elif self._replies >= window:
                self._change_limit(min(self._most, self._limit + 1))

    def _change_limit(self, limit: int) -> None:
        if limit < self._limit:
            _log.warning(
                "%s refuses %d of %d requests (429); %d instead of %d are sent at a time",
                self._name,
                self._refusals,
                self._replies,
                limit,
                self._limit,
            )
        self._limit = limit
        self._replies = self._refusals = 0
        self._admit_waiting()

    def _admit_waiting(self) -> None:
        while self._waiting and self._in_flight < self._limit:
            self._in_flight += 1
            heapq.heappop(self._waiting)[2].set()


class ReplyPatience:
    """How long to wait for a reply before the request is sent again. Threads may share it.

    A request that hangs, such as one to a pod that was killed behind a load balancer, would hold its place for the
    whole timeout. Once 20 replies have come, an attempt is given up after four times the slowest of the last 100
    (2 s at least), the next one after twice that time and so on; never later than the timeout, and the last attempt
    has the whole timeout.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._recent: deque[float] = deque(maxlen=_RECENT_REPLIES)
        self._lock = threading.Lock()

    def add(self, seconds: float) -> None:
        """Record how long a reply took."""
        with self._lock:
            self._recent.append(seconds)

    def choose_timeout(self, failures: int, *, last: bool) -> float:
        """The seconds that an attempt gets after so many failures; last: there is no further attempt."""
        with self._lock:
            if last or len(self._recent) < _MIN_REPLIES:
                return self._timeout_s
            slowest = max(self._recent)
        return min(self._timeout_s, max(_SHORTEST_PATIENCE_S, _PATIENCE_FACTOR * slowest) * 2.0 ** min(failures, 16))
