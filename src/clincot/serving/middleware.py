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
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any

from clincot.config.server_settings import ServeSettings
from clincot.serving import metrics
from clincot.serving.api_errors import ApiError, RequestCancelled, build_internal_error, log_unexpected_error
from clincot.serving.auth import ApiKeys
from clincot.serving.budgets import BodyBudget, BodyLease, PacedTurns
from clincot.serving.content_types import BINARY_LENGTH_HEADER, V2_INFER_PATH, choose_content_type
from clincot.serving.page_routes import PAGE_CHALLENGE, is_page_request
from clincot.serving.request_context import RequestContext, current_request
from clincot.serving.tracing import end_request, trace_request

_LOG = logging.getLogger("clincot.serve")
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

CHAT_PATH = "/openai/v1/chat/completions"
_V1_PATH = re.compile(r"/v1/models/[^/]+:predict")
_METRICS_PATH = "/metrics"
# Gateways add one of these headers to every request, and a client cannot take it away. KServe's own route of an
# endpoint leads to every path, so it would let anyone read the metrics.
_GATEWAY_HEADERS = ("x-forwarded-for", "forwarded")
# paths of probes and Prometheus, which need no key
_PUBLIC_PATHS = re.compile(r"/|/metrics|/health|/v2/health/(live|ready)|/v1/models/[^/:]+|/v2/models/[^/]+/ready")
# routes of the SDK that would let a client unload the model, or that are not implemented here
CLOSED_PATHS = re.compile(r"/v2/repository/.*|/v1/models/.*:explain")
LARGE_BODY_BYTES = 1 << 20  # a larger one is parsed for milliseconds to tenths of a second
MAX_JSON_VALUES = 200_000  # of a body; 16 questions of 2,000 commas each have fewer
_OWN_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")  # a client's request id that is safe in a header
_UNSAFE_CHARS = re.compile(r"[^A-Za-z0-9/_.:-]")


class RequestMiddleware:
    """The ASGI application that the server runs, around the one with the routes."""

    def __init__(self, app: App, settings: ServeSettings, keys: ApiKeys | None) -> None:
        self._app, self.settings, self._keys = app, settings, keys
        self._bodies = BodyBudget(settings.max_held_bytes, settings.max_body_bytes)
        self._large_bodies = PacedTurns()
        metrics.HELD_BYTES.set_function(lambda: self._bodies.used)
        self._accepted = 0
        self._pace_s = 1.0  # exponential moving average of the time of an answer, for Retry-After

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = str(scope["path"])
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        sent = _StatusRecorder(send, read_request_id(headers.get("x-request-id", "")))
        if detect_protocol(path) == "other":
            await self._answer_request(scope, headers, receive, sent)
            return
        with trace_request(f"{detect_protocol(path)} answer", headers) as span:
            await self._answer_request(scope, headers, receive, sent)
            end_request(span, sent.status or 499)

    async def _answer_request(
        self, scope: Scope, headers: Mapping[str, str], receive: Receive, sent: _StatusRecorder
    ) -> None:
        """Handle a request, answer its errors, and record its end."""
        path, began = str(scope["path"]), time.monotonic()
        try:
            await self._handle_request(scope, headers, receive, sent)
        except ApiError as refused:
            await _send_error(refused, path, sent)
        except RequestCancelled:
            sent.status = 499  # "client closed request"; only for the log and metrics
        except Exception as error:  # a bug: log where it happened, but not its message, which may quote the request
            log_unexpected_error(error)
            if not sent.status:
                await _send_error(build_internal_error(), path, sent)
        finally:
            seconds, status = time.monotonic() - began, sent.status or 499
            record_request(detect_protocol(path), scope["method"], path, status, sent.logged_id, seconds)

    async def _handle_request(
        self, scope: Scope, headers: Mapping[str, str], receive: Receive, send: _StatusRecorder
    ) -> None:
        path = scope["path"]
        if CLOSED_PATHS.fullmatch(path):
            raise ApiError(404, "not_found", "the route does not exist")
        reads = scope["method"] in ("GET", "HEAD")
        if reads and self.settings.page and is_page_request(path, headers):
            self._check_browser_key(headers.get("authorization"))
        elif not (reads and _PUBLIC_PATHS.fullmatch(path)) or _reads_metrics_from_outside(path, headers):
            self.check_key(headers.get("authorization"))
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        _check_headers(headers, self.settings)
        scope = _replace_content_type(scope, choose_content_type(path, headers))
        self.check_queue()  # before the body, so that a full server does not read it
        async with self._bodies.open_lease() as lease:
            body = await self._read_body(receive, lease)
            async with self._pace_large_body(len(body)) as end_turn:
                check_json_size(body, headers)
                with self.reserve_slot():  # after the body: a slow client must not take a slot
                    began = time.monotonic()
                    await self._run_app(scope, body, receive, send, end_turn)
                    self._pace_s += 0.1 * (time.monotonic() - began - self._pace_s)

    async def _read_body(self, receive: Receive, lease: BodyLease) -> bytes:
        """Read the body as far as the budget of all bodies allows.

        Raises ApiError: 408 if the client is too slow, 413 if the body is too large, 429 if there was no room in time.
        """
        settings, body, began = self.settings, bytearray(), time.monotonic()
        try:
            async with asyncio.timeout(settings.body_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise RequestCancelled
                    body += message.get("body", b"")
                    if len(body) > settings.max_body_bytes:
                        raise _build_size_error(settings)
                    await lease.grow_to(len(body))
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            if lease.waiting:
                raise self._build_queue_error() from None
            raise build_slow_body_error(settings) from None
        self._bodies.complete(lease)
        metrics.observe_stage("body", time.monotonic() - began)
        return bytes(body)

    @asynccontextmanager
    async def _pace_large_body(self, size: int) -> AsyncIterator[Callable[[], None]]:
        """Hold the turn to check and parse a large body, until what is yielded is called or the block ends.

        Raises ApiError (429) if the turn does not come in time.
        """
        async with AsyncExitStack() as stack:
            end_turn: Callable[[], None] = _do_nothing
            if size > LARGE_BODY_BYTES:
                async with self._limit_wait():
                    end_turn = await stack.enter_async_context(self._large_bodies.take())
            yield end_turn

    @asynccontextmanager
    async def wait_for_room(self, turns: asyncio.Semaphore) -> AsyncIterator[None]:
        """Hold one of the turns. Raises ApiError (429) if none is free in time."""
        async with self._limit_wait():
            await turns.acquire()
        try:
            yield
        finally:
            turns.release()

    @asynccontextmanager
    async def hold_bytes(self, size: int) -> AsyncIterator[None]:
        """Count a message that is in memory already, such as gRPC's, in the budget of all bodies.

        Raises ApiError (429) if there was no room in time.
        """
        async with self._bodies.open_lease() as lease:
            async with self._limit_wait():
                await lease.grow_to(size)
            self._bodies.complete(lease)
            yield

    @asynccontextmanager
    async def _limit_wait(self) -> AsyncIterator[None]:
        """Wait for room or a turn in this block. Raises ApiError (429) if it takes longer than a body may."""
        try:
            async with asyncio.timeout(self.settings.body_s):
                yield
        except TimeoutError:
            raise self._build_queue_error() from None

    def check_queue(self) -> None:
        """Raise ApiError (429) if no slot is free, for running or waiting."""
        if self._accepted >= self.settings.running + self.settings.waiting:
            raise self._build_queue_error()

    def _build_queue_error(self) -> ApiError:
        settings = self.settings
        wait = min(30, max(1, round(self._pace_s * settings.waiting / settings.running)))
        return ApiError(429, "queue_full", "the server's queue is full; try again later", retry_after_s=wait)

    def check_key(self, authorization: str | None) -> None:
        """Raise ApiError (401) unless the server needs no keys or the header has a valid one."""
        if self._keys is not None:
            self._keys.check_authorization(authorization)

    def _check_browser_key(self, authorization: str | None) -> None:
        """Like check_key, but a browser asks its user for the key."""
        try:
            self.check_key(authorization)
        except ApiError as error:
            error.challenge = PAGE_CHALLENGE
            raise

    @contextmanager
    def reserve_slot(self) -> Iterator[None]:
        """Reserve one of the slots for running and waiting requests.

        Raises ApiError (429) if none is free.
        """
        self.check_queue()
        self._accepted += 1
        try:
            yield
        finally:
            self._accepted -= 1

    async def _run_app(
        self, scope: Scope, body: bytes | None, receive: Receive, send: Send, on_parsed: Callable[[], None]
    ) -> None:
        """Run the application, and cancel it and its work if the client disconnects."""
        context = RequestContext(self.settings.deadline_s, on_parsed)
        current_request.set(context)
        gone = asyncio.Event()

        async def replay() -> MutableMapping[str, Any]:
            nonlocal body
            if body is not None:
                message = {"type": "http.request", "body": body, "more_body": False}
                body = None  # the application keeps what it needs
                return message
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


def _do_nothing() -> None:
    pass


async def _call_app(app: App, scope: Scope, receive: Receive, send: Send) -> None:
    await app(scope, receive, send)


class _StatusRecorder:
    """Wraps `send`, adds the request's id to the reply and records the status that was sent.

    given: the client's own id. It is returned, but never logged, because a client may write anything into it; the log
    has an id of the server's own, which is returned if the client has sent none.
    """

    def __init__(self, send: Send, given: str) -> None:
        self._send = send
        self.status = 0
        self.logged_id = make_request_id()
        self._returned_id = given or self.logged_id

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = int(message["status"])
            added = [(b"x-request-id", self._returned_id.encode("ascii"))]
            if self._returned_id != self.logged_id:
                added.append((b"x-clincot-request-id", self.logged_id.encode("ascii")))
            message = {**message, "headers": [*message.get("headers", ()), *added]}
        await self._send(message)


def detect_protocol(path: str) -> str:
    """The protocol of a path: openai, v1, v2 or other."""
    if path in (CHAT_PATH, "/v1/chat/completions"):
        return "openai"
    if _V1_PATH.fullmatch(path):
        return "v1"
    return "v2" if V2_INFER_PATH.fullmatch(path) else "other"


def record_request(protocol: str, method: str, path: str, status: int, request_id: str, seconds: float) -> None:
    """Count a request and log one line about it, without its query, which may contain anything.

    protocol: see detect_protocol; "grpc" for questions over gRPC, whose status is the one that HTTP would have had.
    request_id: the server's own.
    """
    metrics.REQUESTS.labels(protocol, str(status)).inc()
    metrics.LATENCY.labels(protocol).observe(seconds)
    method, path = _UNSAFE_CHARS.sub("?", method[:10]), _UNSAFE_CHARS.sub("?", path[:100])
    fields = {"protocol": protocol, "method": method, "path": path, "status": status, "ms": round(1000 * seconds)}
    level = logging.DEBUG if protocol == "other" else logging.INFO
    text = "%s %s %d %.0f ms %s"
    extra = {"fields": {**fields, "request": request_id}}
    _LOG.log(level, text, method, path, status, 1000 * seconds, request_id, extra=extra)


def make_request_id() -> str:
    """A new id of a request, for the log."""
    return f"req_{uuid.uuid4().hex}"


def read_request_id(given: str) -> str:
    """The client's X-Request-ID, which Istio sets as well; "" if it cannot be returned in a header."""
    return given if _OWN_ID.fullmatch(given) else ""


def _reads_metrics_from_outside(path: str, headers: Mapping[str, str]) -> bool:
    """Whether a gateway has forwarded a request for metrics; Prometheus scrapes the address of the pod."""
    return path == _METRICS_PATH and any(name in headers for name in _GATEWAY_HEADERS)


def _check_headers(headers: Mapping[str, str], settings: ServeSettings) -> None:
    if headers.get("sec-fetch-site") == "cross-site":  # another site's page, with the key that the browser remembers
        raise ApiError(403, "cross_site", "expected a browser's request to come from this server's own page")
    if headers.get("content-encoding", "identity") != "identity":
        raise ApiError(415, "unsupported_encoding", "expected a body without compression")
    if any(name.startswith("ce-") for name in headers):
        raise ApiError(415, "unsupported_media_type", "CloudEvents are not supported; send plain JSON")
    length = headers.get("content-length", "0")
    if length.isdigit() and int(length[:18]) > settings.max_body_bytes:
        raise _build_size_error(settings)


def _replace_content_type(scope: Scope, media_type: str) -> Scope:
    others = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-type"]
    return {**scope, "headers": [*others, (b"content-type", media_type.encode("ascii"))]}


def check_json_size(body: bytes, headers: Mapping[str, str]) -> None:
    """Refuse JSON of too many values, before it is parsed.

    An empty list takes three bytes of a body and 64 of memory, so the limit of bytes does not limit the memory. Of a
    body with binary tensors, only the first bytes are JSON (KServe's Binary Tensor Data Extension). Raises ApiError.
    """
    length = headers.get(BINARY_LENGTH_HEADER, "")
    text = body[: int(length[:18])] if length.isdigit() else body
    if text.count(b",") + text.count(b"[") + text.count(b"{") > MAX_JSON_VALUES:
        raise ApiError(413, "body_too_large", f"expected a body of at most {MAX_JSON_VALUES} JSON values")


def build_slow_body_error(settings: ServeSettings) -> ApiError:
    """The error of a body that arrives too slowly (408)."""
    return ApiError(408, "body_too_slow", f"the body did not arrive within {settings.body_s:g} s")


def _build_size_error(settings: ServeSettings) -> ApiError:
    return ApiError(413, "body_too_large", f"expected a body of at most {settings.max_body_bytes} bytes")


async def _send_error(refused: ApiError, path: str, send: _StatusRecorder) -> None:
    if send.status:  # a reply has already been started
        return
    metrics.REFUSED.labels(refused.code).inc()
    body = json.dumps(refused.build_body(path)).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **refused.headers}
    await send(
        {
            "type": "http.response.start",
            "status": refused.status,
            "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})
