"""A client that does not take part loses its connection, and costs the others nothing."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import uvicorn

from clincot.config.server_settings import ServeSettings
from clincot.serving.auth import ApiKeys
from clincot.serving.connections import MAX_HEADER_BYTES, build_protocol_class
from tests.support.model_servers import LOOK_ONCE, PREDICT, Parrot, serving_here, until, v1

SHORT = {"propose": LOOK_ONCE, "header_s": 0.5, "body_s": 0.5, "reply_s": 0.5, "idle_s": 1.0}
HEAD = f"POST {PREDICT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n".encode()
GET = b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n\r\n"


@contextlib.contextmanager
def connected(url: str) -> Iterator[socket.socket]:
    address = httpx.URL(url)
    assert address.port is not None
    with socket.create_connection((address.host, address.port), timeout=60) as connection:
        yield connection


def read_all(connection: socket.socket) -> bytes:
    """What the server sends until it closes the connection."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65536):
            received += piece
    return received


def send_until_reset(connection: socket.socket, piece: bytes, pause_s: float = 0.0) -> float:
    """Send the piece again and again; returns after how many seconds the server ended the connection."""
    began = time.monotonic()
    with contextlib.suppress(ConnectionError):
        while time.monotonic() - began < 120:
            connection.sendall(piece)
            time.sleep(pause_s)
    return time.monotonic() - began


@pytest.fixture(scope="module")
def short() -> Iterator[str]:
    parrot = Parrot()
    parrot.go.set()
    with serving_here(parrot, ServeSettings.model_validate(SHORT)) as url:
        yield url


@pytest.mark.parametrize(
    "start", [b"", b"GET / HTTP/1.1\r\nX: ", GET + b"GET / HT"], ids=["nothing", "half a header", "half a second one"]
)
def test_a_connection_without_a_whole_header_is_closed(short: str, start: bytes) -> None:
    with connected(short) as connection:
        connection.sendall(start)
        began = time.monotonic()
        read_all(connection)
        assert 0.4 <= time.monotonic() - began < 20


def test_a_header_that_grows_slowly_is_closed_too(short: str) -> None:
    """A byte every 0.1 s does not prolong the 0.5 s."""
    with connected(short) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nX: ")
        assert send_until_reset(connection, b"x", pause_s=0.1) < 10


def test_a_header_has_a_limit(short: str) -> None:
    with connected(short) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(b"GET / HTTP/1.1\r\nX: " + b"x" * (MAX_HEADER_BYTES + 65536))
        assert read_all(connection).startswith((b"HTTP/1.1 400", b""))
    assert httpx.get(f"{short}/v2/health/live").status_code == 200


def test_an_idle_connection_is_closed_after_its_time(short: str) -> None:
    """The limit after a reply is idle_s (1 s), not header_s."""
    with connected(short) as connection:
        connection.sendall(GET)
        began = time.monotonic()
        assert read_all(connection).startswith(b"HTTP/1.1 200")
        assert 0.9 <= time.monotonic() - began < 20


def test_a_slow_body_gets_408(short: str) -> None:
    with connected(short) as connection:
        connection.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
        assert read_all(connection).startswith(b"HTTP/1.1 408")


def test_a_client_that_sends_too_much_reads_why(short: str) -> None:
    """The reply comes before the 64 MiB are sent. Closing at once would reset the connection, and the reply with it."""
    content = b"x" * (64 << 20)
    reply = httpx.post(short + PREDICT, content=content, headers={"Content-Type": "application/json"}, timeout=60)
    assert (reply.status_code, reply.json()["code"]) == (413, "body_too_large")


def test_slow_bodies_take_no_slot(film: str) -> None:
    """One request may run and none may wait; twenty clients send half a body and go on to be slow."""
    parrot = Parrot()
    parrot.go.set()
    settings = ServeSettings.model_validate({"propose": LOOK_ONCE, "running": 1, "waiting": 0, "body_s": 60})
    with serving_here(parrot, settings) as url, contextlib.ExitStack() as stack:
        for _ in range(20):
            connection = stack.enter_context(connected(url))
            connection.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
        assert httpx.post(url + PREDICT, json=v1("Is there a nodule?", film), timeout=60).status_code == 200


async def reply_with_64_mib(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % (64 << 20))]})
    await send({"type": "http.response.body", "body": bytes(64 << 20)})


def test_an_unread_reply_is_dropped() -> None:
    """The reply is larger than the buffers of both sides; after 0.5 s the connection is closed, and most is unsent."""
    protocol = build_protocol_class(ServeSettings.model_validate(SHORT))
    server = uvicorn.Server(uvicorn.Config(reply_with_64_mib, http=protocol, lifespan="off", log_config=None))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        until(lambda: server.started)
        with connected(f"http://127.0.0.1:{listener.getsockname()[1]}") as connection:
            connection.sendall(GET)
            time.sleep(1)  # the server has accepted it by then
            until(lambda: not server.server_state.connections, timeout_s=60)
            assert len(read_all(connection)) < 64 << 20
        server.should_exit = True
        thread.join()


def test_the_rest_of_a_refused_body_is_not_read_for_ever(short: str) -> None:
    """GET has no use for a body; after the reply, its client may send for header_s (0.5 s)."""
    with connected(short) as connection:
        connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert send_until_reset(connection, b"1000\r\n" + bytes(4096) + b"\r\n", pause_s=0.05) < 10


def test_a_further_connection_replaces_the_one_that_waits_longest(short: str) -> None:
    parrot = Parrot()
    parrot.go.set()
    settings = ServeSettings.model_validate({"propose": LOOK_ONCE, "max_connections": 5, "header_s": 600})
    with serving_here(parrot, settings) as url, contextlib.ExitStack() as stack:
        held = [stack.enter_context(connected(url)) for _ in range(5)]
        for connection in held:
            connection.sendall(b"GET / HTTP/1.1\r\n")
        assert httpx.get(f"{url}/v2/health/live", timeout=60).status_code == 200
        assert read_all(held[0]) == b""  # closed without a reply
        held[1].settimeout(0.2)
        with pytest.raises(TimeoutError):  # still open
            held[1].recv(1)


def test_the_key_is_checked_before_the_body(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The reply comes although not one byte of the body was sent."""
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text("sk-right\n")
    settings = ServeSettings.model_validate({"propose": LOOK_ONCE, "body_s": 600})
    with serving_here(Parrot(), settings, keys=ApiKeys(path)) as url, connected(url) as connection:
        connection.sendall(HEAD + b"Authorization: Bearer sk-wrong\r\nContent-Length: 40000000\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 401")


def test_json_of_too_many_values_is_refused_before_it_is_parsed(short: str) -> None:
    """A million empty lists take 3 MB as text and 64 MB as objects."""
    reply = httpx.post(
        short + PREDICT, content=b"[" + b"[]," * 1_000_000 + b"1]", headers={"Content-Type": "application/json"}
    )
    assert (reply.status_code, reply.json()["code"]) == (413, "body_too_large")


def test_a_body_that_finds_no_room_gets_429(film: str) -> None:
    """No shared bytes, and a largest body of 1 MiB: one request of 1 MiB holds all, so the next one finds no room."""
    parrot = Parrot()
    settings = ServeSettings.model_validate(
        {"propose": LOOK_ONCE, "max_held_bytes": 1, "max_body_bytes": 1 << 20, "body_s": 1.0}
    )
    large = v1("Is there a nodule?", film) | {"instances": [v1("Is there a nodule?", film)["instances"][0]] * 12}
    with serving_here(parrot, settings) as url:
        body = httpx.Request("POST", url, json=large).content
        body = body[:-1] + b" " * (900_000 - len(body)) + b"}"
        with connected(url) as connection:
            connection.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            assert parrot.asked.wait(60)
            late = httpx.post(url + PREDICT, content=body, headers={"Content-Type": "application/json"}, timeout=60)
            assert (late.status_code, late.json()["code"]) == (429, "queue_full")
            small = httpx.post(url + PREDICT, json={"instances": []}, timeout=60)
            assert small.status_code == 422  # small bodies need no room
            parrot.go.set()
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
