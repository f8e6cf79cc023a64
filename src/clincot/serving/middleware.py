"""Middleware for API keys, limits, the queue, deadlines and disconnections.

It also logs one line per request. It is a plain ASGI wrapper, because it must see a request before its body is read,
and a client that disconnects while the answer is computed. The three protocols behind it need no code for any of this.
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

from clincot.config.server_settings import ServeSettings
from clincot.serving import metrics
from clincot.serving.api_errors import ApiError, RequestCancelled
from clincot.serving.auth import ApiKeys
from clincot.serving.request_context import RequestContext, current_request

_LOG = logging.getLogger("clincot.serve")
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

CHAT_PATH = "/openai/v1/chat/completions"
_V1_PATH = re.compile(r"/v1/models/[^/]+:predict")
_V2_PATH = re.compile(r"/v2/models/[^/]+(/versions/[^/]+)?/infer")
# paths of probes and Prometheus, which need no key
_PUBLIC_PATHS = re.compile(r"/|/metrics|/v2/health/(live|ready)|/v1/models/[^/:]+|/v2/models/[^/]+/ready")
# routes of the SDK that would let a client unload the model, or that are not implemented here
CLOSED_PATHS = re.compile(r"/v2/repository/.*|/v1/models/.*:explain")
_JSON_TYPE = re.compile(r"application/json\s*(;.*)?", re.IGNORECASE)
_UNSAFE_CHARS = re.compile(r"[^A-Za-z0-9/_.:-]")


class RequestMiddleware:
    """The ASGI application that the server runs, around the one with the routes."""

    def __init__(self, app: App, settings: ServeSettings, keys: ApiKeys | None) -> None:
        self._app, self._settings, self._keys = app, settings, keys
        self._accepted = 0
        self._pace_s = 1.0  # exponential moving average of the time of an answer, for Retry-After

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
            sent.status = 499  # "client closed request"; only for the log and metrics
        except Exception as error:  # a bug: log where it happened, but not its message, which may quote the request
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
        path = scope["path"]
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if CLOSED_PATHS.fullmatch(path):
            raise ApiError(404, "not_found", "the route does not exist")
        if self._keys is not None and not (scope["method"] in ("GET", "HEAD") and _PUBLIC_PATHS.fullmatch(path)):
            self._keys.check_authorization(headers.get("authorization"))
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        _check_headers(headers, self._settings)
        scope = _normalize_content_type(scope)
        with self._reserve_slot():
            body = await _read_body(receive, self._settings)
            began = time.monotonic()
            await self._run_app(scope, body, receive, send)
            self._pace_s += 0.1 * (time.monotonic() - began - self._pace_s)

    @contextmanager
    def _reserve_slot(self) -> Iterator[None]:
        """Reserve one of the slots for running and waiting requests.

        Raises ApiError (429) if none is free.
        """
        settings = self._settings
        if self._accepted >= settings.running + settings.waiting:
            wait = min(30, max(1, round(self._pace_s * settings.waiting / settings.running)))
            raise ApiError(429, "queue_full", "the server's queue is full; try again later", retry_after_s=wait)
        self._accepted += 1
        try:
            yield
        finally:
            self._accepted -= 1

    async def _run_app(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Run the application, and cancel it and its work if the client disconnects."""
        context = RequestContext(self._settings.deadline_s)
        current_request.set(context)
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
            context.cancel()
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
            context.cancel()  # stop all work for this request, however it ended
            for task in (watcher, work):
                task.cancel()
            await asyncio.gather(watcher, work, return_exceptions=True)


async def _call_app(app: App, scope: Scope, receive: Receive, send: Send) -> None:
    await app(scope, receive, send)


class _StatusRecorder:
    """Wraps `send` and records the status that was sent."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 0

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = int(message["status"])
        await self._send(message)


def detect_protocol(path: str) -> str:
    """The protocol of a path: openai, v1, v2 or other."""
    if path == CHAT_PATH:
        return "openai"
    if _V1_PATH.fullmatch(path):
        return "v1"
    return "v2" if _V2_PATH.fullmatch(path) else "other"


def log_unexpected_error(error: BaseException) -> None:
    """Log the type and the place of an unexpected error, without its message.

    The message may quote the request.
    """
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    places = [f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in frames]
    _LOG.error("unexpected %s at %s", type(error).__name__, " < ".join(places))


def _check_headers(headers: dict[str, str], settings: ServeSettings) -> None:
    if not _JSON_TYPE.fullmatch(headers.get("content-type", "")):
        raise ApiError(415, "unsupported_media_type", "expected a request with Content-Type: application/json")
    if headers.get("content-encoding", "identity") != "identity":
        raise ApiError(415, "unsupported_encoding", "expected a body without compression")
    if any(name.startswith("ce-") for name in headers):
        raise ApiError(415, "unsupported_media_type", "CloudEvents are not supported; send plain JSON")
    length = headers.get("content-length", "0")
    if length.isdigit() and int(length[:18]) > settings.max_body_bytes:
        raise _build_size_error(settings)


def _normalize_content_type(scope: Scope) -> Scope:
    """Drop parameters and case of the media type, which the gate has accepted as JSON.

    KServe's DataPlane.decode (kserve 0.21.0, protocol/dataplane.py) compares the header with JSON_HEADERS letter by
    letter. RFC 8259 section 11 defines no parameters, and RFC 9110 section 8.3.1 ignores case.
    """
    others = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-type"]
    return {**scope, "headers": [*others, (b"content-type", b"application/json")]}


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
        raise ApiError(408, "body_too_slow", f"the body did not arrive within {settings.body_s:g} s") from None


def _build_size_error(settings: ServeSettings) -> ApiError:
    return ApiError(413, "body_too_large", f"expected a body of at most {settings.max_body_bytes} bytes")


async def _send_error(refused: ApiError, path: str, send: _StatusRecorder) -> None:
    if send.status:  # a reply has already been started
        return
    metrics.REFUSED.labels(refused.code).inc()
    body = json.dumps(refused.build_body(path)).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **refused.headers}
    if refused.status in (408, 413, 429):  # the rest of the body is not read
        headers["Connection"] = "close"
    await send(
        {
            "type": "http.response.start",
            "status": refused.status,
            "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})
