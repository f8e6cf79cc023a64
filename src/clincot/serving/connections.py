"""Connections that cost memory only as long as their client takes part.

uvicorn closes a connection that is idle after a reply, but not one that never sends a whole header, one whose reply is
not read, or one whose request body goes on after an early reply (uvicorn 0.54.0, protocols/http/h11_impl.py). The
protocol with httptools has no limit of a header's size either; that with h11 has one, so this server uses h11.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from clincot.config.server_settings import ServeSettings

MAX_HEADER_BYTES = 32 << 10  # request line and headers together


@dataclass
class ConnectionTable:
    """The limits of a server's connections, and those that wait for a client's header, oldest first."""

    settings: ServeSettings
    waiting: dict[LimitedProtocol, None] = field(default_factory=dict)


class LimitedProtocol(H11Protocol):
    """HTTP/1.1 with timeouts for the header, the rest of a refused body and unread replies, and a connection limit.

    A connection above the limit replaces the one that has waited longest for a header; if all others have a request
    in progress, it is closed itself.
    """

    table: ClassVar[ConnectionTable]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._header_timer = _Timer(self.loop, self.table.settings.header_s, self.abort_connection)
        self._reply_timer = _Timer(self.loop, self.table.settings.reply_s, self.abort_connection)
        table = self.table
        if len(self.connections) > table.settings.max_connections:
            evicted = next(iter(table.waiting), self)
            evicted.abort_connection()
            if evicted is self:
                return
        self._await_header()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._update_timers()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            return
        self._update_timers()
        if self.conn.their_state is h11.SEND_BODY and not self._is_busy:
            # The reply came before the whole body. uvicorn discards the rest; a client may take header_s to send it,
            # because closing at once could destroy the reply before the client has read it.
            self._await_header()

    def pause_writing(self) -> None:
        super().pause_writing()
        if not self._reply_timer.is_running:
            self._reply_timer.start()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._reply_timer.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._reply_timer.cancel()
        super().connection_lost(exc)

    def abort_connection(self) -> None:
        """Close the connection at once, and drop what was not sent."""
        self._stop_waiting()
        self.transport.abort()

    @property
    def _is_busy(self) -> bool:
        """Whether a request is in progress."""
        return self.cycle is not None and not self.cycle.response_complete

    def _update_timers(self) -> None:
        if self._is_busy:
            self._stop_waiting()
        elif self.timeout_keep_alive_task is not None:  # idle after a reply, which uvicorn limits
            self._header_timer.cancel()
            self.table.waiting[self] = None
        elif not self._header_timer.is_running and not self.transport.is_closing():
            self._await_header()

    def _await_header(self) -> None:
        self._header_timer.start()
        self.table.waiting[self] = None

    def _stop_waiting(self) -> None:
        self._header_timer.cancel()
        self.table.waiting.pop(self, None)


def build_protocol_class(settings: ServeSettings) -> type[LimitedProtocol]:
    """The protocol of one server, whose connections share one table."""
    attributes: dict[str, Any] = {"table": ConnectionTable(settings)}
    return type("ServerProtocol", (LimitedProtocol,), attributes)


class _Timer:
    """Calls a function after some seconds, unless it is cancelled or started again before."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float, call: Callable[[], None]) -> None:
        self._loop, self._seconds, self._call = loop, seconds, call
        self._handle: asyncio.TimerHandle | None = None

    @property
    def is_running(self) -> bool:
        """Whether the time runs; it does until it is cancelled."""
        return self._handle is not None

    def start(self) -> None:
        """Begin with the whole time."""
        self.cancel()
        self._handle = self._loop.call_later(self._seconds, self._call)

    def cancel(self) -> None:
        """Do not call the function."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
