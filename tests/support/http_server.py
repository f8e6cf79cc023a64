"""A real HTTP server on a free port of 127.0.0.1 for tests of endpoints; the test starts and stops it."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]  # names in lower case
    body: Any  # parsed JSON; None without a body


@dataclass
class Server:
    url: str
    requests: list[Request] = field(default_factory=list)  # in the order of arrival
    stopping: threading.Event = field(default_factory=threading.Event)

    def hang(self) -> None:
        """Block until the server stops, for handlers that never answer."""
        self.stopping.wait(timeout=30)


# status and body, or status, body and further headers
Reply = tuple[int, bytes | dict[str, Any]] | tuple[int, bytes | dict[str, Any], dict[str, str]]


@contextlib.contextmanager
def serving(reply: Callable[[Request], Reply]) -> Iterator[Server]:
    """Start a server that answers every request with `reply(request)`, each in its own thread."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            content = json.loads(self.rfile.read(length)) if length else None
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = Request(self.command, self.path, headers, content)
            server.requests.append(request)
            status, body, *more = reply(request)
            encoded = body if isinstance(body, bytes) else json.dumps(body).encode()
            with contextlib.suppress(ConnectionError):  # the client may have given up by now
                self.send_response(status)
                self.send_header("Content-Length", str(len(encoded)))
                for name, value in more[0].items() if more else ():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(encoded)

        do_GET = do_POST
        do_PATCH = do_POST

        def log_message(self, format: str, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = Server(f"http://127.0.0.1:{http.server_address[1]}")
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.stopping.set()
        http.shutdown()
        thread.join()
        http.server_close()


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
