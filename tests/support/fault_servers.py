"""Services that are away for a while by the clock of a test: a gate before a server, and a judge that refuses."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import socketserver
import struct
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.chat_endpoint import MODELS, StandIn
from tests.support.http_server import Reply, Request


@dataclass(frozen=True)
class FaultPlan:
    """Which services are away, and for how long, on a clock that the tested process moves. A file that all share.

    away: {service: seconds from the start of the fault}. status: what a judge answers meanwhile.
    """

    path: Path

    def begin(self, away: Mapping[str, float], *, status: int = 0, elapsed: float = 0.0) -> None:
        self._write({"elapsed": elapsed, "away": dict(away), "status": status})

    def move(self, elapsed: float) -> None:
        self._write({**self._read(), "elapsed": elapsed})

    @property
    def elapsed(self) -> float:
        return float(self._read()["elapsed"])

    @property
    def status(self) -> int:
        return int(self._read()["status"])

    def is_away(self, service: str) -> bool:
        plan = self._read()
        return bool(plan["elapsed"] < plan["away"].get(service, 0.0))

    def _read(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        return content

    def _write(self, content: dict[str, Any]) -> None:
        partial = self.path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(content), encoding="utf-8")
        partial.replace(self.path)


class Gate(socketserver.ThreadingTCPServer):
    """Passes connections on to a server; while the service is away, it resets them."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, service: str, target: tuple[str, int], plan: FaultPlan) -> None:
        super().__init__(("127.0.0.1", 0), _GateHandler)
        self.service, self.target, self.plan = service, target, plan
        self.cut_after: list[int] = []  # for each of the next connections: bytes of the reply after which it is cut

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _GateHandler(socketserver.BaseRequestHandler):
    server: Gate

    def handle(self) -> None:
        if self.server.plan.is_away(self.server.service):
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # RST, not FIN
            self.request.close()
            return
        limit = self.server.cut_after.pop(0) if self.server.cut_after else None
        with socket.create_connection(self.server.target) as there, contextlib.suppress(ConnectionError):
            _copy(self.request, there, limit)


def _copy(here: socket.socket, there: socket.socket, limit: int | None) -> None:
    """Copy in both directions until one side closes, or `there` has sent more than `limit` bytes."""
    with selectors.DefaultSelector() as ready:
        ready.register(here, selectors.EVENT_READ, there)
        ready.register(there, selectors.EVENT_READ, here)
        while True:
            for key, _ in ready.select():
                block = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
                if not block:
                    return
                if key.fileobj is there and limit is not None:
                    block, limit = block[:limit], limit - len(block)
                key.data.sendall(block)
                if limit is not None and limit <= 0 and key.fileobj is there:
                    return


@contextlib.contextmanager
def gate_before(service: str, url: str, plan: FaultPlan) -> Iterator[Gate]:
    """A gate before the server at http://host:port, which `service` names in the plan."""
    host, _, port = url.removeprefix("http://").partition(":")
    with Gate(service, (host, int(port)), plan) as gate:
        thread = threading.Thread(target=gate.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield gate
        finally:
            gate.shutdown()
            thread.join()


class FaultyJudge(StandIn):
    """A judge that answers every request with the status of the plan while it is away."""

    def __init__(self, plan: FaultPlan) -> None:
        super().__init__()
        self.plan = plan

    def _handle(self, request: Request) -> Reply:
        if self.plan.is_away("judge"):
            return self.plan.status, b'{"error": "no healthy upstream"}'
        return (200, MODELS) if request.method == "GET" else super()._handle(request)
