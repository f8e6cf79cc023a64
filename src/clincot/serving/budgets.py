"""Budgets that all requests of a server share, so that its memory has a limit whatever clients send."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from clincot.serving.api_errors import build_deadline_error
from clincot.serving.request_context import RequestContext

FREE_BODY_BYTES = 256 << 10  # of every body, so that small requests never wait for large ones


class BodyLease:
    """What one request holds of a BodyBudget."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self.held = 0
        self.waiting = False  # for bytes that others hold

    async def grow_to(self, size: int) -> None:
        """Wait until the body may have `size` bytes."""
        needed = max(0, size - FREE_BODY_BYTES) - self.held
        while needed > 0 and not self._budget.take(self, needed):
            self.waiting = True
            await self._budget.wait_for_release()
        self.waiting = False


class BodyBudget:
    """Bytes of request bodies that are in memory at the same time, those of running requests included.

    The limit is `shared` + `largest`. Bodies grow as their bytes arrive, so a client that only announces a large body
    holds nothing. The oldest request that is not complete may use the last `largest` bytes, so it can always be read
    to its end; otherwise several half-read bodies could wait for each other.
    """

    def __init__(self, shared: int, largest: int) -> None:
        self._shared, self._largest = shared, largest
        self._used = 0
        self._leases: dict[BodyLease, None] = {}  # of bodies that are still read, oldest first
        self._released = asyncio.Event()

    @property
    def used(self) -> int:
        """Bytes that are held, without the free ones of each body."""
        return self._used

    @asynccontextmanager
    async def open_lease(self) -> AsyncIterator[BodyLease]:
        """A lease for one request; what it holds is returned at the end."""
        lease = BodyLease(self)
        self._leases[lease] = None
        try:
            yield lease
        finally:
            self.complete(lease)
            self._used -= lease.held
            self._wake_waiting()

    def complete(self, lease: BodyLease) -> None:
        """Tell that the body was read; the next oldest lease may then use the last bytes."""
        if lease in self._leases:
            del self._leases[lease]
            self._wake_waiting()

    def take(self, lease: BodyLease, needed: int) -> bool:
        """Give `needed` bytes to the lease, if they are free."""
        is_oldest = next(iter(self._leases), None) is lease
        if self._used + needed > self._shared + self._largest * is_oldest:
            return False
        self._used += needed
        lease.held += needed
        return True

    async def wait_for_release(self) -> None:
        """Wait until another request may have returned bytes."""
        await self._released.wait()

    def _wake_waiting(self) -> None:
        self._released.set()
        self._released = asyncio.Event()


class PacedTurns:
    """Turns for what keeps the event loop busy: checking and parsing a large body, which nothing can interrupt.

    After a turn of t seconds the next one waits for PAUSE * t (at most MAX_PAUSE_S), so however many large bodies
    arrive together, other requests have most of the loop's time.
    """

    PAUSE = 3.0
    MAX_PAUSE_S = 2.0

    def __init__(self) -> None:
        self._free = asyncio.Semaphore(1)

    @asynccontextmanager
    async def take(self) -> AsyncIterator[Callable[[], None]]:
        """Wait for the turn, and yield what ends it; it ends with the block at the latest."""
        await self._free.acquire()
        loop, began, ended = asyncio.get_running_loop(), time.monotonic(), False

        def end() -> None:
            nonlocal ended
            if not ended:
                ended = True
                pause_s = min(self.MAX_PAUSE_S, self.PAUSE * (time.monotonic() - began))
                loop.call_later(pause_s, self._free.release)

        try:
            yield end
        finally:
            end()


class PixelBudget:
    """Pixels of images that are in memory at the same time; for threads.

    The smallest waiting image is next, so small images do not wait behind a large one that has no room yet.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._waiting: list[tuple[int, int]] = []  # heap of (pixels, order of arrival)
        self._numbers = itertools.count()
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, pixels: int, context: RequestContext) -> Iterator[None]:
        """Hold room for an image; one above the limit counts as the limit.

        Raises ApiError (504) at the request's deadline, RequestCancelled if its client disconnects.
        """
        weight = min(pixels, self._limit)
        self._acquire((pixels, next(self._numbers)), weight, context)
        try:
            yield
        finally:
            with self._changed:
                self._used -= weight
                self._changed.notify_all()

    def _acquire(self, entry: tuple[int, int], weight: int, context: RequestContext) -> None:
        def wake() -> None:
            with self._changed:
                self._changed.notify_all()

        context.add_cancel_callback(wake)
        try:
            with self._changed:
                self._wait_for_room(entry, weight, context)
        finally:
            context.remove_cancel_callback(wake)

    def _wait_for_room(self, entry: tuple[int, int], weight: int, context: RequestContext) -> None:
        heapq.heappush(self._waiting, entry)
        try:
            while self._waiting[0] != entry or self._used + weight > self._limit:
                context.check_alive()
                if not self._changed.wait(max(0.0, context.remaining_s)):
                    raise build_deadline_error()
            self._used += weight
        finally:
            self._waiting.remove(entry)
            heapq.heapify(self._waiting)
            self._changed.notify_all()
