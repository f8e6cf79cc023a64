"""The reverse proxy of a local deployment, as its own process in front of a real server."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from clincot.deployment.targets.traffic_route import COUNTS_PATH, TrafficBackend, TrafficRoute, TrafficRouter
from tests.support.http_server import free_port
from tests.support.model_servers import until

TIMEOUT_S = 60
EVENTS = (b"data: one\n\n", b"data: two\n\n", b"data: [DONE]\n\n")


@dataclass
class Backend:
    """A server whose replies the test steps through."""

    url: str = ""
    proceed: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    received: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)
    lost_client: threading.Event = field(default_factory=threading.Event)


@contextlib.contextmanager
def running_backend() -> Iterator[Backend]:
    backend = Backend()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            backend.received.append((self.command, self.path, headers, body))
            routes: dict[str, Callable[[], None]] = {"/stream": self.stream, "/cut": self.cut, "/fail": self.fail}
            routes.get(self.path, self.answer)()

        do_GET = do_PUT = do_DELETE = do_POST

        def answer(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "4")
            self.send_header("Content-Encoding", "x-unknown")
            self.send_header("Set-Cookie", "a=1")
            self.send_header("Set-Cookie", "b=2")
            self.send_header("Keep-Alive", "timeout=5")
            self.end_headers()
            self.wfile.write(b"done")

        def fail(self) -> None:
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def cut(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"half")
            self.close_connection = True

        def stream(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            try:
                for event in EVENTS:
                    assert backend.proceed.acquire(timeout=TIMEOUT_S)
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
                self.wfile.write(b"0\r\n\r\n")
            except OSError:
                backend.lost_client.set()
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    backend.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield backend
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@dataclass
class Splitter:
    url: str
    state: Path

    def set_route(self, *backends: tuple[str, str]) -> None:
        """Share the traffic equally between (digest, address) pairs."""
        shares = [TrafficBackend(digest=digest, url=url, percent=100 // len(backends)) for digest, url in backends]
        (self.state / "route.json").write_text(TrafficRoute(backends=tuple(shares)).model_dump_json())

    def counts(self, digest: str) -> dict[str, int]:
        counts: dict[str, dict[str, int]] = httpx.get(self.url + COUNTS_PATH, timeout=TIMEOUT_S).json()
        return counts.get(digest, {})


@pytest.fixture(scope="module")
def splitter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Splitter]:
    state, port = tmp_path_factory.mktemp("state"), free_port()
    command = [sys.executable, "-m", "clincot.deployment.targets.traffic_splitter"]
    process = subprocess.Popen([*command, "--state", str(state), "--port", str(port)])
    splitter = Splitter(f"http://127.0.0.1:{port}", state)

    def listening() -> bool:
        assert process.poll() is None
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(splitter.url + COUNTS_PATH, timeout=5).status_code == 200
        return False

    try:
        until(listening)
        yield splitter
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture
def backend() -> Iterator[Backend]:
    with running_backend() as backend:
        yield backend


def test_request_and_reply_pass_through_unchanged(splitter: Splitter, backend: Backend) -> None:
    """Method, escaped path, query, body, end-to-end headers and the undecoded body; hop-by-hop headers are removed."""
    splitter.set_route(("pass", backend.url))
    headers = {"X-Kept": "yes", "Connection": "keep-alive, X-Hop", "X-Hop": "no", "TE": "trailers", "Host": "example"}
    with httpx.stream("PUT", f"{splitter.url}/a%2Fb?q=1%20", content=b"body", headers=headers) as reply:
        assert (reply.status_code, b"".join(reply.iter_raw())) == (200, b"done")
    assert reply.headers["content-encoding"] == "x-unknown"
    assert reply.headers.get_list("set-cookie") == ["a=1", "b=2"]
    assert "keep-alive" not in reply.headers
    ((method, path, received, body),) = backend.received
    assert (method, path, body) == ("PUT", "/a%2Fb?q=1%20", b"body")
    assert (received["x-kept"], received["host"], received["content-length"]) == ("yes", "example", "4")
    assert not {"te", "x-hop"} & set(received)
    assert splitter.counts("pass") == {"requests": 1, "failed": 0}


def test_a_streamed_reply_arrives_chunk_by_chunk(splitter: Splitter, backend: Backend) -> None:
    """The server sends an event only after the client has received the one before."""
    splitter.set_route(("stream", backend.url))
    with httpx.stream("POST", f"{splitter.url}/stream", content=b"{}", timeout=TIMEOUT_S) as reply:
        assert reply.headers["content-type"] == "text/event-stream"
        blocks = reply.iter_raw()
        for event in EVENTS:
            backend.proceed.release()
            assert next(blocks) == event
        assert list(blocks) == []
    assert splitter.counts("stream") == {"requests": 1, "failed": 0}


def test_a_client_that_leaves_a_stream_counts_as_failed(splitter: Splitter, backend: Backend) -> None:
    """Its reply was not delivered; the server learns of it and stops."""
    splitter.set_route(("left", backend.url))
    with httpx.stream("POST", f"{splitter.url}/stream", content=b"{}", timeout=TIMEOUT_S) as reply:
        backend.proceed.release()
        assert next(reply.iter_raw()) == EVENTS[0]
    until(lambda: splitter.counts("left") == {"requests": 1, "failed": 1}, TIMEOUT_S)
    backend.proceed.release()
    backend.proceed.release()
    assert backend.lost_client.wait(TIMEOUT_S)


def test_a_client_that_leaves_before_the_reply_counts_as_failed(splitter: Splitter) -> None:
    """The server accepts the connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        splitter.set_route(("silent", f"http://127.0.0.1:{silent.getsockname()[1]}"))
        address = httpx.URL(splitter.url)
        with socket.create_connection((address.host, address.port), timeout=TIMEOUT_S) as client:
            client.sendall(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n")
            connection, _ = silent.accept()
        with connection:
            until(lambda: splitter.counts("silent") == {"requests": 1, "failed": 1}, TIMEOUT_S)


@pytest.mark.parametrize(("path", "status"), [("/fail", 503), ("/cut", None)])
def test_failures_of_the_server_are_counted(
    splitter: Splitter, backend: Backend, path: str, status: int | None
) -> None:
    """A 5xx status is passed on; a reply that breaks off ends the client's connection."""
    splitter.set_route((path, backend.url))
    if status is None:
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(splitter.url + path, timeout=TIMEOUT_S)
    else:
        assert httpx.get(splitter.url + path, timeout=TIMEOUT_S).status_code == status
    assert splitter.counts(path) == {"requests": 1, "failed": 1}


def test_a_server_that_does_not_answer_is_a_bad_gateway(splitter: Splitter) -> None:
    splitter.set_route(("down", f"http://127.0.0.1:{free_port()}"))
    reply = httpx.get(splitter.url, timeout=TIMEOUT_S)
    assert reply.status_code == 502
    assert reply.json() == {"error": {"message": "the server behind this address does not answer"}}
    assert splitter.counts("down") == {"requests": 1, "failed": 1}


def test_refusals_of_the_splitter_itself(splitter: Splitter, backend: Backend) -> None:
    """No server: 503, not counted. A body without a length: 411. An unknown method: 501."""
    splitter.set_route()
    assert httpx.get(splitter.url, timeout=TIMEOUT_S).status_code == 503
    splitter.set_route(("refused", backend.url))
    assert httpx.post(splitter.url, content=iter([b"{}"]), timeout=TIMEOUT_S).status_code == 411
    assert httpx.request("PATCH", splitter.url, timeout=TIMEOUT_S).status_code == 501
    assert backend.received == []
    assert splitter.counts("refused") == {"requests": 1, "failed": 0}


def test_a_new_route_counts_from_the_next_request_on(splitter: Splitter, backend: Backend) -> None:
    splitter.set_route(("before", backend.url))
    assert httpx.get(splitter.url, timeout=TIMEOUT_S).text == "done"
    time.sleep(0.01)  # file systems' timestamps may be coarse
    splitter.set_route(("first", backend.url), ("second", backend.url))
    for _ in range(4):
        assert httpx.get(splitter.url, timeout=TIMEOUT_S).text == "done"
    counts = json.loads(httpx.get(splitter.url + COUNTS_PATH, timeout=TIMEOUT_S).text)
    assert [counts[digest]["requests"] for digest in ("before", "first", "second")] == [1, 2, 2]


def test_the_router_reads_no_route_as_no_traffic(tmp_path: Path) -> None:
    assert TrafficRouter(tmp_path).choose_backend() is None
