"""In front of the application: keys, limits, the bounded queue, deadlines, disconnections, and one log line a request.

A plain ASGI wrapper, because it has to see a request before its body is read and a client that goes away while the
answer is made; the three protocols behind it then need to know of none of this.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from clincot.serving import metrics
from clincot.serving.api_errors import ApiError, RequestCancelled
from clincot.serving.auth import ApiKeys
from clincot.serving.request_context import RequestContext, current_request
from clincot.serving.server_settings import ServeSettings

_LOG = logging.getLogger("clincot.serve")
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

CHAT_PATH = "/openai/v1/chat/completions"
_V1_PATH = re.compile(r"/v1/models/[^/]+:predict")
_V2_PATH = re.compile(r"/v2/models/[^/]+(/versions/[^/]+)?/infer")
# what a probe or Prometheus asks for, without a key
_PUBLIC_PATHS = re.compile(r"/|/metrics|/v2/health/(live|ready)|/v1/models/[^/:]+|/v2/models/[^/]+/ready")
# routes of the SDK that would let a client unload the model, or that answer nothing here
CLOSED_PATHS = re.compile(r"/v2/repository/.*|/v1/models/.*:explain")
_JSON_TYPE = re.compile(r"application/json\s*(;.*)?", re.IGNORECASE)
_UNSAFE_CHARS = re.compile(r"[^A-Za-z0-9/_.:-]")


class RequestMiddleware:
    """The ASGI application that the server runs."""

    def __init__(self, app: App, settings: ServeSettings, keys: ApiKeys | None) -> None:
        self._app, self._settings, self._keys = app, settings, keys
        self._accepted = 0
        self._pace_s = 1.0  # a running mean of how long an answer takes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, began, sent = str(scope["path"]), time.monotonic(), _StatusRecorder(send)
        try:
            await self._handle_request(scope, receive, sent)
        except ApiError as refused:
            await _send_error(refused, path, sent)
        except RequestCancelled:
            sent.status = 499  # nobody reads it
        except Exception as error:  # a bug: its place goes to the log, its message may quote a request and goes nowhere
            log_unexpected_error(error)
            if not sent.status:
                await _send_error(ApiError(500, "internal_error", "the server failed; its log says where"), path, sent)
        finally:
            protocol = detect_protocol(path)
            metrics.REQUESTS.labels(protocol, str(sent.status or 499)).inc()
            metrics.LATENCY.labels(protocol).observe(time.monotonic() - began)
            _LOG.log(
                logging.DEBUG if protocol == "other" else logging.INFO,
                "%s %s %d %.0f ms",
                _UNSAFE_CHARS.sub("?", scope["method"][:10]),
                _UNSAFE_CHARS.sub("?", path[:100]),
                sent.status or 499,
                1000 * (time.monotonic() - began),
            )

    async def _handle_request(self, scope: Scope, receive: Receive, send: _StatusRecorder) -> None:
        path, headers = scope["path"], {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        if CLOSED_PATHS.fullmatch(path):
            raise ApiError(404, "not_found", "there is no such route")
        if self._keys is not None and not (scope["method"] in ("GET", "HEAD") and _PUBLIC_PATHS.fullmatch(path)):
            self._keys.check_authorization(headers.get("authorization"))
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        _check_headers(headers, self._settings)
        with self._reserve_slot():
            body = await _read_body(receive, self._settings)
            began = time.monotonic()
            await self._run_app(scope, body, receive, send)
            self._pace_s += 0.1 * (time.monotonic() - began - self._pace_s)

    @contextmanager
    def _reserve_slot(self) -> Iterator[None]:
        """One of the places for requests that run or wait; raises Refused (429) where none is free."""
        settings = self._settings
        if self._accepted >= settings.running + settings.waiting:
            wait = min(30, max(1, round(self._pace_s * settings.waiting / settings.running)))
            raise ApiError(
                429, "queue_full", "the server has as many requests as it takes; try again", retry_after_s=wait
            )
        self._accepted += 1
        try:
            yield
        finally:
            self._accepted -= 1

    async def _run_app(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Run the application; a client that goes away cancels it and whatever it waits for."""
        ticket = RequestContext(self._settings.deadline_s)
        current_request.set(ticket)
        gone = asyncio.Event()
        replayed = False

        async def replay() -> MutableMapping[str, Any]:
            nonlocal replayed
            if not replayed:
                replayed = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            ticket.cancel()
            gone.set()

        watcher = asyncio.create_task(watch())
        work = asyncio.create_task(_call_app(self._app, scope, replay, send))
        try:
            await asyncio.wait({watcher, work}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
                raise RequestCancelled
            work.result()
        finally:
            ticket.cancel()  # nothing of this request goes on, however it ended
            for task in (watcher, work):
                task.cancel()
            await asyncio.gather(watcher, work, return_exceptions=True)


async def _call_app(app: App, scope: Scope, receive: Receive, send: Send) -> None:
    await app(scope, receive, send)


class _StatusRecorder:
    """`send`, and which status went out."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 0

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = int(message["status"])
        await self._send(message)


def detect_protocol(path: str) -> str:
    if path == CHAT_PATH:
        return "openai"
    if _V1_PATH.fullmatch(path):
        return "v1"
    return "v2" if _V2_PATH.fullmatch(path) else "other"


def log_unexpected_error(error: BaseException) -> None:
    """Where an unexpected error came from: type, files and lines, without its message and without values."""
    places = " < ".join(
        f"{f.filename.rpartition('/')[2]}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[-6:]
    )
    _LOG.error("unexpected %s at %s", type(error).__name__, places)


def _check_headers(headers: dict[str, str], settings: ServeSettings) -> None:
    if not _JSON_TYPE.fullmatch(headers.get("content-type", "")):
        raise ApiError(415, "unsupported_media_type", "expected a body of Content-Type: application/json")
    if headers.get("content-encoding", "identity") != "identity":
        raise ApiError(415, "unsupported_encoding", "expected a body that is not compressed")
    if any(name.startswith("ce-") for name in headers):
        raise ApiError(415, "unsupported_media_type", "CloudEvents are not taken; send the JSON itself")
    length = headers.get("content-length", "0")
    if length.isdigit() and int(length[:18]) > settings.max_body_bytes:
        raise _build_size_error(settings)


async def _read_body(receive: Receive, settings: ServeSettings) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise RequestCancelled
                body += message.get("body", b"")
                if len(body) > settings.max_body_bytes:
                    raise _build_size_error(settings)
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise ApiError(408, "body_too_slow", f"the body did not come within {settings.body_s:g} s") from None


def _build_size_error(settings: ServeSettings) -> ApiError:
    return ApiError(413, "body_too_large", f"expected a body of at most {settings.max_body_bytes} bytes")


async def _send_error(refused: ApiError, path: str, send: _StatusRecorder) -> None:
    if send.status:  # too late to say so
        return
    metrics.REFUSED.labels(refused.code).inc()
    body = json.dumps(refused.build_body(path)).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **refused.headers}
    if refused.status in (408, 413, 429):  # the rest of the body is not wanted
        headers["Connection"] = "close"
    await send(
        {
            "type": "http.response.start",
            "status": refused.status,
            "headers": [(k.lower().encode(), v.encode()) for k, v in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})
