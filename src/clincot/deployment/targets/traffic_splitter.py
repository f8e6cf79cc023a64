"""The address that clients of a local deployment use: passes requests on to servers by their share of the traffic.

A process of its own (`python -m clincot.deployment.targets.traffic_splitter`), so that servers come and go behind an address that stays. Reads
route.json anew when it was replaced. GET /-/counts says how many requests each checkpoint served, and failed.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from clincot.fields import FrozenModel

COUNTS_PATH = "/-/counts"
ROUTE_FILE = "route.json"
ANSWER_TIMEOUT_S = 300.0
_BLOCK_BYTES = 1 << 16
_HOP_HEADERS = {
    "connection",
    "keep-alive",
    "transfer-encoding",
    "te",
    "upgrade",
    "proxy-authenticate",
    "proxy-authorization",
}


class TrafficBackend(FrozenModel):
    digest: str
    url: str
    percent: int  # of the traffic


class TrafficRoute(FrozenModel):
    backends: tuple[TrafficBackend, ...] = ()


def read_route(state: Path) -> TrafficRoute:
    path = state / ROUTE_FILE
    return TrafficRoute.model_validate_json(path.read_bytes()) if path.is_file() else TrafficRoute()


class TrafficRouter:
    """Who gets the next request: in every run of 100, each backend gets as many as its share says."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self._lock = threading.Lock()
        self._stamp, self._route = -1, TrafficRoute()
        self._owed: dict[str, int] = {}  # by digest: its share so far, less what it was given
        self.counts: dict[str, dict[str, int]] = {}

    def choose_backend(self) -> TrafficBackend | None:
        with self._lock:
            stamp = (self.state / ROUTE_FILE).stat().st_mtime_ns if (self.state / ROUTE_FILE).is_file() else 0
            if stamp != self._stamp:
                self._stamp, self._route, self._owed = stamp, read_route(self.state), {}
            backends = [one for one in self._route.backends if one.percent > 0]
            if not backends:
                return None
            for one in backends:
                self._owed[one.digest] = self._owed.get(one.digest, 0) + one.percent
            chosen = max(backends, key=lambda one: self._owed[one.digest])
            self._owed[chosen.digest] -= sum(one.percent for one in backends)
            return chosen

    def count_request(self, digest: str, *, failed: bool) -> None:
        with self._lock:
            counted = self.counts.setdefault(digest, {"requests": 0, "failed": 0})
            counted["requests"] += 1
            counted["failed"] += failed


def build_handler(router: TrafficRouter) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else a reply's body waits 40 ms for the headers to be acknowledged

        def do_GET(self) -> None:
            if self.path == COUNTS_PATH:
                self._json(200, router.counts)
                return
            backend = router.choose_backend()
            if backend is None:
                self._json(503, {"error": {"message": "nothing is deployed here"}})
                return
            try:
                failed = self._pass_on(backend)
            except (OSError, http.client.HTTPException):
                failed, self.close_connection = True, True
            router.count_request(backend.digest, failed=failed)

        do_POST = do_PUT = do_DELETE = do_GET

        def _pass_on(self, backend: TrafficBackend) -> bool:
            """Did the server fail?"""
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                self._json(411, {"error": {"message": "send a Content-Length"}})
                return False
            place = urlsplit(backend.url)
            server = http.client.HTTPConnection(place.hostname or "", place.port, timeout=ANSWER_TIMEOUT_S)
            headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_HEADERS}
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            try:
                try:
                    server.request(self.command, self.path, body=body or None, headers=headers)
                    reply = server.getresponse()
                except OSError:
                    self._json(502, {"error": {"message": "the server behind this address does not answer"}})
                    return True
                self._relay(reply)
                return reply.status >= 500
            finally:
                server.close()

        def _relay(self, reply: http.client.HTTPResponse) -> None:
            self.send_response(reply.status)
            length = reply.getheader("Content-Length")
            for name, value in reply.getheaders():
                if name.lower() not in _HOP_HEADERS and name.lower() not in ("date", "server"):
                    self.send_header(name, value)
            if length is None:
                self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            while block := reply.read1(_BLOCK_BYTES):
                self.wfile.write(block if length is not None else b"%x\r\n%s\r\n" % (len(block), block))
                self.wfile.flush()
            if length is None:
                self.wfile.write(b"0\r\n\r\n")

        def _json(self, status: int, content: Any) -> None:
            encoded = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(encoded)))
            self.end_headers()
            self.wfile.write(encoded)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: paths and addresses of clients are not written down."""

    return Handler


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    args = parser.parse_args(argv)
    server = ThreadingHTTPServer((args.host, args.port), build_handler(TrafficRouter(args.state)))
    server.daemon_threads = True
    server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
