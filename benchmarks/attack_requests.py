"""Requests that are built to make a server fail: in their JSON, and in how their bytes are sent."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from benchmarks.attack_images import build_large_png, iter_image_attacks

V1_PATH, V2_PATH, CHAT_PATH = "/v1/models/policy:predict", "/v2/models/policy/infer", "/openai/v1/chat/completions"
CLOSED = 0  # instead of a status: the server closed the connection without a reply
PATIENCE_S = 150.0  # a connection that is neither answered nor closed by then has won


@dataclass(frozen=True)
class Target:
    """The server under attack, and one request that it answers."""

    host: str
    port: int
    honest: bytes  # body of a V1 request


@dataclass(frozen=True)
class Attack:
    """One attack: `run` returns the statuses of the replies; each must be in `accepted`.

    build: builds its body, and keeps it for later runs.
    """

    name: str
    run: Callable[[Target], Awaitable[set[int]]]
    accepted: frozenset[int]
    build: Callable[[], bytes] = bytes


def iter_attacks() -> Iterator[Attack]:
    """All attacks."""
    for name, build, accepted in iter_image_attacks():
        yield _attack_with_body(name, cache(lambda build=build: _build_v1(build())), accepted)
    yield from _iter_json_attacks()
    yield from _iter_connection_attacks()


def _build_v1(*images: bytes, question: str = "Is there a nodule?") -> bytes:
    instances = [{"question": question, "image": base64.b64encode(image).decode()} for image in images]
    return json.dumps({"instances": instances}).encode()


def _attack_with_body(
    name: str, build: Callable[[], bytes], accepted: frozenset[int], path: str = V1_PATH, head: str = ""
) -> Attack:
    async def run(target: Target) -> set[int]:
        body = await asyncio.to_thread(build)
        return {await send_request(target, body, path=path, head=head)}

    return Attack(name, run, accepted | {408, 429, 504}, build)


async def send_request(
    target: Target, body: bytes, *, path: str = V1_PATH, head: str = "", method: str = "POST"
) -> int:
    """Send one request; returns the status of the reply, or CLOSED."""
    start = f"{method} {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return await exchange(target, start.encode() + head.encode() + b"\r\n", body)


async def exchange(target: Target, *pieces: bytes, pause_s: float = 0.0, stay_open: bool = False) -> int:
    """Send bytes and read the status of the first reply; CLOSED without one.

    pause_s: between the pieces. stay_open: then wait until the server closes the connection.
    """
    async with asyncio.timeout(PATIENCE_S):
        reader, writer = await asyncio.open_connection(target.host, target.port)
        sending = asyncio.create_task(_send_pieces(writer, pieces, pause_s))
        try:
            line = await reader.readline()
            if stay_open:
                await reader.read()
        except (ConnectionError, ValueError):
            line = b""
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            writer.transport.abort()
    words = line.split(b" ", 2)
    return int(words[1]) if len(words) > 1 and words[1].isdigit() else CLOSED


async def _send_pieces(writer: asyncio.StreamWriter, pieces: tuple[bytes, ...], pause_s: float) -> None:
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(pause_s)


def _iter_json_attacks() -> Iterator[Attack]:
    refused = frozenset({400, 413, 422})
    bodies: list[tuple[str, Callable[[], bytes]]] = [
        ("JSON of 40 million open brackets", lambda: b"[" * (40 << 20)),
        ("JSON of 10 million empty lists", lambda: b"[" + b"[]," * 10_000_000 + b"1]"),
        ("JSON of 10 million numbers", lambda: b"[" + b"1," * 10_000_000 + b"1]"),
        ("JSON of one number of 30 MB", lambda: b'{"instances": ' + b"1" * (30 << 20) + b"}"),
        ("JSON of 90,000 keys", lambda: b"{" + b",".join(b'"k%d":1' % n for n in range(90_000)) + b"}"),
        ("JSON of 100,000 equal keys", lambda: b"{" + b'"instances":1,' * 100_000 + b'"instances":1}'),
        ("JSON nested 90,000 times", lambda: b'{"instances":' + b"[" * 90_000 + b"]" * 90_000 + b"}"),
        ("a million empty instances", lambda: b'{"instances":[' + b"{}," * 1_000_000 + b"{}]}"),
        ("17 instances", lambda: _build_v1(*[b"x"] * 17)),
        ("a question of 5 MB", lambda: _build_v1(b"x", question="x" * (5 << 20))),
        ("a question of 2,000 emoji", lambda: _build_v1(_small_png(), question="\U0001f600" * 2000)),
        ("a question with control words", lambda: _build_v1(_small_png(), question="<|im_end|><image>")),
        ("a question of null characters", lambda: _build_v1(_small_png(), question="a\0b")),
        ("a lone surrogate", lambda: b'{"instances":[{"question":"\\ud800","image":"x"}]}'),
        ("bytes that are not UTF-8", lambda: b'{"instances":[{"question":"\xff\xfe","image":"x"}]}'),
        ("NaN and Infinity", lambda: b'{"instances":[{"question":NaN,"image":Infinity}]}'),
        ("base64 that is none", lambda: b'{"instances":[{"question":"a?","image":"%%%%"}]}'),
        ("no JSON", lambda: b"<xml/>"),
        ("no body", lambda: b""),
    ]
    for name, build in bodies:
        yield _attack_with_body(name, cache(build), refused)
    for url in ("http://169.254.169.254/latest/meta-data", "file:///etc/passwd", "https://localhost/x.png"):
        body = json.dumps({"instances": [{"question": "Is there a nodule?", "image": url}]}).encode()
        yield _attack_with_body(f"the URL {url}", lambda body=body: body, frozenset({400, 403}))
    yield _attack_with_body("8 images of 16 megapixels", _build_large_v1, frozenset({200, 400, 413}))
    yield _attack_with_body("V2 of a billion elements", cache(_build_large_v2), refused, V2_PATH)
    yield _attack_with_body("chat of 60,000 parts", cache(_build_large_chat), refused, CHAT_PATH)
    yield _attack_with_body("a question about 50,000 images", cache(_build_many_images), refused)
    yield _attack_with_body("V2 of a billion rows without elements", cache(_build_empty_rows), refused, V2_PATH)
    yield _attack_with_body(
        "a compressed body", lambda: b"\x1f\x8b", frozenset({415}), head="Content-Encoding: gzip\r\n"
    )


@cache
def _small_png() -> bytes:
    return build_large_png("L", side=64)


@cache
def _build_large_v1() -> bytes:
    return _build_v1(*(build_large_png("RGBA", seed) for seed in range(8)))


def _build_large_v2() -> bytes:
    tensor: dict[str, Any] = {"datatype": "BYTES", "shape": [10**9], "data": ["x"]}
    return json.dumps({"inputs": [{"name": "question", **tensor}, {"name": "image", **tensor}]}).encode()


def _build_many_images() -> bytes:
    others = [{"image": "x", "role": "prior"}] * 50_000
    return json.dumps({"instances": [{"question": "a?", "image": "x", "others": others}]}).encode()


def _build_empty_rows() -> bytes:
    tensors = [{"name": name, "datatype": "BYTES", "shape": [1], "data": ["x"]} for name in ("question", "image")]
    tensors.append({"name": "other_images", "datatype": "BYTES", "shape": [10**9, 0], "data": []})
    return json.dumps({"inputs": tensors}).encode()


def _build_large_chat() -> bytes:
    parts = [{"type": "text", "text": "a"}] * 60_000
    return json.dumps({"model": "policy", "messages": [{"role": "user", "content": parts}]}).encode()


def _iter_connection_attacks() -> Iterator[Attack]:
    ended = frozenset({CLOSED, 400, 408, 413, 429, 431})
    start = f"POST {V1_PATH} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n".encode()
    chunked = start + b"Transfer-Encoding: chunked\r\n\r\n"
    chunk = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
    get = b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n"
    yield Attack("a header of 100 MB", _sender(start + b"X: ", *[b"x" * (1 << 20)] * 100), ended)
    yield Attack("100,000 headers", _sender(start, *[b"".join(b"X%d: y\r\n" % n for n in range(1000))] * 100), ended)
    yield Attack("a request line of 1 MB", _sender(b"GET /" + b"x" * (1 << 20) + b" HTTP/1.1\r\n\r\n"), ended)
    yield Attack("a body without end", _sender(chunked, *[chunk] * 60), ended)
    yield Attack("20,000 chunks of one byte", _sender(chunked, *[b"1\r\n \r\n" * 1000] * 20), ended)
    yield Attack("a body announced as 200 MB", _sender(start + b"Content-Length: 200000000\r\n\r\n"), ended)
    both = start + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    yield Attack("length and chunks", _sender(both), ended | {400, 422})
    yield Attack("two lengths", _sender(start + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n12345"), ended)
    yield Attack(
        "Expect without a body", _sender(start + b"Content-Length: 9\r\nExpect: 100-continue\r\n\r\n"), ended | {100}
    )
    yield Attack(
        "GET with a body without end",
        _sender(get + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 60),
        ended | {200},
    )
    yield Attack("500 requests at once", _sender((get + b"\r\n") * 500), ended | {200})
    yield Attack("a TLS hello", _sender(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500)), ended)
    yield Attack("an HTTP/2 preface", _sender(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), ended | {404, 405, 505})
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: eA==\r\n\r\n"
    yield Attack("a WebSocket", _sender(get + upgrade), ended | {200})
    yield Attack("null bytes", _sender(bytes(4096)), ended)
    yield Attack("300 idle connections", _many(300, _holder()), ended)
    yield Attack("300 half headers", _many(300, _holder(get + b"X: ")), ended)
    yield Attack("headers of one byte a second", _many(50, _slow_header), ended)
    half = start + b"Content-Length: 1000\r\n\r\n{"
    yield Attack("100 slow bodies", _many(100, _holder(half)), ended)
    yield Attack("8 bodies of 40 MB at once", _many(8, _large_body), frozenset({CLOSED, 400, 408, 413, 422, 429}))
    yield Attack("40 clients that leave", _many(40, _leave), frozenset({CLOSED}))
    yield Attack("30 replies that nobody reads", _many(30, _read_nothing), frozenset({CLOSED}))


def _sender(*pieces: bytes) -> Callable[[Target], Awaitable[set[int]]]:
    async def run(target: Target) -> set[int]:
        return {await exchange(target, *pieces)}

    return run


def _holder(*pieces: bytes) -> Callable[[Target], Awaitable[int]]:
    return lambda target: exchange(target, *pieces, stay_open=True)


def _many(count: int, one: Callable[[Target], Awaitable[int]]) -> Callable[[Target], Awaitable[set[int]]]:
    async def run(target: Target) -> set[int]:
        return set(await asyncio.gather(*(one(target) for _ in range(count))))

    return run


async def _slow_header(target: Target) -> int:
    pieces = [b"GET / HTTP/1.1\r\nX: ", *[b"x"] * 80]
    return await exchange(target, *pieces, pause_s=1.0)


async def _large_body(target: Target) -> int:
    return await send_request(target, b'{"instances": "' + b" " * (40 << 20) + b'"}')


async def _leave(target: Target) -> int:
    _, writer = await asyncio.open_connection(target.host, target.port)
    head = f"POST {V1_PATH} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    writer.write(head.encode() + f"Content-Length: {len(target.honest)}\r\n\r\n".encode() + target.honest)
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.transport.abort()
    return CLOSED


async def _read_nothing(target: Target) -> int:
    """Ask for the metrics, which are longer than a socket's buffer after some requests, and read none of them."""
    _, writer = await asyncio.open_connection(target.host, target.port, limit=1024)
    transport = writer.transport
    assert isinstance(transport, asyncio.ReadTransport)
    transport.pause_reading()
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n" * 200)
    await asyncio.sleep(20)
    transport.abort()
    return CLOSED
